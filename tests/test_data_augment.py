"""Mirroring and deforming: within their bounds, by the given generator, on background."""

import numpy as np
import pytest
import torch
from scipy.ndimage import center_of_mass

from data.augment import deform, flip_left_right

ALL = (flip_left_right, deform)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(n, size=64, row=0.5, column=0.5, width=0.08):
    """Slices (n, 1, size, size) with a bright spot on background, in [-1, 1]."""
    i, j = np.mgrid[:size, :size] / size
    spot = np.exp(-((i - row) ** 2 + (j - column) ** 2) / (2 * width ** 2))
    return torch.from_numpy(np.where(spot > 0.1, spot, 0) * 2 - 1).float().expand(n, 1, -1, -1)


def centres(slices):
    return np.array([center_of_mass((s[0].numpy() + 1) / 2) for s in slices]) / slices.shape[-1]


def test_a_slice_is_either_itself_or_its_mirror_image_and_half_are():
    slices = torch.rand(400, 1, 5, 7)
    flipped = flip_left_right(slices, seeded())
    same = (flipped == slices).flatten(1).all(1)
    mirrored = (flipped == slices.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 160 < int(mirrored.sum()) < 240


@pytest.mark.parametrize("change", ALL)
def test_the_draw_depends_on_the_generator_alone(change):
    slices = torch.rand(64, 1, 8, 8)
    first, again, other = (change(slices, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    before = torch.random.get_rng_state()
    change(slices, seeded(1))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("change", ALL)
def test_slices_of_a_batch_are_changed_each_in_its_own_way_and_stay_in_range(change):
    slices = blobs(16, row=0.4, column=0.3)
    given = slices.clone()
    changed = change(slices, seeded())
    assert torch.equal(slices, given)  # not in place
    assert changed.shape == slices.shape and changed.dtype == torch.float32
    assert -1 <= changed.min() and changed.max() <= 1
    # mirroring knows two ways, the others as many as there are slices
    assert len({s.numpy().tobytes() for s in changed}) == (2 if change is flip_left_right else 16)


def test_strength_scales_the_change_down_to_nothing():
    slices = blobs(8)
    torch.testing.assert_close(deform(slices, seeded(), 0.0), slices, atol=1e-5, rtol=0)
    weak, strong = (float((deform(slices, seeded(), s) - slices).abs().mean()) for s in (0.2, 1.0))
    assert 0 < weak < strong / 2


def test_background_is_background_to_the_bit_and_the_edge_is_not_smeared():
    slices = torch.full((32, 1, 48, 48), -1.0)
    slices[:, :, 12:36, 16:32] = 0.5
    changed = deform(slices, seeded(3))
    assert float(changed[changed > -1].min()) > -0.3  # half brain or none: no dark rim around it
    area = (changed > -1).sum((1, 2, 3)) / (24 * 16)
    assert (area > 0.78).all() and (area < 1.28).all()  # (1 +- 0.08)^2, bent a little


def test_deform_moves_within_its_bounds_and_never_turns_the_head_round():
    slices = blobs(300)
    moved = centres(deform(slices, seeded())) - 0.5
    assert np.abs(moved).max() < 0.04 * 1.09 + 0.023 + 0.01
    assert 0.015 < np.abs(moved).mean() < 0.03  # 4 %, uniformly distributed
    off = centres(deform(blobs(300, row=0.25), seeded())) - 0.5
    angle = np.degrees(np.arctan2(off[:, 1] - moved[:, 1], -(off[:, 0] - moved[:, 0])))
    assert 2 < np.abs(angle).mean() < 8 and np.abs(angle).max() < 10 + 11  # bent: 0.046 / 0.25
    length = np.hypot(*(off - moved).T) / 0.25
    assert 0.7 < length.min() < 0.95 and 1.05 < length.max() < 1.3


def test_deform_moves_all_channels_of_a_slice_alike():
    slices = torch.cat([blobs(4), blobs(4)], dim=1)
    first, second = deform(slices, seeded()).chunk(2, 1)
    assert torch.equal(first, second)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_lost_so_that_training_can_name_its_slice(broken):
    slices = blobs(1).clone()
    slices[0, 0, 30:34, 30:34] = broken
    assert deform(slices, seeded()).isnan().any()
