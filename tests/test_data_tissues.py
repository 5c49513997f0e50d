"""Tissue shares of stored slices: cut like the scans, and refused where the scans are others."""

import shutil

import numpy as np
import pytest

from data.bids import find_subjects
from data.store import SliceStore
from data.tissues import LABELS, find_tissues, tissue_slices


@pytest.fixture
def segmented(segmented_tree, small_store):
    """A store, and the tree that it was made of with maps of two subjects' tissues."""
    return SliceStore(small_store), segmented_tree


def test_shares_lie_where_the_scans_show_the_tissues(segmented):
    store, tree = segmented
    row = store.subjects[-1]
    found = find_tissues([tree], store.subjects)
    assert sorted(found) == ["heads_sub-04", "heads_sub-05"]
    subject, maps = found[row["id"]]
    assert [path.name.split("_")[1] for path in maps] == [f"label-{name}" for name in LABELS]
    shares = tissue_slices(store, row, subject, maps)
    rows = slice(row["first_row"], row["first_row"] + row["n_slices"])
    assert shares.shape == (row["n_slices"], 3, 48, 48) and shares.dtype == np.float32
    inside, t1w = store.mask(rows), store.t1w[rows].astype(np.float32)
    total = shares.sum(axis=1)  # of all but the rim
    assert np.median(total[inside]) == pytest.approx(1, abs=1e-3) and total[~inside].max() == 0
    means = [t1w[shares[:, LABELS.index(name)] > 0.9].mean() for name in ("CSF", "GM", "WM")]
    assert means == sorted(means) and means[2] - means[0] > 0.5
    # T1w's own cut, by the same thresholds: voxel for voxel the same tissue
    scale = (float(row["t1w_low"]), float(row["t1w_high"]))
    signal = (t1w + 1) / 2 * (scale[1] - scale[0]) + scale[0]
    whites = (signal >= 760) & (shares[:, LABELS.index("WM")] > 0.999)
    assert whites.sum() > 0.97 * (shares[:, LABELS.index("WM")] > 0.999).sum() > 1000


def test_other_scans_are_not_taken_for_the_stored_ones(segmented):
    store, tree = segmented
    found = find_tissues([tree], store.subjects)
    row = store.subjects[-1]
    wrong = next(s for s in find_subjects(tree)[0] if s.subject == "04")
    with pytest.raises(ValueError, match="does not give the slices stored as heads_sub-05"):
        tissue_slices(store, row, wrong, found[row["id"]][1])
    shutil.copy(wrong.t1w, found[row["id"]][0].t1w)
    assert list(find_tissues([tree], store.subjects)) == ["heads_sub-04"]


def test_a_session_without_all_three_maps_has_no_tissues(segmented):
    store, tree = segmented
    next(tree.rglob("sub-04_label-WM_probseg.nii.gz")).unlink()
    assert list(find_tissues([tree], store.subjects)) == ["heads_sub-05"]
