"""Tests of training.py: averages, augmentation, the schedule, fp16, two processes."""

import copy
import fcntl
import hashlib
import math
import os
import socket
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from trainings import CONFIG, CPU, NO_GPU, alone, draw_slices, records
from trainings import slices_fixture  # noqa: F401

import run_folder
import train
from data.slices import UnpairedBatches
from data.store import SliceStore
from device import Process, start_process
from models import checkpoint
from run_folder import preprocessing_record
from step import train_step
from training import Training
from validation import validate

STILL = replace(CONFIG, flip=True, deform=0.0)


def test_an_overflow_skips_the_update_is_counted_and_is_no_alarm():
    t = alone()
    t.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 127)  # as fp16's, on this machine
    before = copy.deepcopy(t.nets.state_dict())
    for skipped in range(1, 4):
        t.note(train_step(t, *(1e3 * v for v in draw_slices(1))))
        assert all(torch.equal(v, before[k]) for k, v in t.nets.state_dict().items())
        assert t.scaler.get_scale() == 2.0 ** (127 - skipped)
    t.check_finite()
    assert t.watched()["skipped"] == 1
    t.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    t.note(train_step(t, *draw_slices(1)))
    assert t.watched()["skipped"] == 0.75
    plain = alone()
    values = train_step(plain, *draw_slices(1))
    scaled = alone()
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    torch.testing.assert_close(train_step(scaled, *draw_slices(1)), values, rtol=1e-4, atol=1e-5)


def test_two_hundred_steps_in_bf16_stay_finite():
    t = alone(replace(CONFIG, precision="bf16"), steps_per_epoch=200)
    for step in range(200):
        t.note(train_step(t, *draw_slices(1, seed=step)))
    t.check_finite()
    assert t.mean_terms()["cycle_x"] < 1


def test_the_averages_follow_the_generators():
    t = alone()
    before = copy.deepcopy(t.nets.G)
    train_step(t, *draw_slices(1))
    for average, old, new in zip(t.ema.G.parameters(), before.parameters(), t.nets.G.parameters()):
        torch.testing.assert_close(average, 0.1 * old + 0.9 * new)


@pytest.mark.parametrize("options", [{}, {"flip": False, "deform": 1.0}])
def test_augmentation_depends_on_seed_step_and_rank_alone(options):
    real_x, real_y = draw_slices(8)

    def augmented(seed=0, step=0, rank=0):
        t = Training(replace(STILL, **options, seed=seed), Process(rank, 1, CPU), 10)
        t.step = step
        return torch.cat(t.augment(real_x, real_y))

    assert torch.equal(augmented(), augmented())
    assert not torch.equal(augmented(), torch.cat([real_x, real_y]))
    for other in (augmented(seed=1), augmented(step=1), augmented(rank=1)):
        assert not torch.equal(augmented(), other)
    t = alone(replace(STILL, flip=False))
    untouched = t.augment(real_x, real_y)
    assert torch.equal(torch.stack(untouched), torch.stack([real_x, real_y]))


@pytest.mark.parametrize("epoch, epoch_step, wanted", [
    (0, 0, 2e-4),  # start
    (3, 9, 2e-4), (4, 0, 2e-4),  # end of the constant part
    (6, 0, 1e-4),  # middle of the decay
    (7, 9, 2e-4 * 0.1 / 4),  # last step
    (8, 0, 0.0),
])
def test_the_learning_rate_is_constant_then_falls_linearly_to_zero(epoch, epoch_step, wanted):
    t = alone()
    t.epoch, t.epoch_step = epoch, epoch_step
    assert t.learning_rate == pytest.approx(wanted, abs=1e-18)
    train_step(t, *draw_slices(1))
    for optimizer in t.optimizers.values():
        assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(wanted)]


def test_a_run_without_decay_keeps_its_rate_and_one_without_the_constant_part_falls_at_once():
    t = alone(replace(CONFIG, epochs=2, epochs_decay=0))
    t.epoch, t.epoch_step = 1, 9
    assert t.learning_rate == 2e-4
    t = alone(replace(CONFIG, epochs=0, epochs_decay=2))
    assert t.learning_rate == 2e-4
    t.epoch = 1
    assert t.learning_rate == 1e-4


def test_lost_weights_are_found_though_losses_and_gradients_are_finite():
    t = alone()
    t.note(train_step(t, *draw_slices(1)))
    t.check_finite()
    with torch.no_grad():
        next(t.nets.D_X.parameters()).view(-1)[0] = math.nan
    with pytest.raises(FloatingPointError, match="weights of D_X not finite by step 1"):
        t.check_finite()


