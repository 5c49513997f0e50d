"""Simulated T1w and T2w subjects: MR signal equations over warped tissue maps, written as BIDS.

Owns everything between the ICBM 152 tissue maps that nilearn ships inside its package (nothing is
downloaded) and a BIDS tree of NIfTI files. Owns no preprocessing: the tree goes through the same
pipeline as real scans. A simulated subject is for trying and testing the programs; it has no
skull, no vessels and no lesions, so it says nothing about how well a net does on people.

Lengths are mm, times ms (seconds in the BIDS sidecars), angles degrees; world axes are RAS. Read
from top to bottom it goes: shapes of the data, signal equations, random draws, from head to
voxels, one subject, files.
"""

from __future__ import annotations

import gzip
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation
from tqdm import tqdm

SIMULATOR = "data/simulate.py"
VERSION = "1"  # raise it whenever the same seed would give other voxels
TISSUES = ("GM", "WM", "CSF")
LATTICE_MM = 3.0  # smooth fields (displacement, folding, texture) are kept on a lattice this fine
MINIMUM_JACOBIAN = 0.1
AXES = {
    "R": (1, 0, 0), "A": (0, 1, 0), "S": (0, 0, 1),
    "L": (-1, 0, 0), "P": (0, -1, 0), "I": (0, 0, -1),
}  # fmt: skip

# Gaussian width and root mean square (mm, each axis) of the random velocity fields that make up a
# warp: whole lobes, gyri, and the wiggle of a single sulcus.
WARP_SCALES_MM = ((35.0, 3.5), (14.0, 1.3), (6.0, 0.9))

TEMPLATE_NOTICE = (
    "Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological "
    "Institute, McGill University. Permission to use, copy, modify, and distribute this software "
    "and its documentation for any purpose and without fee is hereby granted, provided that the "
    "above copyright notice appear in all copies. The authors and McGill University make no "
    "representations about the suitability of this software for any purpose. It is provided "
    '"as is" without express or implied warranty. The authors are not responsible for any data '
    "loss, equipment damage, property loss, or injury to subjects or patients resulting from the "
    "use or misuse of this software package."
)

README = f"""Simulated T1w and T2w brain MRI (seed {{seed}}), made by {SIMULATOR} version {VERSION}.

No person was scanned. Each subject is a random smooth warp of the ICBM 152 template's tissue maps
(Fonov et al. 2011, NeuroImage 54:313), imaged by the signal equations of MPRAGE and fast spin echo
at 3 T. There is no skull: the volumes are 0 outside the brain. derivatives/simulated holds the
truth: brain mask, tissue shares, and the rigid transform between the two scans.

The template's notice: {TEMPLATE_NOTICE}
"""

Values = float | np.ndarray


@dataclass(frozen=True)
class TissueMaps:
    """Tissue probabilities of the template head.

    Attributes
    ----------
    grey, white : (I, J, K) float32 in [0, 1]; what they leave of 1 is cerebrospinal fluid.
    brain : (I, J, K) float32 in [0, 1], blurred brain mask; the brain is where it exceeds 0.5.
    origin_mm : (3,) RAS position of voxel (0, 0, 0).
    spacing_mm : edge of a voxel; axes i, j, k run along R, A, S.
    """

    grey: np.ndarray
    white: np.ndarray
    brain: np.ndarray
    origin_mm: np.ndarray
    spacing_mm: float


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


@dataclass(frozen=True)
class Anatomy:
    """One subject's head, as smooth fields over the template.

    A head point x (RAS mm) lies at z = `head_to_template` x, and shows the template's tissue at
    z + displacement(z). Fields are (C, i, j, k) float32 over the template's box, `LATTICE_MM`
    apart.

    Attributes
    ----------
    head_to_template : (4, 4) affine: size, proportions, pose.
    displacement_mm : 3 components; the map z -> z + displacement keeps a positive Jacobian.
    folding : 2 log weights, of white matter and of fluid, that vary gyri and sulci.
    texture : 2 relative changes, of T1 and of T2.
    tissues : the subject's Tissue by name (`TISSUES`).
    fluid_weight : how wide this subject's fluid spaces are (1 = as in the template).
    """

    head_to_template: np.ndarray
    displacement_mm: np.ndarray
    folding: np.ndarray
    texture: np.ndarray
    tissues: dict[str, Tissue]
    fluid_weight: float


@dataclass(frozen=True)
class Grid:
    """A volume's voxel grid: shape and voxel-to-world affine (RAS mm)."""

    shape: tuple[int, int, int]
    affine: np.ndarray


