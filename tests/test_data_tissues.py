"""Tissue shares of stored slices: cut like the scans, and refused where the scans are others."""

import shutil

import nibabel as nib
import numpy as np
import pytest
from painted_lesions import write_lesions

from data.bids import find_subjects
from data.store import SliceStore
from data.tissues import LABELS, find_lesions, find_tissues, lesion_slices, tissue_slices


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


@pytest.mark.parametrize("name", ["label-lesion_mask", "label-L_mask", "space-T1w_label-L_mask"])
def test_lesions_lie_where_they_are_marked(segmented, name):
    store, tree = segmented
    write_lesions(tree, "sub-05", name)
    found = find_lesions([tree], store.subjects)
    assert list(found) == ["heads_sub-05"]
    row = store.subjects[-1]
    marked = lesion_slices(store, row, *found[row["id"]])
    t1w, t2w, mask = store.of_subject(row)
    assert marked.shape == mask.shape and marked.dtype == bool
    assert mask[marked].all() and marked.sum() * 0.08 == pytest.approx(3.0, rel=0.25)  # ml
    assert t2w[marked].mean() > t2w[mask].mean() + 0.5


def test_a_mask_without_lesions_is_one_of_a_subject_without_any(segmented):
    store, tree = segmented
    write_lesions(tree, "sub-05")
    path = next(tree.rglob("sub-05_label-lesion_mask.nii.gz"))
    image = nib.load(path)
    nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine).to_filename(path)
    row = store.subjects[-1]
    marked = lesion_slices(store, row, *find_lesions([tree], store.subjects)[row["id"]])
    assert marked.shape == store.of_subject(row)[2].shape and not marked.any()


def test_the_label_that_a_lesion_bears_does_not_make_it_larger(segmented):
    store, tree = segmented
    write_lesions(tree, "sub-05")
    row = store.subjects[-1]
    path = next(tree.rglob("sub-05_label-lesion_mask.nii.gz"))
    image = nib.load(path)
    found = []
    for label in (1, 5, 255):
        labelled = (np.asarray(image.dataobj) * label).astype(np.uint8)
        nib.Nifti1Image(labelled, image.affine).to_filename(path)
        found.append(lesion_slices(store, row, *find_lesions([tree], store.subjects)[row["id"]]))
    assert found[0].any()
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def test_masks_of_something_else_are_no_lesions(segmented):
    store, tree = segmented
    for name in ("label-ventricle_mask", "space-T2w_label-lesion_mask", "desc-brain_mask"):
        write_lesions(tree, "sub-05", name)
    assert find_lesions([tree], store.subjects) == {}
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_lesions([tree / "nowhere"], store.subjects)
