"""Brain masks: in extracted volumes, from files, by deepbet; and what is believed of them."""

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import lay_affine, paint
from nibabel.affines import apply_affine
from scipy import ndimage

from data import brain
from data.nifti import NotNow, read_volume, volume_from_image

SHAPE = (38, 48, 29)
AFFINE = lay_affine(SHAPE, (4, 4, 5))
REAL = Path(__file__).parents[2] / "shared" / "data" / "bids-raw"


def scan(data, affine=AFFINE, path="t1w.nii"):
    return volume_from_image(nib.Nifti1Image(np.asarray(data, np.float32), affine), path)


def head(**how):
    return paint(SHAPE, AFFINE, **how)


def test_the_brain_of_an_extracted_volume_is_where_it_is_not_zero_with_holes_filled():
    data = head()
    full = data > 0
    data[19:22, 24:27, 14:17] = 0  # a lesion that somebody set to zero
    assert (data > 0).sum() < full.sum()
    np.testing.assert_array_equal(brain.nonzero_mask(scan(data)), full)
    np.testing.assert_array_equal(brain.signal_mask(scan(data)), data > 0)


def test_holes_and_pieces_are_those_of_the_whole_volume():
    """Both are looked for in the box of the mask only, whose sides are where that could err."""
    draws = np.random.default_rng(0)
    for share in (0.4, 0.6, 0.8):
        for shape in ((12, 14, 10), (9, 9, 9)):
            data = np.zeros(shape)
            data[2:-3, 3:-1, 1:8] = draws.random(shape)[2:-3, 3:-1, 1:8] < share
            volume = scan(data)
            whole = ndimage.binary_fill_holes(data > 0)
            np.testing.assert_array_equal(brain.nonzero_mask(volume), whole)
            pieces = ndimage.label(data)[0]
            largest = 1 + int(np.bincount(pieces.ravel())[1:].argmax())
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(brain, "MAX_STRAY_SHARE", 1)
                kept = brain.judge_mask(data > 0, volume, limits_ml=(0, 2000))[0]
            np.testing.assert_array_equal(kept, pieces == largest)


def test_few_negative_values_around_a_brain_are_background():
    data = head()
    full = data > 0
    data[2:5, 2:5, 2:5] = -0.5
    np.testing.assert_array_equal(brain.nonzero_mask(scan(data)), full)


def test_in_a_standardised_volume_negative_values_are_brain():
    data = head()
    full = data > 0
    data = np.where(full, (data - data[full].mean()) / data[full].std(), 0)
    assert (data[full] < 0).mean() > 0.3
    np.testing.assert_array_equal(brain.nonzero_mask(scan(data)), full)


def test_a_given_mask_on_t1ws_grid_is_taken_as_it_is_in_any_orientation(tmp_path):
    full = head() > 0
    for axes in ("RAS", "LPS", "PIR"):
        image = nib.as_closest_canonical(nib.Nifti1Image(full.astype(np.uint8) * 255, AFFINE))
        turn = nib.orientations.ornt_transform(nib.io_orientation(np.eye(4)),
                                               nib.orientations.axcodes2ornt(axes))
        image.as_reoriented(turn).to_filename(tmp_path / f"{axes}.nii.gz")
        np.testing.assert_array_equal(brain.given_mask(tmp_path / f"{axes}.nii.gz", scan(head())),
                                      full)


def test_a_given_mask_on_another_grid_is_brought_to_t1ws_by_world_coordinates(tmp_path):
    shape = (76, 90, 70)
    affine = lay_affine(shape, 2.3, "LPS", turn_deg=(0, 10, 20), middle=(3, 0, 0))
    mask = paint(shape, affine) > 0
    nib.Nifti1Image(mask.astype(np.uint8), affine).to_filename(tmp_path / "mask.nii.gz")
    got = brain.given_mask(tmp_path / "mask.nii.gz", scan(head()))
    assert got.shape == SHAPE and (got != (head() > 0)).mean() < 0.01
    for axis in range(3):
        assert (np.roll(got, 1, axis) != (head() > 0)).mean() > 0.02


