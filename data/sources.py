"""Where subjects come from: BIDS trees on disk, or snapshots of an archive as they are downloaded.

Both sources say who is there and what is missing before any work, hand out each subject when its
files are there, and describe where they are from afterwards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data import bids
from data.bids import Subject
from data.download import Download
from data.openneuro import Archive, SubjectFiles, make_plan, parse_spec, size_text
from data.subject import sha256

Person = tuple[str, str]  # dataset and subject label
# Asked with a subject's sessions, their snapshot, and of files that were used and deleted: their
# hashes and what was noted of them.
Known = Callable[[list[Subject], str, dict[Path, str] | None, dict[str, Any]], bool]


def _nothing(note: dict[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class Arrival:
    """Sessions whose files are there, or the reason why they are not.

    Attributes
    ----------
    sessions : one or more of one subject
    hashes : SHA-256 of the scans by path
    snapshot : version of the dataset, "" if it has none
    reason : "" if the files are there
    release : to be called when the files are needed no more; takes what to remember of them
    """

    sessions: tuple[Subject, ...]
    hashes: dict[Path, str] = field(default_factory=dict)
    reason: str = ""
    snapshot: str = ""
    release: Callable[[dict[str, Any]], None] = _nothing


class Trees:
    """Subjects in BIDS trees.

    Parameters
    ----------
    roots : trees and the names of their datasets

    Attributes
    ----------
    sessions : those with both scans
    missing : id to reason, for sessions with only one of the two

    Raises
    ------
    FileNotFoundError, ValueError : as `bids.find_subjects`
    ValueError : a tree inside another one has a subject of the same label: one person, by BIDS
    """

    def __init__(self, roots: list[tuple[Path, str]]):
        self._roots = roots
        self.sessions: list[Subject] = []
        self.missing: dict[str, str] = {}
        for root, name in roots:
            found, lacking = bids.find_subjects(root, name)
            self.sessions += found
            self.missing.update(lacking)
        self._refuse_twins()

    def _refuse_twins(self) -> None:
        labels = {root: {s.subject for s in self.sessions if s.root == root}
                  for root, _ in self._roots}
        for inner, outer in itertools.permutations(labels, 2):
            both = sorted(labels[inner] & labels[outer])
            if both and outer.resolve() in inner.resolve().parents:
                raise ValueError(f"--bids: {inner} lies inside {outer} and has sub-{both[0]}, too: "
                                 "one person would be in two splits; name one of the two trees")

    @property
    def people(self) -> list[Person]:
        """Each subject once, in order."""
        return list(dict.fromkeys((s.dataset, s.subject) for s in self.sessions))

    def take(self, people: list[Person], *, unpaired: bool) -> None:
        """Leave out all others, and the datasets of which nobody is left.

        `unpaired` says whether `missing` goes on naming people who are not in `people` at all.
        """
        self.missing = _reasons(self.missing, self.people, people, unpaired)
        self.sessions = [s for s in self.sessions if (s.dataset, s.subject) in set(people)]
        left = {s.id for s in self.sessions} | self.missing.keys()
        self._roots = [(root, name) for root, name in self._roots
                       if any(i.startswith(f"{name}_sub-") for i in left)]

    def arrivals(self, known: Known, begin: Callable[[], None]) -> Iterator[Arrival]:
        """Each session with its hashes, or with the reason why its files cannot be read."""
        with ThreadPoolExecutor(4) as pool:
            yield from pool.map(_arrive, self.sessions)

    def describe(self) -> list[dict[str, Any]]:
        """Each dataset's licence, DOI and version."""
        return [bids.describe(root, name) for root, name in self._roots]

    def identity(self) -> dict[str, Any]:
        """Which subjects of which datasets: what all shards of a job have in common."""
        return _identity({name: "" for _, name in self._roots}, self.people)

    @property
    def folders(self) -> list[Path]:
        """Folders that are written to: none."""
        return []

    def promise(self) -> list[str]:
        """Lines before the work: none, as nothing is fetched."""
        return []

    def listing(self) -> list[str]:
        """Lines of a dry run."""
        return [line for root, name in self._roots for line in (
            f"{name} ({root}): {len([s for s in self.sessions if s.dataset == name])} sessions",
            *(f"  {s.id}  {s.t1w.relative_to(s.root)}  {s.t2w.relative_to(s.root)}"
              for s in self.sessions if s.dataset == name))]


def _arrive(session: Subject) -> Arrival:
    try:
        return Arrival((session,), {path: sha256(path) for path in (session.t1w, session.t2w)})
    except OSError as error:
        lost = [scan for scan in (session.t1w, session.t2w)
                if scan.is_symlink() and not scan.exists()]
        reason = (f"{lost[0]}: a link to nothing; with DataLad run 'datalad get' on it" if lost
                  else str(error))
        return Arrival((session,), reason=reason.replace(f"{session.root}/", ""))


