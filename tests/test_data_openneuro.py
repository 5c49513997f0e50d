"""data/openneuro.py against a local OpenNeuro that misbehaves: real HTTP, a real GraphQL engine."""

import json
import logging
import random
from dataclasses import replace

import pytest

pytest.importorskip("graphql", reason="the local server needs graphql-core")

from data import bids, openneuro  # noqa: E402
from data.openneuro import Archive, Snapshot, check_name, make_plan, parse_spec, place  # noqa: E402
from data.transfer import ArchiveError, File  # noqa: E402
import openneuro_server  # noqa: E402
from openneuro_server import Fault, OpenNeuro  # noqa: E402
from small_archive import DATASET, QUICK, T1W, T2W, data_files, fetch, listed, wanted  # noqa: E402
from small_archive import (quiet_environment_fixture, server_fixture,  # noqa: E402, F401
                           tree_fixture)


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