def test_a_mask_of_another_scan_is_refused(tmp_path):
    far = AFFINE.copy()
    far[:3, 3] += 500
    nib.Nifti1Image((head() > 0).astype(np.uint8), far).to_filename(tmp_path / "mask.nii.gz")
    with pytest.raises(ValueError, match="mask.nii.gz: does not overlap t1w.nii"):
        brain.given_mask(tmp_path / "mask.nii.gz", scan(head()))


def test_a_mask_that_lost_the_scans_affine_is_refused_by_its_own_name(tmp_path):
    mask = (head() > 0).astype(np.uint8)
    nib.Nifti1Image(mask, np.eye(4)).to_filename(tmp_path / "mask.nii.gz")
    with pytest.raises(ValueError, match="mask.nii.gz: has as many voxels as t1w.nii, but the id"):
        brain.given_mask(tmp_path / "mask.nii.gz", scan(head()))
    np.testing.assert_array_equal(  # where the scan has lost it, too, they do meet
        brain.given_mask(tmp_path / "mask.nii.gz", scan(head(), np.eye(4))), mask > 0)


@pytest.mark.parametrize("background", [-1, -1024, -0.0047, 30])
@pytest.mark.parametrize("shape", [SHAPE, (36, 44, 33)])
def test_an_extracted_volume_whose_background_is_not_0_is_told_so(background, shape):
    affine = lay_affine(shape, 4)
    volume = scan(paint(shape, affine) + background, affine)
    said = f"t1w.nii: background is {background} and not 0.*; subtract"
    assert not brain.looks_extracted(volume)
    with pytest.raises(ValueError, match=said):
        brain.judge_mask(brain.nonzero_mask(volume), volume)


def test_a_background_that_scaled_integers_moved_off_0_is_told(tmp_path):
    image = nib.Nifti1Image(head() * 1e-3 - 0.3, AFFINE)
    image.set_data_dtype(np.int16)
    image.to_filename(tmp_path / "t1w.nii")
    volume = read_volume(tmp_path / "t1w.nii")
    with pytest.raises(ValueError, match="background is -0.3 and not 0"):
        brain.judge_mask(brain.nonzero_mask(volume), volume)


def test_nothing_is_said_of_the_background_of_a_head_or_of_a_brain_on_zero():
    noise = np.abs(np.random.default_rng(0).normal(0, 5, SHAPE))
    for data in (head(), head(extracted=False), head(extracted=False) + noise):
        assert brain.strange_background(scan(data)) == ""


def test_small_stray_pieces_are_dropped_and_the_volume_is_that_of_what_stays():
    mask = head() > 0
    strayed = mask.copy()
    strayed[0:3, 0:3, 0:3] = True
    kept, brain_ml = brain.judge_mask(strayed, scan(head()))
    np.testing.assert_array_equal(kept, mask)
    assert brain_ml == pytest.approx(mask.sum() * 4 * 4 * 5 / 1000)


def test_a_mask_in_large_pieces_is_refused():
    mask = head() > 0
    mask[:, 22:25] = False
    with pytest.raises(ValueError, match=r"t1w.nii: brain mask is in pieces \(4\d% apart"):
        brain.judge_mask(mask, scan(head()))


def test_a_mask_too_small_or_too_large_for_a_brain_is_refused_with_both_figures():
    full = head() > 0
    small = full & (np.arange(SHAPE[2]) < 8)
    with pytest.raises(ValueError, match=r"has \d\d\d ml, believed are 800 to 2000; .*--brain-ml"):
        brain.judge_mask(small, scan(head()))
    brain_ml = brain.judge_mask(full, scan(head()))[1]
    with pytest.raises(ValueError, match="believed are 10 to 900"):
        brain.judge_mask(full, scan(head()), limits_ml=(10, 900))
    assert brain.judge_mask(full, scan(head()), limits_ml=(10, brain_ml + 1))[1] == brain_ml
    with pytest.raises(ValueError, match="has 0 ml"):
        brain.judge_mask(np.zeros(SHAPE, bool), scan(head()))


def test_a_mask_that_fills_all_six_sides_is_no_brain():
    shape = (30, 30, 30)
    everything = scan(np.random.default_rng(0).uniform(1, 2, shape), lay_affine(shape, 4))
    assert 800 < np.prod(shape) * 0.064 < 2000
    with pytest.raises(ValueError, match="fills all six sides"):
        brain.judge_mask(np.ones(shape, bool), everything)


