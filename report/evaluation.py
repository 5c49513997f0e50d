"""The page that shows how good a checkpoint is, where it fails, and what it was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from report import figures, page
from report.viewer import Stack, viewer

PROTOCOLS_NOTE = (
    "brain: inside the brain mask. slice: the whole stored slice with background. box: cropped to"
    " the brain's box, resized to 128 x 128. volume: all slices of a session as one, inside the "
    "mask. Images in [0, 1], data range 1. Floor: the input itself taken for the translation. "
    "Look-up table: the best that each pixel's intensity alone can tell, fitted on the training "
    "subjects. Slice consistency: differences between neighbouring slices as a share of the real "
    "volume's, 1 is best. Contrast order: share of subjects whose CSF, grey and white matter are "
    "in T2w's order of brightness, or T1w's. Intensity distance: Wasserstein-1 between the "
    "histograms in the brain. Rescaled: the subject's real and translated slices each divided by "
    "their own 99.5th percentile in the brain, which leaves gain out. Cycle error: mean distance "
    "of the slice translated there and back, in the intensities that the nets are shown "
    "(--standardise). Checkerboard: patterns of 2 and 4 pixels, as "
    "upsampling leaves them, over those of the real slice; 1 is best."
)
LESIONS_NOTE = (
    "Lesions of the real scans: masks where they were given, else bright spots on T2w that are no "
    "fluid on T1w, at least 0.1 ml, 6 mm from the brain's border: a rule of thumb, which misses "
    "lesions and takes some healthy tissue for one. Contrast: mean inside minus mean in the 4.5 mm "
    "around, intensities in [0, 1], weighted by volume. Kept: translated contrast over the real "
    "one, 1 is best, below 0 it is turned round. Erased: share of the lesions that keep less than "
    "a quarter. Invented: what the same rule finds in the translation and in no real scan."
)
LIMITS = (
    "Slices are translated one by one, so neighbours may differ in brightness; lesions can fade or "
    "be invented, since unpaired training never sees what belongs together. Figures hold for the "
    "scanners and subjects named here; with few subjects the intervals say little, and a subject "
    "with disease is not one without. Not for diagnosis."
)


def spread_text(value: Mapping[str, Any], digits: int, between: str = " ") -> str:
    """Mean ± SD [interval], as far as there are subjects for it."""
    text = f"{value['mean']:.{digits}f}"
    if value["sd"] is None:
        return text
    low, high = value["ci95"]
    return f"{text} ± {value['sd']:.{digits}f}{between}[{low:.{digits}f}, {high:.{digits}f}]"


def direction_text(direction: str) -> str:
    """`t1w-to-t2w` for people."""
    return direction.replace("-to-", " to ").replace("t1w", "T1w").replace("t2w", "T2w")


def whose(split: str) -> str:
    """`split` of a summary for people."""
    return "new scans" if split == "bids" else f"{split} split"


# panel of the curves to kind of line in metrics.jsonl and the figures drawn
CURVES = {"losses": ("loss", ("G", "F", "D_X", "D_Y")),
          "cycle and identity losses": ("loss", ("cycle_x", "cycle_y", "identity_x",
                                                 "identity_y")),
          "structure losses": ("loss", ("structure_x", "structure_y")),
          "validation SSIM (brain)": ("validation", ("t2w_ssim", "t1w_ssim")),
          "validation PSNR (dB, brain)": ("validation", ("t2w_psnr_db", "t1w_psnr_db"))}


def training_curves(run: Path) -> tuple[figures.Picture | None, list[str]]:
    """Losses and validation figures of a run, and the alarms that fired, from its metrics.jsonl.

    None and no alarms where there is no such file, or nothing in it.
    """
    lines: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    records = _read_metrics(run / "metrics.jsonl")
    for title, (kind, names) in CURVES.items():
        for record in (r for r in records if r.get("kind") == kind):
            for name in (name for name in names if name in record):
                steps, values = lines.setdefault(title, {}).setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(record[name])
    alarms = [f"epoch {r['epoch']}: {r['text']}" for r in records if r.get("kind") == "warning"]
    return (figures.curves(lines) if lines else None), alarms


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; [] without one, as where a best.pt was sent elsewhere."""
    found = []
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # cut short by a kill, or being written
            continue
        if isinstance(record, dict) and "step" in record:
            found.append(record)
    return found


