"""What preparing a subject costs: seconds, memory at its peak, bytes a slice pair.

    python benchmarks/preprocess.py                                      simulated subjects
    python benchmarks/preprocess.py --bids DIR --brain-extraction none   real ones

Everything is done with the defaults of `preprocess.py`. Seconds and bytes are those of the subjects
asked for; memory is that of a fresh process which prepares one painted pair of 512 x 512 x 300
voxels (0.45 x 0.45 x 0.6 mm), torch and the network included. Exits with 1 where a target is
missed: 2 GiB, 72 KiB.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import nibabel as nib
import numpy as np
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # where `preprocess` is the command, and not this script
sys.path.append(str(ROOT / "tests"))

import console
from conftest import lay_affine, paint, rigid
from data import bids, brain, store
from data.subject import Settings, prepare

importlib.import_module("preprocess")  # so that memory is measured as a worker has it
MOST_MIB = 2048
MOST_KIB = 72
LARGE, LARGE_MM = (512, 512, 300), (0.45, 0.45, 0.6)
FINER = 4  # heads are painted on so much coarser a grid, to be done in seconds
# method, the tree of `write_large`, what is said of it
WORKERS = (("none", "same", "one grid"), ("none", "moved", "registered"),
           ("mask", "head", "registered"), ("deepbet", "head", "registered"))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line of this script."""
    p = console.OneLineParser(description=__doc__, formatter_class=console.Formatter)
    p.add_argument("--parts", nargs="+", choices=("store", "seconds", "memory"),
                   default=("store", "seconds", "memory"), help="what to measure")
    p.add_argument("--bids", nargs="+", type=Path, metavar="DIR",
                   help="BIDS trees to measure seconds and bytes on (default: simulated subjects)")
    p.add_argument("--brain-extraction", nargs="+", choices=brain.METHODS,
                   default=("none", "deepbet"), help="for the seconds; the first for the bytes")
    p.add_argument("--simulate", type=int, default=3, metavar="N", help="simulated subjects")
    p.add_argument("--worker", nargs=2, metavar=("METHOD", "DIR"),
                   help="only prepare the subject of a tree and print the MiB that it took")
    p.add_argument("--repeats", type=int, default=3, help="of each subject, for the median")
    args = p.parse_args(argv)
    if args.repeats < 1 or args.simulate < 1:
        raise ValueError(f"--repeats {args.repeats} --simulate {args.simulate}: at least 1 each")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the parts asked for; returns 1 where a target is missed."""
    args = parse_args(argv)
    if args.worker:
        return work(*args.worker)
    missed: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "store" in args.parts or "seconds" in args.parts:
            rows, kib = build_store(args, folder)
            print(f"store of {rows} slice pairs at 128 x 128: {kib:.2f} KiB a pair", flush=True)
            if kib > MOST_KIB:
                missed.append(f"{kib:.2f} KiB a slice pair, at most {MOST_KIB} wanted")
        if "seconds" in args.parts:
            time_subjects(args, folder)
        if "memory" in args.parts:
            missed += measure_memory(folder)
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return console.FAILED if missed else console.DONE


def build_store(args: argparse.Namespace, folder: Path) -> tuple[int, float]:
    """Build a store with the command; returns its slice pairs and KiB of all its files a pair."""
    out = folder / "slices"
    source = (["--bids", *map(str, args.bids), "--brain-extraction", args.brain_extraction[0]]
              if args.bids else ["--simulate", str(args.simulate), "--downloads", str(folder)])
    run([str(ROOT / "preprocess.py"), *source, "--out", str(out), "--workers", "1"])
    rows = store.SliceStore(out).header["counts"]["slices"]["all"]
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return rows, size / rows / 1024


def time_subjects(args: argparse.Namespace, folder: Path) -> None:
    """Print the median time that a worker takes for a subject, by method."""
    roots = args.bids or sorted(folder.glob("simulated-*"))
    subjects = [subject for root in roots for subject in bids.find_subjects(root)[0]]
    print(f"\n{'seconds a subject':<20} {'wall':>7} {'CPU':>7}   {len(subjects)} subjects, median "
          f"of {args.repeats} repeats each, in one process", flush=True)
    for method in args.brain_extraction:
        extractor = make_extractor(method)
        prepare(subjects[0], method, Settings(), extractor)  # a network's first run takes longer
        walls, cpus = [], []
        for subject in subjects * args.repeats:
            wall, cpu = time.perf_counter(), time.process_time()
            prepare(subject, method, Settings(), extractor)
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
        print(f"{method:<20} {median(walls):>7.2f} {median(cpus):>7.2f}", flush=True)


def make_extractor(method: str) -> brain.Extractor | None:
    """A method's extractor as a worker of `preprocess.py` makes it: one thread."""
    if method in ("hd-bet", "deepbet"):
        import torch

        torch.set_num_threads(1)
    return None if method == "mask" else brain.make_extractor(method)


