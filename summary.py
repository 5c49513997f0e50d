"""What the figures of an evaluation add up to: `summary.json`, warnings, and tables as text.

Pure functions of the records that `measuring.py` makes; `evaluate.py` writes what they return.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comparison import compare, spread
from losses.distribution import frechet_distance, kernel_distance
from measuring import (DIRECTIONS, FLOOR, METHODS, METRICS, MODEL, PROTOCOLS, Record, figures_of,
                       person, select)
from report.evaluation import direction_text, spread_text

# A translation this much nearer to its input than the real target is has copied it.
COPY_RATIO = 0.5
# Of seven real heads, T1w against T2w, the means over slices are 0.98 to 1.04 either way.
CHECKERBOARD = 1.1
DISTANCES = ("Frechet distance", "kernel distance x 1000")
IDS = ("direction", "method", "ckpt", "protocol", "id")  # columns of the tables
# of lesions: those of the real scans, their contrast, what became of it
LESIONS = ("found_by", "n_lesions", "lesion_ml", "n_visible", "contrast_real",
           "contrast_translated", "kept", "erased", "n_invented", "invented_ml")
LESION_DIGITS = {"lesion_ml": 2, "contrast_real": 3, "contrast_translated": 3, "kept": 2,
                 "erased": 2, "invented_ml": 2}  # of those in the report
MOSTLY = 0.5  # share of lesions erased from which a warning is due


def summarise(per_subject: list[Record], ckpt: str, seed: int) -> dict[str, Any]:
    """DESIGN's `summary.json`: direction, protocol (and references' protocols), metric."""
    summary: dict[str, Any] = {}
    for direction in DIRECTIONS:
        parts: dict[str, dict] = {}
        for method in METHODS:
            parts[method] = {}
            for protocol in PROTOCOLS:
                found = figures_of(per_subject, direction=direction, method=method,
                                   protocol=protocol, ckpt=ckpt if method == MODEL else "")
                if found:
                    parts[method][protocol] = {name: spread(list(people.values()), seed)
                                               for name, people in found.items()}
        summary[direction] = {**parts.pop(MODEL), **{m: p for m, p in parts.items() if p}}
    return summary


def contrast_checks(records: list[Record], ckpt: str) -> dict[str, Any]:
    """Has the model copied its input, inverted the contrast, or left checkerboards?

    Means over slices inside the brain, and the verdict. `correlation` is with the real target,
    below 0 for an inverted contrast; `copy_ratio` is the distance from translation to input as a
    share of the distance from real target to input, near 0 for a copy; `checkerboard` is
    `losses.quality.checkerboard`, above 1 for patterns of 2 or 4 pixels (None for slices too small
    to tell).
    """
    checks = {}
    for direction in DIRECTIONS:
        brain_only = list(select(records, direction=direction, protocol="brain"))

        def mean(method: str, name: str, of: str = "") -> float:
            return float(np.mean([r[name] for r in select(brain_only, method=method, ckpt=of)]))

        ratio = mean(MODEL, "from_input", ckpt) / max(mean(FLOOR, "mae"), 1e-9)
        agreement = mean(MODEL, "ncc", ckpt)
        warnings = []
        if ratio < COPY_RATIO:
            warnings.append(f"{direction}: the translation is nearly a copy of its input (distance "
                            f"to it {ratio:.0%} of the real target's)")
        if agreement < 0:
            warnings.append(f"{direction}: contrast is inverted (correlation with the real target "
                            f"{agreement:.2f})")
        traces = [r["checkerboard"] for r in select(brain_only, method=MODEL, ckpt=ckpt)
                  if "checkerboard" in r]
        pattern = float(np.mean(traces)) if traces else None
        if pattern is not None and pattern > CHECKERBOARD:
            warnings.append(f"{direction}: the upsampling leaves a checkerboard (spectral peaks "
                            f"of 2 and 4 pixels {pattern:.2f} times those of real slices); "
                            "train.py has --upsample blur")
        checks[direction] = {"correlation": agreement, "copy_ratio": ratio,
                             "checkerboard": pattern, "warnings": warnings}
    return checks


def lesion_summary(lesions: list[Record], ckpt: str, seed: int) -> dict[str, Any]:
    """What became of the lesions: direction, method, figure to its spread over subjects.

    The subject is the unit: means over its sessions, then over subjects, those that have lesions
    where a figure needs them. `n_subjects` counts subjects with lesions, `n_lesions` these.
    """
    summary: dict[str, Any] = {}
    for direction in DIRECTIONS:
        summary[direction] = {}
        for method in METHODS:
            rows = list(select(lesions, direction=direction, method=method,
                               ckpt=ckpt if method == MODEL else ""))
            if not rows:
                continue
            found: dict[str, Any] = {
                "n_subjects": len({person(r["id"]) for r in rows if r["n_lesions"]}),
                "n_lesions": sum(r["n_lesions"] for r in rows)}
            for name in LESIONS[2:]:
                people: dict[str, list[float]] = {}
                for r in rows:
                    if name in r:
                        people.setdefault(person(r["id"]), []).append(r[name])
                if people:
                    found[name] = spread([float(np.mean(v)) for v in people.values()], seed)
            summary[direction][method] = found
    return summary


def lesion_warnings(summary: dict[str, Any]) -> list[str]:
    """A line for each direction in which most of the lesions are erased."""
    said = []
    for direction in DIRECTIONS:
        found = summary[direction].get(MODEL, {})
        if "erased" in found and found["erased"]["mean"] > MOSTLY:
            said.append(f"{direction}: lesions are mostly erased ({found['erased']['mean']:.0%} of "
                        f"them; {found['kept']['mean']:.0%} of their contrast is kept)")
    return said


def distribution(features: Sequence[dict[str, Tensor]], seed: int) -> dict[str, dict[str, Any]]:
    """Frechet and kernel distance of translated and real slices, by direction; or why not.

    Parameters
    ----------
    features : a session's each: direction to (2, n, D), real and translated; {} without weights
    seed : of the subsets that the kernel distance draws
    """
    found: dict[str, dict[str, Any]] = {}
    for direction in DIRECTIONS:
        if not features[0]:
            found[direction] = dict.fromkeys(DISTANCES, "not measured: no weights")
            continue
        real, fake = torch.cat([part[direction] for part in features], dim=1)
        if len(real) < 2:
            found[direction] = dict.fromkeys(DISTANCES, "not measured: one slice only")
        elif not bool((real.isfinite() & fake.isfinite()).all()):
            found[direction] = dict.fromkeys(DISTANCES, "not measured: features are not finite")
        else:
            kernel = kernel_distance(real, fake, generator=torch.Generator().manual_seed(seed))
            found[direction] = dict(zip(DISTANCES, (float(frechet_distance(real, fake)),
                                                    1000 * float(kernel.mean))))
    return found


def comparisons(per_subject: list[Record], ckpts: Sequence[str], seed: int,
                unlike: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Checkpoint to direction to metric: its differences from the first, in the brain.

    Of metrics that are better the higher or the lower; 1 is best has no such difference. Nor has
    the cycle error of those that are shown other histograms than the first (`unlike`): it is
    measured in what they are shown, so in another unit.
    """
    judged = {name for name, metric in METRICS.items() if metric.higher_is_better is not None}
    found: dict[str, dict[str, Any]] = {}
    for ckpt in ckpts[1:]:
        found[ckpt] = {}
        for direction in DIRECTIONS:
            first, other = (figures_of(per_subject, direction=direction, method=MODEL,
                                       protocol="brain", ckpt=name) for name in (ckpts[0], ckpt))
            first = {name: people for name, people in first.items()
                     if name in judged and not (name == "cycle_error" and ckpt in unlike)}
            found[ckpt][direction] = compare(first, other, seed)
    return found


