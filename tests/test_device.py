"""Tests of device.py; what needs several processes is in test_training.py."""

import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest
import torch

from device import (Process, autocast, choose_device, choose_precision, first_speaks, meet,
                    random_state, set_random_state, start_process)

CPU = torch.device("cpu")


def test_the_cpu_can_always_be_had():
    assert choose_device("cpu") == CPU
    if not torch.cuda.is_available():
        assert choose_device("auto") == CPU


def test_devices_that_do_not_exist_are_refused_by_name():
    for name in ("gpu", "mps", "cuda:x", "cuda:-1", "cuda:99"):
        with pytest.raises(ValueError, match=f"--device {name}:"):
            choose_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there are 0 here"):
            choose_device("cuda")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_auto_takes_the_gpu_of_the_index_and_a_named_number_wins():
    assert choose_device("auto", 0) == choose_device("cuda") == torch.device("cuda", 0)
    assert choose_device("cuda:0", 5) == torch.device("cuda", 0)
    assert choose_precision("auto", torch.device("cuda", 0)) in (torch.bfloat16, torch.float16)


def test_the_named_precision_is_taken_and_fp16_needs_a_gpu():
    assert choose_precision("fp32", CPU) == torch.float32
    assert choose_precision("bf16", CPU) == torch.bfloat16
    assert choose_precision("auto", CPU) in (torch.float32, torch.bfloat16)
    assert choose_precision("fp16", torch.device("cuda", 0)) == torch.float16
    with pytest.raises(ValueError, match="--precision fp16: needs a CUDA device"):
        choose_precision("fp16", CPU)


def test_autocast_computes_convolutions_in_the_precision_asked_for():
    conv, slices = torch.nn.Conv2d(1, 1, 3), torch.rand(1, 1, 8, 8)
    with autocast(CPU, torch.bfloat16):
        assert conv(slices).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert conv(slices).dtype == torch.float32


def test_without_torchrun_a_process_is_alone():
    process = start_process("cpu")
    assert process == Process(0, 1, CPU) and process.is_main
    assert not torch.distributed.is_initialized()
    assert process.gather("a") == ["a"]
    assert torch.equal(process.mean(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))
    assert process.any(True, False) == [True, False]


@pytest.fixture
def connect():
    """Open connections to one store on loopback, as torchrun keeps it over its restarts."""
    server = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def client():
        return torch.distributed.TCPStore("localhost", server.port, is_master=False,
                                          timeout=timedelta(seconds=20))
    yield client


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_processes_that_start_together_meet_whatever_was_there_before_them(connect, order):
    names = []
    for _ in range(3):  # restarts, each with the traces of those before in the store
        with ThreadPoolExecutor(3) as pool:
            asked = []
            for rank in order:
                asked.append(pool.submit(meet, connect(), rank, 3, 20))
                time.sleep(0.05)
            found = {a.result() for a in asked}
        assert len(found) == 1
        names += found
    assert len(set(names)) == 3, "each start has a name of its own"


def test_a_process_that_died_while_it_waited_is_not_taken_for_its_successor(connect):
    with pytest.raises(TimeoutError, match="process 1 of 2: the others were not there"):
        meet(connect(), 1, 2, 0.1)
    with pytest.raises(TimeoutError, match="process 0 of 2"):  # invites the dead one, in vain
        meet(connect(), 0, 2, 0.3)
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(meet, connect(), rank, 2, 20) for rank in (0, 1))
        assert first.result() == second.result()


def test_another_number_of_processes_meets_as_well(connect):
    for world in (3, 1, 2):
        with ThreadPoolExecutor(world) as pool:
            asked = [pool.submit(meet, connect(), rank, world, 20) for rank in range(world)]
            assert len({a.result() for a in asked}) == 1


def test_errors_pass_through_where_this_process_is_the_first():
    with pytest.raises(ValueError, match="mine"), first_speaks():
        raise ValueError("mine")


def test_an_error_that_another_process_meets_alone_is_told_after_a_while(monkeypatch, capsys):
    waited = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(time, "sleep", waited.append)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as leaving, first_speaks():
            print("progress", file=sys.stderr)
            raise ValueError("a.nii.gz: is damaged")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert leaving.value.code == 1 and sum(waited) >= 10
    assert capsys.readouterr().err == "error: a.nii.gz: is damaged\n"


def test_random_numbers_go_on_where_their_state_was_taken():
    def drawn():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    state = random_state(CPU)
    first = drawn()
    assert drawn() != first
    set_random_state(state)
    assert drawn() == first