class Snapshots:
    """Subjects of snapshots of an archive, downloaded a few ahead of the work.

    Parameters
    ----------
    archive : Archive
    specs : `ds002330` or `ds002330:1.1.0`
    folder : for downloads
    ahead : subjects on disk at a time
    keep : leave the files where they are

    Attributes
    ----------
    plans : what is to be downloaded
    missing : id to reason, for sessions with only one of the two scans

    Raises
    ------
    ValueError : a dataset named twice, one that is not there, or one without a pair
    ArchiveError : the archive does not answer
    """

    def __init__(self, archive: Archive, specs: list[str], folder: Path, *, ahead: int,
                 keep: bool = False):
        names = [parse_spec(spec)[0] for spec in specs]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"--datasets: {twice.pop()} is named twice; name each dataset once")
        self._archive, self._folder, self._ahead, self._keep = archive, folder, ahead, keep
        self.plans = [make_plan(archive.snapshot(spec)) for spec in specs]
        self._described: list[dict[str, Any]] = []

    @property
    def sessions(self) -> list[Subject]:
        """As `Trees` would find them in the folder of downloads."""
        return [session for plan in self.plans for subject in plan.subjects
                for session in subject.sessions(self._folder / plan.snapshot.dataset)]

    @property
    def missing(self) -> dict[str, str]:
        """Id to reason, for sessions with only one of the two scans."""
        return {name: reason for plan in self.plans for name, reason in plan.missing.items()}

    @property
    def people(self) -> list[Person]:
        """Each subject once, in order."""
        return [(plan.snapshot.dataset, subject.subject)
                for plan in self.plans for subject in plan.subjects]

    def take(self, people: list[Person], *, unpaired: bool) -> None:
        """As `Trees.take`."""
        everybody = self.people
        plans = []
        for plan in self.plans:
            subjects = tuple(s for s in plan.subjects
                             if (plan.snapshot.dataset, s.subject) in set(people))
            missing = _reasons(plan.missing, everybody, people, unpaired)
            if subjects or missing:
                plans.append(dataclasses.replace(plan, subjects=subjects, missing=missing))
        self.plans = plans

    def arrivals(self, known: Known, begin: Callable[[], None]) -> Iterator[Arrival]:
        """Each subject when its files are whole, or with the reason why they cannot be had.

        Parameters
        ----------
        known : asked for each subject; if it is, it is not fetched
        begin : called before a dataset is downloaded
        """
        for plan in self.plans:
            root, tag = self._folder / plan.snapshot.dataset, plan.snapshot.tag

            def done(subject: SubjectFiles, hashes: dict[Path, str] | None, note: dict[str, Any],
                     root: Path = root, tag: str = tag) -> bool:
                return not self._keep and known(subject.sessions(root), tag, hashes, note)

            with Download(self._archive, plan, self._folder, ahead=self._ahead, keep=self._keep,
                          done=done) as download:
                if len(download.finished) < len(plan.subjects):
                    begin()
                for subject, reason in download:
                    yield Arrival(tuple(subject.sessions(root)), download.hashes(subject) or {},
                                  reason, tag, partial(download.finish, subject))
                self._described.append(download.source())

    def describe(self) -> list[dict[str, Any]]:
        """Each dataset's licence, DOI and version; complete after the arrivals."""
        return self._described

    def listing(self) -> list[str]:
        """Lines of a dry run: subjects, files and sizes."""
        return [line for plan in self.plans for line in (
            str(plan), *(f"  sub-{s.subject}  {len(s.files)} files  {size_text(s.size)}"
                         for s in plan.subjects))]

    def identity(self) -> dict[str, Any]:
        """As `Trees.identity`, with the snapshots."""
        return _identity({plan.snapshot.dataset: plan.snapshot.tag for plan in self.plans},
                         self.people)

    @property
    def folders(self) -> list[Path]:
        """Folders that are written to."""
        return [self._folder / plan.snapshot.dataset for plan in self.plans]

    def promise(self) -> list[str]:
        """A line for each dataset before it is downloaded, with the most that it takes on disk."""
        return [str(plan) + ("; kept" if self._keep else
                             f"; at most {size_text(plan.peak_bytes(self._ahead))} on disk at a "
                             f"time ({self._ahead} subjects)") for plan in self.plans]


def _identity(datasets: dict[str, str], people: list[Person]) -> dict[str, Any]:
    text = json.dumps([datasets, people])
    return {"datasets": datasets, "subjects": len(people),
            "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _reasons(missing: dict[str, str], everybody: list[Person], people: list[Person],
             unpaired: bool) -> dict[str, str]:
    """The reasons that stay when `people` are taken of `everybody`."""
    taken, paired = ({bids.subject_id(*person, "") for person in who}
                     for who in (people, everybody))
    return {name: why for name, why in missing.items()
            if (person := name.partition("_ses-")[0]) in taken
            or unpaired and person not in paired}
