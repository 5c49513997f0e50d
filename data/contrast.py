"""What the intensities of a brain tell: T1w or T2w, and whether training had any like it.

Judged on slices as the nets see them: (n, H, W) in [-1, 1], a volume's own scale taken out. No
reference is needed to tell T1w from T2w of an adult: fluid is the darkest in one and the brightest
in the other, so the rim of the brain is darker or brighter than the tissue below it, and the tail
of the histogram points down or up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.histogram import Standard, volume_landmarks
from data.store import SliceStore

PERCENTILES = (5, 25, 50, 75, 95)
RIM_MM, DEEP_MM = 4.0, (8.0, 20.0)  # below the brain's surface
# Of 7 real heads (glioma, multiple sclerosis; 1 mm to 4 mm) and 9 simulated ones; between the two
# limits of a cue it says nothing.
SKEWNESS = (0.35, 0.6)  # T1w below, T2w above
RIM_MINUS_DEEP = (-0.06, -0.03)  # T1w below, T2w above; intensities in [0, 1]
# Training subjects may be few and alike, so their scatter counts as at least LEAST_SD.
LEAST_SD, MOST_SDS = 0.04, 4.0
SIZE_ROOM = 1.2  # brains and spacings this much beyond those of training are far
MOST_SUBJECTS = 24  # of a training split are looked at: a training begins with it


@dataclass(frozen=True)
class Figures:
    """What `measure` finds in a brain.

    Attributes
    ----------
    percentiles : of its intensities in [0, 1], at `PERCENTILES`
    skewness : of their histogram
    rim_minus_deep : median at the brain's surface minus median in the depth; NaN without a depth
    """

    percentiles: tuple[float, ...]
    skewness: float
    rim_minus_deep: float

    def __str__(self) -> str:
        return f"skewness {self.skewness:.2f}, rim minus depth {self.rim_minus_deep:.2f}"


def measure(slices: np.ndarray, mask: np.ndarray, spacing_mm: tuple[float, float]) -> Figures:
    """Take the figures of a brain.

    Parameters
    ----------
    slices : (n, H, W) float in [-1, 1], neighbours of one volume
    mask : (n, H, W) bool, its brain
    spacing_mm : from slice to slice, and of a pixel
    """
    from scipy import ndimage  # a training starts without it

    hits = [np.flatnonzero(mask.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    box = tuple(slice(max(hit[0] - 1, 0), hit[-1] + 2) for hit in hits)  # all else costs time
    slices, mask = slices[box], mask[box]
    values = (slices[mask].astype(np.float32) + 1) / 2
    between, pixel = spacing_mm
    depth = ndimage.distance_transform_edt(mask, sampling=(between, pixel, pixel))[mask]
    rim, deep = depth < max(RIM_MM, 1.01 * pixel), (depth > DEEP_MM[0]) & (depth < DEEP_MM[1])
    gap = np.median(values[rim]) - np.median(values[deep]) if deep.any() and rim.any() else np.nan
    return Figures(_percentiles(values), _skewness(values), float(gap))


def _skewness(values: np.ndarray) -> float:
    """As `scipy.stats.skew`, whose import takes half a second."""
    away = values - values.mean(dtype=np.float64)
    return float((away ** 3).mean() / max((away ** 2).mean(), 1e-12) ** 1.5)


def _percentiles(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(p), 4) for p in np.percentile(values, PERCENTILES))


def tell(figures: Figures) -> str:
    """Say "T1w" or "T2w" where both cues agree, else ""."""
    for suffix, side in (("T1w", -1), ("T2w", 1)):
        limits = (SKEWNESS[0], RIM_MINUS_DEEP[0]) if side < 0 else (SKEWNESS[1], RIM_MINUS_DEEP[1])
        cues = (figures.skewness, figures.rim_minus_deep)
        if all(side * (cue - limit) > 0 for cue, limit in zip(cues, limits)):
            return suffix
    return ""


# --------------------------------------------------------------------- what training had


def training_figures(store: SliceStore) -> dict[str, Any]:
    """What a store's training subjects are like: for a checkpoint's preprocessing record.

    Returns
    -------
    `t1w` and `t2w`: mean and SD over subjects of the percentiles of a brain's intensities;
    `brain_ml` and `slice_spacing_mm`: smallest and largest. Plain numbers and lists.
    """
    subjects = [s for s in store.subjects if s["split"] == "train"]
    looked_at = subjects[::-(-len(subjects) // MOST_SUBJECTS)] if subjects else []
    found: dict[str, list[tuple[float, ...]]] = {"t1w": [], "t2w": []}
    for s in looked_at:
        rows = np.arange(s["first_row"], s["first_row"] + s["n_slices"])
        mask = store.mask(rows)
        for name, stack in (("t1w", store.t1w), ("t2w", store.t2w)):
            values = (np.asarray(stack[rows])[mask].astype(np.float32) + 1) / 2
            if len(values):
                found[name].append(_percentiles(values))
    record: dict[str, Any] = {"percentiles": list(PERCENTILES), "subjects": len(looked_at)}
    for name, rows_of in found.items():
        table = np.array(rows_of).reshape(-1, len(PERCENTILES))
        if len(table):
            record[name] = {"mean": [float(v) for v in table.mean(axis=0).round(4)],
                            "sd": [float(v) for v in table.std(axis=0).round(4)]}
    for column in ("brain_ml", "slice_spacing_mm"):
        values = [float(s[column]) for s in subjects if s.get(column)]
        if values:
            record[column] = [min(values), max(values)]
    return record


def intensity_quantiles(
        store: SliceStore, steps: int = 256, standard: Standard | None = None,
        sessions: Mapping[str, Sequence[dict[str, Any]]] | None = None) -> dict[str, np.ndarray]:
    """How the intensities of the training subjects' brains are distributed.

    Parameters
    ----------
    standard : what histograms the nets are shown them with, if not as they are stored
    sessions : contrast to the sessions that training draws it from, as `slices.training_sessions`
        (default: the training split)
    steps : equal steps from the darkest to the brightest

    Returns
    -------
    `t1w`, `t2w` : (steps + 1,) float32 quantiles in [-1, 1], ascending, all subjects counting alike
        (of many, `MOST_SUBJECTS` are looked at)
    """
    training = [s for s in store.subjects if s["split"] == "train"]
    shares, found = np.linspace(0, 1, steps + 1), {}
    for place, name in enumerate(("t1w", "t2w")):
        rows = sessions[name] if sessions else training
        looked_at = [store.of_subject(s) for s in rows[::-(-len(rows) // MOST_SUBJECTS) or 1]]
        brains = [arrays[place][arrays[2]].astype(np.float32) for arrays in looked_at]
        if standard:
            brains = [standard.move(v, volume_landmarks(arrays[place], arrays[2]), name)
                      for v, arrays in zip(brains, looked_at)]
        # what is not finite is found in training, with the file's name
        finite = [v for v in (v[np.isfinite(v)] for v in brains) if len(v)]
        # a part of the values is enough, and each run begins with this
        finite = [v[::len(v) // 50_000 + 1] for v in finite]
        # the mean of quantiles would be no subject's: the values are put together
        drawn = [np.quantile(v, np.linspace(0, 1, 2049)) for v in finite] or [np.array([-1, 1])]
        found[name] = np.quantile(np.concatenate(drawn), shares).astype(np.float32)
    return found


def far_from_training(figures: Figures, suffix: str, sizes: dict[str, float],
                      record: dict[str, Any]) -> list[str]:
    """What of a volume is far from all that training had, a line each with the figures.

    Parameters
    ----------
    figures : of the volume
    suffix : "T1w" or "T2w", what it is taken for
    sizes : its `brain_ml` and `slice_spacing_mm`
    record : from `training_figures`; {} where a checkpoint has none
    """
    said = []
    known = record.get(suffix.lower())
    if known and tuple(record.get("percentiles", ())) == PERCENTILES:
        mean, sd = np.array(known["mean"]), np.maximum(known["sd"], LEAST_SD)
        if (np.abs(np.array(figures.percentiles) - mean) > MOST_SDS * sd).any():
            said.append(f"intensities are far from those of the training {suffix}: percentiles "
                        f"{_list(PERCENTILES)} of the brain at {_list(figures.percentiles)}, in "
                        f"training at {_list(mean)} (SD {_list(known['sd'])})")
    for name, text, unit in (("brain_ml", "brain", "ml"),
                             ("slice_spacing_mm", "slices every", "mm")):
        if name in record and name in sizes:
            low, high = record[name]
            if not low / SIZE_ROOM <= sizes[name] <= high * SIZE_ROOM:
                said.append(f"{text} {sizes[name]:.4g} {unit}, in training {low:.4g} to {high:.4g}")
    return said


def _list(values: Iterable[float]) -> str:
    return " ".join(f"{v:.2g}" for v in values)
