"""`manifest.json` beside downloaded data: which files are whole, where from, who is done with."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.atomic import write_atomically
from data.transfer import lock, read_object

MANIFEST = "manifest.json"
SYNC_EVERY_S = 0.5
Content = dict[str, dict[str, Any]]
Change = Callable[[Content], None]


class Manifest:
    """`manifest.json`: which files are whole and where from, and which subjects are done with.

    `tag` is the snapshot. `files` maps a name to url, size, md5, sha256, id, tag, time, mtime_ns
    and, of files that a run was to keep, kept; `subjects` maps a label to the time, the caller's
    note and the same of the files that were used and deleted. Processes may share it.
    """

    def __init__(self, root: Path, tag: str):
        self.path, self.tag = root / MANIFEST, tag
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] = ()  # which file `content` was read from
        self._later: list[Change] = []  # in `content`, not yet on disk
        self._written = 0.0
        self.content: Content = {"files": {}, "subjects": {}}
        if any(root.glob(f"{MANIFEST}.*.tmp")):
            with _locked_folder(root):
                self._sweep()
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
        return objects(self.content["subjects"].get(subject, {}).get("files"))

    def note(self, subject: str) -> dict[str, Any]:
        """What the caller noted of a subject that was finished, {} if nothing."""
        noted = self.content["subjects"].get(subject, {}).get("note")
        return noted if isinstance(noted, dict) else {}

    def update(self, change: Change, *, later: bool = False) -> bool:
        """Apply a change to what is on disk now, and write it whole; returns whether it is written.

        `later` lets it wait for another one, or for `flush`, if the last writing was just now: a
        line a file would make hundreds of small files a second wait for the disk.
        """
        with self._lock:
            if later and time.monotonic() - self._written < SYNC_EVERY_S:
                self.content = _changed(self.content, [change])
                self._later.append(change)
                return False
            self._write([*self._later, change])
        return True

    def flush(self) -> None:
        """Write what was to wait."""
        with self._lock:
            if self._later:
                self._write(self._later)

    def _write(self, changes: list[Change]) -> None:
        with _locked_folder(self.path.parent):
            self._later = []
            self._read(again=True)
            content = _changed(self.content, changes)
            self._sweep()
            write_atomically(self.path, _manifest_text(self.tag, content).encode())
            self.content, self._seen = content, self._identity()
            self._written = time.monotonic()

    def _sweep(self) -> None:
        """Remove what a killed process has left; who writes holds the folder's lock."""
        for left in self.path.parent.glob(f"{MANIFEST}.*.tmp"):
            left.unlink(missing_ok=True)

    def _read(self, again: bool = False) -> None:
        seen = self._identity()
        if again or seen != self._seen:
            found = read_object(self.path)
            content = {key: objects(found.get(key)) for key in ("files", "subjects")}
            self.content, self._seen = _changed(content, self._later), seen

    def _identity(self) -> tuple[int, ...]:
        """Changes with every writing, as each makes a new file."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return ()
        return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _changed(content: Content, changes: list[Change]) -> Content:
    """A copy with the changes made."""
    copy = {key: dict(members) for key, members in content.items()}
    for change in changes:
        change(copy)
    return copy


def _manifest_text(tag: str, content: dict[str, dict[str, Any]]) -> str:
    """JSON with a line a file; an indent would take json's slow way, 20 times slower."""
    parts = [f'{{"format": "openneuro-manifest", "version": 1, "tag": {json.dumps(tag)}']
    for key, members in content.items():
        lines = (f"{json.dumps(name)}: {json.dumps(members[name])}" for name in sorted(members))
        parts.append(f'"{key}": {{\n' + ",\n".join(lines) + "}")
    return ",\n".join(parts) + "}\n"


def objects(found: Any) -> dict[str, Any]:
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
