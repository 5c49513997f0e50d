"""What training waits for its slices: the slice store beside one .pt file a slice.

    python benchmarks/loader.py                                  targets: 50 times, 2 %, 1 %
    python benchmarks/loader.py --device cuda --parts waiting    with copies to a real GPU

Files: T1w and T2w slices of 256 x 256, one `torch.save` each, read by a DataLoader a pair an item
and resized to 128 x 128 there. "file a slice" holds a copy of the slice; "file a view" is saved
without one, so each file holds the whole volume. The store gives the same slices at 128 x 128.
Both in one process, in turns, from memory (page cache); medians. Waiting: a loop that takes a
batch, then sleeps as long as a GPU of so many pairs a second computes (or keeps a CPU's cores busy,
or, with `--device cuda`, a real GPU), and the share of its time that it spends in asking. Cold: a
store that is not in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # where `data` is the package, whatever lies beside this script

import console
from config import TrainConfig
from data.histogram import STANDARDISED, StandardRows, find_standard
from data.slices import UnpairedBatches
from data.store import Part, SliceStore, digest_rows, pack, write_part
from device import choose_device

SIZE, SCAN, DEPTH = 128, 256, 150  # pixels of the store and of the files; slices of a volume
MOST_SHARE, LEAST_TIMES, MOST_WAITING = 0.02, 50.0, 0.01
# batch size: pairs a second that a GPU is taken to compute
RATES = {1: 100, 4: 400, 16: 1000, 64: 1500, 128: 1500}
CPU_RATE = 20  # pairs a second, of small nets


class Files(Dataset):
    """One .pt file a slice and contrast; an item is a pair, resized."""

    def __init__(self, folder: Path) -> None:
        self._t1w, self._t2w = (sorted(folder.glob(f"*_{name}.pt")) for name in ("t1w", "t2w"))

    def __len__(self) -> int:
        return len(self._t1w)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        x, y = (nnf.interpolate(torch.load(paths[item])[None, None], size=(SIZE, SIZE),
                                mode="bilinear")[0] for paths in (self._t1w, self._t2w))
        return x, y


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line of this script."""
    p = console.OneLineParser(description=__doc__, formatter_class=console.Formatter)
    p.add_argument("--parts", nargs="+", choices=("files", "waiting", "cold"),
                   default=("files", "waiting", "cold"), help="what to measure")
    p.add_argument("--device", default="cpu", help="auto, cpu or cuda: where batches go")
    p.add_argument("--pairs", type=int, default=4000, help="slice pairs of the store")
    p.add_argument("--files", type=int, default=256, help="slice pairs as files")
    p.add_argument("--views", type=int, default=6, help="slice pairs as files that hold a volume")
    p.add_argument("--seconds", type=float, default=2.0, help="of each measurement of waiting")
    p.add_argument("--repeats", type=int, default=3, help="turns, for the median")
    p.add_argument("--workers", type=int, default=1, help="threads that read the store")
    args = p.parse_args(argv)
    if min(args.repeats, args.files, args.views, args.workers) < 1 or args.pairs < max(RATES):
        raise ValueError(f"--repeats {args.repeats} --files {args.files} --views {args.views} "
                         f"--workers {args.workers} --pairs {args.pairs}: at least 1 each, and "
                         f"{max(RATES)} pairs")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the parts asked for; returns 1 where a target is missed."""
    args = parse_args(argv)
    device = choose_device(args.device)
    found: dict[str, Any] = {"device": str(device)}
    missed: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        store = write_store(Path(name) / "slices", args.pairs)
        if "files" in args.parts:
            found["files"] = compare(args, Path(name), store)
            for kind, line in found["files"].items():
                if line["times"] < LEAST_TIMES:
                    missed.append(f"{line['times']:.1f} times the pairs/s of {kind}, "
                                  f"{LEAST_TIMES:.0f} wanted")
                if line["share"] > MOST_SHARE:
                    missed.append(f"{100 * line['share']:.2f} % of the bytes of {kind}, at most "
                                  f"{100 * MOST_SHARE:.0f} wanted")
        if "waiting" in args.parts:
            found["waiting"] = wait(args, store, device)
            missed += [f"{line['computed by']} waits {100 * line['waiting']:.2f} % at batch "
                       f"{line['batch']}, at most {100 * MOST_WAITING:.0f} wanted"
                       for line in found["waiting"] if line["waiting"] > MOST_WAITING]
        if "cold" in args.parts:
            del store  # pages that are mapped stay in memory
            found["cold"] = read_cold(args, Path(name) / "slices")
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    print(json.dumps(found))
    return console.FAILED if missed else console.DONE


# ------------------------------------------------------------------------------------------ inputs


def write_store(folder: Path, pairs: int) -> SliceStore:
    """A store of noise within discs: no pixel of it is easier to read than one of a head."""
    draws, n = np.random.default_rng(0), 200
    y, x = (np.indices((SIZE, SIZE)) - SIZE / 2) / (SIZE / 2)
    mask = np.repeat((np.hypot(x / 0.7, y / 0.85) < 1)[None], n, axis=0)
    rows = []
    for number in range(-(-pairs // n)):
        mask = mask[:pairs - number * n]
        t1w, t2w = (np.where(mask, draws.uniform(-1, 1, mask.shape).astype(np.float16),
                             np.float16(-1)) for _ in range(2))
        row = {"id": f"discs_sub-{number:04d}", "dataset": "discs", "subject": f"{number:04d}",
               "session": "", "n_slices": str(len(mask)), "t1w": "", "t2w": "",
               "rows_sha256": digest_rows(t1w, t2w, np.packbits(mask, axis=-1))}
        write_part(folder, Part(t1w, t2w, mask, row))
        rows.append({**row, "split": "train"})
    header = {"size": SIZE, "spacing_mm": 1.5, "min_brain_area": 0.25, "seed": 0, "sources": [],
              "intensity": {}, "split": [0.8, 0.1, 0.1], "versions": {}}
    pack(folder, header, rows, {}, {row["id"] for row in rows})
    return SliceStore(folder)


def write_files(folder: Path, pairs: int, *, view: bool) -> Files:
    """Slices of float32 volumes as files: copied, or as the view of their volume that they are."""
    folder.mkdir()
    draws = torch.Generator().manual_seed(0)
    volume = torch.rand(SCAN, SCAN, DEPTH, generator=draws) * 2 - 1
    for number in range(pairs):
        for name in ("t1w", "t2w"):
            piece = volume[:, :, number % DEPTH]
            torch.save(piece if view else piece.clone(), folder / f"{number:05d}_{name}.pt")
    return Files(folder)


def bytes_of(folder: Path) -> int:
    """Of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --------------------------------------------------------------------------------------- the parts


