"""What translating a volume costs: seconds and memory from start to file, against the plain way.

    python benchmarks/translate.py                         64 features, 6 blocks
    python benchmarks/translate.py --parts round-trip      what is lost on the way there and back

A painted, extracted T1w of 240 x 240 x 155 voxels of 1 mm and a checkpoint of random nets. The
command runs in a fresh process, so that start, reading, writing and imports count. Beside it, in
turns, the plain way to run the same nets: float32, eager, slice by slice, in a process of its own,
the time of the nets alone. Exits with 1 where a target is missed: 8 s, 1.5 GiB.
"""

from __future__ import annotations

import argparse
import os
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
sys.path[0] = str(ROOT)  # where `translate` is the command, and not this script
sys.path.append(str(ROOT / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))  # the tests' conftest would say 1

import torch
from conftest import lay_affine, paint
from painted_scans import scaled, scan, translator, write_checkpoint
from torch import nn

import console
from data.nifti import read_volume
from models import checkpoint
from translator import Translator, cut

SHAPE = (240, 240, 155)
MOST_S, MOST_GIB, TIMES = 8.0, 1.5, 4.0
# shape, voxel size in mm, axes, turn in degrees, all translated at 1.5 mm and 128 pixels
ROUND_TRIPS = {
    "LPS, 1 mm": ((160, 190, 140), (1, 1, 1), "LPS", (0, 0, 0)),
    "LAS, 1 mm": ((160, 190, 140), (1, 1, 1), "LAS", (0, 0, 0)),
    "oblique, 1 mm": ((160, 190, 140), (1, 1, 1), "LPS", (12, -7, 20)),
    "anisotropic, 0.8 x 1.2 x 2": ((200, 158, 70), (0.8, 1.2, 2), "RAS", (0, 0, 0)),
    "thick slices, 0.7 x 0.7 x 4": ((228, 270, 36), (0.7, 0.7, 4), "LPS", (0, 0, 0)),
    "LPS, 1.5 mm (no resampling)": ((108, 128, 94), (1.5, 1.5, 1.5), "LPS", (0, 0, 0)),
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line of this script."""
    p = console.OneLineParser(description=__doc__, formatter_class=console.Formatter)
    p.add_argument("--parts", nargs="+", choices=("time", "round-trip"),
                   default=("time", "round-trip"), help="what to measure")
    p.add_argument("--features", type=int, default=64, help="of the nets")
    p.add_argument("--blocks", type=int, default=6, help="of the nets")
    p.add_argument("--precision", default="bf16", help="of the command")
    p.add_argument("--repeats", type=int, default=3, help="turns, for the median")
    p.add_argument("--plain", nargs=2, type=Path, metavar=("CKPT", "NIFTI"),
                   help="only time the plain way and print its seconds, both directions")
    p.add_argument("--ours", nargs=2, type=Path, metavar=("CKPT", "NIFTI"),
                   help="only time our nets and print their seconds, both directions")
    args = p.parse_args(argv)
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the parts asked for; returns 1 where a target is missed."""
    args = parse_args(argv)
    if args.plain or args.ours:
        ckpt, path = args.plain or args.ours
        seconds = time_plain(ckpt, path) if args.plain else time_ours(ckpt, path, args.precision)
        print(*(f"{s:.4f}" for s in seconds))
        return console.DONE
    missed = []
    with tempfile.TemporaryDirectory() as name:
        if "time" in args.parts:
            missed += measure_time(args, Path(name))
        if "round-trip" in args.parts:
            measure_round_trips(Path(name))
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return console.FAILED if missed else console.DONE


def measure_time(args: argparse.Namespace, folder: Path) -> list[str]:
    """Print the figures of the command and of the nets; returns the targets missed."""
    ckpt = write_checkpoint(folder / "best.pt", size=128, spacing_mm=1.5,
                            config={"features": args.features, "blocks": args.blocks})
    affine = lay_affine(SHAPE, (1, 1, 1), "LPS")
    noise = np.random.default_rng(0).normal(0, 12, SHAPE)
    voxels = paint(SHAPE, affine)
    voxels = np.where(voxels > 0, np.maximum(voxels + noise, 1), 0).astype(np.int16)
    path = folder / "sub-01_T1w.nii.gz"
    nib.Nifti1Image(voxels, affine).to_filename(path)
    walls, cpus, peaks, pairs = [], [], [], []
    for turn in range(args.repeats):
        wall, cpu, peak = run_command(["translate.py", "--ckpt", str(ckpt), str(path), "--out",
                                       str(folder / str(turn)), "--precision", args.precision,
                                       "--device", "cpu"])
        walls, cpus, peaks = [*walls, wall], [*cpus, cpu], [*peaks, peak]
        nets = [run_self([flag, str(ckpt), str(path), "--precision", args.precision])
                for flag in ("--plain", "--ours")]
        pairs.append(nets)
    plain, ours = (np.array([pair[i] for pair in pairs]) for i in (0, 1))
    wall, cpu, peak = median(walls), median(cpus), max(peaks)
    ratios = np.median(plain[:, :2].sum(axis=1) / ours[:, :2].sum(axis=1)), np.median(
        plain[:, 2] / ours[:, 2])
    print(f"{args.features} features, {args.blocks} blocks, {args.precision}, {os.cpu_count()} "
          f"cores, {args.repeats} turns, medians")
    print(f"command, start to file:     {wall:.2f} s wall, {cpu:.2f} s CPU, peak {peak:.2f} GiB")
    for title, figures in (("nets alone, plain", plain), ("nets alone, ours", ours)):
        there, back, used = np.median(figures, axis=0)
        print(f"{title + ':':<27} {there:.2f} s T1w to T2w, {back:.2f} s back, {used:.2f} s CPU")
    print(f"plain / ours, both ways:    {ratios[0]:.2f} by the clock, {ratios[1]:.2f} by CPU time",
          flush=True)
    limits = ((wall, MOST_S, "s"), (peak, MOST_GIB, "GiB"))
    missed = [f"{value:.2f} {unit}, at most {most} wanted" for value, most, unit in limits
              if value > most]
    if ratios[0] < TIMES:
        missed.append(f"{ratios[0]:.2f} times the plain way's speed, at least {TIMES} wanted")
    return missed


def run_command(command: list[str]) -> tuple[float, float, float]:
    """Seconds by the clock, CPU seconds and peak GiB of a script in a fresh process."""
    start, peak = time.perf_counter(), 0.0
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    while True:
        pid, status, used = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, high_water(process.pid))
        time.sleep(0.02)
    wall = time.perf_counter() - start
    if status:
        raise OSError(f"{' '.join(command)}: exit status {status}")
    unit = 2 ** (30 if sys.platform == "darwin" else 20)
    # ru_maxrss begins with what this process had when it started the other
    return wall, used.ru_utime + used.ru_stime, peak or used.ru_maxrss / unit


