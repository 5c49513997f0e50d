"""Geometry and intensities of one volume: every axis, flip and half voxel, and each inverse."""

import nibabel as nib
import numpy as np
import pytest
from conftest import lay_affine, paint, rigid
from nibabel.affines import apply_affine, voxel_sizes
from scipy import ndimage

from data import volume as vol
from data.nifti import Grid, volume_from_image

# ------------------------------------------------------------------------------------- geometry


def grid_between(axes, shape, spacing, **how):
    return Grid(shape, lay_affine(shape, spacing, axes, **how))


SOURCE = grid_between("RAS", (14, 17, 11), (2, 1.5, 3), turn_deg=(12, -7, 25), middle=(4, -6, 3))
TARGETS = {
    "straight": grid_between("RAS", (21, 22, 25), (1.2, 1.4, 1.3)),
    "oblique": grid_between("RAS", (19, 23, 21), (1.4, 1.3, 1.4), turn_deg=(-9, 14, -30)),
    "flipped": grid_between("LPI", (21, 22, 25), (1.2, 1.4, 1.3), turn_deg=(5, 5, 5)),
}
MOVE = rigid((6, -10, 8), (3, -2, 4))


def indices_in_source(grid, matrix):
    points = np.indices(grid.shape).reshape(3, -1).T
    world = apply_affine(matrix, apply_affine(grid.affine, points))
    return apply_affine(np.linalg.inv(SOURCE.affine), world).T


@pytest.mark.parametrize("matrix", [None, MOVE], ids=["headers", "registered"])
@pytest.mark.parametrize("target", TARGETS)
def test_resampling_is_linear_interpolation_at_the_world_coordinates_of_each_voxel(target, matrix):
    data = np.random.default_rng(1).uniform(50, 100, SOURCE.shape).astype(np.float32)
    grid = TARGETS[target]
    index = indices_in_source(grid, np.eye(4) if matrix is None else matrix)
    inside = np.all((index > -0.5) & (index < np.array(SOURCE.shape)[:, None] - 0.5), axis=0)
    expected = np.where(inside, ndimage.map_coordinates(data, index, order=1, mode="nearest"), 0)
    got = vol.resample(data, SOURCE.affine, grid, matrix=matrix)
    assert got.shape == grid.shape and got.dtype == np.float32
    assert 0.2 < inside.mean() < 0.9, "the two boxes must meet in part"
    np.testing.assert_allclose(got.ravel(), expected, atol=2e-2)


def test_resampling_a_mask_takes_the_nearest_voxel_and_stays_boolean():
    mask = np.random.default_rng(2).random(SOURCE.shape) < 0.5
    index = indices_in_source(TARGETS["oblique"], MOVE)
    inside = np.all((index > -0.5) & (index < np.array(SOURCE.shape)[:, None] - 0.5), axis=0)
    expected = ndimage.map_coordinates(mask.astype(float), index, order=0, mode="nearest") * inside
    got = vol.resample(mask, SOURCE.affine, TARGETS["oblique"], matrix=MOVE, nearest=True)
    assert got.dtype == bool
    assert (got.ravel() == expected.astype(bool)).mean() > 0.9999


def test_nearest_neighbour_keeps_labels_of_any_type():
    labels = np.random.default_rng(2).integers(0, 5, SOURCE.shape).astype(np.int16)
    got = vol.resample(labels, SOURCE.affine, TARGETS["oblique"], nearest=True)
    assert got.dtype == np.float32 and set(np.unique(got)) == {0, 1, 2, 3, 4}


def test_field_of_view_is_the_box_of_voxels_with_their_halves():
    for grid, matrix in ((TARGETS["oblique"], MOVE), (TARGETS["flipped"], None)):
        index = indices_in_source(grid, np.eye(4) if matrix is None else matrix)
        brute = np.array([all(-0.5 <= c <= n - 0.5 for c, n in zip(place, SOURCE.shape))
                          for place in index.T]).reshape(grid.shape)
        got = vol.field_of_view(SOURCE.shape, SOURCE.affine, grid, matrix)
        np.testing.assert_array_equal(got, brute)
        filled = vol.resample(np.ones(SOURCE.shape, np.float32), SOURCE.affine, grid, matrix=matrix)
        np.testing.assert_array_equal(got, filled > 0.5)


