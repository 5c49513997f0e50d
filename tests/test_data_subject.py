"""From two files to the rows of a store: right place, one interpolation, honest refusals."""

import nibabel as nib
import numpy as np
import pytest
from conftest import lay_affine, paint, rigid, write_pair
from nibabel.affines import apply_affine
from scipy import ndimage

from data import brain, volume
from data.bids import Subject, brain_mask_path, find_subjects
from data.nifti import read_volume
from data.registration import make_fixed, register_rigid
from data.store import digest_rows
from data.subject import Settings, prepare, recipe, slices_kept

SETTINGS = Settings(size=48, spacing_mm=4.0)


def only_subject(root):
    (subject,), _ = find_subjects(root)
    return subject


def made(root, method="none", settings=SETTINGS):
    extractor = None if method == "mask" else brain.make_extractor(method)
    return prepare(only_subject(root), method, settings, extractor)


def expected_slices(part, suffix, person, *, shape=(38, 48, 29), spacing=(4, 4, 5), turn_deg=()):
    """What a head looks like on T1w's own grid, framed and scaled by the figures of the row."""
    affine = lay_affine(shape, spacing, turn_deg=turn_deg or (0, 0, 0))
    head = paint(shape, affine, suffix, person=person).astype(np.int16).astype(np.float32)
    brain_mask = paint(shape, affine, person=person) > 0
    low, high = (float(part.row[f"{suffix.lower()}_{end}"]) for end in ("low", "high"))
    scaled = np.where(brain_mask, np.clip((head - low) / (high - low), 0, 1) * 2 - 1, -1)
    centre = volume.mask_centre(brain_mask)
    framed = volume.to_slices(volume.crop_or_pad(scaled, centre, 48))
    first = int(part.row["first_slice"])
    return framed[first:first + len(part.t1w)]


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "PIR"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_without_resampling_the_rows_are_the_heads_own_voxels(axes, dtype, tmp_path):
    shape, spacing = (38, 48, 29), (4, 4, 5)
    if axes == "PIR":
        shape, spacing = (48, 29, 38), (4, 5, 4)
    write_pair(tmp_path / "t", "01", shape=shape, spacing=spacing, axes=axes, person=3, dtype=dtype,
               turn_deg=(10, -5, 8))
    part = made(tmp_path / "t")
    assert part.row["registration"] == "same-grid"
    for suffix, got in (("T1w", part.t1w), ("T2w", part.t2w)):
        assert got.dtype == np.float16 and got.shape[1:] == (48, 48)
        wanted = expected_slices(part, suffix, 3, turn_deg=(10, -5, 8))
        # the truncation to int16 may differ by one unit where coordinates are rounded
        np.testing.assert_allclose(got.astype(float), wanted, atol=4e-3)
        assert np.abs(got.astype(float)[..., ::-1] - wanted).mean() > 0.02
    np.testing.assert_array_equal(part.mask, expected_slices(part, "T1w", 3,
                                                             turn_deg=(10, -5, 8)) > -1)


def test_rows_are_aligned_scaled_and_masked_and_the_row_of_the_table_says_how(tmp_path):
    write_pair(tmp_path / "t", "01", person=5)
    part = made(tmp_path / "t")
    assert part.t1w.shape == part.t2w.shape == part.mask.shape == (len(part.t1w), 48, 48)
    for slices in (part.t1w, part.t2w):
        assert (slices[~part.mask] == -1).all() and slices.max() == 1 and slices.min() == -1
        assert (slices[part.mask] > -1).all()
    row, head = part.row, paint((38, 48, 29), lay_affine((38, 48, 29), (4, 4, 5)), person=5)
    assert row["id"] == "t_sub-01" and row["subject"] == "01" and row["session"] == ""
    assert row["t1w"] == "sub-01/anat/sub-01_T1w.nii.gz"
    assert float(row["brain_ml"]) == pytest.approx((head > 0).sum() * 0.08, abs=0.1)
    assert float(row["t1w_high"]) == pytest.approx(np.percentile(head[head > 0], 99.5), rel=1e-2)
    assert (row["cut_share"], row["t2w_coverage"]) == ("0.0000", "1.0000")
    assert row["slice_spacing_mm"] == "5.0000" and row["mi_before"] == row["mi_after"] == ""
    assert row["rows_sha256"] == digest_rows(part.t1w, part.t2w, np.packbits(part.mask, axis=-1))
    areas = (head > 0).sum(axis=(0, 1))
    first, last = int(row["first_slice"]), int(row["first_slice"]) + len(part.t1w) - 1
    assert areas[first] >= 0.25 * areas.max() > areas[first - 1]
    assert areas[last] >= 0.25 * areas.max() > areas[last + 1]


