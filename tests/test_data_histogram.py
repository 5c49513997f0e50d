"""Tests of data/histogram.py: each volume with the training's histogram, its tissues in order."""

import numpy as np
import pytest
from painted_store import change_rows, write_store

from data.histogram import (CONTRASTS, DARKEST, MOST_SLICES, MOST_VOLUMES, PERCENTILES,
                            STANDARDISED, Standard, StandardRows, find_standard, landmarks, moved)
from data.store import SliceStore

SPLITS = {"train": ["01", "02", "03"], "val": ["04"], "test": ["05_ses-a", "05_ses-b"]}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    counts = {"01": 6, "02": 4, "03": 9, "04": 5, "05_ses-a": 7, "05_ses-b": 3}
    return SliceStore(write_store(tmp_path_factory.mktemp("painted") / "slices", SPLITS,
                                  n_slices=counts))


def session(store, name):
    return next(s for s in store.subjects if s["id"].endswith(name))


def in_unit(slices):
    """Intensities in [0, 1]."""
    return (slices.astype(np.float64) + 1) / 2


def test_landmarks_are_the_brains_percentiles_between_background_and_brightest():
    values = np.random.default_rng(0).uniform(-0.9, 0.9, 5000)
    found = landmarks(values)
    assert found[0] == -1 and found[-1] == 1 and found.dtype == np.float32
    np.testing.assert_allclose(found[1:-1], np.percentile(values, PERCENTILES), atol=2e-3)


@pytest.mark.parametrize("values", [
    np.full(50, 0.3), np.full(50, -1.0), np.full(50, 1.0), np.array([]), np.array([np.nan, 0.2]),
    np.repeat([-1.0, 1.0], 40)], ids=["one value", "dark", "bright", "none", "a NaN", "two values"])
def test_landmarks_ascend_whatever_the_volume_so_that_none_of_its_intensities_is_lost(values):
    found = landmarks(values)
    assert np.isfinite(found).all() and (np.diff(found) > 5e-5).all()
    assert found[0] == -1 and found[-1] == pytest.approx(1)
    shown = moved(np.linspace(-0.99, 1, 400), found, landmarks(np.linspace(-1, 1, 99)))
    assert (np.diff(shown) >= 0).all() and np.isfinite(shown).all()


@pytest.mark.parametrize("bend", [lambda v: 0.3 * v, lambda v: v ** 2, np.sqrt,
                                  lambda v: 0.2 + 0.6 * v],
                         ids=["gain", "dark", "bright", "offset"])
def test_whatever_a_scanner_does_to_the_grey_values_the_nets_are_shown_the_same(store, bend):
    standard = find_standard(store)
    t1w, _, mask = store.of_subject(session(store, "05_ses-a"))
    other = np.where(mask, 2 * bend(in_unit(t1w)) - 1, -1).astype(np.float32)
    one, two = (standard.show(v.astype(np.float32), mask, "t1w") for v in (t1w, other))
    # but for the darkest and the brightest hundredth, beyond the landmarks
    low, high = np.percentile(one[mask], (1.1, 98.9))
    common = mask & (low < one) & (one < high)
    assert np.abs(other - t1w)[common].mean() > 0.1
    assert np.abs(one - two)[common].mean() < 0.005 and np.abs(one - two)[common].max() < 0.03


def test_what_is_shown_has_the_landmarks_that_are_wanted_and_keeps_its_order(store):
    standard = find_standard(store)
    for contrast, slices in zip(CONTRASTS, store.of_subject(session(store, "04"))):
        mask = store.of_subject(session(store, "04"))[2]
        shown = standard.show(slices.astype(np.float32), mask, contrast)
        np.testing.assert_allclose(landmarks(shown[mask]), standard.wanted[contrast], atol=2e-3)
        order = np.argsort(slices[mask], kind="stable")
        assert (np.diff(shown[mask][order]) >= 0).all()
        assert (shown[~mask] == -1).all() and (shown[mask] > -1).all()


def test_the_standard_is_the_median_of_the_training_volumes_and_of_no_other(store, tmp_path):
    found = find_standard(store)
    training = [store.of_subject(session(store, name)) for name in SPLITS["train"]]
    for place, contrast in enumerate(CONTRASTS):
        every = [landmarks(arrays[place][arrays[2]]) for arrays in training]
        np.testing.assert_allclose(found.wanted[contrast], np.median(every, axis=0), rtol=1e-6)
    folder = write_store(tmp_path / "slices", SPLITS, n_slices={
        "01": 6, "02": 4, "03": 9, "04": 5, "05_ses-a": 7, "05_ses-b": 3})
    for name in ("t1w.npy", "t2w.npy"):  # others' heads may be anything
        change_rows(folder, name, store.rows("test"), 0.5)
        change_rows(folder, name, store.rows("val"), 0.5)
    again = find_standard(SliceStore(folder))
    assert all(np.array_equal(again.wanted[c], found.wanted[c]) for c in CONTRASTS)


