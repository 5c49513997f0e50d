"""`preprocess.py --datasets` from end to end against an archive that misbehaves, and shards.

What counts everywhere: the store has the same bytes as one from the same files on disk.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import run_command
from conftest import content, rigid, write_pair
from drawn_once import drawn_once
from openneuro_server import Fault, OpenNeuro

import preprocess
import preprocessing_jobs
from data import brain, store
from data.openneuro import Archive
from data.store import SliceStore
from data.transfer import Patience
from data.nifti import NotNow

ROOT = Path(__file__).parents[1]
SMALL = ["--size", "32", "--spacing", "6"]
HEAD = {"shape": (26, 32, 24), "spacing": (6, 6, 6)}
NAMES = ("ds000001", "ds000002")


@pytest.fixture(scope="module", autouse=True)
def sheets():
    with drawn_once():
        yield


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Two datasets: five and three subjects with both scans, one of them twice; two without."""
    root = tmp_path_factory.mktemp("archive")
    for label in ("01", "02", "03", "04"):
        write_pair(root / NAMES[0], label, **HEAD)
    for session in ("a", "b"):
        write_pair(root / NAMES[0], "05", session=session, **HEAD)
    for label in ("01", "06", "07"):
        write_pair(root / NAMES[1], label, person=60 + int(label), **HEAD)
    for name in NAMES:
        write_pair(root / name, "99", only="T1w", **HEAD)
    for name, doi in zip(NAMES, ("10.18112/openneuro.ds000001.v1.0.0", "")):
        (root / name / "dataset_description.json").write_text(json.dumps({
            "Name": f"Heads of {name}", "BIDSVersion": "1.8.0", "License": "CC0",
            "Authors": ["A. One", "B. Two", "C. Three", "D. Four"], "DatasetDOI": doi}))
    return root


@pytest.fixture(scope="module")
def from_disk(archive, tmp_path_factory):
    """The store of `--bids` on the same files."""
    out = tmp_path_factory.mktemp("disk") / "slices"
    result = run_command(preprocess.main, "--bids", *(archive / name for name in NAMES), "--out",
                         out, *SMALL, "--brain-extraction", "none", "--workers", "0")
    assert result.code == 3
    return content(out)


@pytest.fixture
def server(archive, monkeypatch):
    with serve(archive) as running:
        monkeypatch.setenv("OPENNEURO_API_URL", running.api_url)
        monkeypatch.setenv("OPENNEURO_S3_URL", running.s3_url)
        yield running


def serve(archive, **options):
    return OpenNeuro({name: {"1.0.0": archive / name} for name in NAMES}, **options)


def run(tmp_path, *names, options=(), out="slices", workers=0):
    return run_command(preprocess.main, "--datasets", *(names or NAMES), "--out", tmp_path / out,
                       "--downloads", tmp_path / "downloads", *SMALL, "--brain-extraction", "none",
                       "--workers", workers, *options)


def same(out, from_disk):
    """Whether a store is that of `--bids`, but for the snapshot that only a download knows."""
    found = content(out)
    assert found.keys() == from_disk.keys()
    for name in found:
        if name == "store.json":
            headers = [json.loads(text) for text in (found[name], from_disk[name])]
            assert [s["snapshot"] for s in headers[0]["sources"]] == ["1.0.0", "1.0.0"]
            for header in headers:
                for source in header["sources"]:
                    source["snapshot"] = ""
            assert headers[0] == headers[1]
        else:
            assert found[name] == from_disk[name], name
    return True


def scans(tmp_path):
    return sorted(p.name for p in (tmp_path / "downloads").rglob("sub-*") if p.is_file())


# --------------------------------------------------------------------------------- what is built


def test_datasets_become_the_store_that_their_files_on_disk_give(server, tmp_path, from_disk):
    result = run(tmp_path)
    assert result.code == 3 and result.err == ""
    assert same(tmp_path / "slices", from_disk)
    assert scans(tmp_path) == [], "raw files are gone when their subject is sliced"
    assert ("cite ds000001: A. One, B. Two, C. Three et al. Heads of ds000001. version 1.0.0. "
            "https://doi.org/10.18112/openneuro.ds000001.v1.0.0. licence CC0.") in result.out
    assert "ds000001_sub-99: sub-99/anat: has a T1w but no T2w" in result.out
    sources = SliceStore(tmp_path / "slices").header["sources"]
    assert [(s["snapshot"], s["license"]) for s in sources] == [("1.0.0", "CC0")] * 2


