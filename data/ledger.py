"""What a store has, what a run wants of it, and what cannot be had.

Owns the question whether a session's rows are to be made; they are made in `data/subject.py` and
written by `data/store.py`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from data.bids import Subject
from data.store import number, part_rows, read_header, read_table
from data.subject import Settings, recipe, sha256

OLDER = "of_other_snapshots"  # in a source: ids whose rows are from another snapshot than the rest

log = logging.getLogger("preprocess.ledger")  # the command that shows what this module says


class Ledger:
    """What the store has, what this run wants of it, and what cannot be had.

    Attributes
    ----------
    recipes : id to recipe of all sessions that this run has met
    attempts : id to recipe with the limits of the brain's volume, by which what fails is known
    skipped : id to reason
    """

    def __init__(self, out: Path, method: str, settings: Settings, skipped: dict[str, str]):
        self._method, self._settings = method, settings
        self.recipes: dict[str, str] = {}
        self.attempts: dict[str, str] = {}
        self.skipped = dict(skipped)
        header = read_header(out)
        sources = {source["dataset"]: source for source in header.get("sources", [])}
        self._stored = {
            row["id"]: {"snapshot": snapshot_of(sources.get(row["dataset"], {}), row["id"]), **row}
            for row in read_table(out / "subjects.tsv")}
        self._parts = part_rows(out)

    def lacks(self, session: Subject, hashes: dict[Path, str]) -> bool:
        """Enter a session; whether its rows are still to be made."""
        try:
            keys = self._keys(session, hashes)
        except OSError as error:
            self.skip(session.id, str(error).replace(f"{session.root}/", ""))
            return False
        held = self._held(session.id, keys)
        self.recipes[session.id], self.attempts[session.id] = held or keys[0], keys[1]
        if held:
            return False
        if session.id in self._stored:
            log.info("%s: its files or its brain extraction changed, its rows are to be made anew",
                     session.id)
        return True

    def knows(self, sessions: list[Subject], snapshot: str, hashes: dict[Path, str] | None,
              note: dict[str, Any]) -> bool:
        """Whether sessions are stored already, or failed before by the same recipe.

        Parameters
        ----------
        snapshot : that they are of
        hashes : of their files where those are gone, else None
        note : id to recipe and reason of what failed then
        """
        if self._remembers(sessions, snapshot):
            return True
        if hashes is None:
            return False
        keys = {session.id: self._keys(session, hashes) for session in sessions}
        held = {name: self._held(name, keys[name]) for name in keys}
        failed = {name: note[name] for name in keys if isinstance(note.get(name), dict)
                  and note[name].get("recipe") == keys[name][1]}
        if not all(name in failed or held[name] for name in keys):
            return False
        self.recipes.update({name: held[name] or keys[name][0] for name in keys})
        for name, what in failed.items():
            self.skip(name, str(what.get("reason")))
        return True

    def _remembers(self, sessions: list[Subject], snapshot: str) -> bool:
        """Whether sessions of a snapshot are stored, judged by the names of their files alone.

        A snapshot never changes, so files of one name are files of one content.
        """
        keys = {}
        for session in sessions:
            for row in filter(None, (self._parts.get(session.id), self._stored.get(session.id))):
                paths = {session.root / row["t1w"]: row["t1w_sha256"],
                         session.root / row["t2w"]: row["t2w_sha256"]}
                if (row.get("snapshot") == snapshot and paths.keys() == {session.t1w, session.t2w}
                        and row["recipe"] in self._keys(session, paths) and self._believes(row)):
                    keys[session.id] = row["recipe"]
        if len(keys) < len(sessions):
            return False
        self.recipes.update(keys)
        return True

    def _keys(self, session: Subject, hashes: dict[Path, str]) -> tuple[str, str]:
        """Recipes of its rows and of the attempt; the latter was also the rows' in old stores."""
        rows, attempt = (recipe(session, self._method, self._settings, hashes=hashes,
                                limits=limits)[2] for limits in (False, True))
        return rows, attempt

    def _held(self, name: str, keys: tuple[str, str]) -> str:
        """The recipe of the rows that are there and hold, "" if there are none."""
        there = [rows[name]["recipe"] for rows in (self._stored, self._parts)
                 if name in rows and self._believes(rows[name])]
        return next((key for key in keys if key in there), "")

    def _believes(self, row: dict[str, str]) -> bool:
        """Whether its brain is within this run's limits, which may not be those of its own run."""
        low, high = self._settings.brain_ml
        return low <= number(row, "brain_ml") <= high

    def skip(self, name: str, reason: str) -> None:
        """Leave a session out."""
        self.skipped[name] = reason

    @property
    def made(self) -> dict[str, str]:
        """Id to recipe of the sessions that are not left out."""
        return {name: key for name, key in self.recipes.items() if name not in self.skipped}


