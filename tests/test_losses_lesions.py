"""Tests of losses/lesions.py on painted brains with planted lesions."""

import numpy as np
import pytest
from painted_lesions import LESIONS, SHAPE, VOXEL_MM, inside, paint

from losses.lesions import (Lesion, compare, contrasts, find_candidates, invented, outline)


@pytest.mark.parametrize("shading", [0.0, 0.25])
def test_planted_lesions_are_found_where_they_are_and_nothing_else(shading):
    t1w, t2w, mask, planted = paint(shading=shading)
    found = find_candidates(t1w, t2w, mask, VOXEL_MM)
    assert found.labels.max() == 2
    for (middle, _), other in zip(LESIONS, reversed(LESIONS)):
        label = found.labels[middle]
        assert label > 0 and label != found.labels[other[0]]
    both = (found.labels > 0) & planted
    assert 2 * both.sum() / ((found.labels > 0).sum() + planted.sum()) > 0.85  # Dice
    assert found.fluid[:, 45:50, 45:50].all() and not found.fluid[planted].any()
    assert not (found.labels > 0)[~found.suspects].any()


def test_a_brain_without_lesions_has_no_candidates():
    t1w, t2w, mask, _ = paint(())
    assert find_candidates(t1w, t2w, mask, VOXEL_MM).labels.max() == 0


@pytest.mark.parametrize("middle, radius, why", [
    ((5, 47, 58), 4, "beside fluid"), ((5, 30, 36), 2, "too small")])
def test_what_the_rule_leaves_out(middle, radius, why):
    """Each of them is found where it is large and lies in white matter."""
    t1w, t2w, mask, planted = paint([(middle, radius)])
    assert planted.any() and find_candidates(t1w, t2w, mask, VOXEL_MM).labels.max() == 0, why
    moved = paint([((5, 30, 36), max(radius, 4))])
    assert find_candidates(*moved[:3], VOXEL_MM).labels.max() == 1


def test_what_lies_within_six_millimetres_of_the_border_is_left_out():
    t1w, t2w, mask, planted = paint([((5, 30, 36), 4)])
    for first, wanted in ((26, 1), (35, 0)):  # where the brain begins, beside the lesion or in it
        mask[..., :first] = False
        assert (planted & mask).sum() > 50
        assert find_candidates(t1w, t2w, mask, VOXEL_MM).labels.max() == wanted


def test_fluid_is_no_lesion_however_it_is_shaped():
    t1w, t2w, mask, planted = paint()
    t1w, t2w = np.where(planted, 0.15, t1w), np.where(planted, 0.9, t2w)
    found = find_candidates(t1w, t2w, mask, VOXEL_MM)
    assert found.labels.max() == 0 and found.fluid[planted].mean() > 0.95


def test_a_lesion_is_as_large_as_its_voxels():
    t1w, t2w, mask, planted = paint()
    thick = (6.0, 1.5, 1.5)
    for voxel_mm in (VOXEL_MM, thick):
        large, small = outline(planted, mask, np.zeros(SHAPE, bool), voxel_mm)
        for lesion, (middle, radius) in zip((large, small), LESIONS):
            voxels = inside(middle, radius)
            assert lesion.ml == pytest.approx(voxels.sum() * np.prod(voxel_mm) / 1000)
            assert np.array_equal(np.sort(lesion.inside), np.flatnonzero(voxels))


def test_around_a_lesion_is_tissue_of_its_slices_within_three_pixels():
    mask = np.ones((3, 20, 20), bool)
    mask[:, :, 13:] = False
    lesions, fluid = np.zeros_like(mask), np.zeros_like(mask)
    lesions[1, 10, 10] = lesions[1, 10, 6] = True  # their rings overlap
    fluid[1, :9] = True
    first, second = outline(lesions, mask, fluid, VOXEL_MM)
    k, y, x = np.unravel_index(second.around, mask.shape)
    assert set(k) == {1} and y.min() == 9 and y.max() == 13 and x.max() == 12
    assert (np.abs(y - 10) + np.abs(x - 10)).max() == 3
    for lesion in (first, second):
        assert not set(lesion.around) & {np.ravel_multi_index((1, 10, c), mask.shape)
                                         for c in (6, 10)}
    fluid[1] = True  # nothing is left to compare with
    assert outline(lesions, mask, fluid, VOXEL_MM) == []
    outside = np.zeros_like(mask)
    outside[1, 10, 15] = True
    assert outline(outside, mask, np.zeros_like(mask), VOXEL_MM) == []


