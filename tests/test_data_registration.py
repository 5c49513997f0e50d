"""T2w onto T1w: known movements are found, what is known already is kept, and bits repeat."""

import nibabel as nib
import numpy as np
import pytest
from conftest import lay_affine, paint, rigid
from nibabel.affines import apply_affine
from scipy import ndimage

from data.registration import (_joint_histogram, _middle_lps, make_fixed, mutual_information,
                               register_rigid)
from data.nifti import volume_from_image

SHAPE, SPACING = (38, 48, 29), (4, 4, 5)


def scan(shape, affine, suffix, **how):
    image = nib.Nifti1Image(paint(shape, affine, suffix, **how), affine)
    return volume_from_image(image, f"{suffix}.nii")


def pair(matrix, *, shape=SHAPE, spacing=SPACING, extracted=True, turn_deg=(0, 0, 0),
         place=(0, 0, 0)):
    """T1w, T2w and mask of a head at `place` in T1w's world and at `matrix` of it in T2w's."""
    affine = lay_affine(shape, spacing, middle=place)
    other = lay_affine(shape, spacing, "LPS", turn_deg=turn_deg, middle=place)
    there = rigid(shift_mm=place)
    return (scan(shape, affine, "T1w", extracted=extracted, matrix=there),
            scan(shape, other, "T2w", extracted=extracted, matrix=matrix @ there),
            paint(shape, affine, matrix=there) > 0)


def distances_mm(t1w, mask, a, b):
    """How far apart two transforms put the brain's voxels."""
    world = apply_affine(t1w.affine, np.argwhere(mask)[::20])
    return np.linalg.norm(apply_affine(a, world) - apply_affine(b, world), axis=1)


@pytest.mark.parametrize("extracted", [True, False], ids=["extracted", "whole-head"])
def test_six_millimetres_and_four_degrees_are_found_within_half_a_millimetre(extracted):
    shape = (75, 93, 36) if extracted else (86, 108, 42)
    place = (60, -25, 40)  # the world's origin is seldom in the brain
    moved = rigid(shift_mm=place) @ rigid((2, -3, 2), (4, -3, 3.3)) @ rigid(
        shift_mm=np.negative(place))
    t1w, t2w, mask = pair(moved, shape=shape, spacing=(2, 2, 4), extracted=extracted,
                          turn_deg=(5, 0, 3), place=place)
    found = register_rigid(make_fixed(t1w, mask), t2w)
    assert found.method == "rigid" and found.note == ""
    distance = distances_mm(t1w, mask, found.matrix, moved)
    assert distance.mean() < 0.5 and distance.max() < 0.8
    assert distances_mm(t1w, mask, np.eye(4), moved).mean() > 5.5
    rotation = found.matrix[:3, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
    assert found.translation_mm == pytest.approx(6, abs=0.5)
    assert found.rotation_deg == pytest.approx(4.1, abs=0.5)
    assert found.mi_after > found.mi_before + 0.3


def test_the_same_scans_give_the_same_bits_and_the_seed_is_used():
    t1w, t2w, mask = pair(rigid((0, 0, 5), (5, 0, 0)))
    fixed = make_fixed(t1w, mask)
    found = [register_rigid(fixed, t2w, seed=seed).matrix.tobytes() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_scans_whose_headers_lie_apart_are_still_brought_together():
    moved = rigid((0, 0, 0), (0, 25, 0))
    t1w, t2w, mask = pair(moved)
    found = register_rigid(make_fixed(t1w, mask), t2w)
    assert found.method == "rigid" and found.translation_mm == pytest.approx(25, abs=1)
    assert distances_mm(t1w, mask, found.matrix, moved).max() < 1.5


def test_a_slab_is_enough_to_register_on():
    moved = rigid((0, 0, 4), (3, -4, 2))
    t1w, _, mask = pair(moved)
    slab = lay_affine((60, 70, 14), (3, 3, 5), "LAS", middle=(0, 0, 10))
    t2w = scan((60, 70, 14), slab, "T2w", matrix=moved)
    found = register_rigid(make_fixed(t1w, mask), t2w)
    assert found.method == "rigid"
    assert distances_mm(t1w, mask, found.matrix, moved).mean() < 1


@pytest.mark.parametrize("matrix", [rigid((0, 0, 0), (0, 45, 0)), rigid((0, 0, 40))],
                         ids=["45 mm", "40 degrees"])
def test_a_movement_beyond_belief_keeps_the_headers_alignment_and_says_so(matrix):
    shape = (50, 60, 34)
    t1w, t2w, mask = pair(matrix, shape=shape)
    found = register_rigid(make_fixed(t1w, mask), t2w)
    assert found.method == "headers"
    np.testing.assert_array_equal(found.matrix, np.eye(4))
    assert "headers kept" in found.note and "search moved" in found.note
    assert "headers kept, which seem wrong" in found.note  # they are, here
    assert (found.translation_mm, found.rotation_deg) == (0, 0)
    assert found.mi_after == found.mi_before


def test_a_search_that_lowers_the_mutual_information_keeps_the_headers_alignment():
    """Scans on one grid without any movement are as alike as they can be before any search."""
    affine = lay_affine((46, 56, 36), (4, 4, 5))
    t1w = scan((46, 56, 36), affine, "T1w", extracted=False)
    t2w = volume_from_image(nib.Nifti1Image(1000 - t1w.data, affine), "T2w.nii")
    mask = paint(t1w.data.shape, affine) > 0
    found = register_rigid(make_fixed(t1w, mask), t2w)
    assert found.method == "headers" and found.mi_after == found.mi_before
    assert found.note == ""  # the search ended within a millimetre: nothing to look into
    np.testing.assert_array_equal(found.matrix, np.eye(4))


def test_mutual_information_is_in_nats_and_follows_the_matrix():
    affine = lay_affine((16, 16, 16), 2)
    halves = np.zeros((16, 16, 16), np.float32)
    halves[8:] = 1
    quarters = halves.copy()
    quarters[:, 8:] += 2
    mask = np.ones(halves.shape, bool)

    def volume(data):
        return volume_from_image(nib.Nifti1Image(data, affine))

    def information(a, b, matrix):
        return mutual_information(make_fixed(volume(a), mask), volume(b), matrix)

    eye = np.eye(4)
    assert information(halves, 5 - halves, eye) == \
        pytest.approx(np.log(2))
    assert information(quarters, quarters, eye) == \
        pytest.approx(np.log(4))
    across = np.ascontiguousarray(halves.transpose(1, 0, 2))
    assert information(halves, across, eye) == pytest.approx(0)
    quarter_turn = rigid((0, 0, 90))  # takes +x to +y
    assert information(halves, across, quarter_turn) == \
        pytest.approx(np.log(2))


def test_counting_in_pieces_gives_numpys_histogram_of_the_whole():
    draws = np.random.default_rng(0)
    a = draws.integers(0, 320, (1 << 21) + 5).astype(np.float32)  # many on the bins' edges
    b = (a + draws.normal(0, 40, a.size)).astype(np.float32)
    np.testing.assert_array_equal(_joint_histogram(a, b), np.histogram2d(a, b, bins=32)[0])


def test_the_centre_of_a_mask_is_its_centre_of_mass_to_the_bit():
    mask = paint(SHAPE, lay_affine(SHAPE, SPACING), person=3) > 0
    affine = lay_affine(SHAPE, SPACING, turn_deg=(3, 4, 5), middle=(1, 2, 3))
    middle = np.array(ndimage.center_of_mass(mask))
    world = affine[:3, :3] @ middle + affine[:3, 3]
    assert _middle_lps(affine, mask) == [-world[0], -world[1], world[2]]