def cropped(shape, affine, **how):
    """A painted head in the smallest box that holds all of its signal."""
    data = paint(shape, affine, **how)
    data[data < 1] = 0
    (box,) = ndimage.find_objects((data > 0).astype(int))
    affine = affine.copy()
    affine[:3, 3] = apply_affine(affine, [side.start for side in box])
    return scan(data[box], affine)


@pytest.mark.parametrize("shape, spacing", [(SHAPE, (4, 4, 5)), ((80, 90, 70), 2),
                                            ((20, 25, 20), 8)])
@pytest.mark.parametrize("person", [0, 3])
def test_a_brain_cropped_to_its_box_is_believed_and_seen_to_be_extracted(shape, spacing, person):
    volume = cropped(shape, lay_affine(shape, spacing), person=person)
    mask = brain.nonzero_mask(volume)
    assert all(mask.take(end, axis=axis).any() for axis in range(3) for end in (0, -1))
    assert brain.looks_extracted(volume)
    kept, brain_ml = brain.judge_mask(mask, volume)
    np.testing.assert_array_equal(kept, mask)
    assert 1200 < brain_ml < 1400


def test_a_whole_head_is_no_brain_however_it_is_cropped():
    shape = (46, 56, 44)
    affine = lay_affine(shape, 4)
    noise = np.abs(np.random.default_rng(0).normal(0, 5, shape))
    whole = cropped(shape, affine, extracted=False)
    noisy = scan(paint(shape, affine, extracted=False) + noise, affine)
    middle = scan(whole.data[8:38, 10:40, 6:36], affine)  # as large as a brain
    for volume, said in ((whole, "believed are"), (noisy, "believed are"),
                         (middle, "fills all six sides")):
        assert not brain.looks_extracted(volume)
        with pytest.raises(ValueError, match=said):
            brain.judge_mask(brain.nonzero_mask(volume), volume)


def test_extracted_volumes_are_told_from_whole_heads():
    shape = (46, 56, 44)
    affine = lay_affine(shape, 4)
    assert brain.looks_extracted(scan(head()))
    assert not brain.looks_extracted(scan(paint(shape, affine, extracted=False), affine))
    noise = np.abs(np.random.default_rng(0).normal(0, 5, shape))
    assert not brain.looks_extracted(scan(paint(shape, affine, extracted=False) + noise, affine))
    box = scan(np.random.default_rng(0).uniform(1, 2, (30, 30, 30)), lay_affine((30, 30, 30), 4))
    assert not brain.looks_extracted(box), "as large as a brain, but cut on all sides"


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'bet' is unknown; choose one of hd-bet, deepbet, mask"):
        brain.make_extractor("bet")
    assert brain.make_extractor("none") is brain.nonzero_mask


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_deepbets_mask_is_the_one_of_its_own_command():
    bet = pytest.importorskip("deepbet.bet")
    shape = (70, 84, 66)
    affine = lay_affine(shape, (2.6, 2.6, 2.8))
    head = paint(shape, affine, extracted=False)
    head += np.abs(np.random.default_rng(0).normal(0, 15, shape)).astype(np.float32)
    mask = brain.make_extractor("deepbet")(scan(head, affine))
    own = bet.BrainExtraction(no_gpu=True).run(nib.Nifti1Image(head, affine))[1]
    assert mask.dtype == bool and 0.05 < mask.mean() < 0.5
    np.testing.assert_array_equal(mask, np.asarray(own.dataobj) > 0)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real scans of ../shared/data")
