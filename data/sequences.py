"""MR signal equations at 3 T: tissue values, pulse sequences, and what they make of each other.

Owns the physics of a simulated voxel. Where its tissue comes from is `data/anatomy.py`'s, how it
becomes a volume and a file is `data/simulate.py`'s. Times are ms (seconds in the BIDS sidecars),
angles degrees.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

TISSUES = ("GM", "WM", "CSF")
Values = float | np.ndarray


@dataclass(frozen=True)
class Tissue:
    """Relaxation times (ms) and water density (1 = pure water) of one tissue at 3 T."""

    t1_ms: float
    t2_ms: float
    proton_density: float


@dataclass(frozen=True)
class Mprage:
    """One MPRAGE protocol (times in ms, angle in degrees); TI is to the middle of the train."""

    repetition_ms: float
    inversion_ms: float
    echo_ms: float
    echo_spacing_ms: float
    n_excitations: int
    flip_deg: float
    inversion_efficiency: float = 0.96

    def sidecar(self) -> dict[str, Any]:
        """Return the BIDS fields (seconds)."""
        return {
            "PulseSequenceType": "MPRAGE",
            "MRAcquisitionType": "3D",
            "RepetitionTime": self.repetition_ms / 1000,
            "RepetitionTimePreparation": self.repetition_ms / 1000,
            "RepetitionTimeExcitation": self.echo_spacing_ms / 1000,
            "InversionTime": self.inversion_ms / 1000,
            "EchoTime": self.echo_ms / 1000,
            "FlipAngle": self.flip_deg,
            "NumberShots": self.n_excitations,
        }


@dataclass(frozen=True)
class FastSpinEcho:
    """One fast spin-echo protocol (times in ms); `echo_ms` is the effective echo time."""

    repetition_ms: float
    echo_ms: float
    echo_spacing_ms: float
    train_length: int

    def sidecar(self) -> dict[str, Any]:
        """Return the BIDS fields (seconds)."""
        return {
            "PulseSequenceType": "Fast spin echo",
            "MRAcquisitionType": "2D",
            "RepetitionTime": self.repetition_ms / 1000,
            "EchoTime": self.echo_ms / 1000,
            "EchoTrainLength": self.train_length,
            "FlipAngle": 90,
        }


Sequence = Mprage | FastSpinEcho


def mprage_signal(proton_density: Values, t1_ms: Values, sequence: Mprage) -> np.ndarray:
    """Signal of MPRAGE at the middle of its readout train, in the steady state.

    An inversion, a wait, `n_excitations` spoiled small-angle pulses, a wait; repeated until the
    longitudinal magnetisation before the inversion no longer changes. The equations are those of
    Marques et al. 2010 (NeuroImage 49:1271, appendix on MP2RAGE) with one readout train instead of
    two. Decay during TE is left out: at 3 T the T2* of grey and white matter nearly agree
    (Wansapura et al. 1999), so that at a TE of 2-3 ms it is a common factor.

    Parameters
    ----------
    proton_density : number or array, 1 = pure water.
    t1_ms : number or array of the same shape.

    Returns
    -------
    signal : array, relative to pure water's full magnetisation; negative before the null point.
    """
    n, spacing = sequence.n_excitations, sequence.echo_spacing_ms
    wait_before_ms = sequence.inversion_ms - n * spacing / 2
    wait_after_ms = sequence.repetition_ms - sequence.inversion_ms - n * spacing / 2
    flip = np.deg2rad(sequence.flip_deg)
    before, after, pulse = (
        np.exp(-t / np.asarray(t1_ms)) for t in (wait_before_ms, wait_after_ms, spacing)
    )
    kept = np.cos(flip) * pulse  # share of the longitudinal magnetisation left by one pulse
    driven = (1 - pulse) / (1 - kept)  # what endless pulses would drive it to
    train, half = kept**n, kept ** (n / 2)
    efficiency = sequence.inversion_efficiency
    steady = ((1 - before) * train + driven * (1 - train)) * after + 1 - after
    steady = steady / (1 + efficiency * before * train * after)
    middle = (1 - before - efficiency * steady * before) * half + driven * (1 - half)
    return proton_density * np.sin(flip) * middle


def fast_spin_echo_signal(
    proton_density: Values, t1_ms: Values, t2_ms: Values, sequence: FastSpinEcho
) -> np.ndarray:
    """Signal of a fast spin echo (RARE) at its effective echo time.

    PD (1 - exp(-(TR - ETL ESP) / T1)) exp(-TE / T2): Bloch's equations with a 90 degree excitation
    and ideal 180 degree refocusing (Hennig et al. 1986, Magn Reson Med 3:823, for the sequence).
    Recovery counts from the end of the echo train only, because each refocusing pulse inverts what
    had recovered. With one echo of spacing 0 it is the spin-echo equation of the textbooks.

    Parameters
    ----------
    proton_density, t1_ms, t2_ms : numbers or arrays of one shape.

    Returns
    -------
    signal : array, relative to pure water's full magnetisation.
    """
    recovery_ms = sequence.repetition_ms - sequence.train_length * sequence.echo_spacing_ms
    recovered = 1 - np.exp(-recovery_ms / np.asarray(t1_ms))
    return proton_density * recovered * np.exp(-sequence.echo_ms / np.asarray(t2_ms))


def rician_magnitude(signal: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Return |signal + complex Gaussian noise|, noise SD `sigma` in each of the two channels.

    The magnitude then has the Rice distribution (Gudbjartsson & Patz 1995, Magn Reson Med 34:910).
    """
    real = signal + sigma * rng.standard_normal(signal.shape, dtype=np.float32)
    imaginary = sigma * rng.standard_normal(signal.shape, dtype=np.float32)
    return np.hypot(real, imaginary)


