"""Tests of data/contrast.py: T1w and T2w are told apart, strangers to the training are named."""

from pathlib import Path

import numpy as np
import pytest
from conftest import lay_affine, paint
from painted_store import change_rows, write_store
from scipy import ndimage, stats

from data import brain, contrast
from data.histogram import PERCENTILES, find_standard
from data.store import SliceStore
from data.nifti import read_volume
from data.volume import crop_or_pad, place, resample, slicing_grid, to_slices

REAL = Path(__file__).parents[2] / "shared" / "data" / "bids-extracted"


def painted(suffix, person=0, spacing=4.0):
    """Slices, mask and spacing of a painted brain in a rim of fluid."""
    shape = tuple(int(mm / spacing) for mm in (152, 192, 140))
    data = paint(shape, lay_affine(shape, (spacing,) * 3), suffix, person=person)
    rim = (data > 0) & ~ndimage.binary_erosion(data > 0)
    data[rim & (np.indices(shape).sum(axis=0) % 3 > 0)] = 250 if suffix == "T1w" else 1500
    peak = np.percentile(data[data > 0], 99.5)
    return to_slices(np.clip(data / peak, 0, 1) * 2 - 1), to_slices(data > 0), (spacing, spacing)


@pytest.mark.parametrize("suffix", ["T1w", "T2w"])
@pytest.mark.parametrize("person", range(4))
def test_painted_brains_are_told_apart_from_their_intensities_alone(suffix, person):
    assert contrast.tell(contrast.measure(*painted(suffix, person))) == suffix
    assert contrast.tell(contrast.measure(*painted(suffix, person, 2.5))) == suffix


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real scans of ../shared/data")
@pytest.mark.parametrize("path", sorted(REAL.glob("sub-*/anat/*_T?w.nii.gz")),
                         ids=lambda path: path.name.split(".")[0])
def test_real_brains_with_disease_are_told_apart(path):
    volume = read_volume(path)
    mask = brain.nonzero_mask(volume)
    grid = slicing_grid(volume, 2.0)
    mask = resample(mask, volume.affine, grid, nearest=True)
    slices, placed = place(resample(volume.data, volume.affine, grid), mask, grid, 96)
    frame = to_slices(crop_or_pad(mask, placed.centre, 96, fill=False))
    assert contrast.tell(contrast.measure(slices, frame, (2.0, 2.0))) == path.name[-10:-7]


def test_figures_are_those_of_the_brain_alone():
    slices, mask, spacing = painted("T1w")
    found = contrast.measure(slices, mask, spacing)
    np.testing.assert_allclose(found.percentiles,
                               np.percentile((slices[mask] + 1) / 2, contrast.PERCENTILES),
                               atol=1e-3)
    assert found.skewness == pytest.approx(stats.skew(slices[mask]), abs=1e-3)
    outside = np.where(mask, slices, 0.7)
    assert contrast.measure(outside, mask, spacing) == found


def test_nothing_is_said_where_the_cues_disagree_or_a_brain_has_no_depth():
    for cues in ((-1.0, 0.1), (2.0, -0.3), (0.5, 0.1), (-1.0, -0.04), (2.0, float("nan"))):
        assert contrast.tell(contrast.Figures((0,) * 5, *cues)) == ""
    assert contrast.tell(contrast.Figures((0,) * 5, -1.0, -0.3)) == "T1w"
    assert contrast.tell(contrast.Figures((0,) * 5, 2.0, 0.1)) == "T2w"
    thin = np.zeros((9, 16, 16), bool)
    thin[:, 4:12, 7:9] = True
    noise = np.random.default_rng(0).random(thin.shape).astype(np.float32)
    assert contrast.tell(contrast.measure(noise, thin, (1.5, 1.5))) == ""


def test_the_record_of_a_store_holds_its_training_subjects_only(small_store):
    store = SliceStore(small_store)
    found = contrast.training_figures(store)
    train = [s for s in store.subjects if s["split"] == "train"]
    assert found["subjects"] == len(train) == 3
    each = [np.percentile((store.t1w[rows].astype(np.float32)[store.mask(rows)] + 1) / 2,
                          contrast.PERCENTILES)
            for rows in (slice(s["first_row"], s["first_row"] + s["n_slices"]) for s in train)]
    np.testing.assert_allclose(found["t1w"]["mean"], np.mean(each, axis=0), atol=1e-3)
    np.testing.assert_allclose(found["t1w"]["sd"], np.std(each, axis=0), atol=1e-3)
    volumes = [float(s["brain_ml"]) for s in train]
    assert found["brain_ml"] == [min(volumes), max(volumes)]
    assert found["slice_spacing_mm"] == [5.0, 5.0]


