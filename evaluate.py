"""Measure a checkpoint on paired subjects that it never saw.

    python evaluate.py --ckpt runs/default/best.pt

Writes `summary.json`, `subjects.csv`, `slices.csv`, figures and `report.html`. The subject is the
unit: figures are means over a subject's slices, then mean, SD and a 95 % bootstrap interval over
subjects. Three protocols, since published figures differ by 10 dB from protocol alone: `brain`
(inside the mask, the honest one), `slice` (the whole slice; empty background makes every figure
better) and `box` (cropped to the brain's box and resized to 128 x 128). Beside each the floor: what
copying the input would reach.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

import console
from data.slices import paired_slices, paired_subjects, to_tensor
from data.store import SPLITS, SliceStore, write_atomically
from device import PRECISIONS, autocast, choose_device, choose_precision
from losses.quality import correlation, mae, measure
from models import checkpoint
from report import figures, page

log = logging.getLogger("evaluate")
DIRECTIONS = {"t1w-to-t2w": ("T1w", "T2w"), "t2w-to-t1w": ("T2w", "T1w")}
PROTOCOLS = ("brain", "slice", "box")
METRICS = {"ssim": "SSIM", "psnr_db": "PSNR (dB)", "mae": "MAE"}
PSNR_CAP_DB = 100.0  # of slices that agree to the last bit: infinity has no mean
# A translation this much nearer to its input than the real target is has copied it.
COPY_RATIO = 0.5
LIMITS = (
    "Slices are translated one by one, so neighbours may differ in brightness; lesions can fade or "
    "be invented, since unpaired training never sees what belongs together. Figures hold for the "
    "scanners and subjects named here. Not for diagnosis."
)
Record = dict[str, Any]  # one slice under one protocol: ids, then metrics
Translate = Callable[[Tensor], Tensor]  # slices (N, 1, H, W) in [-1, 1] to translations alike


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line of `evaluate.py`."""
    p = console.OneLineParser(description=__doc__, formatter_class=console.Formatter,
                              allow_abbrev=False)
    p.add_argument("--ckpt", type=Path, required=True, default=argparse.SUPPRESS,
                   help="checkpoint to measure, best.pt as a rule")
    p.add_argument("--slices", type=Path, default=Path("slices"), help="the slice store")
    p.add_argument("--split", choices=SPLITS, default="test", help="whose subjects are measured")
    p.add_argument("--out", type=Path,
                   help="folder to write into (default: evaluation/ beside --ckpt)")
    p.add_argument("--batch-size", type=int, default=16, help="slices translated at once")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:K")
    p.add_argument("--precision", choices=PRECISIONS, default="auto", help="arithmetic of the nets")
    p.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    args = p.parse_args(argv)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: must be at least 1")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: must be at least 0")
    args.out = args.out or args.ckpt.parent / "evaluation"
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: is a file; name a folder")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parse_args(argv)
    state = checkpoint.load(args.ckpt)
    store = SliceStore(args.slices)
    subjects = choose_subjects(store, state, args)
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    nets = checkpoint.load_generators(state, device)
    args.out.mkdir(parents=True, exist_ok=True)

    def translator(net: torch.nn.Module) -> Translate:
        def translate(real: Tensor) -> Tensor:
            with torch.no_grad(), autocast(device, precision):
                return net(real.to(device)).float()
        return translate

    translate = {direction: translator(net) for direction, net in zip(DIRECTIONS, nets)}
    slices: list[Record] = []
    for subject in tqdm(subjects, unit="session", desc="evaluate", disable=None):
        slices += measure_subject(store, subject, translate, device, args.batch_size)
    per_subject = over_slices(slices)
    summary = summarise(per_subject, args.seed)
    summary.update(
        checks=contrast_checks(slices), n_subjects=len({person(s["id"]) for s in subjects}),
        n_sessions=len(subjects), n_slices=sum(s["n_slices"] for s in subjects), split=args.split,
        subjects=[s["id"] for s in subjects], ckpt=str(args.ckpt),
        ckpt_sha256=checkpoint.fingerprint(args.ckpt), step=state["step"],
        slices_seen=state["slices_seen"], precision=str(precision).removeprefix("torch."),
        seed=args.seed)
    pictures = draw(slices, per_subject, store, translate)
    write_results(args.out, summary, slices, per_subject, pictures, state)
    print_table(summary)
    log.info("report: %s", args.out / "report.html")
    return console.DONE


