"""One session of one subject: from its two files to the rows of the store.

Joins `volume`, `brain` and `registration` into the pipeline of T1w and T2w together. Evaluation on
new scans runs through the same function with the settings that a checkpoint recorded.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from data import brain
from data.bids import Subject, brain_mask_path
from data.registration import Registration, make_fixed, register_rigid
from data.store import Part, digest_rows
from data.nifti import Grid, Volume, doubt_geometry, read_grid, read_volume
from data.volume import (UPPER_PERCENTILE, crop_or_pad, field_of_view, grid_of, place, resample,
                         same_grid, slicing_grid, to_slices)

PIPELINE = 1  # raise when the same files would give other slices
PADDED = 7  # pixels of exact zeros each way inside the brain
MIN_COVERAGE = 0.5  # of the brain must lie in T2w's field of view


@dataclass(frozen=True)
class Settings:
    """How volumes become slices; the store and the checkpoint keep these.

    Attributes
    ----------
    size : pixels a side, a multiple of 4
    spacing_mm : in-plane voxel size; along k the native one where coarser
    min_brain_area : a slice is kept if its brain covers at least this share of the largest slice's
    brain_ml : volumes in millilitres believed of a brain mask
    seed : of the registration's samples
    bias_correction : of `bias.CORRECTIONS`, on the slicing grid, inside the brain
    """

    size: int = 128
    spacing_mm: float = 1.5
    min_brain_area: float = 0.25
    brain_ml: tuple[float, float] = brain.ADULT_ML
    seed: int = 0
    bias_correction: str = "none"

    def record(self) -> dict:
        """What a store's header and a checkpoint keep: plain numbers and words."""
        # not there without one, as in stores and checkpoints of before there was a choice
        corrected = ({} if self.bias_correction == "none"
                     else {"bias_correction": self.bias_correction})
        return {"size": self.size, "spacing_mm": self.spacing_mm,
                "min_brain_area": self.min_brain_area, "seed": self.seed,
                "intensity": {"rule": "zero to -1, percentile inside the brain to 1, clipped",
                              "upper_percentile": UPPER_PERCENTILE, **corrected}}


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def recipe(subject: Subject, method: str, settings: Settings, *,
           hashes: dict[Path, str] | None = None, limits: bool = False) -> tuple[str, str, str]:
    """Hashes of both files and of all that decides the slices: equal recipe, equal rows.

    The limits of the brain's volume decide whether there are rows, not what is in them: rows bear
    their own volume, to be held against the limits of whichever day.

    Parameters
    ----------
    subject : where the files are
    method : brain extraction, one of `brain.METHODS`, or "hd-bet+tta"
    settings : see there
    hashes : SHA-256 by path of files that are not there any more, or not to be read again
    limits : of an attempt, that fails by the limits too, and not of rows
    """
    known = hashes or {}
    t1w, t2w = (known.get(path) or sha256(path) for path in (subject.t1w, subject.t2w))
    mask = ""
    if method == "mask":
        path = brain_mask_path(subject)
        if path.is_symlink() and not path.exists():
            raise FileNotFoundError(f"{path}: a link to nothing; with DataLad run 'datalad get' on "
                                    "it")
        mask = sha256(path)
    decisive = asdict(settings)
    if not limits:  # in their place what they are as a rule: rows of before are still good
        decisive["brain_ml"] = brain.ADULT_ML
    if settings.bias_correction == "none":  # parts of before there was a choice are still good
        del decisive["bias_correction"]
    text = json.dumps([PIPELINE, t1w, t2w, mask, method, decisive])
    return t1w, t2w, hashlib.sha256(text.encode()).hexdigest()[:16]


def prepare(subject: Subject, method: str, settings: Settings,
            extractor: Callable[[Volume], np.ndarray] | None) -> Part:
    """Turn a subject's files into slices: `prepare_with` without maps."""
    return prepare_with((), subject, method, settings, extractor)[0]


