"""Build the slice store from BIDS trees or simulated subjects.

    python preprocess.py --bids DIR [DIR ...]        local BIDS trees
    python preprocess.py --simulate 12               simulated subjects, no network
    python preprocess.py --check                     verify a store, print its counts
    python preprocess.py --report                    draw it: report.html in its folder

Built a subject at a time and each step whole or not at all: killed at any moment, the same command
goes on and ends with the same bytes. Subjects that cannot be used are listed with their reasons in
`skipped.tsv`, and the exit code is 3.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import console
from data import bids, brain, store
from data.bids import Subject
from data.subject import Settings, prepare, recipe
from report.preprocessing import Shown, preprocessing_page

log = logging.getLogger("preprocess")
NETWORKS = ("hd-bet", "deepbet")
SHOWN = 4  # slices of a subject in the report
TOOLS = ("numpy", "nibabel", "scipy", "SimpleITK", "torch", "HD-BET", "deepbet", "nilearn")


@dataclass(frozen=True)
class Task:
    """What a worker process needs to make one part."""

    subject: Subject
    method: str
    settings: Settings
    device: str
    out: Path


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line of `preprocess.py`."""
    defaults = Settings()
    p = console.OneLineParser(description=__doc__, formatter_class=console.Formatter)
    source = p.add_argument_group("source (one of)").add_mutually_exclusive_group(required=True)
    source.add_argument("--bids", nargs="+", type=Path, metavar="DIR", help="local BIDS trees")
    source.add_argument("--simulate", type=int, metavar="N", help="make N simulated subjects")
    source.add_argument("--check", action="store_true", help="only verify the store in --out")
    source.add_argument("--report", action="store_true",
                        help="only draw the store in --out: writes its report.html")
    where = p.add_argument_group("folders")
    where.add_argument("--out", type=Path, default=Path("slices"), help="the slice store")
    where.add_argument("--downloads", type=Path, default=Path("downloads"),
                       help="where simulated subjects are written as a BIDS tree")
    how = p.add_argument_group("pipeline")
    how.add_argument("--size", type=int, default=defaults.size,
                     help="pixels a side of a slice, a multiple of 4")
    how.add_argument("--spacing", type=float, default=defaults.spacing_mm,
                     help="in-plane voxel size in mm")
    how.add_argument("--min-brain-area", type=float, default=defaults.min_brain_area,
                     help="keep slices with at least this share of the largest slice's brain area")
    how.add_argument("--brain-extraction", choices=brain.METHODS,
                     help="hd-bet and deepbet run a network on T1w, mask reads "
                          "*_desc-brain_mask.nii.gz, none takes extracted volumes "
                          "(default: hd-bet; mask for --simulate)")
    how.add_argument("--brain-ml", type=float, nargs=2, default=defaults.brain_ml,
                     metavar=("MIN", "MAX"),
                     help="brain volumes believed, in millilitres (adults)")
    chosen = p.add_argument_group("subjects")
    chosen.add_argument("--split", type=float, nargs=3, default=(0.8, 0.1, 0.1),
                        metavar=("TRAIN", "VAL", "TEST"),
                        help="shares of the subjects, by stable hash")
    chosen.add_argument("--val", nargs="+", default=[], metavar="SUB",
                        help="these subjects are the validation split, outright")
    chosen.add_argument("--test", nargs="+", default=[], metavar="SUB",
                        help="these subjects are the test split, outright")
    chosen.add_argument("--limit", type=int, metavar="N", help="take only the first N subjects")
    run = p.add_argument_group("run")
    run.add_argument("--workers", type=int, default=_cores(),
                     help="subjects side by side, each in a process of its own (0: in this one)")
    run.add_argument("--seed", type=int, default=0, help="of simulation and registration")
    run.add_argument("--device", default="auto",
                     help="of the brain extraction: auto, cpu, cuda[:K]")
    args = p.parse_args(argv)
    _check_args(args)
    return args


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_args(args: argparse.Namespace) -> None:
    """Refuse what would fail hours later."""
    if args.size < 32 or args.size % 4:
        raise ValueError(f"--size {args.size}: must be a multiple of 4 and at least 32; try "
                         f"{max(32, round(args.size / 4) * 4)}")
    if not 0.3 <= args.spacing <= 8:
        raise ValueError(f"--spacing {args.spacing}: must be 0.3 to 8 mm; try 1.5")
    if not 0 < args.min_brain_area <= 1:
        raise ValueError(f"--min-brain-area {args.min_brain_area}: must be above 0 and at most 1")
    if min(args.split) < 0 or args.split[0] == 0 or not abs(sum(args.split) - 1) <= 1e-6:
        raise ValueError(f"--split {' '.join(map(str, args.split))}: three shares that sum to 1, "
                         "the first above 0; try 0.8 0.1 0.1")
    if not 0 < args.brain_ml[0] < args.brain_ml[1]:
        raise ValueError(f"--brain-ml {' '.join(map(str, args.brain_ml))}: smallest, then largest "
                         "volume in millilitres; try 800 2000")
    for name, least in (("limit", 1), ("simulate", 1), ("workers", 0), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: must be at least {least}")
    if args.seed > 2 ** 31:
        raise ValueError(f"--seed {args.seed}: must be at most {2 ** 31}")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: is a file; name a folder")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parse_args(argv)
    if args.check:
        return check(args.out)
    if args.report:
        return draw(args.out)
    subjects, skipped, sources = collect(args)
    method = args.brain_extraction or ("mask" if args.simulate else "hd-bet")
    settings = Settings(args.size, args.spacing, args.min_brain_area, tuple(args.brain_ml),
                        args.seed)
    shared = {**settings.record(), "split": [float(s) for s in args.split]}
    fresh = not args.out.exists()
    args.out.mkdir(parents=True, exist_ok=True)
    with _only_writer(args.out):
        try:
            store.recover(args.out)
            before = store.check_settings(args.out, shared)
            check_names(args, subjects)
            recipes, failed = hash_files(subjects, method, settings)
            skipped.update(failed)
            skipped.update(work(find_work(args.out, subjects, recipes), args, method, settings))
            kept = finish(args, recipes, skipped, {**shared, "sources": sources}, before)
        finally:
            if fresh and not any(args.out.iterdir()):
                args.out.rmdir()
    return console.LEFT_OUT if set(skipped) - kept else console.DONE


# ----------------------------------------------------------------------------- finding the work


def collect(args: argparse.Namespace) -> tuple[list[Subject], dict[str, str], list[dict]]:
    """Subjects with both scans, reasons for those without, and the trees they come from."""
    if args.simulate:
        from data import simulate

        root = simulate.simulate_dataset(args.downloads / f"simulated-seed{args.seed}",
                                         args.simulate, seed=args.seed, workers=args.workers)
        subjects, missing = bids.find_subjects(root, "simulated")
        roots = [(root, "simulated")]
        subjects = subjects[:args.simulate]
    else:
        roots = [(root, bids.dataset_name(root)) for root in dict.fromkeys(args.bids)]
        names = [name for _, name in roots]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"--bids: two trees are called '{twice.pop()}', and the folder's name "
                             "is the dataset's; rename one")
        subjects, missing = [], {}
        for root, name in roots:
            found, lacking = bids.find_subjects(root, name)
            subjects += found
            missing.update(lacking)
    if args.limit:
        people = list(dict.fromkeys((s.dataset, s.subject) for s in subjects))[:args.limit]
        subjects = [s for s in subjects if (s.dataset, s.subject) in set(people)]
        taken = {bids.subject_id(*person, "") for person in people}
        missing = {i: reason for i, reason in missing.items() if i.partition("_ses-")[0] in taken}
    return subjects, missing, [bids.describe(root, name) for root, name in roots]