def test_a_moved_t2w_is_registered_and_interpolated_once_from_its_own_grid(tmp_path):
    moved, shape = rigid((2, -3, 4), (5, -4, 3)), (60, 72, 36)
    own = lay_affine(shape, (2.9, 2.8, 4.6), "LPS", turn_deg=(6, 0, -4))
    write_pair(tmp_path / "t", "01", person=2, matrix=moved, t2w_shape=shape, t2w_affine=own)
    part = made(tmp_path / "t")
    assert part.row["registration"] == "rigid"
    assert float(part.row["rotation_deg"]) == pytest.approx(5.4, abs=1)
    assert float(part.row["mi_after"]) > float(part.row["mi_before"]) + 0.2
    t1w, t2w = (read_volume(tmp_path / "t/sub-01/anat" / f"sub-01_{s}.nii.gz")
                for s in ("T1w", "T2w"))
    matrix = register_rigid(make_fixed(t1w, t1w.data > 0), t2w).matrix
    points = np.indices(t1w.data.shape).reshape(3, -1).T
    index = apply_affine(np.linalg.inv(t2w.affine) @ matrix @ t1w.affine, points).T
    steps = np.linalg.norm((np.linalg.inv(t2w.affine) @ matrix @ t1w.affine)[:3, :3], axis=1)
    blurred = t2w.data
    for axis, step in enumerate(steps):
        sigma = np.sqrt(max(step ** 2 - 1, 0)) / 2.355
        if sigma > 0.2:
            blurred = ndimage.gaussian_filter1d(blurred, sigma, axis=axis, truncate=3,
                                                mode="nearest")
    once = ndimage.map_coordinates(blurred, index, order=1).reshape(t1w.data.shape)
    low, high = float(part.row["t2w_low"]), float(part.row["t2w_high"])
    scaled = np.clip((once - low) / (high - low), 0, 1) * 2 - 1
    centre = volume.mask_centre(t1w.data > 0)
    framed = volume.to_slices(volume.crop_or_pad(scaled.astype(np.float32), centre, 48))
    first = int(part.row["first_slice"])
    wanted = framed[first:first + len(part.t2w)]
    np.testing.assert_allclose(part.t2w[part.mask], wanted[part.mask], atol=5e-3)
    truth = expected_slices(part, "T2w", 2)
    inner = ndimage.binary_erosion(part.mask, np.ones((1, 5, 5)))
    inner[:2] = inner[-2:] = False
    assert np.abs(part.t2w - truth)[inner].mean() < 0.08
    assert np.abs(np.roll(part.t2w, 1, 2) - truth)[inner].mean() > \
        1.5 * np.abs(part.t2w - truth)[inner].mean()


def test_a_pair_on_one_grid_is_registered_all_the_same_unless_it_is_extracted(tmp_path):
    """Two scans of one session often share a grid and not the head's position."""
    shape = (46, 56, 44)
    write_pair(tmp_path / "t", "01", shape=shape, spacing=4, extracted=False, mask=True,
               matrix=rigid((0, 0, 0), (6, 0, 0)))
    part = made(tmp_path / "t", "mask")
    assert part.row["registration"] == "rigid" and part.row["brain_extraction"] == "mask"
    assert float(part.row["translation_mm"]) == pytest.approx(6, abs=0.5)


