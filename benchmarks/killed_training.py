"""Kill a training run at random, again and again, and see whether anything is lost.

    python benchmarks/killed_training.py --kills 20

Two processes under torchrun on simulated slices: SIGKILL to a worker (torchrun restarts the group),
SIGKILL to torchrun itself and SIGTERM to it (this script starts the same command again). At the end
the run must have the steps that it was asked for, each epoch judged once, and each line of the log
once. Exits with 1 where it has not.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import console
from data.store import Part, digest_rows, pack, write_part
from models import checkpoint

STEPS, EPOCHS = 60, 16
SIZE, SLICES = 32, 8


def main(argv: list[str] | None = None) -> int:
    """Kill and restart; returns the exit code."""
    p = console.OneLineParser(description=__doc__, formatter_class=console.Formatter)
    p.add_argument("--kills", type=int, default=20, help="how often")
    p.add_argument("--seed", type=int, default=0, help="of moments and victims")
    args = p.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        return torment(Path(folder), args.kills, random.Random(args.seed))


def torment(folder: Path, kills: int, draws: random.Random) -> int:
    """Run, kill `kills` times, let it end, compare; returns the exit code."""
    store, run = folder / "slices", folder / "run"
    write_store(store)
    done: Counter[str] = Counter()
    process = start(store, run)
    begun = time.monotonic()
    while sum(done.values()) < kills:
        seen = last_step(run)
        while last_step(run) <= seen and process.poll() is None:
            time.sleep(0.1)  # it has gone on since the last kill
        if process.poll() is not None:
            print(f"ended after {sum(done.values())} kills; take more steps", file=sys.stderr)
            return 1
        time.sleep(draws.uniform(0, 2))
        how = draws.choice(("worker, SIGKILL", "torchrun, SIGKILL", "torchrun, SIGTERM"))
        before = last_step(run)
        if how.startswith("worker"):
            victims = workers_of(process)
            if not victims:
                continue
            os.kill(draws.choice(victims), signal.SIGKILL)
        else:
            process.send_signal(signal.SIGKILL if how.endswith("KILL") else signal.SIGTERM)
            process.wait(timeout=120)
            process = start(store, run)
        done[how] += 1
        print(f"{sum(done.values()):3d}  {how:18s}  by step {before:4d}  "
              f"({time.monotonic() - begun:.0f} s)", flush=True)
    code = process.wait(timeout=1200)
    return judge(run, code, done)


def judge(run: Path, code: int, done: Counter[str]) -> int:
    """Print what was lost, if anything; returns the exit code."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = [STEPS * (epoch + 1) for epoch in range(EPOCHS)]
    found = {
        "exit code 0": code == 0,
        f"last.pt at step {STEPS * EPOCHS}":
            checkpoint.load(run / "last.pt", resume=True)["step"] == STEPS * EPOCHS,
        f"each of {EPOCHS} epochs judged once":
            [line["step"] for line in lines if line["kind"] == "validation"] == wanted,
        "each interval logged once":
            [line["step"] for line in lines if line["kind"] == "loss"]
            == list(range(10, STEPS * EPOCHS + 1, 10)),
    }
    print(", ".join(f"{n} x {how}" for how, n in sorted(done.items())))
    for what, true in found.items():
        print(f"{'yes' if true else 'NO '}  {what}")
    return 0 if all(found.values()) else 1


def start(store: Path, run: Path) -> subprocess.Popen:
    """The command that a scheduler would give again and again."""
    return subprocess.Popen(
        [sys.executable, "torchrun.py", "--standalone", "--nproc-per-node=2", "--max-restarts=99",
         "--monitor-interval=0.2", "train.py", "--slices", store, "--run", run, "--features", "4",
         "--blocks", "1", "--device", "cpu", "--precision", "fp32", "--steps-per-epoch",
         str(STEPS), "--epochs", str(EPOCHS // 2), "--epochs-decay", str(EPOCHS - EPOCHS // 2),
         "--save-minutes", "0.01", "--log-every", "10"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"})


def last_step(run: Path) -> int:
    """The last step in the log, 0 before there is any."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    steps = []
    for line in lines:
        try:
            steps.append(json.loads(line)["step"])
        except ValueError:  # cut short by a kill
            continue
    return max(steps, default=0)


def workers_of(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started."""
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in children.split()]


def write_store(folder: Path) -> None:
    """Blobs of opposite contrast: what they show does not matter here."""
    draws = np.random.default_rng(0)
    rows = []
    for number, split in enumerate(("train", "train", "train", "val")):
        j, i = np.indices((SIZE, SIZE)) - SIZE / 2
        mask = np.repeat(((i / 10) ** 2 + (j / 12) ** 2 < 1)[None], SLICES, axis=0)
        noise = draws.uniform(0.2, 0.8, mask.shape)
        x, y = (np.where(mask, value, -1).astype(np.float16) for value in (noise, -noise))
        name = f"blobs_sub-{number}"
        row = {"id": name, "dataset": "blobs", "subject": str(number), "session": "",
               "n_slices": str(SLICES), "brain_extraction": "none", "t1w": "", "t2w": "",
               "rows_sha256": digest_rows(x, y, np.packbits(mask, axis=-1))}
        write_part(folder, Part(x, y, mask, row))
        rows.append({**row, "split": split})
    header = {"size": SIZE, "spacing_mm": 4.0, "min_brain_area": 0.25, "seed": 0, "sources": [],
              "intensity": {}, "split": [0.8, 0.1, 0.1], "versions": {}}
    pack(folder, header, rows, {}, {row["id"] for row in rows})


if __name__ == "__main__":
    sys.exit(console.run(main))