def prepare_with(maps: Sequence[Path], subject: Subject, method: str, settings: Settings,
                 extractor: Callable[[Volume], np.ndarray] | None, *,
                 are_masks: bool = False) -> tuple[Part, np.ndarray]:
    """Turn a subject's files into slices, and cut further maps of the T1w's head alike.

    Parameters
    ----------
    maps : volumes in the T1w's space (tissue shares, say), on any grid
    subject : where the files are
    method : brain extraction, one of `brain.METHODS`, or "hd-bet+tta"
    settings : see there
    extractor : from `brain.make_extractor`; None for "mask"
    are_masks : what is above 0.5 in a map is inside, whatever label it bears, and the rest is not

    Returns
    -------
    part : row-aligned slices and the subject's row of the table
    cut : (n, len(maps), size, size) float32, the maps in the same places, 0 where they are not

    Raises
    ------
    ValueError, FileNotFoundError : the subject cannot be used; says which file and why
    """
    t1w_hash, t2w_hash, key = recipe(subject, method, settings)
    guessed = [doubt_geometry(path) for path in (subject.t1w, subject.t2w)]
    # One scan at a time: a pair at 0.5 mm, copied as it is worked on, would take gigabytes.
    t1w, t2w_grid = read_volume(subject.t1w), read_grid(subject.t2w)
    found = (brain.given_mask(brain_mask_path(subject), t1w) if extractor is None
             else extractor(t1w))
    mask, brain_ml = brain.judge_mask(found, t1w, limits_ml=settings.brain_ml)
    # somebody has registered already what is extracted and on one grid
    aligned = method == "none" and same_grid(grid_of(t1w), t2w_grid)
    fixed = None if aligned else make_fixed(t1w, mask)
    laid = _lay(t1w, mask, settings)
    del t1w, found, mask
    t2w = read_volume(subject.t2w)
    placed = (register_rigid(fixed, t2w, seed=settings.seed) if fixed
              else Registration(np.eye(4), "same-grid"))
    figures, (x, y, frame), framing = _cut(laid, t2w, placed, settings)
    note = "; ".join(filter(None, (*guessed, placed.note)))
    row = {
        "id": subject.id, "dataset": subject.dataset, "subject": subject.subject,
        "session": subject.session, "n_slices": str(len(x)), "brain_ml": f"{brain_ml:.1f}",
        "t1w": subject.t1w.relative_to(subject.root).as_posix(),
        "t2w": subject.t2w.relative_to(subject.root).as_posix(),
        "t1w_sha256": t1w_hash, "t2w_sha256": t2w_hash, "brain_extraction": method,
        "registration": placed.method, "translation_mm": f"{placed.translation_mm:.3f}",
        "rotation_deg": f"{placed.rotation_deg:.3f}", "mi_before": _number(placed.mi_before),
        "mi_after": _number(placed.mi_after), "note": note, "recipe": key,
        "rows_sha256": digest_rows(x, y, np.packbits(frame, axis=-1)), **figures,
    }
    cut = np.zeros((len(x), len(maps), settings.size, settings.size), np.float32)
    for i, path in enumerate(maps):
        volume = read_volume(path, is_map=True)
        if are_masks:
            volume = replace(volume, data=(volume.data > 0.5).astype(np.float32))
        cut[:, i] = framing.of(volume, laid.grid)
    return Part(x, y, frame, row), cut


@dataclass(frozen=True)
class _Framing:
    """Which part of the slicing grid the slices are."""

    centre: tuple[int, int]
    size: int
    keep: slice

    def of(self, volume: Volume, grid: Grid) -> np.ndarray:
        """(n, size, size): a volume of the same head, cut alike; 0 where it does not reach."""
        on_grid = resample(volume.data, volume.affine, grid)
        return to_slices(crop_or_pad(on_grid, self.centre, self.size, fill=0))[self.keep]


@dataclass(frozen=True)
class _Laid:
    """T1w and its brain on the slicing grid."""

    path: Path
    grid: Grid
    data: np.ndarray
    mask: np.ndarray


