"""Train recipes in folds by subject, with several seeds, and put their figures side by side.

    python benchmarks/recipes.py --slices slices --pairs 20000 --seeds 0 1 \\
        --held-out tcga6692,msp01 tcga7294,msp03 ms07,ms19,msp04
    python benchmarks/recipes.py ... --ceiling --recipes default paper "still=--deform 0 --no-flip"

A fold holds some subjects out and trains on the others with train.py; figures are of the nets at
the end (last.pt): no checkpoint is chosen. The held-out subjects are the fold's `val` split, so
that train.py writes down how they would have judged every epoch: how far the figures swing at the
end, and what choosing an epoch with and without their pairs would have given. Nothing of that goes
back into a run. Runs that are done are not repeated; stopped ones go on. Ends with 1 where a run
copied its input or inverted the contrast.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import console
from config import parse_args
from data import store
from data.atomic import write_atomically
from measuring import CEILING, DIRECTIONS, FLOOR, MODEL, TABLE
from models import checkpoint
from summary import COPY_RATIO

EPOCHS = 20  # pieces of a run by default, each judged once
LAST = 5  # of them, over which the swing is measured
LIKE_REAL = 0.1  # distance of histograms within which a translation is no copy (real heads': 0.29)
SHOWN = {"t1w-to-t2w": "t2w", "t2w-to-t1w": "t1w"}  # what train.py calls a direction's figures


@dataclass(frozen=True)
class Job:
    """One run: a recipe in a fold with a seed.

    Attributes
    ----------
    recipe : its name
    options : of train.py
    fold : which
    seed : of the run
    folder : of this job; `run` and `evaluation` are in it
    """

    recipe: str
    options: tuple[str, ...]
    fold: int
    seed: int
    folder: Path


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate, print the table; returns the exit code."""
    p = console.OneLineParser(description=__doc__, formatter_class=console.Formatter)
    p.add_argument("--slices", type=Path, default=Path("slices"), help="the slice store")
    p.add_argument("--held-out", nargs="+", required=True, metavar="SUBJECT,...",
                   default=argparse.SUPPRESS, help="each fold's held-out subjects, with commas")
    p.add_argument("--recipes", nargs="+", default=["default", "paper"],
                   help="names of train.py --recipe, or NAME=OPTIONS for the defaults with others")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run of each fold for each")
    p.add_argument("--pairs", type=int, default=20000, help="slice pairs seen by a run")
    p.add_argument("--epochs", type=int, default=EPOCHS,
                   help="pieces of a run, each judged once; fewer cost less where heads are few")
    p.add_argument("--features", type=int, default=32, help="of the nets")
    p.add_argument("--ceiling", action="store_true",
                   help="also train nets on pairs, as long: for the first recipe and seed")
    p.add_argument("--together", type=int, default=1, help="runs side by side")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--out", type=Path, default=Path("runs/recipes"), help="folder to write into")
    args = p.parse_args(argv)
    if args.epochs < LAST:
        raise ValueError(f"--epochs {args.epochs}: at least {LAST}, the swing is theirs")
    if args.pairs < args.epochs:
        raise ValueError(f"--pairs {args.pairs}: at least {args.epochs}")
    whole = store.SliceStore(args.slices)
    folds = [write_fold(whole, names.split(","), args.out / f"fold{fold}")
             for fold, names in enumerate(args.held_out)]
    jobs = [Job(name, options, fold, seed, args.out / name / f"fold{fold}_seed{seed}")
            for seed in args.seeds for name, options in map(recipe_of, args.recipes)
            for fold in range(len(folds))]
    for job in jobs:  # a mistake in the last recipe is found before the first is trained
        steps_of(job, args)
    with ThreadPoolExecutor(args.together) as pool:
        done = list(pool.map(lambda job: work(job, folds[job.fold], jobs[0], args), jobs))
    rows = [row for found in done for row in found]
    print_table(rows)
    print(json.dumps({"benchmark": "recipes", "pairs": args.pairs, "features": args.features,
                      "runs": rows}, allow_nan=False))
    return int(any(row.get("copied") or row.get("inverted") for row in rows))


def recipe_of(text: str) -> tuple[str, tuple[str, ...]]:
    """Name and options of train.py, from `NAME` or `NAME=OPTIONS`.

    Raises
    ------
    ValueError : the name cannot be a folder's
    """
    name, equals, options = text.partition("=")
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("fold"):
        raise ValueError(f"--recipes {text}: a name of letters, digits, '.', '_', '+' or '-', that "
                         "does not begin with 'fold'")
    return name, tuple(shlex.split(options)) if equals else ("--recipe", name)