def compare(args: argparse.Namespace, folder: Path, store: SliceStore) -> dict[str, dict]:
    """Print pairs a second and bytes a pair of store and files; returns them."""
    batch = 16
    datasets = {"file a slice": write_files(folder / "slice", args.files, view=False),
                "file a view": write_files(folder / "view", args.views, view=True)}
    ways: dict[str, Callable[[], float]] = {
        "store, float16": lambda: rate(read_store(store, batch, args.workers, half=True), batch),
        "store, float32": lambda: rate(read_store(store, batch, args.workers, half=False), batch)}
    for kind, dataset in datasets.items():
        for workers in (0, 2):
            loader = DataLoader(dataset, batch_size=min(batch, len(dataset)), shuffle=True,
                                num_workers=workers, drop_last=True, persistent_workers=workers > 0)
            ways[f"{kind}, {workers} workers"] = partial(rate, loader, min(batch, len(dataset)))
    for way in ways.values():
        way()  # into the page cache; worker processes started
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            rates[name].append(way())
    sizes = {"store": bytes_of(store.folder) / len(store),
             "file a slice": bytes_of(folder / "slice") / args.files,
             "file a view": bytes_of(folder / "view") / args.views}
    print(f"batch {batch}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, medians of "
          f"{args.repeats} turns\n{'':<26} {'pairs/s':>9} {'KiB a pair':>11}")
    for name in ways:
        print(f"{name:<26} {median(rates[name]):>9.0f} "
              f"{sizes[name.split(',')[0]] / 1024:>11.1f}", flush=True)
    found = {}
    for kind in datasets:
        # of each turn, against the faster way to read the files
        best = [max(pair) for pair in zip(*(rates[f"{kind}, {w} workers"] for w in (0, 2)))]
        found[kind] = {
            "times": median(a / b for a, b in zip(rates["store, float16"], best)),
            "times_float32": median(a / b for a, b in zip(rates["store, float32"], best)),
            "share": sizes["store"] / sizes[kind], "pairs_per_s": median(best)}
        print(f"store / {kind}: {found[kind]['times']:.1f} times the pairs/s (float32: "
              f"{found[kind]['times_float32']:.1f}), {100 * found[kind]['share']:.2f} % of the "
              "bytes", flush=True)
    return found