def test_kept_downloads_are_a_tree_that_gives_the_same_bytes_to_the_last(server, tmp_path):
    assert run(tmp_path, options=["--keep-downloads"]).code == 3
    trees = [tmp_path / "downloads" / name for name in NAMES]
    assert run_command(preprocess.main, "--bids", *trees, "--out", tmp_path / "again", *SMALL,
                       "--brain-extraction", "none", "--workers", "0").code == 0
    ours, theirs = content(tmp_path / "slices"), content(tmp_path / "again")
    for found in (ours, theirs):  # who had no pair was not downloaded
        del found["skipped.tsv"], found["report.html"]
    assert ours == theirs and len(ours) == 5


def test_a_second_run_downloads_nothing_and_changes_nothing(server, tmp_path):
    run(tmp_path)
    before = content(tmp_path)
    server.log.clear()
    result = run(tmp_path)
    assert result.code == 3 and "done" not in result.out
    assert {r.place for r in server.log} == {"graphql"}
    assert content(tmp_path) == before


def test_what_is_stored_is_not_fetched_again_after_downloads_were_removed(server, tmp_path):
    run(tmp_path)
    before = content(tmp_path / "slices")
    shutil.rmtree(tmp_path / "downloads")
    server.log.clear()
    assert run(tmp_path).code == 3
    assert not [r for r in server.requests(place="s3") if "sub-" in r.name]
    assert content(tmp_path / "slices") == before
    run(tmp_path, options=["--shard", "1/2"], out="shard")
    shutil.rmtree(tmp_path / "downloads")
    server.log.clear()
    result = run(tmp_path, options=["--shard", "1/2"], out="shard")
    assert result.code == 3 and "  done  " not in result.out
    assert not [r for r in server.requests(place="s3") if "sub-" in r.name]


def test_another_snapshot_is_fetched_though_its_names_are_stored(archive, tmp_path, monkeypatch):
    newer = tmp_path / "newer" / NAMES[1]
    shutil.copytree(archive / NAMES[1], newer)
    write_pair(newer, "06", person=3, **HEAD)
    with OpenNeuro({NAMES[1]: {"1.0.0": archive / NAMES[1], "1.1.0": newer}}) as running:
        monkeypatch.setenv("OPENNEURO_API_URL", running.api_url)
        run(tmp_path, f"{NAMES[1]}:1.0.0")
        result = run(tmp_path, NAMES[1])
    assert "ds000002_sub-06: its files or its brain extraction changed" in result.out
    assert result.out.count("  done  ") == 1, "the others have the same hashes"
    assert SliceStore(tmp_path / "slices").header["sources"][0]["snapshot"] == "1.1.0"


@pytest.fixture
def two_snapshots(archive, tmp_path, monkeypatch):
    """ds000002 1.0.0, and 1.1.0 where every T1w is another."""
    newer = tmp_path / "newer" / NAMES[1]
    shutil.copytree(archive / NAMES[1], newer)
    for n, label in enumerate(("01", "06", "07")):
        write_pair(newer, label, person=n, **HEAD)
    with OpenNeuro({NAMES[1]: {"1.0.0": archive / NAMES[1], "1.1.0": newer}}) as running:
        monkeypatch.setenv("OPENNEURO_API_URL", running.api_url)
        yield running


def test_rows_of_an_older_snapshot_are_never_taken_for_the_newer_ones(two_snapshots, tmp_path):
    run(tmp_path, f"{NAMES[1]}:1.0.0")
    run(tmp_path, f"{NAMES[1]}:1.1.0", options=["--limit", "1"])
    source = SliceStore(tmp_path / "slices").header["sources"][0]
    assert source["snapshot"] == "1.1.0" and source["of_other_snapshots"] == {
        "ds000002_sub-06": "1.0.0", "ds000002_sub-07": "1.0.0"}
    run(tmp_path, f"{NAMES[1]}:1.1.0")
    run(tmp_path, f"{NAMES[1]}:1.1.0", out="fresh")
    assert content(tmp_path / "slices") == content(tmp_path / "fresh")


def test_a_newer_scan_that_cannot_be_had_is_tried_again(two_snapshots, tmp_path):
    run(tmp_path, f"{NAMES[1]}:1.0.0")
    for where in ("s3", "bare", "route"):
        two_snapshots.fault(where, "sub-06/anat/sub-06_T1w.nii.gz", Fault(status=404), always=True)
    assert run(tmp_path, f"{NAMES[1]}:1.1.0").code == 3
    two_snapshots.always.clear()
    run(tmp_path, f"{NAMES[1]}:1.1.0")
    run(tmp_path, f"{NAMES[1]}:1.1.0", out="fresh")
    assert content(tmp_path / "slices") == content(tmp_path / "fresh")


