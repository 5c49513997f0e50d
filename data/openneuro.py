"""OpenNeuro: list a snapshot, choose its T1w and T2w, download them whole or not at all.

Owns the transfer of a file (retries, resume, what counts as whole), the archive's protocol (GraphQL
listing, names, addresses of a file) and `manifest.json` beside the data. Which scans belong
together is decided by `data/bids.py`; nothing here opens a volume beyond its header.

How the archive answers was read in its server's source (github.com/OpenNeuroOrg/openneuro:
`datalad/files.ts`, `handlers/datalad.ts`, `docs/api.md`) and in its users' reports, numbered where
they decided something: OpenNeuroOrg/openneuro#N.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import math
import os
import queue
import random
import re
import shutil
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx
import nibabel as nib
from tqdm import tqdm

from data import bids
from data.store import write_atomically

API_URL = "https://openneuro.org/crn/graphql"
S3_URL = "https://s3.amazonaws.com/openneuro.org"
API_VARIABLE, S3_VARIABLE = "OPENNEURO_API_URL", "OPENNEURO_S3_URL"
# Pinned, so that the same command gives the same data next year.
DEFAULT_TAGS = {"ds002330": "1.1.0", "ds002382": "1.0.1", "ds003717": "1.0.1",
                "ds003745": "1.0.0", "ds004285": "1.0.0"}
MANIFEST = "manifest.json"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, a limit on files

_SPEC = re.compile(r"(ds\d{6})(?::([A-Za-z0-9][A-Za-z0-9._-]*))?")
_FIELDS = "{ id filename size urls directory }"
_TREES_A_QUERY = 20  # each costs the server a look into git
# Folders in which T1w, T2w and their sidecars can be; also what bounds the walk.
_FOLDER = re.compile(r"sub-[^/]+(/ses-[^/]+)?(/anat)?")
_ANAT = re.compile(r"sub-([A-Za-z0-9+]+)/(?:ses-([A-Za-z0-9+]+)/)?anat/([^/]+)")
_COMMON = re.compile(r"dataset_description\.json|participants\.tsv|(README|CHANGES)(\.\w+)?")
_FINAL_CODES = {"GRAPHQL_VALIDATION_FAILED", "GRAPHQL_PARSE_FAILED", "BAD_USER_INPUT", "FORBIDDEN",
                "UNAUTHENTICATED"}
_FINAL_MESSAGE = re.compile("not found|do(es)? not (exist|have access)|cannot query|unknown arg"
                            "|not authorized|deleted", re.IGNORECASE)
_PAGE = re.compile(rb"\s*<(!doctype|html|head|\?xml)", re.IGNORECASE)
_GZIP = 31  # zlib's wbits: a gzip header, and the CRC checked
_TEXT = 1 << 20  # longer texts are not parsed
_PROGRESS = 1 << 16  # bytes that make a failed try worth another one
_SLOWEST = 1024  # bytes a second; below it a connection counts as dead
# git-annex names a file by its content: MD5E-s5898546--9bcc318b66c4da5e479b33e9451ec5e1.nii.gz
_ANNEX_KEY = re.compile(r"(MD5|SHA256)E?-s\d+--([0-9a-f]{64}|[0-9a-f]{32})(?![0-9a-f])")

log = logging.getLogger("preprocess.openneuro")  # the command that shows what this module says
T = TypeVar("T")


@dataclass(frozen=True)
class File:
    """A file of a snapshot.

    Attributes
    ----------
    name : path below the dataset's folder, with `/`
    id : the archive's id, often the content's git-annex key
    size : bytes as the API has them, None where it is silent; not to be relied upon
    urls : where the API says it is, may be empty
    """

    name: str
    id: str = ""
    size: int | None = None
    urls: tuple[str, ...] = ()

    @property
    def digest(self) -> tuple[str, str] | None:
        """("md5" or "sha256", hex digest) of this very version, where the API gives its key."""
        found = next(filter(None, map(_ANNEX_KEY.search, (self.id, *self.urls))), None)
        return (found.group(1).lower(), found.group(2)) if found else None


@dataclass(frozen=True)
class Patience:
    """How long to bear with a server. Times are seconds.

    Attributes
    ----------
    attempts : tries in a row that bring nothing new before an address is given up
    first_wait_s, longest_wait_s : the wait doubles from the first to the longest (each shortened by
        up to half, at random); a server that asks for more than the longest ends the run
    connect_s : until somebody answers
    silence_s : without a byte, or under 1 kB/s for so long, a connection counts as dead
    listing_s : for an answer of the API, which may take minutes over a large dataset
    """

    attempts: int = 6
    first_wait_s: float = 1
    longest_wait_s: float = 300
    connect_s: float = 15
    silence_s: float = 30
    listing_s: float = 180


class ArchiveError(OSError):
    """The archive does not answer as it should; the same command may do better later."""


class Retry(Exception):
    """This try failed, the next may not; `wait_s` is what the server asks for."""

    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.wait_s = wait_s


class Refused(Exception):
    """This address will not give the file."""


class Unreachable(Refused):
    """Nobody answers at this address."""


class Stopped(Exception):
    """The run ends; leave everything as it is."""


class Damaged(ValueError):
    """A body that is not the file."""


# ----------------------------------------------------------------------------------- one request


def is_passing(status: int) -> bool:
    """Whether an HTTP status is likely to be another one soon."""
    return status in (408, 425, 429) or status >= 500 and status not in (501, 505)


def retry_after(response: httpx.Response) -> float | None:
    """Seconds that a server asks to wait, from a number or a date; None if it does not."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=timezone.utc)
    return max((when - datetime.now(timezone.utc)).total_seconds(), 0.0)