def test_a_training_subject_without_a_brain_has_no_part_in_the_record(tmp_path):
    folder = write_store(tmp_path / "slices", {"train": ["01", "02", "03"]})
    before = contrast.training_figures(SliceStore(folder))
    mask = np.load(folder / "mask.npy", mmap_mode="r+")
    first = SliceStore(folder).subjects[0]
    mask[first["first_row"]:first["first_row"] + first["n_slices"]] = 0
    mask.flush()
    store = SliceStore(folder)
    found = contrast.training_figures(store)
    each = [np.percentile((store.t1w[rows].astype(np.float32)[store.mask(rows)] + 1) / 2,
                          contrast.PERCENTILES)
            for rows in (slice(s["first_row"], s["first_row"] + s["n_slices"])
                         for s in store.subjects[1:])]
    np.testing.assert_allclose(found["t1w"]["mean"], np.mean(each, axis=0), atol=1e-3)
    assert found["t1w"]["mean"] != before["t1w"]["mean"]
    mask[:] = 0
    mask.flush()
    assert not {"t1w", "t2w"} & set(contrast.training_figures(SliceStore(folder)))


def test_what_is_far_from_training_is_said_with_both_figures(small_store):
    record = contrast.training_figures(SliceStore(small_store))
    usual = contrast.Figures(tuple(record["t1w"]["mean"]), -0.5, -0.2)
    sizes = {"brain_ml": record["brain_ml"][1], "slice_spacing_mm": 5.0}
    assert contrast.far_from_training(usual, "T1w", sizes, record) == []
    assert contrast.far_from_training(usual, "T1w", sizes, {}) == []  # an older checkpoint
    dark = contrast.Figures(tuple(p / 2 for p in usual.percentiles), -0.5, -0.2)
    said, = contrast.far_from_training(dark, "T1w", sizes, record)
    assert said.startswith("intensities are far from those of the training T1w")
    assert f"{dark.percentiles[2]:.2g}" in said and f"{usual.percentiles[2]:.2g}" in said
    said = contrast.far_from_training(usual, "T1w", {"brain_ml": 300.0, "slice_spacing_mm": 9.0},
                                      record)
    assert [line.split(",")[0] for line in said] == ["brain 300 ml", "slices every 9 mm"]


def test_quantiles_are_of_the_training_brains_and_of_what_is_finite(tmp_path):
    folder = write_store(tmp_path / "slices", {"train": ["01", "02"], "test": ["03"]})
    store = SliceStore(folder)
    found = contrast.intensity_quantiles(store)
    for name, stack in (("t1w", store.t1w), ("t2w", store.t2w)):
        values = np.concatenate([np.asarray(stack[r])[store.mask(r)] for r in (slice(0, 6),
                                                                               slice(6, 12))])
        wanted = np.quantile(values.astype("f4"), np.linspace(0, 1, 257))
        np.testing.assert_allclose(found[name], wanted, atol=0.02)
        assert found[name].dtype == np.float32 and (np.diff(found[name]) >= 0).all()
    standard = find_standard(store)
    shown = contrast.intensity_quantiles(store, standard=standard)
    for name, known in standard.wanted.items():  # all volumes' landmarks lie there, so theirs do
        np.testing.assert_allclose(np.interp(np.array(PERCENTILES) / 100, np.linspace(0, 1, 257),
                                             shown[name]), known[1:-1], atol=0.02)
    change_rows(folder, "t1w.npy", slice(0, 6), np.nan)
    assert np.isfinite(contrast.intensity_quantiles(SliceStore(folder))["t1w"]).all()
    change_rows(folder, "t1w.npy", slice(0, 12), np.nan)
    assert np.isfinite(contrast.intensity_quantiles(SliceStore(folder))["t1w"]).all()