def mix_signals(
    fractions: np.ndarray, texture: np.ndarray, tissues: dict[str, Tissue], sequence: Sequence
) -> np.ndarray:
    """Add the signals of the tissues in each voxel, each by its share of the voxel.

    Parameters
    ----------
    fractions : (3, N) shares in the order of `TISSUES`.
    texture : (2, N) relative changes of T1 and of T2; fluid has none.

    Returns
    -------
    signal : (N,) float32, signed.
    """
    signal = np.zeros(fractions.shape[1], np.float32)
    for name, share in zip(TISSUES, fractions):
        tissue, (more_t1, more_t2) = tissues[name], texture * np.float32(name != "CSF")
        t1_ms, t2_ms = tissue.t1_ms * (1 + more_t1), tissue.t2_ms * (1 + more_t2)
        if isinstance(sequence, Mprage):
            signal += share * mprage_signal(tissue.proton_density, t1_ms, sequence)
        else:
            signal += share * fast_spin_echo_signal(tissue.proton_density, t1_ms, t2_ms, sequence)
    return signal


def draw_tissues(rng: np.random.Generator) -> dict[str, Tissue]:
    """Draw one subject's tissue values at 3 T.

    Published values differ by method more than people do, T1 and T2 in opposite directions, so one
    number places grey and white matter together between Wansapura et al. 1999 (JMRI 9:531: white
    832 / 79.6, grey 1331 / 110; T1 / T2 in ms) and Stanisz et al. 2005 (Magn Reson Med 54:507:
    white 1084 / 69, grey 1820 / 99), inside the spread that Bojorquez et al. 2017 (Magn Reson
    Imaging 35:69) review; people scatter by 2 % around it. Fluid: T1 from 3817 (Lu et al. 2005,
    JMRI 22:13) to 4300 ms, T2 from 1790 to 2030 ms (both quoted from Spijkerman et al. 2017,
    MAGMA 31:415). Water densities: Gasparovic et al. 2006 (Magn Reson Med 55:1219).
    """
    method = rng.uniform()
    scatter = 1 + 0.02 * np.clip(rng.standard_normal((3, 2)), -2, 2)
    between = partial(np.interp, method, (0.0, 1.0))
    relaxation_ms = scatter * np.array(
        [
            [between((1331.0, 1820.0)), between((110.0, 99.0))],
            [between((832.0, 1084.0)), between((79.6, 69.0))],
            [rng.uniform(3817.0, 4300.0), rng.uniform(1790.0, 2030.0)],
        ]
    )
    water = (0.78, 0.65, 0.97)
    return {
        name: Tissue(float(t1), float(t2), density)
        for name, (t1, t2), density in zip(TISSUES, relaxation_ms, water)
    }


def draw_mprage(rng: np.random.Generator) -> Mprage:
    """Draw an MPRAGE protocol near those usual at 3 T."""
    return Mprage(
        repetition_ms=float(rng.choice([1900.0, 2000.0, 2300.0, 2400.0])),
        inversion_ms=float(rng.choice([850.0, 900.0, 950.0])),
        echo_ms=float(round(rng.uniform(2.2, 3.5), 2)),
        echo_spacing_ms=float(round(rng.uniform(6.5, 7.6), 1)),
        n_excitations=int(rng.choice([160, 176, 192])),
        flip_deg=float(rng.choice([8.0, 9.0, 10.0])),
    )


def draw_fast_spin_echo(rng: np.random.Generator) -> FastSpinEcho:
    """Draw a T2-weighted fast spin-echo protocol near those usual at 3 T."""
    train_length = int(rng.choice([9, 11, 13, 15]))
    spacing_ms = float(round(rng.uniform(9.0, 12.0), 1))
    echo = round(rng.uniform(84.0, 108.0) / spacing_ms)  # k-space centre falls on one echo
    return FastSpinEcho(
        repetition_ms=float(rng.integers(36, 61) * 100),
        echo_ms=round(min(echo, train_length) * spacing_ms, 1),
        echo_spacing_ms=spacing_ms,
        train_length=train_length,
    )
