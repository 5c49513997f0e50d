"""data/openneuro.py against a local OpenNeuro that misbehaves: real HTTP, a real GraphQL engine."""

import contextlib
import gzip
import hashlib
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("graphql", reason="the local server needs graphql-core")

from data import bids, download, openneuro, whole_file  # noqa: E402
from data.download import Download  # noqa: E402
from data.openneuro import (Archive, Snapshot, check_name, make_plan, parse_spec,  # noqa: E402
                            place)
from data.transfer import ArchiveError, File, Patience, Refused, Unreachable  # noqa: E402
from data.volume import read_volume  # noqa: E402
from data.whole_file import Checker, Damaged, Helper, inspect  # noqa: E402
import openneuro_server  # noqa: E402
from openneuro_server import Fault, Hold, OpenNeuro  # noqa: E402

ROOT = Path(__file__).parent.parent
DATASET = "ds000001"
T1W, T2W = "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz"
QUICK = Patience(attempts=4, first_wait_s=0.01, longest_wait_s=2, connect_s=2, silence_s=1,
                 listing_s=5)


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch, tmp_path_factory):
    """No proxy before loopback, no mirror of the user's, and no 150 certificates to load."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path_factory.getbasetemp()))
    monkeypatch.delenv(openneuro.API_VARIABLE, raising=False)
    monkeypatch.delenv(openneuro.S3_VARIABLE, raising=False)


def write_scan(path, seed, side=48):
    """A NIfTI of noise, which gzip cannot shrink: 48 voxels a side are 170 kB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).integers(0, 4096, (side,) * 3, dtype=np.int16)
    nib.Nifti1Image(voxels, np.eye(4)).to_filename(path)


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """Two subjects with both scans, one with T1w alone, and much that nobody needs."""
    root = tmp_path_factory.mktemp("archive") / DATASET
    for i, label in enumerate(("01", "02", "03")):
        anat = root / f"sub-{label}" / "anat"
        for j, suffix in enumerate(("T1w", "T2w")):
            if (label, suffix) != ("03", "T2w"):
                write_scan(anat / f"sub-{label}_{suffix}.nii.gz", 2 * i + j)
                (anat / f"sub-{label}_{suffix}.json").write_text('{"EchoTime": 0.1}')
        (root / f"sub-{label}" / "func").mkdir()
        (root / f"sub-{label}" / "func" / f"sub-{label}_task-rest_bold.nii.gz").write_bytes(b"no")
    write_scan(root / "derivatives" / "x" / "sub-01" / "anat" / "sub-01_T1w.nii.gz", 9)
    about = {"Name": "Heads", "License": "CC0", "DatasetDOI": "doi:10.18112/openneuro.x.v1.0.0"}
    (root / "dataset_description.json").write_text(json.dumps(about))
    (root / "participants.tsv").write_text("participant_id\tage\nsub-01\t30\n")
    (root / "README").write_text("Heads of noise.")
    (root / "CHANGES").write_text("1.0.0 2020-01-01\n  - First.")
    (root / "T1w.json").write_text('{"MagneticFieldStrength": 3}')
    (root / "task-rest_bold.json").write_text("{}")
    return root


@pytest.fixture
def server(tree):
    with OpenNeuro({DATASET: {"1.0.0": tree}}) as running:
        yield running


