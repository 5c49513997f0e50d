"""data/download.py: every file whole or absent whatever the archive does, and no disk filled."""

import contextlib
import gzip
import hashlib
import json
import logging
import random
import socket
import subprocess
import threading
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

pytest.importorskip("graphql", reason="the local server needs graphql-core")

from data import bids  # noqa: E402
from data.download import Download  # noqa: E402
from data.openneuro import Archive, make_plan  # noqa: E402
from data.transfer import ArchiveError, Patience, Refused, Unreachable  # noqa: E402
from openneuro_server import Fault, OpenNeuro  # noqa: E402
from small_archive import (DATASET, QUICK, T1W, T2W, assert_whole_or_absent,  # noqa: E402
                           data_files, fetch, listed, wanted, write_scan)
from small_archive import (crowd_fixture, other_tree_fixture,  # noqa: E402, F401
                           quiet_environment_fixture, scan_server_fixture, scans_fixture,
                           server_fixture, tree_fixture)


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


# ------------------------------------------------------------------------------------- streaming


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
