"""What a store has, what a run wants of it, and what cannot be had.

Owns the question whether a session's rows are to be made; they are made in `data/subject.py` and
written by `data/store.py`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from data.bids import Subject
from data.store import part_rows, read_header, read_table
from data.subject import Settings, recipe

log = logging.getLogger("preprocess.ledger")  # the command that shows what this module says


class Ledger:
    """What the store has, what this run wants of it, and what cannot be had.

    Attributes
    ----------
    recipes : id to recipe of all sessions that this run has met
    skipped : id to reason
    """

    def __init__(self, out: Path, method: str, settings: Settings, skipped: dict[str, str]):
        self._method, self._settings = method, settings
        self.recipes: dict[str, str] = {}
        self.skipped = dict(skipped)
        header = read_header(out)
        snapshots = {source["dataset"]: source["snapshot"] for source in header.get("sources", [])}
        self._stored = {row["id"]: {"snapshot": snapshots.get(row["dataset"], ""), **row}
                        for row in read_table(out / "subjects.tsv")}
        self._parts = part_rows(out)

    def lacks(self, session: Subject, hashes: dict[Path, str]) -> bool:
        """Enter a session; whether its rows are still to be made."""
        try:
            key = self._key(session, hashes)
        except OSError as error:
            self.skip(session.id, str(error))
            return False
        self.recipes[session.id] = key
        if self._holds(session.id, key):
            return False
        if session.id in self._stored:
            log.info("%s: its files or its brain extraction changed, its rows are made anew",
                     session.id)
        return True

    def knows(self, sessions: list[Subject], hashes: dict[Path, str],
              note: dict[str, Any]) -> bool:
        """Whether sessions whose files are gone are stored, or failed before by the same recipe."""
        for session in sessions:
            key, failed = self._key(session, hashes), note.get(session.id)
            if isinstance(failed, dict) and failed.get("recipe") == key:
                self.skip(session.id, str(failed.get("reason")))
            elif not self._holds(session.id, key):
                return False
            self.recipes[session.id] = key
        return True

    def remembers(self, sessions: list[Subject], snapshot: str) -> bool:
        """Whether sessions of a snapshot are stored, judged by the names of their files alone.

        A snapshot never changes, so files of one name are files of one content.
        """
        keys = {}
        for session in sessions:
            for row in filter(None, (self._parts.get(session.id), self._stored.get(session.id))):
                paths = {session.root / row["t1w"]: row["t1w_sha256"],
                         session.root / row["t2w"]: row["t2w_sha256"]}
                if (row.get("snapshot") == snapshot and paths.keys() == {session.t1w, session.t2w}
                        and self._key(session, paths) == row["recipe"]):
                    keys[session.id] = row["recipe"]
        if len(keys) < len(sessions):
            return False
        self.recipes.update(keys)
        return True

    def _key(self, session: Subject, hashes: dict[Path, str]) -> str:
        return recipe(session, self._method, self._settings, hashes=hashes)[2]

    def _holds(self, name: str, key: str) -> bool:
        return any(name in rows and rows[name]["recipe"] == key
                   for rows in (self._stored, self._parts))

    def skip(self, name: str, reason: str) -> None:
        """Leave a session out."""
        self.skipped[name] = reason

    @property
    def made(self) -> dict[str, str]:
        """Id to recipe of the sessions that are not left out."""
        return {name: key for name, key in self.recipes.items() if name not in self.skipped}