def best_median_worst(records: list[Record], direction: str, ckpt: str) -> dict[str, Record]:
    """The model's slices with the highest, the middle and the lowest SSIM in the brain."""
    found = sorted(select(records, direction=direction, protocol="brain", method=MODEL, ckpt=ckpt),
                   key=lambda r: (r["ssim"], r["id"], r["row"]))
    return {"best": found[-1], "median": found[len(found) // 2], "worst": found[0]}


# ------------------------------------------------------------------------------------- as text


def caption_of(record: Record) -> str:
    """The figures of a slice in the brain."""
    return (f"SSIM {record['ssim']:.3f}   PSNR {record['psnr_db']:.1f} dB   "
            f"MAE {record['mae']:.3f}")


def table(summary: dict[str, Any], protocols: Sequence[str], metrics: Sequence[str],
          between: str = " ") -> list[list[str]]:
    """The summary as lines of text, column titles first; `between` SD and interval."""
    rows = [["direction", "protocol", "method", *(METRICS[name].label for name in metrics)]]
    for direction in DIRECTIONS:
        for protocol in protocols:
            for method, label in METHODS.items():
                part = summary[direction] if method == MODEL else summary[direction].get(method, {})
                found = part.get(protocol, {})
                if set(metrics) & set(found):
                    cells = [spread_text(found[name], METRICS[name].digits, between)
                             if name in found else "" for name in metrics]
                    rows.append([direction_text(direction), protocol, label, *cells])
    return rows


def lesion_rows(summary: dict[str, Any]) -> list[list[str]]:
    """`lesion_summary` as lines of text, column titles first; [] without lesions measured."""
    rows = [["direction", "method", "lesions (subjects)", "contrast, real to translated", "kept",
             "erased", "invented (ml)"]]
    for direction in DIRECTIONS:
        for method, found in summary[direction].items():
            contrasts = [f"{found[name]['mean']:.3f}" for name in
                         ("contrast_real", "contrast_translated") if name in found]
            cells = [spread_text(found[name], LESION_DIGITS[name], "\n") if name in found else ""
                     for name in ("kept", "erased", "invented_ml")]
            rows.append([direction_text(direction), METHODS[method],
                         f"{found['n_lesions']} ({found['n_subjects']})\n"
                         f"{found['lesion_ml']['mean']:.2f} ml a subject",
                         " to ".join(contrasts), *cells])
    return rows if len(rows) > 1 else []


def session_lesion_rows(lesions: Iterable[Record], ckpt: str) -> list[list[str]]:
    """Each session's lesions, real and translated by a checkpoint, column titles first."""
    rows = [["session", "direction", "lesions", "volume (ml)", "real contrast", "translated",
             "kept", "erased", "invented (ml)"]]
    for r in select(lesions, method=MODEL, ckpt=ckpt):
        cells = [f"{r[name]:.{n}f}" if name in r else "" for name, n in LESION_DIGITS.items()]
        rows.append([r["id"], direction_text(r["direction"]), str(r["n_lesions"]), *cells])
    return rows


def comparison_rows(compared: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The comparison as lines of text, column titles first; [] without one."""
    rows = [["checkpoint", "direction", "metric (brain)", "difference", "p", "p (Holm)"]]
    for ckpt, directions in compared.items():
        for direction, metrics in directions.items():
            for name, found in metrics.items():
                ps = ["" if found[key] is None else f"{found[key]:.3g}" for key in ("p", "p_holm")]
                rows.append([ckpt, direction_text(direction), METRICS[name].label,
                             spread_text(found, METRICS[name].digits), *ps])
    return rows if len(rows) > 1 else []


def records_csv(records: Iterable[Record], *columns: str, ids: Sequence[str] = IDS) -> bytes:
    """Records as CSV: their ids, then these columns; what was not measured is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, (*ids, *columns), extrasaction="ignore", restval="",
                            lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def comparison_csv(compared: dict[str, dict[str, Any]]) -> bytes:
    """The comparison as CSV, numbers in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("ckpt", "direction", "metric", "mean", "sd", "low", "high", "p", "p_holm"))
    for ckpt, directions in compared.items():
        for direction, metrics in directions.items():
            for name, found in metrics.items():
                writer.writerow((ckpt, direction, name, found["mean"], found["sd"],
                                 *(found["ci95"] or ("", "")), found["p"], found["p_holm"]))
    return text.getvalue().encode()