def choose_subjects(store: SliceStore, state: dict[str, Any],
                    args: argparse.Namespace) -> list[dict[str, Any]]:
    """The split's subjects, if the checkpoint can and may be measured on them.

    Raises
    ------
    ValueError : the store was made otherwise than the checkpoint's, the split is empty, or it has
        subjects that the checkpoint was trained on
    """
    trained = state["preprocessing"]
    for name in ("size", "spacing_mm", "intensity"):
        if trained[name] != store.header[name]:
            raise ValueError(f"{store.folder}: made with {name} {store.header[name]}, {args.ckpt} "
                             f"was trained on {trained[name]}; make the store again alike")
    subjects = paired_subjects(store, args.split)
    if not subjects:
        raise ValueError(f"{store.folder}: the {args.split} split has no subjects; name some with "
                         f"preprocess.py --{args.split}, or choose another --split")
    seen = {person(i) for i in trained["subjects"]["train"]} & {person(s["id"]) for s in subjects}
    if seen and args.split != "train":
        raise ValueError(f"{store.folder}: {min(seen)} is in the {args.split} split, but "
                         f"{args.ckpt} was trained on it; measure on subjects that it never saw")
    return subjects


def person(session_id: str) -> str:
    """The subject that a session of the store belongs to: its id without `_ses-`."""
    return session_id.split("_ses-")[0]


# ---------------------------------------------------------------------------------- measuring


def measure_subject(store: SliceStore, subject: dict[str, Any], translate: dict[str, Translate],
                    device: torch.device, batch_size: int) -> list[Record]:
    """Measure each slice of a session, both ways: the model and, as the floor, the copied input.

    Inside the brain also `correlation` with the real target, and the mean distance `from_input`.

    Parameters
    ----------
    store, subject : one row of its `subjects.tsv`
    translate : direction to a function from slices (N, 1, H, W) in [-1, 1] to translations alike
    """
    records: list[Record] = []
    row = subject["first_row"]
    for real_x, real_y, mask in paired_slices(store, subject, batch_size):
        real_x, real_y, mask = (v.to(device) for v in (real_x, real_y, mask))
        for direction, source, target in (("t1w-to-t2w", real_x, real_y),
                                          ("t2w-to-t1w", real_y, real_x)):
            fake = (translate[direction](source) + 1) / 2
            source, target = (source + 1) / 2, (target + 1) / 2
            for method, image in (("model", fake), ("floor", source)):
                measures = measure(image, target, mask)
                measures["brain"].update(correlation=correlation(image, target, mask),
                                         from_input=mae(image, source, mask))
                for protocol, values in measures.items():
                    columns = zip(*(v.tolist() for v in values.values()))
                    records += [{"direction": direction, "id": subject["id"], "row": row + i,
                                 "method": method, "protocol": protocol,
                                 **dict(zip(values, figures_of_slice))}
                                for i, figures_of_slice in enumerate(columns)]
        row += len(real_x)
    for record in records:
        record["psnr_db"] = min(record["psnr_db"], PSNR_CAP_DB)
    return sorted(records, key=lambda r: (r["direction"], r["row"]))  # whatever the batches were


def over_slices(slices: Iterable[Record]) -> list[Record]:
    """Mean over each subject's slices, of all its sessions, by direction, method and protocol."""
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for s in slices:
        groups[s["direction"], person(s["id"]), s["method"], s["protocol"]].append(s)
    return [{"direction": d, "id": i, "method": m, "protocol": p, "n_slices": len(group),
             **{name: float(np.mean([s[name] for s in group])) for name in METRICS}}
            for (d, i, m, p), group in groups.items()]


def summarise(per_subject: list[Record], seed: int) -> dict[str, Any]:
    """DESIGN's `summary.json`: direction, then protocol (and floor's protocols), then metric."""
    summary: dict[str, Any] = {}
    for direction in DIRECTIONS:
        parts: dict[str, dict] = {}
        for method in ("model", "floor"):
            parts[method] = {protocol: {
                name: spread([s[name] for s in per_subject if s["direction"] == direction
                              and s["method"] == method and s["protocol"] == protocol], seed)
                for name in METRICS} for protocol in PROTOCOLS}
        summary[direction] = {**parts["model"], "floor": parts["floor"]}
    return summary


