"""Shards: parts of one job on many machines, and what it takes to pack them as one run would.

A shard writes the parts of its subjects and, when it is through, a record of what it was to do and
what became of it. The store itself is written by one process afterwards, from all of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.atomic import write_atomically
from data.store import PARTS, part_rows, read_table

FOLDER = "shards"
PACKED = "shards.packed"  # what FOLDER is called while it is removed


@dataclass(frozen=True)
class Shard:
    """Number `k` (from 1) of `n`."""

    k: int
    n: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `2/4`.

        Raises
        ------
        ValueError : not of that form, or out of range
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"--shard {text}: write k/n with k from 1 to n, such as 2/4")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.k}/{self.n}"

    def share(self, everybody: Sequence) -> list:
        """Every n-th, from the k-th: each belongs to one shard."""
        return list(everybody[self.k - 1::self.n])


@dataclass(frozen=True)
class Record:
    """What a shard, or all of them, had to do and did.

    Attributes
    ----------
    header : `store.json` without counts
    choice : what was asked for beside: splits, brain extraction, datasets and their subjects
    recipes : id to recipe of all that could be prepared
    skipped : id to reason
    """

    header: dict[str, Any]
    choice: dict[str, Any]
    recipes: dict[str, str]
    skipped: dict[str, str]


def write_record(folder: Path, shard: Shard, record: Record) -> None:
    """Say in `folder` that a shard is through."""
    path = _path(folder, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(asdict(record), indent=1) + "\n").encode())


def lock_path(folder: Path, shard: Shard) -> Path:
    """A file to lock by who works on a shard."""
    return _path(folder, shard).with_suffix(".lock")


def drop_record(folder: Path, shard: Shard) -> None:
    """Take that back, before the shard is worked on anew."""
    _path(folder, shard).unlink(missing_ok=True)


def read_records(folders: Sequence[Path]) -> Record | None:
    """All shards of a job as one record; None where there is no record at all.

    Raises
    ------
    ValueError : a shard is missing, records of different jobs, or a damaged one
    """
    found: dict[Shard, tuple[Path, Record]] = {}
    for path in sorted(p for folder in folders for p in (folder / FOLDER).glob("*-of-*.json")):
        shard = Shard.parse(path.stem.replace("-of-", "/"))
        found.setdefault(shard, (path, _read(path)))
    if not found:
        return None
    counts = {shard.n for shard in found}
    where = ", ".join(map(str, folders))
    if len(counts) > 1:
        raise ValueError(f"{where}: has shards of {' and of '.join(map(str, sorted(counts)))}; "
                         f"delete the records of the other job in its {FOLDER}/")
    lacking = [k for k in range(1, max(counts) + 1) if Shard(k, max(counts)) not in found]
    if lacking:
        raise ValueError(f"{where}: shards {', '.join(map(str, lacking))} of {max(counts)} are not "
                         "through; run them first, or name their folders too")
    return _join([found[shard] for shard in sorted(found, key=lambda shard: shard.k)])


def _join(found: list[tuple[Path, Record]]) -> Record:
    first_path, first = found[0]
    sources: dict[str, dict] = {}
    recipes: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for path, record in found:
        for name in ("header", "choice"):
            ours, theirs = ({k: v for k, v in getattr(r, name).items()
                             if k not in ("sources", "versions")} for r in (first, record))
            if ours != theirs:
                raise ValueError(f"{path}: asked for {theirs}, {first_path} for {ours}; run all "
                                 "shards with the same options")
        sources.update({source["dataset"]: source for source in record.header["sources"]})
        recipes.update(record.recipes)
        skipped.update(record.skipped)
    header = {**first.header, "sources": [sources[name] for name in sorted(sources)]}
    return Record(header, first.choice, recipes, skipped)


def differing_versions(folders: Sequence[Path]) -> dict[str, set[str]]:
    """Tools of which the shards had different versions: one run would not give the same bytes."""
    versions: dict[str, set[str]] = {}
    for path in (p for folder in folders for p in (folder / FOLDER).glob("*-of-*.json")):
        for tool, version in _read(path).header["versions"].items():
            versions.setdefault(tool, set()).add(version)
    return {tool: found for tool, found in versions.items() if len(found) > 1}


def gather(folder: Path, others: Sequence[Path], recipes: dict[str, str]) -> None:
    """Copy the parts of other folders into `folder`, each whole or not at all.

    Raises
    ------
    ValueError : a part that no folder has, nor the store in `folder`
    """
    there = {row["id"]: row["recipe"] for row in read_table(folder / "subjects.tsv")}
    there.update({name: row["recipe"] for name, row in part_rows(folder).items()})
    for other in others:
        for name, row in part_rows(other).items():
            if row["recipe"] == recipes.get(name) != there.get(name):
                _copy(other / PARTS / f"{name}.npz", folder / PARTS / f"{name}.npz")
                there[name] = row["recipe"]
    lost = sorted(name for name, key in recipes.items() if there.get(name) != key)
    if lost:
        raise ValueError(f"{folder}: no part of {', '.join(lost[:5])}"
                         f"{' and others' if len(lost) > 5 else ''}; run its shard again, or name "
                         "the folder that has it")


def forget(folder: Path) -> None:
    """Remove the records of a job that is packed: all at once, whenever a kill comes."""
    if (folder / FOLDER).is_dir():
        os.replace(folder / FOLDER, folder / PACKED)
        shutil.rmtree(folder / PACKED)


def _path(folder: Path, shard: Shard) -> Path:
    return folder / FOLDER / f"{shard.k}-of-{shard.n}.json"


def _read(path: Path) -> Record:
    try:
        record = Record(**json.loads(path.read_text(encoding="utf-8")))
        [source["dataset"] for source in record.header["sources"]]
        record.header["versions"].items(), record.recipes.items(), record.skipped.items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path}: not a shard's record; delete it and run that shard again"
                         ) from None
    return record


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb+") as copy:
            os.fsync(copy.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
