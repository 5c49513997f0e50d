"""Whether a file is what its name says, judged by its bytes as they come: NIfTI, JSON or text."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib

try:  # the same as zlib, and twice as fast
    from isal import isal_zlib as inflate
    from isal.isal_zlib import IsalError as InflateError
except ImportError:  # not made for this processor
    import zlib as inflate  # type: ignore[no-redef]
    from zlib import error as InflateError  # type: ignore[assignment]

_PAGE = re.compile(rb"\s*<(!doctype|html|head|\?xml)", re.IGNORECASE)
_BEHIND = 64  # blocks (64 kB each) that may wait for their decompression
_GZIP = 31  # the window's bits, as in zlib: a gzip header, and the CRC checked
_MAGIC = b"\x1f\x8b"  # how gzip starts
_TEXT = 1 << 20  # longer texts are not parsed


class Damaged(ValueError):
    """A body that is not the file."""


class Helper:
    """A thread for what would keep a connection waiting; it takes nothing while it works.

    One large file then has a second processor for its decompression; where several files come at a
    time, theirs are threads enough.
    """

    def __init__(self) -> None:
        self._free, self._pool = threading.Lock(), ThreadPoolExecutor(1)

    def take(self, work: Callable[[list[bytes]], None], blocks: list[bytes]) -> Future[None] | None:
        """Begin the work, or return None."""
        return self._pool.submit(self._do, work, blocks) if self._free.acquire(False) else None

    def close(self) -> None:
        """Let the thread end after the work that it has."""
        self._pool.shutdown(wait=False)

    def _do(self, work: Callable[[list[bytes]], None], blocks: list[bytes]) -> None:
        try:
            work(blocks)
        finally:
            self._free.release()


class Checker:
    """Judge a file by its bytes as they come: is it what its name says?

    Decompressing and hashing while the network is waited for costs no time of its own. A NIfTI file
    is whole if all of it decompresses, its gzip CRC fits, its header loads and as many voxels
    follow as that says (its first bytes tell whether it is compressed, as for `read_volume`: some
    are called .nii.gz and are not); JSON must be JSON; nothing may be a web page or the API's
    `{"error": ...}`.

    Parameters
    ----------
    name : what the file is, or will be, called
    helper : decompresses while more bytes come, if it has the time

    Raises
    ------
    Damaged : from `feed` as soon as it shows, else from `finish`
    """

    def __init__(self, name: str, helper: Helper | None = None):
        self.name, self.size, self._helper = name, 0, helper
        self._waiting: list[bytes] = []  # to be decompressed
        self._work: Future[None] | None = None  # the helper's, with the bytes before
        self._md5, self._sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
        self._is_nifti = name.endswith((".nii", ".nii.gz"))
        packed = name.endswith(".gz") and not self._is_nifti
        self._unpacker = inflate.decompressobj(_GZIP) if packed else None
        self._start, self._head, self._length = b"", b"", 0  # of the file; of what is packed in it

    def feed(self, block: bytes) -> None:
        """Take the next bytes, of any number."""
        is_open = self._is_nifti and self.size < len(_MAGIC)  # whether it is compressed
        self.size += len(block)
        self._md5.update(block)
        self._sha256.update(block)
        self._start += block[:max((64 if self._is_nifti else _TEXT) - len(self._start), 0)]
        self._waiting.append(block)
        if is_open and self._start.startswith(_MAGIC):
            self._unpacker = inflate.decompressobj(_GZIP)
        elif is_open and self.size < len(_MAGIC):
            return
        behind = self._work and not self._work.done()
        if not behind or len(self._waiting) >= _BEHIND:
            # A file that comes in one piece is not worth a second thread.
            self._decompress(self._helper if self._unpacker and self.size > len(block) else None)

    def finish(self) -> dict[str, Any]:
        """Judge the whole; returns {"size": bytes, "md5": hex, "sha256": hex}."""
        self._decompress(None)
        self._refuse_page()
        if self._is_nifti:
            self._check_nifti()
        elif self.size <= _TEXT:
            self._check_text()
        return {"size": self.size, "md5": self._md5.hexdigest(),
                "sha256": self._sha256.hexdigest()}

    def _decompress(self, helper: Helper | None) -> None:
        """What waits, after what the helper has; in this thread if it takes no more."""
        if self._work:
            self._work.result()
        blocks, self._waiting = self._waiting, []
        self._work = helper.take(self._measure, blocks) if helper else None
        if not self._work:
            self._measure(blocks)

    def _measure(self, blocks: list[bytes]) -> None:
        """Note length and head of what is packed in the next bytes."""
        try:
            for plain in (plain for block in blocks for plain in self._unpack(block)):
                self._length += len(plain)
                self._head += plain[:540 - len(self._head)]
        except InflateError as error:  # type: ignore[misc]  # isal's stub has it as an instance
            self._refuse_page()
            raise Damaged(f"damaged ({error})") from None

    def _unpack(self, block: bytes) -> Iterator[bytes]:
        """What a block decompresses to, in pieces that fit into memory."""
        while block and self._unpacker:
            if self._unpacker.eof:  # another member may follow, or padding
                block = block.lstrip(b"\0")
                self._unpacker = inflate.decompressobj(_GZIP) if block else self._unpacker
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
        except (ValueError, RecursionError):
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
        if self._head.startswith(_MAGIC):
            raise Damaged("compressed twice: the server, or a proxy, compresses on the way")
        if not sizes & {348, 540}:  # nibabel would let that pass with a warning
            raise Damaged(f"no NIfTI file, it starts with {self._head[:12]!r}")
        kind = nib.Nifti1Header if 348 in sizes else nib.Nifti2Header
        try:
            header = kind.from_fileobj(io.BytesIO(self._head[:kind.sizeof_hdr]))  # no extension
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