def test_the_brain_that_t2w_does_not_show_is_left_out_of_both(tmp_path):
    """In T2w the head lies 16 mm further ahead, in a box that ends 60 mm before its middle."""
    shape = (38, 36, 29)
    behind = lay_affine(shape, (4, 4, 5), middle=(0, 60 - 36 * 2, 0))
    write_pair(tmp_path / "part", "01", person=1, t2w_shape=shape, t2w_affine=behind,
               matrix=rigid(shift_mm=(0, 16, 0)))
    write_pair(tmp_path / "whole", "01", person=1)
    cut, whole = made(tmp_path / "part", "none"), made(tmp_path / "whole")
    assert cut.row["registration"] == "rigid"
    assert float(cut.row["translation_mm"]) == pytest.approx(16, abs=1)
    assert float(cut.row["brain_ml"]) == float(whole.row["brain_ml"]), "of the whole mask"
    affine = lay_affine((38, 48, 29), (4, 4, 5))
    brain_mask = paint((38, 48, 29), affine, person=1) > 0
    ahead_mm = apply_affine(affine, np.argwhere(brain_mask))[:, 1]
    assert float(cut.row["t2w_coverage"]) == pytest.approx((ahead_mm < 60 - 16).mean(), abs=0.03)
    length = [int(part.mask.any(axis=(0, 2)).sum()) for part in (cut, whole)]
    assert length[0] == pytest.approx(length[1] - (ahead_mm.max() - (60 - 16)) / 4, abs=1.1)
    assert (cut.t1w[~cut.mask] == -1).all() and (cut.t2w[~cut.mask] == -1).all()
    assert (cut.t2w[cut.mask] > -1).mean() > 0.97


def test_a_t2w_that_shows_less_than_half_of_the_brain_is_refused(tmp_path):
    slab = lay_affine((38, 48, 9), (4, 4, 5), middle=(0, 0, 45))
    write_pair(tmp_path / "t", "01", t2w_shape=(38, 48, 9), t2w_affine=slab)
    with pytest.raises(ValueError, match=r"sub-01_T2w.nii.gz: covers \d+% of the brain in"):
        made(tmp_path / "t")


def blank(path, *slices):
    image = nib.load(path)
    data = np.asarray(image.dataobj).copy()
    data[:, :, list(slices)] = 0
    nib.Nifti1Image(data, image.affine).to_filename(path)


def test_slices_of_zeros_at_the_end_of_a_padded_scan_are_left_out(tmp_path):
    anat = write_pair(tmp_path / "t", "01")
    whole = made(tmp_path / "t")
    blank(anat / "sub-01_T2w.nii.gz", *range(20, 29))
    cut = made(tmp_path / "t")
    assert int(cut.row["first_slice"]) + len(cut.t1w) == 20
    assert float(cut.row["t2w_coverage"]) < float(whole.row["t2w_coverage"])
    # the frame is centred on what both show, so only the number of slices is the same
    assert (cut.mask.any(axis=(1, 2))).all()


def test_a_blank_slice_in_the_middle_of_the_brain_is_refused(tmp_path):
    for suffix, slices in (("T1w", (14,)), ("T2w", (12, 13))):
        anat = write_pair(tmp_path / suffix, "01", mask=True)
        blank(anat / f"sub-01_{suffix}.nii.gz", *slices)
        message = rf"sub-01_{suffix}.nii.gz: {len(slices)} of \d+ slices .* are blank"
        with pytest.raises(ValueError, match=message):
            made(tmp_path / suffix, "mask" if suffix == "T1w" else "none")


def test_a_standardised_pair_gives_nearly_the_rows_of_the_magnitudes(tmp_path):
    anat = write_pair(tmp_path / "t", "01")
    plain = made(tmp_path / "t")
    for suffix in ("T1w", "T2w"):
        image = nib.load(anat / f"sub-01_{suffix}.nii.gz")
        data = image.get_fdata()
        inside = data != 0
        data[inside] = (data[inside] - data[inside].mean()) / data[inside].std()
        nib.Nifti1Image(data.astype(np.float32), image.affine).to_filename(
            anat / f"sub-01_{suffix}.nii.gz")
    scored = made(tmp_path / "t")
    np.testing.assert_array_equal(scored.mask, plain.mask)
    assert float(scored.row["t1w_low"]) < 0 < float(scored.row["t1w_high"])
    for a, b in ((scored.t1w, plain.t1w), (scored.t2w, plain.t2w)):
        assert np.corrcoef(a[plain.mask], b[plain.mask])[0, 1] > 0.97


