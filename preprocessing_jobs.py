"""What preprocess.py does with sessions: each into a part of the store, in worker processes."""

from __future__ import annotations

import functools
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data import brain, contrast, store
from data.bids import Subject
from data.hdbet import ensure_weights
from data.ledger import Ledger
from data.sources import Arrival, Snapshots, Trees
from data.subject import Settings, prepare
from data.nifti import NotNow
from data.workers import Workers

log = logging.getLogger("preprocess.jobs")
NETWORKS = ("hd-bet", "hd-bet+tta", "deepbet")
Source = Trees | Snapshots
NO_MEMORY = "allocate memory|bad_alloc"  # in a RuntimeError of SimpleITK or torch


@dataclass(frozen=True)
class How:
    """How parts are made, and where they go.

    Attributes
    ----------
    method : brain extraction, one of `brain.METHODS`, or "hd-bet+tta"
    settings : see there
    device : of the brain extraction, "cpu" where that needs none
    out : the store's folder
    """

    method: str
    settings: Settings
    device: str
    out: Path


@dataclass(frozen=True)
class Task:
    """What a worker process needs to make the parts of one subject."""

    sessions: tuple[Subject, ...]
    snapshot: str
    how: How


@dataclass(frozen=True)
class Outcome:
    """Why a session was skipped, "" if it was not, and whether the next run need not try again.

    `recipe` is that of the rows that were made: files may have changed since they were looked at.
    """

    reason: str = ""
    is_lasting: bool = True
    recipe: str = ""


class Progress:
    """A bar on a terminal, a line a session elsewhere."""

    def __init__(self, total: int):
        self._total, self._count, self._start = total, 0, time.monotonic()
        self._bar = tqdm(total=total, unit="session", desc="preprocess", disable=None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def pass_over(self, n: int) -> None:
        """Count sessions that need no work."""
        self._count += n
        self._bar.update(n)

    def say(self, name: str, reason: str) -> None:
        """Count a session that is done, or skipped for a reason."""
        self.pass_over(1)
        if self._bar.disable:
            log.info("%d/%d  %s  %s  (%.0f s)", self._count, self._total, name,
                     f"skipped: {reason}" if reason else "done", time.monotonic() - self._start)


def work(source: Source, ledger: Ledger, how: How, processes: int) -> None:
    """Make the parts of all sessions that the store lacks, each when its files are there."""
    total = len(source.sessions)
    for line in source.promise():
        log.info("%s", line)
    with Workers(min(processes, total)) as workers, Progress(total) as progress:
        def load() -> None:  # what is missing is said now, not by each worker
            if how.method.startswith("hd-bet") and workers.count > 1:
                ensure_weights()
            elif how.method != "mask":
                _extractor(how.method, how.device)

        def begin() -> None:
            workers.wait()  # so that two datasets are never on disk at once
            load()

        def known(sessions: list[Subject], snapshot: str, hashes: dict[Path, str] | None,
                  note: dict[str, Any]) -> bool:
            found = ledger.knows(sessions, snapshot, hashes, note)
            progress.pass_over(len(sessions) if found else 0)
            return found

        def settle(arrival: Arrival, outcomes: dict[str, Outcome]) -> None:
            for name, outcome in outcomes.items():
                progress.say(name, outcome.reason)
                if outcome.reason:
                    ledger.skip(name, outcome.reason)
                else:
                    ledger.recipes[name] = outcome.recipe
            arrival.release({name: {"recipe": ledger.attempts[name], "reason": outcome.reason}
                             for name, outcome in outcomes.items()
                             if outcome.reason and outcome.is_lasting})

        for arrival in source.arrivals(known, begin):
            if arrival.reason:
                for session in arrival.sessions:
                    ledger.skip(session.id, arrival.reason)
                    progress.say(session.id, arrival.reason)
                continue
            todo = tuple(s for s in arrival.sessions if ledger.lacks(s, arrival.hashes))
            progress.pass_over(len(arrival.sessions) - len(todo))
            if todo:
                load()
                workers.submit(make_parts, Task(todo, arrival.snapshot, how),
                               functools.partial(settle, arrival))
            else:
                arrival.release({})
        workers.wait()


def find_device(name: str, method: str) -> str:
    """The device that a brain extraction runs on, from what `--device` says; "cpu" if it has none.

    Raises
    ------
    ValueError : no such device here
    """
    if method not in NETWORKS:
        return "cpu"
    if name == "cpu":
        return name
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    index = name.partition(":")[2] or "0"
    if not (name.partition(":")[0] == "cuda" and index.isdecimal()
            and int(index) < torch.cuda.device_count()):
        raise ValueError(f"--device {name}: no such device here; take auto or cpu")
    return name


@functools.lru_cache(maxsize=1)
def _extractor(method: str, device: str) -> Callable:
    """The brain extractor of this process, loaded once; one thread always gives the same bits."""
    if method in NETWORKS:
        import torch

        if device == "cpu":
            torch.set_num_threads(1)
        else:
            torch.cuda.set_device(device)  # deepbet takes the present one
    return brain.make_extractor(method, device=device)


def make_parts(task: Task) -> dict[str, Outcome]:
    """Prepare sessions and store their parts; id to why it was skipped, and whether for good."""
    how = task.how
    extractor = None if how.method == "mask" else _extractor(how.method, how.device)
    outcomes = {}
    for session in task.sessions:
        try:
            part = prepare(session, how.method, how.settings, extractor)
        except (ValueError, FileNotFoundError) as error:
            reason = " ".join(str(error).split()).replace(f"{session.root}{os.sep}", "")
            is_there = session.t1w.exists() and session.t2w.exists()  # nobody took them away
            is_lasting = is_there and not isinstance(error, NotNow)
            outcomes[session.id] = Outcome(reason, is_lasting)
            continue
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not re.search(NO_MEMORY, str(error)):
                raise
            outcomes[session.id] = Outcome("no memory left to work on this pair; take fewer "
                                           "--workers", is_lasting=False)
            continue
        note = "; ".join(filter(None, (part.row["note"], _doubt(part, how.settings.spacing_mm))))
        part.row["note"] = note
        store.write_part(how.out, part, snapshot=task.snapshot)
        outcomes[session.id] = Outcome(recipe=part.row["recipe"])
    return outcomes


def _doubt(part: store.Part, spacing_mm: float) -> str:
    """What of a subject's two scans looks like the other contrast, "" where nothing does."""
    spacing = float(part.row["slice_spacing_mm"]), spacing_mm
    x, y = (contrast.tell(contrast.measure(slices, part.mask, spacing))
            for slices in (part.t1w, part.t2w))
    if (x, y) == ("T2w", "T1w"):
        return "T1w looks like a T2w, and T2w like a T1w: are the two files swapped?"
    if x == "T2w":
        return "T1w looks like a T2w: is it a T1w?"
    return "T2w looks like a T1w: is it a T2w?" if y == "T1w" else ""