Found = tuple[str, str, Callable[[], set[str]]]  # dataset, id, what gives the hashes of its scans


def refuse_namesakes(out: Path, found: Iterable[Found]) -> None:
    """Stop where a tree only bears the name of one in the store, and would replace other people.

    A tree may lie anywhere, grow, and have scans corrected. But where a stored session has two
    other scans now and no stored session of its dataset has kept even one, this is another tree.

    Raises
    ------
    ValueError : says which session
    """
    stored = {row["id"]: {row.get("t1w_sha256"), row.get("t2w_sha256")}
              for row in read_table(out / "subjects.tsv")}
    same: set[str] = set()
    other: dict[str, str] = {}
    for dataset, name, hashes in found:
        if name in stored and dataset not in same:
            now = hashes()  # of one session, as a rule
            if now & stored[name]:
                same.add(dataset)
            elif len(now) == 2:
                other.setdefault(dataset, name)
    for dataset in sorted(other.keys() - same):
        raise ValueError(
            f"{out}: {other[dataset]} and the rest of '{dataset}' are there from other scans; "
            "another tree of that name? Rename its folder, which names the dataset; or, if all "
            "scans of the same people were made anew, choose another --out")


def of_trees(sessions: Iterable[Subject]) -> Iterable[Found]:
    """For `refuse_namesakes`: sessions with their files on disk."""
    return ((s.dataset, s.id, partial(_hashes, s)) for s in sessions)


def _hashes(session: Subject) -> set[str]:
    """Hashes of those of its two scans that can be read."""
    found = set()
    for path in (session.t1w, session.t2w):
        with contextlib.suppress(OSError):
            found.add(sha256(path))
    return found


def of_rows(rows: Iterable[dict[str, str]], recipes: dict[str, str]) -> Iterable[Found]:
    """For `refuse_namesakes`: those of the rows that have the recipes, but for an archive's.

    An archive's accession number is no other dataset's, and a new snapshot may change every scan.
    """
    return ((row["dataset"], row["id"], partial(set, (row["t1w_sha256"], row["t2w_sha256"])))
            for row in rows if recipes.get(row["id"]) == row["recipe"] and not row.get("snapshot"))


def snapshot_of(source: dict[str, Any], name: str) -> str:
    """The snapshot that a session's rows are from, by its dataset's source in `store.json`."""
    return source.get(OLDER, {}).get(name, source.get("snapshot", ""))


def merge_sources(old: list[dict[str, Any]], new: list[dict[str, Any]], rows: list[dict[str, str]],
                  recipes: dict[str, str]) -> list[dict[str, Any]]:
    """Sources of a store that has grown; rows that stay from another snapshot are named.

    Parameters
    ----------
    old, new : sources of the store before and of this run
    rows : of `subjects.tsv` before
    recipes : id to recipe of what this run has met: that is of its snapshot now
    """
    before = {source["dataset"]: source for source in old}
    merged = dict(before)
    for source in new:
        was = before.get(source["dataset"], {})
        older = {row["id"]: snapshot_of(was, row["id"]) for row in rows
                 if row["dataset"] == source["dataset"] and row["id"] not in recipes}
        older = {name: tag for name, tag in older.items() if tag != source["snapshot"]}
        merged[source["dataset"]] = {**source, OLDER: older} if older else source
    return [merged[name] for name in sorted(merged)]
