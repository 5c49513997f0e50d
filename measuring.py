"""The figures of a translated session: what is measured, under which protocol, beside what.

Joins the slice store, the nets and `losses/`; `evaluate.py` decides on whom and writes it down.

Protocols: `brain` (inside the mask), `slice` (the whole stored slice), `box` (cropped to the
brain's box, 128 x 128) for slices, `volume` for all slices of a session put together. Rescaled
figures leave gain out: a session's real and translated slices are each divided by their own 99.5th
percentile in the brain.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.histogram import StandardRows
from data.slices import paired_slices, shown
from data.store import SliceStore
from losses import lesions, quality, volume_quality
from losses.contrast import contrast_order

DIRECTIONS = {"t1w-to-t2w": ("T1w", "T2w"), "t2w-to-t1w": ("T2w", "T1w")}
BACK = {"t1w-to-t2w": "t2w-to-t1w", "t2w-to-t1w": "t1w-to-t2w"}
PROTOCOLS = ("brain", "slice", "box", "volume")
# methods that are measured; a checkpoint is "model"
MODEL, FLOOR, TABLE, CEILING = "model", "floor", "table", "ceiling"
METHODS = {MODEL: "translated", FLOOR: "floor: copied input", TABLE: "look-up table",
           CEILING: "ceiling: paired training"}
TOP_PERCENTILE = 99.5  # as preprocess.py scales volumes
PURE = 0.9  # share of a voxel from which it counts as of one tissue
PSNR_CAP_DB = 100.0  # of slices that agree to the last bit: infinity has no mean


@dataclass(frozen=True)
class Metric:
    """One figure of a slice or a volume.

    Attributes
    ----------
    label : for tables
    digits : after the point
    higher_is_better : None where neither is (1 is best)
    protocols : under which it is measured
    """

    label: str
    digits: int
    higher_is_better: bool | None
    protocols: tuple[str, ...] = ("brain",)


METRICS = {
    "ssim": Metric("SSIM", 3, True, PROTOCOLS),
    "psnr_db": Metric("PSNR (dB)", 2, True, PROTOCOLS),
    "mae": Metric("MAE", 4, False, ("brain", "slice", "box")),
    "rescaled_ssim": Metric("SSIM, rescaled", 3, True),
    "rescaled_psnr_db": Metric("PSNR, rescaled (dB)", 2, True),
    "ms_ssim": Metric("MS-SSIM", 3, True),
    "ncc": Metric("NCC", 3, True),
    "gradient_similarity": Metric("gradient similarity", 3, True),
    "intensity_distance": Metric("intensity distance", 4, False),
    "cycle_error": Metric("cycle error", 4, False),
    "checkerboard": Metric("checkerboard", 3, None),
    "slice_consistency": Metric("slice consistency", 3, None, ("volume",)),
    "contrast_order": Metric("contrast order", 2, True, ("volume",)),
}
Record = dict[str, Any]  # one slice or session under one protocol: ids, then metrics
Translate = Callable[[Tensor], Tensor]  # slices (N, 1, H, W) in [-1, 1] to translations alike


@dataclass(frozen=True)
class Method:
    """Something that translates.

    Attributes
    ----------
    kind : one of `METHODS`
    translate : by direction
    ckpt : its checkpoint, "" where there is none
    standard : what histograms it is shown slices with; None takes them as they are stored
    """

    kind: str
    translate: Mapping[str, Translate]
    ckpt: str = ""
    standard: StandardRows | None = None

    def shown(self, slices: Tensor, rows: np.ndarray, direction: str) -> Tensor:
        """Real slices (N, 1, H, W), which are `rows` (N,) of the store, as it is shown them."""
        return shown(slices, rows, DIRECTIONS[direction][0].lower(), self.standard)


def metrics_of(protocol: str) -> list[str]:
    """The metrics that are measured under a protocol."""
    return [name for name, metric in METRICS.items() if protocol in metric.protocols]


def person(session_id: str) -> str:
    """The subject that a session of the store belongs to: its id without `_ses-`."""
    return session_id.split("_ses-")[0]


def copy_input() -> Method:
    """The floor: the input taken for the translation."""
    return Method(FLOOR, dict.fromkeys(DIRECTIONS, lambda real: real))


class RealLesions:
    """The lesions of a session's real scans, to look for in its translations.

    Parameters
    ----------
    store, session : one row of its `subjects.tsv`; slices lie as far apart as it says
    given : (n, H, W) bool, a mask of the lesions; None takes `lesions.find_candidates`
    """

    def __init__(self, store: SliceStore, session: dict[str, Any],
                 given: np.ndarray | None = None):
        t1w, t2w, self.mask = store.of_subject(session)
        pixel = float(store.header["spacing_mm"])
        self.voxel_mm = (float(session["slice_spacing_mm"] or pixel), pixel, pixel)
        self.real = {"T1w": self._in_range(t1w), "T2w": self._in_range(t2w)}
        found = self._find(self.real)
        self.known = found.suspects if given is None else found.suspects | given
        self.outlines = lesions.outline(found.labels if given is None else given, self.mask,
                                        found.fluid, self.voxel_mm)
        self.ml = np.array([lesion.ml for lesion in self.outlines])
        self.found_by = "rule" if given is None else "mask"

    def measure(self, direction: str, fake: Tensor, method: str) -> dict[str, Any]:
        """Compare with a translation (n, 1, H, W) in [-1, 1]; see `losses.lesions`.

        Returns what `lesions.compare` and `lesions.invented` do, less what cannot be told, and
        `found_by` (rule or mask), `n_lesions`, `lesion_ml`. A copied input invents nothing.
        """
        source, target = DIRECTIONS[direction]
        image = self._in_range(fake[:, 0].numpy())
        real, translated = (lesions.contrasts(v, self.outlines) for v in
                            (self.real[target], image))
        figures = {"found_by": self.found_by, "n_lesions": len(self.ml),
                   "lesion_ml": float(self.ml.sum()),
                   **lesions.compare(real, translated, self.ml)}
        if method != FLOOR:
            found = self._find({source: self.real[source], target: image})
            figures |= lesions.invented(found.labels, self.known, self.voxel_mm)
        return figures

    def _find(self, scans: Mapping[str, np.ndarray]) -> lesions.Candidates:
        return lesions.find_candidates(scans["T1w"], scans["T2w"], self.mask, self.voxel_mm)

    def _in_range(self, slices: np.ndarray) -> np.ndarray:
        return (slices.astype(np.float32) + 1) / 2 * self.mask


def measure_session(store: SliceStore, session: dict[str, Any], methods: Iterable[Method],
                    device: torch.device, batch_size: int = 16, tissues: Tensor | None = None,
                    real_lesions: RealLesions | None = None,
                    ) -> tuple[list[Record], dict[str, Tensor], list[Record]]:
    """Measure every slice of a session and their volume, both ways, for each method.

    Parameters
    ----------
    store, session : one row of its `subjects.tsv`
    methods : what translates
    device : where the figures are computed
    tissues : (n, 3, H, W) shares of grey matter, white matter and CSF in its slices, if known
    real_lesions : what to look for; None leaves lesions out

    Returns
    -------
    records : a slice has its row of the store as `row`, a volume None; inside the brain also the
        distance `from_input`
    translated : direction to the first method's translation (n, 1, H, W) in [-1, 1], on the CPU
    lesions : of the session, one each direction and method

    Raises
    ------
    ValueError : a translation, or a stored slice, is NaN or infinite
    """
    parts = list(paired_slices(store, session, batch_size))
    real_x, real_y, mask = (torch.cat(column) for column in zip(*parts))
    _check_stored(store, session, real_x, real_y)
    reals = dict(zip(DIRECTIONS, ((real_x, real_y), (real_y, real_x))))
    records: list[Record] = []
    of_lesions: list[Record] = []
    translated: dict[str, Tensor] = {}
    rows = session["first_row"] + np.arange(session["n_slices"])
    for direction, (source, target) in reals.items():
        for method in methods:
            given = method.shown(source, rows, direction)
            fake = in_batches(method.translate[direction], given, batch_size)
            if not bool(fake.isfinite().all()):  # a mean that leaves it out would flatter
                raise ValueError(f"{method.ckpt or method.kind}: its translation of "
                                 f"{session['id']} ({direction}) is not finite; train again, or "
                                 "take --precision fp32")
            translated.setdefault(direction, fake)
            cycled = (in_batches(method.translate[BACK[direction]], fake, batch_size)
                      if method.kind == MODEL else None)
            ids = {"direction": direction, "id": session["id"], "method": method.kind,
                   "ckpt": method.ckpt}
            figures = in_parts(given, target, fake, mask, cycled, device, batch_size)
            records += [{**ids, "protocol": protocol, "row": session["first_row"] + i, **values}
                        for protocol, of_slices in figures.items()
                        for i, values in enumerate(of_slices)]
            records.append({**ids, "protocol": "volume", "row": None,
                            **measure_volume(fake, target, mask, device),
                            **measure_order(fake, tissues, DIRECTIONS[direction][1])})
            if real_lesions:
                of_lesions.append({**ids, **real_lesions.measure(direction, fake, method.kind)})
    for record in records:
        for name in {"psnr_db", "rescaled_psnr_db"} & record.keys():
            record[name] = min(record[name], PSNR_CAP_DB)
    return records, translated, of_lesions


def _check_stored(store: SliceStore, session: dict[str, Any], real_x: Tensor,
                  real_y: Tensor) -> None:
    """Raise ValueError for a stored slice that is NaN or infinite: no net is to blame for it."""
    for name, real in (("t1w.npy", real_x), ("t2w.npy", real_y)):
        broken = torch.nonzero(~real.isfinite().flatten(1).all(1)).flatten()
        if len(broken):
            raise ValueError(f"{store.folder / name}: row {session['first_row'] + int(broken[0])} "
                             f"({session['id']}) is NaN or infinite; delete the store and run "
                             "preprocess.py again")


def in_batches(translate: Translate, slices: Tensor, batch_size: int) -> Tensor:
    """Translate any number of slices (N, 1, H, W); float32 on the CPU."""
    return torch.cat([translate(slices[first:first + batch_size]).float().cpu()
                      for first in range(0, len(slices), batch_size)])


def in_parts(source: Tensor, target: Tensor, fake: Tensor, mask: Tensor, cycled: Tensor | None,
             device: torch.device, batch_size: int) -> dict[str, list[dict[str, float]]]:
    """`measure_slices` of a whole session, a batch at a time: protocol to each slice's figures."""
    tops = own_top(target, mask), own_top(fake, mask)
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for first in range(0, len(source), batch_size):
        part = slice(first, first + batch_size)
        x, y, image, brain = (v[part].to(device) for v in (source, target, fake, mask))
        back = None if cycled is None else cycled[part].to(device)
        for protocol, values in measure_slices(x, y, image, brain, back, tops=tops).items():
            found[protocol] += [{name: float(v[i]) for name, v in values.items()}
                                for i in range(len(x))]
    return found


