"""Downloads that are cut, stopped or killed, and go on; several at a time."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

pytest.importorskip("graphql", reason="the local server needs graphql-core")

from data import openneuro  # noqa: E402
from data.download import Download  # noqa: E402
from data.manifest import Manifest  # noqa: E402
from data.openneuro import Archive, make_plan  # noqa: E402
from data.transfer import ArchiveError  # noqa: E402
from openneuro_server import Fault, Hold, OpenNeuro  # noqa: E402
from small_archive import (DATASET, QUICK, ROOT, T1W, T2W, assert_whole_or_absent,  # noqa: E402
                           data_files, fetch, wanted)
from small_archive import (crowd_fixture, other_tree_fixture,  # noqa: E402, F401
                           quiet_environment_fixture, server_fixture, tree_fixture)


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
    first, second = Manifest(tmp_path, "1.0.0"), Manifest(tmp_path, "1.0.0")
    first.update(lambda content: content["files"].update(a={"size": 1}))
    second.update(lambda content: content["files"].update(b={"size": 2}))
    third = Manifest(tmp_path, "1.0.0")
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
    first, second = Manifest(tmp_path, "1.0.0"), Manifest(tmp_path, "1.0.0")
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
    monkeypatch.setattr("data.manifest.SYNC_EVERY_S", 60)
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
