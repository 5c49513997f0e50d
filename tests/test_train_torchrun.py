"""Tests of train.py under torchrun: workers and machines that are lost, NCCL."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import TINY
from trainings import NO_GPU, ROOT, records
from trainings import slices_fixture  # noqa: F401

from models import checkpoint


def torchrun(slices, folder, *options, restarts=0, machines=("--standalone", "--nproc-per-node=2")):
    return subprocess.Popen(
        [sys.executable, "torchrun.py", *machines, f"--max-restarts={restarts}",
         "--monitor-interval=0.2", "train.py", "--slices", slices,
         "--run", folder, *TINY, "--steps-per-epoch", "40", "--epochs", "2", "--epochs-decay",
         "2", "--save-minutes", "0.001", "--log-every", "10", *options],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})


def workers_of(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def wait_for_step(folder, step, process):
    for _ in range(2400):
        if (folder / "metrics.jsonl").exists() and any(
                r["step"] >= step for r in records(folder, "loss")):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    pytest.fail("no step in 240 s")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_killed_worker_restarts_the_group_and_a_killed_torchrun_leaves_nobody(slices, tmp_path):
    run = tmp_path / "run"
    process = torchrun(slices, run, restarts=3)
    wait_for_step(run, 20, process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    wait_for_step(run, 70, process)  # the group has begun again, from last.pt
    left = workers_of(process)
    process.kill()
    process.communicate(timeout=60)
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in left):
            break
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in left), "workers outlive torchrun"
    process = torchrun(slices, run)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert checkpoint.load(run / "last.pt", resume=True)["step"] == 160
    assert [r["step"] for r in records(run, "validation")] == [40, 80, 120, 160]
    assert (run / "log.txt").read_text().count("going on from") >= 2


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_two_machines_begin_again_when_a_worker_of_one_is_killed(slices, tmp_path):
    """Only the machine of the killed worker counts a restart, the other one just starts again."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    run, machines = tmp_path / "run", (
        "--nnodes=1:2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=two",
        f"--rdzv-endpoint=localhost:{port}", "--rdzv-conf=last_call_timeout=5")
    both = [torchrun(slices, run, restarts=3, machines=machines) for _ in range(2)]
    try:
        for turn, step in ((0, 20), (1, 70)):
            wait_for_step(run, step, both[0])
            os.kill(workers_of(both[turn])[0], signal.SIGKILL)
        said = [process.communicate(timeout=240)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said
    assert checkpoint.load(run / "last.pt", resume=True)["step"] == 160
    assert [r["step"] for r in records(run, "validation")] == [40, 80, 120, 160]
    # a machine that comes back when the other one has just finished finds nothing left
    text = (run / "log.txt").read_text()
    assert text.count("going on from") - text.count("nothing left to train") == 2


# ------------------------------------------------------------------------------------------- CUDA


@pytest.mark.cuda
@pytest.mark.skipif(NO_GPU, reason="no CUDA GPU here")
def test_torchrun_trains_with_nccl_on_one_gpu_and_goes_on(slices, tmp_path):
    for steps in (2, 4):
        done = subprocess.run(
            [sys.executable, "torchrun.py", "--nproc_per_node=1", "train.py", "--slices", slices,
             "--run", tmp_path / "run", *TINY, "--device", "cuda", "--precision", "bf16",
             "--max-steps", str(steps), "--save-minutes", "0", "--log-every", "1"],
            cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] == steps
    assert [r["step"] for r in records(tmp_path / "run", "loss")] == [1, 2, 3, 4]
