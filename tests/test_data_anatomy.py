"""Random heads: interpolation, warps and their Jacobians."""

import numpy as np
import pytest
from scipy import ndimage

from data import anatomy


@pytest.fixture(scope="module")
def maps():
    pytest.importorskip("nilearn")
    return anatomy.load_tissue_maps()


def test_sampling_equals_scipys_linear_interpolation():
    rng = np.random.default_rng(0)
    fields = rng.standard_normal((2, 7, 8, 9)).astype(np.float32)
    points = rng.uniform(-2, 11, (3, 500))
    expected = [
        ndimage.map_coordinates(field, points, order=1, mode="nearest") for field in fields
    ]
    assert np.allclose(anatomy.sample(fields, points, block=64), expected, atol=1e-5)


def test_following_a_velocity_back_undoes_following_it():
    velocity = np.stack([anatomy.smooth_noise(np.random.default_rng(0), (24, 24, 24), 4.0)] * 3)
    there = anatomy.integrate_velocity(velocity)
    back = anatomy.integrate_velocity(-velocity)
    here = np.indices((24, 24, 24)).reshape(3, -1)
    round_trip = there.reshape(3, -1) + anatomy.sample(back, here + there.reshape(3, -1))
    inner = (slice(None), slice(6, 18), slice(6, 18), slice(6, 18))
    assert np.abs(there[inner]).max() > 1.0
    assert np.abs(round_trip.reshape(there.shape)[inner]).max() < 0.1


def test_jacobian_of_a_linear_stretch_is_its_volume_change():
    i, j, k = np.indices((5, 6, 7), dtype=np.float32)
    stretch = np.stack([0.5 * i + 0.2 * j, 0.1 * i - 0.2 * j, 0.3 * k])
    expected = ((1 + 0.5) * (1 - 0.2) - 0.2 * 0.1) * (1 + 0.3)
    assert np.allclose(anatomy.jacobian_determinant(stretch), expected, atol=1e-5)


def test_no_anatomy_folds_and_none_is_symmetric(maps):
    for seed in range(4):
        head = anatomy.draw_anatomy(maps, np.random.default_rng(seed))
        displacement = head.displacement_mm / np.float32(anatomy.LATTICE_MM)
        assert anatomy.jacobian_determinant(displacement).min() >= anatomy.MINIMUM_JACOBIAN - 1e-4
        assert 5.0 < np.abs(head.displacement_mm).max() < 30.0
        mirrored = displacement[:, ::-1] * np.array([-1, 1, 1])[:, None, None, None]
        assert np.corrcoef(displacement.ravel(), mirrored.ravel())[0, 1] < 0.5


def test_a_fold_in_the_first_draw_is_ironed_out(monkeypatch):
    monkeypatch.setattr(anatomy, "WARP_SCALES_MM", ((6.0, 12.0),))
    displacement = anatomy.draw_displacement(np.random.default_rng(0), (20, 20, 20))
    jacobian = anatomy.jacobian_determinant(displacement / np.float32(anatomy.LATTICE_MM))
    assert jacobian.min() >= anatomy.MINIMUM_JACOBIAN - 1e-4
