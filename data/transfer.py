"""One file from one of its addresses to one whole file: retries and resume.

Knows HTTP, not the archive. A body is written to `NAME.part` as it comes and judged as it comes
(`data/whole_file.py`); only a whole one gets its name.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from data.whole_file import Checker, Damaged, Helper

_PROGRESS = 1 << 16  # bytes that make a failed try worth another one
_DAY_S = 86400
_SLOWEST = 1024  # bytes a second; below it a connection counts as dead
# git-annex names a file by its content: MD5E-s5898546--9bcc318b66c4da5e479b33e9451ec5e1.nii.gz
_ANNEX_KEY = re.compile(r"(MD5|SHA256)E?-s\d+--([0-9a-f]{64}|[0-9a-f]{32})(?![0-9a-f])")
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


class StayAway(ArchiveError):
    """The archive asks to come back later than patience lasts."""


class Retry(Exception):
    """This try failed, the next may not; `wait_s` is what the server asks for."""

    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.wait_s = wait_s


class Overloaded(Retry):
    """The server says that it cannot now: HTTP 5xx, 429."""


class Refused(Exception):
    """This address will not give the file."""


class Busy(Refused):
    """The server at this address has said that it cannot now, for as long as patience lasted."""


class Unreachable(Refused):
    """Nobody answers at this address."""


class Stopped(Exception):
    """The run ends; leave everything as it is."""


# ----------------------------------------------------------------------------------- one request


def is_passing(status: int) -> bool:
    """Whether an HTTP status is likely to be another one soon."""
    return status in (408, 425, 429) or status >= 500 and status not in (501, 505)


def retry_after(response: httpx.Response) -> float | None:
    """Seconds that a server asks to wait, from a number or a date; None if it does not."""
    text = response.headers.get("Retry-After", "").strip()
    try:
        if text.isdigit():
            return float(text)
        when = parsedate_to_datetime(text)
        if when.tzinfo is None:
            when = when.replace(tzinfo=timezone.utc)
        return max((when - datetime.now(timezone.utc)).total_seconds(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return None


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
        Refused : given up (Unreachable where nobody answered, Busy where the server could not)
        ArchiveError : the server asks to stay away for longer than patience lasts
        Stopped : while waiting
        """
        tries = 0
        while True:
            before = size()
            try:
                return attempt()
            except (Retry, httpx.RequestError) as error:
                tries = 1 if size() - before >= _PROGRESS else tries + 1
                if tries >= self.patience.attempts:
                    nobody = isinstance(error, (httpx.ConnectError, httpx.TimeoutException))
                    kind = (Unreachable if nobody else Busy if isinstance(error, Overloaded)
                            else Refused)
                    raise kind(f"{why(error)} ({tries} tries)") from error
                if self.stop.wait(self._wait(tries, getattr(error, "wait_s", None))):
                    raise Stopped from None

    def _wait(self, tries: int, asked: float | None) -> float:
        """Seconds before the next try."""
        longest = self.patience.longest_wait_s
        if asked is None:  # jitter, so that clients that failed together do not return together
            doubled = self.patience.first_wait_s * 2 ** (tries - 1)
            return min(doubled, longest) * random.uniform(0.5, 1)
        if asked > longest:
            when = f"in {asked:.0f} s" if asked < _DAY_S else "in more than a day"
            raise StayAway(f"the archive asks to come back {when}; run the same command "
                           "then") from None
        return asked

    @contextlib.contextmanager
    def get(self, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """Open an address, following redirects, never from https to http."""
        request = _sound(functools.partial(self.client.build_request, "GET", url, headers=headers))
        for _ in range(6):
            scheme = request.url.scheme
            if scheme not in ("https", "http") or self.secure and scheme != "https":
                raise Refused(f"leads to {bare(str(request.url))}, which is not https")
            answer = _sound(functools.partial(self.client.send, request, stream=True))
            with contextlib.closing(answer) as response:
                if response.next_request is None:
                    yield response
                    return
                request = response.next_request
        raise Refused("redirected more than 5 times")


def _sound(step: Callable[[], T]) -> T:
    """Take a step that looks at an address; one that is none is refused, as any other is."""
    try:
        return step()
    except (httpx.InvalidURL, UnicodeError) as error:  # httpx's and idna's words for it
        raise Refused(f"leads to no address ({error})") from None


def steady(chunks: Iterable[bytes], silence_s: float) -> Iterator[bytes]:
    """The pieces of a body; `Retry` where one drips, as `Patience` has it."""
    since, came = time.monotonic(), 0
    for chunk in chunks:
        yield chunk
        came += len(chunk)
        seconds = time.monotonic() - since
        if seconds > silence_s:
            if came < _SLOWEST * seconds:
                raise Retry(f"under {_SLOWEST} bytes a second")
            since, came = time.monotonic(), 0


def why(error: Exception) -> str:
    """A reason for people from an exception of httpx, whose text may be empty."""
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    return str(error) or type(error).__name__


def bare(url: str) -> str:
    """An address without password and signature, nobody else's business; the version stays."""
    parts = urlsplit(url)
    version = re.search(r"(?:^|&)(versionId=[^&]*)", parts.query)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" + (f"?{version[1]}" if version else "")


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

    def __init__(self, path: Path, stop: threading.Event, helper: Helper | None = None):
        self._helper = helper
        self.name, (self.path, self.note) = path.name, part_paths(path)
        if os.path.islink(self.note):  # writing would follow it
            self.note.unlink()
        self.handle, self.size = _open_locked(self.path, stop)
        self.origin = read_note(self.note) if self.size else {}
        self.checker = Checker(self.name, self._helper)

    def restart(self, origin: dict[str, Any]) -> None:
        """Forget the bytes, then say what those to come are of; in this order."""
        if self.size:
            os.ftruncate(self.handle, 0)
        self.size, self.origin, self.checker = 0, origin, Checker(self.name, self._helper)
        if origin:  # a note that a kill tears apart costs nothing, there are no bytes yet
            handle = os.open(self.note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                os.write(handle, json.dumps(origin).encode())
            finally:
                os.close(handle)

    def append(self, chunk: bytes) -> None:
        """Write at the end, past any buffer: what is written survives a kill."""
        view = memoryview(chunk)
        while view:
            n = os.write(self.handle, view)
            self.size, view = self.size + n, view[n:]
        self.checker.feed(chunk)

    def recall(self) -> None:
        """Let the checker see what an earlier run has left."""
        if self.checker.size == self.size:
            return
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
    return Path(f"{path}.part"), Path(f"{path}.part.json")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where that is missing or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_note(path: Path) -> dict[str, Any]:
    """A part's note, {} where that is missing or not one of ours."""
    note = read_object(path)
    sound = (all(isinstance(note.get(key), str) for key in ("url", "tag", "etag"))
             and isinstance(note.get("length"), (int, type(None))))
    return note if sound else {}


def _open_locked(path: Path, stop: threading.Event) -> tuple[int, int]:
    """Open a file to append, for this process alone: shards of one job may meet at it.

    Returns
    -------
    handle, and the bytes that are there
    """
    how = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    while True:
        handle = os.open(path, how, 0o666)
        try:
            while not lock(handle):
                if stop.wait(0.2):
                    raise Stopped
            with contextlib.suppress(FileNotFoundError):  # it may have been finished meanwhile
                found = os.fstat(handle)
                if os.path.samestat(found, os.stat(path)):
                    return handle, found.st_size
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
        self._damaged: set[str] = set()  # MD5s of contents that were stored like that
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
        Busy : they may have it, but not now; the part is left to go on from
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
        may_come = all(isinstance(reason, (Unreachable, Busy)) for reason in reasons)
        if may_come and self._part.size:
            self._expect(self._part.size)
        else:
            self._forget()
            self._expect(0)
            self._part.discard()
        raise (Busy if may_come else Refused)(text)

    def _try(self, url: str, is_exact: bool) -> dict[str, Any]:
        part, file = self._part, self._file
        if part.size and (part.origin.get("tag") != self._tag or not part.origin["etag"]):
            self._forget()
        try:
            part.recall()
            if not part.size or part.size != part.origin["length"]:
                self._receive(url)
            facts = part.checker.finish()
            self._verify(facts)
        except Damaged as error:
            stored = self._md5_as_stored()
            again = stored in self._damaged
            self._damaged |= {stored} - {""}
            self._forget()
            if again:  # what is damaged there does not get better by asking a third time
                raise Refused(f"{error}, and so it is stored") from None
            raise Retry(str(error)) from None
        if not is_exact and not file.digest and file.size and file.size != facts["size"]:
            self._forget()
            raise Refused(f"has {facts['size']} bytes there, {file.size} in this snapshot")
        return facts

    def _md5_there(self) -> str:
        """The MD5 that the server gives, "" if it gives none."""
        if self._part.origin.get("encrypted"):
            return ""
        etag = str(self._part.origin.get("etag", "")).strip('"').lower()
        # The ETag of what S3 got in several pieces is no MD5; it ends in their number.
        return etag if re.fullmatch("[0-9a-f]{32}", etag) else ""

    def _md5_as_stored(self) -> str:
        """The MD5 of the bytes that came if they are what the server has, by its own, else ""."""
        part = self._part
        if not part.size or part.size != part.origin.get("length"):
            return ""
        digest = hashlib.md5(usedforsecurity=False)
        with open(part.path, "rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
        return digest.hexdigest() if digest.hexdigest() == self._md5_there() else ""

    def _verify(self, facts: dict[str, Any]) -> None:
        """Compare with what the API and the server say of the content."""
        kind, expected = self._file.digest or ("md5", self._md5_there())
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
                if part.size and response.headers.get("Content-Range") == f"bytes */{part.size}":
                    return  # we have all there is, whatever Content-Length said before
                if not part.size:
                    raise Refused("HTTP 416, although no part was asked for")
                self._forget()
                raise Retry("cannot go on where we were", 0.0)
            if is_passing(response.status_code):
                raise Overloaded(f"HTTP {response.status_code}", retry_after(response))
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
        if response.status_code != 200:
            self._forget()
            raise Retry("sent another part than asked for", 0.0)
        self._count(0, self._part.size)
        length = response.headers.get("Content-Length", "")
        etag = response.headers.get("ETag", "")
        # Of what S3 has encrypted with a key of somebody's the ETag is no MD5, though it looks it.
        encrypted = (response.headers.get("x-amz-server-side-encryption", "").startswith("aws:kms")
                     or "x-amz-server-side-encryption-customer-algorithm" in response.headers)
        self._expect(int(length) if length.isdigit() else self._expected)
        self._part.restart({"url": bare(str(response.url)), "tag": self._tag,
                            "length": int(length) if length.isdigit() else None,
                            "etag": etag if etag.startswith('"') else "",  # not a weak one
                            **({"encrypted": True} if encrypted else {})})

    def _copy(self, response: httpx.Response) -> None:
        """Write the body to the file."""
        for chunk in steady(response.iter_raw(), self._line.patience.silence_s):
            if self._line.stop.is_set():
                raise Stopped
            self._part.append(chunk)
            self._count(len(chunk), 0)

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
