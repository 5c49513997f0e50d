"""Tests of data/derivatives.py: names, which scans of a tree, records."""

import json
from pathlib import Path

import pytest

from data import derivatives
from data.derivatives import derived_name, find_scans


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def test_all_scans_of_a_kind_are_found_in_the_order_of_their_names(tmp_path):
    touch(tmp_path, "sub-02/anat/sub-02_T1w.nii", "sub-01/anat/sub-01_run-2_T1w.nii.gz",
          "sub-01/anat/sub-01_run-1_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz",
          "sub-03/ses-a/anat/sub-03_ses-a_T1w.nii.gz", "sub-03/ses-b/anat/sub-03_ses-b_T1w.nii.gz",
          "derivatives/x/sub-01/anat/sub-01_T1w.nii.gz")
    found = [p.relative_to(tmp_path).as_posix() for p in find_scans(tmp_path, "T1w")]
    assert found == ["sub-01/anat/sub-01_run-1_T1w.nii.gz", "sub-01/anat/sub-01_run-2_T1w.nii.gz",
                     "sub-02/anat/sub-02_T1w.nii", "sub-03/ses-a/anat/sub-03_ses-a_T1w.nii.gz",
                     "sub-03/ses-b/anat/sub-03_ses-b_T1w.nii.gz"]
    assert [p.name for p in find_scans(tmp_path, "T2w")] == ["sub-01_T2w.nii.gz"]


def test_phases_strangers_hidden_files_and_second_copies_are_not_scans(tmp_path):
    touch(tmp_path, "sub-01/anat/sub-01_part-phase_T1w.nii.gz", "sub-01/anat/sub-02_T1w.nii.gz",
          "sub-01/anat/._sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T1w.json",
          "sub-01/anat/sub-01_part-mag_T1w.nii.gz", "sub-01/anat/sub-01_part-mag_T1w.nii")
    assert [p.name for p in find_scans(tmp_path, "T1w")] == ["sub-01_part-mag_T1w.nii.gz"]
    with pytest.raises(ValueError, match="no T2w found"):
        find_scans(tmp_path, "T2w")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_scans(tmp_path / "none", "T2w")


def test_of_a_scan_and_its_defaced_copy_the_scan_is_taken(tmp_path):
    touch(tmp_path, "sub-01/anat/sub-01_acq-hi_T1w.nii", "sub-01/anat/sub-01_T1w.nii.gz",
          "sub-01/anat/sub-01_acq-hi_desc-defaced_T1w.nii.gz",
          "sub-02/anat/sub-02_desc-defaced_T1w.nii.gz")
    assert [p.name for p in find_scans(tmp_path, "T1w")] == [
        "sub-01_T1w.nii.gz", "sub-01_acq-hi_T1w.nii", "sub-02_desc-defaced_T1w.nii.gz"]


@pytest.mark.parametrize("source, name", [
    ("sub-01_T1w.nii.gz", "sub-01_desc-synthetic_T2w.nii.gz"),
    ("sub-01_ses-2_acq-x_run-1_T1w.nii", "sub-01_ses-2_acq-x_run-1_desc-synthetic_T2w.nii.gz"),
    ("sub-01_desc-preproc_T1w.nii.gz", "sub-01_desc-synthetic_T2w.nii.gz"),
    ("T1w.nii", "desc-synthetic_T2w.nii.gz"), ("a.b.nii", "a.b_desc-synthetic_T2w.nii.gz"),
])
def test_names_keep_what_says_which_scan_it_was(source, name):
    assert derived_name(Path(source), "synthetic", "T2w") == name


def test_a_record_that_is_missing_or_broken_is_empty(tmp_path):
    path = tmp_path / "a.json"
    assert derivatives.read_record(path) == {}
    for text in ("[1]", "{", ""):
        path.write_text(text)
        assert derivatives.read_record(path) == {}
    derivatives.write_record(path, {"a": 1})
    assert derivatives.read_record(path) == {"a": 1}


def test_a_dataset_says_what_made_it_and_where_it_came_from_once(tmp_path):
    source, out = tmp_path / "heads", tmp_path / "made" / "here"
    source.mkdir()
    out.mkdir(parents=True)
    (source / "dataset_description.json").write_text(json.dumps(
        {"Name": "Heads", "DatasetDOI": "doi:10.18112/openneuro.heads.v1.0.2"}))
    derivatives.describe_dataset(out, name="N", generator={"Name": "P", "Version": "1"},
                                 source=source)
    found = json.loads((out / "dataset_description.json").read_text())
    assert found["GeneratedBy"] == [{"Name": "P", "Version": "1"}]
    assert found["SourceDatasets"] == [{"DOI": "10.18112/openneuro.heads.v1.0.2",
                                        "Version": "1.0.2", "URL": "../../heads"}]
    assert found["DatasetLinks"] == {"raw": "../../heads"}
    derivatives.describe_dataset(out, name="Other", generator={})
    assert json.loads((out / "dataset_description.json").read_text()) == found


def test_a_tree_is_added_to_our_own_description_of_before_and_another_tree_refused(tmp_path):
    out, path = tmp_path / "made", tmp_path / "made" / "dataset_description.json"
    generator = {"Name": "P", "Version": "1"}
    for name in ("made", "heads", "others"):
        (tmp_path / name).mkdir()
    derivatives.describe_dataset(out, name="N", generator=generator)
    assert "DatasetLinks" not in json.loads(path.read_text())
    derivatives.describe_dataset(out, name="N", generator=generator, source=tmp_path / "heads")
    found = path.read_text()
    assert json.loads(found)["DatasetLinks"] == {"raw": "../heads"}
    with pytest.raises(ValueError, match="is of the tree ../heads, and .*others is another one"):
        derivatives.describe_dataset(out, name="N", generator=generator, source=tmp_path / "others")
    derivatives.describe_dataset(out, name="N", generator=generator, source=tmp_path / "heads")
    assert path.read_text() == found
    path.write_text('{"Name": "theirs"}')
    derivatives.describe_dataset(out, name="N", generator=generator, source=tmp_path / "heads")
    assert json.loads(path.read_text()) == {"Name": "theirs"}


def test_what_a_killed_run_left_of_a_file_is_removed_and_nothing_else(tmp_path):
    touch(tmp_path, ".a.nii.gz.12.tmp", "a.nii.gz.12.tmp", "a.nii.gz", "b.nii.gz.12.tmp")
    derivatives.remove_parts(tmp_path / "a.nii.gz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz.12.tmp"]