@pytest.mark.parametrize("error", [
    NotNow("no memory left"), MemoryError(),
    RuntimeError("ITK ERROR: Image: Failed to allocate memory for image.")], ids=repr)
def test_want_of_memory_is_not_remembered_as_a_subjects_fault(error, server, tmp_path, monkeypatch):
    prepare = preprocessing_jobs.prepare

    def crowded(session, *arguments):
        if session.subject == "03":
            raise error
        return prepare(session, *arguments)

    monkeypatch.setattr(preprocessing_jobs, "prepare", crowded)
    result = run(tmp_path)
    assert result.code == 3 and "no memory left" in result.out
    monkeypatch.setattr(preprocessing_jobs, "prepare", prepare)
    run(tmp_path)
    assert "ds000001_sub-03" in {s["id"] for s in SliceStore(tmp_path / "slices").subjects}


def test_a_broken_gpu_ends_the_run_and_no_subject_is_blamed(server, tmp_path, monkeypatch):
    prepare = preprocessing_jobs.prepare

    def broken(session, *arguments):
        error = RuntimeError("CUDA error: an illegal memory access was encountered")
        raise brain.machine_fault(session.t1w, "deepbet", error)

    monkeypatch.setattr(preprocessing_jobs, "prepare", broken)
    result = run(tmp_path, NAMES[0])
    assert result.code == 1 and "the GPU failed at" in result.complaint
    monkeypatch.setattr(preprocessing_jobs, "prepare", prepare)
    assert run(tmp_path, NAMES[0]).code == 3  # sub-99 has one scan only
    assert len(SliceStore(tmp_path / "slices").subjects) == 6


def test_a_download_that_somebody_took_away_is_fetched_again(server, tmp_path, monkeypatch):
    prepare = preprocessing_jobs.prepare

    def cleaned(session, *arguments):
        if session.subject == "03":
            session.t2w.unlink()
        return prepare(session, *arguments)

    monkeypatch.setattr(preprocessing_jobs, "prepare", cleaned)
    assert "sub-03_T2w.nii.gz" in run(tmp_path, NAMES[0]).out
    monkeypatch.setattr(preprocessing_jobs, "prepare", prepare)
    run(tmp_path, NAMES[0])
    assert "ds000001_sub-03" in {s["id"] for s in SliceStore(tmp_path / "slices").subjects}


def test_a_person_of_two_datasets_is_stored_once_and_not_fetched_again(archive, tmp_path,
                                                                       monkeypatch):
    copy = tmp_path / "archive" / NAMES[1]
    shutil.copytree(archive / NAMES[0] / "sub-01", copy / "sub-01")
    (copy / "dataset_description.json").write_text("{}")
    with OpenNeuro({NAMES[0]: {"1.0.0": archive / NAMES[0]}, NAMES[1]: {"1.0.0": copy}}) as running:
        monkeypatch.setenv("OPENNEURO_API_URL", running.api_url)
        monkeypatch.setenv("OPENNEURO_S3_URL", running.s3_url)
        assert "ds000002_sub-01: same scan as ds000001_sub-01 (T1w)" in run(tmp_path).out
        before = content(tmp_path / "slices")
        running.log.clear()
        assert run(tmp_path).code == 3 and content(tmp_path / "slices") == before
        assert not [r for r in running.requests(place="s3") if "sub-" in r.name]
    assert "ds000002" not in {s["dataset"] for s in SliceStore(tmp_path / "slices").subjects}