def test_one_odd_training_volume_does_not_move_the_standard_far(store, tmp_path):
    folder = write_store(tmp_path / "slices", SPLITS, n_slices={
        "01": 6, "02": 4, "03": 9, "04": 5, "05_ses-a": 7, "05_ses-b": 3})
    odd = session(store, "03")
    dark = store.of_subject(odd)[1].astype(np.float32)
    first = odd["first_row"]
    change_rows(folder, "t2w.npy", slice(first, first + len(dark)),
                np.where(dark > -1, np.maximum((dark + 1) * 0.2 - 1, DARKEST), -1))
    others = [landmarks(store.of_subject(session(store, name))[1][
        store.of_subject(session(store, name))[2]]) for name in ("01", "02")]
    found = find_standard(SliceStore(folder)).wanted["t2w"]
    assert (found >= np.minimum(*others) - 1e-6).all() and (found <= np.maximum(*others)).all()


def test_without_training_volumes_there_is_nothing_to_go_by(tmp_path):
    testing = SliceStore(write_store(tmp_path / "slices", {"test": ["01"]}, size=8, n_slices=2))
    assert find_standard(testing).wanted == {}


def test_of_many_volumes_some_are_looked_at_from_the_first_to_the_last(tmp_path, monkeypatch):
    names = [f"{i:02d}" for i in range(MOST_VOLUMES + 2)]
    many = SliceStore(write_store(tmp_path / "slices", {"train": names}, size=8, n_slices=1))
    opened, read = [], many.of_subject
    monkeypatch.setattr(many, "of_subject", lambda s: opened.append(s["subject"]) or read(s))
    find_standard(many, ["t1w"])
    assert opened == names[::2]


def test_of_a_volume_few_slices_are_read_from_the_first_to_the_last(tmp_path, monkeypatch):
    large = SliceStore(write_store(tmp_path / "slices", {"train": ["01", "02"]}, size=16,
                                   n_slices={"01": 5, "02": 100}))
    read, mask = [], large.mask
    monkeypatch.setattr(large, "mask", lambda rows: read.append(rows) or mask(rows))
    by_row = StandardRows(large, find_standard(large))
    read.clear()
    for row in (50, 7, 50):
        by_row.show(np.array(large.t1w[row:row + 1]), np.array([row]), "t1w")
    assert len(read) == 1 and len(read[0]) == MOST_SLICES
    assert (read[0][0], read[0][-1]) == (5, 104) and set(np.diff(read[0])) <= {6, 7}
    by_row.show(np.array(large.t1w[:1]), np.array([0]), "t1w")
    np.testing.assert_array_equal(read[1], np.arange(5))


def test_rows_of_a_store_are_shown_as_their_whole_volume_would_be(store):
    standard = find_standard(store)
    by_row = StandardRows(store, standard)
    rows = np.random.default_rng(1).permutation(len(store))
    for contrast, array in zip(CONTRASTS, (store.t1w, store.t2w)):
        shown = np.array(array[rows])
        by_row.show(shown, rows, contrast)
        for s in store.subjects:
            span = slice(s["first_row"], s["first_row"] + s["n_slices"])
            wanted = standard.show(array[span], store.mask(span), contrast)
            np.testing.assert_array_equal(shown[np.argsort(rows)][span], wanted)
        assert shown.dtype == np.float16


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_what_is_not_finite_stays_so_and_training_can_name_its_file(lost, tmp_path):
    folder = write_store(tmp_path / "slices", {"train": ["01"]})
    change_rows(folder, "t1w.npy", 2, lost)
    broken = SliceStore(folder)
    shown = np.array(broken.t1w[:4])
    StandardRows(broken, find_standard(broken)).show(shown, np.arange(4), "t1w")
    assert not np.isfinite(shown[2]).any() and np.isfinite(shown[[0, 1, 3]]).all()


def test_the_darkest_brain_is_not_taken_for_background():
    slices = np.array([[-1.0, -0.9995, -0.9, 0.5]], np.float16)
    own, wanted = (landmarks(np.linspace(low, 1, 100)) for low in (-0.5, -1.0))
    shown = moved(slices, own, wanted)
    assert shown[0, 0] == -1 and (shown[0, 1:] >= DARKEST).all() and np.float16(DARKEST) > -1


def test_a_checkpoints_record_gives_it_back_and_without_one_there_is_none(store):
    standard = find_standard(store)
    again = Standard.of_record({"standard": standard.record(), "size": 32})
    assert all(np.array_equal(again.wanted[c], standard.wanted[c]) for c in CONTRASTS)
    assert Standard.of_record({"size": 32}) is None
    with pytest.raises(ValueError, match="percentiles"):
        Standard.of_record({"standard": {**standard.record(), "percentiles": [1, 50, 99]}})


def test_a_contrast_that_is_not_asked_for_stays_as_it_is(store):
    standard = find_standard(store, STANDARDISED["t1w"])
    assert list(standard.wanted) == ["t1w"] and "t2w" not in standard.record()
    again = Standard.of_record({"standard": standard.record()})
    by_row = StandardRows(store, again)
    for contrast, array, changes in (("t1w", store.t1w, True), ("t2w", store.t2w, False)):
        shown = np.array(array[:6])
        by_row.show(shown, np.arange(6), contrast)
        assert np.array_equal(shown, array[:6]) != changes
        whole = again.show(array[:6], store.mask(slice(0, 6)), contrast)
        np.testing.assert_array_equal(whole, shown)