def test_a_lesion_that_was_set_to_zero_stays_inside_the_brain(tmp_path):
    anat = write_pair(tmp_path / "t", "01", person=1)
    whole = made(tmp_path / "t")
    image = nib.load(anat / "sub-01_T1w.nii.gz")
    data = np.asarray(image.dataobj).copy()
    data[14:18, 22:26, 12:15] = 0
    nib.Nifti1Image(data, image.affine).to_filename(anat / "sub-01_T1w.nii.gz")
    holed = made(tmp_path / "t")
    np.testing.assert_array_equal(holed.mask, whole.mask)
    assert (holed.t1w[holed.mask] == -1).sum() == 4 * 4 * 3


def test_a_mask_on_another_grid_serves_both_scans(tmp_path):
    anat = write_pair(tmp_path / "t", "01", person=4)
    shape = (76, 90, 70)
    fine = lay_affine(shape, 2.3, "PIR"[::-1], turn_deg=(0, 0, 10))
    mask = paint(shape, fine, person=4) > 0
    nib.Nifti1Image(mask.astype(np.uint8), fine).to_filename(
        anat / "sub-01_desc-brain_mask.nii.gz")
    by_mask, by_zero = made(tmp_path / "t", "mask"), made(tmp_path / "t")
    assert by_mask.row["brain_extraction"] == "mask"
    assert float(by_mask.row["brain_ml"]) == pytest.approx(float(by_zero.row["brain_ml"]), rel=0.02)


@pytest.mark.parametrize("method", ["none", "mask"])
def test_scans_cropped_to_the_brain_give_the_rows_of_the_whole_ones(method, tmp_path):
    anat = write_pair(tmp_path / "t", "01", person=4, mask=True)
    whole = made(tmp_path / "t", method)
    head = np.asarray(nib.load(anat / "sub-01_T1w.nii.gz").dataobj)
    (box,) = ndimage.find_objects((head > 0).astype(int))
    for path in anat.glob("*.nii.gz"):
        scan = nib.load(path).slicer[box]
        nib.Nifti1Image(np.asarray(scan.dataobj), scan.affine).to_filename(path)
    part = made(tmp_path / "t", method)
    assert part.t1w.shape == whole.t1w.shape
    np.testing.assert_array_equal(part.mask, whole.mask)
    np.testing.assert_allclose(part.t1w, whole.t1w, atol=0.01)


def test_a_frame_too_small_for_the_brain_says_which_share_it_cuts(tmp_path):
    write_pair(tmp_path / "t", "01")
    part = made(tmp_path / "t", settings=Settings(size=32, spacing_mm=4.0))
    assert 0.01 < float(part.row["cut_share"]) < 0.3
    assert part.t1w.shape[1:] == (32, 32)


def test_slices_run_from_the_first_to_the_last_that_is_large_enough():
    mask = np.zeros((8, 10, 10), bool)
    for k, n in enumerate((0, 2, 3, 10, 1, 6, 2, 0)):
        mask[k, 0, :n] = True
    assert slices_kept(mask, 0.3) == slice(2, 6)
    assert slices_kept(mask, 0.01) == slice(1, 7)
    assert slices_kept(mask, 1.0) == slice(3, 4)


def test_a_scan_without_orientation_is_taken_with_a_note_and_a_stretched_one_is_refused(tmp_path):
    anat = write_pair(tmp_path / "t", "01")
    path = anat / "sub-01_T2w.nii.gz"
    scan = nib.load(path)
    affine, scan = scan.affine, nib.Nifti1Image(np.asarray(scan.dataobj), scan.affine)
    scan.set_sform(affine @ np.diag([1.1, 1.1, 1.1, 1]), 4)
    scan.set_qform(affine, 1)
    nib.save(scan, path)
    with pytest.raises(ValueError, match="4.4 x 4.4 x 5.5 mm by its sform, 4 x 4 x 5 mm by its p"):
        made(tmp_path / "t")
    scan.set_sform(None, 0)
    scan.set_qform(None, 0)
    nib.save(scan, path)
    assert made(tmp_path / "t").row["note"].startswith("sub-01_T2w.nii.gz does not say how")


