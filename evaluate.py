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
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

import console
from data import bids, brain
from data.bias import bias_correction_of
from data.slices import paired_subjects
from data.splits import SPLITS
from data.store import SliceStore, read_skipped, read_table, scans_of
from device import PRECISIONS, Process, first_speaks, start_process
from evaluation import Evaluation
from measuring import person
from models import checkpoint
from results import write_results


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


if __name__ == "__main__":
    sys.exit(console.run(main))