def test_deepbet_finds_the_same_brain_in_a_real_head_however_its_axes_run(tmp_path):
    pytest.importorskip("deepbet")
    extract = brain.make_extractor("deepbet")
    t1w = read_volume(next(REAL.glob("sub-msp01/anat/*_T1w.nii.gz")))
    thinned = t1w.data[::2, ::2]  # 1.4 x 1.4 x 3 mm
    affine = t1w.affine @ np.diag([2, 2, 1, 1])
    middle = apply_affine(affine, (np.array(thinned.shape) - 1) / 2)
    thinned = np.pad(thinned, ((30, 0), (0, 0), (0, 0)))  # so that the head stands on one side
    affine[:3, 3] -= 30 * affine[:3, 0]
    straight = scan(thinned, affine)
    flipped = nib.Nifti1Image(thinned, affine).as_reoriented(np.array([[1, -1], [0, -1], [2, 1]]))
    flipped.to_filename(tmp_path / "turned.nii.gz")
    masks = []
    for volume in (straight, read_volume(tmp_path / "turned.nii.gz")):
        mask, brain_ml = brain.judge_mask(extract(volume), volume)
        assert mask.shape == volume.data.shape and 1000 < brain_ml < 1800
        masks.append(mask)
    np.testing.assert_array_equal(*masks)
    inside, around = thinned[masks[0]].mean(), thinned[~masks[0]].mean()
    assert inside > 2 * around
    centre = apply_affine(affine, np.argwhere(masks[0]).mean(0))
    assert abs(centre[0] - middle[0]) < 15, "the brain lies in the middle of the scan as it was"
    assert centre[2] > middle[2] - 20, "and not in the neck"


@pytest.mark.parametrize("error, kind, said", [
    (AssertionError("Not enough foreground"), ValueError,
     "^t1w.nii: deepbet found no brain .*look at the scan"),
    (RuntimeError("CUDA error: no kernel image is available\nCUDA kernel errors might"), OSError,
     "deepbet: the GPU failed at t1w.nii .*--device cpu"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), NotNow, "no memory left for"),
    (MemoryError(), NotNow, "no memory left for deepbet"),
    (RuntimeError("Input and output sizes should be greater than 0"), NotNow,
     "^t1w.nii: deepbet failed .*look at the scan")],
    ids=["no head", "GPU", "GPU memory", "memory", "other"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_scan_is_blamed_for_its_own_faults_only(error, kind, said, monkeypatch):
    pytest.importorskip("deepbet")
    extract = brain.make_extractor("deepbet")

    def fail(*_):
        raise error

    monkeypatch.setattr(brain, "_run_deepbet", fail)
    with pytest.raises(kind, match=said) as caught:
        extract(scan(head()))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, NotNow) == (kind is NotNow)


def test_a_gpu_that_fails_before_any_scan_is_one_error(monkeypatch):
    bet = pytest.importorskip("deepbet.bet")

    def fail(*_, **__):
        raise RuntimeError("CUDA driver initialization failed\nCUDA kernel errors might")

    monkeypatch.setattr(bet, "load_model", fail)
    with pytest.raises(OSError, match="deepbet: cannot be loaded on cuda .*--device cpu") as caught:
        brain.make_extractor("deepbet", device="cuda")
    assert "\n" not in str(caught.value)


def test_a_deepbet_that_breaks_while_it_is_imported_is_one_error(tmp_path, monkeypatch):
    (tmp_path / "deepbet").mkdir()
    (tmp_path / "deepbet" / "__init__.py").write_text("raise RuntimeError('made for another')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepbet"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match="deepbet: .*RuntimeError: made for another"):
        brain.make_extractor("deepbet")


def test_an_empty_given_mask_is_left_to_be_judged(tmp_path):
    t1w = scan(head())
    path = tmp_path / "mask.nii.gz"
    none = np.zeros(SHAPE, np.uint8)
    none[0, 0, 0] = 1  # a file of one value is refused as it is read
    nib.Nifti1Image(none * 0.4, t1w.affine).to_filename(path)
    assert not brain.given_mask(path, t1w).any()


@pytest.mark.parametrize("off_mm, said", [(60, "of it"), (120, "does not overlap|outside")])
def test_a_given_mask_that_lies_elsewhere_is_refused(off_mm, said, tmp_path):
    t1w = scan(head())
    affine = t1w.affine.copy()
    affine[1, 3] += off_mm
    path = tmp_path / "mask.nii.gz"
    nib.Nifti1Image((head() > 0).astype(np.uint8), affine).to_filename(path)
    with pytest.raises(ValueError, match=said):
        brain.given_mask(path, t1w)
