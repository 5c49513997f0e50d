"""Worker processes: side by side, bounded, and never left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data.workers import Workers

ROOT = Path(__file__).parents[1]


def square(n):
    return n * n


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(n):
    raise RuntimeError(f"no {n}")


def where(_):
    return os.getpid()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_each_result_arrives_once(count):
    results = []
    with Workers(count) as workers:
        for n in range(12):
            workers.submit(square, n, results.append)
        workers.wait()
        assert sorted(results) == [n * n for n in range(12)]


def test_one_worker_is_this_process_and_two_are_others():
    for count, others in ((1, False), (2, True)):
        found = []
        with Workers(count) as workers:
            workers.submit(where, None, found.append)
            workers.wait()
        assert (found != [os.getpid()]) == others


def test_submit_waits_while_all_have_enough_to_do():
    under_way, most, lock = 0, 0, threading.Lock()

    def done(_):
        nonlocal under_way
        with lock:
            under_way -= 1

    with Workers(2) as workers:
        for _ in range(8):
            workers.submit(time.sleep, 0.05, done)
            with lock:
                under_way += 1
                most = max(most, under_way)
        workers.wait()
    assert most == 3, "two at work and one that waits"


def test_an_error_in_a_worker_comes_out_of_submit_or_wait():
    with pytest.raises(RuntimeError, match="no 3"):
        with Workers(2) as workers:
            workers.submit(refuse, 3, lambda _: None)
            workers.wait()
            workers.submit(square, 3, lambda _: None)


def test_an_error_in_done_is_not_swallowed():
    def full(_):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        with Workers(2) as workers:
            workers.submit(square, 3, full)
            workers.wait()


def test_a_killed_worker_is_said_in_one_line_and_blocks_nothing():
    with pytest.raises(OSError, match="killed, for want of memory as a rule; .* fewer --workers"):
        with Workers(2) as workers:
            for _ in range(9):
                workers.submit(die, None, lambda _: None)
            workers.wait()


def test_an_exception_ends_the_workers_at_once():
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        with Workers(2) as workers:
            ready = threading.Event()
            workers.submit(where, None, lambda _: ready.set())
            ready.wait(30)
            begun = time.monotonic()
            workers.submit(time.sleep, 60, lambda _: None)
            raise KeyboardInterrupt
    assert time.monotonic() - begun < 10


def test_workers_end_when_their_parent_is_killed():
    process = subprocess.Popen(
        [sys.executable, "-c",
         "import os, time\n"
         "from data.workers import Workers\n"
         "workers = Workers(2)\n"
         "for _ in range(2): workers.submit(time.sleep, 0.1, lambda _: None)\n"
         "workers.wait()\n"
         "print('ready', flush=True)\n"
         "workers.submit(time.sleep, 60, lambda _: None)\n"
         "time.sleep(60)"], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    try:
        process.communicate(timeout=20)  # the workers hold the pipe too: it ends when all have
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def test_ctrl_c_while_workers_are_starting_is_heard_by_the_parent_alone():
    process = subprocess.Popen(
        [sys.executable, "-c",
         "import time, sys\n"
         "from data.workers import Workers\n"
         "try:\n"
         "    with Workers(2) as workers:\n"
         "        workers.submit(time.sleep, 9, print)\n"
         "        print('started', flush=True)\n"
         "        time.sleep(30)\n"
         "except KeyboardInterrupt:\n"
         "    print('heard')"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True)
    assert process.stdout.readline() == "started\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (out, err) == ("heard\n", "")