def check_names(args: argparse.Namespace, subjects: list[Subject]) -> None:
    """Refuse a name in `--val` or `--test` that fits nobody, before hours of work."""
    stored = store.read_table(args.out / "subjects.tsv")
    people = [(s.dataset, s.subject) for s in subjects]
    store.assign_splits([*people, *((row["dataset"], row["subject"]) for row in stored)],
                        args.split, val=args.val, test=args.test)


def hash_files(subjects: list[Subject], method: str,
               settings: Settings) -> tuple[dict[str, str], dict[str, str]]:
    """Each subject's recipe, and reasons for those whose files cannot be read."""
    def key(subject: Subject) -> str | OSError:
        try:
            return recipe(subject, method, settings)[2]
        except OSError as error:
            for scan in (subject.t1w, subject.t2w):
                if scan.is_symlink() and not scan.exists():
                    return FileNotFoundError(f"{scan}: a link to nothing; with DataLad run "
                                             "'datalad get' on it")
            return error

    with ThreadPoolExecutor(4) as pool:
        keys = {s.id: k for s, k in zip(subjects, pool.map(key, subjects))}
    return ({i: k for i, k in keys.items() if isinstance(k, str)},
            {i: str(k) for i, k in keys.items() if isinstance(k, OSError)})


def find_work(out: Path, subjects: list[Subject], recipes: dict[str, str]) -> list[Subject]:
    """The subjects whose rows are neither in the store nor in a part yet."""
    stored = {row["id"]: row["recipe"] for row in store.read_table(out / "subjects.tsv")}
    parts = {name: row["recipe"] for name, row in store.part_rows(out).items()}
    todo = [s for s in subjects if s.id in recipes
            and recipes[s.id] not in (stored.get(s.id), parts.get(s.id))]
    for subject in todo:
        if subject.id in stored:
            log.info("%s: its files or its brain extraction changed, its rows are made anew",
                     subject.id)
    return todo