# ---------------------------------------------------------------------------------- two processes


def digest(nets):
    content = hashlib.sha256()
    for p in nets.parameters():
        content.update(p.detach().cpu().numpy().tobytes())
    return content.hexdigest()


def waits_for_a_run_of_before(process, out):
    """Whether what a run that holds the folder writes within a second is there for this process."""
    if process.is_main:
        held = os.open(out / "run", os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
    process.any(False)
    if process.is_main:
        threading.Timer(1, lambda: ((out / "written").touch(), os.close(held))).start()
    with run_folder.only_writer(out / "run", process):
        return (out / "written").exists()


def one_of_two(rank, port, slices, out):
    """What each of two gloo processes does; its findings go into a file."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    process, store = start_process("cpu"), SliceStore(slices)
    found = {"flags": process.any(rank == 1, False), "gathered": process.gather(rank),
             "mean": process.mean(torch.tensor([float(rank)])).tolist()}

    # the averaged gradient of one step without flips and history
    config = replace(CONFIG, slices=str(slices), run=str(out / "run"), workers=1, flip=False,
                     history_size=0)
    loader = UnpairedBatches(store, batch_size=1, rank=rank, world=2)
    t = Training(config, process, loader.steps_per_epoch)
    train_step(t, *next(loader.batches(0)))
    found["gradients"] = {name: p.grad for name, p in t.nets.named_parameters()}
    found["figures"] = validate(t, store)

    # two epochs of the real loop, in one part and in two
    config = replace(config, flip=True, history_size=4, epochs=1, epochs_decay=1, log_every=4)

    def go_on(config, state=None):
        t = Training(config, process, loader.steps_per_epoch, preprocessing_record(store))
        if state:
            t.load(state)
        log = train.RunLog(Path(config.run), process, t.step)
        assert train.loop(t, loader, store, log, train.StopRequest())
        log.close()
        process.any(False)  # the file is there
        return t

    t = go_on(config)
    found["weights"], found["averages"] = digest(t.nets), digest(t.ema.G)
    parts = replace(config, run=str(out / "parts"))
    go_on(replace(parts, max_steps=5))
    again = go_on(parts, checkpoint.load(out / "parts" / "last.pt", resume=True))
    found["weights in parts"] = digest(again.nets)
    found["rows"] = [loader.rows(0, step) for step in range(loader.steps_per_epoch)]
    found["history"] = t.history["x"].state_dict()["images"]
    again.check_equal()
    with torch.no_grad():
        next(again.nets.G.parameters()).view(-1)[0] += rank * 1e-6
    try:
        again.check_equal()
    except RuntimeError as error:
        found["unequal"] = str(error)
    again.step += rank
    try:
        train.check_place(again)
    except ValueError as error:
        found["elsewhere"] = str(error)

    found["waited"] = waits_for_a_run_of_before(process, out)
    torch.save(found, out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def two_processes(slices, tmp_path_factory):
    """Findings of `one_of_two` on ranks 0 and 1, and the folder with their run."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_of_two, (port, slices, out), nprocs=2)
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in (0, 1)], out


def test_two_processes_end_with_equal_weights(two_processes):
    (first, second), _ = two_processes
    assert first["weights"] == second["weights"] and first["averages"] == second["averages"]
    assert first["weights"] != digest(alone().nets)


def test_two_processes_in_two_parts_equal_those_in_one_part_to_the_bit(two_processes):
    (first, second), out = two_processes
    assert first["weights in parts"] == second["weights in parts"] == first["weights"]
    assert records(out / "parts", "loss") == records(out / "run", "loss")


def test_no_slice_is_seen_by_both_processes_in_an_epoch(two_processes):
    (first, second), _ = two_processes
    for domain in (0, 1):
        seen = [np.concatenate([pair[domain] for pair in found["rows"]])
                for found in (first, second)]
        assert not set(seen[0]) & set(seen[1])
        assert len(set(np.concatenate(seen))) == 18  # and all of them once


def one_with_the_double_batch(store):
    """A training after a step with what the two processes saw in their first."""
    batches = [next(UnpairedBatches(store, batch_size=1, rank=r, world=2).batches(0))
               for r in (0, 1)]
    t = alone(replace(CONFIG, history_size=0))
    train_step(t, *(torch.cat(pair) for pair in zip(*batches)))
    return t