def write_fold(whole: store.SliceStore, held_out: Sequence[str], folder: Path) -> Path:
    """A store with the same slices, where `held_out` are the validation subjects, others trained.

    Raises
    ------
    ValueError : a subject is not there, or none is left to train on
    """
    rows = store.read_table(whole.folder / "subjects.tsv")
    known = {row["subject"] for row in rows}
    for name in held_out:
        if name not in known:
            raise ValueError(f"--held-out {name}: not in {whole.folder / 'subjects.tsv'}; it has "
                             f"{', '.join(sorted(known))}")
    for row in rows:
        row["split"] = "val" if row["subject"] in held_out else "train"
    if all(row["split"] == "val" for row in rows):
        raise ValueError(f"--held-out {','.join(held_out)}: nobody is left to train on")
    header = {**store.read_header(whole.folder), "counts": store.counts(rows)}
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*store.ARRAYS, "skipped.tsv"):
        (folder / name).unlink(missing_ok=True)
        try:
            os.link(whole.folder / name, folder / name)
        except OSError:  # another disk
            shutil.copyfile(whole.folder / name, folder / name)
    columns = (whole.folder / "subjects.tsv").read_text(encoding="utf-8").split("\n")[0]
    write_atomically(folder / "subjects.tsv", store.table(columns.split("\t"), rows))
    write_atomically(folder / "store.json", (json.dumps(header, indent=1) + "\n").encode())
    return folder


