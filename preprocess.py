"""Build the slice store from OpenNeuro, BIDS trees or simulated subjects.

    python preprocess.py --datasets ds002330 ds003717:1.0.1   OpenNeuro, pinned or chosen snapshots
    python preprocess.py --bids DIR [DIR ...]                 local BIDS trees
    python preprocess.py --simulate 12                        simulated subjects, no network
    python preprocess.py --check                              verify a store, print its counts
    python preprocess.py --report                             draw it: report.html in its folder
    python preprocess.py --merge [DIR ...]                    pack what `--shard k/n` runs have made

Built a subject at a time and each step whole or not at all: killed at any moment, the same command
goes on and ends with the same bytes. Subjects that cannot be used are listed with their reasons in
`skipped.tsv`, and the exit code is 3.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import console
from data import bids, brain, contrast, shards, store
from data.bias import CORRECTIONS
from data.bids import Subject
from data.hdbet import ensure_weights
from data.ledger import Ledger, merge_sources, of_rows, of_trees, refuse_namesakes
from data.openneuro import API_VARIABLE, Archive
from data.shards import Record, Shard
from data.sources import Arrival, Person, Snapshots, Trees
from data.subject import Settings, prepare
from data.volume import NotNow
from data.workers import Workers
from report.preprocessing import look_at, preprocessing_page

log = logging.getLogger("preprocess")
NETWORKS = ("hd-bet", "hd-bet+tta", "deepbet")
Source = Trees | Snapshots
AHEAD = 3  # subjects on disk or on their way beyond those that the workers have
WORKER_GIB, WORKERS_A_GPU = 3, 4
NO_MEMORY = "allocate memory|bad_alloc"  # in a RuntimeError of SimpleITK or torch
TOOLS = ("numpy", "nibabel", "scipy", "SimpleITK", "torch", "HD-BET", "deepbet", "nilearn")


@dataclass(frozen=True)
class Task:
    """What a worker process needs to make the parts of one subject."""

    sessions: tuple[Subject, ...]
    snapshot: str
    method: str
    settings: Settings
    device: str
    out: Path


@dataclass(frozen=True)
class Outcome:
    """Why a session was skipped, "" if it was not, and whether the next run need not try again."""

    reason: str = ""
    is_lasting: bool = True


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line of `preprocess.py`."""
    defaults = Settings()
    p = console.OneLineParser(description=__doc__, formatter_class=console.Formatter)
    source = p.add_argument_group("source (one of)").add_mutually_exclusive_group(required=True)
    source.add_argument("--datasets", nargs="+", metavar="DS",
                        help="OpenNeuro datasets: ds002330, or ds002330:1.1.0 for a snapshot")
    source.add_argument("--bids", nargs="+", type=Path, metavar="DIR", help="local BIDS trees")
    source.add_argument("--simulate", type=int, metavar="N", help="make N simulated subjects")
    source.add_argument("--check", action="store_true", help="only verify the store in --out")
    source.add_argument("--report", action="store_true",
                        help="only draw the store in --out: writes its report.html")
    source.add_argument("--merge", nargs="*", type=Path, metavar="DIR",
                        help="pack the parts that all shards have left in these folders "
                             "(in --out if none is named) into the store in --out")
    _add_folders(p)
    _add_pipeline(p, defaults)
    chosen = p.add_argument_group("subjects")
    chosen.add_argument("--split", type=float, nargs=3, default=(0.8, 0.1, 0.1),
                        metavar=("TRAIN", "VAL", "TEST"),
                        help="shares of the subjects, by stable hash")
    chosen.add_argument("--val", nargs="+", default=[], metavar="SUB",
                        help="these subjects are the validation split, outright")
    chosen.add_argument("--test", nargs="+", default=[], metavar="SUB",
                        help="these subjects are the test split, outright")
    chosen.add_argument("--limit", type=int, metavar="N", help="take only the first N subjects")
    chosen.add_argument("--shard", metavar="K/N",
                        help="work on every N-th subject from the K-th and pack nothing: for N "
                             "machines side by side; --merge packs")
    chosen.add_argument("--list", action="store_true",
                        help="only print subjects, files and sizes")
    run = p.add_argument_group("run")
    run.add_argument("--workers", type=int,
                     help="subjects side by side, each in a process of its own (0: in this one; "
                          f"default: one a core, at most one for {WORKER_GIB} GiB of memory, and "
                          f"at most {WORKERS_A_GPU} where they share a GPU)")
    run.add_argument("--seed", type=int, default=0, help="of simulation and registration")
    run.add_argument("--device", default="auto",
                     help="of the brain extraction: auto, cpu, cuda[:K]")
    args = p.parse_args(argv)
    _check_args(args)
    if args.workers is None:
        works = not args.list and (args.datasets or args.bids or args.simulate)
        on_gpu = works and _method(args) in NETWORKS and _device(args.device) != "cpu"
        args.workers = _default_workers(bool(on_gpu))
    return args


