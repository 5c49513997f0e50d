"""Measure checkpoints on paired subjects that they never saw.

    python evaluate.py --ckpt runs/default/best.pt
    python evaluate.py --ckpt runs/a/best.pt runs/b/best.pt           compared subject by subject
    python evaluate.py --ckpt runs/default/best.pt --bids DIR         on new paired scans

Writes `summary.json`, `subjects.csv`, `slices.csv`, `lesions.csv`, figures and `report.html`. The
subject is the unit: figures are means over a subject's slices, then mean, SD and a 95 % bootstrap
interval over subjects. Since published figures differ by 10 dB from protocol alone, each is named:
`brain` (inside the mask, the honest one), `slice` (the whole slice; empty background makes every
figure better), `box` (cropped to the brain's box and resized to 128 x 128) and `volume` (3-D,
inside the mask). Beside them what copying the input reaches (the floor), and a look-up table of
intensities.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import console
from ceiling import train_ceiling
from data import bids, brain
from data.bias import bias_correction_of
from data.histogram import Standard, StandardRows
from data.slices import paired_slices, paired_subjects
from data.store import (SPLITS, SliceStore, read_skipped, read_table, scans_of,
                        write_atomically)
from data.tissues import find_lesions, find_tissues, lesion_slices, tissue_slices
from device import PRECISIONS, Process, autocast, choose_precision, first_speaks, start_process
from measuring import (CEILING, DIRECTIONS, METHODS, METRICS, MODEL, PROTOCOLS, TABLE, Method,
                       RealLesions, Record, Translate, copy_input, in_batches, measure_session,
                       over_slices, person, select)
from models import checkpoint
from models.baseline import LookUpTable
from models.features import load_features
from report import figures
from report.evaluation import evaluation_page, training_curves, whose
from report.viewer import Stack
from summary import (IDS, LESIONS, best_median_worst, caption_of, comparison_csv, comparison_rows,
                     comparisons, contrast_checks, distribution, lesion_rows, lesion_summary,
                     lesion_warnings, records_csv, session_lesion_rows, summarise, table)

log = logging.getLogger("evaluate")
BINS = 64  # of the histograms
VIEWED = 6  # sessions in the report's viewer: 1 to 2 MB each


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line of `evaluate.py`."""
    p = console.OneLineParser(description=__doc__, formatter_class=console.Formatter,
                              allow_abbrev=False)
    p.add_argument("--ckpt", type=Path, nargs="+", required=True, default=argparse.SUPPRESS,
                   help="checkpoints to measure, best.pt as a rule; others are compared with the "
                        "first")
    data = p.add_argument_group("data")
    data.add_argument("--slices", type=Path, default=Path("slices"), help="the slice store")
    data.add_argument("--split", choices=SPLITS, help="whose subjects are measured (default: test)")
    data.add_argument("--bids", type=Path, nargs="+", metavar="DIR",
                      help="measure on all subjects of these BIDS trees instead, prepared as the "
                           "first checkpoint recorded (into slices/ in --out; slices-NAME/ "
                           "where that has another tree's)")
    data.add_argument("--brain-extraction", choices=brain.METHODS,
                      help="for --bids (default: as in the checkpoint's training data, where that "
                           "was one method)")
    data.add_argument("--brain-ml", type=float, nargs=2, metavar=("MIN", "MAX"),
                      help="for --bids: brain volumes believed, in millilitres (default: adults')")
    beside = p.add_argument_group("beside the checkpoints")
    beside.add_argument("--ceiling", action="store_true",
                        help="also train nets of the first checkpoint's size on pairs, for as many "
                             "slices (takes about a third of its training; kept as ceiling.pt in "
                             "--out)")
    beside.add_argument("--tissues", type=Path, nargs="+", metavar="DIR",
                        help="BIDS trees that the slices were made of, with maps of tissues "
                             "(label-GM_probseg and so on): is CSF brighter than grey matter on "
                             "T2w, and darker on T1w?")
    beside.add_argument("--lesions", type=Path, nargs="+", metavar="DIR",
                        help="BIDS trees that the slices were made of, with masks of lesions "
                             "(label-lesion_mask or label-L_mask): does a translation keep them? "
                             "(default: a rule of thumb finds them on the real scans)")
    beside.add_argument("--features", type=Path, metavar="FILE",
                        help="weights of torchvision's Inception v3, for Frechet and kernel "
                             "distance")
    run = p.add_argument_group("run")
    run.add_argument("--out", type=Path,
                     help="folder to write into (default: evaluation/ beside the first --ckpt)")
    run.add_argument("--batch-size", type=int, default=16, help="slices translated at once")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:K")
    run.add_argument("--precision", choices=PRECISIONS, default="auto",
                     help="arithmetic of the nets")
    run.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    args = p.parse_args(argv)
    check_args(args)
    args.split = args.split or "test"
    args.out = args.out or args.ckpt[0].parent / "evaluation"
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: is a file; name a folder")
    if (args.out / "store.json").exists():
        raise ValueError(f"--out {args.out}: is a slice store, with a report of its own; name "
                         "another folder")
    return args