def spread(values: list[float], seed: int) -> dict[str, Any]:
    """Mean, SD (n - 1) and 95 % percentile bootstrap interval over subjects (null for one)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "sd": None, "ci95": None}
    sd = float(np.std(values, ddof=1))
    if sd == 0:  # equal values: every resample is the same
        return {"mean": mean, "sd": sd, "ci95": [mean, mean]}
    found = stats.bootstrap((np.array(values),), np.mean, n_resamples=9999, method="percentile",
                            random_state=np.random.default_rng(seed))
    low, high = found.confidence_interval
    return {"mean": mean, "sd": sd, "ci95": [float(low), float(high)]}


def contrast_checks(slices: list[Record]) -> dict[str, Any]:
    """Has the model copied its input, or inverted the contrast? Means over slices, and the verdict.

    `correlation` is with the real target inside the brain, below 0 for an inverted contrast;
    `copy_ratio` is the distance from translation to input as a share of the distance from real
    target to input, near 0 for a copy.
    """
    checks = {}
    for direction in DIRECTIONS:
        def mean(method: str, name: str) -> float:
            return float(np.mean([s[name] for s in slices if s["direction"] == direction
                                  and s["protocol"] == "brain" and s["method"] == method]))

        ratio = mean("model", "from_input") / max(mean("floor", "mae"), 1e-9)
        agreement = mean("model", "correlation")
        warnings = []
        if ratio < COPY_RATIO:
            warnings.append(f"{direction}: the translation is nearly a copy of its input (distance "
                            f"to it {ratio:.0%} of the real target's)")
        if agreement < 0:
            warnings.append(f"{direction}: contrast is inverted (correlation with the real target "
                            f"{agreement:.2f})")
        checks[direction] = {"correlation": agreement, "copy_ratio": ratio, "warnings": warnings}
    return checks


# ------------------------------------------------------------------------------------ results


def draw(slices: list[Record], per_subject: list[Record], store: SliceStore,
         translate: dict[str, Translate]) -> dict[str, bytes]:
    """Figures by file name: best, median and worst slices of each direction, and the subjects."""
    pictures = {}
    values: dict[str, dict[str, list[float]]] = {}
    labels = list(dict.fromkeys(s["id"] for s in per_subject))
    for direction, (source_name, target_name) in DIRECTIONS.items():
        shown = [_example(title, s, store, translate[direction])
                 for title, s in best_median_worst(slices, direction).items()]
        pictures[f"slices_{direction}.png"] = figures.examples(shown, source_name, target_name)
        values[direction] = {
            method: [s["ssim"] for s in per_subject if s["direction"] == direction
                     and s["method"] == method and s["protocol"] == "brain"]
            for method in ("model", "floor")}
    pictures["subjects.png"] = figures.subject_plot(values, labels, "SSIM in the brain")
    return pictures


def best_median_worst(slices: list[Record], direction: str) -> dict[str, Record]:
    """The model's slices with the highest, the middle and the lowest SSIM in the brain."""
    found = [s for s in slices if s["direction"] == direction and s["protocol"] == "brain"
             and s["method"] == "model"]
    found.sort(key=lambda s: (s["ssim"], s["id"], s["row"]))
    return {"best": found[-1], "median": found[len(found) // 2], "worst": found[0]}


def _example(title: str, record: Record, store: SliceStore,
             translate: Translate) -> figures.Example:
    row = np.array([record["row"]])
    real_x, real_y = to_tensor(store.t1w[row]), to_tensor(store.t2w[row])
    source, target = (real_x, real_y) if record["direction"] == "t1w-to-t2w" else (real_y, real_x)
    shown, translated, real = (((v.cpu() + 1) / 2)[0, 0].numpy()
                               for v in (source, translate(source), target))
    caption = (f"SSIM {record['ssim']:.3f}   PSNR {record['psnr_db']:.1f} dB\n"
               f"{record['id']}, row {record['row']}")
    return figures.Example(title, shown, translated, real, store.mask(row)[0], caption)


def write_results(out: Path, summary: dict[str, Any], slices: list[Record],
                  per_subject: list[Record], pictures: dict[str, bytes],
                  state: dict[str, Any]) -> None:
    """Write tables, figures and the report, each file whole."""
    for name, png in pictures.items():
        write_atomically(out / name, png)
    keys = ("direction", "method", "protocol", "id")
    columns = (*keys, "row", *METRICS, "correlation", "from_input")
    write_atomically(out / "slices.csv", _csv(columns, slices))
    write_atomically(out / "subjects.csv", _csv((*keys, "n_slices", *METRICS), per_subject))
    text = json.dumps(summary, indent=1, allow_nan=False)
    write_atomically(out / "summary.json", (text + "\n").encode())
    write_atomically(out / "report.html", report(summary, pictures, state).encode())


def _csv(columns: tuple[str, ...], rows: list[Record]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def table_rows(summary: dict[str, Any]) -> list[list[str]]:
    """The summary as lines of text: direction, protocol, method, then the metrics."""
    rows = []
    for direction, (source, target) in DIRECTIONS.items():
        for protocol in PROTOCOLS:
            for method, part in (("translated", summary[direction]),
                                 ("floor (copy)", summary[direction]["floor"])):
                values = part[protocol]
                rows.append([f"{source} to {target}", protocol, method,
                             *(_spread_text(values[name], 2 if name == "psnr_db" else 3)
                               for name in METRICS)])
    return rows


def _spread_text(value: dict[str, Any], digits: int) -> str:
    text = f"{value['mean']:.{digits}f}"
    if value["sd"] is None:
        return text
    low, high = value["ci95"]
    return f"{text} ± {value['sd']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def print_table(summary: dict[str, Any]) -> None:
    """The table and the warnings on the terminal."""
    rows = [["direction", "protocol", "", *METRICS.values()], *table_rows(summary)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        log.info("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    log.info("%d subjects, %d slices, %s split; mean ± SD [95 %% bootstrap interval] over "
             "subjects", summary["n_subjects"], summary["n_slices"], summary["split"])
    for direction in DIRECTIONS:
        for warning in summary["checks"][direction]["warnings"]:
            log.warning("warning: %s", warning)


def report(summary: dict[str, Any], pictures: dict[str, bytes], state: dict[str, Any]) -> str:
    """The one-page report."""
    config, data = state["config"], state["preprocessing"]
    warnings = [w for d in DIRECTIONS for w in summary["checks"][d]["warnings"]]
    parts = [
        page.paragraph(f"{summary['ckpt']}, step {state['step']}, {state['slices_seen']} slice "
                       f"pairs seen. {summary['n_subjects']} subjects, {summary['n_slices']} "
                       f"slices of the {summary['split']} split. Mean ± SD [95 % bootstrap "
                       "interval] over subjects."),
        *(page.paragraph(w, "warning") for w in warnings),
        page.table(("direction", "protocol", "", *METRICS.values()), table_rows(summary)),
        page.paragraph("brain: inside the brain mask. slice: the whole stored slice, background "
                       "included. box: cropped to the brain's box, resized to 128 x 128. Floor: "
                       "the input itself taken for the translation. Images in [0, 1], data range "
                       "1.", "note"),
        page.heading("Subjects"), page.picture(pictures["subjects.png"], "SSIM of each subject"),
    ]
    for direction, (source, target) in DIRECTIONS.items():
        check = summary["checks"][direction]
        parts += [
            page.heading(f"{source} to {target}: best, median and worst slice"),
            page.picture(pictures[f"slices_{direction}.png"], "input, translated, real, error"),
            page.paragraph(f"Correlation with the real {target} in the brain "
                           f"{check['correlation']:.2f} (below 0: inverted); distance to the input "
                           f"{check['copy_ratio']:.0%} of the real {target}'s (near 0: copied).",
                           "note"),
        ]
    settings = [[name, str(config[name])] for name in sorted(config)]
    settings += [[name, str(data[name])] for name in ("size", "spacing_mm", "intensity",
                                                      "brain_extraction")]
    sources = [[s["dataset"], s["snapshot"], s["doi"], s["license"]] for s in data["sources"]]
    parts += [page.heading("Training settings"), page.table(("setting", "value"), settings),
              page.heading("Data"), page.table(("dataset", "snapshot", "DOI", "licence"), sources),
              page.heading("Limits"), page.paragraph(LIMITS)]
    return page.page("T1w / T2w translation: evaluation", parts)


if __name__ == "__main__":
    sys.exit(console.run(main))