def evaluation_page(summary: Mapping[str, Any], tables: Mapping[str, Sequence[Sequence[str]]],
                    pictures: Mapping[str, figures.Picture],
                    stacks: Sequence[Stack], state: Mapping[str, Any], alarms: Sequence[str],
                    differences: Sequence[Sequence[str]],
                    lesions: tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]] = ((), ()),
                    ) -> str:
    """Put the page together.

    Parameters
    ----------
    summary : of the first checkpoint
    tables : title to rows, the first of them the columns' names
    pictures : by file name without ending
    stacks : for the viewer
    state : the checkpoint
    alarms : of its training
    differences : rows of the comparison with the other checkpoints, their column titles first
    lesions : rows of what became of the lesions, over subjects and of each session, alike
    """
    parts = [
        page.paragraph(f"{summary['ckpt']}, step {state['step']}, {state['slices_seen']} slice "
                       f"pairs seen. {summary['n_subjects']} subjects, {summary['n_slices']} "
                       f"slices of {summary['slices']}, {whose(summary['split'])}. Mean ± SD "
                       "[95 % bootstrap interval] over subjects."),
        *(page.paragraph(text, "warning") for text in summary["warnings"]),
        *(page.paragraph(text, "note") for text in summary["notes"]),
        *(part for title, (columns, *rows) in tables.items()
          for part in (page.heading(title), page.table(columns, rows))),
        page.paragraph(PROTOCOLS_NOTE, "note"), *_lesions(*lesions), *_distribution(summary),
        page.heading("Subjects"), page.picture(pictures["subjects"].png, "SSIM of each subject"),
    ]
    if differences:
        parts += [page.heading("Comparison of checkpoints"),
                  *(page.picture(pictures[name].png, "differences with intervals")
                    for name in pictures if name.startswith("comparison")),
                  page.table(differences[0], differences[1:]),
                  page.paragraph("Paired differences over subjects, other minus first. p: Wilcoxon "
                                 "signed-rank test; Holm: corrected for the number of metrics. "
                                 "With five subjects or fewer p cannot fall below 0.05.", "note")]
    parts += [page.heading("All slices of a subject"), viewer(stacks)]
    for direction in ("t1w-to-t2w", "t2w-to-t1w"):
        target = direction_text(direction).split()[-1]
        check = summary["checks"][direction]
        parts += [
            page.heading(f"{direction_text(direction)}: best, median and worst slice"),
            page.picture(pictures[f"slices_{direction}"].png, "input, translated, real, error"),
            page.paragraph(f"Correlation with the real {target} in the brain "
                           f"{check['correlation']:.2f} (below 0: inverted); distance to the input "
                           f"{check['copy_ratio']:.0%} of the real {target}'s (near 0: copied).",
                           "note")]
    parts += [page.heading("Intensities"), page.picture(pictures["histograms"].png,
                                                        "histograms of real and translated")]
    parts += _training(pictures, alarms)
    return page.page("T1w / T2w translation: evaluation",
                     [*parts, *_settings(state), page.heading("Limits"), page.paragraph(LIMITS)])


def _lesions(over_subjects: Sequence[Sequence[str]],
             sessions: Sequence[Sequence[str]]) -> list[str]:
    if not over_subjects:
        return []
    return [page.heading("Lesions: real against translated"),
            page.table(over_subjects[0], over_subjects[1:]),
            page.details("Each session's lesions", [page.table(sessions[0], sessions[1:])]),
            page.paragraph(LESIONS_NOTE, "note")]


def _distribution(summary: Mapping[str, Any]) -> list[str]:
    rows = [[direction_text(direction), name, f"{value:.4g}" if isinstance(value, float) else value]
            for direction, found in summary["distribution"].items()
            for name, value in found.items()]
    return [page.heading("Distance between sets of slices"),
            page.table(("direction", "distance", "value"), rows)]


def _training(pictures: Mapping[str, figures.Picture], alarms: Sequence[str]) -> list[str]:
    parts = [page.heading("Training")]
    if "training" in pictures:
        parts.append(page.picture(pictures["training"].png, "training curves"))
    else:
        parts.append(page.paragraph("No metrics.jsonl beside the checkpoint, so no curves.",
                                    "note"))
    if alarms:
        last = alarms[-1].partition(":")[0]
        parts.append(page.details(f"{len(alarms)} alarms fired in training, the last in {last}",
                                  [page.paragraph(text) for text in alarms]))
    elif "training" in pictures:
        parts.append(page.paragraph("No alarm fired in training.", "note"))
    return parts


def _settings(state: Mapping[str, Any]) -> list[str]:
    config, data = state["config"], state["preprocessing"]
    settings = [[name, str(config[name])] for name in sorted(config)]
    settings += [[name, str(data[name])] for name in ("size", "spacing_mm", "intensity",
                                                      "brain_extraction")]
    settings += [[name, str(value)] for name, value in
                 sorted(state["format"].get("made_with", {}).items())]
    sources = [[s["dataset"], s["snapshot"], s["doi"], s["license"]] for s in data["sources"]]
    counts = [[split, str(len(data["subjects"][split]))] for split in data["subjects"]]
    return [page.heading("Data of the checkpoint"),
            page.table(("dataset", "snapshot", "DOI", "licence"), sources),
            page.table(("split", "sessions"), counts),
            page.details("Settings of the checkpoint", [page.table(("setting", "value"),
                                                                   settings)])]