def test_the_same_grid_is_not_interpolated_at_all():
    data = np.random.default_rng(3).normal(size=SOURCE.shape).astype(np.float32)
    same = vol.resample(data, SOURCE.affine, Grid(SOURCE.shape, SOURCE.affine.copy()))
    np.testing.assert_array_equal(same, data)
    assert same is not data and not np.shares_memory(same, data)


def test_same_grid_notices_a_hundredth_of_a_millimetre_and_another_shape():
    other = SOURCE.affine.copy()
    other[1, 3] += 0.02
    assert not vol.same_grid(SOURCE, Grid(SOURCE.shape, other))
    assert not vol.same_grid(SOURCE, Grid((14, 17, 12), SOURCE.affine))
    assert not vol.same_grid(SOURCE, Grid(SOURCE.shape, rigid((0, 0, 0.1)) @ SOURCE.affine))
    rounded = SOURCE.affine.astype(np.float32).astype(float)
    assert vol.same_grid(SOURCE, Grid(SOURCE.shape, rounded))


def test_a_coarser_grid_is_blurred_first_and_only_along_its_coarse_axes():
    """A turn by 90 degrees about x lays the target's coarse k along the source's j."""
    shape = (15, 20, 15)
    data = np.random.default_rng(4).normal(100, 20, shape).astype(np.float32)
    affine = lay_affine(shape, 1)
    target = Grid((15, 15, 5), lay_affine((15, 15, 5), (1, 1, 4)))
    got = vol.resample(data, affine, target, matrix=rigid((90, 0, 0)))
    # full widths at half maximum add as squares: 4^2 = 1^2 + (2.355 sigma)^2
    sigma = np.sqrt(4 ** 2 - 1) / 2.355
    blurred = ndimage.gaussian_filter1d(data, sigma, axis=1, mode="nearest", truncate=3)
    points = np.indices(target.shape).reshape(3, -1).T
    index = apply_affine(np.linalg.inv(affine) @ rigid((90, 0, 0)) @ target.affine, points).T
    expected = ndimage.map_coordinates(blurred, index, order=1, mode="nearest")
    np.testing.assert_allclose(got.ravel(), expected, atol=1e-2)


def test_resampling_leaves_its_source_as_it_was():
    """The blur works in place, on a copy."""
    data = np.random.default_rng(4).normal(100, 20, (15, 20, 15)).astype(np.float32)
    coarse = Grid((5, 6, 5), lay_affine((5, 6, 5), 3))
    for source in (data, np.asfortranarray(data), data[::-1, ::-1]):
        before = source.copy()
        vol.resample(source, lay_affine(data.shape, 1), coarse)
        np.testing.assert_array_equal(source, before)


@pytest.mark.parametrize("axes", ["RAS", "LAS"])
def test_resampling_to_a_coarser_grid_moves_nothing(axes):
    shape = (60, 70, 50)
    affine = lay_affine(shape, (1, 1.2, 1.5), "RAS", turn_deg=(5, 10, -15))
    middle = np.array([6.3, -9.1, 4.7])
    world = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    blob = np.exp(-((world - middle) ** 2).sum(-1) / (2 * 6 ** 2)).astype(np.float32)
    coarse = Grid((30, 34, 26), lay_affine((30, 34, 26), (2.5, 2.6, 3), axes))
    moved = vol.resample(blob, affine, coarse)
    found = apply_affine(coarse.affine, ndimage.center_of_mass(moved))
    np.testing.assert_allclose(found, middle, atol=0.03)


def make_volume(shape, affine, **how):
    return volume_from_image(nib.Nifti1Image(paint(shape, affine, **how), affine))


def test_the_slicing_grid_keeps_axes_and_middle_and_covers_the_whole_field_of_view():
    scan = make_volume((40, 50, 30), lay_affine((40, 50, 30), (4.1, 3.7, 4.5), turn_deg=(9, 4, 2)))
    grid = vol.slicing_grid(scan, 3.0)
    np.testing.assert_allclose(grid.spacing_mm, [3.0, 3.0, 4.5])
    turned = [a[:3, :3] / voxel_sizes(a) for a in (grid.affine, scan.affine)]
    np.testing.assert_allclose(*turned, atol=1e-9)
    middles = [apply_affine(g.affine, (np.array(g.shape) - 1) / 2)
               for g in (grid, vol.grid_of(scan))]
    np.testing.assert_allclose(*middles, atol=1e-9)
    box, native = np.array(grid.shape) * grid.spacing_mm, np.array((40, 50, 30)) * scan.spacing_mm
    assert (box >= native - 1e-6).all() and (box < native + grid.spacing_mm).all()