def test_contrast_is_the_mean_inside_minus_the_mean_around():
    volume = np.arange(8.0).reshape(2, 2, 2)
    found = contrasts(volume, [Lesion(np.array([6, 7]), np.array([0, 1, 2]), 1.0),
                               Lesion(np.array([0]), np.array([4]), 1.0)])
    assert found.tolist() == [5.5, -4.0]
    assert contrasts(volume, []).shape == (0,)


def test_a_perfect_translation_keeps_all_and_an_erased_lesion_nothing():
    _, t2w, mask, planted = paint()
    lesions = outline(planted, mask, np.zeros(SHAPE, bool), VOXEL_MM)
    ml = np.array([lesion.ml for lesion in lesions])
    real = contrasts(t2w, lesions)
    assert real == pytest.approx([0.3, 0.3], abs=0.01)
    healthy = np.where(planted, 0.3, t2w)
    half = np.where(inside(*LESIONS[0]), 0.3, t2w)  # the large one is erased
    for image, kept, erased in ((t2w, 1, 0), (healthy, 0, 1), (0.6 - t2w, -1, 1),
                                (half, ml[1] / ml.sum(), 0.5), (0.3 + (t2w - 0.3) / 3, 1 / 3, 0)):
        found = compare(real, contrasts(image, lesions), ml)
        assert found["n_visible"] == 2 and found["erased"] == erased
        assert found["kept"] == pytest.approx(kept, abs=0.03)
        assert found["contrast_real"] == pytest.approx(0.3, abs=0.01)
        assert found["contrast_translated"] == pytest.approx(0.3 * kept, abs=0.01)


def test_what_cannot_be_seen_in_the_target_is_neither_kept_nor_erased():
    real, translated, ml = np.array([0.2, 0.049, -0.1]), np.array([0.1, -0.5, -0.1]), np.ones(3)
    found = compare(real, translated, ml)
    assert found == {"n_visible": 2, "contrast_real": pytest.approx(0.05), "erased": 0,
                     "contrast_translated": pytest.approx(0), "kept": pytest.approx(0.2 / 0.3)}
    assert compare(real[1:2], translated[1:2], ml[:1]) == {"n_visible": 0}
    assert compare(np.array([]), np.array([]), np.array([])) == {"n_visible": 0}


def test_a_lesion_is_invented_where_the_real_scans_have_none():
    t1w, t2w, mask, planted = paint()
    known = find_candidates(t1w, t2w, mask, VOXEL_MM).suspects
    more = (5, 62, 30)
    assert not known[inside(more, 6)].any()
    fake = np.where(inside(more, 6), 0.6, t2w)
    found = invented(find_candidates(t1w, fake, mask, VOXEL_MM).labels, known, VOXEL_MM)
    assert found["n_invented"] == 1
    assert found["invented_ml"] == pytest.approx(inside(more, 6).sum() * 0.00675, rel=0.15)
    larger = np.where(inside(LESIONS[0][0], 10), 0.6, t2w)  # one that is there, grown
    for image in (t2w, larger):
        assert invented(find_candidates(t1w, image, mask, VOXEL_MM).labels, known,
                        VOXEL_MM) == {"n_invented": 0, "invented_ml": 0}


def test_volumes_of_too_few_intensities_have_no_candidates():
    mask = np.ones((2, 20, 20), bool)
    flat, real = np.full(mask.shape, 0.5, np.float32), np.random.default_rng(0).random(mask.shape)
    for pair in ((flat, flat), (flat, real), (real, flat)):
        found = find_candidates(*pair, mask, VOXEL_MM)
        assert not found.labels.any() and not found.suspects.any()


def test_arguments_that_do_not_fit_are_refused():
    t1w, t2w, mask, planted = paint()
    with pytest.raises(ValueError, match=r"\(10, 96, 96\), \(9, 96, 96\)"):
        find_candidates(t1w, t2w[1:], mask, VOXEL_MM)
    with pytest.raises(ValueError, match="mask float32"):
        find_candidates(t1w, t2w, t1w, VOXEL_MM)
    with pytest.raises(ValueError, match="three sizes above 0"):
        outline(planted, mask, mask, (0, 1.5, 1.5))
