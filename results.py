"""What an evaluation leaves: summary.json, tables, figures, report.html, lines on a terminal."""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.atomic import write_atomically
from evaluation import BINS, Evaluation, Measured
from measuring import (DIRECTIONS, METHODS, METRICS, MODEL, PROTOCOLS, Record, over_slices, person,
                       select)
from models import checkpoint
from report import figures
from report.evaluation import evaluation_page, training_curves, whose
from report.viewer import Stack
from summary import (IDS, LESIONS, best_median_worst, caption_of, comparison_csv, comparison_rows,
                     comparisons, contrast_checks, distribution, lesion_rows, lesion_summary,
                     lesion_warnings, records_csv, session_lesion_rows, summarise, table)

log = logging.getLogger("evaluate.results")
VIEWED = 6  # sessions in the report's viewer: 1 to 2 MB each


def write_results(args: argparse.Namespace, work: Evaluation, sessions: Sequence[dict[str, Any]],
                  measured: Sequence[Measured]) -> None:
    """Write tables, figures and the report, each file whole; print the table."""
    records = sorted((r for m in measured for r in m.records), key=_place)
    per_subject = over_slices(records)
    ckpts, state = [str(path) for path in args.ckpt], work.states[0]
    checks = contrast_checks(records, ckpts[0])
    compared = comparisons(per_subject, ckpts, args.seed, work.shown_otherwise(ckpts))
    lesions = sorted((r for m in measured for r in m.lesions),
                     key=lambda r: (r["direction"], r["id"]))
    of_lesions = lesion_summary(lesions, ckpts[0], args.seed)
    warnings = [*(w for d in DIRECTIONS for w in checks[d]["warnings"]),
                *lesion_warnings(of_lesions)]
    summary = summarise(per_subject, ckpts[0], args.seed) | {
        "checks": checks, "warnings": warnings, "notes": work.notes,
        "lesions": {"found_by": "mask" if args.lesions else "rule", **of_lesions},
        "distribution": distribution([m.features for m in measured], args.seed),
        "n_subjects": len({person(s["id"]) for s in sessions}), "n_sessions": len(sessions),
        "n_slices": sum(s["n_slices"] for s in sessions),
        "split": "bids" if args.bids else args.split, "slices": str(work.store.folder),
        "subjects": [s["id"] for s in sessions], "ckpt": ckpts[0],
        "ckpt_sha256": checkpoint.fingerprint(args.ckpt[0]), "step": state["step"],
        "slices_seen": state["slices_seen"],
        "precision": str(work.precision).removeprefix("torch."), "seed": args.seed,
        "others": [{"ckpt": name, "ckpt_sha256": checkpoint.fingerprint(path),
                    "checks": contrast_checks(records, name),
                    "lesions": lesion_summary(lesions, name, args.seed),
                    **summarise(per_subject, name, args.seed), "difference": compared[name]}
                   for name, path in zip(ckpts[1:], args.ckpt[1:])]}
    best = {d: best_median_worst(records, d, ckpts[0]) for d in DIRECTIONS}
    pictures = draw(work, measured, per_subject, best, compared)
    curves, alarms = training_curves(args.ckpt[0].parent)
    if curves:
        pictures["training"] = curves
    for name, picture in pictures.items():
        write_atomically(args.out / f"{name}.png", picture.png)
        write_atomically(args.out / f"{name}.svg", picture.svg)
    tables = csv_tables(records, per_subject, lesions, compared)
    for name, content in tables.items():
        write_atomically(args.out / f"{name}.csv", content)
    _delete_others(args.out, pictures, tables)
    text = json.dumps(summary, indent=1, allow_nan=False)
    write_atomically(args.out / "summary.json", (text + "\n").encode())
    rows = comparison_rows(compared)
    main = "ssim", "psnr_db", "mae"
    others = ("rescaled_ssim", "rescaled_psnr_db", "ms_ssim", "ncc", "gradient_similarity",
              "intensity_distance", "cycle_error")
    volumes = ("ssim", "psnr_db", "slice_consistency", *(["contrast_order"] * bool(work.tissues)))
    page = evaluation_page(
        summary, {"In the brain": table(summary, ["brain"], (*main, "checkerboard"), "\n"),
                  "Other figures in the brain": table(summary, ["brain"], others, "\n"),
                  "Volumes": table(summary, ["volume"], volumes, "\n"),
                  "Protocols of other papers": table(summary, ["slice", "box"], main, "\n")},
        pictures, view(work, sessions, records, best), state, alarms, rows,
        (lesion_rows(of_lesions), session_lesion_rows(lesions, ckpts[0])))
    write_atomically(args.out / "report.html", page.encode())
    print_tables(summary, table(summary, PROTOCOLS, main), rows)
    log.info("report: %s", args.out / "report.html")


def csv_tables(records: list[Record], per_subject: list[Record], lesions: list[Record],
               compared: dict[str, dict[str, Any]]) -> dict[str, bytes]:
    """The CSV files by name without ending; `comparison` only of several checkpoints."""
    tables = {"slices": records_csv((r for r in records if r["row"] is not None), "row", *METRICS,
                                    "from_input"),
              "subjects": records_csv(  # of "volume" the count is of sessions, not of slices
                  ({**r, "n_slices": ""} if r["protocol"] == "volume" else r for r in per_subject),
                  "n_slices", *METRICS),
              "lesions": records_csv(lesions, *LESIONS,
                                     ids=[name for name in IDS if name != "protocol"])}
    if comparison_rows(compared):
        tables["comparison"] = comparison_csv(compared)
    return tables