def test_along_k_the_slicing_grid_only_ever_gets_coarser():
    shape = (30, 30, 60)
    fine, thick = (make_volume(shape, lay_affine(shape, (4, 4, k))) for k in (1.0, 4.0))
    np.testing.assert_allclose(vol.slicing_grid(fine, 1.5).spacing_mm, 1.5)
    assert vol.slicing_grid(fine, 1.5).shape == (80, 80, 40)
    np.testing.assert_allclose(vol.slicing_grid(thick, 1.5).spacing_mm, [1.5, 1.5, 4.0])
    assert vol.slicing_grid(thick, 1.5).shape[2] == 60


def test_a_scan_that_has_the_spacing_already_keeps_its_own_voxels():
    shape = (36, 46, 28)
    scan = make_volume(shape, lay_affine(shape, (4.0003, 3.9996, 5)))
    grid = vol.slicing_grid(scan, 4.0)
    assert grid.shape == shape
    assert grid.affine[:3, :3].tobytes() == scan.affine[:3, :3].tobytes()
    np.testing.assert_array_equal(vol.resample(scan.data, scan.affine, grid), scan.data)


# ------------------------------------------------------------------------------------ intensity


def test_zero_becomes_minus_one_and_the_percentile_one():
    data = np.linspace(0, 1000, 1001, dtype=np.float32).reshape(7, 11, 13)
    mask = np.ones(data.shape, bool)
    by = vol.fit_scale(data, mask, upper=90)
    assert by == vol.IntensityScale(0.0, 900.0)
    scaled = vol.scale(data, mask, by)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled.ravel()[[0, 450, 900, 1000]], [-1, 0, 1, 1], atol=1e-6)


def test_the_scale_is_that_of_the_brain_alone_and_background_is_exactly_minus_one():
    data = np.random.default_rng(5).uniform(1, 100, (8, 9, 10)).astype(np.float32)
    mask = np.zeros(data.shape, bool)
    mask[2:6, 2:6, 2:6] = True
    wild = np.where(mask, data, 1e6).astype(np.float32)
    assert vol.fit_scale(wild, mask) == vol.fit_scale(data, mask)
    scaled = vol.scale(wild, mask, vol.fit_scale(wild, mask))
    assert (scaled[~mask] == -1).all() and (scaled[mask] > -1).all()


@pytest.mark.parametrize("shift", [0, -40], ids=["magnitude", "z-scored"])
def test_unscale_undoes_scale_except_where_that_clipped(shift):
    data = np.random.default_rng(6).uniform(0, 80, (12, 12, 12)).astype(np.float32) + shift
    mask = np.ones(data.shape, bool)
    by = vol.fit_scale(data, mask)
    back = vol.unscale(vol.scale(data, mask, by), by)
    held = (data >= by.low) & (data <= by.high)
    assert held.mean() > 0.98
    np.testing.assert_allclose(back[held], data[held], atol=1e-4)
    clipped = np.clip(data, by.low, by.high)
    np.testing.assert_allclose(back, clipped, atol=1e-4)
    assert back.max() == pytest.approx(by.high, abs=1e-4)


def test_a_few_negative_leftovers_keep_zero_as_the_floor_and_a_shifted_volume_gets_its_own():
    data = np.random.default_rng(7).uniform(1, 100, 10_000).astype(np.float32).reshape(10, 100, 10)
    mask = np.ones(data.shape, bool)
    data.ravel()[:150] = -5  # 1.5 %
    assert vol.fit_scale(data, mask).low == 0
    data.ravel()[:250] = -5  # 2.5 %
    assert vol.fit_scale(data, mask).low == -5
    dark = data - 500  # a brain below zero throughout
    assert -506 < vol.fit_scale(dark, mask).low < vol.fit_scale(dark, mask).high < -400