def own_top(slices: Tensor, mask: Tensor) -> float:
    """The 99.5th percentile of a session's slices (N, 1, H, W) in [-1, 1] in the brain, in [0, 1].

    At least 0.01, so that an empty translation stays empty.
    """
    return max(float(np.percentile((slices[mask].numpy() + 1) / 2, TOP_PERCENTILE)), 0.01)


def measure_slices(source: Tensor, target: Tensor, fake: Tensor, mask: Tensor,
                   cycled: Tensor | None = None, *,
                   tops: tuple[float, float] = (1.0, 1.0)) -> dict[str, dict[str, Tensor]]:
    """All figures of slices, protocol to metric to (N,); images (N, 1, H, W) in [-1, 1].

    `tops` are what becomes 1 in rescaled figures, of the session's target and of its translation.
    """
    given, real, image = ((v + 1) / 2 for v in (source, target, fake))
    figures = quality.measure(image, real, mask)
    figures["brain"] |= {
        "ms_ssim": quality.multiscale_ssim(image, real, mask),
        "ncc": quality.correlation(image, real, mask),
        "gradient_similarity": quality.gradient_similarity(image, real, mask),
        "intensity_distance": quality.intensity_distance(image, real, mask),
        "from_input": quality.mae(image, given, mask),
    }
    own_real, own_image = ((v / top).clamp(0, 1) for v, top in zip((real, image), tops))
    figures["brain"] |= {"rescaled_ssim": quality.ssim(own_image, own_real, mask),
                         "rescaled_psnr_db": quality.psnr_db(own_image, own_real, mask)}
    if min(image.shape[2:]) >= quality.CHECKERBOARD_SIDE:
        figures["brain"]["checkerboard"] = quality.checkerboard(image, real, mask)
    if cycled is not None:
        figures["brain"]["cycle_error"] = quality.mae((cycled + 1) / 2, given, mask)
    return figures


