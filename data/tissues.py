"""Tissue shares and lesions of stored slices, where a BIDS tree has maps of them.

That is `label-GM_probseg` and so on, and `label-lesion_mask`. Simulated subjects come with their
tissues; for scanned ones a segmentation pipeline's derivatives do. The store does not hold them:
they are cut anew, and only taken if T1w and T2w come out as stored.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import brain
from data.bias import bias_correction_of
from data.bids import Subject, find_subjects, parse_name
from data.store import SliceStore
from data.subject import Settings, prepare_with, sha256
from data.nifti import Volume

LABELS = ("GM", "WM", "CSF")
LESIONS = ("label-lesion_mask", "label-L_mask")  # BIDS's own abbreviation is L
ANY_ML = (1.0, 1e5)  # the store's masks have been judged


def find_tissues(roots: Iterable[Path],
                 rows: Iterable[dict[str, Any]]) -> dict[str, tuple[Subject, list[Path]]]:
    """Session id to its files and its three maps, of those stored sessions that have them.

    Parameters
    ----------
    roots : BIDS trees that the store was made of
    rows : of the store's `subjects.tsv`

    Raises
    ------
    FileNotFoundError, ValueError : no such tree, or nothing in it
    """
    return _find(roots, rows, [(f"label-{label}_probseg",) for label in LABELS])


def find_lesions(roots: Iterable[Path],
                 rows: Iterable[dict[str, Any]]) -> dict[str, tuple[Subject, list[Path]]]:
    """Session id to its files and its mask of lesions, as `find_tissues` does it."""
    return _find(roots, rows, [LESIONS])


def _find(roots: Iterable[Path], rows: Iterable[dict[str, Any]],
          wanted: Sequence[Sequence[str]]) -> dict[str, tuple[Subject, list[Path]]]:
    """Find the sessions that have a map of each kind; a kind may have several names."""
    scanned = [subject for root in roots for subject in find_subjects(root)[0]]
    found = {}
    for row in rows:
        for subject in scanned:
            if (subject.subject, subject.session) != (row["subject"], row["session"]):
                continue
            maps = [path for names in wanted if (path := _map_of(subject, names))]
            # another dataset may have a subject of the same name
            if len(maps) == len(wanted) and sha256(subject.t1w) == row["t1w_sha256"]:
                found[row["id"]] = (subject, maps)
    return found


def _map_of(subject: Subject, names: Sequence[str]) -> Path | None:
    where = f"sub-{subject.subject}" + (f"/ses-{subject.session}" if subject.session else "")
    for folder in (subject.t1w.parent, *sorted(subject.root.glob(f"derivatives/*/{where}/anat"))):
        for path in (path for name in names for path in sorted(folder.glob(f"*_{name}.nii*"))):
            scan = parse_name(path)
            if scan and scan.get("space") in (None, "T1w", "orig"):
                return path
    return None


def tissue_slices(store: SliceStore, row: dict[str, Any], subject: Subject, maps: list[Path],
                  device: str = "cpu") -> np.ndarray:
    """Shares of grey matter, white matter and CSF in a session's slices.

    Parameters
    ----------
    store, row : the session's row of its `subjects.tsv`
    subject, maps : from `find_tissues`
    device : of a network that finds the brain; that of preprocess.py, since masks of another may
        differ by single voxels

    Returns
    -------
    shares : (n, 3, H, W) float32 in [0, 1], as `LABELS`

    Raises
    ------
    ValueError : the files do not give the slices that are stored
    """
    return np.clip(_cut_alike(store, row, subject, maps, device), 0, 1)


def lesion_slices(store: SliceStore, row: dict[str, Any], subject: Subject, maps: list[Path],
                  device: str = "cpu") -> np.ndarray:
    """(n, H, W) bool: the lesions in a session's slices; parameters, errors as `tissue_slices`.

    A mask without any is one of a subject without lesions.
    """
    return _cut_alike(store, row, subject, maps, device, are_masks=True)[:, 0] >= 0.5


@functools.lru_cache(maxsize=1)
def _extractor(method: str, device: str) -> brain.Extractor:
    """Loaded once for all sessions, as preprocess.py does: on a CPU one thread gives its bits."""
    extract = brain.make_extractor(method, device=device)
    if device != "cpu":
        return extract

    def by_one_thread(volume: Volume) -> np.ndarray:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return extract(volume)
        finally:
            torch.set_num_threads(threads)
    return by_one_thread


def _cut_alike(store: SliceStore, row: dict[str, Any], subject: Subject, maps: list[Path],
               device: str, *, are_masks: bool = False) -> np.ndarray:
    """Cut maps as the session's scans were: (n, len(maps), H, W) float32."""
    header = store.header
    settings = Settings(header["size"], header["spacing_mm"], header["min_brain_area"], ANY_ML,
                        header["seed"], bias_correction_of(header))
    method = row["brain_extraction"]
    extractor = None if method == "mask" else _extractor(method, device)
    part, cut = prepare_with(maps, subject, method, settings, extractor, are_masks=are_masks)
    if part.row["rows_sha256"] != row["rows_sha256"]:
        other = "" if method in ("mask", "none") else (
            f", or choose the --device that found their brains (here: {device})")
        raise ValueError(f"{subject.t1w}: does not give the slices stored as {row['id']}; point to "
                         f"the scans that the store was made of{other}")
    return cut