def test_two_runs_do_not_share_downloads_that_they_would_delete(server, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "downloads" / NAMES[1]).mkdir(parents=True)
    with open(tmp_path / "downloads" / NAMES[1] / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
        result = run(tmp_path)
        assert result.code == 2 and "another preprocess.py downloads there" in result.complaint
        assert run(tmp_path, options=["--shard", "1/2"]).code == 3, "shards share"
        assert run(tmp_path, out="kept", options=["--keep-downloads"]).code == 3
    assert not server.requests(name="sub-99/anat/sub-99_T1w.nii.gz")


def test_one_shard_is_worked_on_by_one_process(archive, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    assert shard(archive, tmp_path / "out", "1/2").code == 3
    with open(tmp_path / "out" / "shards" / "1-of-2.lock") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert "another preprocess.py works on shard 1/2" in shard(
            archive, tmp_path / "out", "1/2").complaint
        assert shard(archive, tmp_path / "out", "2/2").code == 3


def test_the_store_cannot_lie_in_a_datasets_folder_of_downloads(server, tmp_path):
    result = run(tmp_path, NAMES[0], out=f"downloads/{NAMES[0]}")
    assert result.code == 2 and "is the folder of a dataset's downloads" in result.complaint


def test_what_is_stored_as_damaged_is_not_asked_for_again_and_again(archive, tmp_path, monkeypatch):
    bad = tmp_path / "archive" / NAMES[0]
    shutil.copytree(archive / NAMES[0], bad)
    scan = bad / "sub-02" / "anat" / "sub-02_T1w.nii.gz"
    scan.write_bytes(scan.read_bytes()[:-2000])  # and the server's length and MD5 are of that
    monkeypatch.setattr(preprocess, "Archive", lambda url: Archive(url, patience=Patience(
        first_wait_s=0.01)))
    with OpenNeuro({NAMES[0]: {"1.0.0": bad}}) as running:
        monkeypatch.setenv("OPENNEURO_API_URL", running.api_url)
        monkeypatch.setenv("OPENNEURO_S3_URL", running.s3_url)
        result = run(tmp_path, NAMES[0])
        assert len(running.requests(name="sub-02/anat/sub-02_T1w.nii.gz")) <= 9
    assert result.code == 3 and "cut off" in result.out
    assert len(SliceStore(tmp_path / "slices").subjects) == 5


def test_files_that_were_there_before_stay_and_ours_beside_them_go(server, archive, tmp_path):
    mine = tmp_path / "downloads" / NAMES[0] / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    mine.parent.mkdir(parents=True)
    shutil.copy(archive / NAMES[0] / "sub-01" / "anat" / mine.name, mine)
    for _ in range(2):
        assert run(tmp_path).code == 3
        assert scans(tmp_path) == [mine.name]


def test_subjects_that_fail_are_not_downloaded_again_by_the_same_settings(server, tmp_path):
    run(tmp_path, NAMES[0], out="all")
    sizes = {s["id"]: float(s["brain_ml"]) for s in SliceStore(tmp_path / "all").subjects}
    most = max(sizes.values()) - 1
    large = {name for name in sizes if sizes[name] > most}
    limit = ["--brain-ml", "800", str(most)]
    for again in (False, True):
        server.log.clear()
        result = run(tmp_path, NAMES[0], options=limit)
        reasons = {r["id"]: r["reason"] for r in
                   store.read_table(tmp_path / "slices" / "skipped.tsv")}
        assert result.code == 3 and reasons.keys() == {*large, "ds000001_sub-99"}
        assert all("brain mask has" in reasons[name] for name in large)
        assert bool(server.requests(place="s3")) != again
    result = run(tmp_path, NAMES[0])  # other limits: those who failed are fetched anew
    assert result.code == 3 and result.out.count("  done  ") == len(large) < len(sizes)
    assert large < {s["id"] for s in SliceStore(tmp_path / "slices").subjects}


def test_a_scan_that_nobody_has_costs_its_subject_only(server, tmp_path):
    for where in ("s3", "bare", "route"):
        server.fault(where, "sub-03/anat/sub-03_T2w.nii.gz", Fault(status=404), always=True)
    assert run(tmp_path).code == 3
    reasons = {r["id"]: r["reason"] for r in store.read_table(tmp_path / "slices" / "skipped.tsv")}
    assert "sub-03_T2w.nii.gz: " in reasons["ds000001_sub-03"]
    assert "HTTP 404" in reasons["ds000001_sub-03"]
    assert len(SliceStore(tmp_path / "slices").subjects) == 8
    server.always.clear()
    assert run(tmp_path).code == 3
    assert len(SliceStore(tmp_path / "slices").subjects) == 9


def test_a_scan_that_nobody_has_costs_its_session_only(server, tmp_path):
    for where in ("s3", "bare", "route"):
        server.fault(where, "sub-05/ses-b/anat/sub-05_ses-b_T2w.nii.gz", Fault(status=404),
                     always=True)
    assert run(tmp_path, NAMES[0]).code == 3
    reasons = {r["id"]: r["reason"] for r in store.read_table(tmp_path / "slices" / "skipped.tsv")}
    assert reasons.keys() == {"ds000001_sub-05_ses-b", "ds000001_sub-99"}
    assert len(SliceStore(tmp_path / "slices").subjects) == 5
    server.always.clear()
    server.log.clear()
    assert run(tmp_path, NAMES[0]).code == 3
    assert {r.name.rpartition("_")[0] for r in server.requests(place="s3")
            if r.name.endswith(".nii.gz")} == {"sub-05/ses-b/anat/sub-05_ses-b"}
    run(tmp_path, NAMES[0], out="fresh", options=["--downloads", str(tmp_path / "again")])
    assert content(tmp_path / "slices") == content(tmp_path / "fresh")


def test_list_prints_what_would_be_fetched_and_fetches_nothing(server, tmp_path):
    result = run(tmp_path, options=["--list"])
    assert result.code == 0
    assert "ds000001 1.0.0: 5 subjects, 13 files, " in result.out
    assert "  sub-05  4 files  " in result.out and "ds000002 1.0.0: 3 subjects" in result.out
    assert {r.place for r in server.log} == {"graphql"}
    assert not (tmp_path / "slices").exists() and not (tmp_path / "downloads").exists()


def test_limit_counts_subjects_over_all_datasets(server, archive, tmp_path):
    assert run(tmp_path, options=["--limit", "6"]).code == 0
    assert [s["id"] for s in SliceStore(tmp_path / "slices").subjects] == [
        "ds000001_sub-01", "ds000001_sub-02", "ds000001_sub-03", "ds000001_sub-04",
        "ds000001_sub-05_ses-a", "ds000001_sub-05_ses-b", "ds000002_sub-01"]
    disk = run_command(preprocess.main, "--bids", *(archive / name for name in NAMES), "--out",
                       tmp_path / "disk", *SMALL, "--brain-extraction", "none", "--limit", "6")
    assert disk.code == 0
    assert same(tmp_path / "slices", content(tmp_path / "disk"))
    server.log.clear()
    assert run(tmp_path, options=["--limit", "2"], out="two").code == 0
    assert [s["dataset"] for s in SliceStore(tmp_path / "two").header["sources"]] == ["ds000001"]


def test_several_workers_hold_a_bounded_number_of_subjects_on_disk(archive, tmp_path, monkeypatch,
                                                                   from_disk):
    most = 0
    finish = preprocess.Snapshots.arrivals

    def watched(*arguments):
        nonlocal most
        for arrival in finish(*arguments):
            # os.walk bears with folders that go while it looks, rglob does not
            on_disk = {Path(folder).relative_to(tmp_path / "downloads").parts[:2]  # a subject
                       for folder, _, files in os.walk(tmp_path / "downloads")
                       if any(name.endswith("w.nii.gz") for name in files)}
            most = max(most, len(on_disk))
            yield arrival

    monkeypatch.setattr(preprocess, "AHEAD", 2)
    monkeypatch.setattr(preprocess.Snapshots, "arrivals", watched)
    with serve(archive) as running:
        monkeypatch.setenv("OPENNEURO_API_URL", running.api_url)
        assert run(tmp_path, workers=2).code == 3
    assert 1 <= most <= 4
    assert same(tmp_path / "slices", from_disk)


@pytest.mark.parametrize("options, said", [
    (["--brain-extraction", "mask"], "OpenNeuro's raw datasets hold no masks"),
    (["--shard", "3/2"], "--shard 3/2: write k/n"),
    (["--shard", "0/2"], "--shard 0/2: write k/n"),
    (["--api-url", "ftp://x"], "--api-url ftp://x: not an address"),
    (["--val", "77"], "subject '77' of --val or --test is not there"),
    (["--val", "07", "--limit", "2"], "subject '07' of --val or --test is not there"),
    (["--tta"], "--tta: is HD-BET's"),
    (["--device", "cuda:99", "--brain-extraction", "deepbet"], "--device cuda:99: no such device"),
])
def test_wrong_options_are_refused_before_anything_is_downloaded(options, said, server, tmp_path):
    result = run(tmp_path, options=options)
    assert result.code == 2 and said in result.complaint
    assert not server.requests(place="s3") and not (tmp_path / "slices").exists()


@pytest.mark.parametrize("names, said", [
    (["ds1"], "not an OpenNeuro accession number"),
    (["ds000009"], "no such dataset"),
    (["ds000001:9.9.9"], "has no snapshot '9.9.9'; there are 1.0.0"),
    (["ds000001", "ds000001:1.0.0"], "ds000001 is named twice"),
])
def test_wrong_names_are_refused_in_one_line(names, said, server, tmp_path):
    result = run(tmp_path, *names)
    assert result.code == 2 and said in result.complaint
    assert not (tmp_path / "slices").exists() and not (tmp_path / "downloads").exists()


def test_an_archive_that_does_not_answer_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "Archive", lambda url: Archive(url, patience=Patience(
        attempts=2, first_wait_s=0.01)))
    result = run(tmp_path, options=["--api-url", "http://127.0.0.1:9/crn/graphql"])
    assert result.code == 1 and "check the network and --api-url" in result.complaint


# ------------------------------------------------------------------------------ faults and kills


def command(server, tmp_path, *options, workers=1, out="slices", downloads="downloads"):
    return subprocess.Popen(
        [sys.executable, "preprocess.py", "--datasets", *NAMES, "--api-url", server.api_url,
         "--out", str(tmp_path / out), "--downloads", str(tmp_path / downloads), *SMALL,
         "--brain-extraction", "none", "--workers", str(workers), *options],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENNEURO_S3_URL": server.s3_url})


def first_request(server, process):
    """Wait until a new process asks the archive for something; the time."""
    server.log.clear()
    while not server.log and process.poll() is None:
        time.sleep(0.01)
    return time.monotonic()


@pytest.mark.parametrize("seed", range(3))
def test_an_archive_full_of_faults_gives_the_same_bytes(seed, archive, tmp_path, from_disk):
    """A third of all requests fails: 503, 429, 404, HTML, JSON errors, cuts, wrong ETags."""
    with serve(archive, seed=seed) as server:
        for _ in range(5):  # a scan may be refused everywhere once; another run gets it
            process = command(server, tmp_path)
            out, err = process.communicate(timeout=120)
            assert process.returncode in (1, 3), out + err
            if process.returncode == 3 and "HTTP" not in out:
                break
    assert same(tmp_path / "slices", from_disk)


def test_killed_at_many_moments_the_next_run_ends_with_the_same_bytes(archive, tmp_path,
                                                                      from_disk):
    """SIGKILL on a slow line: in mid-download, in mid-slicing, between mark and deletion."""
    draws, kills = random.Random(0), 0
    with serve(archive, rate=300_000) as server:
        process = command(server, tmp_path, out="undisturbed", downloads="other")
        begun = first_request(server, process)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 3, out + err
        seconds = time.monotonic() - begun
        for _ in range(8):
            process = command(server, tmp_path, workers=draws.choice((1, 2)))
            first_request(server, process)  # a busy machine takes long to start a process
            time.sleep(draws.uniform(0, 0.3) * seconds)
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=60)
            kills += process.returncode == -signal.SIGKILL
        assert kills > 2
        process = command(server, tmp_path, workers=2)
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (3, ""), out
    assert content(tmp_path / "slices") == content(tmp_path / "undisturbed")
    assert same(tmp_path / "slices", from_disk)
    assert scans(tmp_path) == []
    assert not list((tmp_path / "downloads").rglob("*.part*"))


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
import preprocess
from drawn_once import drawn_once

root, command = sys.argv[1], sys.argv[2:]
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")

def build(folder):
    return preprocess.main([*command, "--out", os.path.join(folder, "slices"),
                            "--downloads", os.path.join(folder, "downloads")])

def attempt(name, at):
    '''Run in a child that is killed before its at-th change to a file.'''
    child = os.fork()
    if not child:
        count = 0
        folder = os.path.join(root, name)
        os.mkdir(folder) if not os.path.isdir(folder) else None
        def watch(event, args):
            nonlocal count
            changes = event in WRITES or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
            if changes and str(args[0]).startswith(folder):
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        os._exit(build(folder))
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

with drawn_once():
    build(os.path.join(root, "first"))  # every child finds its contact sheet drawn
    at, killed = 0, True
    while killed:
        at += 1
        killed = attempt(f"killed-at-{at:03d}", at)
        attempt(f"killed-at-{at:03d}", 0)
    at = 1
    while attempt("killed-again-and-again", at):
        at += 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_before_any_write_the_next_run_ends_with_the_same_bytes(archive, server, tmp_path):
    """SIGKILL before each file is opened to write, renamed or removed: downloads and store."""
    options = [*SMALL, "--brain-extraction", "none", "--workers", "0", "--limit", "1"]
    subprocess.run([sys.executable, "-c", KILLED, tmp_path, "--datasets", NAMES[1], *options],
                   cwd=ROOT, check=True, timeout=400, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    run(tmp_path, NAMES[1], options=["--limit", "1"], out="undisturbed")
    wanted = content(tmp_path / "undisturbed")
    trials = sorted(tmp_path.glob("killed-*"))
    assert len(trials) > 40
    for trial in trials:
        assert content(trial / "slices") == wanted, trial.name
        left = {p.name for p in (trial / "downloads").rglob("*") if p.is_file()}
        assert left == {"dataset_description.json", "manifest.json", ".lock"}, trial.name


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_download_says_one_line_and_goes_on(how, archive, tmp_path, from_disk):
    with serve(archive, rate=150_000) as server:
        process = command(server, tmp_path, workers=2)
        while not server.sent(place="s3"):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(how)
        begun = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - begun < 10
        assert process.returncode == 1
        assert err.splitlines() == ["stopped; the same command goes on from here"]
        server.rate = None
        process = command(server, tmp_path, workers=2)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 3, out + err
    assert same(tmp_path / "slices", from_disk)


# ----------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("where", ["one-folder", "a-folder-each"])
def test_shards_side_by_side_give_the_bytes_of_one_run(where, archive, tmp_path, from_disk):
    outs = ["slices"] * 3 if where == "one-folder" else ["s1", "s2", "s3"]
    downloads = ["downloads"] * 3 if where == "one-folder" else outs
    with serve(archive) as server:
        shards = [command(server, tmp_path, "--shard", f"{k}/3", out=out, downloads=f"d{folder}")
                  for k, (out, folder) in enumerate(zip(outs, downloads), start=1)]
        for process in shards:
            out, err = process.communicate(timeout=120)
            assert (process.returncode, err) == (3, ""), out
            assert "--merge" in out
        fetched = [r.name for r in server.requests(place="s3") if "sub-" in r.name]
        assert len(fetched) == 2 * 9, "each scan by one shard"
    folders = [] if where == "one-folder" else [tmp_path / out for out in outs]
    result = run_command(preprocess.main, "--merge", *folders, "--out", tmp_path / "slices")
    assert (result.code, result.err) == (3, "")
    assert same(tmp_path / "slices", from_disk)


@pytest.fixture(scope="module")
def two_shards(archive, tmp_path_factory):
    """Both shards of the trees in a folder each, not merged."""
    folders = [tmp_path_factory.mktemp("shards") / f"part{k}" for k in (1, 2)]
    for k, folder in enumerate(folders, start=1):
        assert shard(archive, folder, f"{k}/2").code == 3
    return folders


def shard(archive, out, which, *options):
    return run_command(preprocess.main, "--bids", *(archive / name for name in NAMES), "--shard",
                       which, "--out", out, *SMALL, "--brain-extraction", "none", "--workers", 0,
                       *options)


def merge(out, *folders):
    return run_command(preprocess.main, "--merge", *folders, "--out", out)


def copies(folders, tmp_path):
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders]


def test_a_merge_takes_exactly_what_the_shards_recorded(two_shards, tmp_path, from_disk):
    assert merge(tmp_path / "out", *two_shards).code == 3
    assert content(tmp_path / "out") == from_disk
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert merge(tmp_path / "out", *two_shards).code == 3, "again, with nothing to do"
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


def test_a_merge_without_all_shards_says_which_are_missing(two_shards, tmp_path):
    result = merge(tmp_path / "out", two_shards[1])
    assert result.code == 2 and "shards 1 of 2 are not through" in result.complaint
    result = merge(tmp_path / "out", tmp_path)
    assert result.code == 2 and "no shard has finished there" in result.complaint
    assert not (tmp_path / "out").exists()


def test_shards_of_other_subjects_methods_or_snapshots_are_refused(
        archive, two_snapshots, tmp_path):
    def part(which, *options, names=NAMES):
        return run_command(preprocess.main, "--bids", *(archive / name for name in names), "--out",
                           tmp_path / "out", *SMALL, "--workers", 0, "--shard", which,
                           "--brain-extraction", "none", *options)

    for options, other in ((["--limit", "4"], {}), (["--brain-ml", "700", "2100"], {}),
                           ([], {"names": NAMES[:1]})):
        assert part("1/2").code == 3
        assert part("2/2", *options, **other).code in (0, 3)
        result = merge(tmp_path / "out")
        assert result.code == 2 and "run all shards with the same options" in result.complaint
    for k, tag in ((1, "1.0.0"), (2, "1.1.0")):
        run(tmp_path, f"{NAMES[1]}:{tag}", options=["--shard", f"{k}/2"], out="tags")
    result = merge(tmp_path / "tags")
    assert result.code == 2 and "run all shards with the same options" in result.complaint


def test_a_merge_that_was_killed_while_it_tidied_up_is_done(two_shards, tmp_path, from_disk):
    out = copies(two_shards, tmp_path)[0]
    assert merge(out, out, two_shards[1]).code == 3
    assert content(out) == from_disk
    (out / "shards.packed").mkdir()
    (out / "shards.packed" / "2-of-2.json").write_text("{}")
    result = merge(out)
    assert result.code == 0 and "nothing to merge" in result.out
    assert content(out) == from_disk


def test_a_lost_part_is_named_and_the_shard_makes_it_again(archive, two_shards, tmp_path,
                                                           from_disk):
    folders = copies(two_shards, tmp_path)
    (folders[0] / "parts" / "ds000001_sub-03.npz").unlink()
    result = merge(tmp_path / "out", *folders)
    assert result.code == 2
    assert "no part of ds000001_sub-03; run its shard again" in result.complaint
    again = shard(archive, folders[0], "1/2")
    assert again.code == 3 and again.out.count("  done  ") == 1
    assert merge(tmp_path / "out", *folders).code == 3
    assert content(tmp_path / "out") == from_disk


def test_shards_of_different_options_or_jobs_do_not_mix(archive, two_shards, tmp_path):
    folders = copies(two_shards, tmp_path)
    shard(archive, folders[1], "2/2", "--test", "06")
    result = merge(tmp_path / "out", *folders)
    assert result.code == 2 and "run all shards with the same options" in result.complaint
    shard(archive, folders[1], "1/3")
    result = merge(tmp_path / "out", *folders)
    assert result.code == 2 and "has shards of 2 and of 3" in result.complaint
    (folders[0] / "shards" / "1-of-2.json").write_text("{")
    result = merge(tmp_path / "out", folders[0])
    assert result.code == 2 and "1-of-2.json: not a shard's record" in result.complaint


def test_shards_add_to_a_store_as_one_run_does(archive, tmp_path):
    """The store grows by shards to what it grows to by one run."""
    for out in ("one", "many"):
        assert run_command(preprocess.main, "--bids", archive / NAMES[1], "--out", tmp_path / out,
                           *SMALL, "--brain-extraction", "none", "--workers", 0).code == 3
    assert run_command(preprocess.main, "--bids", archive / NAMES[0], "--out", tmp_path / "one",
                       *SMALL, "--brain-extraction", "none", "--workers", 0).code == 3
    for k in (2, 1):
        assert run_command(preprocess.main, "--bids", archive / NAMES[0], "--out",
                           tmp_path / "many", *SMALL, "--brain-extraction", "none", "--workers", 0,
                           "--shard", f"{k}/2").code == 3
    assert merge(tmp_path / "many").code == 3
    assert content(tmp_path / "many") == content(tmp_path / "one")


def test_more_shards_than_subjects_leave_some_without_work(archive, tmp_path, from_disk):
    for k in range(1, 12):
        assert shard(archive, tmp_path / "out", f"{k}/11").code == 3
    assert merge(tmp_path / "out").code == 3
    assert content(tmp_path / "out") == from_disk


def test_a_shard_does_not_write_into_a_store_that_is_being_packed(archive, two_shards, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    folder = copies(two_shards, tmp_path)[0]
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert "another preprocess.py is writing" in shard(archive, folder, "1/2").complaint
        fcntl.flock(handle, fcntl.LOCK_SH)  # another shard
        assert shard(archive, folder, "1/2").code == 3
        assert "another preprocess.py is writing" in merge(folder).complaint
    finally:
        os.close(handle)


def test_whole_heads_over_the_archive_register_as_from_disk(tmp_path, monkeypatch):
    """With a given network in place of none: T2w moved, so masks and registration take part."""
    pytest.importorskip("deepbet")
    tree = tmp_path / "archive" / NAMES[0]
    write_pair(tree, "01", shape=(38, 46, 34), spacing=5, extracted=False,
               matrix=rigid((0, 2, 1), (1, 2, 1)))
    options = [*SMALL, "--brain-extraction", "deepbet", "--device", "cpu", "--workers", "0",
               "--brain-ml", "300", "4000"]
    with OpenNeuro({NAMES[0]: {"1.0.0": tree}}) as running:
        monkeypatch.setenv("OPENNEURO_API_URL", running.api_url)
        run_command(preprocess.main, "--datasets", NAMES[0], "--downloads", tmp_path / "downloads",
                    "--keep-downloads", "--out", tmp_path / "slices", *options)
    run_command(preprocess.main, "--bids", tmp_path / "downloads" / NAMES[0], "--out",
                tmp_path / "again", *options)
    assert content(tmp_path / "slices") == content(tmp_path / "again")