def measure_volume(fake: Tensor, target: Tensor, mask: Tensor,
                   device: torch.device) -> dict[str, float]:
    """The figures of a session's slices (N, 1, H, W) in [-1, 1] as one volume, inside its mask.

    Stacked as they were cut: background that the store left out cannot count. A figure that needs
    more slices than there are is left out.
    """
    image, real, inside = (v.transpose(0, 1)[None].to(device) for v in
                           ((fake + 1) / 2, (target + 1) / 2, mask))
    figures = {"psnr_db": float(volume_quality.volume_psnr_db(image, real, inside))}
    if image.shape[2] >= quality.WINDOW:
        figures["ssim"] = float(volume_quality.volume_ssim(image, real, inside))
    if bool((inside[:, :, 1:] & inside[:, :, :-1]).any()):
        ratio = float(volume_quality.slice_consistency(image, real, inside))
        if math.isfinite(ratio):  # else the real volume does not change at all
            figures["slice_consistency"] = ratio
    return figures


def measure_order(fake: Tensor, tissues: Tensor | None, contrast: str) -> dict[str, float]:
    """Whether a session's tissues are as bright as they should be: 1 or 0, {} where not known.

    Parameters
    ----------
    fake : (N, 1, H, W)
    tissues : (N, 3, H, W) shares; voxels of one tissue alone are looked at
    contrast : "T1w" or "T2w", what it was translated into
    """
    if tissues is None:
        return {}
    volume, shares = fake.transpose(0, 1)[None], tissues.transpose(0, 1)[None]
    right = float(contrast_order(volume, shares > PURE, contrast).is_right)
    return {} if math.isnan(right) else {"contrast_order": right}