def test_a_brain_without_contrast_and_an_empty_mask_are_refused_by_file_name():
    data = np.full((8, 8, 8), 7.0, np.float32)
    data[0] = 0
    with pytest.raises(ValueError, match="x.nii: the brain mask covers none"):
        vol.fit_scale(data, np.zeros(data.shape, bool), path="x.nii")
    with pytest.raises(ValueError, match="x.nii: the brain has no contrast"):
        vol.fit_scale(data * 0, data > 1, path="x.nii")


def blob(inside, outside=0.0):
    """A ball of 40 mm radius on 2 mm voxels, its mask, and both on a coarser grid."""
    affine = lay_affine((48, 48, 48), (2, 2, 2))
    mask = np.linalg.norm(np.indices((48, 48, 48)) - 23.5, axis=0) < 20
    data = np.where(mask, inside, outside).astype(np.float32)
    grid = Grid((30, 30, 30), lay_affine((30, 30, 30), (3.1, 3.1, 3.1), middle=(0.3, 0.2, 0.1)))
    return (data, mask), (vol.resample(data, affine, grid),
                          vol.resample(mask, affine, grid, nearest=True))


@pytest.mark.parametrize("outside", [0, 90])
def test_a_brain_of_one_value_is_refused_whatever_is_around_it_and_on_any_grid(outside):
    for data, mask in blob(5, outside):
        with pytest.raises(ValueError, match=r"x.nii: the brain has no contrast \(all about 5\)"):
            vol.fit_scale(data, mask, path="x.nii")
    (data, mask), _ = blob(5)
    data[20:26, 20:23, 20:23] = 9  # 54 of 33 000 voxels: a speck is no contrast
    with pytest.raises(ValueError, match="no contrast"):
        vol.fit_scale(data, mask)
    thin = np.zeros(mask.shape, bool)
    thin[:, :, 24] = mask[:, :, 24]  # all rim
    with pytest.raises(ValueError, match="no contrast"):
        vol.fit_scale(np.where(thin, 5, 0).astype(np.float32), thin)


def test_a_little_contrast_is_enough_for_a_scale_far_from_zero_or_of_two_values():
    draws = np.random.default_rng(8)
    (data, mask), _ = blob(1)
    noisy = (10_000 + draws.uniform(0, 1, data.shape)).astype(np.float32)
    assert vol.fit_scale(noisy, mask) == vol.IntensityScale(0, pytest.approx(10_001, abs=0.1))
    two = np.where(draws.random(data.shape) < 0.1, 2, data).astype(np.float32)
    assert vol.fit_scale(two, mask).high == 2
    assert vol.fit_scale((1e-9 * two).astype(np.float32), mask).high == pytest.approx(2e-9)


# ----------------------------------------------------------------------------- frame and slices


def test_cropping_and_padding_put_the_centre_at_half_the_size_and_come_back_bit_equal():
    draws = np.random.default_rng(8)
    for _ in range(60):
        shape = tuple(int(n) for n in draws.integers(5, 40, 3))
        centre = tuple(int(draws.integers(0, n)) for n in shape[:2])
        size = int(draws.integers(2, 12)) * 4
        data = draws.normal(size=shape).astype(np.float32)
        framed = vol.crop_or_pad(data, centre, size)
        assert framed.shape == (size, size, shape[2])
        expected = np.full_like(framed, -1)
        kept = np.zeros(shape, bool)
        for i in range(shape[0]):
            for j in range(shape[1]):
                u, v = i - centre[0] + size // 2, j - centre[1] + size // 2
                if 0 <= u < size and 0 <= v < size:
                    expected[u, v], kept[i, j] = data[i, j], True
        np.testing.assert_array_equal(framed, expected)
        back = vol.undo_crop_or_pad(framed, shape, centre)
        np.testing.assert_array_equal(back, np.where(kept, data, -1))
        np.testing.assert_array_equal(vol.crop_or_pad(back, centre, size), framed)


def test_a_frame_beside_the_volume_is_all_fill():
    data = np.ones((5, 6, 3), np.float32)
    for centre in ((-30, 2), (40, 2), (2, 50), (2, -50)):
        assert (vol.crop_or_pad(data, centre, 8) == -1).all()
        back = vol.undo_crop_or_pad(vol.crop_or_pad(data, centre, 8), (5, 6, 3), centre)
        assert back.shape == data.shape and (back == -1).all()


