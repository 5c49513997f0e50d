"""What a run of translate.py makes of which volume: names, and what is there already.

Owns which files a translation consists of and whether they are whole; how they are made is
`translator.py`'s, their names and records `data/derivatives.py`'s.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import bids
from data.derivatives import ENDING, derived_name, read_record, sidecar, stem
from data.subject import sha256
from translator import DIRECTIONS

SYNTHETIC, SCATTER, CYCLE = "synthetic", "syntheticSD", "cycleError"
STARTED = {"Description": "unfinished: translate.py writes this volume, or was stopped in doing so"}


@dataclass(frozen=True)
class Job:
    """One volume to translate.

    Attributes
    ----------
    source : the file
    direction : one of `DIRECTIONS`
    outputs : file to write by what it is (`SYNTHETIC`, `SCATTER`, `CYCLE`)
    name : of the source, for the record: below its tree, or of the file alone
    dropped : maps that the volume could have and that are not asked for
    """

    source: Path
    direction: str
    outputs: dict[str, Path]
    name: str
    dropped: tuple[Path, ...] = ()

    def is_done(self, described: dict[str, Any], overwrite: bool) -> bool:
        """Whether a run with the same checkpoint, options and source has made the files whole.

        Files whose record is `STARTED` are of a run that was killed, and are made again.

        Raises
        ------
        ValueError : they were made otherwise, or not by us, and may not be overwritten
        """
        found = {path: read_record(sidecar(path)) for path in self.outputs.values()}
        beside = {path: read_record(sidecar(path)) for path in self.left_over()}
        alike = {"CheckpointSHA256": described["CheckpointSHA256"], "Direction": self.direction,
                 "Settings": described["Settings"], "SourceSHA256": self._sha256_of_source()}
        for path, record in {**found, **beside}.items():
            there = path.exists()
            if record == STARTED:
                continue
            if "CheckpointSHA256" not in record and (there or sidecar(path).exists()):
                fault = "is there already, and no record beside it says that translate.py made it"
            elif there and any(record.get(key) != value for key, value in alike.items()):
                fault = "made with another checkpoint, other options or from another file"
            elif there and not self._has_mask_of(record):
                fault = "made with another brain mask"
            else:
                continue
            if overwrite:
                return False
            raise ValueError(f"{path}: {fault}; take another --out, or --overwrite")
        return all(path.exists() and record != STARTED for path, record in found.items())

    def left_over(self) -> list[Path]:
        """The `dropped` maps that a translation of before has left, by their records."""
        return [path for path in self.dropped
                if (record := read_record(sidecar(path))) == STARTED
                or "CheckpointSHA256" in record]

    def _has_mask_of(self, record: dict[str, Any]) -> bool:
        """Whether the brain mask that a record names, if any, is still the source's."""
        used = record.get("BrainMaskSHA256")
        return used is None or used == given_mask_sha256(self.source)

    def _sha256_of_source(self) -> str:
        """Of the source, once there is something made to compare it with."""
        made = self.source.is_file() and any(path.exists() for path in self.outputs.values())
        return sha256(self.source) if made else ""


def given_mask_sha256(source: Path) -> str:
    """Of the brain mask that lies beside a scan, or in its derivatives; "" without one."""
    try:
        return sha256(bids.brain_mask_path(bids.subject_of(source)))
    except (FileNotFoundError, ValueError):
        return ""


def plan_files(inputs: Sequence[Path], args: argparse.Namespace) -> list[Job]:
    """Jobs for single files; refuses now what could not work later."""
    jobs = []
    for source in inputs:
        if source.is_dir():
            raise ValueError(f"{source}: is a folder; name the volumes in it, or give a BIDS tree "
                             f"as --bids {source}")
        if not source.is_file() and not source.is_symlink():  # a dead one is told of later
            raise FileNotFoundError(f"{source}: no such file; check the name")
        if not ENDING.search(source.name):
            raise ValueError(f"{source}: not a .nii or .nii.gz file")
        direction = args.direction if args.direction != "auto" else direction_of(source)
        jobs.append(plan(source, direction, args.out, source.name, args))
    return check_plan(jobs, args)


def plan_tree(root: Path, scans: Sequence[Path], args: argparse.Namespace) -> list[Job]:
    """Jobs for the scans of a BIDS tree, into a tree of derivatives."""
    jobs = []
    for source in scans:
        name = source.relative_to(root)
        jobs.append(plan(source, args.direction, args.out / name.parent,
                         f"bids:raw:{name.as_posix()}", args))
    return check_plan(jobs, args)


def plan(source: Path, direction: str, folder: Path, name: str, args: argparse.Namespace) -> Job:
    """The job for a volume: which files its translation consists of, and which not."""
    start, end = DIRECTIONS[direction]
    suffixes = {SYNTHETIC: end, SCATTER: end, CYCLE: start}  # a cycle's error is of the source
    asked = {SYNTHETIC: True, SCATTER: bool(args.uncertainty), CYCLE: args.cycle_error}
    paths = {what: folder / derived_name(source, what, suffix) for what, suffix in suffixes.items()}
    return Job(source, direction, {what: path for what, path in paths.items() if asked[what]}, name,
               tuple(path for what, path in paths.items() if not asked[what]))


def check_plan(jobs: list[Job], args: argparse.Namespace) -> list[Job]:
    """Refuse an input as output, two inputs for one output, and one --match for two contrasts."""
    inputs = [job.source for job in jobs] + ([args.match] if args.match else [])
    kept = {path.resolve() for source in inputs for path in (source, sidecar(source))}
    for job in jobs:
        for path in job.outputs.values():
            if not kept.isdisjoint((path.resolve(), sidecar(path).resolve())):
                raise ValueError(f"{job.source}: would be written to {path}, and that is one of "
                                 "the inputs; take another --out")
    counts = Counter(job.outputs[SYNTHETIC] for job in jobs)
    for job in jobs:
        if counts[job.outputs[SYNTHETIC]] > 1:
            raise ValueError(f"{job.source}: another input would be written to "
                             f"{job.outputs[SYNTHETIC]}, too; translate them into different --out "
                             "folders")
    if args.match and len({job.direction for job in jobs}) > 1:
        raise ValueError(f"--match {args.match}: T1w and T2w are to be made; translate them in two "
                         "runs, each with a reference of its own")
    return jobs


def direction_of(source: Path) -> str:
    """The direction that a file's name says."""
    for direction, (start, _) in DIRECTIONS.items():
        if stem(source).endswith(start):
            return direction
    raise ValueError(f"{source}: the name does not end in _T1w or _T2w; say which it is with "
                     "--direction")
