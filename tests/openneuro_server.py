"""A small OpenNeuro on loopback that can be told to misbehave; real HTTP, a real GraphQL engine.

The schema is the part of OpenNeuro's that `data/openneuro.py` uses. Files are served at three
places, as by the archive: storage with a version (`s3`: Range, If-Range, ETag = MD5), storage's
present version (`bare`), and the API's file route (`route`: no Range, no ETag).

    python tests/openneuro_server.py ds000001:1.0.0=FOLDER [...] --port 8000 [--faults SEED]

With `--faults` a third of all requests fail in some way, at random; `--rate` is shared by all
connections, for timings as over a network.
"""

import argparse
import functools
import hashlib
import json
import random
import re
import ssl
import threading
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from graphql import GraphQLError, GraphQLScalarType, build_schema, graphql_sync

SCHEMA = """
scalar BigInt
type Query {
  dataset(id: ID!): Dataset
  snapshot(datasetId: ID!, tag: String!): Snapshot
}
type Dataset { id: ID! latestSnapshot: Snapshot snapshots: [Snapshot] }
type Snapshot { id: ID! tag: String! size: BigInt files(RECURSIVE tree: String): [DatasetFile] }
type DatasetFile {
  id: ID! filename: String! size: BigInt annexed: Boolean urls: [String] directory: Boolean
}
"""


@dataclass
class Fault:
    """How one answer goes wrong. Fields that stay None do not."""

    status: int | None = None  # answer with this status and a short text
    headers: dict = field(default_factory=dict)  # added, or put in place of the right ones
    body: bytes | None = None  # in place of the right one
    cut: int | None = None  # close the connection after so many bytes of the body
    drip: float | None = None  # seconds to wait after each `drip_bytes`
    drip_bytes: int = 1
    ignore_range: bool = False
    segment: int | None = None  # answer a Range with so many bytes at most
    redirect: str | None = None
    hold: "Hold | None" = None  # stop after some bytes until the test lets go


class Hold:
    """A point in a body at which the server waits: `reached` is set there, `go` lets it go on."""

    def __init__(self, at):
        self.at, self.reached, self.go = at, threading.Event(), threading.Event()


@dataclass
class Request:
    """One line of the server's log."""

    place: str  # graphql, s3, bare, route
    name: str
    range: str | None
    status: int = 0
    sent: int = 0  # bytes of body
    client: tuple = ()


