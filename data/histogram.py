"""Histogram standardisation: nets are shown every volume with the same distribution of intensities.

Scanners and sequences give one tissue different grey values, and scaling a volume by one percentile
leaves that as it is. Here landmarks of a volume (percentiles of its brain) are moved to the median
of the training volumes', linearly in between (Nyul and Udupa 1999, Magn Reson Med 42:1072, who take
the mean, which one odd scan among few moves). Tissues keep their order, background stays
background, and what is stored is not changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.store import SliceStore

PERCENTILES = (1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 99)
CONTRASTS = ("t1w", "t2w")
STANDARDISED: dict[str, tuple[str, ...]] = {  # what may be asked for
    "none": (), "t1w": ("t1w",), "both": CONTRASTS}
MOST_VOLUMES = 24  # of a training split are looked at: a training begins with it
# ... and so many slices of a volume, at equal steps: whole ones would have to be read when their
# first slice is drawn, all of a large store in the first minutes of a training
MOST_SLICES = 16
LEAST_STEP = 1e-4  # from a landmark to the next, so that no two intensities become one
DARKEST = float(np.nextafter(np.float16(-1), np.float16(0)))  # of a brain: -1 is background


class Standard:
    """The intensities that nets are shown every volume with.

    Parameters
    ----------
    wanted : `t1w`, `t2w` or both: where landmarks go, (K,) ascending from -1 (background) over
        `PERCENTILES` to 1; a contrast that is not there stays as it is
    """

    def __init__(self, wanted: Mapping[str, Sequence[float] | np.ndarray]) -> None:
        self.wanted = {name: np.asarray(wanted[name], np.float32) for name in CONTRASTS
                       if name in wanted}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Standard | None:
        """That of a checkpoint's preprocessing record; None where it was trained without."""
        found = record.get("standard")
        if not found:
            return None
        if tuple(found["percentiles"]) != PERCENTILES:
            raise ValueError(f"checkpoint's histograms are standardised at percentiles "
                             f"{found['percentiles']}, this program does it at "
                             f"{list(PERCENTILES)}; train again, or use the version that wrote it")
        return cls(found)

    def record(self) -> dict[str, Any]:
        """Plain numbers and lists, for `of_record`."""
        return {"percentiles": list(PERCENTILES),
                **{name: [float(v) for v in values] for name, values in self.wanted.items()}}

    def show(self, slices: np.ndarray, mask: np.ndarray, contrast: str) -> np.ndarray:
        """Standardise a whole volume.

        Parameters
        ----------
        slices : (n, H, W) float in [-1, 1], background exactly -1, those that a store would have
        mask : (n, H, W) bool, its brain
        contrast : "t1w" or "t2w"

        Returns
        -------
        shown : the same shape and dtype, in [-1, 1], background exactly -1
        """
        return self.move(slices, volume_landmarks(slices, mask), contrast)

    def move(self, slices: np.ndarray, own: np.ndarray, contrast: str) -> np.ndarray:
        """Standardise slices of a volume with these `volume_landmarks`, as `show` the whole."""
        wanted = self.wanted.get(contrast)
        return slices if wanted is None else moved(slices, own, wanted)


def find_standard(store: SliceStore, contrasts: Sequence[str] = CONTRASTS,
                  sessions: Mapping[str, Sequence[dict[str, Any]]] | None = None) -> Standard:
    """The median landmarks of a store's training volumes (of many, of some `MOST_VOLUMES`).

    Of a contrast without training volumes there is none.

    Parameters
    ----------
    contrasts : which
    sessions : contrast to the sessions that training draws it from, as `slices.training_sessions`
        (default: the training split)
    """
    found = {}
    training = [s for s in store.subjects if s["split"] == "train"]
    for place, name in enumerate(CONTRASTS):
        rows = sessions[name] if sessions else training
        if rows and name in contrasts:
            every = [store.of_subject(s) for s in rows[::-(-len(rows) // MOST_VOLUMES)]]
            found[name] = np.median([volume_landmarks(v[place], v[2]) for v in every], axis=0)
    return Standard(found)


class StandardRows:
    """Standardises rows of a store, each by its own volume.

    Parameters
    ----------
    store : where the rows are
    standard : what they are shown as
    """

    def __init__(self, store: SliceStore, standard: Standard) -> None:
        self.standard, self._store = standard, store
        self._known: dict[tuple[str, int], np.ndarray] = {}  # several threads fill it alike

    def show(self, slices: np.ndarray, rows: np.ndarray, contrast: str) -> None:
        """Standardise `slices` (n, H, W), which are `rows` (n,) of that contrast, in place."""
        if contrast not in self.standard.wanted:
            return
        volumes = np.searchsorted(self._store.subjects.spans[:, 0], rows, side="right") - 1
        for place, volume in enumerate(volumes.tolist()):
            slices[place] = self.standard.move(slices[place], self._landmarks(contrast, volume),
                                               contrast)

    def _landmarks(self, contrast: str, volume: int) -> np.ndarray:
        key = contrast, volume
        if key not in self._known:
            first, count = self._store.subjects.spans[volume].tolist()
            rows = first + looked_at(count)
            array = self._store.t1w if contrast == "t1w" else self._store.t2w
            self._known[key] = landmarks(array[rows][self._store.mask(rows)])
        return self._known[key]


def looked_at(n: int) -> np.ndarray:
    """Which of a volume's `n` slices its landmarks are taken from."""
    return np.linspace(0, n - 1, min(n, MOST_SLICES)).round().astype(np.int64)


def volume_landmarks(slices: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`landmarks` of a volume's slices (n, H, W) in [-1, 1] inside its brain (n, H, W)."""
    chosen = looked_at(len(slices))
    return landmarks(slices[chosen][mask[chosen]])


def landmarks(values: np.ndarray) -> np.ndarray:
    """(K,) float32 from -1 over the `PERCENTILES` of a brain's intensities (n,) to 1, ascending.

    What is not finite is left out, stays so, and is found where it is used. Without any intensities
    they lie at equal steps.
    """
    values = values.astype(np.float32)
    values = values[np.isfinite(values)]
    inner = (np.percentile(values, PERCENTILES) if len(values)
             else np.linspace(-1, 1, len(PERCENTILES) + 2)[1:-1])
    found = np.concatenate([[-1.0], inner, [1.0]])
    steps = LEAST_STEP * np.arange(len(found))  # ascending, and the last one still at 1
    return (np.maximum.accumulate(np.clip(found, -1, 1 - steps[-1]) + steps)).astype(np.float32)


def moved(slices: np.ndarray, own: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Move intensities in [-1, 1] from landmarks `own` to `wanted`; same shape and dtype."""
    shown = np.full_like(slices, -1)
    brain = slices != -1
    values = slices[brain].astype(np.float32)
    there = np.maximum(np.interp(values, own, wanted), DARKEST)
    shown[brain] = np.where(np.isfinite(values), there, values)  # an infinite one would be 1
    return shown