@dataclass(frozen=True)
class Line:
    """The connections that all requests share, and how long to bear with them."""

    client: httpx.Client
    patience: Patience
    secure: bool  # refuse all but https
    stop: threading.Event

    def persist(self, attempt: Callable[[], T], size: Callable[[], int] = lambda: 0) -> T:
        """Try until it works, or until several tries in a row have brought nothing.

        Parameters
        ----------
        attempt : what to try
        size : bytes there are; a try that failed after many more is not held against the server

        Raises
        ------
        Refused : given up (Unreachable where nobody answered)
        ArchiveError : the server asks to stay away for longer than patience lasts
        Stopped : while waiting
        """
        tries = 0
        while True:
            before = size()
            try:
                return attempt()
            except (Retry, httpx.TransportError) as error:
                tries = 1 if size() - before >= _PROGRESS else tries + 1
                if tries >= self.patience.attempts:
                    nobody = isinstance(error, (httpx.ConnectError, httpx.TimeoutException))
                    raise (Unreachable if nobody else Refused)(
                        f"{_why(error)} ({tries} tries)") from error
                if self.stop.wait(self._wait(tries, getattr(error, "wait_s", None))):
                    raise Stopped from None

    def _wait(self, tries: int, asked: float | None) -> float:
        """Seconds before the next try."""
        longest = self.patience.longest_wait_s
        if asked is None:  # jitter, so that clients that failed together do not return together
            doubled = self.patience.first_wait_s * 2 ** (tries - 1)
            return min(doubled, longest) * random.uniform(0.5, 1)
        if asked > longest:
            raise ArchiveError(f"the archive asks to come back in {asked:.0f} s; run the same "
                               "command then") from None
        return asked

    @contextlib.contextmanager
    def get(self, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """Open an address, following redirects, never from https to http."""
        for _ in range(6):
            scheme = urlsplit(url).scheme
            if scheme not in ("https", "http") or self.secure and scheme != "https":
                raise Refused(f"leads to {bare(url)}, which is not https")
            with self.client.stream("GET", url, headers=headers) as response:
                if response.next_request is None:
                    yield response
                    return
                url = str(response.next_request.url)
        raise Refused("redirected more than 5 times")


def _why(error: Exception) -> str:
    """A reason for people from an exception of httpx, whose text may be empty."""
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    return str(error) or type(error).__name__


def bare(url: str) -> str:
    """An address without its signature, which is nobody else's business; the version stays."""
    parts = urlsplit(url)
    version = re.search(r"(?:^|&)(versionId=[^&]*)", parts.query)
    return f"{parts.scheme}://{parts.netloc}{parts.path}" + (f"?{version[1]}" if version else "")


# ---------------------------------------------------------------------------------- what is whole


class Checker:
    """Judge a file by its bytes as they come: is it what its name says?

    Decompressing and hashing while the network is waited for costs no time of its own. A NIfTI file
    is whole if all of it decompresses, its gzip CRC fits, its header loads and as many voxels
    follow as that says; JSON must be JSON; nothing may be a web page or the API's `{"error": ...}`.

    Raises
    ------
    Damaged : from `feed` as soon as it shows, else from `finish`
    """

    def __init__(self, name: str):
        self.name, self.size = name, 0
        self._md5, self._sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
        self._unpacker = zlib.decompressobj(_GZIP) if name.endswith(".gz") else None
        self._is_nifti = name.endswith((".nii", ".nii.gz"))
        self._start, self._head, self._length = b"", b"", 0  # of the file; of what is packed in it

    def feed(self, block: bytes) -> None:
        """Take the next bytes, of any number."""
        self.size += len(block)
        self._md5.update(block)
        self._sha256.update(block)
        self._start += block[:max((64 if self._is_nifti else _TEXT) - len(self._start), 0)]
        try:
            for plain in self._unpack(block):
                self._length += len(plain)
                self._head += plain[:540 - len(self._head)]
        except zlib.error as error:
            self._refuse_page()
            raise Damaged(f"damaged ({error})") from None

    def finish(self) -> dict[str, Any]:
        """Judge the whole; returns {"size": bytes, "md5": hex, "sha256": hex}."""
        self._refuse_page()
        if self._is_nifti:
            self._check_nifti()
        elif self.size <= _TEXT:
            self._check_text()
        return {"size": self.size, "md5": self._md5.hexdigest(),
                "sha256": self._sha256.hexdigest()}

    def _unpack(self, block: bytes) -> Iterator[bytes]:
        """What a block decompresses to, in pieces that fit into memory."""
        while block and self._unpacker:
            if self._unpacker.eof:  # another member may follow, or padding
                block = block.lstrip(b"\0")
                self._unpacker = zlib.decompressobj(_GZIP) if block else self._unpacker
                continue
            yield self._unpacker.decompress(block, 1 << 20)
            block = self._unpacker.unconsumed_tail or self._unpacker.unused_data
        if block:
            yield block

    def _refuse_page(self) -> None:
        if _PAGE.match(self._start):
            raise Damaged("a web page in place of the file")

    def _check_text(self) -> None:
        try:
            found = json.loads(self._start.decode("utf-8-sig"))
        except ValueError:
            if self.name.endswith(".json"):
                raise Damaged("not JSON") from None
            return
        if isinstance(found, dict) and "error" in found and len(found) <= 2:
            raise Damaged(f"an error message in place of the file ({str(found['error'])[:80]})")

    def _check_nifti(self) -> None:
        if self._unpacker:
            self._length += len(self._unpacker.flush())
            if not self._unpacker.eof:
                raise Damaged("cut off, its compressed data have no end")
        sizes = {int.from_bytes(self._head[:4], order) for order in ("little", "big")}
        if not sizes & {348, 540}:  # nibabel would let that pass with a warning
            raise Damaged(f"no NIfTI file, it starts with {self._head[:12]!r}")
        kind = nib.Nifti1Header if 348 in sizes else nib.Nifti2Header
        try:
            header = kind.from_fileobj(io.BytesIO(self._head))
            voxels = math.prod(map(int, header.get_data_shape()))
            needed = int(header["vox_offset"]) + voxels * header.get_data_dtype().itemsize
        except Exception as error:  # nibabel raises a dozen kinds for broken headers
            raise Damaged(f"no NIfTI header ({error})") from None
        if self._length < needed:
            raise Damaged(f"cut off, has {self._length} of {needed} bytes")


def inspect(path: Path, name: str) -> dict[str, Any]:
    """Judge a file on disk that is, or will be, called `name`; see `Checker`."""
    checker = Checker(name)
    with open(path, "rb") as content:
        while block := content.read(1 << 18):
            checker.feed(block)
    return checker.finish()


# ---------------------------------------------------------------------------- a file on its way


class Part:
    """`NAME.part`, locked, and `NAME.part.json` that says what its bytes are of.

    The note is written before the first byte and outlives the renaming until the manifest has the
    file, so that after a kill at any moment the next run knows what it finds.

    Attributes
    ----------
    size : bytes there are
    origin : the note: url, tag, etag ("" if there is none to rely upon), length (None if unknown)
    checker : has seen all bytes that this run wrote
    """

    def __init__(self, path: Path, stop: threading.Event):
        self.name, (self.path, self.note) = path.name, part_paths(path)
        self.handle = _open_locked(self.path, stop)
        self.origin, self.checker = read_note(self.note), Checker(self.name)
        self.size = os.fstat(self.handle).st_size

    def restart(self, origin: dict[str, Any]) -> None:
        """Forget the bytes, then say what those to come are of; in this order."""
        os.ftruncate(self.handle, 0)
        self.size, self.origin, self.checker = 0, origin, Checker(self.name)
        if origin:  # a note that a kill tears apart costs nothing, there are no bytes yet
            self.note.write_text(json.dumps(origin))

    def append(self, chunk: bytes) -> None:
        """Write at the end, past any buffer: what is written survives a kill."""
        os.lseek(self.handle, self.size, os.SEEK_SET)
        view = memoryview(chunk)
        while view:
            n = os.write(self.handle, view)
            self.size, view = self.size + n, view[n:]
        self.checker.feed(chunk)

    def recall(self) -> None:
        """Let the checker see what an earlier run has left."""
        with open(self.path, "rb") as content:
            while self.checker.size < self.size:
                self.checker.feed(content.read(min(1 << 18, self.size - self.checker.size)))

    def discard(self) -> None:
        """Leave nothing behind."""
        self.restart({})
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the file and of its lock."""
        os.close(self.handle)


def part_paths(path: Path) -> tuple[Path, Path]:
    """`NAME.part` and `NAME.part.json` of a file."""
    return path.with_name(path.name + ".part"), path.with_name(path.name + ".part.json")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where that is missing or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_note(path: Path) -> dict[str, Any]:
    """A part's note, {} where that is missing or not one of ours."""
    note = read_object(path)
    sound = (all(isinstance(note.get(key), str) for key in ("url", "tag", "etag"))
             and isinstance(note.get("length"), (int, type(None))))
    return note if sound else {}


def _open_locked(path: Path, stop: threading.Event) -> int:
    """Open a file for this process alone: shards of one job may meet at it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            while not lock(handle):
                if stop.wait(0.2):
                    raise Stopped
            with contextlib.suppress(FileNotFoundError):  # it may have been finished meanwhile
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def lock(handle: int, wait: bool = False) -> bool:
    """Lock an open file; True as well where there are no locks to be had."""
    try:
        import fcntl
    except ImportError:  # Windows: the user has to see to it
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


class Transfer:
    """Complete and verify a part, from whichever address gives it.

    Parameters
    ----------
    line : Line
    file : what it shall be
    part : where its bytes go
    tag : the snapshot; bytes of another one are not gone on with
    count : called with (bytes that came, bytes that turn out to be needed or not), for a bar that
        starts at the size that the API gives
    """

    def __init__(self, line: Line, file: File, part: Part, tag: str,
                 count: Callable[[int, int], None]):
        self._line, self._file, self._part, self._tag, self._count = line, file, part, tag, count
        self._expected = file.size or 0
        self._expect(part.origin.get("length") or self._expected)
        count(0, -part.size)

    def run(self, addresses: list[tuple[str, bool]]) -> dict[str, Any]:
        """Try each address in turn; returns the facts of `Checker.finish`.

        Parameters
        ----------
        addresses : url, and whether it is surely this version of the file

        Raises
        ------
        Refused : none of them has it; nothing is left of it
        ArchiveError : nobody answers at any of them; the part is left to go on from
        """
        reasons: list[Refused] = []
        for url, is_exact in addresses:
            try:
                return self._line.persist(lambda: self._try(url, is_exact), lambda: self._part.size)
            except Refused as error:
                reasons.append(type(error)(f"{bare(url)}: {error}"))
        text = "; ".join(map(str, reasons))
        if all(isinstance(reason, Unreachable) for reason in reasons):
            raise ArchiveError(f"{text}; check the network, then run the same command again: it "
                               "goes on from here")
        self._forget()
        self._expect(0)
        self._part.discard()
        raise Refused(text)

    def _try(self, url: str, is_exact: bool) -> dict[str, Any]:
        part, file = self._part, self._file
        if part.origin.get("tag") != self._tag or not part.origin["etag"]:
            self._forget()
        try:
            part.recall()
            if not part.size or part.size != part.origin["length"]:
                self._receive(url)
            facts = part.checker.finish()
            self._verify(facts)
        except Damaged as error:
            self._forget()
            raise Retry(str(error)) from None
        if not is_exact and not file.digest and file.size and file.size != facts["size"]:
            self._forget()
            raise Refused(f"has {facts['size']} bytes there, {file.size} in this snapshot")
        return facts

    def _verify(self, facts: dict[str, Any]) -> None:
        """Compare with what the API and the server say of the content."""
        etag = self._part.origin["etag"].strip('"').lower()
        # The ETag of what S3 got in several pieces is no MD5; it ends in their number.
        plain = etag if re.fullmatch("[0-9a-f]{32}", etag) else ""
        kind, expected = self._file.digest or ("md5", plain)
        if expected and facts[kind] != expected:
            raise Damaged(f"{kind} is {facts[kind]}, should be {expected}")
        if not facts["size"] and self._file.size:  # OpenNeuroOrg/openneuro#3765
            raise Damaged(f"empty, should have {self._file.size} bytes")

    def _receive(self, url: str) -> None:
        """Fetch the bytes that are missing, as far as they come."""
        part, headers = self._part, {}
        if part.size:
            headers = {"Range": f"bytes={part.size}-", "If-Range": part.origin["etag"]}
        with self._line.get(url, headers) as response:
            if response.status_code == 416:
                if response.headers.get("Content-Range") == f"bytes */{part.size}":
                    return  # we have all there is, whatever Content-Length said before
                self._forget()
                raise Retry("cannot go on where we were", 0.0)
            if is_passing(response.status_code):
                raise Retry(f"HTTP {response.status_code}", retry_after(response))
            if response.status_code not in (200, 206):
                raise Refused(f"HTTP {response.status_code}")
            if response.headers.get("Content-Type", "").startswith("text/html"):
                raise Retry("a web page in place of the file")
            coding = response.headers.get("Content-Encoding", "identity")
            if coding not in ("identity", "") and not self._file.name.endswith(".gz"):
                raise Refused(f"comes compressed ({coding}), although that was not asked for")
            if not part.size or not _continues(response, part):
                self._begin(response)
            self._copy(response)
        if part.origin["length"] not in (None, part.size):
            raise Retry(f"{part.size} of {part.origin['length']} bytes came")

    def _begin(self, response: httpx.Response) -> None:
        """Start from the first byte, whatever was there."""
        self._forget()
        if response.status_code != 200:
            raise Retry("sent another part than asked for", 0.0)
        length = response.headers.get("Content-Length", "")
        etag = response.headers.get("ETag", "")
        self._expect(int(length) if length.isdigit() else self._expected)
        self._part.restart({"url": bare(str(response.url)), "tag": self._tag,
                            "length": int(length) if length.isdigit() else None,
                            "etag": etag if etag.startswith('"') else ""})  # not a weak one

    def _copy(self, response: httpx.Response) -> None:
        """Write the body to the file; give up on a connection that drips."""
        since, before = time.monotonic(), self._part.size
        for chunk in response.iter_raw():
            if self._line.stop.is_set():
                raise Stopped
            self._part.append(chunk)
            self._count(len(chunk), 0)
            seconds = time.monotonic() - since
            if seconds > self._line.patience.silence_s:
                if self._part.size - before < _SLOWEST * seconds:
                    raise Retry(f"under {_SLOWEST} bytes a second")
                since, before = time.monotonic(), self._part.size

    def _expect(self, size: int) -> None:
        self._count(0, size - self._expected)
        self._expected = size

    def _forget(self) -> None:
        self._count(0, self._part.size)
        self._part.restart({})


def _continues(response: httpx.Response, part: Part) -> bool:
    """Whether a partial answer joins the bytes that are there, of the same version."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    length = part.origin["length"]
    return (response.status_code == 206 and match is not None
            and int(match.group(1)) == part.size
            and (match.group(2) == "*" or length is None or int(match.group(2)) == length)
            and response.headers.get("ETag", part.origin["etag"]) == part.origin["etag"])


# -------------------------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Snapshot:
    """A tagged version of a dataset and the files that could be needed."""

    dataset: str
    tag: str
    files: tuple[File, ...]


@dataclass(frozen=True)
class SubjectFiles:
    """What a subject needs: T1w and T2w of each session that has both, and their sidecars."""

    subject: str
    scans: tuple[tuple[str, str, str], ...]  # session ("" for none), T1w name, T2w name
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """Bytes, by the API."""
        return sum(file.size or 0 for file in self.files)

    def sessions(self, root: Path) -> list[bids.Subject]:
        """As `bids.find_subjects` will find them in the dataset's folder `root`."""
        return [bids.Subject(root.name, self.subject, session, root, root / t1w, root / t2w)
                for session, t1w, t2w in self.scans]


@dataclass(frozen=True)
class Plan:
    """What to download, before anything is.

    Attributes
    ----------
    snapshot : Snapshot
    subjects : in the order of `bids.find_subjects`
    common : files that belong to no subject
    missing : id of a session to the reason why it cannot be used
    """

    snapshot: Snapshot
    subjects: tuple[SubjectFiles, ...]
    common: tuple[File, ...]
    missing: dict[str, str]

    @property
    def files(self) -> list[File]:
        """All files, common ones first."""
        return [*self.common, *(file for subject in self.subjects for file in subject.files)]

    @property
    def total_bytes(self) -> int:
        """Sum of the sizes that the API gives."""
        return sum(file.size or 0 for file in self.files)

    def peak_bytes(self, ahead: int) -> int:
        """The most that `ahead` subjects take on disk, by the API's sizes."""
        return sum(sorted((subject.size for subject in self.subjects), reverse=True)[:ahead])

    def __str__(self) -> str:
        unknown = sum(file.size is None for file in self.files)
        return (f"{self.snapshot.dataset} {self.snapshot.tag}: {_count(self.subjects, 'subject')}, "
                f"{_count(self.files, 'file')}, {size_text(self.total_bytes)}"
                + (f" and {unknown} of unknown size" if unknown else ""))


def _count(things: tuple | list, name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def size_text(n: float) -> str:
    """Bytes for people: 1.23GB."""
    return tqdm.format_sizeof(n, "B")


def parse_spec(spec: str) -> tuple[str, str | None]:
    """Split `ds002330[:1.1.0]` into dataset and tag; the tag is None where there is none.

    Raises
    ------
    ValueError : not an accession number
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        raise ValueError(f"'{spec}': not an OpenNeuro accession number; write ds002330 or "
                         "ds002330:1.1.0")
    return match.group(1), match.group(2)


def check_name(name: str) -> None:
    """Refuse a name that could lead out of the dataset's folder.

    Raises
    ------
    ValueError : an absolute path, an empty, `.` or `..` part, a backslash, a colon (a drive, and
        the archive's own stand-in for `/`), a control character, or a part too long for a disk
    """
    parts = name.split("/")
    if (re.search(r"[\x00-\x1f\x7f\\:]", name) or {"", ".", ".."} & set(parts)
            or any(len(part.encode(errors="replace")) > 240 for part in parts)):
        raise ValueError(f"{name!r}: not a safe file name below a dataset's folder")


def place(root: Path, name: str) -> Path:
    """Where a file of a snapshot belongs.

    Raises
    ------
    ValueError : an unsafe name, or one of its folders (or itself) is a symbolic link
    """
    check_name(name)
    path = root
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            raise ValueError(f"{path}: a symbolic link, which is not followed; remove it or choose "
                             "another --downloads")
    return path


# ---------------------------------------------------------------------------------------- the plan


def make_plan(snapshot: Snapshot, limit: int | None = None) -> Plan:
    """Choose the files that are needed.

    Per session the scans that `bids.choose` takes, of sessions with a T1w and a T2w; their JSON
    sidecars with those that they inherit from folders above; description, participants, README and
    CHANGES of the dataset.

    Parameters
    ----------
    snapshot : Snapshot
    limit : take the first so many subjects; all if None

    Raises
    ------
    ValueError : no subject has both
    """
    pairs, missing = _pair(snapshot)
    by_folder: dict[str, list[File]] = {}
    for file in snapshot.files:
        by_folder.setdefault(file.name.rpartition("/")[0], []).append(file)
    common = {file.name: file for file in by_folder.get("", ()) if _COMMON.fullmatch(file.name)}
    people: dict[str, list[tuple[str, File, File]]] = {}
    for key in sorted(pairs, key=lambda key: bids.subject_id("", *key)):
        people.setdefault(key[0], []).append((key[1], *pairs[key]))
    subjects = []
    for subject, sessions in list(people.items())[:limit]:
        files = {scan.name: scan for _, *scans in sessions for scan in scans}
        for sidecar in [s for name in files for s in _sidecars(name, by_folder)]:
            (files if "/" in sidecar.name else common)[sidecar.name] = sidecar
        scans = tuple((session, t1w.name, t2w.name) for session, t1w, t2w in sessions)
        subjects.append(SubjectFiles(subject, scans, tuple(files.values())))
    if not subjects:
        raise ValueError(f"{snapshot.dataset} {snapshot.tag}: no subject has a T1w and a T2w")
    if limit is not None:
        taken = {bids.subject_id(snapshot.dataset, s.subject, "") for s in subjects}
        missing = {i: why for i, why in missing.items() if i.partition("_ses-")[0] in taken}
    return Plan(snapshot, tuple(subjects), tuple(common[name] for name in sorted(common)), missing)


def _pair(snapshot: Snapshot) -> tuple[dict[tuple[str, str], tuple[File, File]], dict[str, str]]:
    """(subject, session) to T1w and T2w; id to reason where one of them is missing."""
    sessions: dict[tuple[str, str], dict[str, File]] = {}
    for file in snapshot.files:
        match = _ANAT.fullmatch(file.name)
        if match:
            subject, session, name = match.group(1), match.group(2) or "", match.group(3)
            start, _, rest = name.partition("_")
            other = rest.startswith("ses-") and not rest.startswith(f"ses-{session}_")
            if start == f"sub-{subject}" and not other:
                sessions.setdefault((subject, session), {})[name] = file
    pairs, missing = {}, {}
    for key, files in sorted(sessions.items()):
        # bids.parse_name takes files on a disk; nothing below the null device can be a folder.
        scans = [s for s in map(bids.parse_name, (Path(os.devnull, name) for name in files)) if s]
        t1w, t2w = (bids.choose(scans, suffix) for suffix in bids.SUFFIXES)
        if t1w and t2w:
            pairs[key] = files[t1w.path.name], files[t2w.path.name]
        elif t1w or t2w:
            has, lacks = ("T1w", "T2w") if t1w else ("T2w", "T1w")
            missing[bids.subject_id(snapshot.dataset, *key)] = f"has a {has} but no {lacks}"
    return pairs, missing


def _sidecars(scan: str, by_folder: dict[str, list[File]]) -> Iterator[File]:
    """The JSON files that describe a scan, by the inheritance principle of BIDS."""
    *entities, suffix = PurePosixPath(scan).name.partition(".")[0].split("_")
    for folder in PurePosixPath(scan).parents:
        for file in by_folder.get("" if str(folder) == "." else str(folder), ()):
            stem, _, ending = PurePosixPath(file.name).name.partition(".")
            *theirs, kind = stem.split("_")
            if ending == "json" and kind == suffix and set(theirs) <= set(entities):
                yield file


# ------------------------------------------------------------------------------------- the archive


class Archive:
    """OpenNeuro or a mirror of it; holds the connections, so use it in a `with`.

    Parameters
    ----------
    api_url : the GraphQL endpoint; `OPENNEURO_API_URL` or OpenNeuro's own if None. Where it is
        https, nothing is ever fetched by plain http.
    s3_url : public address of the files, to which `/DATASET/PATH` is added; `OPENNEURO_S3_URL`, or
        OpenNeuro's own if that is the API's, else none
    patience : Patience

    Attributes
    ----------
    line : Line, for downloads

    Raises
    ------
    ValueError : an address that is not one
    """

    def __init__(self, api_url: str | None = None, s3_url: str | None = None,
                 patience: Patience = Patience()):
        self.api_url = _endpoint(api_url or os.environ.get(API_VARIABLE) or API_URL)
        own = S3_URL if self.api_url == API_URL else ""
        self.s3_url = (s3_url or os.environ.get(S3_VARIABLE) or own).rstrip("/")
        timeout = httpx.Timeout(patience.silence_s, connect=patience.connect_s, pool=None)
        # Identity: compressed on the way, a body has another length, hash and ranges than the file.
        headers = {"User-Agent": "t1w-t2w-cyclegan (httpx)", "Accept-Encoding": "identity"}
        client = httpx.Client(timeout=timeout, headers=headers, follow_redirects=False,
                              limits=httpx.Limits(max_keepalive_connections=32))
        self.line = Line(client, patience, self.api_url.startswith("https:"), threading.Event())

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self.line.stop.set()
        self.line.client.close()

    def snapshot(self, spec: str) -> Snapshot:
        """List a snapshot.

        Parameters
        ----------
        spec : `ds002330` (the pinned tag, or the latest where none is pinned) or `ds002330:1.1.0`

        Raises
        ------
        ValueError : no such dataset or tag (says which there are)
        ArchiveError : the API cannot be reached or lists nothing
        """
        dataset, tag = parse_spec(spec)
        tag = tag or DEFAULT_TAGS.get(dataset) or self._latest(dataset)
        try:
            files = self._list(dataset, tag)
        except ArchiveError as error:
            if not isinstance(error.__cause__, Unreachable):
                self._check_tag(dataset, tag)
            raise
        if not files:
            raise ArchiveError(f"{dataset} {tag}: the archive lists no files; try again later")
        return Snapshot(dataset, tag, files)

    def tags(self, dataset: str) -> list[str]:
        """The tags of a dataset's snapshots, in the archive's order.

        Raises
        ------
        ValueError : no such dataset
        """
        query = "query($dataset: ID!) { dataset(id: $dataset) { snapshots { tag } } }"
        found = self._dataset(query, dataset).get("snapshots") or ()
        return [str(snapshot["tag"]) for snapshot in found if snapshot]

    def addresses(self, snapshot: Snapshot, file: File) -> list[tuple[str, bool]]:
        """Where to look for a file, in this order, and whether that is surely this version.

        The API's own addresses (storage with a version, or its objects); storage's present version,
        which is there when a version's link or permission is broken (#2521, #2677); the API's file
        route, which has `:` in place of `/`.
        """
        name = f"/{snapshot.dataset}/{quote(file.name)}"
        route = (f"{self.api_url.rpartition('/')[0]}/datasets/{snapshot.dataset}/snapshots/"
                 f"{snapshot.tag}/files/{quote(file.name.replace('/', ':'), safe=':')}")
        storage = [(self.s3_url + name, False)] if self.s3_url else []
        return [*((url, True) for url in file.urls), *storage, (route, True)]

    def _latest(self, dataset: str) -> str:
        query = "query($dataset: ID!) { dataset(id: $dataset) { latestSnapshot { tag } } }"
        tag = (self._dataset(query, dataset).get("latestSnapshot") or {}).get("tag")
        if not tag:
            raise ValueError(f"{dataset}: has no snapshot")
        log.info("%s: no tag given, taking the latest, %s", dataset, tag)
        return parse_spec(f"{dataset}:{tag}")[1] or ""

    def _check_tag(self, dataset: str, tag: str) -> None:
        tags = self.tags(dataset)
        if tag not in tags:
            raise ValueError(f"{dataset}: has no snapshot '{tag}'; there are "
                             f"{', '.join(tags) or 'none'}") from None

    def _dataset(self, query: str, dataset: str) -> dict[str, Any]:
        try:
            found = self._ask(query, {"dataset": dataset},
                              lambda data: bool(data.get("dataset"))).get("dataset")
        except ArchiveError as error:
            if _FINAL_MESSAGE.search(str(error)):
                raise ValueError(f"{dataset}: {error}") from None
            raise
        if not found:
            raise ValueError(f"{dataset}: no such dataset at {self.api_url}")
        return found

    # -- listing

    def _list(self, dataset: str, tag: str) -> tuple[File, ...]:
        """All files that could be needed, in one request where the server can do that."""
        try:
            entries = self._ask_files(dataset, tag, ["files(recursive: true)"])[0]
        except ArchiveError as error:
            if isinstance(error.__cause__, Unreachable):
                raise
            log.info("%s: no listing at once (%s), going through its folders", dataset, error)
            entries = self._ask_files(dataset, tag, ["files"])[0]
        files, folders = _sort_entries(entries, "")
        # A server may list folders as such, beside their files or in place of them.
        listed = {name.rpartition("/")[0] + "/" for name in files}
        folders = {name: tree for name, tree in folders.items()
                   if not any(folder.startswith(name + "/") for folder in listed)}
        while folders:
            batch = dict(list(folders.items())[:_TREES_A_QUERY])
            trees = {f"t{i}": tree for i, tree in enumerate(batch.values())}
            found = self._ask_files(dataset, tag, [f"files(tree: ${t})" for t in trees], trees)
            for name, entries in zip(batch, found):
                del folders[name]
                more_files, more_folders = _sort_entries(entries, name + "/")
                files.update(more_files)
                folders.update(more_folders)
        return tuple(files[name] for name in sorted(files))

    def _ask_files(self, dataset: str, tag: str, fields: list[str],
                   trees: dict[str, str] | None = None) -> list[list[Any]]:
        """The entries of several folders by one query."""
        trees = trees or {}
        declared = "".join(f", ${name}: String" for name in trees)
        wanted = " ".join(f"a{i}: {text} {_FIELDS}" for i, text in enumerate(fields))
        query = (f"query($dataset: ID!, $tag: String!{declared}) "
                 f"{{ snapshot(datasetId: $dataset, tag: $tag) {{ {wanted} }} }}")

        def complete(data: dict[str, Any]) -> bool:
            found = data.get("snapshot") or {}
            return all(isinstance(found.get(f"a{i}"), list) for i in range(len(fields)))

        data = self._ask(query, {"dataset": dataset, "tag": tag, **trees}, complete)
        if not complete(data):
            raise ArchiveError(f"{dataset} {tag}: the archive has no listing of it")
        return [data["snapshot"][f"a{i}"] for i in range(len(fields))]

    def _ask(self, query: str, variables: dict[str, str],
             complete: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The `data` of a query's answer; errors beside complete data are let pass."""
        timeout = httpx.Timeout(self.line.patience.listing_s,
                                connect=self.line.patience.connect_s)

        def attempt() -> dict[str, Any]:
            return _read_answer(self.line.client.post(
                self.api_url, json={"query": query, "variables": variables}, timeout=timeout),
                complete)

        try:
            return self.line.persist(attempt)
        except Unreachable as error:
            raise ArchiveError(f"{self.api_url}: {error}; check the network and "
                               "--api-url") from error
        except Refused as error:
            raise ArchiveError(f"{self.api_url} answers: {error}") from error


def _endpoint(url: str) -> str:
    """A GraphQL address from what a user may give: with or without `/crn/graphql`."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise ValueError(f"--api-url {url}: not an address of an API; write "
                         f"{API_URL} or http://localhost:8000/crn/graphql")
    path = parts.path.rstrip("/")
    if not path.endswith("/graphql"):
        path = f"{path or '/crn'}/graphql"
    return f"{parts.scheme}://{parts.netloc}{path}"


def _read_answer(response: httpx.Response,
                 complete: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Tell the API's data from its errors, and those that pass from those that stay."""
    if is_passing(response.status_code):
        raise Retry(f"HTTP {response.status_code}", retry_after(response))
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        reason = f"HTTP {response.status_code} without JSON, so not a GraphQL endpoint"
        raise Refused(reason) if response.status_code >= 300 else Retry(reason)
    data: dict[str, Any] = answer["data"] if isinstance(answer.get("data"), dict) else {}
    errors = [e for e in answer.get("errors") or () if isinstance(e, dict)]
    if errors and not complete(data):
        reason = "; ".join(dict.fromkeys(str(e.get("message")) for e in errors))
        codes = {(e.get("extensions") or {}).get("code") for e in errors}
        final = codes & _FINAL_CODES or _FINAL_MESSAGE.search(reason)
        # The others are its workers' timeouts (#3695, #3726), which come in a 200.
        raise Refused(reason) if final or response.status_code >= 400 else Retry(reason)
    if response.status_code != 200:
        raise Refused(f"HTTP {response.status_code}")
    return data


def _sort_entries(entries: Iterable[Any], prefix: str) -> tuple[dict[str, File], dict[str, str]]:
    """Files by name, and the folders worth a look with their ids, of one listing."""
    files: dict[str, File] = {}
    folders: dict[str, str] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("filename"), str):
            continue
        name, key = prefix + entry["filename"], str(entry.get("id") or "")
        try:
            check_name(name)
        except ValueError as error:
            log.warning("%s; left out", error)
            continue
        if entry.get("directory"):
            if _FOLDER.fullmatch(name) and key:
                folders[name] = key
        elif "/" not in name or _FOLDER.fullmatch(name.rpartition("/")[0]):
            urls = tuple(url for url in entry.get("urls") or () if _is_address(url))
            files[name] = File(name, key, _read_size(entry.get("size")), urls)
    return files, folders


def _is_address(url: Any) -> bool:
    with contextlib.suppress(httpx.InvalidURL, ValueError):
        return isinstance(url, str) and bool(httpx.URL(url).host and urlsplit(url).netloc)
    return False


def _read_size(size: Any) -> int | None:
    """A BigInt, which comes as a number or as a string; None for anything else."""
    try:
        return int(size) if not isinstance(size, bool) and int(size) >= 0 else None
    except (TypeError, ValueError, OverflowError):
        return None


# ------------------------------------------------------------------------------------ downloading


class Manifest:
    """`manifest.json`: which files are whole and where from, and which subjects are done with.

    `files` maps a name to url, size, md5, sha256, id, tag, time and mtime_ns; `subjects` maps a
    label to the time and the same of the files that were used and deleted. Processes may share it.
    """

    def __init__(self, root: Path):
        self.path = root / MANIFEST
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] = ()  # which file `content` was read from
        self.content: dict[str, dict[str, Any]] = {"files": {}, "subjects": {}}
        self.refresh()

    def refresh(self) -> None:
        """Learn what other processes have written."""
        with self._lock:
            self._read()

    def file(self, name: str) -> dict[str, Any]:
        """The entry of a file, {} if there is none."""
        return self.content["files"].get(name, {})

    def finished(self, subject: str) -> dict[str, Any]:
        """Name to entry of the files of a subject that was finished, {} if it was not."""
        return _objects(self.content["subjects"].get(subject, {}).get("files"))

    def update(self, change: Callable[[dict[str, dict[str, Any]]], None]) -> None:
        """Apply a change to what is on disk now, and write it whole."""
        with self._lock, _locked_folder(self.path.parent):
            self._read()
            content = {key: dict(members) for key, members in self.content.items()}
            change(content)
            for left in self.path.parent.glob(f"{MANIFEST}.*.tmp"):  # by a killed process
                left.unlink(missing_ok=True)
            write_atomically(self.path, _manifest_text(content).encode())
            self.content, self._seen = content, self._identity()

    def _read(self) -> None:
        seen = self._identity()
        if seen != self._seen:
            found = read_object(self.path)
            self.content = {key: _objects(found.get(key)) for key in ("files", "subjects")}
            self._seen = seen

    def _identity(self) -> tuple[int, ...]:
        """Changes with every writing, as each makes a new file."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return ()
        return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _manifest_text(content: dict[str, dict[str, Any]]) -> str:
    """JSON with a line a file; an indent would take json's slow way, 20 times slower."""
    parts = ['{"format": "openneuro-manifest", "version": 1']
    for key, members in content.items():
        lines = (f"{json.dumps(name)}: {json.dumps(members[name])}" for name in sorted(members))
        parts.append(f'"{key}": {{\n' + ",\n".join(lines) + "}")
    return ",\n".join(parts) + "}\n"


def _objects(found: Any) -> dict[str, Any]:
    """The members of a JSON object that are objects, none where it is something else."""
    members = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in members if isinstance(value, dict)}