@dataclass(frozen=True)
class Scan:
    """One simulated volume and the truth behind it.

    Attributes
    ----------
    grid : Grid of all volumes here.
    volume : (I, J, K) int16, 0 outside the brain and at least 1 inside.
    brain : (I, J, K) bool; N of its voxels are True.
    fractions : (3, N) float32, shares of `TISSUES` in the brain's voxels, summing to 1.
    sequence : Mprage or FastSpinEcho
    snr : signal-to-noise ratio of white matter.
    """

    grid: Grid
    volume: np.ndarray
    brain: np.ndarray
    fractions: np.ndarray
    sequence: Sequence
    snr: float


@dataclass(frozen=True)
class Motion:
    """How the head moved between the scans: T2w world to T1w world, RAS mm.

    x_T1w = R (x_T2w - centre) + centre + translation, R the turn by the rotation vector.
    """

    translation_mm: np.ndarray
    rotation_deg: np.ndarray
    centre_mm: np.ndarray

    @property
    def t2w_to_t1w(self) -> np.ndarray:
        """The (4, 4) matrix."""
        matrix = np.eye(4)
        matrix[:3, :3] = Rotation.from_rotvec(self.rotation_deg, degrees=True).as_matrix()
        turned = (matrix[:3, :3] * self.centre_mm).sum(axis=1)
        matrix[:3, 3] = self.centre_mm + self.translation_mm - turned
        return matrix


@dataclass(frozen=True)
class Subject:
    """One simulated subject: two scans of one anatomy with a small motion between them."""

    anatomy: Anatomy
    motion: Motion
    t1w: Scan
    t2w: Scan


@lru_cache(maxsize=1)
def load_tissue_maps() -> TissueMaps:
    """Read the ICBM 152 (2009a, nonlinear symmetric) tissue maps that nilearn carries.

    Returns
    -------
    maps : TissueMaps at 1 mm, cut to the brain with a 10 mm margin.

    Raises
    ------
    ValueError : nilearn is not installed.
    """
    require_nilearn()
    from nilearn import datasets  # optional extra, and slow to import: only where needed

    grey_image = datasets.load_mni152_gm_template(resolution=1)
    white_image = datasets.load_mni152_wm_template(resolution=1)
    mask_image = datasets.load_mni152_brain_mask(resolution=1)
    margin = 10
    # The template ends in the middle of the brain stem. Tissue goes on beyond (an edge of fluid
    # would shine on T2w); the brain does not.
    grey, white = (
        np.pad(np.asarray(image.dataobj, np.float32), margin, mode="edge")
        for image in (grey_image, white_image)
    )
    mask = ndimage.binary_fill_holes(np.pad(np.asarray(mask_image.dataobj) > 0, margin))
    (extent,) = ndimage.find_objects(mask.astype(np.uint8))
    box = tuple(slice(axis.start - margin, axis.stop + margin) for axis in extent)
    corner = np.array([axis.start - margin for axis in box])
    return TissueMaps(
        grey=grey[box].copy(),
        white=white[box].copy(),
        brain=ndimage.gaussian_filter(mask[box].astype(np.float32), 1.0),
        origin_mm=grey_image.affine[:3, 3] + corner,
        spacing_mm=1.0,
    )


def require_nilearn() -> None:
    """Raise ValueError where the optional extra with the tissue maps is not installed."""
    if find_spec("nilearn") is None:
        raise ValueError(
            "nilearn is missing, which carries the tissue maps of simulated subjects. "
            "Install it with: pip install '.[simulate]'"
        )


# Signal equations


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


# Random draws: tissue, protocol, anatomy


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