class OpenNeuro:
    """The server; a context manager.

    `datasets` maps an id to {tag: folder}, the last tag being the latest. Faults are queued per
    (place, name) in `faults`, one an answer, and those in `always` never end. `edit(entry, name)`
    may change any entry of a listing.
    """

    def __init__(self, datasets, *, recursive=True, folders_too=False, annex=False, tls=None,
                 edit=None, port=0, seed=None, rate=None):
        self.datasets = {d: {t: Path(p) for t, p in tags.items()} for d, tags in datasets.items()}
        self.recursive, self.folders_too, self.annex, self.edit = (recursive, folders_too, annex,
                                                                   edit)
        self.faults, self.always, self.log = defaultdict(deque), {}, []
        self.rng = random.Random(seed) if seed is not None else None
        self.lock, self.rate, self.free_at = threading.Lock(), rate, 0.0  # bytes a second
        self.schema = self._schema()
        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.archive = self
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # clients that go away are what this is for
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.http.server_address[1]}"
        self.api_url, self.s3_url = f"{self.url}/crn/graphql", f"{self.url}/s3"
        self._thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def fault(self, place, name, *faults, always=False):
        """Queue faults for a file (or for "graphql", ""), or set the one that never ends."""
        if always:
            self.always[place, name] = faults[0]
        else:
            self.faults[place, name].extend(faults)

    def next_fault(self, place, name):
        with self.lock:
            if self.faults[place, name]:
                return self.faults[place, name].popleft()
            if self.rng and self.rng.random() < 1 / 3:
                return self._draw(place)
            return self.always.get((place, name), Fault())

    def _draw(self, place):
        if place == "graphql":
            return self.rng.choice([Fault(status=503), Fault(status=502), Fault(
                body=json.dumps({"errors": [{"message": "fetch failed"}], "data": None}).encode())])
        return self.rng.choice([
            Fault(status=503), Fault(status=429, headers={"Retry-After": "0"}), Fault(status=404),
            Fault(cut=self.rng.randrange(4_000_000)), Fault(cut=0), Fault(ignore_range=True),
            Fault(body=b"<html>sorry</html>"), Fault(body=b'{"error": "an unknown error"}'),
            Fault(headers={"ETag": f'"{"0" * 32}"'}), Fault(body=b"")])

    def take_turn(self, n):
        """Wait until `n` more bytes are within the rate."""
        if self.rate:
            with self.lock:
                self.free_at = max(self.free_at, time.monotonic() - 0.05) + n / self.rate
                wait = self.free_at - time.monotonic()
            time.sleep(max(wait, 0))

    def sent(self, name=None, place=None):
        """Bytes of body sent (of a file, from a place)."""
        return sum(r.sent for r in self.log if r.place != "graphql"
                   and name in (None, r.name) and place in (None, r.place))

    def requests(self, name=None, place=None):
        return [r for r in self.log if name in (None, r.name) and place in (None, r.place)]

    # -- listing

    def _schema(self):
        schema = build_schema(SCHEMA.replace("RECURSIVE",
                                             "recursive: Boolean" if self.recursive else ""))
        scalar = schema.type_map["BigInt"]
        assert isinstance(scalar, GraphQLScalarType)
        scalar.serialize = lambda value: value  # numbers and strings, right or wrong
        schema.query_type.fields["dataset"].resolve = lambda _, info, id: self._dataset(id)
        schema.query_type.fields["snapshot"].resolve = (
            lambda _, info, datasetId, tag: self._snapshot(datasetId, tag))
        schema.type_map["Snapshot"].fields["files"].resolve = self._files
        return schema

    def _dataset(self, dataset):
        tags = self.datasets.get(dataset)
        if tags is None:
            return None
        found = [self._snapshot(dataset, tag) for tag in tags]
        return {"id": dataset, "latestSnapshot": found[-1] if found else None, "snapshots": found}

    def _snapshot(self, dataset, tag):
        if tag not in self.datasets.get(dataset, {}):
            raise GraphQLError("Not Found", extensions={"code": "INTERNAL_SERVER_ERROR"})
        return {"id": f"{dataset}:{tag}", "tag": tag, "size": None, "dataset": dataset}

    def _files(self, snapshot, info, recursive=False, tree=None):
        dataset, tag = snapshot["dataset"], snapshot["tag"]
        root = self.datasets[dataset][tag]
        folder = root
        if tree:
            folder = next((p for p in root.rglob("*") if p.is_dir() and _tree_id(root, p) == tree),
                          None)
            if folder is None:
                raise GraphQLError("Not Found")
        found = sorted(folder.rglob("*") if recursive else folder.iterdir())
        entries = [self._entry(dataset, tag, root, folder, path) for path in found
                   if path.is_file() or not recursive or self.folders_too]
        return [e for entry in entries for e in self._edited(entry)]

    def _edited(self, entry):
        if not self.edit:
            return [entry]
        changed = self.edit(entry)
        return changed if isinstance(changed, list) else [changed]

    def _entry(self, dataset, tag, root, folder, path):
        name = path.relative_to(root).as_posix()
        shown = path.relative_to(folder).as_posix()
        if path.is_dir():
            return {"id": _tree_id(root, path), "filename": shown, "size": 0, "urls": [],
                    "directory": True, "annexed": False}
        content = path.read_bytes()
        key = hashlib.sha1(content + name.encode()).hexdigest()
        if self.annex and path.suffix == ".gz":
            key = f"MD5E-s{len(content)}--{hashlib.md5(content).hexdigest()}.nii.gz"
        return {"id": key, "filename": shown, "size": len(content), "directory": False,
                "annexed": self.annex,
                "urls": [f"{self.s3_url}/{dataset}/{quote(name)}?versionId=v{tag}"]}

    # -- files

    def find(self, url):
        """(place, name, path) of an address, path None where there is no such file."""
        parts = urlsplit(url)
        path = unquote(parts.path)
        if path == "/crn/graphql":
            return "graphql", "", None
        if match := re.fullmatch(r"/s3/([^/]+)/(.+)", path):
            tags = self.datasets.get(match[1], {})
            version = parse_qs(parts.query).get("versionId", [""])[0]
            root = tags.get(version[1:]) if version else next(reversed(tags.values()), None)
            return "s3" if version else "bare", match[2], root and root / match[2]
        if match := re.fullmatch(r"/crn/datasets/([^/]+)/snapshots/([^/]+)/files/(.+)", path):
            root = self.datasets.get(match[1], {}).get(match[2])
            name = match[3].replace(":", "/")
            return "route", name, root and root / name
        return "other", path, None