@pytest.fixture(scope="session")
def scans(tree, tmp_path_factory):
    """`tree` without all that is not a scan of the first two subjects."""
    root = tmp_path_factory.mktemp("scans") / DATASET
    for name in wanted(tree):
        if name.endswith(".nii.gz"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes((tree / name).read_bytes())
    return root


@pytest.fixture
def scan_server(scans):
    with OpenNeuro({DATASET: {"1.0.0": scans}}) as running:
        yield running


def fetch(server, folder, *, limit=None, patience=QUICK, spec=f"{DATASET}:1.0.0", **options):
    """Download with everything kept; returns {subject: reason}."""
    with Archive(server.api_url, server.s3_url, patience) as archive:
        plan = make_plan(archive.snapshot(spec), limit)
        options = {"keep": True, "progress": False, **options}
        with Download(archive, plan, folder, **options) as download:
            found = {}
            for subject, reason in download:
                found[subject.subject] = reason
                download.finish(subject)
    return found


def data_files(folder):
    """Names and bytes of what looks whole: no `.part`, no manifest."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and ".part" not in p.name and not p.name.startswith("manifest.json")}


def assert_whole_or_absent(folder, tree):
    """Every file below a dataset's folder is the archive's, byte for byte."""
    for name, content in data_files(folder).items():
        assert content == (tree / name).read_bytes(), name


def wanted(tree, people=("01", "02")):
    """Names that a plan of `tree` has."""
    common = ["CHANGES", "README", "T1w.json", "dataset_description.json", "participants.tsv"]
    return sorted(common + [f"sub-{p}/anat/sub-{p}_{s}.{e}" for p in people
                            for s in ("T1w", "T2w") for e in ("json", "nii.gz")])


def listed(server, spec=f"{DATASET}:1.0.0", patience=QUICK):
    with Archive(server.api_url, server.s3_url, patience) as archive:
        return archive.snapshot(spec)


# --------------------------------------------------------------------------------------- listing


def test_a_snapshot_is_listed_by_one_request(server, tree):
    snapshot = listed(server)
    assert len(server.requests(place="graphql")) == 1
    files = {file.name: file for file in snapshot.files}
    assert set(wanted(tree)) < set(files)
    assert files[T1W].size == (tree / T1W).stat().st_size
    assert not any("func" in name or "derivatives" in name for name in files)


@pytest.mark.parametrize("options", [{"recursive": False}, {"folders_too": True}, {"annex": True}])
def test_servers_that_list_in_another_way_give_the_same_files(server, tree, options):
    expected = [(f.name, f.size, f.urls) for f in listed(server).files]
    with OpenNeuro({DATASET: {"1.0.0": tree}}, **options) as other:
        found = [(f.name, f.size, tuple(u.replace(other.url, server.url) for u in f.urls))
                 for f in listed(other).files]
    assert found == expected


def test_folders_are_walked_where_a_recursive_listing_has_the_first_level_only(tree):
    def first_level(entry):
        return entry if "/" not in entry["filename"] else []

    with OpenNeuro({DATASET: {"1.0.0": tree}}, folders_too=True) as server:
        expected = [f.name for f in listed(server).files]
        asked = len(server.log)
        server.edit = first_level
        assert [f.name for f in listed(server).files] == expected
        # the root, three subjects in one query, their three anat folders in another
        assert len(server.log) - asked == 3


@pytest.mark.parametrize("folder", ["sub-01", "sub-01/anat"])
def test_a_folder_that_is_listed_without_an_id_is_said_and_costs_its_subject_only(tree, folder):
    closed = openneuro_server._tree_id(tree, tree / folder)

    def spoil(entry):
        return {**entry, "id": "" if entry["id"] == closed else entry["id"]}

    with OpenNeuro({DATASET: {"1.0.0": tree}}, recursive=False, edit=spoil) as server:
        plan = make_plan(listed(server))
    assert [s.subject for s in plan.subjects] == ["02"]
    assert plan.missing.keys() == {f"{DATASET}_sub-01", f"{DATASET}_sub-03"}
    assert plan.missing[f"{DATASET}_sub-01"].startswith(f"{folder}: the archive lists this folder")


def test_many_folders_are_asked_for_in_batches(tree, monkeypatch):
    monkeypatch.setattr(openneuro, "_TREES_A_QUERY", 2)
    with OpenNeuro({DATASET: {"1.0.0": tree}}, recursive=False) as server:
        files = listed(server).files
        assert [f.name for f in files if f.name in wanted(tree)] == wanted(tree)
        assert len(server.log) == 5  # refused, the root, and six folders two by two


def test_a_tag_that_does_not_exist_gets_the_list_of_those_that_do(tree):
    with OpenNeuro({DATASET: {"1.0.0": tree, "1.0.1": tree}}) as server:
        with pytest.raises(ValueError, match="no snapshot '9.9'; there are 1.0.0, 1.0.1"):
            listed(server, f"{DATASET}:9.9")


def test_a_dataset_that_does_not_exist_is_the_users_mistake(server):
    with pytest.raises(ValueError, match="ds999999: no such dataset"):
        listed(server, "ds999999")


def test_without_a_tag_the_latest_is_taken_and_said(tree, caplog):
    with OpenNeuro({DATASET: {"1.0.0": tree, "1.0.1": tree}}) as server:
        with caplog.at_level(logging.INFO):
            assert listed(server, DATASET).tag == "1.0.1"
    assert f"{DATASET}: no tag given, taking the latest, 1.0.1" in caplog.text


def test_pinned_datasets_take_their_pinned_tag(tree):
    with OpenNeuro({"ds002330": {"1.1.0": tree, "2.0.0": tree}}) as server:
        assert listed(server, "ds002330").tag == "1.1.0"
        assert listed(server, "ds002330:2.0.0").tag == "2.0.0"


@pytest.mark.parametrize("spec", ["", "ds1", "ds0000011", "ds000001:", "ds000001:../x", "abc",
                                  "ds000001:1.0.0/x", "DS000001", "ds000001:1.0.0\n"])
def test_a_spec_that_is_none_is_refused(spec):
    with pytest.raises(ValueError, match="not an OpenNeuro accession number"):
        parse_spec(spec)


@pytest.mark.parametrize("fault", [
    Fault(status=503), Fault(status=429, headers={"Retry-After": "0"}), Fault(cut=10),
    Fault(body=b"<html>504 Gateway Time-out</html>"), Fault(body=b"[]"),
    # as the server answers when one of its workers does not (OpenNeuro #3726, #3695)
    Fault(body=b'{"errors": [{"message": "fetch failed"}], "data": {"snapshot": {"a0": null}}}'),
    Fault(body=b'{"errors": [{"message": "The operation was aborted due to timeout"}]}')])
def test_a_listing_that_fails_in_passing_is_asked_for_again(server, fault):
    server.fault("graphql", "", fault, fault)
    assert listed(server).tag == "1.0.0"
    assert len(server.log) == 3


def test_a_listing_that_drips_is_as_good_as_none(server, caplog):
    server.fault("graphql", "", Fault(drip=0.01), always=True)
    hasty = replace(QUICK, attempts=2, listing_s=0.5)
    with caplog.at_level("INFO"), pytest.raises(ArchiveError, match="no answer in time.*check the"):
        listed(server, patience=hasty)
    assert len(server.log) == 2
    assert caplog.text.count("no answer in time") == 2  # each try is said: they may take minutes


@pytest.mark.parametrize("fault, requests, said", [
    (Fault(status=503), 4, "HTTP 503"),  # two tries at once and two by folders, none for the tags
    (Fault(status=429, headers={"Retry-After": "9" * 30}), 1, "in more than a day"),
    (Fault(status=429, headers={"Retry-After": "5000"}), 1, "in 5000 s")])
def test_a_busy_api_is_not_asked_more_than_it_can_bear(server, fault, requests, said):
    server.fault("graphql", "", fault, always=True)
    with pytest.raises(ArchiveError, match=said):
        listed(server, patience=replace(QUICK, attempts=2))
    assert len(server.log) == requests


def test_an_api_that_has_moved_is_said_with_its_new_address(server):
    moved = Fault(status=308, headers={"Location": "http://127.0.0.1:9/crn/graphql"})
    server.fault("graphql", "", moved, always=True)
    with pytest.raises(ArchiveError, match="127.0.0.1:9/crn/graphql; give that to --api-url"):
        listed(server)


@pytest.mark.parametrize("name, value", [("NO_PROXY", "localhost,[::1]"), ("SSL_CERT_FILE", "/no"),
                                         ("HTTPS_PROXY", "http://:x:y")])
def test_an_environment_that_lets_no_connection_be_made_is_one_error(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"environment lets no connection.*{name}"):
        Archive("https://127.0.0.1/crn/graphql")


@pytest.mark.parametrize("name", ["sub-NDAR-7", "sub-a_b", "sub-\u00fc"])
def test_a_subject_whose_name_is_not_one_of_bids_is_said_as_in_a_folder(server, tmp_path, name):
    names = [f"{name}/anat/{name}_{suffix}.nii.gz" for suffix in ("T1w", "T2w")]
    with pytest.raises(ValueError) as refused:
        make_plan(snapshot_of(names))
    for path in names:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    reasons = [r for r in bids.find_subjects(tmp_path, DATASET)[1].values()]
    assert len(reasons) == 1 and reasons[0] in str(refused.value)


def test_folders_whose_entries_bear_whole_paths_are_listed_alike():
    entries = [{"filename": T1W, "id": "x", "size": 3}, {"filename": "sub-01_T2w.nii.gz"}]
    files, _ = openneuro._sort_entries(entries, "sub-01/anat/")
    assert set(files) == {T1W, "sub-01/anat/sub-01_T2w.nii.gz"}


def test_errors_that_stay_are_not_asked_for_again(server):
    answer = {"errors": [{"message": "You do not have access to read this dataset."}]}
    server.fault("graphql", "", Fault(body=json.dumps(answer).encode()), always=True)
    with pytest.raises(ValueError, match="You do not have access"):
        listed(server)
    assert len(server.log) == 3  # at once, by folders, and for the tags


def test_errors_beside_a_complete_listing_do_not_matter(server):
    answer = {"errors": [{"message": "Not Found", "path": ["snapshot", "a0", 0, "urls"]}],
              "data": {"snapshot": {"a0": [{"id": "x", "filename": T1W, "urls": None}]}}}
    server.fault("graphql", "", Fault(body=json.dumps(answer).encode()))
    assert listed(server).files == (File(T1W, "x"),)


def test_fields_that_are_null_wrong_or_missing_do_no_harm(tree):
    def spoil(entry):
        entry.update({T1W: {"size": None, "urls": None, "directory": None, "annexed": None},
                      T2W: {"size": "12", "urls": []},
                      "README": {"size": "a lot", "urls": [None, "", "ftp:/x", "nonsense"]},
                      "CHANGES": {"size": -5}}.get(entry["filename"], {}))
        return entry

    with OpenNeuro({DATASET: {"1.0.0": tree}}, edit=spoil) as server:
        files = {f.name: f for f in listed(server).files}
    assert (files[T1W].size, files[T1W].urls) == (None, ())
    assert (files[T2W].size, files[T2W].urls) == (12, ())
    assert (files["README"].size, files["README"].urls) == (None, ())
    assert files["CHANGES"].size is None


def test_an_api_that_is_not_there_is_said_with_its_address(tmp_path):
    with Archive("http://127.0.0.1:9/crn/graphql", patience=QUICK) as archive:
        with pytest.raises(ArchiveError, match="127.0.0.1:9.*check the network and --api-url"):
            archive.snapshot(f"{DATASET}:1.0.0")


def test_a_web_page_at_the_api_address_is_said_to_be_one(server):
    server.fault("graphql", "", Fault(status=404, body=b"<html>nothing here</html>"), always=True)
    with pytest.raises(ArchiveError, match="without JSON, so not a GraphQL endpoint"):
        listed(server)


def test_api_addresses_may_leave_out_the_path_and_come_from_the_environment(monkeypatch):
    assert Archive("http://localhost:8000").api_url == "http://localhost:8000/crn/graphql"
    assert Archive("https://a.b/crn/").api_url == "https://a.b/crn/graphql"
    monkeypatch.setenv(openneuro.API_VARIABLE, "http://localhost:1/x/graphql")
    assert Archive().api_url == "http://localhost:1/x/graphql"
    assert Archive("http://localhost:2").api_url == "http://localhost:2/crn/graphql"
    for wrong in ("ftp://a.b", "openneuro.org", "https://", "https://a.b/graphql?x=1"):
        with pytest.raises(ValueError, match="--api-url"):
            Archive(wrong)


def test_public_storage_is_openneuros_own_only_where_the_api_is():
    assert Archive().s3_url == "https://s3.amazonaws.com/openneuro.org"
    assert Archive("http://localhost:8000").s3_url == ""


def test_the_addresses_of_a_file_are_those_of_the_archive():
    file = File("sub-01/anat/sub-01_acq-a+b_T1w.nii.gz", urls=("https://x/y",))
    assert Archive().addresses(Snapshot("ds000117", "1.0.3", ()), file) == [
        ("https://x/y", True),
        ("https://s3.amazonaws.com/openneuro.org/ds000117/sub-01/anat/"
         "sub-01_acq-a%2Bb_T1w.nii.gz", False),
        ("https://openneuro.org/crn/datasets/ds000117/snapshots/1.0.3/files/"
         "sub-01:anat:sub-01_acq-a%2Bb_T1w.nii.gz", True)]


# ---------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", [
    "../x", "/etc/passwd", "a/../../x", "a//b", "a/./b", "..", "", ".", "a\\..\\b", "C:/x", "a/",
    "a\0b", "a\nb", "sub-01:anat:x", "a/" + "b" * 300])
def test_a_name_that_could_lead_out_of_the_folder_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="not a safe file name"):
        check_name(name)
    with pytest.raises(ValueError, match="not a safe file name"):
        place(tmp_path, name)


@pytest.mark.parametrize("name", ["../../sub-01/anat/sub-01_T1w.nii.gz", "/tmp/README",
                                  "sub-01/anat/../../../README", "sub-01\\anat\\README"])
@pytest.mark.parametrize("recursive", [True, False])
def test_a_listing_with_a_traversal_name_writes_nothing_outside(tree, tmp_path, name, recursive,
                                                                caplog):
    def rename(entry):
        return [entry, {**entry, "filename": name}] if entry["filename"] == "README" else entry

    with OpenNeuro({DATASET: {"1.0.0": tree}}, edit=rename, recursive=recursive) as server:
        fetch(server, tmp_path / "a" / "b", limit=1)
    assert "not a safe file name" in caplog.text
    assert sorted(data_files(tmp_path / "a" / "b" / DATASET)) == wanted(tree, ["01"])
    assert [p.name for p in tmp_path.rglob("README")] == ["README"]


def test_links_in_the_folder_are_not_followed(server, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for link in ("sub-01", "sub-01/anat", T1W):
        root = tmp_path / f"downloads-{link.count('/')}" / DATASET
        (root / link).parent.mkdir(parents=True, exist_ok=True)
        (root / link).symlink_to(elsewhere)
        with pytest.raises(ValueError, match="a symbolic link, which is not followed"):
            fetch(server, root.parent)
    assert not list(elsewhere.iterdir())


# ----------------------------------------------------------------------------------------- plan


def snapshot_of(names):
    return Snapshot(DATASET, "1.0.0", tuple(File(name, size=10) for name in names))


def test_a_plan_chooses_what_bids_finds_on_the_same_names_on_disk(tmp_path):
    rng = random.Random(0)
    extras = ["", "_run-1", "_run-2", "_acq-a", "_ce-gad", "_part-phase", "_part-mag", "_rec-x",
              "_desc-brain", "_space-MNI", "_run-10"]
    for trial in range(60):
        root = tmp_path / f"{trial}" / DATASET
        names = set()
        for _ in range(rng.randrange(1, 25)):
            subject, session = rng.choice("12"), rng.choice(["", "", "ses-a", "ses-b"])
            bears = rng.choice([session] * 5 + ["", "ses-c"])
            other = rng.choice([subject] * 9 + ["3"])
            folder = "/".join(p for p in (f"sub-{subject}", session, "anat") if p)
            stem = "_".join(p for p in (f"sub-{other}", bears) if p)
            kind = rng.choice(["T1w", "T2w", "T1w", "T2w", "FLAIR"])
            ending = rng.choice(["nii", "nii.gz"])
            names.add(f"{folder}/{stem}{rng.choice(extras)}_{kind}.{ending}")
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        try:
            expected, missing = bids.find_subjects(root)
        except ValueError:
            expected, missing = [], {}
        if not expected:
            with pytest.raises(ValueError, match="no subject has a T1w and a T2w"):
                make_plan(snapshot_of(names))
            continue
        plan = make_plan(snapshot_of(names))
        assert [s for files in plan.subjects for s in files.sessions(root)] == expected
        assert set(plan.missing) <= set(missing)


def test_a_plan_has_the_files_needed_and_no_others(server, tree):
    plan = make_plan(listed(server))
    assert sorted(f.name for f in plan.files) == wanted(tree)
    assert plan.total_bytes == sum((tree / name).stat().st_size for name in wanted(tree))
    assert plan.peak_bytes(1) == max(subject.size for subject in plan.subjects)
    assert plan.peak_bytes(9) == sum(subject.size for subject in plan.subjects)
    assert plan.missing == {f"{DATASET}_sub-03": "sub-03/anat: has a T1w but no T2w"}
    assert str(plan) == f"{DATASET} 1.0.0: 2 subjects, 13 files, {plan.total_bytes / 1000:.0f}kB"


def test_limit_counts_subjects_with_all_their_sessions():
    names = [f"sub-{s}/ses-{v}/anat/sub-{s}_ses-{v}_{k}.nii.gz"
             for s in "ABC" for v in "12" for k in ("T1w", "T2w")]
    plan = make_plan(snapshot_of(names), limit=2)
    assert [(s.subject, [scan[0] for scan in s.scans]) for s in plan.subjects] == [
        ("A", ["1", "2"]), ("B", ["1", "2"])]
    assert len(plan.files) == 8


def test_sidecars_come_with_those_that_they_inherit_from():
    scan = "sub-1/ses-2/anat/sub-1_ses-2_acq-x_T1w"
    inherited = ["T1w.json", "acq-x_T1w.json", "sub-1/sub-1_T1w.json",
                 "sub-1/ses-2/sub-1_ses-2_T1w.json", f"{scan}.json"]
    others = ["acq-y_T1w.json", "T2star.json", "sub-1/ses-2/anat/sub-1_ses-2_acq-x_T1w.txt",
              "sub-1/ses-2/anat/sub-1_ses-2_acq-y_T1w.json", "bold.json", "participants.json"]
    plan = make_plan(snapshot_of([f"{scan}.nii.gz", scan.replace("acq-x_T1w", "T2w.nii.gz"),
                                  *inherited, *others]))
    assert sorted(f.name for f in plan.files if f.name.endswith(".json")) == sorted(inherited)
    assert [f.name for f in plan.common] == ["T1w.json", "acq-x_T1w.json"]


def test_unknown_sizes_are_said():
    plan = make_plan(Snapshot(DATASET, "1.0.0", (File(T1W), File(T2W, size=2000))))
    assert str(plan) == f"{DATASET} 1.0.0: 1 subject, 2 files, 2.00kB and 1 of unknown size"


# -------------------------------------------------------------------------------- whole or absent


def test_a_download_has_the_bytes_of_the_archive_and_a_manifest(server, tree, tmp_path):
    assert fetch(server, tmp_path) == {"01": "", "02": ""}
    root = tmp_path / DATASET
    assert sorted(data_files(root)) == wanted(tree)
    assert_whole_or_absent(root, tree)
    assert not list(root.rglob("*.part*"))
    manifest = json.loads((root / "manifest.json").read_text())
    assert sorted(manifest["files"]) == wanted(tree)
    entry, content = manifest["files"][T1W], (tree / T1W).read_bytes()
    assert entry["md5"] == hashlib.md5(content).hexdigest()
    assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert (entry["size"], entry["tag"]) == (len(content), "1.0.0")
    assert entry["url"] == f"{server.s3_url}/{DATASET}/{T1W}?versionId=v1.0.0"
    assert datetime.fromisoformat(entry["time"]).tzinfo
    assert bids.find_subjects(root)[0] == [
        s for subject in make_plan(listed(server)).subjects for s in subject.sessions(root)]


def test_signatures_of_addresses_are_not_written_down(tree, tmp_path, caplog):
    def sign(entry):
        return {**entry, "urls": [f"{url}&Signature=secret" for url in entry["urls"]]}

    with OpenNeuro({DATASET: {"1.0.0": tree}}, edit=sign) as server:
        server.fault("s3", "README", Fault(status=404), always=True)
        fetch(server, tmp_path, limit=1)
    text = (tmp_path / DATASET / "manifest.json").read_text()
    assert f"{T1W}?versionId=v1.0.0" in text and "secret" not in text + caplog.text


def test_passwords_in_addresses_are_not_written_down(server, tmp_path, caplog):
    api, s3 = (url.replace("://", "://me:secret@") for url in (server.api_url, server.s3_url))
    server.fault("s3", T2W, Fault(status=404), always=True)
    server.fault("bare", T2W, Fault(status=404), always=True)
    server.fault("route", T2W, Fault(status=404), always=True)
    with Archive(api, s3, QUICK) as archive:
        plan = make_plan(archive.snapshot(f"{DATASET}:1.0.0"))
        with Download(archive, plan, tmp_path, keep=True, progress=False) as download:
            reasons = [reason for _, reason in download]
        server.fault("graphql", "", Fault(status=404), always=True)
        with pytest.raises(ArchiveError) as refused:
            archive.snapshot(f"{DATASET}:1.0.0")
    assert sum(map(bool, reasons)) == 1
    assert "secret" not in caplog.text + str(refused.value) + "".join(reasons)
    assert "secret" not in (tmp_path / DATASET / "manifest.json").read_text()


def test_connections_are_kept_alive(server, tmp_path):
    fetch(server, tmp_path, connections=2)
    files = [r for r in server.log if r.place != "graphql"]
    assert len(files) == 13
    assert len({r.client for r in server.log}) <= 3


def test_running_again_downloads_nothing_that_is_whole(server, tree, tmp_path):
    fetch(server, tmp_path)
    asked = len(server.log)
    assert fetch(server, tmp_path) == {"01": "", "02": ""}
    assert [r.place for r in server.log[asked:]] == ["graphql"]


PASSING = {
    "503 first": [Fault(status=503)] * 2,
    "500 and 502": [Fault(status=500), Fault(status=502)],
    "429 with Retry-After": [Fault(status=429, headers={"Retry-After": "0"})],
    "408": [Fault(status=408)],
    "cut at the first byte": [Fault(cut=0)],
    "cut in the middle": [Fault(cut=100_000)],
    "cut three times": [Fault(cut=50_000), Fault(cut=1), Fault(cut=70_000)],
    "cut more often than tries": [Fault(cut=65_536)] * 2 + [Fault(cut=0)] * 2,
    "cut one byte before the end": [Fault(cut=-1)],
    "Content-Length too large": [Fault(headers={"Content-Length": "999999"})],
    "Content-Length too small": [Fault(headers={"Content-Length": "1000"})],
    "Content-Length nonsense": [Fault(headers={"Content-Length": "many"})],
    "no Content-Length": [Fault(cut=80_000, headers={"Content-Length": None})],
    "HTML body": [Fault(body=b"<!DOCTYPE html><html>Sorry</html>")],
    "HTML body that says so": [Fault(headers={"Content-Type": "text/html"})],
    "error body": [Fault(body=b'{"error": "an unknown error occurred accessing this file"}')],
    "XML error body": [Fault(body=b"<?xml version='1.0'?><Error/>")],
    "empty body": [Fault(body=b"")],
    "body of another file": [Fault(body=b"x" * 50_000)],
    "half a body, well-formed HTTP": [Fault(body=b"HALF")],
    "wrong ETag": [Fault(headers={"ETag": f'"{"0" * 32}"'})],
    "server ignoring Range": [Fault(cut=80_000), Fault(ignore_range=True)],
    "ETag changed between parts": [Fault(cut=80_000, headers={"ETag": '"old"'})],
    "no ETag": [Fault(cut=80_000, headers={"ETag": None}), Fault(headers={"ETag": None})],
    "weak ETag": [Fault(cut=80_000, headers={"ETag": 'W/"abc"'})],
    "silence": [Fault(drip=2, drip_bytes=90_000)],
    "slow drip": [Fault(drip=0.1, drip_bytes=7)],
    "another part than asked for": [Fault(cut=80_000),
                                    Fault(headers={"Content-Range": "bytes 3-9/*"})],
}


@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING.keys())
def test_a_fault_that_passes_ends_in_the_bytes_of_the_archive(scan_server, tree, tmp_path, faults):
    server = scan_server
    half = (tree / T1W).read_bytes()[:90_000]
    for fault in faults:
        if fault.body == b"HALF":
            fault = Fault(body=half)
        if fault.cut == -1:
            fault = Fault(cut=(tree / T1W).stat().st_size - 1)
        server.fault("s3", T1W, fault)
    assert fetch(server, tmp_path, limit=1) == {"01": ""}
    assert sorted(data_files(tmp_path / DATASET)) == [T1W, T2W]
    assert_whole_or_absent(tmp_path / DATASET, tree)
    assert not list(tmp_path.rglob("*.part*"))
    assert not server.requests(T1W, "bare")


STAYING = {
    "503": Fault(status=503), "403": Fault(status=403), "404": Fault(status=404),
    "401": Fault(status=401), "400": Fault(status=400), "501": Fault(status=501),
    "cut": Fault(cut=1000), "cut at once": Fault(cut=0), "HTML": Fault(body=b"<html></html>"),
    "error": Fault(body=b'{"error": "x"}'), "empty": Fault(body=b""),
    "wrong ETag": Fault(headers={"ETag": f'"{"0" * 32}"'}),
    "Content-Length too small": Fault(headers={"Content-Length": "1000"}),
    "to a file": Fault(redirect="file:///etc/passwd"),
    "redirected for ever": Fault(redirect="/s3/x/y"),
    "to nowhere": Fault(redirect="http://127.0.0.1:9/"),
    "compressed on the way": Fault(headers={"ETag": '"x-2"'}, body=gzip.compress(b"x" * 99)),
}


@pytest.mark.parametrize("fault", STAYING.values(), ids=STAYING.keys())
def test_a_fault_that_stays_at_storage_is_passed_by_on_the_api_route(scan_server, tree, tmp_path,
                                                                     fault):
    server = scan_server
    if fault.redirect and fault.redirect.startswith("/"):
        fault = Fault(redirect=f"{server.url}/s3/{DATASET}/{T1W}?versionId=v1.0.0")
    for where in ("s3", "bare"):
        server.fault(where, T1W, fault, always=True)
    quick = Patience(attempts=2, first_wait_s=0.01, connect_s=1, silence_s=1)
    assert fetch(server, tmp_path, limit=1, patience=quick) == {"01": ""}
    assert_whole_or_absent(tmp_path / DATASET, tree)
    manifest = json.loads((tmp_path / DATASET / "manifest.json").read_text())
    assert "/files/sub-01:anat:sub-01_T1w.nii.gz" in manifest["files"][T1W]["url"]


@pytest.mark.parametrize("fault", STAYING.values(), ids=STAYING.keys())
def test_a_scan_that_no_address_gives_is_absent_and_its_subject_is_left_out(
        scan_server, tree, tmp_path, fault):
    server = scan_server
    if fault.redirect and fault.redirect.startswith("/"):
        fault = Fault(redirect=f"{server.url}/s3/{DATASET}/{T1W}?versionId=v1.0.0")
    for where in ("s3", "bare", "route"):
        server.fault(where, T1W, fault, always=True)
    quick = Patience(attempts=2, first_wait_s=0.01, connect_s=1, silence_s=1)
    if fault.redirect == "http://127.0.0.1:9/":  # no network, so far as anybody can tell
        with pytest.raises(ArchiveError, match="check the network"):
            fetch(server, tmp_path, patience=quick)
        assert T1W not in data_files(tmp_path / DATASET)
        return
    found = fetch(server, tmp_path, patience=quick)
    assert found["02"] == "" and found["01"].startswith(f"{T1W}: http://127.0.0.1")
    assert found["01"].count("http") >= 3
    assert_whole_or_absent(tmp_path / DATASET, tree)
    assert T1W not in data_files(tmp_path / DATASET)
    assert not list((tmp_path / DATASET).rglob("*.part*"))


def test_a_sidecar_that_cannot_be_had_does_not_cost_its_subject(server, tree, tmp_path, caplog):
    name = "sub-01/anat/sub-01_T1w.json"
    for where in ("s3", "bare", "route"):
        server.fault(where, name, Fault(body=b'{"EchoTime": '), always=True)
        server.fault(where, "README", Fault(status=404), always=True)
    assert fetch(server, tmp_path, limit=1) == {"01": ""}
    assert sorted(data_files(tmp_path / DATASET)) == [
        n for n in wanted(tree, ["01"]) if n not in (name, "README")]
    assert "not JSON" in caplog.text and "README" in caplog.text


@pytest.mark.parametrize("fault", [
    Fault(body=b""), Fault(body=gzip.compress(b"Heads"), headers={"Content-Encoding": "gzip"})])
def test_a_text_that_comes_empty_or_compressed_is_not_kept(server, tree, tmp_path, fault):
    server.fault("s3", "README", fault, always=True)
    fetch(server, tmp_path, limit=1)
    assert server.requests("README", "bare")
    assert_whole_or_absent(tmp_path / DATASET, tree)


def test_without_addresses_a_file_comes_from_public_storage(tree, tmp_path):
    def forget(entry):
        return {**entry, "urls": []}

    with OpenNeuro({DATASET: {"1.0.0": tree}}, edit=forget) as server:
        fetch(server, tmp_path)
        assert {r.place for r in server.log} == {"graphql", "bare"}
    assert_whole_or_absent(tmp_path / DATASET, tree)


def test_wrong_sizes_of_the_api_do_not_matter(tree, tmp_path):
    def lie(entry):
        return {**entry, "size": str(random.Random(entry["filename"]).randrange(10 ** 12))}

    with OpenNeuro({DATASET: {"1.0.0": tree}}, edit=lie) as server:
        assert fetch(server, tmp_path) == {"01": "", "02": ""}
    assert_whole_or_absent(tmp_path / DATASET, tree)


@pytest.fixture
def other_tree(tree, tmp_path_factory):
    """The same names with another T1w, as a later snapshot would have."""
    root = tmp_path_factory.mktemp("later") / DATASET
    for name in data_files(tree):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((tree / name).read_bytes())
    write_scan(root / T1W, 77, side=50)
    return root


@pytest.mark.parametrize("annex", [True, False])
def test_public_storage_with_a_later_version_is_not_taken_for_this_one(tree, other_tree, tmp_path,
                                                                       annex):
    with OpenNeuro({DATASET: {"1.0.0": tree, "1.0.1": other_tree}}, annex=annex) as server:
        server.fault("s3", T1W, Fault(status=403), always=True)
        assert fetch(server, tmp_path, limit=1) == {"01": ""}
        assert server.requests(T1W, "bare") and server.requests(T1W, "route")
        assert_whole_or_absent(tmp_path / DATASET, tree)


def test_a_scan_that_comes_compressed_twice_is_said_to_be(scan_server, tree, tmp_path):
    twice = Fault(body=gzip.compress((tree / T1W).read_bytes()))
    for where in ("s3", "bare", "route"):
        scan_server.fault(where, T1W, twice, always=True)
    assert "compressed twice" in fetch(scan_server, tmp_path, limit=1)["01"]


@pytest.mark.parametrize("header", ["x-amz-server-side-encryption: aws:kms",
                                    "x-amz-server-side-encryption-customer-algorithm: AES256"])
def test_the_etag_of_what_storage_encrypts_is_taken_for_no_md5(scan_server, tree, tmp_path, header):
    name, _, value = header.partition(": ")
    for where in ("s3", "bare"):
        scan_server.fault(where, T1W, Fault(headers={"ETag": f'"{"ab" * 16}"', name: value}),
                          always=True)
    scan_server.fault("route", T1W, Fault(status=404), always=True)
    assert fetch(scan_server, tmp_path, limit=1) == {"01": ""}
    assert len(scan_server.requests(T1W)) == 1
    assert_whole_or_absent(tmp_path / DATASET, tree)


BAD_ADDRESSES = ["http://a..b/x", f"http://{'a' * 64}/x", "http://[::1", "javascript:x",
                 "http://127.0.0.1:99999/x"]


@pytest.mark.parametrize("url", BAD_ADDRESSES)
@pytest.mark.parametrize("redirected", [False, True])
def test_what_is_no_address_is_passed_by(scans, tmp_path, url, redirected):
    def edit(entry):
        if entry["filename"] == T1W and not redirected:
            entry["urls"] = [url, *entry["urls"]]
        return entry

    with OpenNeuro({DATASET: {"1.0.0": scans}}, edit=edit) as server:
        if redirected:
            server.fault("s3", T1W, Fault(redirect=url), always=True)
        assert fetch(server, tmp_path) == {"01": "", "02": ""}


def test_what_a_run_was_to_keep_later_runs_leave_alone(server, tmp_path):
    assert fetch(server, tmp_path) == {"01": "", "02": ""}
    before = data_files(tmp_path / DATASET)
    for done in (True, False):  # in a store already, and not
        fetch(server, tmp_path, keep=False, done=lambda *_: done)
        assert data_files(tmp_path / DATASET) == before
    fetch(server, tmp_path / "b", keep=False)
    assert not [name for name in data_files(tmp_path / "b" / DATASET) if "sub-" in name]


@pytest.mark.parametrize("there", [True, False])
def test_a_whole_file_of_somebodys_is_never_replaced_or_deleted(scan_server, tmp_path, there):
    own = tmp_path / DATASET / T1W
    write_scan(own, 77)
    before = own.read_bytes()
    if not there:
        for where in ("s3", "bare", "route"):
            scan_server.fault(where, T1W, Fault(status=404), always=True)
    found = fetch(scan_server, tmp_path, keep=False)
    assert found["02"] == "" and "move it away" in found["01"]
    assert own.read_bytes() == before
    assert not list(tmp_path.rglob("*.part*"))
    own.write_bytes(before[:99])  # of a scan that is cut off there is nothing to lose
    fetch(scan_server, tmp_path)
    assert there == (own.exists() and len(own.read_bytes()) > 99)


def test_the_key_of_the_api_is_believed_more_than_an_etag(tree, tmp_path):
    with OpenNeuro({DATASET: {"1.0.0": tree}}, annex=True) as server:
        server.fault("s3", T1W, Fault(headers={"ETag": f'"{"0" * 32}"'}), always=True)
        assert fetch(server, tmp_path, limit=1) == {"01": ""}
        assert len(server.requests(T1W)) == 1
    write_scan(tmp_path / "x.nii.gz", 5)
    with OpenNeuro({DATASET: {"1.0.0": tree}}, annex=True) as server:
        for where in ("s3", "bare", "route"):
            server.fault(where, T1W, Fault(body=(tmp_path / "x.nii.gz").read_bytes()), always=True)
        assert "md5 is" in fetch(server, tmp_path / "again", limit=1)["01"]


def test_another_snapshot_replaces_only_what_differs(tree, other_tree, tmp_path):
    with OpenNeuro({DATASET: {"1.0.0": tree, "1.0.1": other_tree}}) as server:
        fetch(server, tmp_path)
        asked = len(server.log)
        fetch(server, tmp_path, spec=f"{DATASET}:1.0.1")
        assert [r.name for r in server.log[asked:] if r.place != "graphql"] == [T1W]
    assert_whole_or_absent(tmp_path / DATASET, other_tree)


def test_a_redirect_within_the_rules_is_followed_with_its_range(server, tree, tmp_path):
    other = f"{server.url}/s3/{DATASET}/{T1W}"
    server.fault("s3", T1W, Fault(redirect=other), Fault(redirect=other))
    server.fault("bare", T1W, Fault(cut=100_000))
    assert fetch(server, tmp_path, limit=1) == {"01": ""}
    assert [r.range for r in server.requests(T1W, "bare")] == [None, "bytes=100000-"]
    assert_whole_or_absent(tmp_path / DATASET, tree)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    try:
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                        "-keyout", key, "-out", cert, "-subj", "/CN=127.0.0.1", "-addext",
                        "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no certificate could be made: {error}")
    return cert, key


def test_an_https_archive_never_leads_to_http(tree, tmp_path, certificate, monkeypatch, server):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with OpenNeuro({DATASET: {"1.0.0": tree}}, tls=certificate) as secure:
        assert fetch(secure, tmp_path / "plain", limit=1) == {"01": ""}
        secure.fault("s3", T1W, Fault(redirect=f"{server.s3_url}/{DATASET}/{T1W}"), always=True)
        secure.edit = lambda e: {**e, "urls": [f"{server.s3_url}/{DATASET}/{T2W}"]} if (
            e["filename"] == T2W) else e
        assert fetch(secure, tmp_path / "led", limit=1) == {"01": ""}
        assert not server.log  # http was offered twice, and never asked
        for where in ("bare", "route"):
            secure.fault(where, T1W, Fault(redirect=f"{server.s3_url}/{DATASET}/{T1W}"),
                         always=True)
        reason = fetch(secure, tmp_path / "astray", limit=1)["01"]
        assert "which is not https" in reason and not server.log


@contextlib.contextmanager
def listening(answer, times=100):
    """Give the same bytes to every request on loopback, and hang up after so many.

    Yields host:port, and a list that fills with (peer, head) of each request.
    """
    heads = []

    def serve(sock):
        with sock:
            for _ in range(times):
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    if not (block := sock.recv(4096)):
                        return
                    head += block
                heads.append((sock.getpeername(), head.decode()))
                sock.sendall(answer)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}", heads
        server.shutdown(socket.SHUT_RDWR)


HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


@pytest.fixture
def line():
    with Archive("http://127.0.0.1:9", patience=QUICK) as archive:
        yield archive.line


def body(line, url):
    """All bytes of an address, by as many tries as it takes."""
    def attempt():
        with line.get(url, {}) as response:
            return b"".join(response.iter_raw())

    return line.persist(attempt)


def test_a_connection_that_the_server_closed_while_idle_is_replaced(line):
    with listening(HELLO, times=1) as (there, heads):
        assert [body(line, f"http://{there}/") for _ in range(3)] == [b"hello"] * 3
    assert len({peer for peer, _ in heads}) == 3


def test_a_body_that_was_not_read_does_not_precede_the_next_one(line):
    with listening(HELLO) as (there, heads):
        with line.get(f"http://{there}/", {}):
            pass
        with pytest.raises(KeyError), line.get(f"http://{there}/", {}):
            raise KeyError
        assert body(line, f"http://{there}/") == b"hello"
    assert len({peer for peer, _ in heads}) == 3


@pytest.mark.parametrize("answer", [
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhello", b"hello", b""])
def test_an_answer_that_is_none_is_given_up(line, answer):
    with listening(answer, times=1) as (there, heads), pytest.raises(Refused) as caught:
        body(line, f"http://{there}/")
    assert len(heads) == QUICK.attempts and not isinstance(caught.value, Unreachable)


def test_who_is_silent_or_not_there_is_unreachable(line):
    with listening(b"") as (there, _), pytest.raises(Unreachable, match="no answer in time"):
        body(line, f"http://{there}/")
    with pytest.raises(Unreachable, match="refused"):
        body(line, "http://127.0.0.1:9/")


def test_addresses_may_have_spaces_letters_of_any_alphabet_and_a_user(line):
    with listening(HELLO) as (there, heads):
        assert body(line, f"http://me:a%20b@{there}/ä b%20c?d=e f") == b"hello"
    assert heads[0][1].startswith("GET /%C3%A4%20b%20c?d=e%20f HTTP/1.1\r\n")
    assert f"Host: {there}\r\n" in heads[0][1]
    assert "Authorization: Basic bWU6YSBi" in heads[0][1]


def test_a_proxy_of_the_environment_is_asked_unless_the_host_is_excepted(monkeypatch):
    with listening(HELLO) as (proxy, heads):
        monkeypatch.setenv("http_proxy", f"http://me:pw@{proxy}")
        monkeypatch.setenv("no_proxy", "b.invalid")
        with Archive("http://a.invalid", patience=QUICK) as archive:
            assert body(archive.line, "http://a.invalid/b?c") == b"hello"
            with pytest.raises(Unreachable):
                body(archive.line, "http://b.invalid/")
    assert len(heads) == 1 and "Proxy-Authorization: Basic bWU6cHc=" in heads[0][1]
    assert heads[0][1].startswith("GET http://a.invalid/b?c HTTP/1.1\r\nHost: a.invalid\r\n")


def test_a_secure_server_is_reached_through_a_proxys_tunnel(monkeypatch):
    with listening(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n") as (proxy, heads):
        monkeypatch.setenv("all_proxy", f"http://{proxy}")
        with Archive("https://a.invalid", patience=QUICK) as archive, pytest.raises(
                Refused, match="403"):
            body(archive.line, "https://a.invalid/secret")
    assert heads[0][1].startswith("CONNECT a.invalid:443 HTTP/1.")
    assert "secret" not in heads[0][1]


def test_retry_after_is_honoured_in_seconds_and_as_a_date(server, tmp_path):
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=2), usegmt=True)
    server.fault("s3", T1W, Fault(status=429, headers={"Retry-After": "1"}))
    server.fault("s3", T2W, Fault(status=503, headers={"Retry-After": date}))
    start = time.monotonic()
    patience = Patience(attempts=3, first_wait_s=0.01, longest_wait_s=5)
    assert fetch(server, tmp_path, limit=1, patience=patience) == {"01": ""}
    assert 0.9 < time.monotonic() - start < 6  # a date has whole seconds


def test_a_server_that_asks_for_too_long_a_pause_ends_the_run(server, tmp_path):
    server.fault("s3", T1W, Fault(status=429, headers={"Retry-After": "3600"}))
    with pytest.raises(ArchiveError, match="asks to come back in 3600 s"):
        fetch(server, tmp_path)


def test_waits_double_and_jitter_and_end(server, monkeypatch, tmp_path):
    server.fault("graphql", "", Fault(status=503), always=True)
    with Archive(server.api_url, patience=Patience(attempts=5, first_wait_s=0.02,
                                                   longest_wait_s=0.06)) as archive:
        start = time.monotonic()
        with pytest.raises(ArchiveError, match=r"HTTP 503 \(5 tries\)"):
            archive._ask("query { x }", {}, bool)
    assert 0.5 * (0.02 + 0.04 + 0.06 + 0.06) < time.monotonic() - start < 1


# ---------------------------------------------------------------------- what counts as whole


def broken(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def nifti(tmp_path, **kind):
    path = tmp_path / "x.nii"
    image = nib.Nifti2Image if kind.get("version") == 2 else nib.Nifti1Image
    image(np.ones((9, 9, 9), np.int16), np.eye(4)).to_filename(path)
    return path.read_bytes()


@pytest.mark.parametrize("version", [1, 2])
def test_a_nifti_file_is_whole_with_and_without_gzip(tmp_path, version):
    content = nifti(tmp_path, version=version)
    inspect(broken(tmp_path, "a.nii", content), "a.nii")
    packed = gzip.compress(content[:500]) + gzip.compress(content[500:])  # two members are legal
    assert inspect(broken(tmp_path, "a.part", packed), "a.nii.gz")["size"] == len(packed)


def test_damaged_files_of_all_kinds_are_told_from_whole_ones(tmp_path):
    content = nifti(tmp_path)
    packed = gzip.compress(content)
    cases = {
        "a.nii.gz": [b"", packed[:-1], packed[:-9], packed[:40], content[:-1],
                     packed[:-8] + b"\0" * 8, packed[:60] + b"\xff" + packed[61:],
                     gzip.compress(b""), gzip.compress(content[:-1]), gzip.compress(b"\0" * 2000),
                     gzip.compress(packed), b'{"error": "x"}', b"<html>"],
        "a.nii": [b"", content[:-1], content[:300], packed[:-1], packed[:1],
                  b"\0" * 2000, b"\n <!doctype HTML>"],
        "a.json": [b"", b"{", b'{"error": "x"}', b"<html>", b'{"a": 1', "ü".encode("latin-1")],
        "a.tsv": [b'{"error": "file not found"}', b"<html><body>", b"<?xml version='1.0'?>"],
        "README": [b'{"error": "x", "code": 1}', b"<head>"]}
    for name, contents in cases.items():
        for bad in contents:
            with pytest.raises(Damaged):
                inspect(broken(tmp_path, "file.part", bad), name)
    for name, good in {"a.json": b'\xef\xbb\xbf{"a": 1}', "b.json": b'{"errors": 0.1, "b": 1}',
                       "README": b"", "README.md": b"<p align=center>Heads</p>",
                       "a.tsv": "id\tname\n1\tü".encode("latin-1")}.items():
        inspect(broken(tmp_path, "file.part", good), name)


@pytest.mark.parametrize("step", [1, 100_000])
def test_compression_is_told_by_the_content_of_a_nifti_file_and_not_by_its_name(tmp_path, step):
    write_scan(tmp_path / "x.nii", 0, side=9)
    content = (tmp_path / "x.nii").read_bytes()
    for name, stored in (("a.nii.gz", content), ("a.nii", gzip.compress(content))):
        checker = Checker(name)
        for start in range(0, len(stored), step):
            checker.feed(stored[start:start + step])
        assert checker.finish()["size"] == len(stored)
        assert read_volume(broken(tmp_path, name, stored)).data.shape == (9, 9, 9)


def test_nibabel_checks_the_header_of_every_file(tmp_path, caplog):
    content = bytearray(nifti(tmp_path))
    inspect(broken(tmp_path, "a.nii", bytes(content)), "a.nii")
    assert not caplog.messages
    content[252:254] = (99).to_bytes(2, sys.byteorder)  # qform_code, of which there are five
    inspect(broken(tmp_path, "a.nii", bytes(content)), "a.nii")
    assert "qform_code" in caplog.text


@pytest.mark.parametrize("library", ["zlib", "isal.isal_zlib"])
def test_a_flipped_bit_is_found_with_either_library(tmp_path, monkeypatch, library):
    module = pytest.importorskip(library)
    monkeypatch.setattr(whole_file, "inflate", module)
    monkeypatch.setattr(whole_file, "InflateError", module.error)
    content = nifti(tmp_path)
    packed = gzip.compress(content)
    assert verdict(packed) == ""
    for bit in range(80, 8 * len(packed)):  # the ten bytes before are its time and the like
        flipped = bytearray(packed)
        flipped[bit // 8] ^= 1 << bit % 8
        harmless = zlib.decompressobj(31)  # of bits that pad, or of a copy from elsewhere
        with contextlib.suppress(zlib.error):
            if harmless.decompress(bytes(flipped)) == content and harmless.eof:
                continue
        assert verdict(bytes(flipped)), bit
    assert all(verdict(packed[:size]) for size in range(len(packed)))


def verdict(packed):
    """What is wrong with the bytes of a `.nii.gz`, "" if nothing is."""
    checker = Checker("a.nii.gz")
    try:
        checker.feed(packed)
        checker.finish()
    except Damaged as error:
        return str(error)
    return ""


def test_a_helper_judges_as_one_thread_does(tmp_path):
    write_scan(tmp_path / "a.nii.gz", 1, side=128)
    packed = (tmp_path / "a.nii.gz").read_bytes()
    damaged = packed[:-90_000] + bytes(8) + packed[-89_992:]
    helper = Helper()
    for content in (packed, damaged, packed[:-1]):
        checker = Checker("a.nii.gz", helper)
        with contextlib.nullcontext() if content == packed else pytest.raises(Damaged):
            for start in range(0, len(content), 1 << 16):
                checker.feed(content[start:start + (1 << 16)])
            assert checker.finish() == inspect(tmp_path / "a.nii.gz", "a.nii.gz")
    helper.close()


# -------------------------------------------------------------------------------------- resuming


def test_a_cut_download_goes_on_where_it_was(server, tree, tmp_path):
    server.fault("s3", T1W, Fault(cut=100_000))
    fetch(server, tmp_path, limit=1)
    assert [r.range for r in server.requests(T1W)] == [None, "bytes=100000-"]
    assert server.sent(T1W) == (tree / T1W).stat().st_size


def test_a_length_that_is_always_too_large_ends_when_the_server_has_no_more(server, tree, tmp_path):
    server.fault("s3", T1W, Fault(headers={"Content-Length": "999999"}), always=True)
    fetch(server, tmp_path, limit=1)
    size = (tree / T1W).stat().st_size
    assert [r.range for r in server.requests(T1W)] == [None, f"bytes={size}-"]
    assert_whole_or_absent(tmp_path / DATASET, tree)


def test_a_weak_etag_is_never_gone_on_with(server, tree, tmp_path):
    server.fault("s3", T1W, *[Fault(cut=100_000, headers={"ETag": 'W/"x"'})] * 2,
                 Fault(headers={"ETag": 'W/"x"'}))
    fetch(server, tmp_path, limit=1)
    assert [r.range for r in server.requests(T1W)] == [None, None, None]
    assert_whole_or_absent(tmp_path / DATASET, tree)


def test_a_part_that_was_not_asked_for_is_not_joined(server, tree, tmp_path):
    server.fault("s3", T1W, Fault(cut=100_000), Fault(headers={"Content-Range": "bytes 3-9/*"}))
    fetch(server, tmp_path, limit=1)
    assert [r.range for r in server.requests(T1W)] == [None, "bytes=100000-", None]
    assert_whole_or_absent(tmp_path / DATASET, tree)


def test_short_segments_are_joined(server, tree, tmp_path):
    server.fault("s3", T1W, Fault(cut=10_000), *[Fault(segment=40_000)] * 2)
    fetch(server, tmp_path, limit=1)
    assert [r.range for r in server.requests(T1W)] == [
        None, "bytes=10000-", "bytes=50000-", "bytes=90000-"]
    assert server.sent(T1W) == (tree / T1W).stat().st_size
    assert_whole_or_absent(tmp_path / DATASET, tree)


def test_a_version_that_changed_between_parts_is_noticed_by_the_server_too(server, tree, tmp_path):
    server.fault("s3", T1W, Fault(cut=100_000, headers={"ETag": '"of-before"'}))
    fetch(server, tmp_path, limit=1)
    assert [(r.range, r.status) for r in server.requests(T1W)] == [
        (None, 200), ("bytes=100000-", 200)]  # If-Range made it a 200
    assert_whole_or_absent(tmp_path / DATASET, tree)


CHILD = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from data.openneuro import Archive, make_plan
from data.download import Download
from data.transfer import Patience
def stop(*_): raise KeyboardInterrupt
signal.signal(signal.SIGTERM, stop)
if {limit}: resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
patience = Patience(attempts=4, first_wait_s=0.01, silence_s=20)
with Archive({api!r}, {s3!r}, patience) as archive:
    plan = make_plan(archive.snapshot({spec!r}))
    with Download(archive, plan, Path({folder!r}), keep=True, connections={many}) as download:
        for subject, reason in download:
            download.finish(subject)
"""


def start(server, folder, connections=1, limit=0, tag="1.0.0"):
    """The same download in a process of its own, to be killed."""
    code = CHILD.format(root=str(ROOT), api=server.api_url, s3=server.s3_url, folder=str(folder),
                        many=connections, limit=limit, spec=f"{DATASET}:{tag}")
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("name, at", [(T1W, 0), (T1W, 90_000), (T2W, 150_000),
                                      ("sub-02/anat/sub-02_T2w.nii.gz", 1)])
def test_after_kill_9_the_next_run_fetches_only_what_was_missing(server, tree, tmp_path, name, at):
    hold = Hold(at)
    server.fault("s3", name, Fault(hold=hold))
    server.edit = lambda entry: {**entry, "size": None}
    child = start(server, tmp_path)
    part = tmp_path / DATASET / f"{name}.part"
    wait_for(lambda: hold.reached.is_set() and part.exists() and part.stat().st_size == at)
    child.kill()
    child.wait()
    hold.go.set()
    before = data_files(tmp_path / DATASET)
    begun = [p.stat().st_size for p in (tmp_path / DATASET).rglob("*.part")]
    assert at in begun and len(begun) <= 2  # the file before it may wait for the disk
    assert_whole_or_absent(tmp_path / DATASET, tree)
    wait_for(lambda: not any(t.name.startswith("Thread") and "process_request" in t.name
                             for t in threading.enumerate()))
    server.log.clear()
    assert fetch(server, tmp_path) == {"01": "", "02": ""}
    assert sorted(data_files(tmp_path / DATASET)) == wanted(tree)
    assert_whole_or_absent(tmp_path / DATASET, tree)
    total = sum((tree / n).stat().st_size for n in wanted(tree) if n not in before)
    assert server.sent() == total - sum(begun)
    assert not list((tmp_path / DATASET).rglob("*.part*"))


def test_killed_at_random_moments_it_ends_with_the_same_bytes(server, tree, tmp_path):
    rng = random.Random(3)
    for name in wanted(tree):
        server.fault("s3", name, Fault(drip=0.02, drip_bytes=20_000), always=True)
    for _ in range(3):
        child = start(server, tmp_path, connections=4)
        wait_for(lambda: child.poll() is not None or any(r.place == "s3" for r in server.log))
        time.sleep(rng.uniform(0, 0.25))
        child.kill()
        child.wait()
        assert_whole_or_absent(tmp_path / DATASET, tree)
        server.log.clear()
    server.always.clear()
    (tmp_path / DATASET / "manifest.json.1.tmp").write_text("{")
    (tmp_path / DATASET / "README").unlink(missing_ok=True)
    assert fetch(server, tmp_path) == {"01": "", "02": ""}
    assert sorted(data_files(tmp_path / DATASET)) == wanted(tree)
    assert_whole_or_absent(tmp_path / DATASET, tree)
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.part*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_soon_and_leaves_a_part_to_go_on_from(server, tree, tmp_path, number):
    hold = Hold(90_000)
    server.fault("s3", T1W, Fault(hold=hold))
    child = start(server, tmp_path)
    part = tmp_path / DATASET / f"{T1W}.part"
    wait_for(lambda: part.exists() and part.stat().st_size == 90_000)
    child.send_signal(number)
    assert child.wait(timeout=8) != 0
    hold.go.set()
    assert "KeyboardInterrupt" in child.stdout.read()
    assert part.read_bytes() == (tree / T1W).read_bytes()[:90_000]
    server.log.clear()
    fetch(server, tmp_path)
    assert [r.range for r in server.requests(T1W)] == ["bytes=90000-"]
    assert_whole_or_absent(tmp_path / DATASET, tree)


def test_a_full_disk_is_said_and_leaves_a_state_to_go_on_from(server, tree, tmp_path):
    child = start(server, tmp_path, limit=100_000)  # a limit on files acts like a full disk
    said = child.communicate(timeout=20)[0]
    assert child.returncode != 0
    assert "File too large" in said and "run the same command again" in said
    assert (tmp_path / DATASET / f"{T1W}.part").stat().st_size == 100_000
    assert_whole_or_absent(tmp_path / DATASET, tree)
    server.log.clear()
    assert fetch(server, tmp_path) == {"01": "", "02": ""}
    assert [r.range for r in server.requests(T1W)] == ["bytes=100000-"]
    assert_whole_or_absent(tmp_path / DATASET, tree)


def test_a_part_of_another_version_is_not_gone_on_with(server, tree, tmp_path):
    root = tmp_path / DATASET
    (root / T1W).parent.mkdir(parents=True)
    for tag, etag in (("0.9", '"x"'), ("1.0.0", '"x"'), ("1.0.0", None)):
        (root / f"{T1W}.part").write_bytes(b"y" * 90_000)
        note = {"tag": tag, "etag": etag, "length": 10 ** 6, "url": "http://x"}
        (root / f"{T1W}.part.json").write_text(json.dumps(note) if etag else "damaged {")
        (root / T1W).unlink(missing_ok=True)
        fetch(server, tmp_path, limit=1)
        assert_whole_or_absent(root, tree)


def test_a_complete_part_of_another_snapshot_is_not_taken(server, tree, other_tree, tmp_path):
    root, content = tmp_path / DATASET, (other_tree / T1W).read_bytes()
    (root / T1W).parent.mkdir(parents=True)
    (root / f"{T1W}.part").write_bytes(content)
    note = {"tag": "1.0.1", "etag": f'"{hashlib.md5(content).hexdigest()}"', "url": "http://x",
            "length": len(content)}
    (root / f"{T1W}.part.json").write_text(json.dumps(note))
    fetch(server, tmp_path, limit=1)
    assert_whole_or_absent(root, tree)


def test_killed_while_another_snapshot_replaces_a_file_the_old_one_is_not_taken_for_it(
        tree, other_tree, tmp_path):
    def silent(entry):
        return {**entry, "size": None}

    with OpenNeuro({DATASET: {"1.0.0": tree, "1.0.1": other_tree}}, edit=silent) as server:
        fetch(server, tmp_path)
        hold = Hold(0)
        server.fault("s3", T1W, Fault(hold=hold))
        child = start(server, tmp_path, tag="1.0.1")
        wait_for(lambda: (tmp_path / DATASET / f"{T1W}.part.json").exists())
        child.kill()
        child.wait()
        hold.go.set()
        fetch(server, tmp_path, spec=f"{DATASET}:1.0.1")
    assert_whole_or_absent(tmp_path / DATASET, other_tree)


def test_a_damaged_part_is_noticed_and_fetched_anew(server, tree, tmp_path):
    server.fault("s3", T1W, Fault(cut=100_000), always=True)
    with pytest.raises(ArchiveError):
        server.fault("s3", T2W, Fault(status=429, headers={"Retry-After": "3600"}), always=True)
        fetch(server, tmp_path, limit=1, connections=8)
    server.always.clear()
    part = tmp_path / DATASET / f"{T1W}.part"
    part.write_bytes(part.read_bytes()[:-1000] + b"\0" * 1000 if part.exists() else b"")
    assert fetch(server, tmp_path, limit=1) == {"01": ""}
    assert_whole_or_absent(tmp_path / DATASET, tree)


def test_files_changed_since_are_fetched_anew_and_untouched_ones_are_not_read(server, tree,
                                                                              tmp_path):
    fetch(server, tmp_path)
    root = tmp_path / DATASET
    content = (root / T1W).read_bytes()
    (root / T1W).write_bytes(content[:5000] + b"?" + content[5001:])  # same size
    (root / T2W).write_bytes(b"short")
    os.utime(root / "sub-02/anat/sub-02_T1w.nii.gz", (0, 0))  # touched, but the same
    (root / "README").unlink()
    server.log.clear()
    fetch(server, tmp_path)
    assert sorted(r.name for r in server.log if r.place == "s3") == ["README", T1W, T2W]
    assert_whole_or_absent(root, tree)
    server.log.clear()
    fetch(server, tmp_path)
    assert not server.requests(place="s3")


@pytest.mark.parametrize("manifest", [None, b"{", b"[]", b'{"files": 3, "subjects": {"01": 5}}'])
def test_whole_files_without_a_manifest_are_checked_and_not_fetched(server, tree, tmp_path,
                                                                    manifest):
    fetch(server, tmp_path)
    path = tmp_path / DATASET / "manifest.json"
    path.unlink() if manifest is None else path.write_bytes(manifest)
    (tmp_path / DATASET / T2W).write_bytes(b"not a scan")
    server.log.clear()
    assert fetch(server, tmp_path) == {"01": "", "02": ""}
    assert [r.name for r in server.requests(place="s3")] == [T2W]
    assert sorted(json.loads(path.read_text())["files"]) == wanted(tree)


def test_two_processes_share_a_folder(server, tree, tmp_path):
    for name in (T1W, T2W):
        server.fault("s3", name, Fault(drip=0.05, drip_bytes=30_000))
    children = [start(server, tmp_path, connections=2) for _ in range(2)]
    assert [child.wait(timeout=30) for child in children] == [0, 0]
    assert len(server.requests(T1W)) == 1  # one fetched it, the other waited
    assert sorted(data_files(tmp_path / DATASET)) == wanted(tree)
    manifest = json.loads((tmp_path / DATASET / "manifest.json").read_text())
    assert sorted(manifest["files"]) == wanted(tree)
    assert not list((tmp_path / DATASET).rglob("*.part*"))


def test_two_writers_of_a_manifest_lose_nothing(tmp_path):
    first, second = download.Manifest(tmp_path, "1.0.0"), download.Manifest(tmp_path, "1.0.0")
    first.update(lambda content: content["files"].update(a={"size": 1}))
    second.update(lambda content: content["files"].update(b={"size": 2}))
    third = download.Manifest(tmp_path, "1.0.0")
    assert third.content["files"] == {"a": {"size": 1}, "b": {"size": 2}}


@pytest.mark.parametrize("fault", [
    Fault(status=416, headers={"Content-Range": "bytes */0"}),
    Fault(status=503, headers={"Retry-After": "Wed, 21 Oct 2099 07:28:00 +9999999999999999999999"}),
    Fault(status=503, headers={"Retry-After": "2 minutes"}),
    Fault(body=b"[" * 200_000),
], ids=["416", "a wild date", "words", "deep JSON"])
def test_an_answer_beyond_reason_costs_nothing_but_that_answer(server, tree, tmp_path, fault):
    for name in ("T1w.json", T1W):
        server.fault("s3", name, fault)
    assert fetch(server, tmp_path, limit=1) == {"01": ""}
    assert_whole_or_absent(tmp_path / DATASET, tree)
    assert (tmp_path / DATASET / "T1w.json").is_file()


@pytest.mark.parametrize("answer", [
    {"errors": 5}, {"errors": [{"message": "m", "extensions": "e"}]},
    {"errors": [{"message": "m", "extensions": {"code": ["c"]}}]}, {"data": {"snapshot": "s"}},
    {"data": {"snapshot": {"a0": "none"}}}, [], "text", {"data": 3}])
def test_an_api_that_answers_nonsense_is_one_error(server, answer):
    server.fault("graphql", "", Fault(body=json.dumps(answer).encode()), always=True)
    with Archive(server.api_url, server.s3_url, QUICK) as archive:
        for ask in (lambda: archive.snapshot(f"{DATASET}:1.0.0"), lambda: archive.tags(DATASET)):
            with pytest.raises((ArchiveError, ValueError)):
                ask()


def test_a_listing_with_a_hole_and_an_error_is_asked_for_again(tree, monkeypatch):
    holes = [True]

    def edit(entry):
        if holes and entry["filename"] == T1W:
            return None
        return entry

    with OpenNeuro({DATASET: {"1.0.0": tree}}, edit=edit) as running:
        with Archive(running.api_url, running.s3_url, QUICK) as archive:
            read = openneuro._read_answer

            def spoilt(response, body, complete):
                if holes:
                    content = {**json.loads(body), "errors": [{"message": "worker timed out"}]}
                    body = json.dumps(content).encode()
                    holes.clear()
                return read(response, body, complete)

            monkeypatch.setattr(openneuro, "_read_answer", spoilt)
            names = {file.name for file in archive.snapshot(f"{DATASET}:1.0.0").files}
    assert T1W in names and not holes


def test_a_notes_symbolic_link_is_not_followed(server, tree, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (tmp_path / DATASET).mkdir()
    (tmp_path / DATASET / "README.part.json").symlink_to(outside)
    fetch(server, tmp_path)
    assert outside.read_text() == "precious"
    assert (tmp_path / DATASET / "README").read_bytes() == (tree / "README").read_bytes()


def test_a_change_that_waits_survives_the_writing_of_others(tmp_path):
    first, second = download.Manifest(tmp_path, "1.0.0"), download.Manifest(tmp_path, "1.0.0")
    assert first.update(lambda content: content["files"].update(a={"size": 1}), later=True)
    assert not first.update(lambda content: content["files"].update(b={"size": 2}), later=True)
    assert second.update(lambda content: content["files"].update(c={"size": 3}))
    first.refresh()
    assert set(first.content["files"]) == {"a", "b", "c"}
    assert set(json.loads(first.path.read_text())["files"]) == {"a", "c"}
    first.flush()
    assert set(json.loads(first.path.read_text())["files"]) == {"a", "b", "c"}


def test_small_files_share_a_writing_of_the_manifest_and_a_kill_before_it_loses_none(
        crowd, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SYNC_EVERY_S", 60)
    crowd.log.clear()
    with Archive(crowd.api_url, crowd.s3_url, QUICK) as archive:
        plan = make_plan(archive.snapshot(f"{DATASET}:1.0.0"))
        killed = Download(archive, plan, tmp_path, keep=True, ahead=8, progress=False)
        assert all(not reason for _, reason in killed)  # and never closed
    known = json.loads((tmp_path / DATASET / "manifest.json").read_text())["files"]
    notes = {p.name for p in (tmp_path / DATASET).rglob("*.part.json")}
    assert len(known) < 17 and len(notes) >= 17 - len(known)
    crowd.log.clear()
    assert set(fetch(crowd, tmp_path).values()) == {""}
    assert not crowd.requests(place="s3")
    assert len(json.loads((tmp_path / DATASET / "manifest.json").read_text())["files"]) == 17
    assert not list((tmp_path / DATASET).rglob("*.part*"))
    killed.close()


def test_shards_share_a_manifest(tree, tmp_path):
    with (OpenNeuro({DATASET: {"1.0.0": tree}}, edit=lambda e: {**e, "size": None}) as server,
          Archive(server.api_url, server.s3_url, QUICK) as archive):
        plan = make_plan(archive.snapshot(f"{DATASET}:1.0.0"))
        shards = [Download(archive, replace(plan, subjects=(subject,)), tmp_path, keep=True,
                           progress=False) for subject in plan.subjects]
        for shard in shards:
            with shard as download:
                assert [reason for _, reason in download] == [""]
        names = [r.name for r in server.log if r.place != "graphql"]
        assert sorted(names) == wanted(tree)  # each once, the common ones as well
    manifest = json.loads((tmp_path / DATASET / "manifest.json").read_text())
    assert sorted(manifest["files"]) == wanted(tree)
    assert_whole_or_absent(tmp_path / DATASET, tree)


# ------------------------------------------------------------------------------------- streaming


@pytest.fixture
def crowd(tmp_path_factory):
    """Eight subjects of 20 kB scans."""
    root = tmp_path_factory.mktemp("crowd") / DATASET
    for i in range(8):
        for j, suffix in enumerate(("T1w", "T2w")):
            write_scan(root / f"sub-{i}/anat/sub-{i}_{suffix}.nii.gz", 2 * i + j, side=20)
    (root / "dataset_description.json").write_text('{"Name": "Crowd"}')
    with OpenNeuro({DATASET: {"1.0.0": root}}) as running:
        yield running


def on_disk(folder):
    return {p.name.partition("_")[0] for p in folder.rglob("sub-*") if p.is_file()}


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_caller_that_finishes_each_subject_has_at_most_ahead_on_disk(crowd, tmp_path, ahead):
    with Archive(crowd.api_url, crowd.s3_url, QUICK) as archive:
        plan = make_plan(archive.snapshot(f"{DATASET}:1.0.0"))
        with Download(archive, plan, tmp_path, ahead=ahead, progress=False) as download:
            seen = []
            for subject, reason in download:
                assert not reason
                time.sleep(0.02)
                for session in subject.sessions(download.root):
                    assert session.t1w.is_file() and session.t2w.is_file()
                    assert session.id == f"{DATASET}_sub-{subject.subject}"
                assert len(on_disk(tmp_path)) <= ahead
                download.finish(subject)
                seen.append(subject.subject)
    assert sorted(seen) == list("01234567")
    assert sorted(data_files(tmp_path / DATASET)) == ["dataset_description.json"]
    assert [p.name for p in (tmp_path / DATASET).iterdir() if p.is_dir()] == []


def test_a_caller_that_holds_more_than_ahead_still_gets_all(crowd, tmp_path):
    with Archive(crowd.api_url, crowd.s3_url, QUICK) as archive:
        plan = make_plan(archive.snapshot(f"{DATASET}:1.0.0"))
        with Download(archive, plan, tmp_path, ahead=2, progress=False) as download:
            held = []
            for subject, _ in download:
                held.append(subject)
                time.sleep(0.02)
                assert len(on_disk(tmp_path)) <= max(2, len(held))
            for subject in held:
                download.finish(subject)
    assert len(held) == 8 and not on_disk(tmp_path)


def test_subjects_may_be_finished_from_other_threads(crowd, tmp_path):
    with Archive(crowd.api_url, crowd.s3_url, QUICK) as archive:
        plan = make_plan(archive.snapshot(f"{DATASET}:1.0.0"))
        with Download(archive, plan, tmp_path, ahead=3, progress=False) as download:
            timers = []
            for subject, _ in download:
                timers.append(threading.Timer(0.05, download.finish, [subject]))
                timers[-1].start()
            for timer in timers:
                timer.join()
            assert all(download.hashes(subject) for subject in plan.subjects)
            download.finish(plan.subjects[0])  # once more does no harm
            assert all(download.hashes(subject) for subject in plan.subjects)
    assert not on_disk(tmp_path)


def test_a_finished_subject_is_not_fetched_again_unless_the_caller_wants_it(crowd, tmp_path):
    expected = {p.name: hashlib.sha256(p.read_bytes()).hexdigest()
                for p in crowd.datasets[DATASET]["1.0.0"].rglob("*.nii.gz")}
    assert len(fetch(crowd, tmp_path, keep=False)) == 8
    assert not on_disk(tmp_path)
    crowd.log.clear()
    assert fetch(crowd, tmp_path, keep=False) == {}
    assert not crowd.requests(place="s3")
    asked = {}

    def done(subject, hashes, note):
        assert note == {} and hashes
        asked.update({path.name: digest for path, digest in hashes.items()})
        return subject.subject != "3"

    assert fetch(crowd, tmp_path, keep=False, done=done) == {"3": ""}
    assert asked == expected
    assert {r.name[:5] for r in crowd.requests(place="s3")} == {"sub-3"}


def test_files_that_were_there_before_are_used_and_never_deleted(crowd, tmp_path):
    archive = crowd.datasets[DATASET]["1.0.0"]
    before = [f"sub-{i}/anat/sub-{i}_{s}.nii.gz" for i in "35" for s in ("T1w", "T2w")][:-1]
    for name in before:
        (tmp_path / DATASET / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / DATASET / name).write_bytes((archive / name).read_bytes())
    for where in ("s3", "bare", "route"):
        crowd.fault(where, "sub-5/anat/sub-5_T2w.nii.gz", Fault(status=404), always=True)
    for _ in range(2):
        found = fetch(crowd, tmp_path, keep=False)
        assert found["3"] == "" and "HTTP 404" in found["5"]
        assert sorted(n for n in data_files(tmp_path / DATASET) if "sub" in n) == before
    assert not {r.name for r in crowd.requests(place="s3")} & set(before)


def test_files_left_by_a_kill_between_mark_and_deletion_are_removed(crowd, tmp_path):
    fetch(crowd, tmp_path, keep=False)
    left = tmp_path / DATASET / "sub-3" / "anat" / "sub-3_T1w.nii.gz"
    write_scan(left, 1)
    fetch(crowd, tmp_path, keep=False)
    assert not left.exists() and not left.parent.parent.exists()


def test_a_broken_subject_leaves_nothing_behind_when_streaming(crowd, tmp_path):
    for where in ("s3", "bare", "route"):
        crowd.fault(where, "sub-3/anat/sub-3_T2w.nii.gz", Fault(status=404), always=True)
    found = fetch(crowd, tmp_path, keep=False)
    assert [s for s, reason in found.items() if reason] == ["3"]
    assert "HTTP 404" in found["3"]
    assert not on_disk(tmp_path)
    manifest = json.loads((tmp_path / DATASET / "manifest.json").read_text())
    assert list(manifest["files"]) == ["dataset_description.json"]
    assert sorted(manifest["subjects"]) == list("0124567")


def files_of(server):
    root = server.datasets[DATASET]["1.0.0"]
    return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("status", [503, 429])
@pytest.mark.parametrize("keep", [False, True])
def test_an_archive_that_only_says_not_now_ends_the_run_and_the_next_goes_on_from_the_part(
        crowd, tmp_path, status, keep):
    first = "sub-0/anat/sub-0_T1w.nii.gz"
    crowd.fault("s3", first, Fault(cut=10_000))
    for where in ("s3", "bare", "route"):
        for name in files_of(crowd):
            crowd.fault(where, name, Fault(status=status), always=True)
    with pytest.raises(ArchiveError, match=f"HTTP {status}.*run the same command again"):
        fetch(crowd, tmp_path, keep=keep)
    assert (tmp_path / DATASET / f"{first}.part").stat().st_size == 10_000
    assert len({r.name for r in crowd.requests()}) < 12, "it did not go through all 17 files"
    crowd.always.clear()
    crowd.log.clear()
    assert fetch(crowd, tmp_path, keep=keep) == {label: "" for label in "01234567"}
    assert [r.range for r in crowd.requests(first)] == ["bytes=10000-"]
    assert keep or not on_disk(tmp_path)
    assert not list(tmp_path.rglob("*.part*"))


def test_files_refused_for_now_among_others_that_come_cost_their_subjects_only(crowd, tmp_path):
    for where in ("s3", "bare", "route"):
        for label in "01234":
            crowd.fault(where, f"sub-{label}/anat/sub-{label}_T2w.nii.gz", Fault(status=503),
                        always=True)
    found = fetch(crowd, tmp_path, keep=False, connections=1)
    assert [label for label in sorted(found) if "HTTP 503" in found[label]] == list("01234")
    assert [label for label in sorted(found) if not found[label]] == list("567")
    assert not on_disk(tmp_path)


@pytest.fixture
def visits(tmp_path_factory):
    """A subject with three sessions, and a sidecar that they share; one with one session."""
    root = tmp_path_factory.mktemp("visits") / DATASET
    for i, name in enumerate(("1_ses-a", "1_ses-b", "1_ses-c", "2_ses-a")):
        for j, suffix in enumerate(("T1w", "T2w")):
            scan = root / f"sub-{name.replace('_', '/')}/anat/sub-{name}_{suffix}.nii.gz"
            write_scan(scan, 2 * i + j, side=20)
    (root / "sub-1" / "sub-1_T1w.json").write_text("{}")
    with OpenNeuro({DATASET: {"1.0.0": root}}) as running:
        yield running


LOST = "sub-1/ses-b/anat/sub-1_ses-b_T2w.nii.gz"


def arrivals(server, folder, **options):
    """Download; returns {(subject, its sessions): reason}, and what was on disk at each."""
    with Archive(server.api_url, server.s3_url, QUICK) as archive:
        plan = make_plan(archive.snapshot(f"{DATASET}:1.0.0"))
        with Download(archive, plan, folder, progress=False, **options) as download:
            found, seen = {}, {}
            for part, reason in download:
                key = part.subject, "".join(session for session, *_ in part.scans)
                found[key] = reason
                seen[key] = {n for n in data_files(folder / DATASET) if n.startswith("sub-1/")}
                if not reason:
                    assert {f.name for f in part.files} <= data_files(folder / DATASET).keys()
                download.finish(part, {"of": key[1]})
    return found, seen


def test_a_lost_scan_costs_its_session_and_no_other_of_its_subject(visits, tmp_path):
    for where in ("s3", "bare", "route"):
        visits.fault(where, LOST, Fault(status=404), always=True)
    found, seen = arrivals(visits, tmp_path)
    assert found.keys() == {("1", "ac"), ("1", "b"), ("2", "a")}
    assert not found["1", "ac"] and not found["2", "a"]
    assert found["1", "b"].startswith(f"{LOST}: ") and "HTTP 404" in found["1", "b"]
    assert not [name for name in seen["1", "ac"] if "ses-b" in name]
    assert "sub-1/sub-1_T1w.json" in seen["1", "ac"]
    assert not on_disk(tmp_path)


def test_the_next_run_asks_for_the_lost_session_alone_and_then_all_are_done_with(visits, tmp_path):
    for where in ("s3", "bare", "route"):
        visits.fault(where, LOST, Fault(status=404), always=True)
    arrivals(visits, tmp_path)
    visits.log.clear()
    assert arrivals(visits, tmp_path)[0].keys() == {("1", "b")}
    assert {r.name for r in visits.requests(place="s3") if r.name.endswith("gz")} == {
        LOST, LOST.replace("T2w", "T1w")}
    visits.always.clear()
    assert arrivals(visits, tmp_path)[0] == {("1", "b"): ""}
    visits.log.clear()
    assert arrivals(visits, tmp_path)[0] == {}
    assert not visits.requests(place="s3") and not on_disk(tmp_path)
    manifest = json.loads((tmp_path / DATASET / "manifest.json").read_text())
    assert len([n for n in manifest["subjects"]["1"]["files"] if n.endswith("gz")]) == 6


def test_sessions_that_are_all_lost_have_a_reason_each_and_leave_nothing_behind(visits, tmp_path):
    lost = [LOST.replace("ses-b", f"ses-{session}") for session in "abc"]
    for where in ("s3", "bare", "route"):
        for name in lost:
            visits.fault(where, name, Fault(status=404), always=True)
    found, _ = arrivals(visits, tmp_path)
    assert found.pop(("2", "a")) == ""
    assert [reason.partition(":")[0] for _, reason in sorted(found.items())] == lost
    assert not on_disk(tmp_path)


def test_leaving_the_loop_stops_the_threads(crowd, tmp_path):
    def ours():
        return [t for t in threading.enumerate() if "_work" in t.name]

    with Archive(crowd.api_url, crowd.s3_url, QUICK) as archive:
        plan = make_plan(archive.snapshot(f"{DATASET}:1.0.0"))
        with pytest.raises(RuntimeError, match="mine"):
            with Download(archive, plan, tmp_path, progress=False) as download:
                for _ in download:
                    assert ours()
                    raise RuntimeError("mine")
        assert not ours()


def test_a_source_has_licence_doi_and_version(server, tmp_path):
    with Archive(server.api_url, server.s3_url, QUICK) as archive:
        plan = make_plan(archive.snapshot(f"{DATASET}:1.0.0"), limit=1)
        with Download(archive, plan, tmp_path, progress=False) as download:
            for subject, _ in download:
                download.finish(subject)
            assert download.source() == {
                "dataset": DATASET, "name": "Heads", "snapshot": "1.0.0", "license": "CC0",
                "doi": "10.18112/openneuro.x.v1.0.0", "authors": []}


def test_without_a_terminal_progress_is_a_line_a_subject(server, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fetch(server, tmp_path, progress=True)
    lines = [r.message for r in caplog.records if "whole" in r.message]
    assert len(lines) == 2 and "sub-01" in "".join(lines)
    assert "/s" in lines[0] and "left" in lines[0]


def test_the_bar_ends_at_the_bytes_that_came(server, tree, tmp_path):
    server.fault("s3", T1W, Fault(cut=100_000), Fault(ignore_range=True, cut=50_000))
    server.fault("s3", T2W, Fault(cut=10, headers={"ETag": None}))
    server.edit = lambda e: {**e, "size": 5 if e["filename"] == "README" else e["size"]}
    with Archive(server.api_url, server.s3_url, QUICK) as archive:
        plan = make_plan(archive.snapshot(f"{DATASET}:1.0.0"))
        with Download(archive, plan, tmp_path, progress=False) as download:
            for subject, _ in download:
                download.finish(subject)
            size = sum((tree / n).stat().st_size for n in wanted(tree))
            assert download._got == size + 100_000 + 10  # what was fetched twice
            assert download._total == download._got


@pytest.mark.parametrize("seed", range(3))
def test_under_random_faults_everything_arrives(tree, tmp_path, seed):
    with OpenNeuro({DATASET: {"1.0.0": tree}}, seed=seed, annex=True) as server:
        patience = Patience(attempts=8, first_wait_s=0.01, longest_wait_s=1, silence_s=2)
        assert fetch(server, tmp_path, patience=patience) == {"01": "", "02": ""}
    assert_whole_or_absent(tmp_path / DATASET, tree)
