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
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import console
from data import bids, brain, shards, store
from data.bias import CORRECTIONS
from data.bids import Subject
from data.ledger import Ledger, of_rows, of_trees, refuse_namesakes
from data.openneuro import API_VARIABLE, Archive
from data.shards import Record, Shard
from data.sources import Person, Snapshots, Trees
from data.splits import assign_splits
from data.subject import Settings
from finishing import check, draw, finish, print_table, versions
from preprocessing_jobs import How, Source, find_device, work

log = logging.getLogger("preprocess")
AHEAD = 3  # subjects on disk or on their way beyond those that the workers have
WORKER_GIB, WORKERS_A_GPU = 3, 4


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
        on_gpu = works and find_device(args.device, _method(args)) != "cpu"
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
    if not 0 < args.brain_ml[0] < args.brain_ml[1] < math.inf:
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
        how = How(_method(args), settings, find_device(args.device, _method(args)), args.out)
        work(source, ledger, how, args.workers)
        header |= {"sources": source.describe(), "versions": versions()}
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
            print_table(out, {}, [])
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
    assign_splits([*people, *((row["dataset"], row["subject"]) for row in stored)],
                  args.split, val=args.val, test=args.test)


# ------------------------------------------------------------------------------------- working


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
