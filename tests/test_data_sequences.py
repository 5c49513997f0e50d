"""Signal equations by hand-computed numbers and against pulse-by-pulse Bloch recursions."""

from dataclasses import replace

import numpy as np
import pytest

from data import sequences

MPRAGE = sequences.Mprage(
    repetition_ms=2300.0, inversion_ms=900.0, echo_ms=2.5, echo_spacing_ms=7.0,
    n_excitations=176, flip_deg=8.0,
)  # fmt: skip


def test_mprage_signal_is_the_one_worked_out_by_hand():
    # White matter, T1 830 ms: 284 ms after the inversion, 176 pulses of 8 degrees every 7 ms, then
    # 784 ms. exp(-284/830) = .7103, exp(-784/830) = .3888, one pulse keeps
    # cos(8 deg) exp(-7/830) = .98195, the train .98195^176 = .0405, half of it .2013; endless
    # pulses drive to (1 - .99160) / (1 - .98195) = .4654.
    # Steady: (.2897 x .0405 + .4654 x .9595) x .3888 + .6112 = .7894, / 1.0107 = .7810.
    # Middle: (.2897 - .96 x .7810 x .7103) x .2013 + .4654 x .7987 = .3228; x sin(8 deg) x 0.7.
    assert sequences.mprage_signal(0.7, 830.0, MPRAGE) == pytest.approx(0.03145, abs=1e-4)


def test_mprage_signal_equals_bloch_pulse_by_pulse():
    for t1_ms in (830.0, 1400.0, 4000.0):
        flip = np.deg2rad(MPRAGE.flip_deg)

        def recover(magnetisation, wait_ms, t1_ms=t1_ms):
            return 1 + (magnetisation - 1) * np.exp(-wait_ms / t1_ms)

        magnetisation, middle = 1.0, 0.0
        for _ in range(30):
            magnetisation = recover(-0.96 * magnetisation, 900 - 88 * 7)
            for pulse in range(176):
                middle = magnetisation if pulse == 88 else middle
                magnetisation = recover(magnetisation * np.cos(flip), 7)
            magnetisation = recover(magnetisation, 2300 - 900 - 88 * 7)
        signal = sequences.mprage_signal(0.8, t1_ms, MPRAGE)
        assert signal == pytest.approx(0.8 * np.sin(flip) * middle, rel=1e-9)


def test_spin_echo_signal_is_the_one_worked_out_by_hand():
    # 1100 ms less a train of 10 x 10 ms leave 1000 ms = T1, and TE = T2: 0.8 x (1 - 1/e) / e.
    sequence = sequences.FastSpinEcho(1100.0, 100.0, 10.0, 10)
    signal = sequences.fast_spin_echo_signal(0.8, 1000.0, 100.0, sequence)
    assert signal == pytest.approx(0.8 * 0.632121 * 0.367879, abs=1e-6)


def test_spin_echo_signal_equals_bloch_refocusing_by_refocusing():
    sequence = sequences.FastSpinEcho(4000.0, 100.0, 10.0, 13)
    longitudinal, transverse = 1.0, 0.0
    for _ in range(5):
        transverse, longitudinal, signal = longitudinal, 0.0, 0.0
        for echo in range(1, 14):
            half = np.exp(-5.0 / 1400.0)
            longitudinal = 1 + (-(1 + (longitudinal - 1) * half) - 1) * half
            transverse *= np.exp(-10.0 / 100.0)
            signal = transverse if echo == 10 else signal
        longitudinal = 1 + (longitudinal - 1) * np.exp(-(4000.0 - 130.0) / 1400.0)
    expected = sequences.fast_spin_echo_signal(1.0, 1400.0, 100.0, sequence)
    assert signal == pytest.approx(expected, rel=1e-3)


def test_magnitude_noise_has_the_moments_of_rice():
    rng = np.random.default_rng(0)
    background = sequences.rician_magnitude(np.zeros(200_000, np.float32), 2.0, rng)
    tissue = sequences.rician_magnitude(np.full(200_000, 10, np.float32), 2.0, rng)
    assert background.mean() == pytest.approx(2 * np.sqrt(np.pi / 2), rel=0.01)
    assert np.square(tissue).mean() == pytest.approx(10**2 + 2 * 2**2, rel=0.01)


def test_every_protocol_and_tissue_drawn_keeps_the_order_of_tissues():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        drawn = sequences.draw_tissues(rng)
        tissues = [drawn[name] for name in sequences.TISSUES]
        t1w, t2w = sequences.draw_mprage(rng), sequences.draw_fast_spin_echo(rng)
        grey, white, fluid = (
            sequences.mprage_signal(t.proton_density, t.t1_ms, t1w) for t in tissues
        )
        assert 0 < 1.1 * fluid < grey < white / 1.1
        grey, white, fluid = (
            sequences.fast_spin_echo_signal(t.proton_density, t.t1_ms, t.t2_ms, t2w)
            for t in tissues
        )
        assert fluid > 1.2 * grey > 1.2 * 1.2 * white > 0


def test_partial_volume_mixes_signals_not_relaxation_times():
    tissues = {name: sequences.Tissue(1000.0, 80.0, 0.7) for name in sequences.TISSUES}
    tissues["CSF"] = replace(tissues["CSF"], t1_ms=4000.0, t2_ms=2000.0, proton_density=1.0)
    fractions = np.array([[0.5, 1.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.0, 1.0]], np.float32)
    sequence = sequences.FastSpinEcho(4000.0, 100.0, 10.0, 13)
    mixed, grey, fluid = sequences.mix_signals(fractions, np.zeros((2, 3)), tissues, sequence)
    assert mixed == pytest.approx((grey + fluid) / 2, rel=1e-6)