def _add_folders(p: argparse.ArgumentParser) -> None:
    where = p.add_argument_group("folders")
    where.add_argument("--out", type=Path, default=Path("slices"), help="the slice store")
    where.add_argument("--downloads", type=Path, default=Path("downloads"),
                       help="downloaded and simulated subjects, as BIDS trees")
    where.add_argument("--keep-downloads", action="store_true",
                       help="leave downloaded files there (deleted when a subject is sliced)")
    where.add_argument("--api-url", metavar="URL", default=argparse.SUPPRESS,
                       help="GraphQL endpoint of a mirror (default: OpenNeuro's own, or the "
                            f"environment's {API_VARIABLE})")


def _add_pipeline(p: argparse.ArgumentParser, defaults: Settings) -> None:
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
    how.add_argument("--bias-correction", choices=CORRECTIONS, default=defaults.bias_correction,
                     help="n4 evens out the scanner's brightness inside the brain, some 5 s a "
                          "subject; its slices cannot be turned back into scanner units")
    how.add_argument("--tta", action="store_true",
                     help="test-time augmentation in hd-bet: a little better, eight times as long")
    how.add_argument("--brain-ml", type=float, nargs=2, default=defaults.brain_ml,
                     metavar=("MIN", "MAX"),
                     help="brain volumes believed, in millilitres (adults)")


def _default_workers(on_gpu: bool) -> int:
    """As many as there are cores for, and memory."""
    cores = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
             else os.cpu_count() or 1)
    room = cores
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (WORKER_GIB << 30)
    return max(min(cores, room, WORKERS_A_GPU if on_gpu else cores), 1)


def _check_args(args: argparse.Namespace) -> None:
    """Refuse what would fail hours later."""
    if not 32 <= args.size <= 1024 or args.size % 4:
        raise ValueError(f"--size {args.size}: must be a multiple of 4 from 32 to 1024; try "
                         f"{min(max(32, round(args.size / 4) * 4), 1024)}")
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
    if args.shard:
        args.shard = Shard.parse(args.shard)
    for name in ("shard", "list"):
        if getattr(args, name) and not (args.datasets or args.bids):
            raise ValueError(f"--{name}: goes with --datasets or --bids")
    if args.tta and _method(args) != "hd-bet+tta":
        raise ValueError(f"--tta: is HD-BET's, --brain-extraction is {_method(args)}")
    if args.datasets and args.brain_extraction == "mask":
        raise ValueError("--brain-extraction mask: OpenNeuro's raw datasets hold no masks; choose "
                         "hd-bet or deepbet")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: is a file; name a folder")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parse_args(argv)
    if args.check:
        return check(args.out)
    if args.report:
        return draw(args.out)
    if args.merge is not None:
        return merge(args.out, args.merge or [args.out])
    with open_source(args) as source:
        trees = source.sessions if args.bids else []
        if limit := min(filter(None, (args.limit, args.simulate)), default=None):
            source.take(source.people[:limit], unpaired=False)
        everybody, job = source.people, source.identity()
        if args.shard:
            source.take(args.shard.share(everybody), unpaired=True)
        if args.list:
            log.info("%s", "\n".join(source.listing()))
            return console.DONE
        return build(args, source, everybody, job, trees)