def test_limits_of_the_brains_volume_are_of_an_attempts_recipe_and_not_of_the_rows(tmp_path):
    subject = Subject("t", "01", "", tmp_path, tmp_path / "x.nii.gz", tmp_path / "y.nii.gz")
    hashes = {subject.t1w: "x", subject.t2w: "y"}
    (rows, wide_rows), (attempt, wide_attempt) = (
        [recipe(subject, "none", settings, hashes=hashes, limits=limits)[2]
         for settings in (SETTINGS, Settings(48, 4.0, brain_ml=(700.0, 2000.0)))]
        for limits in (False, True))
    assert rows == wide_rows == attempt == "0b226d4262d2b959", "as in stores of before"
    assert wide_attempt == "3133695ba71cd980", "as in notes of before"


def test_a_mask_that_is_a_link_to_nothing_is_said_with_its_cure(tmp_path):
    write_pair(tmp_path / "t", "01", mask=True)
    subject = only_subject(tmp_path / "t")
    path = brain_mask_path(subject)
    path.unlink()
    path.symlink_to(tmp_path / "annex" / "gone")
    with pytest.raises(FileNotFoundError, match=rf"{path.name}: a link to nothing.*datalad get"):
        recipe(subject, "mask", SETTINGS)
    recipe(subject, "none", SETTINGS)


def test_a_recipe_changes_with_either_file_the_mask_the_method_and_the_settings(tmp_path):
    anat = write_pair(tmp_path / "t", "01", mask=True)
    subject = only_subject(tmp_path / "t")
    seen = {recipe(subject, "mask", SETTINGS)[2]}

    def is_new(method="mask", settings=SETTINGS):
        found = recipe(subject, method, settings)
        assert recipe(subject, method, settings) == found
        seen.add(found[2])
        return len(seen)

    assert is_new("none") == 2 and is_new("deepbet") == 3
    for i, changed in enumerate((Settings(size=52, spacing_mm=4.0), Settings(48, 4.5),
                                 Settings(48, 4.0, seed=1), Settings(48, 4.0, 0.3))):
        assert is_new(settings=changed) == 4 + i
    for i, name in enumerate(("T1w", "T2w", "desc-brain_mask")):
        with open(anat / f"sub-01_{name}.nii.gz", "ab") as scan:
            scan.write(b"\0")
        assert is_new() == 8 + i


@pytest.mark.parametrize("axis", [0, 1])
def test_a_slab_padded_to_the_whole_grid_covers_only_what_it_shows(axis, tmp_path):
    path = write_pair(tmp_path / "t", "01") / "sub-01_T2w.nii.gz"
    scan = nib.load(path)
    data = np.asarray(scan.dataobj).copy()
    shown = np.zeros(data.shape, bool)
    middle = data.shape[axis] // 2
    shown[(slice(None),) * axis + (slice(middle - 4, middle + 4),)] = True
    nib.Nifti1Image(np.where(shown, data, 0).astype(np.int16), scan.affine).to_filename(path)
    with pytest.raises(ValueError, match=r"sub-01_T2w.nii.gz: covers \d+% of the brain"):
        made(tmp_path / "t")


def test_what_a_padded_scan_lacks_is_no_brain_of_the_pair(tmp_path):
    path = write_pair(tmp_path / "t", "01") / "sub-01_T2w.nii.gz"
    whole = made(tmp_path / "t")
    scan = nib.load(path)
    data = np.asarray(scan.dataobj).copy()
    data[:14] = 0
    nib.Nifti1Image(data, scan.affine).to_filename(path)
    part = made(tmp_path / "t")
    assert 0.5 < float(part.row["t2w_coverage"]) < 0.95 < float(whole.row["t2w_coverage"])
    assert (part.t2w[part.mask] == -1).mean() < 0.02