def _lay(t1w: Volume, mask: np.ndarray, settings: Settings) -> _Laid:
    grid = slicing_grid(t1w, settings.spacing_mm)
    return _Laid(t1w.path, grid, resample(t1w.data, t1w.affine, grid),
                 resample(mask, t1w.affine, grid, nearest=True))


def _cut(t1w: _Laid, t2w: Volume, placed: Registration, settings: Settings,
         ) -> tuple[dict[str, str], tuple[np.ndarray, np.ndarray, np.ndarray], _Framing]:
    """Both volumes on T1w's slicing grid, scaled, framed and cut; figures for the table beside."""
    grid, x_data, brain_mask = t1w.grid, t1w.data, t1w.mask
    y_data = resample(t2w.data, t2w.affine, grid, matrix=placed.matrix)
    # a scan that was cut short and then padded has slices of zeros in its field of view
    x_filled, y_filled = np.any(x_data, axis=(0, 1)), np.any(y_data, axis=(0, 1))
    seen = brain_mask & x_filled & y_filled
    seen &= field_of_view(t2w.data.shape, t2w.affine, grid, placed.matrix)
    seen &= ~_padding(y_data, seen)
    coverage = float(seen.sum()) / max(float(brain_mask.sum()), 1)
    if coverage < MIN_COVERAGE:
        raise ValueError(f"{t2w.path}: covers {coverage:.0%} of the brain in {t1w.path.name}; "
                         "leave the pair out")
    (x, x_place), (y, y_place) = (
        place(data, seen, grid, settings.size, path=path, bias_correction=settings.bias_correction)
        for data, path in ((x_data, t1w.path), (y_data, t2w.path)))
    frame = to_slices(crop_or_pad(seen, x_place.centre, settings.size, fill=False))
    keep = slices_kept(frame, settings.min_brain_area)
    blank = [np.all(kept == kept[:, :1, :1], axis=(1, 2)) for kept in (x[keep], y[keep])]
    if (blank[0] | blank[1]).any():
        guilty = t1w.path if blank[0].any() and not x_filled[keep].all() else t2w.path
        raise ValueError(f"{guilty}: {int((blank[0] | blank[1]).sum())} of {len(blank[0])} "
                         "slices inside the brain are blank; leave the pair out")
    figures = {
        "t2w_coverage": f"{coverage:.4f}", "cut_share": f"{x_place.cut_share:.4f}",
        "slice_spacing_mm": f"{grid.spacing_mm[2]:.4f}", "first_slice": str(keep.start),
        "t1w_low": f"{x_place.scale.low:.6g}", "t1w_high": f"{x_place.scale.high:.6g}",
        "t2w_low": f"{y_place.scale.low:.6g}", "t2w_high": f"{y_place.scale.high:.6g}",
    }
    stacks = x[keep].astype(np.float16), y[keep].astype(np.float16), frame[keep]
    return figures, stacks, _Framing(x_place.centre, settings.size, keep)


def _padding(data: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Where a brain (I, J, K) is exactly 0 over `PADDED` voxels and more of a slice, both ways.

    A slab that was padded to the whole head's grid; no tissue, fluid or vessel is as large and 0.
    """
    empty = seen & (data == 0)
    wide = ndimage.binary_opening(empty, np.ones((PADDED, PADDED, 1), bool))
    return ndimage.binary_propagation(wide, mask=empty) if wide.any() else wide


def slices_kept(mask: np.ndarray, min_brain_area: float) -> slice:
    """The run of slices from the first to the last whose brain is at least a share of the largest.

    Parameters
    ----------
    mask : (K, H, W) bool
    min_brain_area : share of the largest slice's area, 0 to 1
    """
    area = mask.sum(axis=(1, 2))
    large = np.flatnonzero((area >= min_brain_area * area.max()) & (area > 0))
    return slice(int(large[0]), int(large[-1]) + 1)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"