# -------------------------------------------------------------------------------- put together


def over_slices(records: Iterable[Record]) -> list[Record]:
    """Mean over each subject's slices, of all its sessions, by direction, method and protocol.

    Volumes are averaged over its sessions, those that have the figure.
    """
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for r in records:
        groups[r["direction"], person(r["id"]), r["method"], r["ckpt"], r["protocol"]].append(r)
    return [{"direction": d, "id": i, "method": m, "ckpt": c, "protocol": p,
             "n_slices": len(group),
             **{name: float(np.mean(values)) for name in metrics_of(p)
                if (values := [r[name] for r in group if name in r])}}
            for (d, i, m, c, p), group in groups.items()]


def select(records: Iterable[Record], **wanted: str) -> Iterator[Record]:
    """The records with these ids."""
    return (r for r in records if all(r[key] == value for key, value in wanted.items()))


def figures_of(per_subject: Iterable[Record], **wanted: str) -> dict[str, dict[str, float]]:
    """Metric to subject to value, of the subjects' records with these ids, as far as measured."""
    found: dict[str, dict[str, float]] = {}
    chosen = list(select(per_subject, **wanted))
    for name in METRICS:
        people = {r["id"]: r[name] for r in chosen if name in r}
        if people:
            found[name] = people
    return found
