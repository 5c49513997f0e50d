"""How training grows: two processes beside one, a store of 10 million rows, 1024 GPUs on paper.

    python benchmarks/scaling.py                                        targets: 0.9, 1 s, 200 MiB
    python benchmarks/scaling.py --parts paper --step-ms 68 --batch-size 16

Processes: `train.py` itself under torchrun on a painted store, two processes of one thread each
beside one process of two threads, with equally many pairs a step; in turns, medians. With `--device
cuda`, as many processes as there are GPUs beside one, with equally many pairs a process.
Opening: a fresh process opens a store of sparse arrays, with 200 slices a subject, asks for the
training rows and takes the first batch. Paper: the tables of SCALING.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # where `data` is the package, whatever lies beside this script
sys.path.append(str(ROOT / "tests"))

import numpy as np
import torch
from painted_store import write_store

import console
from data.slices import UnpairedBatches
from data.splits import SPLITS
from data.store import COLUMNS, FORMAT, VERSION, SliceStore, table
from device import choose_device
from models.cyclegan import CycleGAN

LEAST_RATIO, MOST_S, MOST_MIB = 0.9, 1.0, 200.0
SIZE, EACH = 128, 200  # pixels; slices of a subject of the large store
# name: bytes a second in one direction, seconds from one GPU to the next, most GPUs that it joins
LINKS = {"NVLink, 450 GB/s": (450e9, 3e-6, 8), "PCIe 5, 50 GB/s": (50e9, 5e-6, 8),
         "200 Gb/s network": (25e9, 8e-6, 1024), "10 Gb/s network": (1.25e9, 30e-6, 1024)}
GPUS = tuple(2 ** i for i in range(11))
# of a subject, from RESULTS.md: bytes of a slice pair; seconds on a core without and with deepbet
PAIR_BYTES, SUBJECT_S = 67.85 * 1024, {"none": 7.55, "deepbet": 10.59}
OPEN_S, OPEN_BYTES = 0.15 / 50_000, 27 * 2 ** 20 / 50_000  # of this script
FEWEST = 71  # slices of a simulated subject; a scan of 1 mm has up to 200


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line of this script."""
    p = console.OneLineParser(description=__doc__, formatter_class=console.Formatter)
    p.add_argument("--parts", nargs="+", choices=("processes", "opening", "paper"),
                   default=("processes", "opening", "paper"), help="what to measure")
    p.add_argument("--device", default="cpu", help="auto, cpu or cuda, of the processes")
    p.add_argument("--features", type=int, default=16, help="of the nets of the processes")
    p.add_argument("--blocks", type=int, default=6, help="of the nets of the processes")
    p.add_argument("--pairs", type=int, default=4, help="a step; with cuda, a step and process")
    p.add_argument("--steps", type=int, default=16, help="a turn, the first quarter not counted")
    p.add_argument("--repeats", type=int, default=3, help="turns, for the median")
    p.add_argument("--subjects", type=int, default=50_000, help="of the store that is opened")
    p.add_argument("--step-ms", type=float, default=24.0,
                   help="of one GPU, for the paper (666 pairs/s, one H100, bf16, RESULTS.md)")
    p.add_argument("--batch-size", type=int, default=16, help="of that step, pairs")
    p.add_argument("--overlap", type=float, default=0.25,
                   help="share of a step in which gradients travel while others are computed")
    p.add_argument("--open", type=Path, metavar="DIR",
                   help="only open this store and print what it took")
    args = p.parse_args(argv)
    if min(args.repeats, args.steps // 4, args.subjects, args.pairs // 2, args.batch_size) < 1:
        raise ValueError(f"--repeats {args.repeats} --subjects {args.subjects} --batch-size "
                         f"{args.batch_size} --steps {args.steps} --pairs {args.pairs}: at least "
                         "1, 1, 1, 4 and 2")
    if args.step_ms <= 0 or not 0 <= args.overlap < 1:
        raise ValueError(f"--step-ms {args.step_ms} --overlap {args.overlap}: above 0; from 0 to "
                         "below 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the parts asked for; returns 1 where a target is missed."""
    args = parse_args(argv)
    if args.open:
        print(json.dumps(open_store(args.open)))
        return console.DONE
    found: dict[str, Any] = {}
    missed: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        if "processes" in args.parts:
            found["processes"] = compare(args, Path(name))
            if found["processes"]["ratio"] < LEAST_RATIO:
                missed.append(f"{found['processes']['ratio']:.2f} of the pairs/s, {LEAST_RATIO} "
                              "wanted")
        if "opening" in args.parts:
            found["opening"] = took = measure_opening(args, Path(name))
            if took["seconds"] > MOST_S or took["mib"] > MOST_MIB:
                missed.append(f"opens in {took['seconds']:.2f} s and {took['mib']:.0f} MiB, at "
                              f"most {MOST_S} and {MOST_MIB:.0f} wanted")
    if "paper" in args.parts:
        found["paper"] = compute(args)
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    print(json.dumps(found))
    return console.FAILED if missed else console.DONE


# ---------------------------------------------------------------------------------- two processes


def compare(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Print pairs a second of one process and of several; returns them and their ratio."""
    on_gpu = choose_device(args.device).type == "cuda"
    count = torch.cuda.device_count() if on_gpu else 2
    if count < 2:
        raise ValueError(f"--device {args.device}: one GPU here, two are needed to compare")
    write_store(folder / "slices", {"train": ["01", "02", "03"], "val": ["04"]}, SIZE, {
        "01": 4 * args.pairs * count, "02": 4, "03": 4, "04": 2})
    ways = {f"{count} processes": (count, args.pairs if on_gpu else args.pairs // count),
            "1 process": (1, args.pairs)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.repeats):
        for name, (processes, batch) in ways.items():
            rates[name].append(train(args, folder, folder / f"{name}-{turn}", processes, batch))
    several, one = rates.values()
    ideal = count if on_gpu else 1
    ratio = median(a / b / ideal for a, b in zip(several, one))
    print(f"train.py, {args.features} features, {args.blocks} blocks, {os.cpu_count()} cores, load "
          f"{os.getloadavg()[0]:.1f}, medians of {args.repeats} turns\n{'':<14} {'batch':>6} "
          f"{'pairs/s':>8}")
    for name, (_, batch) in ways.items():
        print(f"{name:<14} {batch:>6} {median(rates[name]):>8.2f}")
    print(f"ratio {ratio:.2f} ({', '.join(f'{a / b / ideal:.2f}' for a, b in zip(several, one))})",
          flush=True)
    return {"several": median(several), "one": median(one), "ratio": ratio}


def train(args: argparse.Namespace, folder: Path, run: Path, processes: int, batch: int) -> float:
    """Train for some steps; returns the median of the pairs a second that the log has."""
    start = [sys.executable]
    if processes > 1:
        start += ["torchrun.py", "--standalone", f"--nproc-per-node={processes}"]
    every = args.steps // 4
    # passive: threads that spin for each other on busy cores make one process 9 times as slow
    threads = {} if args.device != "cpu" else {
        "OMP_NUM_THREADS": "1" if processes > 1 else "2", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [*start, "train.py", "--slices", folder / "slices", "--run", run, "--device", args.device,
         "--features", str(args.features), "--blocks", str(args.blocks), "--batch-size",
         str(batch), "--max-steps", str(4 * every), "--steps-per-epoch", "1000000", "--log-every",
         str(every)], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **threads},
        check=False)
    if done.returncode:
        raise OSError(f"train.py: exit code {done.returncode}: "
                      f"{(done.stderr or done.stdout)[-800:]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return median([line["pairs_per_s"] for line in lines if line["kind"] == "speed"][1:])


# ----------------------------------------------------------------------------------- a large store


def measure_opening(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Print what opening a large store takes in a fresh process; medians, and returns them."""
    write_sparse(folder / "large", args.subjects)
    turns = [json.loads(subprocess.run(
        [sys.executable, __file__, "--open", folder / "large"], cwd=ROOT, capture_output=True,
        text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout)
        for _ in range(args.repeats)]
    found = {name: median(turn[name] for turn in turns) for name in turns[0]}
    print(f"\n{args.subjects} subjects, {args.subjects * EACH} rows, load {os.getloadavg()[0]:.1f}"
          f", medians of {args.repeats} fresh processes\n{'':<24} {'s':>6}")
    for name, what in (("open_s", "SliceStore(...)"), ("rows_s", "rows('train')"),
                       ("batch_s", "first batch of 16"), ("seconds", "all"),
                       ("cpu_s", "all, CPU")):
        print(f"{what:<24} {found[name]:>6.2f}")
    print(f"most memory beyond what Python and torch take: {found['mib']:.0f} MiB", flush=True)
    return found


def open_store(folder: Path) -> dict[str, float]:
    """Open a store, ask for the rows, take a batch; seconds, and MiB at the most beyond now's."""
    before = _status("VmRSS")
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # importing may have taken more than stays
    times, cpu = [time.perf_counter()], time.process_time()
    store = SliceStore(folder)
    times.append(time.perf_counter())
    n = len(store.rows("train"))
    times.append(time.perf_counter())
    next(UnpairedBatches(store, batch_size=16).batches(0))
    times.append(time.perf_counter())
    steps = dict(zip(("open_s", "rows_s", "batch_s"), np.diff(times).tolist()))
    return {**steps, "seconds": times[-1] - times[0], "cpu_s": time.process_time() - cpu,
            "mib": _status("VmHWM") - before, "rows": n}


def _status(name: str) -> float:
    """MiB of this process; 0 where the system does not say."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), 0.0)


def write_sparse(folder: Path, subjects: int) -> None:
    """A store whose arrays are holes, and whose table is as long and as varied as a real one."""
    draws = np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for number in range(subjects):
        label, dataset = f"{number:07d}", f"ds{number // 500:06d}"
        digest = hashlib.sha256(label.encode()).hexdigest()
        figures = iter(draws.normal(0, 3, 12))
        known: dict[str, Any] = {
            "id": f"{dataset}_sub-{label}", "dataset": dataset, "subject": label, "session": "",
            "split": SPLITS[max(0, number % 10 - 7)], "first_row": number * EACH,
            "n_slices": EACH, "t1w": f"sub-{label}/anat/sub-{label}_T1w.nii.gz",
            "t2w": f"sub-{label}/anat/sub-{label}_T2w.nii.gz", "t1w_sha256": digest,
            "t2w_sha256": digest[::-1], "rows_sha256": digest, "brain_extraction": "deepbet 1.0.2",
            "registration": "rigid", "cut_share": "0", "recipe": digest[:16], "note": ""}
        rows.append({c: known[c] if c in known else f"{next(figures):.4f}" for c in COLUMNS})
    n = subjects * EACH
    shapes = {"t1w": (n, SIZE, SIZE), "t2w": (n, SIZE, SIZE), "mask": (n, SIZE, SIZE // 8)}
    for name, shape in shapes.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", shape=shape,
                                  dtype=np.uint8 if name == "mask" else np.float16)
    (folder / "subjects.tsv").write_bytes(table(COLUMNS, rows))
    counts = {what: {split: each * sum(row["split"] == split for row in rows)
                     for split in SPLITS}
              for what, each in (("subjects", 1), ("sessions", 1), ("slices", EACH))}
    for count in counts.values():
        count["all"] = sum(count.values())
    (folder / "store.json").write_text(json.dumps({
        "format": FORMAT, "version": VERSION, "size": SIZE, "sources": [], "counts": counts}))


# ---------------------------------------------------------------------------------------- on paper


def compute(args: argparse.Namespace) -> dict[str, Any]:
    """Print the tables of SCALING.md: bytes a step, time of a step, size of the data."""
    sizes = {blocks: 4 * sum(p.numel() for p in CycleGAN(64, blocks).parameters())
             for blocks in (6, 9)}
    print("\n| blocks | parameters of the four nets | gradients, all-reduced a step (MB) |\n"
          "|---|---|---|")
    for blocks, size in sizes.items():
        print(f"| {blocks} | {size // 4:,} | {size / 1e6:.1f} |")
    step_s = args.step_ms / 1000
    print(f"\n{args.step_ms:g} ms a step of {args.batch_size} pairs on one GPU, 6 blocks; ms "
          "(share of the ideal speed with gradients under way for "
          f"{args.overlap:g} of the step; with none)")
    print(f"\n| GPUs | {' | '.join(LINKS)} | pairs/s, 200 Gb/s |\n|---{'|---' * 5}|")
    lines: dict[int, dict[str, float]] = {}
    for n in GPUS:
        lines[n] = {name: step_of(n, step_s, sizes[6], *link[:2], args.overlap)
                    for name, link in LINKS.items() if n <= link[2]}
        cells = [f"{1000 * lines[n][name]:.1f} ({step_s / lines[n][name]:.2f}; "
                 f"{step_s / step_of(n, step_s, sizes[6], *link[:2], 0):.2f})"
                 if name in lines[n] else "-" for name, link in LINKS.items()]
        rate = n * args.batch_size / lines[n]["200 Gb/s network"]
        print(f"| {n} | {' | '.join(cells)} | {rate:,.0f} |")
    print("\n| subjects | slice pairs | store | preparing on 16 cores | with deepbet | opening |\n"
          "|---|---|---|---|---|---|")
    for subjects in (300, 10_000, 1_000_000):
        hours = [subjects * seconds / 16 / 3600 for seconds in SUBJECT_S.values()]
        print(f"| {subjects:,} | {subjects * FEWEST:,} to {subjects * EACH:,} | "
              f"{_bytes(subjects * FEWEST * PAIR_BYTES)} to "
              f"{_bytes(subjects * EACH * PAIR_BYTES)} | "
              f"{' | '.join(f'{h:.1f} h' if h < 48 else f'{h / 24:.0f} days' for h in hours)} | "
              f"{subjects * OPEN_S:.2g} s, {_bytes(subjects * OPEN_BYTES)} |")
    return {"bytes": sizes, "step_s": lines}


def step_of(n: int, step_s: float, size: float, bytes_per_s: float, hop_s: float,
            overlap: float) -> float:
    """Seconds of a step of n GPUs: a ring all-reduce, part of which computing hides.

    Each GPU sends and receives 2 (n - 1) / n of the gradients in 2 (n - 1) hops.
    """
    ring_s = 2 * (n - 1) / n * size / bytes_per_s + 2 * (n - 1) * hop_s
    return step_s + max(0.0, ring_s - overlap * step_s)


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e6:.0f} MB"


if __name__ == "__main__":
    sys.exit(console.run(main))
