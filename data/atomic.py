"""Files that are there whole or not at all, whatever stops the program or the machine.

Owns the way to the disk; what is written, and under what name, is its callers'.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that its name only ever stands for the whole content."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            write_synced(temporary, [content])
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_synced(path: Path, blocks: Iterable[bytes]) -> None:
    """Write blocks and wait for the disk; an error names the file."""
    with naming(path), open(path, "wb") as out:
        for block in blocks:
            out.write(block)
        out.flush()
        os.fsync(out.fileno())


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the disk names `path`: that of a full one names nothing, others a file's
    temporary name."""
    try:
        yield
    except OSError as error:
        if error.errno is None or not (error.filename is None or _is_temporary(error, path)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def _is_temporary(error: OSError, path: Path) -> bool:
    name = os.path.basename(os.fsdecode(error.filename))
    return name.endswith(".tmp") and path.name in name


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
