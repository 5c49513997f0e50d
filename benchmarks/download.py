"""How fast the downloader is beside curl, on the same files of one local archive, in turns.

    python benchmarks/download.py

The archive is that of the tests, in a process of its own; with a rate it shares so many megabytes
a second among all connections, as a network would. Both clients fetch four files at a time. The
downloader verifies each file while it comes (gzip CRC, NIfTI header, MD5, SHA-256); curl does not,
so a third column adds `gzip -t` and `md5sum`, nearly the same work. Listing and start-up are
in nobody's time. Exits with 1 where a target is missed: 0.8 of curl's speed at a rate.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import nibabel as nib
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import console
from data.download import Download
from data.openneuro import Archive, make_plan

LEAST = 0.8
DATASET, TAG, CONNECTIONS = "ds000001", "1.0.0", 4
AHEAD = 4  # subjects on their way, as in preprocess.py with one worker
# bytes of each file; no subject is without a T2w, so a single file has a tiny one beside it
LARGE, ONE, SMALL = [20e6] * 8, [60e6, 2e3], [50e3] * 400
# files, MB a second of the archive (125: a gigabit; None: as fast as loopback)
CASES = ((LARGE, 25.0), (LARGE, 50.0), (LARGE, 125.0), (LARGE, None), (ONE, 25.0), (ONE, 125.0),
         (ONE, None), (SMALL, 25.0), (SMALL, None))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line of this script."""
    p = console.OneLineParser(description=__doc__, formatter_class=console.Formatter)
    p.add_argument("--repeats", type=int, default=5, help="turns of each client, for the median")
    p.add_argument("--client", nargs=2, metavar=("API_URL", "DIR"),
                   help="only download the dataset of an archive and print the seconds")
    args = p.parse_args(argv)
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure every case; returns 1 where a target is missed."""
    args = parse_args(argv)
    if args.client:
        print(fetch(args.client[0], Path(args.client[1])))
        return console.DONE
    missed = []
    print(f"median of {args.repeats} turns{'':<14}{'MB/s':>21}{'files/s':>16}\n{'':<22}"
          f"{'ours':>9} {'curl':>9} {'+ checks':>9} {'ours':>8} {'curl':>8} {'ours/curl':>10}")
    with tempfile.TemporaryDirectory() as name:
        for sizes, rate in CASES:
            tree = Path(name) / f"tree-{len(sizes)}"
            if not tree.exists():
                write_tree(tree, sizes)
            ratio = compare(tree, rate, args.repeats)
            if rate and ratio < LEAST:
                missed.append(f"{ratio:.2f} of curl's speed for {len(sizes)} files at {rate:g} "
                              f"MB/s, at least {LEAST} wanted")
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return console.FAILED if missed else console.DONE


def compare(tree: Path, rate: float | None, repeats: int) -> float:
    """Print a line for the files of `tree`; returns our speed over curl's, the median of turns."""
    files = [path.relative_to(tree).as_posix() for path in sorted(tree.rglob("*.nii.gz"))]
    megabytes = sum((tree / name).stat().st_size for name in files) / 1e6
    ours, curls, checked = [], [], []
    with archive(tree, rate) as (api_url, s3_url):
        for _ in range(repeats):
            with tempfile.TemporaryDirectory(dir=tree.parent) as name:
                ours.append(float(run([sys.executable, __file__, "--client", api_url, name])))
                assert_same(tree, Path(name) / DATASET, files)
            with tempfile.TemporaryDirectory(dir=tree.parent) as name:
                start = time.perf_counter()
                curl(s3_url, files, Path(name))
                curls.append(time.perf_counter() - start)
                for check in (["gzip", "-t"], ["md5sum"]):
                    run([*check, *(f"{name}/{file}" for file in files)])
                checked.append(time.perf_counter() - start)
                assert_same(tree, Path(name), files)
    ratio = median(curl_s / our_s for our_s, curl_s in zip(ours, curls))
    sizes = [(tree / name).stat().st_size / 1e6 for name in files]
    alike = [size for size in sizes if size > max(sizes) / 2]
    case = f"{len(alike)} of {sum(alike) / len(alike):.2g} MB, " + (
        f"{rate:g} MB/s" if rate else "no rate")
    speeds = (f"{megabytes / median(t):>9.1f}" for t in (ours, curls, checked))
    print(f"{case:<22}", *speeds, *(f"{len(files) / median(t):>8.1f}" for t in (ours, curls)),
          f"{ratio:>10.2f}", flush=True)
    return ratio


def fetch(api_url: str, folder: Path) -> float:
    """Download a dataset with this project's downloader; returns seconds without the listing."""
    with Archive(api_url) as source:
        plan = make_plan(source.snapshot(f"{DATASET}:{TAG}"))
        start = time.perf_counter()
        with Download(source, plan, folder, ahead=AHEAD, keep=True, connections=CONNECTIONS,
                      progress=False) as download:
            for subject, reason in download:
                if reason:
                    raise OSError(reason)
                download.finish(subject)
            return time.perf_counter() - start


def curl(s3_url: str, files: list[str], folder: Path) -> None:
    """Download the same files with curl, as many at a time."""
    config = folder / "curl.txt"
    config.write_text("".join(f'url = "{s3_url}/{DATASET}/{name}?versionId=v{TAG}"\n'
                              f'output = "{folder / name}"\n' for name in files))
    run(["curl", "--parallel", "--parallel-max", str(CONNECTIONS), "--fail", "--silent",
         "--show-error", "--create-dirs", "--noproxy", "*", "--config", str(config)])


@contextlib.contextmanager
def archive(tree: Path, rate: float | None) -> Iterator[tuple[str, str]]:
    """Run the tests' archive in a process of its own; yields the addresses of API and storage."""
    command = [sys.executable, str(ROOT / "tests" / "openneuro_server.py"),
               f"{DATASET}:{TAG}={tree}", *(["--rate", str(rate)] if rate else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            api_url, s3_url = (server.stdout.readline().strip().partition("=")[2] for _ in "12")
            if not s3_url:
                raise OSError("the local archive does not start; it needs graphql-core")
            yield api_url, s3_url
        finally:
            server.terminate()


def run(command: list[str]) -> str:
    """Run a program; returns what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{Path(command[0]).name}: exit code {done.returncode}: "
                      f"{(done.stderr or done.stdout)[-500:]}")
    return done.stdout


def assert_same(tree: Path, folder: Path, files: list[str]) -> None:
    """Both clients must have brought every byte."""
    for name in files:
        if (tree / name).read_bytes() != (folder / name).read_bytes():
            raise OSError(f"{name}: not the archive's bytes")


def write_tree(root: Path, sizes: list[float]) -> None:
    """A dataset of scans of noise, of about so many bytes each, two to a subject."""
    for i, size in enumerate(sizes):
        voxels = (max(round(size / 1.6 / 4096), 1), 64, 64)  # of 12 bits, gzip packs them into 13
        label, suffix = f"{i // 2 + 1:03d}", ("T1w", "T2w")[i % 2]
        path = root / f"sub-{label}" / "anat" / f"sub-{label}_{suffix}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 4096, voxels, dtype=np.int16)
        nib.Nifti1Image(noise, np.eye(4)).to_filename(path)
    about = {"Name": "Noise", "BIDSVersion": "1.8.0", "License": "CC0"}
    (root / "dataset_description.json").write_text(json.dumps(about))


if __name__ == "__main__":
    sys.exit(console.run(main))
