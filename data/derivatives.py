"""What is written beside a dataset: names, folders, descriptions and records of BIDS derivatives.

Owns the names of files that are made from scans, and whether such a file is there already; voxels
are `data/nifti.py`'s. BIDS, "Derived datasets": https://bids-specification.readthedocs.io.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from data import bids
from data.atomic import write_atomically

ENDING = re.compile(r"\.nii(\.gz)?$")


def find_scans(root: Path, suffix: str) -> list[Path]:
    """All scans of a kind in a BIDS tree, in the order of their names.

    Phase, real and imaginary parts are left out, and files that bear another subject's or session's
    name than their folder. Of one scan that is there as .nii and as .nii.gz, the latter is taken,
    of one with and without `desc-` (defaced, say) the latter: both would be given one name.

    Parameters
    ----------
    root : a BIDS tree; read without following it outside
    suffix : "T1w" or "T2w"

    Raises
    ------
    FileNotFoundError : no such folder
    ValueError : none is there
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; --bids takes the root of a BIDS tree")
    found: dict[str, Path] = {}
    paths = [*root.glob("sub-*/anat/*"), *root.glob("sub-*/ses-*/anat/*")]
    for path in sorted(paths, key=_as_wanted):
        scan = bids.parse_name(path)
        session = path.parent.parent.name
        labels = path.relative_to(root).parts[0][4:], session[4:] if session[:4] == "ses-" else ""
        if (scan and scan.suffix == suffix and scan.get("part") in (None, "mag")
                and bids.belongs(path.name, *labels)):
            found.setdefault(str(path.parent / derived_name(path, "", suffix)), path)
    if not found:
        raise ValueError(f"{root}: no {suffix} found; a BIDS tree has files like "
                         f"sub-01/anat/sub-01_{suffix}.nii.gz")
    return sorted(found.values())


def _as_wanted(path: Path) -> tuple[bool, bool, Path]:
    """In the order of how much a scan is wanted, then of names."""
    return "_desc-" in path.name, not path.name.endswith(".gz"), path


def stem(path: Path) -> str:
    """A NIfTI file's name without its ending."""
    return ENDING.sub("", path.name)


def derived_name(source: Path, desc: str, suffix: str) -> str:
    """Name what is made: `sub-01_T1w.nii.gz` to `sub-01_desc-synthetic_T2w.nii.gz`.

    A `desc-` of before is replaced.
    """
    kept = [part for part in re.sub(r"(^|_)T[12]w$", "", stem(source)).split("_")
            if part and not part.startswith("desc-")]
    return "_".join([*kept, f"desc-{desc}", suffix]) + ".nii.gz"


def sidecar(path: Path) -> Path:
    """The JSON file that belongs to a NIfTI file."""
    return path.with_name(stem(path) + ".json")


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_atomically(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none, or something else in its place."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def remove_parts(path: Path) -> None:
    """Remove what a killed run left of a file that it was writing."""
    for pattern in (f".{path.name}.*.tmp", f"{path.name}.*.tmp"):
        for part in path.parent.glob(pattern):
            part.unlink(missing_ok=True)


def describe_dataset(out: Path, *, name: str, generator: dict[str, str],
                     source: Path | None = None) -> None:
    """Say what made a folder of derivatives, as BIDS asks; a description of before stays.

    To one of this program's from before there was a `source`, that is added.

    Parameters
    ----------
    out : the folder
    name : of the dataset
    generator : `Name` and `Version` of the program
    source : the BIDS tree that the scans came from, if they came from one

    Raises
    ------
    ValueError : the folder has derivatives of another tree, which its records call `raw`, too
    """
    path = out / "dataset_description.json"
    there = read_record(path)
    text: dict[str, Any] = there or {"Name": name, "BIDSVersion": "1.8.0",
                                     "DatasetType": "derivative", "GeneratedBy": [generator]}
    if path.exists() and not (source and _is_by(there, generator.get("Name", ""))):
        return
    if source:
        about = bids.describe(source, bids.dataset_name(source))
        text["SourceDatasets"] = [{key: value for key, value in (
            ("DOI", about["doi"]), ("Version", about["snapshot"]),
            ("URL", Path(os.path.relpath(source.resolve(), out.resolve())).as_posix())) if value}]
        link = text["SourceDatasets"][0]["URL"]
        known = there.get("DatasetLinks", {}).get("raw", link)
        if "DatasetLinks" in there and known == link:
            return
        if known != link:
            raise ValueError(f"{path}: is of the tree {known}, and {source} is another one; take "
                             "another --out")
        text["DatasetLinks"] = {"raw": link}
    write_record(path, text)


def _is_by(description: dict[str, Any], program: str) -> bool:
    made_by = description.get("GeneratedBy")
    return isinstance(made_by, list) and any(
        isinstance(entry, dict) and entry.get("Name") == program for entry in made_by)
