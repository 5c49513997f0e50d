"""Which T1w and T2w belong to which subject and session of a BIDS tree.

Owns file names; of a volume it reads the header, and that only where there are several to choose
from. BIDS: Gorgolewski et al. 2016, https://bids.neuroimaging.io.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.nifti import NotNow, read_grid

SUFFIXES = ("T1w", "T2w")
_ENTITY = re.compile(r"([a-zA-Z0-9]+)-([a-zA-Z0-9+.]+)$")
_OF_PARTS = re.compile("hipp|^hip$|mtl|slab|spine$|cervical|orbit|pituit", re.IGNORECASE)
LONGEST_ID = 200  # bytes; a part's file is called after it, and names have 255 at most
SLAB_MM = 70  # a box that is thinner holds no brain, but for a newborn's
_OF_MASKS = ("desc", "space", "res", "label")  # entities that say nothing about the scan


@dataclass(frozen=True)
class Scan:
    """A file named by the rules of BIDS: `sub-01_ses-02_run-1_T1w.nii.gz`."""

    path: Path
    entities: tuple[tuple[str, str], ...]  # without sub and ses
    suffix: str

    def get(self, entity: str) -> str | None:
        """The entity's label, None where the name has none."""
        return dict(self.entities).get(entity)


class Look(NamedTuple):
    """What a scan's header shows: whether it is no whole head, and its thickest side of a voxel."""

    is_slab: bool = False
    slice_mm: int = 0


@dataclass(frozen=True)
class Subject:
    """One session of one subject, with one T1w and one T2w.

    Attributes
    ----------
    dataset : name of the tree's folder
    subject, session : labels without `sub-` and `ses-`; session is "" where the tree has none
    root : the tree
    t1w, t2w : the files chosen
    """

    dataset: str
    subject: str
    session: str
    root: Path
    t1w: Path
    t2w: Path

    @property
    def id(self) -> str:
        """`dataset_sub-01[_ses-02]`, unique in a store."""
        return subject_id(self.dataset, self.subject, self.session)


def subject_id(dataset: str, subject: str, session: str) -> str:
    """The id of a session in a store."""
    return f"{dataset}_sub-{subject}" + (f"_ses-{session}" if session else "")


def find_subjects(root: Path, dataset: str | None = None) -> tuple[list[Subject], dict[str, str]]:
    """Pair T1w and T2w in a BIDS tree, session by session.

    Of several scans of one kind the one is taken that stands first in this order: without contrast
    agent (`ce-`) before with, not resampled or processed (`space-`, `res-`, `desc-`) before, whole
    heads before slabs (less than `SLAB_MM` one way, or called after a part of the head:
    `acq-hippocampus`) and headers that cannot be used, fewer entities before more, thin slices
    before thick ones (to the millimetre), and the lowest `run-` index: a repeat is numbered after
    the scan that it repeats. Where one of them is not fetched yet, names alone decide. A file with
    `part-phase`, `part-real` or `part-imag` is never taken, nor one that bears another subject's or
    session's name than its folder.

    Parameters
    ----------
    root : a BIDS tree (raw or derivative), read without following it outside
    dataset : its name in the store; the folder's name as a rule

    Returns
    -------
    subjects : those with both, in the order of their ids
    missing : id to reason, for sessions with only one of the two

    Raises
    ------
    FileNotFoundError : no such folder
    ValueError : a folder without any `sub-*/[ses-*/]anat/*_T1w.nii[.gz]`, or with a name that the
        store cannot hold
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; --bids takes the root of a BIDS tree")
    dataset = dataset or dataset_name(root)
    subjects, missing, seen = [], {}, False
    for anat, subject, session in _anat_folders(root, dataset):
        where = anat.relative_to(root).as_posix()
        try:
            t1w, t2w, reason = pair_scans(sorted(anat.iterdir()), where, subject, session,
                                          look=_look)
        except OSError as error:
            t1w, t2w, reason = None, None, f"{where}: cannot be read ({error.strerror}); mend that"
        if t1w and t2w:
            subjects.append(Subject(dataset, subject, session, root, t1w, t2w))
        elif reason:
            missing[subject_id(dataset, subject, session)] = reason
        seen = seen or t1w is not None or t2w is not None or bool(reason)
    if not seen:
        raise ValueError(
            f"{root}: no T1w or T2w found; a BIDS tree has files like "
            "sub-01/anat/sub-01_T1w.nii.gz and sub-01/anat/sub-01_T2w.nii.gz"
        )
    return sorted(subjects, key=lambda s: s.id), missing


def pair_scans(files: Iterable[Path], where: str, subject: str, session: str,
               look: Callable[[Path], Look | None] | None = None,
               ) -> tuple[Path | None, Path | None, str]:
    """The T1w and T2w of one `anat` folder.

    Parameters
    ----------
    files : all that is there
    where : the folder's name below the tree, for the reason
    subject, session : labels that the folder's name has
    look : what the header of a file shows, None where it is not here; without it names decide

    Returns
    -------
    t1w, t2w : as `find_subjects` describes
    reason : why they are not both there, "" if they are or if nothing looks like one of them
    """
    files = list(files)
    named = [scan for scan in map(parse_name, files) if scan]
    scans = [scan for scan in named if belongs(scan.path.name, subject, session)]
    strange = [scan.path.name for scan in named
               if scan.suffix in SUFFIXES and scan not in scans]
    chosen = [choose(scans, suffix, look) for suffix in SUFFIXES]
    t1w, t2w = (scan.path if scan else None for scan in chosen)
    reason = ""
    if not (t1w and t2w):
        if strange:
            reason = f"{where}/{strange[0]}: bears another name than its folder; rename one of them"
        elif t1w or t2w:
            has, lacks = ("T1w", "T2w") if t1w else ("T2w", "T1w")
            reason = f"{where}: has a {has} but no {lacks}"
        elif misnamed := _misnamed(files):
            reason = f"{where}/{misnamed}: not named by the rules of BIDS; rename it"
    return t1w, t2w, reason


def _misnamed(files: list[Path]) -> str:
    """The first file that seems to be a T1w or T2w but is not named as one; "" if there is none."""
    for path in files:
        scan = parse_name(path)
        if (re.search(r"t[12]w\.nii(\.gz)?$", path.name, re.IGNORECASE)
                and not path.name.startswith(".") and not path.is_dir()
                and (scan is None or scan.suffix not in SUFFIXES)):
            return path.name.encode(errors="replace").decode()  # a table holds no other names
    return ""


def dataset_name(root: Path) -> str:
    """The name of a tree's folder as it was given (a link's own), fit for file names and tables."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", Path(os.path.abspath(root)).name).strip("-") or "bids"