# ------------------------------------------------------------------------------------- working


def work(todo: list[Subject], args: argparse.Namespace, method: str,
         settings: Settings) -> dict[str, str]:
    """Make the parts of all subjects in `todo`; returns id to reason for those that failed."""
    if not todo:
        return {}
    device = _device(args.device) if method in NETWORKS else "cpu"
    if method != "mask":
        _extractor(method, device)  # what is missing is said now, not by each worker
    tasks = [Task(subject, method, settings, device, args.out) for subject in todo]
    failed: dict[str, str] = {}
    start = time.monotonic()
    bar = tqdm(total=len(tasks), unit="subject", desc="preprocess", disable=None)
    for done, (task, reason) in enumerate(_results(tasks, args.workers), start=1):
        bar.update()
        if reason:
            failed[task.subject.id] = reason
        if bar.disable:  # no terminal: one plain line a subject
            log.info("%d/%d  %s  %s  (%.0f s)", done, len(tasks), task.subject.id,
                     f"skipped: {reason}" if reason else "done", time.monotonic() - start)
    bar.close()
    return failed


def _device(name: str) -> str:
    if name == "cpu":
        return name
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda") or not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no such device here; take auto or cpu")
    return name


def _results(tasks: list[Task], workers: int) -> Iterator[tuple[Task, str]]:
    """Each task with its reason to be skipped ("" if it is done), as they finish."""
    if workers <= 1 or len(tasks) == 1:
        yield from ((task, make_part(task)) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker,
                             (os.getpid(),)) as pool:
        futures: dict[Future, Task] = {pool.submit(make_part, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise OSError("a worker process was killed, for want of memory as a rule; run again "
                          "with fewer --workers") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():  # a subject may take minutes
                worker.terminate()
            raise


def _start_worker(parent: int) -> None:
    """End with the parent: a killed parent would leave its workers waiting for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@functools.lru_cache(maxsize=1)
def _extractor(method: str, device: str) -> Callable:
    """The brain extractor of this process, loaded once; one thread always gives the same bits."""
    if method in NETWORKS and device == "cpu":
        import torch

        torch.set_num_threads(1)
    return brain.make_extractor(method, device=device)


def make_part(task: Task) -> str:
    """Prepare one subject and store its part; returns why it was skipped, "" if it was not."""
    extractor = None if task.method == "mask" else _extractor(task.method, task.device)
    try:
        part = prepare(task.subject, task.method, task.settings, extractor)
    except (ValueError, FileNotFoundError) as error:
        return " ".join(str(error).split())
    store.write_part(task.out, part)
    return ""


# ------------------------------------------------------------------------------------ finishing


def finish(args: argparse.Namespace, recipes: dict[str, str], skipped: dict[str, str],
           header: dict[str, Any], before: dict[str, Any] | None) -> set[str]:
    """Assign splits, pack the store if anything is new, print the closing table.

    Returns the ids in the store. Parts of other runs (another tree, other settings) stay aside.
    """
    settled_rows = store.read_table(args.out / "subjects.tsv")
    fresh = {name: row for name, row in store.part_rows(args.out).items()
             if recipes.get(name) == row["recipe"]}
    rows = {row["id"]: row for row in settled_rows} | fresh
    if not rows:
        reason = next(iter(skipped.values()), "no subject was found")
        raise ValueError(f"no subject could be kept: {reason}"
                         + (f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""))
    settled = {(r["dataset"], r["subject"]): r["split"] for r in settled_rows}
    splits, said = store.assign_splits([(r["dataset"], r["subject"]) for r in rows.values()],
                                       args.split, val=args.val, test=args.test, settled=settled)
    table = [{**row, "split": splits[row["dataset"], row["subject"]]} for row in rows.values()]
    ours = {*recipes, *skipped}
    reasons = {r["id"]: r["reason"] for r in store.read_table(args.out / "skipped.tsv")
               if r["id"] not in ours}
    reasons.update(skipped)
    header["sources"] = _merge_sources((before or {}).get("sources", []), header["sources"])
    header["versions"] = (before or {}).get("versions", {})
    if fresh or not before:
        header["versions"] = _versions()
    if fresh or _differs(args.out, before, header, table, reasons):
        store.pack(args.out, header, table, reasons, fresh.keys())
    _print_table(args.out, skipped, said)
    return set(rows)


def _differs(out: Path, before: dict[str, Any] | None, header: dict[str, Any],
             table: list[dict], reasons: dict[str, str]) -> bool:
    """Whether packing would change a table although no rows are new."""
    if before is None:
        return True
    splits = {r["id"]: r["split"] for r in store.read_table(out / "subjects.tsv")}
    skips = {r["id"]: r["reason"] for r in store.read_table(out / "skipped.tsv")}
    return (any(before.get(key) != header[key] for key in header)
            or splits != {r["id"]: r["split"] for r in table} or skips != reasons)


def _merge_sources(old: list[dict], new: list[dict]) -> list[dict]:
    merged = {s["dataset"]: s for s in old} | {s["dataset"]: s for s in new}
    return [merged[name] for name in sorted(merged)]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in TOOLS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _print_table(out: Path, skipped: dict[str, str], said: list[str]) -> None:
    opened = store.SliceStore(out)
    counts = opened.header["counts"]
    log.info("\n%s", out)
    log.info("%-8s %9s %9s %9s", "split", "subjects", "sessions", "slices")
    for split in (*store.SPLITS, "all"):
        log.info("%-8s %9d %9d %9d", split, *(counts[what][split] for what in
                                              ("subjects", "sessions", "slices")))
    for line in said:
        log.info("note: %s", line)
    for subject in opened.subjects:
        if subject["note"]:
            log.info("note: %s: %s", subject["id"], subject["note"])
        if float(subject["cut_share"]) > 0.005:
            log.info("note: %s: %.1f %% of the brain lies outside the frame; a larger --size "
                     "holds it", subject["id"], 100 * float(subject["cut_share"]))
    for source in opened.header["sources"]:
        log.info("source: %s%s%s%s", source["dataset"],
                 *(f", {what} {source[what]}" if source[what] else ""
                   for what in ("snapshot", "doi", "license")))
    if skipped:
        log.info("skipped %d (skipped.tsv):", len(skipped))
        for name in sorted(skipped):
            log.info("  %s: %s", name, skipped[name])


def check(out: Path) -> int:
    """`--check`: print counts, then every fault with its rows."""
    problems = store.check(out)
    _print_table(out, {}, [])
    for problem in problems:
        print(f"error: {out}: {problem}", file=sys.stderr)
    if problems:
        return console.WRONG_INPUT
    log.info("sound: every row was read and agrees with its hash")
    return console.DONE


def draw(out: Path) -> int:
    """`--report`: masks, alignment and figures of every subject on a page in the store."""
    opened = store.SliceStore(out)
    shown = []
    for row, subject in zip(store.read_table(out / "subjects.tsv"), opened.subjects):
        places = np.linspace(0.1, 0.9, SHOWN) * (subject["n_slices"] - 1)
        rows = subject["first_row"] + places.astype(int)
        t1w, t2w = ((np.asarray(a[rows], np.float32) + 1) / 2 for a in (opened.t1w, opened.t2w))
        shown.append(Shown(row, t1w, t2w, opened.mask(rows)))
    skipped = {r["id"]: r["reason"] for r in store.read_table(out / "skipped.tsv")}
    html = preprocessing_page(shown, skipped, f"Slices in {out.resolve().name}")
    store.write_atomically(out / "report.html", html.encode())
    log.info("report: %s", out / "report.html")
    return console.DONE


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the store for this process: two writers would pack each other's halves."""
    try:
        import fcntl
    except ImportError:  # Windows: the user has to see to it
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another preprocess.py is writing there; wait for it") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


if __name__ == "__main__":
    sys.exit(console.run(main))