def work(job: Job, fold: Path, first: Job, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and evaluate a job as far as that is not done; its rows of the table."""
    claim(job, fold, args)
    run, evaluation = job.folder / "run", job.folder / "evaluation"
    steps = steps_of(job, args)
    if not is_trained(run, args.epochs * steps):
        call("train.py", "--slices", fold, "--run", run, "--features", args.features, "--epochs",
             args.epochs // 2, "--epochs-decay", args.epochs - args.epochs // 2,
             "--steps-per-epoch", steps, "--seed", job.seed, "--device", args.device,
             *job.options, log=job.folder / "train.log")
    figures = read_curve(run)
    alike = (job.recipe, job.seed) == (first.recipe, first.seed)
    ceiling = ["--ceiling"] if args.ceiling and alike else []
    summary = read_summary(evaluation, run / "last.pt", bool(ceiling))
    if summary is None:
        call("evaluate.py", "--slices", fold, "--ckpt", run / "last.pt", "--split", "val",
             "--device", args.device, "--out", evaluation, *ceiling,
             log=job.folder / "evaluate.log")
        summary = read_summary(evaluation, run / "last.pt", bool(ceiling))
        assert summary is not None
    return list(rows_of(job, summary, figures, speed_of(run)))


def steps_of(job: Job, args: argparse.Namespace) -> int:
    """Steps of an epoch, so that a run sees `--pairs` whatever its batch.

    Raises
    ------
    ValueError : a batch is more than an epoch's pairs, or an option that train.py would refuse
    """
    pairs, batch = args.pairs // args.epochs, parse_args([*job.options])[0].batch_size
    if batch > pairs:
        raise ValueError(f"--recipes {job.recipe}: --batch-size {batch} is more than the {pairs} "
                         "pairs of an epoch; take more --pairs or fewer --epochs")
    return pairs // batch


def is_trained(run: Path, last: int) -> bool:
    """Whether its `last.pt` is of the last step, judged: metrics are written before it is."""
    try:
        state = checkpoint.load(run / "last.pt")
    except (FileNotFoundError, ValueError):
        return False
    return state["step"] >= last and state["best"].get("judged_step", 0) >= last


def claim(job: Job, fold: Path, args: argparse.Namespace) -> None:
    """Write down what a job is, before it begins; what is there of another one is not this one's.

    Raises
    ------
    ValueError : the folder has a run of other held-out subjects, options, pairs or features
    """
    path = job.folder / "job.json"
    asked = {"options": [*job.options], "seed": job.seed, "features": args.features,
             "pairs": args.pairs, "epochs": args.epochs,
             "subjects_sha256": hashlib.sha256((fold / "subjects.tsv").read_bytes()).hexdigest()}
    begun = (job.folder / "run").exists()
    if path.exists() and begun:
        there = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in asked if asked[name] != there.get(name)]
        if other:
            raise ValueError(f"{job.folder}: has a run with other {', '.join(other)}; take another "
                             "--out, or delete the folder")
    elif begun:
        raise ValueError(f"{job.folder}: has a run, and no job.json that says of what; take "
                         "another --out, or delete the folder")
    else:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(asked, indent=1) + "\n").encode())


def call(script: str, *options: object, log: Path) -> None:
    """Run a command of the project; its output goes into `log`.

    Raises
    ------
    ValueError, ChildProcessError : it refused what it was given, it failed
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as out:
        done = subprocess.run([sys.executable, str(ROOT / script), *map(str, options)],
                              stdout=out, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        kind = ValueError if done.returncode == console.WRONG_INPUT else ChildProcessError
        raise kind(f"{script} {' '.join(map(str, options))}: exit code {done.returncode}, see "
                   f"{log}")


def read_summary(evaluation: Path, ckpt: Path, with_ceiling: bool) -> dict[str, Any] | None:
    """What evaluate.py found on this very checkpoint; None where that is still to be done."""
    path = evaluation / "summary.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    done = (summary["ckpt_sha256"] == checkpoint.fingerprint(ckpt)
            and (CEILING in summary["t1w-to-t2w"] or not with_ceiling))
    return summary if done else None


def read_curve(run: Path) -> list[dict[str, Any]]:
    """The validations of a run, in the order of steps; [] before the first."""
    return list(_of_kind(run, "validation"))


def speed_of(run: Path) -> float | None:
    """Median slice pairs a second of a run; None of one that was too short to measure it."""
    found = [line["pairs_per_s"] for line in _of_kind(run, "speed")]
    return float(np.median(found)) if found else None


def _of_kind(run: Path, kind: str) -> Iterable[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a kill cut it short
                line = json.loads(text)
                if line["kind"] == kind:
                    yield line


def rows_of(job: Job, summary: dict[str, Any], curve: Sequence[dict[str, Any]],
            pairs_per_s: float | None) -> Iterable[dict[str, Any]]:
    """A row for each method and direction of one evaluation."""
    for direction in DIRECTIONS:
        ssims = [point[f"{SHOWN[direction]}_ssim"] for point in curve]
        last = ssims[-LAST:]
        for method in (MODEL, FLOOR, TABLE, CEILING):
            part = summary[direction] if method == MODEL else summary[direction].get(method)
            if not part:
                continue
            row: dict[str, Any] = {
                "recipe": job.recipe if method == MODEL else method, "method": method,
                "direction": direction, "fold": job.fold, "seed": job.seed,
                **{f"{protocol}_{name}": part[protocol][name]["mean"]
                   for protocol in ("brain", "slice", "box") for name in ("ssim", "psnr_db")}}
            lesions = summary["lesions"][direction].get(method, {})
            row |= {f"lesions_{name}": lesions[name]["mean"] for name in ("kept", "erased")
                    if lesions.get(name)}
            if method == MODEL:
                check = summary["checks"][direction]
                row |= {"copied": check["copy_ratio"] < COPY_RATIO,
                        "inverted": check["correlation"] < 0,
                        "checkerboard": check["checkerboard"], "swing": max(last) - min(last),
                        "best_epoch": max(ssims), "without_pairs": ssims[pick(curve)],
                        "pairs_per_s": pairs_per_s}
            yield row


def pick(curve: Sequence[dict[str, Any]]) -> int:
    """The epoch that a rule would take which needs no pairs.

    The smallest cycle error, both ways together, of the epochs whose translations have about the
    intensities of real slices of that contrast (a copy comes back best of all, but has not). Where
    no epoch has, the one whose intensities are nearest.
    """
    def total(what: str) -> np.ndarray:
        return np.array([sum(point[f"{name}_{what}"] for name in SHOWN.values())
                         for point in curve])
    distance = total("histogram_distance")
    fits = distance <= max(2 * LIKE_REAL, distance.min())
    return int(np.argmin(np.where(fits, total("cycle_error"), np.inf)))


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Means over folds and seeds, and the spread between seeds, of each recipe and direction.

    `lesions`: the share of their contrast that is kept; `copied`, `inverted`: runs that did.
    """
    titles = ("recipe", "direction", "runs", "brain", "dB", "seeds", "slice", "dB", "box", "dB",
              "swing", "best ep.", "no pairs", "checker", "lesions", "pairs/s", "copied",
              "inverted")
    lines = [titles]
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        for direction in DIRECTIONS:
            found = [r for r in rows if (r["recipe"], r["direction"]) == (recipe, direction)]
            if not found:
                continue

            def mean(name: str, digits: int, found: Sequence[dict[str, Any]] = found) -> str:
                values = [r[name] for r in found if r.get(name) is not None]
                return f"{np.mean(values):.{digits}f}" if values else ""

            figures = [mean(f"{protocol}_{name}", digits) for protocol in ("brain", "slice", "box")
                       for name, digits in (("ssim", 3), ("psnr_db", 2))]
            lines.append((recipe, direction, str(len(found)), *figures[:2], spread(found),
                          *figures[2:], mean("swing", 3), mean("best_epoch", 3),
                          mean("without_pairs", 3), mean("checkerboard", 2),
                          mean("lesions_kept", 2), mean("pairs_per_s", 1),
                          *(str(sum(r.get(name, False) for r in found))
                            for name in ("copied", "inverted"))))
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())


def spread(rows: Sequence[dict[str, Any]]) -> str:
    """Standard deviation of SSIM in the brain between seeds, of the mean over folds; "" of one."""
    seeds = sorted({row["seed"] for row in rows})
    means = [np.mean([r["brain_ssim"] for r in rows if r["seed"] == seed]) for seed in seeds]
    return f"+-{np.std(means, ddof=1):.3f}" if len(means) > 1 else ""


if __name__ == "__main__":
    started = time.monotonic()
    code = console.run(main)
    print(f"took {(time.monotonic() - started) / 60:.1f} min", file=sys.stderr)
    sys.exit(code)
