"""Which files of a tree are taken: names only, so all files here are empty."""

import contextlib
import json
import os
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data import bids

BOTH = ("sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz")


def grow(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def names(subjects):
    return [(s.id, s.t1w.name, s.t2w.name) for s in subjects]


def test_subjects_and_sessions_are_paired_each_for_itself(tmp_path):
    root = grow(tmp_path / "study", *BOTH,
                "sub-02/ses-b/anat/sub-02_ses-b_T1w.nii", "sub-02/ses-b/anat/sub-02_ses-b_T2w.nii",
                "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz",
                "sub-02/ses-a/anat/sub-02_ses-a_T2w.nii.gz")
    subjects, missing = bids.find_subjects(root)
    assert names(subjects) == [
        ("study_sub-01", "sub-01_T1w.nii.gz", "sub-01_T2w.nii.gz"),
        ("study_sub-02_ses-a", "sub-02_ses-a_T1w.nii.gz", "sub-02_ses-a_T2w.nii.gz"),
        ("study_sub-02_ses-b", "sub-02_ses-b_T1w.nii", "sub-02_ses-b_T2w.nii")]
    assert [(s.dataset, s.subject, s.session) for s in subjects] == [
        ("study", "01", ""), ("study", "02", "a"), ("study", "02", "b")]
    assert missing == {}


def test_a_scan_without_its_twin_in_the_same_session_is_named_with_the_reason(tmp_path):
    root = grow(tmp_path / "study", *BOTH, "sub-02/anat/sub-02_T2w.nii.gz",
                "sub-03/ses-1/anat/sub-03_ses-1_T1w.nii.gz",
                "sub-03/ses-2/anat/sub-03_ses-2_T2w.nii.gz", "sub-04/anat/sub-04_FLAIR.nii.gz")
    subjects, missing = bids.find_subjects(root)
    assert [s.id for s in subjects] == ["study_sub-01"]
    assert missing == {
        "study_sub-02": "sub-02/anat: has a T2w but no T1w",
        "study_sub-03_ses-1": "sub-03/ses-1/anat: has a T1w but no T2w",
        "study_sub-03_ses-2": "sub-03/ses-2/anat: has a T2w but no T1w"}


@pytest.mark.parametrize("misnamed", [
    "sub-08/anat/sub-08_acq-mprage_iso_T1w.nii.gz", "sub-08/anat/sub-08_T1W.nii.gz",
    "sub-08/anat/t2w.nii", "sub-NDAR-8/anat/sub-NDAR-8_T1w.nii.gz", "sub-08/anat/sub-08_pT1w.nii"])
def test_a_subject_whose_scans_are_misnamed_is_listed_and_told_to_rename_them(misnamed, tmp_path):
    root = grow(tmp_path / "study", *BOTH, misnamed)
    subjects, missing = bids.find_subjects(root)
    assert [s.id for s in subjects] == ["study_sub-01"]
    assert missing == {f"study_{Path(misnamed).parts[0]}":
                       f"{misnamed}: not named by the rules of BIDS; rename it"}


def test_misnamed_files_beside_a_pair_and_what_is_no_scan_are_passed_over(tmp_path):
    root = grow(tmp_path / "study", *BOTH, "sub-01/anat/T1w.nii.gz", "sub-02/anat/._x_T1w.nii.gz",
                "sub-02/anat/T1w.nii.gz/file", "sub-02/anat/sub-02-T1w.json")
    assert bids.find_subjects(root)[1] == {}
    grow(root, "sub-03/anat/sub-03_T1w.nii.gz", "sub-03/anat/sub-03-T1w.nii.gz")
    assert bids.find_subjects(root)[1] == {"study_sub-03": "sub-03/anat: has a T1w but no T2w"}


def test_a_misnamed_file_whose_name_is_no_text_can_be_listed(tmp_path):
    root = grow(tmp_path / "study", *BOTH)
    (root / "sub-02" / "anat").mkdir(parents=True)
    (root / "sub-02" / "anat" / os.fsdecode(b"m\xfcller_T1w.nii.gz")).touch()
    assert bids.find_subjects(root)[1]["study_sub-02"].encode()


@contextlib.contextmanager
def forbidden(folder):
    """Nobody may look into a folder, not even root."""
    user = os.geteuid()
    folder.chmod(0)
    try:
        os.seteuid(user or 65534)
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


@pytest.mark.skipif(os.name == "nt", reason="other permissions")
@pytest.mark.parametrize("folder", ["sub-02/ses-a/anat", "sub-02/ses-a"])
def test_a_folder_that_may_not_be_read_costs_its_session_only(folder):
    with tempfile.TemporaryDirectory() as parent:  # tmp_path is closed to other users
        os.chmod(parent, 0o755)
        root = grow(Path(parent, "study"), *BOTH, "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz")
        with forbidden(root / folder):
            subjects, missing = bids.find_subjects(root)
    assert [s.id for s in subjects] == ["study_sub-01"]
    assert missing == {"study_sub-02_ses-a":
                       "sub-02/ses-a/anat: cannot be read (Permission denied); mend that"}


@pytest.mark.parametrize("folder", [b"sub-m\xfcller/anat", b"sub-02/ses-m\xfcller/anat"])
def test_a_folder_whose_name_is_no_text_is_refused_before_any_work(folder, tmp_path):
    root = grow(tmp_path / "study", *BOTH, f"{os.fsdecode(folder)}/sub-02_T1w.nii.gz")
    with pytest.raises(ValueError, match="fcller.*: the name is not UTF-8; rename it"):
        bids.find_subjects(root)


@pytest.mark.parametrize("label, said", [
    ("m\tb", "the name has a tab or another control character; rename it"),
    ("m\nb", "the name has a tab or another control character; rename it"),
    (190 * "m", r"too long a name, .* has 207 bytes .* at most 200")], ids=["tab", "line", "long"])
def test_a_name_that_the_store_cannot_hold_is_refused_before_any_work(label, said, tmp_path):
    root = grow(tmp_path / "study", *BOTH, f"sub-02/ses-{label}/anat/sub-02_T1w.nii.gz")
    with pytest.raises(ValueError, match=said):
        bids.find_subjects(root)


@pytest.mark.parametrize("better, worse", [
    ("sub-01_run-1_T1w.nii.gz", "sub-01_run-2_T1w.nii.gz"),
    ("sub-01_run-2_T1w.nii.gz", "sub-01_run-10_T1w.nii.gz"),
    ("sub-01_run-02_T1w.nii.gz", "sub-01_run-10_T1w.nii.gz"),
    ("sub-01_T1w.nii.gz", "sub-01_run-1_T1w.nii.gz"),
    ("sub-01_run-2_T1w.nii.gz", "sub-01_acq-a_run-1_T1w.nii.gz"),
    ("sub-01_T1w.nii.gz", "sub-01_acq-mprage_T1w.nii.gz"),
    ("sub-01_acq-a_T1w.nii.gz", "sub-01_acq-b_T1w.nii.gz"),
    ("sub-01_acq-x_rec-norm_T1w.nii.gz", "sub-01_ce-gadolinium_T1w.nii.gz"),
    ("sub-01_acq-x_rec-norm_T1w.nii.gz", "sub-01_desc-preproc_T1w.nii.gz"),
    ("sub-01_run-1_T1w.nii.gz", "sub-01_space-MNI152NLin6Asym_T1w.nii.gz"),
    ("sub-01_part-mag_T1w.nii.gz", "sub-01_part-phase_T1w.nii.gz"),
    ("sub-01_T1w.nii.gz", "sub-01_T1w.nii"),
])
def test_of_several_scans_the_first_in_the_documented_order_is_taken(better, worse, tmp_path):
    for order in ((better, worse), (worse, better)):
        root = grow(tmp_path / order[0], *(f"sub-01/anat/{n}" for n in order), BOTH[1])
        assert bids.find_subjects(root)[0][0].t1w.name == better


def test_phase_and_complex_parts_are_never_taken(tmp_path):
    root = grow(tmp_path / "study", BOTH[1], *(f"sub-01/anat/sub-01_part-{p}_T1w.nii.gz"
                                               for p in ("phase", "real", "imag")))
    assert bids.find_subjects(root)[1] == {"study_sub-01": "sub-01/anat: has a T2w but no T1w"}


@pytest.mark.parametrize("stray", [
    "._sub-01_T1w.nii.gz", ".sub-01_T1w.nii.gz", "sub-01_T1w.hdr", "sub-01_T1w.img",
    "sub-01_T1w.json", "sub-01_T1w.nii.gz.part", "sub-01_T1w.nii.bz2", "T1w.nii.gz",
    "sub-01_mytag_T1w.nii.gz", "copy-of_sub-01_T1w.nii.gz", "sub-01_T1w.mgz", "sub-01_T1W.nii.gz",
])
def test_hidden_and_foreign_files_are_no_scans(stray, tmp_path):
    root = grow(tmp_path / "study", f"sub-01/anat/{stray}", BOTH[1])
    (root / "sub-01" / "anat" / "sub-01_acq-folder_T1w.nii.gz").mkdir()
    assert bids.find_subjects(root) == ([], {"study_sub-01": "sub-01/anat: has a T2w but no T1w"})


def test_a_scan_that_bears_another_subjects_or_sessions_name_is_not_taken(tmp_path):
    """Else a copied folder would put one head into two splits."""
    root = grow(tmp_path / "study", *BOTH, "sub-02/anat/sub-01_T1w.nii.gz",
                "sub-02/anat/sub-01_T2w.nii.gz", "sub-03/ses-2/anat/sub-03_ses-1_T1w.nii.gz",
                "sub-03/ses-2/anat/sub-03_ses-2_T2w.nii.gz", "sub-04/ses-1/anat/sub-04_T1w.nii.gz",
                "sub-04/ses-1/anat/sub-04_T2w.nii.gz")
    subjects, missing = bids.find_subjects(root)
    assert [s.id for s in subjects] == ["study_sub-01", "study_sub-04_ses-1"]
    assert sorted(missing) == ["study_sub-02", "study_sub-03_ses-2"]
    assert missing["study_sub-02"].startswith("sub-02/anat/sub-01_T1w.nii.gz: bears another name")


def test_links_to_nothing_are_found_like_files(tmp_path):
    """An annexed file that was not fetched is a reason to skip, not a subject without T1w."""
    root = grow(tmp_path / "study", BOTH[1])
    (root / BOTH[0]).symlink_to("../../.git/annex/objects/none")
    assert [s.id for s in bids.find_subjects(root)[0]] == ["study_sub-01"]


def test_a_folder_that_is_no_tree_is_refused_with_an_example(tmp_path):
    grow(tmp_path / "study", *BOTH)
    for folder in (tmp_path, tmp_path / "study" / "sub-01", tmp_path / "study" / "sub-01" / "anat"):
        with pytest.raises(ValueError, match=r"no T1w or T2w found.*sub-01/anat/sub-01_T1w.nii.gz"):
            bids.find_subjects(folder)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        bids.find_subjects(tmp_path / "nowhere")


def test_the_dataset_is_called_like_its_folder_without_signs_that_ids_use(tmp_path, monkeypatch):
    assert bids.dataset_name(Path("/data/my study_2")) == "my-study-2"
    assert bids.dataset_name(Path("/data/ds002330/")) == "ds002330"
    assert bids.dataset_name(Path("/")) == "bids"
    monkeypatch.chdir(tmp_path)
    assert bids.dataset_name(Path(".")) == bids.dataset_name(tmp_path)


def mask_of(root, *masks, t1w="sub-01_T1w.nii.gz", session=""):
    grow(root, *masks)
    anat = root / "sub-01" / (f"ses-{session}/anat" if session else "anat")
    subject = bids.Subject("study", "01", session, root, anat / t1w, anat / "sub-01_T2w.nii.gz")
    return bids.brain_mask_path(subject).relative_to(root).as_posix()


@pytest.mark.parametrize("better, worse", [
    ("sub-01/anat/sub-01_desc-brain_mask.nii.gz",
     "derivatives/a/sub-01/anat/sub-01_desc-brain_mask.nii.gz"),
    ("derivatives/a/sub-01/anat/sub-01_desc-brain_mask.nii.gz",
     "derivatives/b/sub-01/anat/sub-01_desc-brain_mask.nii.gz"),
    ("derivatives/a/sub-01/anat/sub-01_desc-brain_mask.nii.gz",
     "derivatives/a/sub-01/anat/sub-01_space-MNI152_desc-brain_mask.nii.gz"),
    ("derivatives/a/sub-01/anat/sub-01_space-T1w_desc-brain_mask.nii",
     "derivatives/a/sub-01/anat/sub-01_desc-lesion_mask.nii.gz"),
    ("derivatives/sub-01/anat/sub-01_desc-brain_mask.nii.gz",
     "derivatives/a/sub-02/anat/sub-02_desc-brain_mask.nii.gz"),
    ("derivatives/a/sub-01/anat/sub-01_desc-brain_mask.nii.gz",
     "derivatives/a/sub-01/anat/sub-01_run-2_desc-brain_mask.nii.gz"),
])
def test_the_brain_mask_of_the_t1w_is_found(better, worse, tmp_path):
    assert mask_of(tmp_path, worse, better) == better


def test_of_several_masks_the_one_of_the_same_run_and_acquisition_is_taken(tmp_path):
    stem = "derivatives/a/sub-01/anat/sub-01"
    masks = (f"{stem}_acq-a_run-1_desc-brain_mask.nii.gz",
             f"{stem}_acq-b_run-1_desc-brain_mask.nii.gz",
             f"{stem}_acq-b_run-2_desc-brain_mask.nii.gz", f"{stem}_desc-brain_mask.nii.gz")
    for t1w, mask in (("acq-b_run-2", masks[2]), ("acq-b_run-1", masks[1]), ("acq-c", masks[3])):
        assert mask_of(tmp_path, *masks, t1w=f"sub-01_{t1w}_T1w.nii.gz") == mask


def test_a_mask_of_another_run_is_not_taken(tmp_path):
    with pytest.raises(FileNotFoundError, match="sub-01_run-1_T1w.nii.gz: no"):
        mask_of(tmp_path, "sub-01/anat/sub-01_run-2_desc-brain_mask.nii.gz",
                "sub-01/anat/sub-01_acq-x_desc-brain_mask.nii.gz", t1w="sub-01_run-1_T1w.nii.gz")


def test_a_session_takes_its_own_mask_only(tmp_path):
    own = "derivatives/a/sub-01/ses-2/anat/sub-01_ses-2_desc-brain_mask.nii.gz"
    others = ("derivatives/a/sub-01/ses-1/anat/sub-01_ses-1_desc-brain_mask.nii.gz",
              "derivatives/a/sub-01/ses-2/anat/sub-01_ses-1_desc-brain_mask.nii.gz")
    t1w = "sub-01_ses-2_T1w.nii.gz"
    with pytest.raises(FileNotFoundError, match=f"{t1w}: no .*_desc-brain_mask.nii.gz beside it"):
        mask_of(tmp_path, *others, t1w=t1w, session="2")
    assert mask_of(tmp_path, own, t1w=t1w, session="2") == own


def test_the_trees_own_description_is_read_and_never_trusted_to_be_there(tmp_path):
    empty = {"dataset": "d", "name": "", "snapshot": "", "doi": "", "license": "",
             "authors": []}
    assert bids.describe(tmp_path, "d") == empty
    for text in ("not json", "[1, 2]", '{"Name": null}', "[" * 200_000):
        (tmp_path / "dataset_description.json").write_text(text)
        assert bids.describe(tmp_path, "d")["doi"] == ""
    (tmp_path / "dataset_description.json").write_text(json.dumps(
        {"Name": "Heads", "DatasetDOI": "doi:10.1/x", "License": "CC0", "Authors": ["A", "B"]}))
    full = {**empty, "name": "Heads", "doi": "10.1/x", "license": "CC0", "authors": ["A", "B"]}
    assert bids.describe(tmp_path, "d") == full


def test_the_version_of_a_tree_is_that_of_its_download_or_of_its_doi(tmp_path):
    def describe(doi, dataset="ds000001"):
        (tmp_path / "dataset_description.json").write_text(json.dumps({"DatasetDOI": doi}))
        return bids.describe(tmp_path, dataset)["snapshot"]

    doi = "https://doi.org/10.18112/openneuro.ds000001.v1.0.2"
    assert describe(doi) == "1.0.2"
    assert describe(doi, "ds000002") == "", "another dataset's"
    (tmp_path / "manifest.json").write_text(json.dumps({"tag": "1.1.0"}))
    assert describe(doi) == "1.1.0", "a description may bear the DOI of the version before"


def test_a_single_file_finds_its_subject_and_the_mask_of_its_tree(tmp_path, monkeypatch):
    grow(tmp_path, "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz",
         "derivatives/a/sub-01/ses-2/anat/sub-01_ses-2_desc-brain_mask.nii.gz")
    monkeypatch.chdir(tmp_path / "sub-01")
    subject = bids.subject_of(Path("ses-2/anat/sub-01_ses-2_T1w.nii.gz"))
    assert (subject.subject, subject.session, subject.root) == ("01", "2", tmp_path)
    assert bids.brain_mask_path(subject).name == "sub-01_ses-2_desc-brain_mask.nii.gz"
    with pytest.raises(ValueError, match="scan.nii.gz: not named by the rules of BIDS"):
        bids.subject_of(Path("scan.nii.gz"))


def test_an_annexed_file_finds_its_subject_by_where_its_link_stands(tmp_path):
    grow(tmp_path, ".git/annex/objects/ab/content")
    link = tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../.git/annex/objects/ab/content")
    assert bids.subject_of(link).root == tmp_path


def test_a_link_gives_a_tree_the_name_that_its_folder_cannot_have(tmp_path):
    for study in ("a", "b"):
        (tmp_path / study / "rawdata").mkdir(parents=True)
        (tmp_path / f"study-{study}").symlink_to(tmp_path / study / "rawdata")
    assert [bids.dataset_name(tmp_path / f"study-{s}") for s in "ab"] == ["study-a", "study-b"]


# ------------------------------------------------------------------------- several, by what is in


def put(path, shape, spacing_mm):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(np.ones(shape, np.uint8), np.diag([*spacing_mm, 1.0])).to_filename(path)


WHOLE, THICK = ((90, 100, 90), (2, 2, 2)), ((90, 100, 30), (2, 2, 5))
SLAB = (90, 100, 24), (2, 2, 2)


@pytest.mark.parametrize("better, worse", [
    (("acq-whole", WHOLE), ("acq-part", SLAB)),  # as their names would not have it
    (("acq-space", WHOLE), ("", SLAB)),
    (("acq-space", WHOLE), ("acq-2d", THICK)),
    (("acq-zoomed", THICK), ("acq-fine", SLAB)),
    (("", THICK), ("acq-space", WHOLE)),  # the plain name first, if the whole head is there
    (("run-1", WHOLE), ("run-2", WHOLE)),
    (("run-2", WHOLE), ("run-1", SLAB)),
    (("run-1", SLAB), ("run-2", SLAB)),
])
def test_of_several_scans_whole_heads_and_thin_slices_are_taken_first(better, worse, tmp_path):
    root = grow(tmp_path / "study", BOTH[0])
    found = []
    for entity, (shape, spacing_mm) in (better, worse):
        found.append(f"sub-01_{entity}_T2w.nii.gz".replace("__", "_"))
        put(root / "sub-01" / "anat" / found[-1], shape, spacing_mm)
    assert bids.find_subjects(root)[0][0].t2w.name == found[0]


def test_a_scan_that_cannot_be_used_gives_way_to_one_that_can(tmp_path):
    root = grow(tmp_path / "study", BOTH[0])
    anat = root / "sub-01" / "anat"
    (anat / "sub-01_run-1_T2w.nii.gz").write_text("<html>504 Gateway Time-out</html>")
    put(anat / "sub-01_run-2_T2w.nii.gz", (4, 100, 100), (2, 2, 2))  # a localiser
    put(anat / "sub-01_run-3_T2w.nii.gz", *WHOLE)
    assert bids.find_subjects(root)[0][0].t2w.name == "sub-01_run-3_T2w.nii.gz"


@pytest.mark.parametrize("fetched", ["1", "2"])
def test_where_one_is_not_fetched_yet_names_alone_decide(fetched, tmp_path):
    root = grow(tmp_path / "study", BOTH[0])
    for run in ("1", "2"):
        path = root / "sub-01" / "anat" / f"sub-01_run-{run}_T2w.nii.gz"
        if run == fetched:
            put(path, *WHOLE)
        else:
            path.symlink_to("annex")
    assert bids.find_subjects(root)[0][0].t2w.name == "sub-01_run-1_T2w.nii.gz"


def test_what_is_called_after_a_part_of_the_head_is_taken_last_where_it_cannot_be_looked_at():
    def chosen(*labels):
        files = [Path(os.devnull, f"sub-01_acq-{label}_T2w.nii.gz") for label in labels]
        return bids.pair_scans(files, "sub-01/anat", "01", "")[1].name.split("_")[1]

    assert chosen("hippocampus", "whole") == "acq-whole"
    assert chosen("2dMTL", "cspine", "space") == "acq-space"
    assert chosen("spinecho", "tse") == "acq-spinecho" and chosen("hipp") == "acq-hipp"