def high_water(pid: int) -> float:
    """The most memory that a process has held so far, in GiB; 0 where the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2 ** 20 for line in lines if line.startswith("VmHWM")), 0.0)


def run_self(arguments: list[str]) -> list[float]:
    """Run this script in a fresh process; the numbers that it prints."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        raise OSError(f"exit code {done.returncode}: {done.stderr[-500:]}")
    return [float(word) for word in done.stdout.split()]


def stack_of(made: Translator, path: Path) -> np.ndarray:
    """(n, H, W) slices of a volume, all with brain."""
    volume = read_volume(path)
    slices = cut(volume, made.find_brain(volume)[0], made.record).slices
    return slices[(slices > -1).any(axis=(1, 2))]


def time_plain(ckpt: Path, path: Path) -> list[float]:
    """Seconds of G, of F, and CPU seconds of both: float32, eager, slice by slice."""
    nets = checkpoint.load_generators(checkpoint.load(ckpt))
    slices = stack_of(Translator(ckpt, device="cpu", precision="fp32"), path)
    seconds, cpu = [], time.process_time()
    for net in nets:
        start = time.perf_counter()
        with torch.no_grad():
            np.stack([net(torch.from_numpy(one)[None, None])[0, 0].numpy() for one in slices])
        seconds.append(time.perf_counter() - start)
    return [*seconds, time.process_time() - cpu]


def time_ours(ckpt: Path, path: Path, precision: str) -> list[float]:
    """Seconds of G, of F, and CPU seconds of both, as `Translator` runs them."""
    made = Translator(ckpt, device="cpu", precision=precision)
    slices = stack_of(made, path)
    seconds, cpu = [], time.process_time()
    for direction in made.generators:
        start = time.perf_counter()
        made.net(direction)(slices)
        seconds.append(time.perf_counter() - start)
    return [*seconds, time.process_time() - cpu]


def measure_round_trips(folder: Path) -> None:
    """Print what an identity net loses inside the brain: interpolation there and back."""
    made = translator(write_checkpoint(folder / "identity.pt", size=128, spacing_mm=1.5),
                      (nn.Identity(), nn.Identity()))
    print(f"\n{'identity net, 128 pixels of 1.5 mm':<36} {'MAE':>8} {'3 mm below the rim':>20} "
          f"{'correlation':>12} {'affine':>9}")
    for title, (shape, spacing, axes, turn_deg) in ROUND_TRIPS.items():
        image = scan(shape, spacing, axes, turn_deg)
        found, wanted = made(image, "t1w-to-t2w"), scaled(image)
        values, inside = found.get_fdata(), wanted > 0
        depth = ndimage.distance_transform_edt(inside, sampling=image.header.get_zooms())
        away = np.abs(values - wanted)
        same = "bit-equal" if np.array_equal(found.affine, image.affine) else "DIFFERS"
        print(f"{title:<36} {away[inside].mean():>8.4f} {away[depth > 3].mean():>20.4f} "
              f"{np.corrcoef(values[inside], wanted[inside])[0, 1]:>12.4f} {same:>9}", flush=True)


if __name__ == "__main__":
    sys.exit(console.run(main))