def _anat_folders(root: Path, dataset: str) -> list[tuple[Path, str, str]]:
    """(folder, subject label, session label) of each `anat` folder, readable or not."""
    found = []
    for subject in sorted(root.glob("sub-*")):
        for folder in [subject, *sorted(subject.glob("ses-*"))]:
            if _may_be_folder(folder / "anat"):
                session = folder.name[4:] if folder != subject else ""
                _check_name(folder, subject_id(dataset, subject.name[4:], session))
                found.append((folder / "anat", subject.name[4:], session))
    return found


def _may_be_folder(path: Path) -> bool:
    """Whether a folder is there, or it is forbidden to look."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except PermissionError:
        return True
    except OSError:
        return False


def _check_name(folder: Path, name: str) -> None:
    """Refuse a name that the store's tables and files cannot hold: they would, after hours."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(folder)!a}: the name is not UTF-8; rename it") from None
    if re.search(r"[\x00-\x1f\x7f]", name):
        raise ValueError(f"{str(folder)!a}: the name has a tab or another control character; "
                         "rename it")
    length = len(name.encode())
    if length > LONGEST_ID:
        raise ValueError(f"{folder}: too long a name, the store's for it has {length} bytes "
                         f"({name[:40]}...); rename the tree or the folder so that it has at most "
                         f"{LONGEST_ID}")


def belongs(file_name: str, subject: str, session: str) -> bool:
    """Whether a file is named after its folders; the session's name may be left out."""
    start, _, rest = file_name.partition("_")
    other = rest.startswith("ses-") and not rest.startswith(f"ses-{session}_")
    return start == f"sub-{subject}" and not other


def parse_name(path: Path) -> Scan | None:
    """Take a NIfTI name apart; None where the name is not one of BIDS or is hidden."""
    match = re.fullmatch(r"(.+)_([A-Za-z0-9]+)\.nii(\.gz)?", path.name)
    if not match or path.name.startswith(".") or path.is_dir():
        return None
    pairs = []
    for part in match.group(1).split("_"):
        entity = _ENTITY.fullmatch(part)
        if not entity:
            return None
        pairs.append((entity.group(1), entity.group(2)))
    if pairs[0][0] != "sub":
        return None
    return Scan(path, tuple(p for p in pairs if p[0] not in ("sub", "ses")), match.group(2))


def choose(scans: list[Scan], suffix: str,
           look: Callable[[Path], Look | None] | None = None) -> Scan | None:
    """The scan of a kind that `find_subjects` describes, None where there is none."""
    fit = [s for s in scans if s.suffix == suffix and s.get("part") in (None, "mag")]
    if look is None or len(fit) < 2:
        return min(fit, key=_rank, default=None)
    seen = [found for found in (look(scan.path) for scan in fit) if found is not None]
    if len(seen) < len(fit):  # what is here may neither win nor lose by being here
        return min(fit, key=_rank)
    ranks = list(map(_rank, fit, seen))
    return fit[ranks.index(min(ranks))]