def test_two_processes_gradient_is_that_of_one_with_the_double_batch(two_processes, slices):
    (first, second), _ = two_processes
    t = one_with_the_double_batch(SliceStore(slices))
    for name, p in t.nets.named_parameters():
        torch.testing.assert_close(first["gradients"][name], p.grad, atol=1e-5, rtol=1e-4)
        assert torch.equal(first["gradients"][name], second["gradients"][name])


def test_each_process_keeps_histories_of_its_own_and_the_checkpoint_all_of_them(two_processes):
    (first, second), out = two_processes
    assert not torch.equal(first["history"], second["history"])
    state = checkpoint.load(out / "run" / "last.pt", resume=True)
    for found, kept in zip((first, second), state["history"]):
        assert torch.equal(found["history"], kept["x"]["images"])


def test_validation_does_not_depend_on_how_many_processes_share_it(two_processes, slices):
    (first, second), _ = two_processes
    store = SliceStore(slices)
    t = one_with_the_double_batch(store)
    assert first["figures"] == pytest.approx(validate(t, store), abs=1e-3)
    assert len(first["figures"]) == 12 and second["figures"] == {}


def test_only_the_first_process_writes_and_collectives_reach_all(two_processes):
    (first, second), out = two_processes
    assert first["flags"] == second["flags"] == [True, False]
    assert first["mean"] == second["mean"] == [0.5]
    assert first["gathered"] == [0, 1] and second["gathered"] == []
    steps = [r["step"] for r in records(out / "run", "loss")]
    assert steps == [4, 8, 12, 16]
    log = (out / "run" / "log.txt").read_text()
    assert log.count("validation") == 2


def test_processes_that_begin_at_different_steps_are_refused(two_processes):
    for found in two_processes[0]:
        assert "a folder that all machines share" in found["elsewhere"]


def test_all_processes_wait_for_a_run_of_before_to_end(two_processes):
    assert [found["waited"] for found in two_processes[0]] == [True, True]


def test_weights_that_differ_between_processes_stop_the_run(two_processes):
    for found in two_processes[0]:
        assert "weights differ between processes at step" in found["unequal"]


def test_checkpoints_of_several_processes_have_unwrapped_names(two_processes):
    _, out = two_processes
    state = checkpoint.load(out / "run" / "last.pt", resume=True)
    nets = alone().nets
    assert state["generators"]["G"].keys() == nets.G.state_dict().keys()
    assert state["discriminators"]["D_Y"].keys() == nets.D_Y.state_dict().keys()


def test_one_process_goes_on_where_two_left_off(two_processes, slices):
    """Two processes take 9 steps an epoch, one takes 18: the place in the epochs is kept."""
    _, out = two_processes
    state = checkpoint.load(out / "run" / "last.pt", resume=True)
    state["epoch"], state["sampler"]["epoch"], state["sampler"]["step"] = 1, 1, 4
    t = alone(replace(CONFIG, history_size=4, epochs=1, epochs_decay=1), steps_per_epoch=18)
    t.load(state)
    assert (t.epoch, t.epoch_step, t.step) == (1, 8, 18)
    assert t.learning_rate == pytest.approx(2e-4 * (1 - 8 / 18))
    assert t.last_step == 18 + 10


# ------------------------------------------------------------------------------------------- CUDA


@pytest.mark.cuda
@pytest.mark.skipif(NO_GPU, reason="no CUDA GPU here")
def test_an_overflow_in_fp16_skips_that_optimiser_and_halves_the_scale_once():
    t = Training(replace(CONFIG, precision="fp16"), Process(0, 1, torch.device("cuda", 0)), 10)
    t.scaler = torch.amp.GradScaler("cuda", init_scale=2.0 ** 120)  # overflows in every gradient
    before = copy.deepcopy(t.nets.state_dict())
    train_step(t, *(v.cuda() for v in draw_slices(1)))
    assert all(torch.equal(v, before[k]) for k, v in t.nets.state_dict().items())
    assert t.scaler.get_scale() == 2.0 ** 119


@pytest.mark.cuda
@pytest.mark.skipif(NO_GPU, reason="no CUDA GPU here")
def test_the_scale_of_fp16_is_part_of_the_checkpoint():
    config, process = replace(CONFIG, precision="fp16"), Process(0, 1, torch.device("cuda", 0))
    first, second = (Training(config, process, 10) for _ in range(2))
    first.scaler.scale(torch.ones(1, device="cuda"))
    first.scaler.update(32.0)
    second.load(first.state())
    assert second.scaler.get_scale() == 32.0