def check_args(args: argparse.Namespace) -> None:
    """Refuse options that cannot work, alone or together."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: must be at least 1")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: must be at least 0")
    if len(set(args.ckpt)) < len(args.ckpt):
        raise ValueError("--ckpt: one is named twice")
    for option in ("brain_extraction", "brain_ml"):
        if getattr(args, option) and not args.bids:
            raise ValueError(f"--{option.replace('_', '-')}: goes with --bids; a store has its own")
    if args.split and args.bids:
        raise ValueError(f"--split {args.split}: goes with --slices; of --bids all are measured")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    with first_speaks():
        args = parse_args(argv)
        states = [checkpoint.load(path) for path in args.ckpt]
        process = start_process(args.device)
        store = prepare_store(args, states[0], process) if args.bids else SliceStore(args.slices)
        sessions = choose_sessions(store, states, args)
        work = Evaluation(args, states, store, process, sessions)
    measured = work.measure(sessions)
    if process.is_main:
        write_results(args, work, sessions, measured)
    if dist.is_initialized():
        dist.destroy_process_group()
    return console.DONE


# ------------------------------------------------------------------------------- whom and what


def prepare_store(args: argparse.Namespace, state: dict[str, Any], process: Process) -> SliceStore:
    """Slices of new scans, made by preprocess.py as the checkpoint's were.

    Raises
    ------
    ValueError : it cannot be said how, preprocess.py refuses, or torchrun runs before it has run
    """
    folder, record = folder_of_trees(args.out, args.bids), state["preprocessing"]
    if process.world > 1:
        if not (folder / "store.json").exists():
            raise ValueError(f"{folder}: is not there yet; run this once without torchrun")
        return SliceStore(folder)
    methods = record["brain_extraction"]
    method = args.brain_extraction or (methods[0] if len(methods) == 1 else "")
    if not method:
        raise ValueError(f"{args.ckpt[0]}: was trained on slices by {' and '.join(methods)}; say "
                         "with --brain-extraction which fits the scans in --bids")
    named, tta = method.partition("+")[::2]
    command = [sys.executable, str(Path(__file__).with_name("preprocess.py")),
               "--bids", *map(str, args.bids), "--out", str(folder), "--size", str(record["size"]),
               "--spacing", str(record["spacing_mm"]),
               "--min-brain-area", str(record["min_brain_area"]),
               "--brain-extraction", named, *(["--tta"] if tta else []),
               "--bias-correction", bias_correction_of(record),
               *(["--brain-ml", *map(str, args.brain_ml)] if args.brain_ml else []),
               "--device", args.device]
    done = subprocess.run(command, check=False)
    if done.returncode not in (console.DONE, console.LEFT_OUT):
        raise ValueError(f"--bids {' '.join(map(str, args.bids))}: preprocess.py ended with exit "
                         f"code {done.returncode}, see above")
    return SliceStore(folder)


def folder_of_trees(out: Path, trees: Sequence[Path]) -> Path:
    """Where the slices of these trees are, or go: `slices/`, unless it has those of others.

    A store has nobody twice, so one that has a head under another tree's name would lack it here.
    """
    names = {bids.dataset_name(tree) for tree in trees}
    folder = out / "slices"
    table = folder / "subjects.tsv"
    if not table.exists() or {row["dataset"] for row in read_table(table)} <= names:
        return folder
    return out / f"slices-{'-'.join(sorted(names))[:100]}"


def choose_sessions(store: SliceStore, states: Sequence[dict[str, Any]],
                    args: argparse.Namespace) -> list[dict[str, Any]]:
    """The split's sessions, if the checkpoints can and may be measured on them.

    Raises
    ------
    ValueError : the store was made otherwise than a checkpoint's, the split is empty, or it has
        subjects that a checkpoint was trained on
    """
    split = args.split  # new scans are measured as a test is
    sessions = paired_subjects(store, split)
    if args.bids:  # slices/ may hold those of an earlier --bids, too, of a tree named alike
        there = {found.id for root in args.bids for found in bids.find_subjects(root)[0]}
        refused = read_skipped(store.folder)
        sessions = [s for s in store.subjects if s["id"] in there and s["id"] not in refused]
        if not sessions:
            raise ValueError(f"--bids {' '.join(map(str, args.bids))}: no subject could be "
                             f"prepared, see {store.folder / 'skipped.tsv'}")
    for path, state in zip(args.ckpt, states):
        trained = state["preprocessing"]
        for name in ("size", "spacing_mm", "intensity"):
            if trained[name] != store.header[name]:
                raise ValueError(f"{store.folder}: made with {name} {store.header[name]}, {path} "
                                 f"was trained on {trained[name]}; make the store again alike")
        seen = {person(i) for i in trained["subjects"]["train"]}
        scans = set(trained.get("train_scans", ()))  # whatever their names are here
        known = [person(s["id"]) for s in sessions
                 if person(s["id"]) in seen or not scans.isdisjoint(scans_of(s))]
        if known and split != "train":
            where = "among the scans in --bids" if args.bids else f"in the {split} split"
            raise ValueError(f"{store.folder}: {min(known)} is {where}, but {path} was trained on "
                             "it; measure on subjects that it never saw")
    if not sessions:
        raise ValueError(f"{store.folder}: the {split} split has no subjects; name some with "
                         f"preprocess.py --{split}, or choose another --split")
    return sessions


def acquaintances(sessions: Sequence[dict[str, Any]],
                  states: Sequence[dict[str, Any]]) -> list[str]:
    """A line for whom the checkpoints were trained on, and for whom they were chosen by."""
    # last.pt, which has its optimisers, is of the end, whatever anybody's figures were then
    chosen = [state for state in states
              if "t2w_ssim" in state["best"] and "optimizers" not in state]
    said = []
    for split, of, what in (
            ("train", states, "were trained on"),
            ("val", chosen, "chose which epoch became best.pt")):
        people = {person(i) for state in of for i in state["preprocessing"]["subjects"][split]}
        if count := sum(person(s["id"]) in people for s in sessions):
            much = "far" if split == "train" else "a little"
            said.append(f"{count} of {len(sessions)} sessions {what}, so their figures are {much} "
                        "too good; those of new subjects are --split test")
    return said


@dataclass(frozen=True)
class Measured:
    """What was found on one session.

    Attributes
    ----------
    records : as `measuring.measure_session`
    counts : direction to (2, bins): intensities in the brain, real and translated by the first
    features : direction to (2, n, D) real and translated by the first, {} without weights
    lesions : as `measuring.measure_session`
    """

    records: list[Record]
    counts: dict[str, np.ndarray]
    features: dict[str, Tensor]
    lesions: list[Record]


class Evaluation:
    """Everything that translates, on this process's device.

    Parameters
    ----------
    args : the command line
    states : the checkpoints
    store : whose slices are measured
    process : this one among those of torchrun
    sessions : that will be measured
    """

    def __init__(self, args: argparse.Namespace, states: Sequence[dict[str, Any]],
                 store: SliceStore, process: Process, sessions: Sequence[dict[str, Any]]):
        self.args, self.states, self.store, self.process = args, states, store, process
        self.precision = choose_precision(args.precision, process.device)
        self.notes: list[str] = []
        if args.bids and (left_out := read_skipped(store.folder)):
            self.notes.append(f"{len(left_out)} sessions left out by preprocess.py, see "
                              f"{store.folder / 'skipped.tsv'}")
        self.notes += acquaintances(sessions, states)
        args.out.mkdir(parents=True, exist_ok=True)
        self.methods = [self._translators(MODEL, state, str(path))
                        for path, state in zip(args.ckpt, states)]
        self.methods += [copy_input(), *self._references()]
        self.features = load_features(args.features, process.device) if args.features else None
        self.tissues = find_tissues(args.tissues or (), sessions)
        if args.tissues and len(self.tissues) < len(sessions):
            self.notes.append(f"contrast order measured on {len(self.tissues)} of {len(sessions)} "
                              "sessions; of the others there are no maps of tissues in --tissues")
        self.lesions = find_lesions(args.lesions or (), sessions)
        if args.lesions and len(self.lesions) < len(sessions):
            self.notes.append(f"lesions measured on {len(self.lesions)} of {len(sessions)} "
                              "sessions; of the others there are no masks in --lesions")

    def _translators(self, kind: str, state: dict[str, Any], ckpt: str = "") -> Method:
        device = self.process.device
        with checkpoint.said_of(ckpt or "the ceiling's checkpoint"):
            nets = checkpoint.load_generators(state, device)
            standard = Standard.of_record(state["preprocessing"])

        def translator(net: torch.nn.Module) -> Translate:
            def translate(real: Tensor) -> Tensor:
                with torch.no_grad(), autocast(device, self.precision):
                    return net(real.to(device)).float()
            return translate

        return Method(kind, {d: translator(net) for d, net in zip(DIRECTIONS, nets)}, ckpt,
                      StandardRows(self.store, standard) if standard else None)

    def _references(self) -> list[Method]:
        """What is fitted on the training split: the look-up table and, if wanted, the ceiling."""
        training = self._training_store()
        if training is None:
            if self.args.ceiling:
                raise ValueError(f"--ceiling: needs training slices like the checkpoint's, "
                                 f"{self.args.slices} has none; name their store with --slices")
            self.notes.append("look-up table not measured: no training slices like the "
                              f"checkpoint's in {self.args.slices}")
            return []
        found = [fit_look_up_table(training)]
        if self.args.ceiling:
            path = self.args.out / "ceiling.pt"
            state = train_ceiling(path, self.states[0], training, self.process.device,
                                  self.precision, alone=self.process.world == 1)
            found.append(self._translators(CEILING, state))
        return found

    def _training_store(self) -> SliceStore | None:
        """The store with the training split, if it is there and made like the checkpoint's."""
        store = self.store
        if self.args.bids:
            try:
                store = SliceStore(self.args.slices)
            except (ValueError, FileNotFoundError):
                return None
        trained = self.states[0]["preprocessing"]
        alike = all(trained[name] == store.header[name] for name in ("size", "spacing_mm",
                                                                     "intensity"))
        return store if alike and len(store.rows("train")) else None

    def shown_otherwise(self, ckpts: Sequence[str]) -> set[str]:
        """Checkpoints whose nets are shown other histograms than the first's; a note says so."""
        first, *_ = standards = [state["preprocessing"].get("standard") for state in self.states]
        found = {name for name, standard in zip(ckpts, standards) if standard != first}
        if found:
            self.notes.append("cycle error not compared: the checkpoints' nets are shown different "
                              "histograms (--standardise), and it is measured in these")
        return found

    def measure(self, sessions: Sequence[dict[str, Any]]) -> list[Measured]:
        """Measure sessions, shared out among the processes; all of them on rank 0, in order."""
        rank, world = self.process.rank, self.process.world
        mine = [(i, session) for i, session in enumerate(sessions) if i % world == rank]
        bar = tqdm(mine, unit="session", desc="evaluate",
                   disable=None if self.process.is_main else True)
        parts = self.process.gather([(i, self._measure(session)) for i, session in bar])
        return [found for _, found in sorted((pair for part in parts for pair in part),
                                             key=lambda pair: pair[0])]

    def _measure(self, session: dict[str, Any]) -> Measured:
        device, batch_size = self.process.device, self.args.batch_size
        known = self.tissues.get(session["id"])
        tissues = (torch.from_numpy(tissue_slices(self.store, session, *known, str(device)))
                   if known else None)
        records, translated, lesions = measure_session(
            self.store, session, self.methods, device, batch_size, tissues,
            self._real_lesions(session))
        counts, features = {}, {}
        for direction, (_, real, fake, mask) in self.beside(session, translated).items():
            counts[direction] = np.stack([np.histogram(v[mask].numpy(), BINS, (0, 1))[0]
                                          for v in (real, fake)])
            if self.features:
                features[direction] = torch.stack([
                    torch.cat([self.features(v[i:i + batch_size].to(device)).cpu()
                               for i in range(0, len(v), batch_size)]) for v in (real, fake)])
        return Measured(records, counts, features, lesions)

    def _real_lesions(self, session: dict[str, Any]) -> RealLesions | None:
        """A session's lesions: from --lesions, else by rule; None where --lesions has none."""
        if not self.args.lesions:
            return RealLesions(self.store, session)
        known = self.lesions.get(session["id"])
        return RealLesions(self.store, session, lesion_slices(
            self.store, session, *known, str(self.process.device))) if known else None

    def beside(self, session: dict[str, Any],
               translated: Mapping[str, Tensor] | None = None) -> dict[str, tuple[Tensor, ...]]:
        """Direction to source, target, the first checkpoint's translation ([0, 1]), and mask."""
        parts = list(paired_slices(self.store, session, self.args.batch_size))
        real_x, real_y, mask = (torch.cat(column) for column in zip(*parts))
        rows, method = session["first_row"] + np.arange(session["n_slices"]), self.methods[0]
        found = {}
        for direction, (source, target) in zip(DIRECTIONS, ((real_x, real_y), (real_y, real_x))):
            fake = (translated[direction] if translated else
                    in_batches(method.translate[direction], method.shown(source, rows, direction),
                               self.args.batch_size))
            found[direction] = (*((v + 1) / 2 for v in (source, target, fake)), mask)
        return found


def fit_look_up_table(store: SliceStore) -> Method:
    """The best that a pixel's intensity alone can tell, from the training split's pairs."""
    tables = {direction: LookUpTable() for direction in DIRECTIONS}
    for session in paired_subjects(store, "train"):
        for real_x, real_y, mask in paired_slices(store, session, 64):
            for direction, (source, target) in zip(DIRECTIONS, ((real_x, real_y),
                                                                (real_y, real_x))):
                tables[direction].update(source, target, mask)
    return Method(TABLE, tables)


# ------------------------------------------------------------------------------------ results


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


if __name__ == "__main__":
    sys.exit(console.run(main))