@functools.lru_cache(maxsize=64)
def _load(path, mtime_ns):
    """Content and MD5 of a file; kept, so that timings are not the server's reading and hashing."""
    content = path.read_bytes()
    return content, hashlib.md5(content).hexdigest()


def _tree_id(root, path):
    return hashlib.sha1(f"tree {path.relative_to(root)}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers as the archive of its HTTP server does, faults included."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_POST(self):
        text = self.rfile.read(int(self.headers["Content-Length"]))
        fault = self.begin("graphql", "")
        if fault.status:
            return self.answer(fault.status, fault.body or b"sorry", fault)
        asked = json.loads(text)
        found = graphql_sync(self.server.archive.schema, asked["query"],
                             variable_values=asked.get("variables"))
        answer = dict(found.formatted)
        if found.data is None and found.errors and not found.errors[0].path:
            for error in answer["errors"]:
                error["extensions"] = {"code": "GRAPHQL_VALIDATION_FAILED"}
            return self.answer(400, json.dumps(answer).encode(), fault, "application/json")
        body = fault.body if fault.body is not None else json.dumps(answer).encode()
        self.answer(200, body, fault, "application/json")

    def do_GET(self):
        place, name, path = self.server.archive.find(self.path)
        fault = self.begin(place, name)
        if fault.redirect:
            return self.answer(302, b"", Fault(headers={"Location": fault.redirect}))
        if fault.status:
            return self.answer(fault.status, fault.body or b"sorry", fault)
        if path is None or not path.is_file():
            return self.answer(404, b'{"error": "file not found"}', fault, "application/json")
        content, digest = _load(path, path.stat().st_mtime_ns)
        if fault.body is not None:
            content, digest = fault.body, hashlib.md5(fault.body).hexdigest()
        etag = fault.headers.get("ETag", f'"{digest}"')
        headers = {} if place == "route" else {"ETag": etag, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        fresh = self.headers.get("If-Range", etag) == etag
        if wanted and fresh and place != "route" and not fault.ignore_range:
            start = int(wanted[1])
            if start >= len(content):
                headers["Content-Range"] = f"bytes */{len(content)}"
                return self.answer(416, b"", Fault(headers=headers))
            body = content[start:][:fault.segment]
            headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{len(content)}"
            return self.answer(206, body, fault, headers=headers)
        self.answer(200, content, fault, headers=headers)

    def begin(self, place, name):
        self.record = Request(place, name, self.headers.get("Range"),
                              client=self.client_address)
        with self.server.archive.lock:
            self.server.archive.log.append(self.record)
        return self.server.archive.next_fault(place, name)

    def answer(self, status, body, fault, kind="application/octet-stream", headers=None):
        self.record.status = status
        sent = {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {}),
                **fault.headers}
        self.send_response(status)
        for key, value in sent.items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        if sent["Content-Length"] != str(len(body)):
            self.close_connection = True
        if fault.hold:
            self.wfile.flush()
            self.send(body[:fault.hold.at])
            fault.hold.reached.set()
            fault.hold.go.wait(60)
            body = body[fault.hold.at:]
        if fault.cut is not None and fault.cut < len(body):
            self.send(body[:fault.cut])
            self.close_connection = True
            return
        if fault.drip is not None:
            for start in range(0, len(body), fault.drip_bytes):
                self.send(body[start:start + fault.drip_bytes])
                time.sleep(fault.drip)
            return
        self.send(body)

    def send(self, body):
        """In pieces, so that the log tells how far a client came that went away."""
        for start in range(0, len(body), 1 << 18):
            piece = body[start:start + (1 << 18)]
            self.server.archive.take_turn(len(piece))
            self.wfile.write(piece)
            self.wfile.flush()
            self.record.sent += len(piece)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("snapshots", nargs="+", metavar="ID:TAG=FOLDER")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--faults", type=int, metavar="SEED")
    parser.add_argument("--rate", type=float, metavar="MB_PER_SECOND")
    args = parser.parse_args()
    datasets = defaultdict(dict)
    for text in args.snapshots:
        spec, _, folder = text.partition("=")
        dataset, _, tag = spec.partition(":")
        datasets[dataset][tag] = folder
    rate = args.rate * 1e6 if args.rate else None
    with OpenNeuro(datasets, port=args.port, seed=args.faults, rate=rate) as server:
        print(f"OPENNEURO_API_URL={server.api_url}\nOPENNEURO_S3_URL={server.s3_url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