def _look(path: Path) -> Look | None:
    """What a header shows; None where the file is not to be had just now."""
    try:
        grid = read_grid(path)
    except (FileNotFoundError, NotNow):
        return None
    except ValueError:
        return Look(is_slab=True)
    sides_mm = grid.spacing_mm * grid.shape
    return Look(bool(sides_mm.min() < SLAB_MM), round(float(grid.spacing_mm.max())))


def _rank(scan: Scan, look: Look = Look()) -> tuple:
    run = scan.get("run") or ""
    return (
        scan.get("ce") is not None,
        any(scan.get(e) is not None for e in ("space", "res", "desc")),
        look.is_slab or any(_OF_PARTS.search(label) for e, label in scan.entities if e == "acq"),
        len([e for e, _ in scan.entities if e not in ("run", "part")]),
        look.slice_mm,
        int(run) if run.isdigit() else 0,
        not scan.path.name.endswith(".gz"),
        scan.path.name,
    )


def brain_mask_path(subject: Subject) -> Path:
    """The `*_desc-brain_mask.nii[.gz]` that belongs to a subject's T1w.

    Looked for beside the T1w, then in `derivatives/` below the tree (any pipeline, in the order of
    their names). A mask in another space (`space-` other than T1w or orig) or of another scan (a
    `run-`, `acq-` or the like that T1w has not) is not taken.

    Raises
    ------
    FileNotFoundError : there is none; says where it was looked for
    """
    where = f"sub-{subject.subject}" + (f"/ses-{subject.session}" if subject.session else "")
    t1w = parse_name(subject.t1w)
    own = dict(t1w.entities) if t1w else {}
    folders = [subject.t1w.parent, *sorted(subject.root.glob(f"derivatives/*/{where}/anat")),
               *sorted(subject.root.glob(f"derivatives/{where}/anat"))]
    for folder in folders:
        masks = [s for s in map(parse_name, sorted(folder.glob("*_mask.nii*"))) if s
                 and s.get("desc") == "brain" and s.get("space") in (None, "T1w", "orig")
                 and all(own.get(e) == label for e, label in s.entities if e not in _OF_MASKS)
                 and belongs(s.path.name, subject.subject, subject.session)]
        if masks:
            return min(masks, key=lambda s: (-sum(own.get(e) == v for e, v in s.entities),
                                             len(s.entities), s.path.name)).path
    raise FileNotFoundError(
        f"{subject.t1w}: no *_desc-brain_mask.nii.gz beside it or in "
        f"{subject.root / 'derivatives'}/*/{where}/anat; add one or choose another "
        "--brain-extraction"
    )


def describe(root: Path, dataset: str) -> dict[str, Any]:
    """Name, authors, licence, DOI and version of a tree, "" where it says nothing.

    From its `dataset_description.json`; the version from a download's `manifest.json`, or from a
    DOI of OpenNeuro, which holds it.
    """
    text = _read_object(root / "dataset_description.json")
    doi = str(text.get("DatasetDOI") or "").strip()
    doi = re.sub(r"^(https?://(dx\.)?doi\.org/|doi:)", "", doi)
    version = re.search(rf"openneuro\.{re.escape(dataset)}\.v([\w.]+)$", doi, re.IGNORECASE)
    snapshot = _read_object(root / "manifest.json").get("tag") or (version[1] if version else "")
    authors = text.get("Authors")
    return {"dataset": dataset, "name": str(text.get("Name") or ""), "snapshot": str(snapshot),
            "doi": doi, "license": str(text.get("License") or ""),
            "authors": [str(a) for a in authors] if isinstance(authors, list) else []}


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where it is missing or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def subject_of(path: Path) -> Subject:
    """The subject of a single file, by its name and folders, to look for its mask.

    Raises
    ------
    ValueError : the name is not one of BIDS
    """
    scan = parse_name(path)
    label = re.match(r"sub-([A-Za-z0-9+]+)_", path.name)
    if scan is None or label is None:
        raise ValueError(f"{path}: not named by the rules of BIDS (sub-01_T1w.nii.gz), so its mask "
                         "cannot be found; choose another --brain-extraction")
    session = re.search(r"_ses-([A-Za-z0-9+]+)_", path.name)
    folder = path.absolute().parent  # not resolve(): an annexed file is a link to elsewhere
    root = next((p.parent for p in (folder, *folder.parents) if p.name == f"sub-{label.group(1)}"),
                folder)
    return Subject(dataset_name(root), label.group(1), session.group(1) if session else "", root,
                   path, path)