def read_store(store: SliceStore, batch: int, workers: int, *, half: bool,
               pin: bool = False) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Batches of the store without end, as they lie there."""
    loader = UnpairedBatches(store, batch_size=batch, steps_per_epoch=10 ** 9)
    return loader.batches(0, 0, workers, half=half, pin=pin)


def read_as_trained(store: SliceStore, batch: int, workers: int, *, half: bool,
                    pin: bool = False) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Batches of the store without end, as training reads them by default."""
    standard = StandardRows(store, find_standard(store, STANDARDISED[TrainConfig.standardise]))
    others = set(STANDARDISED[TrainConfig.standardise_targets]) - set(standard.standard.wanted)
    targets = StandardRows(store, find_standard(store, sorted(others)))
    loader = UnpairedBatches(store, batch_size=batch, steps_per_epoch=10 ** 9, targets=targets,
                             balanced=TrainConfig.balance, standard=standard)
    return loader.batches(0, 0, workers, half=half, pin=pin)


def rate(batches: Iterable, batch: int, seconds: float = 1.0) -> float:
    """Pairs a second, over a second or a whole pass, whichever is shorter."""
    begun, n = time.perf_counter(), 0
    for _ in batches:
        n += batch
        if time.perf_counter() - begun > seconds and isinstance(batches, Iterator):
            break
    return n / (time.perf_counter() - begun)


def wait(args: argparse.Namespace, store: SliceStore, device: torch.device) -> list[dict]:
    """Print the share of the time that a training loop waits for its batches; returns the lines."""
    print(f"\nwaiting for batches, {args.workers} reading threads, load {os.getloadavg()[0]:.1f}, "
          f"medians of {args.repeats} turns")
    print(f"{'computed by':<22} {'batch':>5} {'pairs/s':>8} {'waiting':>9} "
          f"{'ms a step':>10}", flush=True)
    cases = [("a GPU, played by sleep", wait_asleep, batch, rate) for batch, rate in RATES.items()]
    if device.type == "cuda":
        cases += [("the GPU", wait_on_gpu, batch, rate) for batch, rate in RATES.items()]
    else:
        cases += [("the CPU, float32", wait_beside_cpu, batch, CPU_RATE) for batch in (1, 4, 16)]
    found = []
    for what, measure, batch, pairs_per_s in cases:
        turns = [measure(args, store, device, batch, pairs_per_s) for _ in range(args.repeats)]
        share = median(turns)
        found.append({"computed by": what, "batch": batch, "pairs_per_s": pairs_per_s,
                      "waiting": share})
        print(f"{what:<22} {batch:>5} {pairs_per_s:>8} {100 * share:>7.2f} % "
              f"{1000 * share * batch / pairs_per_s / max(1 - share, 1e-9):>10.3f}", flush=True)
    return found


def wait_asleep(args: argparse.Namespace, store: SliceStore, device: torch.device, batch: int,
                pairs_per_s: float) -> float:
    """Share of the time in `next`, beside a GPU that is played by sleep (without Python's lock)."""
    batches = read_as_trained(store, batch, args.workers, half=True)
    return _share_in_next(batches, args.seconds, lambda: time.sleep(batch / pairs_per_s))