def smooth_noise(
    rng: np.random.Generator, shape: tuple[int, ...], sigma_voxels: float
) -> np.ndarray:
    """Return Gaussian-smoothed white noise, float32, mean 0 and root mean square 1 over `shape`."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    noise = ndimage.gaussian_filter(noise, sigma_voxels, mode="reflect", truncate=3.0)
    noise -= noise.mean()
    return noise / np.sqrt(np.mean(np.square(noise)))


def integrate_velocity(velocity: np.ndarray, n_squarings: int = 6) -> np.ndarray:
    """Follow a stationary velocity field for unit time: scaling and squaring.

    Arsigny et al. 2006 (MICCAI, LNCS 4190:924): the end points form a diffeomorphism, so that
    large smooth displacements do not fold.

    Parameters
    ----------
    velocity : (3, I, J, K) float32, in voxels of its own lattice.

    Returns
    -------
    displacement : (3, I, J, K) float32, in voxels.
    """
    here = np.indices(velocity.shape[1:], dtype=np.float32)
    displacement = velocity / 2**n_squarings
    for _ in range(n_squarings):
        there = here + displacement
        displacement = displacement + sample(displacement, there.reshape(3, -1)).reshape(here.shape)
    return displacement


def jacobian_determinant(displacement: np.ndarray) -> np.ndarray:
    """Return the volume change of x -> x + displacement(x), both in voxels: (I, J, K) float32."""
    d = [np.gradient(component) for component in displacement]
    return (
        (1 + d[0][0]) * ((1 + d[1][1]) * (1 + d[2][2]) - d[1][2] * d[2][1])
        - d[0][1] * (d[1][0] * (1 + d[2][2]) - d[1][2] * d[2][0])
        + d[0][2] * (d[1][0] * d[2][1] - (1 + d[1][1]) * d[2][0])
    )


def draw_displacement(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw a subject's warp: (3, I, J, K) float32 in mm on the lattice, Jacobian positive."""
    velocity = np.zeros((3, *shape), np.float32)
    for width_mm, size_mm in WARP_SCALES_MM:
        for component in velocity:
            component += (size_mm / LATTICE_MM) * smooth_noise(rng, shape, width_mm / LATTICE_MM)
    displacement = integrate_velocity(velocity)
    while jacobian_determinant(displacement).min() < MINIMUM_JACOBIAN:
        velocity *= np.float32(0.9)
        displacement = integrate_velocity(velocity)
    return displacement * np.float32(LATTICE_MM)


def draw_head_pose(
    rng: np.random.Generator, warped_ml: float, centre_mm: np.ndarray
) -> np.ndarray:
    """Draw size, proportions and pose of a head: (4, 4) affine, head to template, RAS mm.

    The brain volume is normal around 1350 ml (SD 120) and kept in 1120-1680 ml: the template's
    own 1880 ml is larger than almost any adult brain.

    Parameters
    ----------
    warped_ml, centre_mm : volume and centre of the warped brain, before scaling.
    """
    target_ml = float(np.clip(rng.normal(1350.0, 120.0), 1120.0, 1680.0))
    proportions = np.exp(np.clip(rng.normal(0.0, 0.03, 3), -0.06, 0.06))
    proportions *= np.cbrt(warped_ml / target_ml / np.prod(proportions))
    tilt = Rotation.from_euler("xyz", rng.uniform(-6.0, 6.0, 3), degrees=True).as_matrix()
    offset_mm = rng.uniform(-12.0, 12.0, 3)
    linear = proportions[:, None] * tilt
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = centre_mm - (linear * offset_mm).sum(axis=1)
    return affine


def draw_anatomy(maps: TissueMaps, rng: np.random.Generator) -> Anatomy:
    """Draw one subject's head over the template (see Anatomy)."""
    extent_mm = maps.spacing_mm * (np.array(maps.brain.shape) - 1)
    shape = tuple(int(n) for n in np.ceil(extent_mm / LATTICE_MM) + 1)
    displacement_mm = draw_displacement(rng, shape)
    brain_mm = warped_brain(maps, displacement_mm)
    brain_ml = brain_mm.shape[1] * LATTICE_MM**3 / 1000
    folding = [0.7 * smooth_noise(rng, shape, 3.0 / LATTICE_MM) for _ in range(2)]
    texture = [
        0.02 * smooth_noise(rng, shape, 12.0 / LATTICE_MM)
        + 0.02 * smooth_noise(rng, shape, 3.0 / LATTICE_MM)
        for _ in range(2)
    ]
    return Anatomy(
        head_to_template=draw_head_pose(rng, brain_ml, brain_mm.mean(axis=1)),
        displacement_mm=displacement_mm,
        folding=np.stack(folding),
        texture=np.clip(np.stack(texture), -0.08, 0.08),
        tissues=draw_tissues(rng),
        fluid_weight=float(np.exp(rng.uniform(-0.3, 0.9))),
    )


def warped_brain(maps: TissueMaps, displacement_mm: np.ndarray) -> np.ndarray:
    """Return the lattice points z whose z + displacement is brain: (3, N) RAS mm."""
    lattice_mm = LATTICE_MM * np.indices(displacement_mm.shape[1:]).reshape(3, -1)
    voxels = (lattice_mm + displacement_mm.reshape(3, -1)) / maps.spacing_mm
    inside = sample(maps.brain[None], voxels)[0] > 0.5
    return maps.origin_mm[:, None] + lattice_mm[:, inside]