def test_the_frame_is_centred_on_the_mask():
    mask = np.zeros((50, 60, 5), bool)
    mask[7:21, 30:52, 1:3] = True
    framed = vol.crop_or_pad(mask, vol.mask_centre(mask), 24, fill=False)
    i, j = (np.flatnonzero(framed.any(axis=a)) for a in ((1, 2), (0, 2)))
    assert (i[0], i[-1]) == (5, 18) and (j[0], j[-1]) == (1, 22)
    assert framed.sum() == mask.sum()
    with pytest.raises(ValueError, match="empty"):
        vol.mask_centre(np.zeros((4, 4, 4), bool))


def test_slices_run_upwards_with_anterior_on_top_and_the_right_side_at_the_end_of_a_row():
    data = np.zeros((4, 5, 6))
    data[3, 4, 5] = 1  # right, anterior, superior
    data[0, 1, 2] = 2
    slices = vol.to_slices(data)
    assert slices.shape == (6, 5, 4)
    assert slices[5, 0, 3] == 1 and slices[2, 3, 0] == 2 and slices.sum() == 3


def test_from_slices_undoes_to_slices():
    data = np.random.default_rng(9).normal(size=(4, 5, 6)).astype(np.float32)
    np.testing.assert_array_equal(vol.from_slices(vol.to_slices(data)), data)


# ------------------------------------------------------------------- one volume, there and back


def test_place_and_restore_on_the_scans_own_voxels_give_it_back_exactly():
    shape = (38, 48, 29)
    scan = make_volume(shape, lay_affine(shape, (4, 4, 5), turn_deg=(8, 3, -5), middle=(20, 9, 0)))
    mask = scan.data > 0
    grid = vol.slicing_grid(scan, 4.0)
    slices, placement = vol.place(scan.data, mask, grid, 48)
    assert slices.shape == (29, 48, 48) and placement.cut_share == 0
    assert slices.min() == -1 and slices.max() == 1
    back = vol.restore(slices, mask, placement, vol.grid_of(scan))
    expected = np.clip(scan.data / placement.scale.high, 0, 1)
    np.testing.assert_allclose(back[mask], expected[mask], atol=1e-6)


def test_place_and_restore_through_another_spacing_stay_within_interpolation_error():
    shape = (58, 72, 30)
    scan = make_volume(shape, lay_affine(shape, (2.6, 2.6, 5), turn_deg=(8, 3, -5)))
    mask = scan.data > 0
    grid = vol.slicing_grid(scan, 2.0)
    on_grid = vol.resample(mask, scan.affine, grid, nearest=True)
    slices, placement = vol.place(vol.resample(scan.data, scan.affine, grid), on_grid, grid, 96)
    back = vol.restore(slices, on_grid, placement, vol.grid_of(scan))
    expected = np.clip(scan.data / placement.scale.high, 0, 1)
    error = np.abs(back - expected)[mask]
    deep = ndimage.binary_erosion(mask, iterations=2)
    assert error.mean() < 0.01 and np.abs(back - expected)[deep].max() < 0.04
    for axis in range(3):
        shifted = np.abs(np.roll(back, 1, axis) - expected)[mask].mean()
        flipped = np.abs(np.flip(back, axis) - expected)[mask].mean()
        assert min(shifted, flipped) > 3 * error.mean(), "one voxel off must be worse"


def test_restoring_keeps_the_rim_of_the_brain_free_of_background():
    shape = (40, 40, 20)
    affine = lay_affine(shape, (4, 4, 5), turn_deg=(0, 0, 12))
    ball = np.linalg.norm(apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)), axis=-1) < 45
    data = np.where(ball, 500, 0).astype(np.float32)
    data[:18][ball[:18]] = 400
    grid = Grid(shape, affine)
    slices, placement = vol.place(data, ball, grid, 32)
    target = Grid((120, 120, 60), lay_affine((120, 120, 60), 1.4, turn_deg=(0, 0, 5)))
    fine = vol.resample(ball, affine, target, nearest=True)
    back = vol.restore(slices, ball, placement, target)
    assert back[fine].min() > 0.79


def test_what_the_frame_cuts_off_is_counted():
    data = np.random.default_rng(10).uniform(1, 2, (40, 20, 4)).astype(np.float32)
    mask = np.ones(data.shape, bool)
    _, placement = vol.place(data, mask, Grid(data.shape, np.eye(4)), 32)
    assert placement.cut_share == pytest.approx(8 / 40)