def build(args: argparse.Namespace, source: Source, everybody: list[Person],
          job: dict[str, Any], trees: list[Subject]) -> int:
    """Make what is missing and pack it, or leave a shard's parts for `--merge`.

    `everybody` and `job` are those of all shards, `trees` all sessions of `--bids`, whatever
    `--limit` and `--shard` take of them.
    """
    settings = Settings(args.size, args.spacing, args.min_brain_area, tuple(args.brain_ml),
                        args.seed, args.bias_correction)
    header = {**settings.record(), "split": [float(s) for s in args.split]}
    choice = {"split": list(args.split), "val": args.val, "test": args.test,
              "brain_extraction": _method(args), "brain_ml": list(args.brain_ml), "of": job}
    with _writer(args.out, shared=bool(args.shard)), contextlib.ExitStack() as held:
        if args.shard:
            held.enter_context(_begin_shard(args.out, args.shard))
        else:
            store.recover(args.out)
        before = store.check_settings(args.out, header)
        check_names(args, everybody)
        refuse_namesakes(args.out, of_trees(trees))
        for folder in source.folders:  # two runs would delete each other's files
            held.enter_context(_use(folder, args.out, args.shard, args.keep_downloads))
        ledger = Ledger(args.out, _method(args), settings, source.missing)
        work(source, ledger, args, settings)
        header |= {"sources": source.describe(), "versions": _versions()}
        record = Record(header, choice, ledger.made, ledger.skipped)
        if args.shard:
            return _end_shard(args.out, args.shard, record)
        left_out = finish(args.out, record, before)
    return console.LEFT_OUT if left_out else console.DONE


def merge(out: Path, folders: list[Path]) -> int:
    """`--merge`: pack what the shards have made, as one run would have."""
    with _writer(out):
        store.recover(out)
        shutil.rmtree(out / shards.PACKED, ignore_errors=True)
        record = shards.read_records(list(dict.fromkeys(folders)))
        if record is None:
            if not (out / "store.json").exists():
                raise ValueError(f"{', '.join(map(str, folders))}: no shard has finished there; "
                                 "run preprocess.py --shard 1/4 and so on first")
            log.info("nothing to merge: no shard has left a record that is not packed")
            _print_table(out, {}, [])
            return console.DONE
        for tool, found in sorted(shards.differing_versions(folders).items()):
            log.warning("note: shards had %s %s", tool, " and ".join(sorted(found)))
        before = store.check_settings(out, record.header)
        rows = [*store.read_table(out / "subjects.tsv"),
                *(row for folder in folders for row in store.part_rows(folder).values())]
        refuse_namesakes(out, of_rows(rows, record.recipes))
        shards.gather(out, [f for f in folders if f.resolve() != out.resolve()], record.recipes)
        left_out = finish(out, record, before)
        shards.forget(out)
    return console.LEFT_OUT if left_out else console.DONE


def _method(args: argparse.Namespace) -> str:
    method = args.brain_extraction or ("mask" if args.simulate else "hd-bet")
    return f"{method}+tta" if args.tta and method == "hd-bet" else method


@contextlib.contextmanager
def _begin_shard(out: Path, shard: Shard) -> Iterator[None]:
    """Hold a shard for this process, and take its record back."""
    if (out / store.COMMIT).exists():
        raise ValueError(f"{out}: a write was interrupted; run preprocess.py --merge again first")
    path = shards.lock_path(out, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path, False, f"{out}: another preprocess.py works on shard {shard}"):
        shards.drop_record(out, shard)
        yield


@contextlib.contextmanager
def _use(folder: Path, out: Path, shard: Shard | None, keep: bool) -> Iterator[None]:
    """Hold a dataset's folder of downloads: for this run, or beside other shards of its job."""
    if folder.resolve() == out.resolve():
        raise ValueError(f"--out {out}: is the folder of a dataset's downloads; name another")
    folder.mkdir(parents=True, exist_ok=True)
    said = f"{folder}: another preprocess.py downloads there; choose another --downloads"
    with _lock(folder / ".lock", bool(shard) or keep, said):
        yield


def _end_shard(out: Path, shard: Shard, record: Record) -> int:
    shards.write_record(out, shard, record)
    log.info("shard %s: %d sessions in %s, %d skipped; when all %d are through: "
             "python preprocess.py --merge [FOLDER ...] --out SLICES", shard, len(record.recipes),
             out / store.PARTS, len(record.skipped), shard.n)
    for name in sorted(record.skipped):
        log.info("  %s: %s", name, record.skipped[name])
    return console.LEFT_OUT if record.skipped else console.DONE


# ----------------------------------------------------------------------------- finding the work


@contextlib.contextmanager
def open_source(args: argparse.Namespace) -> Iterator[Source]:
    """Where this run's subjects come from."""
    if args.datasets:
        with Archive(getattr(args, "api_url", None)) as archive:
            yield Snapshots(archive, args.datasets, args.downloads, keep=args.keep_downloads,
                            ahead=max(args.workers, 1) + AHEAD)
    elif args.simulate:
        from data import simulate

        root = simulate.simulate_dataset(args.downloads / f"simulated-seed{args.seed}",
                                         args.simulate, seed=args.seed,
                                         workers=max(args.workers, 1))
        yield Trees([(root, "simulated")])
    else:
        roots = [(root, bids.dataset_name(root)) for root in dict.fromkeys(args.bids)]
        names = [name for _, name in roots]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"--bids: two trees are called '{twice.pop()}', and the folder's name "
                             "is the dataset's; rename one")
        yield Trees(roots)