def draw_motion(rng: np.random.Generator, centre_mm: np.ndarray) -> Motion:
    """Draw how a head moved between two scans: 0.5-4 mm and 0.3-4 degrees, any direction."""
    directions = rng.standard_normal((2, 3))
    directions /= np.sqrt(np.sum(np.square(directions), axis=1, keepdims=True))
    shift_mm, turn_deg = rng.uniform(0.5, 4.0), rng.uniform(0.3, 4.0)
    return Motion(shift_mm * directions[0], turn_deg * directions[1], centre_mm)


def draw_grid(
    rng: np.random.Generator, brain_mm: np.ndarray, voxel_mm: np.ndarray, axcodes: str
) -> Grid:
    """Lay a voxel grid around a brain.

    Parameters
    ----------
    brain_mm : (3, N) world points of the brain, RAS mm.
    voxel_mm : (3,) voxel edges along i, j, k.
    axcodes : where i, j, k point, such as "LPS". Half of the grids are oblique, up to 10 degrees.
    """
    axes = np.stack([AXES[code] for code in axcodes], axis=1)
    tilt_deg = rng.uniform(-10.0, 10.0, 3) * (rng.uniform() < 0.5)
    direction = Rotation.from_euler("xyz", tilt_deg, degrees=True).as_matrix() @ axes
    along = np.stack([(direction[:, axis, None] * brain_mm).sum(axis=0) for axis in range(3)])
    low = along.min(axis=1) - rng.uniform(8.0, 20.0, 3)
    high = along.max(axis=1) + rng.uniform(8.0, 20.0, 3)
    affine = np.eye(4)
    affine[:3, :3] = direction * voxel_mm
    affine[:3, 3] = (direction * low).sum(axis=1)
    shape = np.ceil((high - low) / voxel_mm).astype(int) + 1
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


# Continuous fields and volumes


def sample(fields: np.ndarray, points: np.ndarray, block: int = 1 << 16) -> np.ndarray:
    """Interpolate fields linearly; beyond their edge they go on unchanged.

    The same as scipy's `map_coordinates(order=1, mode="nearest")` for each field, but three to
    four times as fast, which is most of the time of a subject: the weights are made once for all
    fields, a block of points at a time so that they stay in the processor's cache.

    Parameters
    ----------
    fields : (C, I, J, K) float32.
    points : (3, N) positions in voxels.

    Returns
    -------
    values : (C, N) float32.
    """
    flat, last = fields.reshape(len(fields), -1), np.array(fields.shape[1:])[:, None] - 1
    stride_i, stride_j = fields.shape[2] * fields.shape[3], fields.shape[3]
    values = np.zeros((len(fields), points.shape[1]), np.float32)
    for start in range(0, points.shape[1], block):
        place = np.clip(points[:, start : start + block], 0, last)
        corner = np.minimum(place.astype(np.int64), last - 1)
        upper = (place - corner).astype(np.float32)
        lower = 1 - upper
        first = corner[0] * stride_i + corner[1] * stride_j + corner[2]
        out = values[:, start : start + block]
        for di, dj, dk in product((0, 1), repeat=3):
            weight = (upper if di else lower)[0] * (upper if dj else lower)[1]
            weight = weight * (upper if dk else lower)[2]
            index = first + (di * stride_i + dj * stride_j + dk)
            for field, total in zip(flat, out):
                total += weight * field.take(index)
    return values


