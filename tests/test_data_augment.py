"""Mirroring: the whole slice or not at all, by the given generator."""

import torch

from data.augment import flip_left_right


def test_a_slice_is_either_itself_or_its_mirror_image_and_half_are():
    slices = torch.rand(400, 1, 5, 7)
    flipped = flip_left_right(slices, torch.Generator().manual_seed(0))
    same = (flipped == slices).flatten(1).all(1)
    mirrored = (flipped == slices.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 160 < int(mirrored.sum()) < 240


def test_the_draw_depends_on_the_generator_alone():
    slices = torch.rand(64, 1, 4, 4)
    first, again, other = (flip_left_right(slices, torch.Generator().manual_seed(seed))
                           for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    before = torch.random.get_rng_state()
    flip_left_right(slices, torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), before)