@contextlib.contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, where folders can be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows
        yield
        return
    try:
        lock(handle, wait=True)
        yield
    finally:
        os.close(handle)


@dataclass(eq=False)
class _Group:
    """Files that are wanted together, and what became of them."""

    subject: SubjectFiles | None  # None: the common files
    files: tuple[File, ...]
    left: int
    whole: dict[str, dict] = field(default_factory=dict)  # name to manifest entry
    failed: dict[str, str] = field(default_factory=dict)  # name to reason


class Download:
    """Fetch a plan's files, several at a time, and hand out subjects as theirs become whole.

        with Download(archive, plan, folder, ahead=4) as download:
            for subject, reason in download:
                ... use subject.sessions(download.root), or say why not ...
                download.finish(subject)

    At most `ahead` subjects are on disk or on their way, counted until `finish`; a caller that
    holds more than that gets one more at a time, so it can never wait for itself. Whatever ends the
    run, a kill included, the next one goes on: files are whole or called `.part`.

    Parameters
    ----------
    archive : Archive
    plan : Plan
    folder : the dataset's folder is made here
    ahead : subjects on disk at a time
    keep : leave the files where they are when a subject is finished; files that were there before
        stay in any case
    done : asked for each subject that an earlier run has finished and deleted, with the SHA-256 of
        its scans by path; False fetches it anew. By default it is left alone.
    connections : files at a time
    progress : show a bar over all bytes (on a terminal), or a line a subject

    Attributes
    ----------
    root : the dataset's folder
    finished : subjects that an earlier run has finished, and that are not handed out again

    Raises
    ------
    ValueError : a symbolic link where the files belong
    ArchiveError, OSError : while iterating; nobody answers, or the disk is full
    """

    def __init__(self, archive: Archive, plan: Plan, folder: Path, *, ahead: int = 2,
                 keep: bool = False, connections: int = 4, progress: bool = True,
                 done: Callable[[SubjectFiles, dict[Path, str]], bool] | None = None):
        self.plan, self.keep, self.ahead = plan, keep, max(ahead, 1)
        self.root = folder / plan.snapshot.dataset
        self._archive, self._tag = archive, plan.snapshot.tag
        self._line = replace(archive.line, stop=threading.Event())
        for file in plan.files:
            place(self.root, file.name)
        self.root.mkdir(parents=True, exist_ok=True)
        self._manifest = Manifest(self.root)
        self.finished = [s for s in plan.subjects if (hashes := self.hashes(s)) is not None
                         and (done is None or done(s, hashes))]
        past = {s.subject for s in self.finished}
        self._todo = [s for s in plan.subjects if s.subject not in past]
        self._held: set[str] = set()
        self._jobs: queue.Queue[tuple[_Group, File] | None] = queue.Queue()
        self._ready: queue.Queue[_Group | None] = queue.Queue()
        self._fatal: BaseException | None = None
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work, daemon=True)
                         for _ in range(max(connections, 1))]
        wanted = [*plan.common, *(file for s in self._todo for file in s.files)]
        self._total = sum(f.size or 0 for f in wanted if not self._looks_whole(f))
        self._got, self._settled, self._start = 0, 0, time.monotonic()
        self._bar = tqdm(total=self._total, unit="B", unit_scale=True, desc=plan.snapshot.dataset,
                         disable=None if progress else True)
        self._say = progress and self._bar.disable
        self._check_space()

    def __enter__(self) -> Download:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop; unfinished files stay as `.part`."""
        self._line.stop.set()
        until = time.monotonic() + 1
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            if thread.is_alive():  # one that waits for a silent server ends with the process
                thread.join(timeout=max(until - time.monotonic(), 0))
        self._bar.close()

    def __iter__(self) -> Iterator[tuple[SubjectFiles, str]]:
        """Each subject with "", or with the reason why its scans cannot be had."""
        for thread in self._threads:
            thread.start()
        for subject in () if self.keep else self.finished:
            self._delete(subject)  # what a kill between mark and deletion has left
        self._submit(_Group(None, self.plan.common, len(self.plan.common)))
        waiting, under_way, common = deque(self._todo), 0, 1
        while waiting or under_way or common:
            while waiting and under_way + len(self._held) < max(self.ahead, len(self._held) + 1):
                subject = waiting.popleft()
                self._submit(_Group(subject, subject.files, len(subject.files)))
                under_way += 1
            group = self._next_ready()
            if group is None:  # the caller has finished one, so there may be room
                continue
            if group.subject is None:
                common = 0
                self._warn(group.failed)
                continue
            under_way -= 1
            yield group.subject, self._settle(group.subject, group.failed)

    def finish(self, subject: SubjectFiles) -> None:
        """Be done with a subject: remember it and delete its files, unless they are kept.

        May be called from any thread, in any order; does nothing for a subject that could not be
        had or is finished already.
        """
        if subject.subject not in self._held:
            return
        if not self.keep and self._is_ours(subject):
            def mark(content: dict[str, dict]) -> None:
                entries = {f.name: content["files"].pop(f.name) for f in subject.files
                           if f.name in content["files"]}
                content["subjects"][subject.subject] = {"time": _now(), "files": entries}

            self._manifest.update(mark)
            self._delete(subject)
        self._held.discard(subject.subject)
        self._ready.put(None)

    def hashes(self, subject: SubjectFiles) -> dict[Path, str] | None:
        """SHA-256 by path of the scans of a subject that was finished and deleted, else None."""
        found = self._manifest.finished(subject.subject)
        scans = {name for scan in subject.scans for name in scan[1:]}
        files = [file for file in subject.files if file.name in scans]
        if not all(_is_same(found.get(file.name, {}), file, self._tag) for file in files):
            return None
        return {self.root / file.name: found[file.name]["sha256"] for file in files}

    def source(self) -> dict[str, Any]:
        """Name, snapshot, DOI and licence for `store.json`; complete after the iteration."""
        found = bids.describe(self.root, self.plan.snapshot.dataset)
        return {**found, "snapshot": self._tag,
                "doi": re.sub(r"^(https?://(dx\.)?doi\.org/|doi:)", "", found["doi"].strip())}

    # -- groups of files

    def _submit(self, group: _Group) -> None:
        if not group.files:
            self._ready.put(group)
        for file in group.files:
            self._jobs.put((group, file))

    def _next_ready(self) -> _Group | None:
        while True:
            if self._fatal:
                raise self._fatal
            with contextlib.suppress(queue.Empty):
                return self._ready.get(timeout=0.5)  # a bare get() is deaf to Ctrl-C on Windows

    def _settle(self, subject: SubjectFiles, failed: dict[str, str]) -> str:
        """The reason why a subject cannot be used, "" if it can."""
        scans = {name for scan in subject.scans for name in scan[1:]}
        self._warn({name: why for name, why in failed.items() if name not in scans})
        reason = "; ".join(f"{name}: {failed[name]}" for name in sorted(scans & failed.keys()))
        if not reason:
            self._held.add(subject.subject)
        elif not self.keep and self._is_ours(subject):
            def forget(content: dict[str, dict]) -> None:
                for file in subject.files:
                    content["files"].pop(file.name, None)

            self._manifest.update(forget)
            self._delete(subject)
        if self._say:
            self._say_where(subject, reason)
        return reason

    def _say_where(self, subject: SubjectFiles, reason: str) -> None:
        """What the bar would show, as a line."""
        self._settled += 1
        rate = self._got / max(time.monotonic() - self._start, 1e-3)
        how = (f"{size_text(self._got)} of {size_text(self._total)}  {size_text(rate)}/s  "
               f"about {(self._total - self._got) / rate:.0f} s left") if rate else "from disk"
        log.info("%s  %d/%d  sub-%s  %s  %s", self.plan.snapshot.dataset, self._settled,
                 len(self._todo), subject.subject, "not to be had" if reason else "whole", how)

    def _warn(self, failed: dict[str, str]) -> None:
        for name, why in sorted(failed.items()):
            log.warning("%s %s: not to be had, and not needed (%s)", self.plan.snapshot.dataset,
                        name, why)

    def _is_ours(self, subject: SubjectFiles) -> bool:
        """Whether nobody else has put a subject's files there: those are not ours to delete."""
        return all(self._manifest.file(file.name).get("url") != "" for file in subject.files)

    def _delete(self, subject: SubjectFiles) -> None:
        """Remove a subject's files, finished or not, and the folders that this empties."""
        for file in subject.files:
            path = place(self.root, file.name)
            for name in (path, *part_paths(path)):
                name.unlink(missing_ok=True)
            for folder in list(path.parents)[:file.name.count("/")]:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def _check_space(self) -> None:
        """Say it now if the disk is likely to be too small (likely: the sizes may be wrong)."""
        need = self._total if self.keep else min(self._total, self.plan.peak_bytes(self.ahead))
        free = shutil.disk_usage(self.root).free
        if need > free:
            log.warning("%s: needs about %s, has %s free", self.root, size_text(need),
                        size_text(free))

    # -- threads

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._line.stop.is_set():
            group, file = job
            try:
                try:
                    group.whole[file.name] = self._fetch(file)
                except (Refused, ValueError) as error:
                    group.failed[file.name] = str(error)
                with self._lock:
                    group.left -= 1
                    last = group.left == 0
                if last:
                    self._record(group.whole)
                    self._ready.put(group)
            except Stopped:
                return
            except BaseException as error:  # a full disk, no network, or a fault of ours
                self._fatal = self._fatal or self._explain(error)
                self._line.stop.set()
                self._ready.put(None)
                return

    def _explain(self, error: BaseException) -> BaseException:
        """Add to the error of a full disk what to do about it."""
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            left = size_text(self._total - self._got)
            return OSError(f"{self.root}: {error.strerror}, and {left} are to come; make room, "
                           "then run the same command again: it goes on from here")
        return error

    def _record(self, whole: dict[str, dict[str, Any]]) -> None:
        """Enter files into the manifest, then drop their notes."""
        fresh = {name: entry for name, entry in whole.items() if self._manifest.file(name) != entry}
        if fresh:
            self._manifest.update(lambda content: content["files"].update(fresh))
        for name in whole:
            part_paths(self.root / name)[1].unlink(missing_ok=True)

    def _count(self, got: int, needed: int) -> None:
        """Note bytes that came, and bytes that turn out to be needed or not."""
        with self._lock:
            self._got += got
            self._total += needed
            if not self._bar.disable:
                self._bar.total = self._total
                self._bar.update(got)

    # -- one file

    def _fetch(self, file: File) -> dict[str, Any]:
        """Make a file whole; returns its manifest entry."""
        path = place(self.root, file.name)
        if entry := self._is_whole(file):
            return entry
        if entry := self._adopt(file, path):
            self._count(0, -(file.size or 0))
            return entry
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Part(path, self._line.stop)
        try:
            self._manifest.refresh()
            if entry := self._is_whole(file) or self._adopt(file, path):  # by another process
                part.discard()
                self._count(0, -(file.size or 0))
                return entry
            path.unlink(missing_ok=True)  # so that a file beside a note is one that we renamed
            transfer = Transfer(self._line, file, part, self._tag, self._count)
            facts = transfer.run(self._archive.addresses(self.plan.snapshot, file))
            os.fsync(part.handle)
            # Its folder is not synced: a rename lost with the power leaves the .part and its note.
            os.replace(part.path, path)
            return self._entry(file, path, facts, part.origin)
        finally:
            part.close()

    def _looks_whole(self, file: File) -> dict[str, Any] | None:
        """The manifest's entry of a file that is on disk in its size, else None."""
        entry, path = self._manifest.file(file.name), place(self.root, file.name)
        if not path.is_file() or not _is_same(entry, file, self._tag):
            return None
        return entry if path.stat().st_size == entry.get("size") else None

    def _is_whole(self, file: File) -> dict[str, Any] | None:
        """The entry of a file that is as the manifest has it; read only if it was touched since."""
        entry, path = self._looks_whole(file), self.root / file.name
        if not entry or path.stat().st_mtime_ns == entry.get("mtime_ns"):
            return entry
        with contextlib.suppress(Damaged):
            if inspect(path, file.name)["sha256"] == entry["sha256"]:
                return {**entry, "mtime_ns": path.stat().st_mtime_ns}
        return None

    def _adopt(self, file: File, path: Path) -> dict[str, Any] | None:
        """The entry of a file that is on disk but not in the manifest, if it can be believed.

        Either it bears our note (a kill came between renaming and the manifest, or another process
        has just renamed it), or it has the content or at least the size that the API gives.
        """
        note = read_note(part_paths(path)[1])
        ours = note.get("tag") == self._tag
        if not path.is_file() or not ours and self._manifest.file(file.name):
            return None
        try:
            facts = inspect(path, file.name)
        except Damaged:
            return None
        kind, expected = file.digest or ("size", facts["size"] if ours else file.size)
        return self._entry(file, path, facts, note) if facts[kind] == expected else None

    def _entry(self, file: File, path: Path, facts: dict[str, Any],
               note: dict[str, Any]) -> dict[str, Any]:
        return {**facts, "url": note.get("url", ""), "id": file.id, "time": _now(),
                "tag": self._tag, "mtime_ns": path.stat().st_mtime_ns}


def _is_same(entry: dict[str, Any], file: File, tag: str) -> bool:
    """Whether what a manifest's entry records is this file of this snapshot."""
    if not isinstance(entry.get("sha256"), str):
        return False
    if file.digest:
        return entry.get(file.digest[0]) == file.digest[1]
    return entry.get("tag") == tag or bool(file.id) and entry.get("id") == file.id


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