def transform(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply a (4, 4) affine to (3, N) points."""
    # Written out, not a matrix product: BLAS may round differently with another thread count.
    x, y, z = points
    return np.stack([row[0] * x + row[1] * y + row[2] * z + row[3] for row in affine[:3]])


def warp(anatomy: Anatomy, maps: TissueMaps, head_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find where head points fall: on the fields' lattice and in the template's maps.

    Parameters
    ----------
    head_mm : (3, N) points of the head (world of the T1w scan), RAS mm.

    Returns
    -------
    lattice, voxels : (3, N) positions in voxels of the lattice and of the maps.
    """
    template_mm = transform(anatomy.head_to_template, head_mm) - maps.origin_mm[:, None]
    lattice = template_mm / LATTICE_MM
    voxels = (template_mm + sample(anatomy.displacement_mm, lattice)) / maps.spacing_mm
    return lattice, voxels


def tissue_fractions(
    anatomy: Anatomy, maps: TissueMaps, lattice: np.ndarray, voxels: np.ndarray
) -> np.ndarray:
    """Return the share of grey, white and fluid at points of a subject's head.

    The template's maps are averages over 152 people, hence blurred. Squaring and renormalising
    them (the softmax of twice the log probability) sharpens borders while it leaves half-and-half
    voxels, such as the thalamus, as they are; smooth random weights then shift the borders, so
    that each subject has sulci and gyri of its own.

    Parameters
    ----------
    lattice, voxels : (3, N), from `warp`.

    Returns
    -------
    fractions : (3, N) float32 in [0, 1], summing to 1 over `TISSUES`.
    """
    grey, white = sample(np.stack([maps.grey, maps.white]), voxels)
    white_weight, fluid_weight = np.exp(sample(anatomy.folding, lattice))
    weights = np.stack(
        [
            np.square(grey),
            np.square(white) * white_weight,
            np.square(np.maximum(1 - grey - white, 0)) * (fluid_weight * anatomy.fluid_weight),
        ]
    )
    return weights / weights.sum(axis=0)


def brain_on_grid(
    anatomy: Anatomy, maps: TissueMaps, grid: Grid, grid_to_head: np.ndarray
) -> np.ndarray:
    """Return the brain mask of a grid's voxel centres: (I, J, K) bool, one piece without holes."""
    step = 4  # a coarse look first: three quarters of a volume is air
    coarse = np.indices([-(-n // step) for n in grid.shape]).reshape(3, -1) * float(step)
    _, voxels = warp(anatomy, maps, transform(grid_to_head, coarse))
    near = sample(maps.brain[None], voxels)[0] > 0.01
    near = near.reshape([-(-n // step) for n in grid.shape])
    near = ndimage.binary_dilation(near, np.ones((3, 3, 3)))
    for axis, length in enumerate(grid.shape):
        near = near.repeat(step, axis).take(range(length), axis)
    mask = np.zeros(grid.shape, bool)
    _, voxels = warp(anatomy, maps, transform(grid_to_head, np.stack(np.nonzero(near)) * 1.0))
    mask[near] = sample(maps.brain[None], voxels)[0] > 0.5
    labels, _ = ndimage.label(mask)
    return ndimage.binary_fill_holes(labels == np.bincount(labels[mask]).argmax())


def slice_profile(thickness_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Return offsets (in slices) and weights (sum 1) that stand for a Gaussian slice profile.

    The profile's full width at half maximum is the slice; thin slices are sampled once, since
    the tissue maps are no sharper than 1 mm anyway.
    """
    n_samples = 1 if thickness_mm <= 1.3 else 3 if thickness_mm <= 2.2 else 5
    offsets = np.linspace(-0.6, 0.6, n_samples) if n_samples > 1 else np.zeros(1)
    weights = np.exp(-4 * np.log(2) * np.square(offsets))
    return offsets, weights / weights.sum()


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


def image_brain(
    anatomy: Anatomy, maps: TissueMaps, brain: np.ndarray, grid_to_head: np.ndarray,
    sequence: Sequence,
) -> tuple[np.ndarray, np.ndarray]:
    """Image a head on a grid, by one interpolation from the continuous maps.

    Parameters
    ----------
    brain : (I, J, K) bool, the voxels wanted; N of them.
    grid_to_head : (4, 4) affine from voxels to the head (T1w world), RAS mm.

    Returns
    -------
    signal : (N,) float32, averaged along the slice profile, free of noise and bias.
    fractions : (3, N) float32, tissue shares averaged in the same way.
    """
    centres = np.stack(np.nonzero(brain)).astype(np.float64)
    signal = np.zeros(centres.shape[1], np.float32)
    fractions = np.zeros((len(TISSUES), centres.shape[1]), np.float32)
    thickness_mm = float(np.sqrt(np.sum(np.square(grid_to_head[:3, 2]))))
    for offset, weight in zip(*slice_profile(thickness_mm)):
        points = centres + np.array([0.0, 0.0, offset])[:, None]
        lattice, voxels = warp(anatomy, maps, transform(grid_to_head, points))
        shares = tissue_fractions(anatomy, maps, lattice, voxels)
        texture = sample(anatomy.texture, lattice)
        signal += np.float32(weight) * mix_signals(shares, texture, anatomy.tissues, sequence)
        fractions += np.float32(weight) * shares
    return signal, fractions


def draw_bias(rng: np.random.Generator, brain: np.ndarray) -> np.ndarray:
    """Draw a coil's smooth sensitivity at the N voxels of a brain: (N,) float32 around 1."""
    step = 8  # so smooth that a lattice of every 8th voxel holds it
    shape = tuple(-(-n // step) + 1 for n in brain.shape)
    log_bias = rng.uniform(0.05, 0.15) * smooth_noise(rng, shape, 0.25 * float(np.mean(shape)))
    return np.exp(sample(log_bias[None].astype(np.float32), np.stack(np.nonzero(brain)) / step)[0])


def simulate_scan(
    anatomy: Anatomy, maps: TissueMaps, grid: Grid, world_to_head: np.ndarray,
    sequence: Sequence, rng: np.random.Generator,
) -> Scan:
    """Simulate one scan: image, bias field, noise, gain, and storage as int16.

    Parameters
    ----------
    world_to_head : (4, 4) affine from the scan's world to the head (T1w world), RAS mm.
    """
    grid_to_head = world_to_head @ grid.affine
    brain = brain_on_grid(anatomy, maps, grid, grid_to_head)
    signal, fractions = image_brain(anatomy, maps, brain, grid_to_head, sequence)
    signal /= np.abs(signal[fractions[TISSUES.index("WM")] > 0.9]).mean()
    snr, gain = float(rng.uniform(20.0, 50.0)), rng.uniform(300.0, 1200.0)
    magnitude = rician_magnitude(signal * draw_bias(rng, brain), 1 / snr, rng)
    volume = np.zeros(grid.shape, np.int16)
    # At least 1: noise may round fluid down to 0, and 0 means "no brain" to what comes after.
    volume[brain] = np.clip(np.rint(gain * magnitude), 1, np.iinfo(np.int16).max)
    return Scan(grid, volume, brain, fractions, sequence, snr)


def simulate_subject(maps: TissueMaps, seed: int, number: int) -> Subject:
    """Simulate one subject; it depends on the maps and on (seed, number) only.

    Parameters
    ----------
    seed : non-negative; names the data set.
    number : which subject of it, from 1.
    """
    streams = np.random.SeedSequence(seed, spawn_key=(number,)).spawn(3)
    head_rng, t1w_rng, t2w_rng = (np.random.default_rng(stream) for stream in streams)
    anatomy = draw_anatomy(maps, head_rng)
    head_from_template = np.linalg.inv(anatomy.head_to_template)
    brain_mm = transform(head_from_template, warped_brain(maps, anatomy.displacement_mm))
    motion = draw_motion(t2w_rng, brain_mm.mean(axis=1))

    t1w_voxel_mm = np.full(3, t1w_rng.choice([0.9, 1.0, 1.0, 1.0, 1.1, 1.2]))
    t1w_axes = str(t1w_rng.choice(["RAS", "LAS", "LPS", "PSR"]))
    t1w_grid = draw_grid(t1w_rng, brain_mm, t1w_voxel_mm, t1w_axes)
    t1w = simulate_scan(anatomy, maps, t1w_grid, np.eye(4), draw_mprage(t1w_rng), t1w_rng)

    in_plane_mm = round(t2w_rng.uniform(0.8, 1.1), 2)
    t2w_voxel_mm = np.array([in_plane_mm, in_plane_mm, t2w_rng.choice([1.0, 1.5, 2.0, 2.5, 3.0])])
    t2w_axes = str(t2w_rng.choice(["RAS", "LAS", "LPS"]))
    seen_mm = transform(np.linalg.inv(motion.t2w_to_t1w), brain_mm)
    t2w_grid = draw_grid(t2w_rng, seen_mm, t2w_voxel_mm, t2w_axes)
    spin_echo = draw_fast_spin_echo(t2w_rng)
    t2w = simulate_scan(anatomy, maps, t2w_grid, motion.t2w_to_t1w, spin_echo, t2w_rng)
    return Subject(anatomy, motion, t1w, t2w)


# Files


def simulate_dataset(
    folder: Path, n_subjects: int, *, seed: int = 0, workers: int = 1, progress: bool = True
) -> Path:
    """Write simulated subjects as a BIDS tree, or go on with one that was interrupted.

    Subject k depends on (seed, k) only: asking for 5 or for 12, with any number of workers, at
    once or after a kill, gives the same bytes. Complete subjects are not made again, and none is
    ever removed: after 12, asking for 5 leaves 12. The truth (brain mask, tissue shares, the rigid
    transform between the scans) lies in `derivatives/simulated`.

    Parameters
    ----------
    folder : the tree; made if missing, refused if it holds anything else.
    n_subjects : at least 1; named sub-sim001, sub-sim002, ...
    seed : non-negative.
    workers : processes; each takes up to 1 GiB of memory.
    progress : show a bar, a step a subject.

    Returns
    -------
    folder : Path

    Raises
    ------
    ValueError : nilearn is missing, an argument is out of range, or `folder` holds another data
        set, another seed's subjects or those of another version of the simulator.
    """
    folder = Path(folder)
    if n_subjects < 1 or workers < 1 or seed < 0:
        raise ValueError(
            f"{n_subjects} subjects, {workers} workers, seed {seed}: "
            "need at least 1 subject and 1 worker, and a seed that is not negative."
        )
    check_same_simulation(folder, seed)
    write_dataset_files(folder, seed)
    missing = [k for k in range(1, n_subjects + 1) if not is_complete(folder, subject_label(k))]
    if missing:
        require_nilearn()
    make = partial(write_subject, folder, seed)
    bar = tqdm(
        total=n_subjects, initial=n_subjects - len(missing), desc="simulating", unit="subject",
        disable=not progress,
    )
    with bar:
        if workers == 1 or len(missing) < 2:
            for number in missing:
                make(number)
                bar.update()
        else:
            # Spawned, not forked: a fork would copy the threads' locks of whatever is loaded.
            with ProcessPoolExecutor(
                min(workers, len(missing)), get_context("spawn"), initializer=exit_with_parent
            ) as pool:
                for _ in pool.map(make, missing):
                    bar.update()
    write_participants(folder)
    return folder


def exit_with_parent() -> None:
    """Let this worker end when its parent is killed; the pool's queue alone would wait forever."""

    def watch() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def subject_label(number: int) -> str:
    """Return the BIDS subject of a number: 7 is "sub-sim007"."""
    return f"sub-sim{number:03d}"


def subject_paths(folder: Path, label: str) -> list[Path]:
    """List a subject's files in the order of writing; the T2w volume is the last.

    So a subject that was interrupted has no T2w, and is not a pair to any reader of the tree.
    """
    truth = [
        "desc-brain_mask.nii.gz",
        "desc-brain_mask.json",
        *(f"label-{name}_probseg.nii.gz" for name in TISSUES),
        "from-T2w_to-T1w_mode-image_xfm.json",
    ]
    raw = ["T1w.json", "T2w.json", "T1w.nii.gz", "T2w.nii.gz"]
    beside = folder / "derivatives" / "simulated" / label / "anat"
    paths = [beside / f"{label}_{name}" for name in truth]
    return paths + [folder / label / "anat" / f"{label}_{name}" for name in raw]


def is_complete(folder: Path, label: str) -> bool:
    """Say whether a subject needs no more work (each file is written whole or not at all)."""
    return all(path.is_file() for path in subject_paths(folder, label))


def write_subject(folder: Path, seed: int, number: int) -> None:
    """Simulate one subject and write its files (runs in a worker)."""
    label = subject_label(number)
    contents = subject_contents(simulate_subject(load_tissue_maps(), seed, number), label)
    for path, content in zip(subject_paths(folder, label), contents, strict=True):
        write_atomically(path, content)


def subject_contents(subject: Subject, label: str) -> list[bytes]:
    """Turn a subject into the bytes of its files, in the order of `subject_paths`."""
    t1w, t2w = subject.t1w, subject.t2w
    return [
        nifti_bytes(t1w.brain.astype(np.uint8), t1w.grid),
        json_bytes({"Type": "Brain", "Sources": [f"bids:raw:{label}/anat/{label}_T1w.nii.gz"]}),
        *(nifti_bytes(volume, t1w.grid, slope=1 / 255) for volume in share_volumes(t1w)),
        json_bytes(motion_record(subject.motion)),
        json_bytes(scan_sidecar(t1w, subject.anatomy)),
        json_bytes(scan_sidecar(t2w, subject.anatomy)),
        nifti_bytes(t1w.volume, t1w.grid),
        nifti_bytes(t2w.volume, t2w.grid),
    ]


def share_volumes(scan: Scan) -> list[np.ndarray]:
    """Return each tissue's share as uint8 volumes that add up to 255 in the brain, 0 outside."""
    grey, white = (np.rint(255 * share).astype(np.uint8) for share in scan.fractions[:2])
    white = np.minimum(white, 255 - grey)  # both may have been rounded up
    volumes = []
    for share in (grey, white, 255 - grey - white):
        volumes.append(np.zeros(scan.brain.shape, np.uint8))
        volumes[-1][scan.brain] = share
    return volumes


def nifti_bytes(volume: np.ndarray, grid: Grid, slope: float | None = None) -> bytes:
    """Return a volume as .nii.gz in scanner coordinates (mm), the same bytes every time."""
    image = nib.Nifti1Image(volume, grid.affine)
    image.set_sform(grid.affine, code="scanner")
    image.set_qform(grid.affine, code="scanner")
    image.header.set_xyzt_units("mm", "sec")
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)  # no clock in the bytes


def json_bytes(record: dict[str, Any]) -> bytes:
    """Return a record as readable JSON."""
    return (json.dumps(record, indent=2) + "\n").encode()


def scan_sidecar(scan: Scan, anatomy: Anatomy) -> dict[str, Any]:
    """Return the BIDS sidecar of a scan, and the tissue values behind it (times in seconds)."""
    tissues = {
        name: {"T1": t.t1_ms / 1000, "T2": t.t2_ms / 1000, "ProtonDensity": t.proton_density}
        for name, t in anatomy.tissues.items()
    }
    return {
        "Modality": "MR",
        "MagneticFieldStrength": 3,
        **scan.sequence.sidecar(),
        "SkullStripped": True,
        "SimulatedTissues": tissues,
        "SimulatedWhiteMatterSNR": scan.snr,
    }


def motion_record(motion: Motion) -> dict[str, Any]:
    """Describe the true rigid transform."""
    return {
        "Description": "True head motion between the scans. Matrix takes world points (RAS, mm) "
        "of the T2w file to those of the T1w file: x_T1w = Matrix x_T2w "
        "= R (x_T2w - Centre) + Centre + Translation, R the turn by the vector Rotation.",
        "Units": {"Translation": "mm", "Centre": "mm", "Rotation": "degrees"},
        "Translation": motion.translation_mm.tolist(),
        "Rotation": motion.rotation_deg.tolist(),
        "Centre": motion.centre_mm.tolist(),
        "Matrix": motion.t2w_to_t1w.tolist(),
    }


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: whoever sees the name sees all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)


def dataset_description(seed: int, kind: str) -> dict[str, Any]:
    """Return dataset_description.json of the "raw" tree or of its "derivative" truth."""
    return {
        "Name": "Simulated T1w and T2w subjects" + ("" if kind == "raw" else ", ground truth"),
        "BIDSVersion": "1.9.0",
        "DatasetType": kind,
        "License": "Simulated: no person was scanned. The tissue maps derive from the ICBM 152 "
        "2009a nonlinear symmetric template as shipped with nilearn, Copyright (C) 1993-2009 Louis "
        "Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill "
        "University: any use without fee, as long as its notice is kept (README of this data set).",
        "GeneratedBy": [{"Name": SIMULATOR, "Version": VERSION, "Seed": seed}],
        "DatasetLinks": {"raw": "." if kind == "raw" else "../.."},
    }


def check_same_simulation(folder: Path, seed: int) -> None:
    """Raise ValueError unless `folder` is free, or holds this version's subjects of this seed."""
    record = folder / "dataset_description.json"
    if not record.exists():
        # Hidden files do not count: a kill in the very first moment leaves a hidden part file.
        if folder.is_file() or (
            folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
        ):
            raise ValueError(
                f"{folder}: neither free nor a simulated data set (no {record.name} in it). "
                "Choose another folder."
            )
        return
    try:
        made_by = json.loads(record.read_text())["GeneratedBy"][0]
        found = made_by["Name"], made_by["Version"], made_by["Seed"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise ValueError(
            f"{record}: not written by {SIMULATOR}, so this is another data set. "
            "Choose another folder."
        ) from None
    wanted = SIMULATOR, VERSION, seed
    if found != wanted:
        raise ValueError(
            f"{record}: holds subjects of {found[0]} version {found[1]}, seed {found[2]}; asked "
            f"for version {VERSION}, seed {seed}. Choose another folder, or delete {folder}."
        )


def write_dataset_files(folder: Path, seed: int) -> None:
    """Write what describes the tree; the description first, for it carries the seed."""
    truth = folder / "derivatives" / "simulated" / "dataset_description.json"
    raw = folder / "dataset_description.json"
    write_atomically(raw, json_bytes(dataset_description(seed, "raw")))
    write_atomically(truth, json_bytes(dataset_description(seed, "derivative")))
    write_atomically(folder / "README", README.format(seed=seed).encode())


def write_participants(folder: Path) -> None:
    """List the complete subjects of the tree in participants.tsv."""
    labels = sorted(path.name for path in folder.glob("sub-sim*"))
    rows = ["participant_id", *(label for label in labels if is_complete(folder, label)), ""]
    write_atomically(folder / "participants.tsv", "\n".join(rows).encode())