def wait_beside_cpu(args: argparse.Namespace, store: SliceStore, device: torch.device, batch: int,
                    pairs_per_s: float) -> float:
    """Share of the time in `next`, float32, beside matrix products on all cores."""
    torch.set_num_threads(os.cpu_count() or 1)
    batches = read_as_trained(store, batch, args.workers, half=False)
    square = torch.randn(512, 512)

    def compute() -> None:
        until = time.perf_counter() + batch / pairs_per_s
        while time.perf_counter() < until:
            square @ square

    share = _share_in_next(batches, args.seconds, compute)
    torch.set_num_threads(1)
    return share


def _share_in_next(batches: Generator, seconds: float, compute: Callable[[], None]) -> float:
    for _ in range(4):
        next(batches)
        compute()
    waited, begun = 0.0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        compute()
    share = waited / (time.perf_counter() - begun)
    batches.close()
    return share


def wait_on_gpu(args: argparse.Namespace, store: SliceStore, device: torch.device, batch: int,
                pairs_per_s: float) -> float:
    """Share by which a loop takes longer with fresh batches than with one that is there already.

    The GPU multiplies matrices for as long as a step; reading, pinned copies and widening to
    float32 are what is added.
    """
    square = torch.randn(2048, 2048, device=device)
    products = 20
    for _ in range(3):
        seconds = _time_gpu(square, products, 1, None)
        products = max(1, round(products * batch / pairs_per_s / seconds))
    steps = max(8, round(args.seconds * pairs_per_s / batch / 2))
    batches = read_as_trained(store, batch, args.workers, half=True, pin=True)
    _time_gpu(square, products, 8, batches)
    beside, alone = (_time_gpu(square, products, steps, each) for each in (batches, None))
    batches.close()
    return max(0.0, 1 - alone / beside)


def _time_gpu(square: Tensor, products: int, steps: int, batches: Generator | None) -> float:
    """Seconds of some steps; the last product of a step needs its batch."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    ready = torch.zeros(1, 1, SIZE, SIZE, device=square.device)
    for _ in range(steps):
        x, y = ((v.to(square.device, non_blocking=True).float() for v in next(batches)) if batches
                else (ready, ready))
        for _ in range(products):
            square @ square
        square[0, 0] += 0 * (x.sum() + y.sum())
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def read_cold(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Print pairs a second from the disk, and what touching the memory map gives; returns them."""
    if not hasattr(os, "posix_fadvise"):
        return {}

    rates: dict[str, list[float]] = {"told first": [], "touched": []}
    for _ in range(args.repeats):
        for name, seen in rates.items():
            seen.append(rate_cold(folder, args, told=name == "told first"))
    found = {name: median(seen) for name, seen in rates.items()}
    found["times"] = median(a / b for a, b in zip(rates["told first"], rates["touched"]))
    print(f"\nfrom the disk, nothing in memory: {found['told first']:.0f} pairs/s, "
          f"{found['touched']:.0f} where the memory map is touched row by row: "
          f"{found['times']:.1f} times", flush=True)
    return found


def rate_cold(folder: Path, args: argparse.Namespace, *, told: bool) -> float:
    """Pairs a second from a store whose pages were dropped.

    Of a small part of it: the system reads neighbours of what is touched, which are of no use in a
    store that is much larger than the memory.
    """
    for name in ("t1w.npy", "t2w.npy"):
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    store, batch = SliceStore(folder), 16
    batches = read_store(store, batch, args.workers, half=True) if told else touch(store, batch)
    n, begun = 0, time.perf_counter()
    while n < len(store) // 16 and time.perf_counter() - begun < args.seconds:
        next(batches)
        n += batch
    seconds = time.perf_counter() - begun
    batches.close()
    return n / seconds


def touch(store: SliceStore, batch: int) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """The same batches by indexing the memory map."""
    loader = UnpairedBatches(store, batch_size=batch, steps_per_epoch=10 ** 9)
    for step in range(10 ** 9):
        x, y = loader.rows(0, step)
        yield store.t1w[x], store.t2w[y]


if __name__ == "__main__":
    sys.exit(console.run(main))
