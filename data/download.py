"""Downloads: a plan's files into a folder, subject by subject, each whole or absent.

Owns the order of things and the threads; what is whole stands in `data/manifest.py`, a single file
is fetched by `data/transfer.py`, what to fetch is decided in `data/openneuro.py`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data import bids
from data.manifest import Content, Manifest, objects
from data.openneuro import API_URL, Archive, Plan, SubjectFiles, place, size_text
from data.transfer import (ArchiveError, Busy, File, Part, Refused, Stopped, Transfer, part_paths,
                           read_note)
from data.whole_file import Damaged, Helper, inspect

# Subjects in a row that the archive was too busy for, with no file from it all the while, end the
# run: that is an outage, and the others would only be skipped one by one. One could be a bad file.
BUSY_SUBJECTS = 3
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, a limit on files

log = logging.getLogger("preprocess.openneuro")  # the command that shows what this module says


@dataclass(eq=False)
class _Group:
    """Files that are wanted together, and what became of them."""

    subject: SubjectFiles | None  # None: the common files
    files: tuple[File, ...]
    left: int
    whole: dict[str, dict] = field(default_factory=dict)  # name to manifest entry
    failed: dict[str, str] = field(default_factory=dict)  # name to reason
    busy: set[str] = field(default_factory=set)  # of the failed ones: may be had another time


class Download:
    """Fetch a plan's files, several at a time, and hand out subjects as theirs become whole.

        with Download(archive, plan, folder, ahead=4) as download:
            for subject, reason in download:
                ... use subject.sessions(download.root), or say why not ...
                download.finish(subject)

    A subject of which only some sessions can be had comes in parts: those together, and each other
    session by itself with its reason.

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
    done : asked for each subject, with the SHA-256 of its scans by path (None unless an earlier run
        has finished and deleted it) and the note of then; False fetches it, but for those of its
        sessions for which it says True. By default who was finished is left alone.
    connections : files at a time
    progress : show a bar over all bytes (on a terminal), or a line a subject

    Attributes
    ----------
    root : the dataset's folder
    finished : subjects that an earlier run has finished, and that are not handed out again

    Raises
    ------
    ValueError : a symbolic link where the files belong
    ArchiveError, OSError : while iterating; nobody answers, the archive answers that it cannot now,
        or the disk is full
    """

    def __init__(self, archive: Archive, plan: Plan, folder: Path, *, ahead: int = 2,
                 keep: bool = False, connections: int = 4, progress: bool = True,
                 done: Callable[[SubjectFiles, dict[Path, str] | None, dict[str, Any]], bool]
                 | None = None):
        self.plan, self.keep, self.ahead = plan, keep, max(ahead, 1)
        self.root = folder / plan.snapshot.dataset
        self._archive, self._tag = archive, plan.snapshot.tag
        self._line = replace(archive.line, stop=threading.Event())
        for file in plan.files:
            place(self.root, file.name)
        self.root.mkdir(parents=True, exist_ok=True)
        self._manifest = Manifest(self.root, self._tag)
        self._done = done or (lambda subject, hashes, note: hashes is not None)
        self.finished: list[SubjectFiles] = []
        self._past: list[SubjectFiles] = []  # and single sessions that it has finished
        self._todo: list[SubjectFiles] = []
        for subject in plan.subjects:
            self._look_back(subject)
        self._held: set[SubjectFiles] = set()
        self._busy: list[SubjectFiles] = []  # not to be had now; left as they are for a later run
        self._came = False  # a file from the archive since the last subject was settled
        self._jobs: queue.Queue[tuple[_Group, File] | None] = queue.Queue()
        self._ready: queue.Queue[_Group | None] = queue.Queue()
        self._fatal: BaseException | None = None
        self._lock = threading.Lock()
        # A thread more than connections: while a file waits for the disk, another one comes.
        self._connections, self._helper = threading.Semaphore(max(connections, 1)), Helper()
        self._threads = [threading.Thread(target=self._work, daemon=True)
                         for _ in range(max(connections, 1) + 1)]
        wanted = [*plan.common, *(file for s in self._todo for file in s.files)]
        self._total = sum(f.size or 0 for f in wanted if not self._looks_whole(f))
        self._got, self._settled, self._start = 0, 0, time.monotonic()
        self._noted: list[Path] = []  # notes of files that the manifest has or soon will have
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
        self._helper.close()
        self._bar.close()
        with contextlib.suppress(OSError):  # a full disk, which is said already; notes remain
            self._manifest.flush()
            self._drop(list(self._noted))

    def __iter__(self) -> Iterator[tuple[SubjectFiles, str]]:
        """Each subject with "", or with the reason why its scans cannot be had."""
        self._start = time.monotonic()
        for thread in self._threads:
            thread.start()
        for subject in () if self.keep else self._past:
            self._clean(subject)  # what a kill before the mark, or before the deletion, has left
        self._submit(_Group(None, self.plan.common, len(self.plan.common)))
        waiting, under_way, common = deque(self._todo), 0, 1
        while waiting or under_way or common:
            while waiting and under_way + self._kept() < max(self.ahead, self._kept() + 1):
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
            yield from self._settle(group.subject, group)

    def _look_back(self, subject: SubjectFiles) -> None:
        """Sort out what of a subject is done with."""
        def is_done(part: SubjectFiles) -> bool:
            marked = self._manifest.finished(part.subject)
            return self._done(part, self.hashes(part) if marked else None, self.noted(part))

        if is_done(subject):
            self.finished.append(subject)
            self._past.append(subject)
            return
        sessions = [session for session, *_ in subject.scans]
        past = {s for s in sessions if len(sessions) > 1 and is_done(subject.only([s]))}
        left = [s for s in sessions if s not in past]
        if not left:
            self.finished.append(subject)
        else:
            self._todo.append(subject.only(left) if past else subject)
        if past:
            self._past.append(subject.only(past, shared=not left))

    def finish(self, subject: SubjectFiles, note: dict[str, Any] | None = None) -> None:
        """Be done with a subject: remember it and delete its files, unless they are kept.

        May be called from any thread, in any order; does nothing for what could not be had or is
        finished already. `note` (JSON) is remembered with it, see `noted`.
        """
        if subject not in self._held:
            return
        if not self.keep:
            ours = self._ours(subject)
            scans = {name for scan in subject.scans for name in scan[1:]}
            whole = scans <= {file.name for file in ours}  # others' may change, and are looked at

            def mark(content: Content) -> None:
                entries = {f.name: content["files"][f.name] for f in subject.files
                           if f.name in content["files"]}
                for file in ours:
                    content["files"].pop(file.name, None)
                if whole:
                    before = {} if subject in self.plan.subjects else content["subjects"].get(
                        subject.subject, {})  # of its other sessions
                    content["subjects"][subject.subject] = {
                        "time": _now(), "files": {**objects(before.get("files")), **entries},
                        "note": {**objects(before.get("note")), **(note or {})}}

            self._manifest.update(mark)
            self._delete(ours)
        self._held.discard(subject)
        self._ready.put(None)

    def hashes(self, subject: SubjectFiles) -> dict[Path, str] | None:
        """SHA-256 by path of a subject's scans, on disk or deleted; None unless all were whole."""
        found = self._manifest.finished(subject.subject)
        scans = {name for scan in subject.scans for name in scan[1:]}
        files = [file for file in subject.files if file.name in scans]
        entries = [self._looks_whole(file) or found.get(file.name, {}) for file in files]
        if not all(_is_same(entry, file, self._tag) for entry, file in zip(entries, files)):
            return None
        return {self.root / file.name: entry["sha256"] for entry, file in zip(entries, files)}

    def noted(self, subject: SubjectFiles) -> dict[str, Any]:
        """The note that an earlier run has finished a subject with, {} if there is none."""
        return self._manifest.note(subject.subject)

    def source(self) -> dict[str, Any]:
        """What `bids.describe` says, with this snapshot; complete after the iteration.

        A snapshot's description often bears the DOI of the one before it, or none; the archive's
        own DOIs follow from the tag.
        """
        dataset = self.plan.snapshot.dataset
        found = {**bids.describe(self.root, dataset), "snapshot": self._tag}
        if self._archive.api_url == API_URL:
            found["doi"] = f"10.18112/openneuro.{dataset}.v{self._tag}"
        return found

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

    def _kept(self) -> int:
        """Subjects on disk that wait for the caller, or for a later run."""
        return len(self._held) + len(self._busy)

    def _settle(self, subject: SubjectFiles, group: _Group) -> list[tuple[SubjectFiles, str]]:
        """What of a subject can be used, with "", and each of its sessions that cannot, and why."""
        failed = group.failed
        scans = {name for scan in subject.scans for name in scan[1:]}
        self._warn({name: why for name, why in failed.items() if name not in scans})
        lost, may_come = {}, []
        for session, *names in subject.scans:
            if missing := [name for name in names if name in failed]:
                lost[session] = "; ".join(f"{name}: {failed[name]}" for name in missing)
                may_come += [session] if group.busy.issuperset(missing) else []
        whole = [session for session, *_ in subject.scans if session not in lost]
        gone = lost.keys() - set(may_come)
        if gone and not self.keep:
            self._clean(subject.only(gone, shared=not whole and not may_come))
        self._bear(subject.only(may_come, shared=not whole) if may_come else None,
                   "; ".join(lost.values()))
        parts = [(subject.only([session]), reason) for session, reason in lost.items()]
        if whole:
            parts.insert(0, (subject.only(whole) if lost else subject, ""))
            self._held.add(parts[0][0])
        if self._say:
            self._say_where(subject, "whole" if not lost else
                            f"{len(lost)} of {len(subject.scans)} sessions not to be had" if whole
                            else "not to be had")
        return parts

    def _bear(self, busy: SubjectFiles | None, reason: str) -> None:
        """Leave what has come of a subject that the archive is too busy for, while nothing comes.

        Where something has come since, there was no outage: those before are as good as refused.

        Raises
        ------
        ArchiveError : so many in a row that it is an outage
        """
        if self._came:
            self._came = False
            for subject in () if self.keep else self._busy:
                self._clean(subject)
            self._busy.clear()
        if busy:
            self._busy.append(busy)
        if len(self._busy) >= BUSY_SUBJECTS:
            raise ArchiveError(f"{self.plan.snapshot.dataset}: the archive gives nothing now "
                               f"({reason}); wait, then run the same command again: it goes on "
                               "from here")

    def _say_where(self, subject: SubjectFiles, what: str) -> None:
        """What the bar would show, as a line."""
        self._settled += 1
        rate = self._got / max(time.monotonic() - self._start, 1e-3)
        how = (f"{size_text(self._got)} of {size_text(self._total)}  {size_text(rate)}/s  "
               f"about {(self._total - self._got) / rate:.0f} s left") if rate else "from disk"
        log.info("%s  %d/%d  sub-%s  %s  %s", self.plan.snapshot.dataset, self._settled,
                 len(self._todo), subject.subject, what, how)

    def _warn(self, failed: dict[str, str]) -> None:
        for name, why in sorted(failed.items()):
            log.warning("%s %s: not to be had, and not needed (%s)", self.plan.snapshot.dataset,
                        name, why)

    def _ours(self, subject: SubjectFiles) -> list[File]:
        """A subject's files that we may delete: fetched by us, and by no run that was to keep them.
        """
        def ours(name: str) -> bool:
            entry = self._manifest.file(name)
            return not entry.get("kept") and (bool(entry.get("url")) or
                                              part_paths(self.root / name)[1].exists())

        return [file for file in subject.files if ours(file.name)]

    def _clean(self, subject: SubjectFiles) -> None:
        """Remove what is left of a subject that is done with, or that cannot be had."""
        ours = self._ours(subject)
        # Marked files have no entry any more, but are remembered by what they were.
        marked = self._manifest.finished(subject.subject)
        ours += [file for file in subject.files if file not in ours and marked.get(
            file.name, {}).get("url") and not self._manifest.file(file.name)]
        if known := {file.name for file in ours if self._manifest.file(file.name)}:
            def forget(content: Content) -> None:
                for name in known:
                    content["files"].pop(name, None)

            self._manifest.update(forget)
        self._delete(ours)
        for file in subject.files:
            for name in part_paths(self.root / file.name):
                name.unlink(missing_ok=True)

    def _delete(self, files: list[File]) -> None:
        """Remove files, finished or not, and the folders that this empties."""
        for file in files:
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
                    entry = self._fetch(file)
                    group.whole[file.name] = {**entry, "kept": True} if self.keep else entry
                except (Refused, ValueError) as error:
                    group.failed[file.name] = str(error)
                    if isinstance(error, Busy):
                        group.busy.add(file.name)
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
        """Enter files into the manifest; their notes go when it is written.

        A kill before that costs another look at the files: their notes say whose they are.
        """
        fresh = {name: entry for name, entry in whole.items() if self._manifest.file(name) != entry}
        notes = [part_paths(self.root / name)[1] for name in whole]
        with self._lock:
            before = list(self._noted)  # of entries that the next writing is sure to hold
        if fresh and self._manifest.update(lambda content: content["files"].update(fresh),
                                           later=True):
            self._drop(before + notes)
        else:
            with self._lock:
                self._noted += notes

    def _drop(self, notes: list[Path]) -> None:
        dropped = set(notes)
        for note in dropped:
            note.unlink(missing_ok=True)
        with self._lock:
            self._noted = [note for note in self._noted if note not in dropped]

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
        if os.path.lexists(path):
            if entry := self._is_whole(file):
                return entry
            if entry := self._adopt(file, path):
                self._count(0, -(file.size or 0))
                return entry
        if not os.path.isdir(path.parent):
            os.makedirs(path.parent, exist_ok=True)
        part = Part(path, self._line.stop, self._helper)
        try:
            if os.path.lexists(path):  # maybe by another process
                self._manifest.refresh()
                if entry := self._is_whole(file) or self._adopt(file, path):
                    part.discard()
                    self._count(0, -(file.size or 0))
                    return entry
                self._refuse_others(file, path, part)
                path.unlink(missing_ok=True)  # a file beside a note is one that we renamed
            transfer = Transfer(self._line, file, part, self._tag, self._count)
            with self._connections:
                if self._line.stop.is_set():
                    raise Stopped
                facts = transfer.run(self._archive.addresses(self.plan.snapshot, file))
            os.fsync(part.handle)
            # Its folder is not synced: a rename lost with the power leaves the .part and its note.
            os.replace(part.path, path)
            self._came = True
            return self._entry(file, path, facts, part.origin)
        finally:
            part.close()

    def _refuse_others(self, file: File, path: Path, part: Part) -> None:
        """Raise ValueError for a whole file that no run of this program has put there."""
        if self._manifest.file(file.name) or read_note(part_paths(path)[1]):
            return
        with contextlib.suppress(Damaged):
            inspect(path, file.name)
            part.discard()
            raise ValueError(f"{path}: is there already and is not this snapshot's; move it away, "
                             "or choose another --downloads")

    def _looks_whole(self, file: File) -> dict[str, Any] | None:
        """The manifest's entry of a file that is on disk in its size, else None."""
        entry = self._manifest.file(file.name)
        if not _is_same(entry, file, self._tag):
            return None
        path = place(self.root, file.name)
        return entry if path.is_file() and path.stat().st_size == entry.get("size") else None

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
        if not path.is_file():
            return None
        note = read_note(part_paths(path)[1])
        ours = note.get("tag") == self._tag
        if not ours and self._manifest.file(file.name):
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
