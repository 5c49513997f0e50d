"""N4: an uneven brightness goes away, and nothing changes where none is asked for."""

import json

import nibabel as nib
import numpy as np
import pytest
from conftest import lay_affine, paint, write_pair
from painted_scans import translator, write_checkpoint

import preprocess
from data import bias, brain
from data.bias import bias_correction_of, correct_n4
from data.bids import find_subjects
from data.store import SliceStore
from data.subject import Settings, prepare, recipe
from data.nifti import read_volume
from translator import cut

SHAPE, SPACING = (44, 54, 36), (4.0, 4.0, 4.0)
SETTINGS = Settings(size=48, spacing_mm=4.0, bias_correction="n4")


@pytest.fixture(scope="module")
def head():
    """A painted brain (I, J, K) float32 without a field, and its mask."""
    data = paint(SHAPE, lay_affine(SHAPE, SPACING)).astype(np.float32)
    return data, data > 0


def uneven(strength=0.6):
    """A smooth field (I, J, K) of mean about 1: brighter to the front and to the left."""
    i, j, k = (np.linspace(-1, 1, n) for n in SHAPE)
    slope = 0.6 * j[None, :, None] - 0.4 * i[:, None, None] + 0.3 * (k ** 2)[None, None, :]
    return np.exp(strength * slope).astype(np.float32)


def off(found, wanted, mask):
    """How unevenly bright one is beside the other: the ratio's coefficient of variation."""
    ratio = found[mask] / wanted[mask]
    return float(ratio.std() / ratio.mean())


def test_a_field_that_was_put_on_is_taken_off_and_the_unit_stays(head):
    data, mask = head
    spoilt = data * uneven()
    corrected = correct_n4(spoilt, mask, np.array(SPACING))
    assert corrected.dtype == np.float32 and corrected.shape == SHAPE
    assert off(spoilt, data, mask) > 0.12
    assert off(corrected, correct_n4(data, mask, np.array(SPACING)), mask) < 0.03
    # a field has a geometric mean of 1, so what is measured in the mean stays as it was
    assert np.log(corrected[mask] / spoilt[mask]).mean() == pytest.approx(0, abs=1e-4)


def test_the_same_bytes_each_time_and_a_gain_is_only_a_gain(head):
    data, mask = head
    spoilt = data * uneven()
    once, again, doubled = (correct_n4(v, mask, np.array(SPACING))
                            for v in (spoilt, spoilt, 2 * spoilt))
    assert once.tobytes() == again.tobytes()
    np.testing.assert_allclose(doubled[mask], 2 * once[mask], rtol=2e-3)


def test_too_little_brain_is_refused_by_name(head):
    data, mask = head
    small = np.zeros_like(mask)
    small[20:26, 25:31, 15:21] = True
    with pytest.raises(ValueError, match=r"a\.nii: \d+ voxels .*bias-correction n4"):
        correct_n4(data, small, np.array(SPACING), path="a.nii")


def test_values_that_somebody_shifted_are_refused_by_name(head):
    data, mask = head
    shifted = np.where(mask, data - np.median(data[mask]), 0)
    with pytest.raises(ValueError, match="b.nii: .* below zero.*bias-correction none"):
        correct_n4(shifted, mask, np.array(SPACING), path="b.nii")


def test_without_it_records_and_recipes_are_those_of_before(tmp_path):
    assert "bias_correction" not in json.dumps(Settings().record())
    assert bias_correction_of(Settings().record()) == "none"
    assert bias_correction_of(SETTINGS.record()) == "n4"
    write_pair(tmp_path / "t", "01")
    (subject,), _ = find_subjects(tmp_path / "t")
    keys = {recipe(subject, "none", settings)[2] for settings in (
        Settings(), Settings(bias_correction="none"), Settings(bias_correction="n4"))}
    assert len(keys) == 2


@pytest.fixture(scope="module")
def spoilt_tree(tmp_path_factory):
    """Three subjects on one grid, T1w and T2w under a field each."""
    root = tmp_path_factory.mktemp("spoilt") / "tree"
    for label in ("01", "02", "03"):
        write_pair(root, label, shape=SHAPE, spacing=SPACING, person=int(label))
        for suffix, field in (("T1w", uneven()), ("T2w", uneven(-0.25))):
            path = root / f"sub-{label}" / "anat" / f"sub-{label}_{suffix}.nii.gz"
            image = nib.load(path)
            nib.Nifti1Image((image.get_fdata() * field).astype(np.int16),
                            image.affine).to_filename(path)
    return root


def test_slices_are_of_the_corrected_volume_and_translation_cuts_alike(spoilt_tree, tmp_path):
    (subject, *_), _ = find_subjects(spoilt_tree)
    plain, corrected = (prepare(subject, "none", Settings(48, 4.0, bias_correction=how),
                                brain.make_extractor("none")) for how in ("none", "n4"))
    assert np.array_equal(plain.mask, corrected.mask)
    front, back = (slice(None), slice(8, 22)), (slice(None), slice(26, 40))

    def front_to_back(part):
        x = (part.t1w.astype(np.float32) + 1) / 2
        return float(x[front][part.mask[front]].mean() / x[back][part.mask[back]].mean())

    assert abs(front_to_back(corrected) - 1) < abs(front_to_back(plain) - 1) / 2
    ckpt = write_checkpoint(tmp_path / "best.pt", size=48, spacing_mm=4.0)
    made = translator(ckpt)
    volume = read_volume(subject.t1w)
    record = {**made.record, **Settings(48, 4.0, bias_correction="n4").record()}
    first = int(corrected.row["first_slice"])
    slices = cut(volume, made.find_brain(volume).mask, record).slices
    np.testing.assert_array_equal(slices[first:first + len(corrected.t1w)].astype(np.float16),
                                  corrected.t1w)


def test_the_store_says_so_and_takes_no_others_beside(spoilt_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(bias, "ITERATIONS", (3,))  # in this process; how well is tested above
    options = ["--bids", str(spoilt_tree), "--brain-extraction", "none", "--size", "48",
               "--spacing", "4", "--out", str(tmp_path / "slices"), "--brain-ml", "300", "3000",
               "--workers", "0"]
    assert preprocess.main([*options, "--bias-correction", "n4"]) == 0
    store = SliceStore(tmp_path / "slices")
    assert store.header["intensity"]["bias_correction"] == "n4"
    with pytest.raises(ValueError, match="intensity"):
        preprocess.main(options)
    assert preprocess.main(["--check", "--out", str(tmp_path / "slices")]) == 0
