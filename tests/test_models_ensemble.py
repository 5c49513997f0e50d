"""Tests of models/ensemble.py: looks are undone exactly, figures over them are NumPy's."""

import numpy as np
import pytest

from models.ensemble import Look, Scatter, draw_looks


@pytest.mark.parametrize("look", [Look(), Look(True), Look(False, (3, -2)), Look(True, (-1, 3))])
def test_each_look_is_undone_to_the_bit(look):
    slices = np.random.default_rng(0).random((3, 8, 12), dtype=np.float32)
    shown = look.show(slices)
    assert np.array_equal(look.undo(shown), slices)
    assert np.array_equal(shown, slices) == (look == Look())


def test_a_shift_goes_down_and_right_and_a_mirror_exchanges_left_and_right():
    slices = np.full((1, 8, 8), -1, np.float32)
    slices[0, 2, 1] = 1
    assert Look(shift=(1, 3)).show(slices)[0, 3, 4] == 1
    assert Look(mirrored=True).show(slices)[0, 2, 6] == 1


def test_looks_differ_the_plain_one_comes_first_and_few_are_the_first_of_many():
    many = draw_looks(12, between=True)
    assert many[0] == Look() and len(set(many)) == 12
    assert draw_looks(5, between=True) == many[:5]
    assert {look.mirrored for look in many} == {True, False}
    assert sum(look.phase for look in many) == pytest.approx(0)  # no place between is preferred
    assert all(abs(s) <= 3 for look in many for s in look.shift)
    assert draw_looks(4, between=True, seed=1) != many[:4]


def test_slices_of_a_coarse_scan_stay_in_their_places():
    assert not any(look.phase for look in draw_looks(9, between=False))


def test_mean_and_deviation_over_looks_are_those_of_numpy():
    stack = np.random.default_rng(1).normal(0.5, 0.1, (7, 4, 5, 6)).astype(np.float32)
    scatter = Scatter()
    for values in stack:
        scatter.add(values)
    np.testing.assert_allclose(scatter.mean, stack.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(scatter.sd, stack.std(axis=0, ddof=1), atol=1e-6)
    assert scatter.sd.dtype == np.float32