def _delete_others(out: Path, pictures: Collection[str], tables: Collection[str]) -> None:
    """Delete what an earlier evaluation left there and this one has no counterpart of.

    By the very names that evaluations write: `--out` may hold other files of the user's.
    """
    ours = re.compile(r"comparison\.csv|(comparison_\d+|training)\.(png|svg)")
    for path in out.iterdir():
        if (ours.fullmatch(path.name) and path.is_file()
                and path.stem not in (tables if path.suffix == ".csv" else pictures)):
            path.unlink()


def _place(record: Record) -> tuple:
    """Order of the records, whatever the batches and processes were."""
    row = record["row"]
    return (record["direction"], record["id"], row is None, row or 0)


def draw(work: Evaluation, measured: Sequence[Measured], per_subject: list[Record],
         best: dict[str, dict[str, Record]],
         compared: dict[str, dict[str, Any]]) -> dict[str, figures.Picture]:
    """Figures by file name: chosen slices of each direction, subjects, histograms, comparisons."""
    pictures = {}
    values: dict[str, dict[str, list[float]]] = {}
    labels = list(dict.fromkeys(s["id"] for s in per_subject))
    for direction, (source_name, target_name) in DIRECTIONS.items():
        shown = [_example(title, record, work) for title, record in best[direction].items()]
        pictures[f"slices_{direction}"] = figures.examples(shown, source_name, target_name)
        # a reference's name ends in a star, see there
        names = {(m.kind, m.ckpt): m.ckpt if m.kind == MODEL and len(compared) else
                 METHODS[m.kind] + ("" if m.kind == MODEL else "*") for m in work.methods}
        values[f"{source_name} to {target_name}"] = {
            name: [r["ssim"] for r in select(per_subject, direction=direction, protocol="brain",
                                             method=kind, ckpt=ckpt)]
            for (kind, ckpt), name in names.items()}
    pictures["subjects"] = figures.subject_plot(values, labels, "SSIM in the brain")
    pictures["histograms"] = figures.histograms({
        " to ".join(names): sum((m.counts[direction] for m in measured), np.zeros((2, BINS)))
        for direction, names in DIRECTIONS.items()})
    for i, (ckpt, directions) in enumerate(compared.items(), start=1):
        scaled = {" to ".join(DIRECTIONS[d]): {
            METRICS[name].label: _in_sds(found) for name, found in metrics.items() if found["sd"]}
            for d, metrics in directions.items()}
        if all(scaled.values()):
            pictures[f"comparison_{i}"] = figures.differences(
                scaled, f"{ckpt} minus {work.args.ckpt[0]}")
    return pictures


def _in_sds(found: dict[str, Any]) -> tuple[float, float, float]:
    low, high = found["ci95"]
    return found["mean"] / found["sd"], low / found["sd"], high / found["sd"]


def _example(title: str, record: Record, work: Evaluation) -> figures.Example:
    row, store = np.array([record["row"]]), work.store
    real_x, real_y = ((torch.from_numpy(np.asarray(a[row], np.float32))[:, None])
                      for a in (store.t1w, store.t2w))
    source, target = (real_x, real_y) if record["direction"] == "t1w-to-t2w" else (real_y, real_x)
    direction, method = record["direction"], work.methods[0]
    fake = method.translate[direction](method.shown(source, row, direction))
    shown, translated, real = (((v.cpu() + 1) / 2)[0, 0].numpy() for v in (source, fake, target))
    caption = f"{caption_of(record)}\n{record['id']}, row {record['row']}"
    return figures.Example(title, shown, translated, real, store.mask(row)[0], caption)


def view(work: Evaluation, sessions: Sequence[dict[str, Any]], records: list[Record],
         best: dict[str, dict[str, Record]]) -> list[Stack]:
    """Sessions for the report's viewer: those of the chosen slices, then others, a few in all."""
    chosen = dict.fromkeys(record["id"] for found in best.values() for record in found.values())
    chosen |= dict.fromkeys(s["id"] for s in sessions)
    wanted = sorted(list(chosen)[:VIEWED])
    captions: dict[tuple[str, str], list[str]] = {}
    for record in select(records, method=MODEL, protocol="brain", ckpt=str(work.args.ckpt[0])):
        captions.setdefault((record["id"], record["direction"]), []).append(caption_of(record))
    stacks = []
    for session in (s for s in sessions if s["id"] in wanted):
        found = work.beside(session)
        (t1w, t2w, to_t2w, mask), (_, _, to_t1w, _) = (
            [v[:, 0].numpy() for v in found[d]] for d in DIRECTIONS)
        stacks.append(Stack(session["id"], t1w, t2w, to_t2w, to_t1w, mask,
                            {d: captions[session["id"], d] for d in DIRECTIONS}))
    return stacks


# ------------------------------------------------------------------------------------- tables


def print_tables(summary: dict[str, Any], lines: list[list[str]],
                 differences: list[list[str]]) -> None:
    """The tables and the warnings on the terminal."""
    _print_columns(lines)
    log.info("%d subjects, %d slices, %s; mean ± SD [95 %% bootstrap interval] over "
             "subjects; other figures: summary.json, report.html", summary["n_subjects"],
             summary["n_slices"],
             whose(summary["split"]))
    for direction, found in summary["distribution"].items():
        for name, value in found.items():
            log.info("%s, %s: %s", direction, name,
                     f"{value:.4g}" if isinstance(value, float) else value)
    if differences:
        _print_columns(differences)
    for note in summary["notes"]:
        log.info("note: %s", note)
    for warning in summary["warnings"]:
        log.warning("warning: %s", warning)


def _print_columns(rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        log.info("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