def check_names(args: argparse.Namespace, people: list[Person]) -> None:
    """Refuse a name in `--val` or `--test` that fits nobody, before hours of work."""
    stored = store.read_table(args.out / "subjects.tsv")
    store.assign_splits([*people, *((row["dataset"], row["subject"]) for row in stored)],
                        args.split, val=args.val, test=args.test)


# ------------------------------------------------------------------------------------- working


class Progress:
    """A bar on a terminal, a line a session elsewhere."""

    def __init__(self, total: int):
        self._total, self._count, self._start = total, 0, time.monotonic()
        self._bar = tqdm(total=total, unit="session", desc="preprocess", disable=None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def pass_over(self, n: int) -> None:
        """Count sessions that need no work."""
        self._count += n
        self._bar.update(n)

    def say(self, name: str, reason: str) -> None:
        """Count a session that is done, or skipped for a reason."""
        self.pass_over(1)
        if self._bar.disable:
            log.info("%d/%d  %s  %s  (%.0f s)", self._count, self._total, name,
                     f"skipped: {reason}" if reason else "done", time.monotonic() - self._start)


def work(source: Source, ledger: Ledger, args: argparse.Namespace, settings: Settings) -> None:
    """Make the parts of all sessions that the store lacks, each when its files are there."""
    method, total = _method(args), len(source.sessions)
    device = _device(args.device) if method in NETWORKS else "cpu"
    for line in source.promise():
        log.info("%s", line)
    with Workers(min(args.workers, total)) as workers, Progress(total) as progress:
        def load() -> None:  # what is missing is said now, not by each worker
            if method.startswith("hd-bet") and workers.count > 1:
                ensure_weights()
            elif method != "mask":
                _extractor(method, device)

        def begin() -> None:
            workers.wait()  # so that two datasets are never on disk at once
            load()

        def known(sessions: list[Subject], snapshot: str, hashes: dict[Path, str] | None,
                  note: dict[str, Any]) -> bool:
            found = ledger.knows(sessions, snapshot, hashes, note)
            progress.pass_over(len(sessions) if found else 0)
            return found

        def settle(arrival: Arrival, outcomes: dict[str, Outcome]) -> None:
            for name, outcome in outcomes.items():
                progress.say(name, outcome.reason)
                if outcome.reason:
                    ledger.skip(name, outcome.reason)
            arrival.release({name: {"recipe": ledger.attempts[name], "reason": outcome.reason}
                             for name, outcome in outcomes.items()
                             if outcome.reason and outcome.is_lasting})

        for arrival in source.arrivals(known, begin):
            if arrival.reason:
                for session in arrival.sessions:
                    ledger.skip(session.id, arrival.reason)
                    progress.say(session.id, arrival.reason)
                continue
            todo = tuple(s for s in arrival.sessions if ledger.lacks(s, arrival.hashes))
            progress.pass_over(len(arrival.sessions) - len(todo))
            if todo:
                load()
                workers.submit(make_parts, Task(todo, arrival.snapshot, method, settings, device,
                                                args.out),
                               functools.partial(settle, arrival))
            else:
                arrival.release({})
        workers.wait()


def _device(name: str) -> str:
    if name == "cpu":
        return name
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    index = name.partition(":")[2] or "0"
    if not (name.partition(":")[0] == "cuda" and index.isdecimal()
            and int(index) < torch.cuda.device_count()):
        raise ValueError(f"--device {name}: no such device here; take auto or cpu")
    return name


@functools.lru_cache(maxsize=1)
def _extractor(method: str, device: str) -> Callable:
    """The brain extractor of this process, loaded once; one thread always gives the same bits."""
    if method in NETWORKS:
        import torch

        if device == "cpu":
            torch.set_num_threads(1)
        else:
            torch.cuda.set_device(device)  # deepbet takes the present one
    return brain.make_extractor(method, device=device)


def make_parts(task: Task) -> dict[str, Outcome]:
    """Prepare sessions and store their parts; id to why it was skipped, and whether for good."""
    extractor = None if task.method == "mask" else _extractor(task.method, task.device)
    outcomes = {}
    for session in task.sessions:
        try:
            part = prepare(session, task.method, task.settings, extractor)
        except (ValueError, FileNotFoundError) as error:
            reason = " ".join(str(error).split()).replace(f"{session.root}{os.sep}", "")
            is_lasting = not isinstance(error, (brain.NoMemory, NotNow))
            outcomes[session.id] = Outcome(reason, is_lasting)
            continue
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not re.search(NO_MEMORY, str(error)):
                raise
            outcomes[session.id] = Outcome("no memory left to work on this pair; take fewer "
                                           "--workers", is_lasting=False)
            continue
        note = "; ".join(filter(None, (part.row["note"], _doubt(part, task.settings.spacing_mm))))
        part.row["note"] = note
        store.write_part(task.out, part, snapshot=task.snapshot)
        outcomes[session.id] = Outcome()
    return outcomes


def _doubt(part: store.Part, spacing_mm: float) -> str:
    """What of a subject's two scans looks like the other contrast, "" where nothing does."""
    spacing = float(part.row["slice_spacing_mm"]), spacing_mm
    x, y = (contrast.tell(contrast.measure(slices, part.mask, spacing))
            for slices in (part.t1w, part.t2w))
    if (x, y) == ("T2w", "T1w"):
        return "T1w looks like a T2w, and T2w like a T1w: are the two files swapped?"
    if x == "T2w":
        return "T1w looks like a T2w: is it a T1w?"
    return "T2w looks like a T1w: is it a T2w?" if y == "T1w" else ""


# ------------------------------------------------------------------------------------ finishing


def finish(out: Path, record: Record, before: dict[str, Any] | None) -> dict[str, str]:
    """Assign splits, pack the store if anything is new, draw it, print the closing table.

    Returns id to reason of what is left out. Parts of other runs (another tree, other settings)
    stay aside, and so do those of subjects that are there under another name: the next run finds
    them made. A stored session that is refused now keeps its rows, hours of work perhaps, and that
    is said.
    """
    settled_rows = store.read_table(out / "subjects.tsv")
    stored = {row["id"] for row in settled_rows}
    fresh = {name: row for name, row in store.part_rows(out).items()
             if record.recipes.get(name) == row["recipe"]}
    twins = _twins(settled_rows, fresh, record.recipes)
    skipped = {name: f"{why}; its rows of before stay" if name in stored else why
               for name, why in {**record.skipped, **twins}.items()}
    fresh = {name: row for name, row in fresh.items() if name not in twins}
    rows = {row["id"]: row for row in settled_rows} | fresh
    if not rows:
        reason = next(iter(record.skipped.values()), "no subject was found")
        raise ValueError(f"no subject could be kept: {reason}"
                         + (f" (and {len(record.skipped) - 1} more)" if len(record.skipped) > 1
                            else ""))
    settled = {(r["dataset"], r["subject"]): r["split"] for r in settled_rows}
    splits, said = store.assign_splits(
        [(r["dataset"], r["subject"]) for r in rows.values()], record.choice["split"],
        val=record.choice["val"], test=record.choice["test"], settled=settled)
    table = [{**row, "split": splits[row["dataset"], row["subject"]]} for row in rows.values()]
    ours = {*record.recipes, *record.skipped}
    reasons = {name: why for name, why in (store.read_skipped(out) if before else {}).items()
               if name not in ours}
    reasons.update(skipped)
    header = {**record.header,
              "sources": merge_sources((before or {}).get("sources", []), record.header["sources"],
                                       settled_rows, record.recipes)}
    if before and not fresh:
        header["versions"] = before.get("versions", {})
    if fresh or _differs(out, before, header, table, reasons):
        store.pack(out, header, table, reasons, fresh.keys())
    draw(out, again=False)
    _print_table(out, skipped, said)
    return skipped


def _twins(settled: list[dict[str, str]], fresh: dict[str, dict[str, str]],
           ours: Collection[str]) -> dict[str, str]:
    """Sessions of this run whose subject is there under another name: id to reason.

    Splits go by name, so that one person would be in two of them. Who is stored already stays.
    """
    people = {_person(row) for row in settled}
    rows = {row["id"]: row for row in settled} | fresh
    reasons: dict[Person, tuple[str, str]] = {}
    for row, first, kind in store.find_twins(sorted(
            rows.values(), key=lambda row: (_person(row) not in people, *_person(row), row["id"]))):
        why = (f"same scan as {first['id']} ({kind}); one person under two names would be in two "
               "splits")
        reasons.setdefault(_person(row), (row["id"], why))
    found = {}
    for name, row in rows.items():
        whose, why = reasons.get(_person(row), ("", ""))
        if why and name in ours:
            found[name] = why if whose == name else f"its session {whose} has the {why}"
    return found


def _person(row: dict[str, str]) -> Person:
    return row["dataset"], row["subject"]


def _differs(out: Path, before: dict[str, Any] | None, header: dict[str, Any],
             table: list[dict], reasons: dict[str, str]) -> bool:
    """Whether packing would change a table although no rows are new."""
    if before is None:
        return True
    splits = {r["id"]: r["split"] for r in store.read_table(out / "subjects.tsv")}
    skips = store.read_skipped(out)
    return (any(before.get(key) != header[key] for key in header)
            or splits != {r["id"]: r["split"] for r in table} or skips != reasons)


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
        log.info("cite %s: %s", source["dataset"], citation(source))
    if skipped:
        log.info("skipped %d (skipped.tsv):", len(skipped))
        for name in sorted(skipped):
            log.info("  %s: %s", name, skipped[name])


def citation(source: dict[str, Any]) -> str:
    """How to cite a dataset, as far as it says."""
    authors = source.get("authors") or []
    names = ", ".join(authors[:3]) + (" et al." if len(authors) > 3 else "")
    said = (names, source["name"] or source["dataset"],
            source["snapshot"] and f"version {source['snapshot']}",
            source["doi"] and f"https://doi.org/{source['doi']}",
            source["license"] and f"licence {source['license']}")
    return ". ".join(part.rstrip(".") for part in said if part) + "."


def check(out: Path) -> int:
    """`--check`: print counts, then every fault with its rows."""
    problems = store.check(out)
    _print_table(out, {}, [])
    _print_slices(store.SliceStore(out))
    for problem in problems:
        print(f"error: {out}: {problem}", file=sys.stderr)
    if problems:
        return console.WRONG_INPUT
    log.info("sound: every row was read and agrees with its hash")
    return console.DONE


def _print_slices(opened: store.SliceStore) -> None:
    """Slices a session, by dataset."""
    log.info("\n%-20s %9s %9s %7s %5s %5s", "slices a session", "sessions", "mean", "SD", "min",
             "max")
    for dataset in sorted({s["dataset"] for s in opened.subjects}):
        n = np.array([s["n_slices"] for s in opened.subjects if s["dataset"] == dataset])
        log.info("%-20s %9d %9.1f %7.1f %5d %5d", dataset, len(n), n.mean(),
                 n.std(ddof=1) if len(n) > 1 else 0.0, n.min(), n.max())


def draw(out: Path, *, again: bool = True) -> int:
    """Write the store's `report.html`: masks, alignment and figures of its subjects.

    Not `again`: only if the page shows another state of the store.
    """
    state = hashlib.sha256(b"".join((out / name).read_bytes() for name in store.TABLES[1:]))
    mark = f"<!-- {state.hexdigest()} -->\n"
    page = out / "report.html"
    if not again and page.is_file():
        with open(page, encoding="utf-8", errors="replace") as html:
            if html.readline() == mark:
                return console.DONE
    opened = store.SliceStore(out)
    shown = [look_at(row, functools.partial(opened.of_subject, subject)) for row, subject in zip(
        store.read_table(out / "subjects.tsv"), opened.subjects)]
    skipped = store.read_skipped(out)
    datasets = ", ".join(sorted({s["dataset"] for s in opened.subjects}))
    text = preprocessing_page(shown, skipped, f"Slices of {datasets}")
    store.write_atomically(page, (mark + text).encode())
    log.info("report: %s", page)
    return console.DONE


@contextlib.contextmanager
def _writer(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the store's folder: two writers would pack each other's halves, shards may meet there.

    A folder that was made for this and stays empty is removed.
    """
    fresh = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(folder, shared, f"{folder}: another preprocess.py is writing there"):
            yield
    finally:
        if fresh and not any(folder.iterdir()):
            folder.rmdir()


@contextlib.contextmanager
def _lock(path: Path, shared: bool, said: str) -> Iterator[None]:
    """Lock a folder, or a file that is made if it is missing; `said` if another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows: the user has to see to it
        yield
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{said}; or wait for it") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


if __name__ == "__main__":
    sys.exit(console.run(main))