def work(method: str, root: str) -> int:
    """Prepare the one subject of a tree; print the most memory that this process ever held."""
    subject, = bids.find_subjects(Path(root))[0]
    prepare(subject, method, Settings(), make_extractor(method))
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss may begin with what the parent had
        lines = status.read_text().splitlines()
        print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024)
    else:
        import resource

        unit = 2 ** (20 if sys.platform == "darwin" else 10)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
    return console.DONE


def measure_memory(folder: Path) -> list[str]:
    """Print the peak of a worker for large pairs; returns the targets that it missed."""
    print(f"\n{'peak of a worker, ' + ' x '.join(map(str, LARGE)):<36} {'MiB':>6}", flush=True)
    missed = []
    for method, pair, what in WORKERS:
        if not (folder / pair).exists():
            write_large(folder / pair)
        mib = float(run([__file__, "--worker", method, str(folder / pair)]).split()[-1])
        print(f"{f'{method}, {what}':<36} {mib:>6.0f}", flush=True)
        if mib > MOST_MIB:
            missed.append(f"{mib:.0f} MiB for {method}, {what}, at most {MOST_MIB} wanted")
    return missed


def run(command: list[str]) -> str:
    """Run Python with these arguments in the checkout; returns what it printed."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    if done.returncode:
        raise OSError(f"exit code {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
    return done.stdout


def write_large(root: Path) -> None:
    """A tree of one painted subject: "same" grid, or "moved" between the scans, or a whole "head".

    The head comes with its mask. Voxels carry a little noise, as those of scanners.
    """
    anat = root / "sub-01" / "anat"
    anat.mkdir(parents=True)
    about = {"Name": root.name, "BIDSVersion": "1.8.0"}
    (root / "dataset_description.json").write_text(json.dumps(about))
    noise = np.random.default_rng(0).normal(0, 12, (*LARGE[:2], 1)).astype(np.float32)
    for suffix in ("T1w", "T2w"):
        still = suffix == "T1w" or root.name == "same"
        affine = (lay_affine(LARGE, LARGE_MM, "LPS") if still else
                  lay_affine(LARGE, LARGE_MM, turn_deg=(4, 0, -3), middle=(0, 5, 0)))
        moved = None if still else rigid((3, -2, 2), (4, -3, 3))
        inside = paint_fine(affine, suffix, moved) > 0
        head = inside if root.name != "head" else True
        voxels = paint_fine(affine, suffix, moved, extracted=root.name != "head") + noise
        voxels = np.where(head, np.maximum(voxels, 1), 0).astype(np.int16)
        nib.Nifti1Image(voxels, affine).to_filename(anat / f"sub-01_{suffix}.nii.gz")
        if root.name == "head" and suffix == "T1w":
            mask = nib.Nifti1Image(inside.astype(np.uint8), affine)
            mask.to_filename(anat / "sub-01_desc-brain_mask.nii.gz")


def paint_fine(affine: np.ndarray, suffix: str, matrix: np.ndarray | None, *,
               extracted: bool = True) -> np.ndarray:
    """(512, 512, 300) float32 of a painted head, interpolated from a coarser painting."""
    coarse = affine @ np.diag([FINER] * 3 + [1])
    coarse[:3, 3] = affine[:3, 3] + affine[:3, :3] @ np.full(3, (FINER - 1) / 2)
    painted = paint(tuple(n // FINER for n in LARGE), coarse, suffix, person=1,
                    extracted=extracted, matrix=matrix)
    return ndimage.zoom(painted, FINER, order=0 if extracted else 1, grid_mode=True,
                        mode="nearest")


if __name__ == "__main__":
    sys.exit(console.run(main))
