"""Tests of train.py: one step by hand, the schedule, resuming to the bit, errors, two processes."""

import contextlib
import copy
import fcntl
import hashlib
import json
import math
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from commands import TINY, run_command
from painted_store import change_rows, write_store
from PIL import Image
from scipy.stats import wasserstein_distance
from skimage.metrics import structural_similarity
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import health
import run_folder
import train
import validation
from config import TrainConfig
from data.contrast import intensity_quantiles
from data.histogram import StandardRows, find_standard
from data.slices import UnpairedBatches, shown, to_tensor
from data.store import SliceStore
from device import Process, start_process
from losses.history import ImageHistory
from losses.quality import mae, psnr_db
from losses.structure import structure_loss
from models import checkpoint
from run_folder import preprocessing_record
from step import TERMS, WATCHED, train_step
from training import Training
from validation import look, sample_grid, validate

ROOT = Path(train.__file__).parent
CPU = torch.device("cpu")
NO_GPU = not torch.cuda.is_available()
CONFIG = TrainConfig(features=4, blocks=1, precision="fp32", device="cpu", epochs=4, epochs_decay=4)
SPLITS = {"train": ["01", "02", "03"], "val": ["04", "05_ses-a", "05_ses-b"], "test": ["06"]}


@pytest.fixture(scope="session")
def slices(tmp_path_factory):
    """Six slices of each of three subjects to train on, two people to validate on; read only."""
    return write_store(tmp_path_factory.mktemp("painted") / "slices", SPLITS)


@pytest.fixture
def run(slices, tmp_path):
    """Call train.py on the store; the run folder is `tmp_path / "run"` unless named."""
    def call(*options, folder="run", store=slices):
        return run_command(train.main, "--slices", store, "--run", tmp_path / folder, *TINY,
                           "--steps-per-epoch", 5, "--epochs", 4, "--epochs-decay", 4, *options)
    return call


STILL = replace(CONFIG, flip=True, deform=0.0)


def alone(config=CONFIG, steps_per_epoch=10):
    return Training(config, Process(0, 1, CPU), steps_per_epoch)


def draw_slices(n, seed=0, size=32):
    return torch.rand(2, n, 1, size, size,
                      generator=torch.Generator().manual_seed(seed)) * 2 - 1


def records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def same(a, b, at=""):
    """Where two checkpoints' contents first differ; "" where they are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return "" if torch.equal(a, b) else at
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{at}: {sorted(a)} {sorted(b)}"
        return next(filter(None, (same(a[k], b[k], f"{at}/{k}") for k in a)), "")
    if isinstance(a, (list, tuple)):
        pairs = enumerate(zip(a, b, strict=True))
        return next(filter(None, (same(x, y, f"{at}/{i}") for i, (x, y) in pairs)), "")
    return "" if a == b else f"{at}: {a} {b}"


# -------------------------------------------------------------------------------- one step


class Textbook:
    """The update of Zhu et al. 2017 a line a term, every forward on its own, plain Adam."""

    def __init__(self, nets, lambda_identity, history, lr=2e-4, lambda_structure=1.5):
        self.G, self.F, self.D_X, self.D_Y = (copy.deepcopy(net) for net in
                                              (nets.G, nets.F, nets.D_X, nets.D_Y))
        self.generators = [*self.G.parameters(), *self.F.parameters()]
        self.discriminators = [*self.D_X.parameters(), *self.D_Y.parameters()]
        self.adam_g = torch.optim.Adam(self.generators, lr, (0.5, 0.999))
        self.adam_d = torch.optim.Adam(self.discriminators, lr, (0.5, 0.999))
        self.lambda_identity, self.history = lambda_identity, history
        self.lambda_structure = lambda_structure

    def step(self, x, y):
        """Returns the terms in the order of `TERMS`; the gradients stay in the parameters."""
        def l1(a, b):
            return (a - b).abs().mean()

        gan_g = ((self.D_Y(self.G(x)) - 1) ** 2).mean()
        gan_f = ((self.D_X(self.F(y)) - 1) ** 2).mean()
        cycle_x, cycle_y = l1(self.F(self.G(x)), x), l1(self.G(self.F(y)), y)
        same_x = same_y = torch.zeros(())
        loss = gan_g + gan_f + 10 * cycle_x + 10 * cycle_y
        if self.lambda_identity:
            same_x, same_y = l1(self.F(x), x), l1(self.G(y), y)
            loss = loss + self.lambda_identity * (same_x + same_y)
        kept_x = kept_y = torch.zeros(())
        if self.lambda_structure:
            kept_x = structure_loss(x, self.G(x))
            kept_y = structure_loss(y, self.F(y))
            loss = loss + self.lambda_structure * (kept_x + kept_y)
        fake_y, fake_x = self.G(x).detach(), self.F(y).detach()
        self._update(self.adam_g, self.generators, loss)

        old_x, old_y = self.history["x"].query(fake_x), self.history["y"].query(fake_y)
        d_x = (((self.D_X(x) - 1) ** 2).mean() + (self.D_X(old_x) ** 2).mean()) / 2
        d_y = (((self.D_Y(y) - 1) ** 2).mean() + (self.D_Y(old_y) ** 2).mean()) / 2
        self._update(self.adam_d, self.discriminators, d_x + d_y)
        return [gan_g, gan_f, cycle_x, cycle_y, same_x, same_y, kept_x, kept_y, d_x, d_y]

    @staticmethod
    def _update(adam, parameters, loss):
        # only this loss and only these parameters: nothing can come from another step
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            p.grad = gradient
        adam.step()


@pytest.mark.parametrize("lambda_identity, lambda_structure",
                         [(0.1, 1.5), (0.1, 0.0), (0.0, 0.0), (5.0, 3.0)])
@pytest.mark.parametrize("n", [1, 3])
def test_one_step_is_the_textbooks_step(lambda_identity, lambda_structure, n):
    t = alone(replace(CONFIG, lambda_identity=lambda_identity, lambda_structure=lambda_structure))
    book = Textbook(t.nets, lambda_identity, {k: ImageHistory(50) for k in "xy"},
                    lambda_structure=lambda_structure)
    real_x, real_y = draw_slices(n)
    terms = train_step(t, real_x, real_y)[:len(TERMS)]
    wanted = book.step(real_x, real_y)
    torch.testing.assert_close(terms, torch.stack(wanted).detach(), atol=1e-6, rtol=1e-5)
    for name in ("G", "F", "D_X", "D_Y"):
        ours = dict(getattr(t.nets, name).named_parameters())
        for key, theirs in getattr(book, name).named_parameters():
            torch.testing.assert_close(ours[key].grad, theirs.grad, atol=1e-5, rtol=1e-4)
            # Adam's first step is lr times the gradient's sign: compared where that is no noise
            real = theirs.grad.abs() > 1e-5
            assert (ours[key] - theirs)[real].abs().max() < 1e-5 if real.any() else True
            assert (ours[key] - theirs).abs().max() <= 4.1e-4
    assert all(p.requires_grad for p in t.nets.parameters())  # D is no longer frozen
    assert (t.step, t.epoch_step, t.slices_seen) == (1, 1, n)


def test_steps_with_a_full_history_judge_what_the_history_gives_back():
    t = alone(replace(CONFIG, history_size=2, seed=3))
    seeds = {"x": 2 * 3 * 10007, "y": 2 * 3 * 10007 + 1}
    book = Textbook(t.nets, 0.1, {k: ImageHistory(2, seed) for k, seed in seeds.items()})
    replay, old = {k: ImageHistory(2, seed) for k, seed in seeds.items()}, {"x": 0, "y": 0}
    for step in range(6):
        real_x, real_y = draw_slices(2, seed=step)
        values, wanted = train_step(t, real_x, real_y), book.step(real_x, real_y)
        torch.testing.assert_close(values[:len(TERMS)], torch.stack(wanted).detach(), atol=1e-3,
                                   rtol=1e-3)
        for name, history in replay.items():
            new = torch.full((2, 1, 1, 1), float(step))
            old[name] += int((history.query(new) != new).sum())
    assert old["x"] > 0 and old["y"] > 0  # D_X and D_Y did judge older slices


def test_what_is_watched_is_read_off_the_step():
    t = alone(replace(CONFIG, history_size=0))
    real_x, real_y = draw_slices(3)
    with torch.no_grad():
        fake_y, fake_x = t.nets.G(real_x), t.nets.F(real_y)
        scores = {"D_X": (t.nets.D_X(real_x), t.nets.D_X(fake_x)),
                  "D_Y": (t.nets.D_Y(real_y), t.nets.D_Y(fake_y))}
    values = dict(zip((*TERMS, *WATCHED), train_step(t, real_x, real_y).tolist()))
    for net, (real, fake) in scores.items():
        assert values[f"{net}_right_real"] == pytest.approx((real > 0.5).float().mean().item())
        assert values[f"{net}_right_fake"] == pytest.approx((fake < 0.5).float().mean().item())
    for net in ("G", "F", "D_X", "D_Y"):
        norm = sum(p.grad.square().sum() for p in getattr(t.nets, net).parameters()) ** 0.5
        assert values[f"gradient_{net}"] == pytest.approx(norm.item(), rel=1e-5)
    assert values["skipped"] == 0


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


def test_one_step_in_bf16_has_the_losses_of_fp32_within_a_hundredth():
    """From the same weights; longer comparisons are chaotic."""
    config = replace(CONFIG, features=16, blocks=2)
    real_x, real_y = draw_slices(4, size=64)
    wanted, found = (train_step(alone(replace(config, precision=precision)), real_x, real_y)
                     for precision in ("fp32", "bf16"))
    torch.testing.assert_close(found[:len(TERMS)], wanted[:len(TERMS)], rtol=0.01, atol=1e-3)
    assert not torch.equal(found, wanted), "bf16 did take part"


def test_two_hundred_steps_in_bf16_stay_finite():
    t = alone(replace(CONFIG, precision="bf16"), steps_per_epoch=200)
    for step in range(200):
        t.note(train_step(t, *draw_slices(1, seed=step)))
    t.check_finite()
    assert t.mean_terms()["cycle_x"] < 1


def test_neither_optimiser_moves_the_others_nets():
    for silenced, others in (("generators", ("D_X", "D_Y")), ("discriminators", ("G", "F"))):
        t = alone()
        before = copy.deepcopy(t.nets.state_dict())
        t.optimizers[silenced].param_groups[0]["params"] = []
        train_step(t, *draw_slices(1))
        moved = {name.split(".")[0] for name, value in t.nets.state_dict().items()
                 if not torch.equal(value, before[name])}
        assert moved == set(others)


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


@pytest.mark.parametrize("options, shares", [((), (8, 8)), (("--no-balance",), (12, 4))])
def test_volumes_are_seen_equally_often_unless_told_otherwise(
        options, shares, run, tmp_path, monkeypatch):
    uneven = write_store(tmp_path / "uneven", {"train": ["01", "02"], "val": ["03"]},
                         n_slices={"01": 12, "02": 4, "03": 4})
    seen = []

    class Recording(UnpairedBatches):
        def rows(self, epoch, step):
            seen.append(super().rows(epoch, step))
            return seen[-1]

    monkeypatch.setattr(train, "UnpairedBatches", Recording)
    assert run("--steps-per-epoch", 16, "--max-steps", 16, "--workers", 0, "--batch-size", 1,
               *options, store=uneven).code == 0
    for rows in map(np.concatenate, zip(*seen[:16], strict=True)):
        assert (int((rows < 12).sum()), int((rows >= 12).sum())) == shares


# -------------------------------------------------------------------------------- schedule


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


def test_the_rates_of_a_run_are_logged_as_they_were_used(run, tmp_path):
    assert run("--epochs", 1, "--epochs-decay", 1, "--log-every", 1).code == 0
    rates = [r["lr"] for r in records(tmp_path / "run", "schedule")]
    assert rates == pytest.approx([2e-4] * 6 + [2e-4 * (1 - k / 5) for k in (1, 2, 3, 4)])


# --------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_checkpoints_logs_samples_and_tensorboard_files(run, slices, tmp_path):
    outcome = run("--max-steps", 12, "--log-every", 4)
    assert outcome.code == 0 and outcome.err == ""
    folder = tmp_path / "run"
    assert {"last.pt", "best.pt", "log.txt", "metrics.jsonl", "config.json", "samples",
            "tensorboard", "progress", "progress_t1w.gif", "progress_t2w.gif"} <= set(
                os.listdir(folder))
    assert sorted(os.listdir(folder / "samples")) == [f"epoch_000{k}.png" for k in (1, 2, 3)]
    log = (folder / "log.txt").read_text()
    assert "18 training slices of 32 pixels, 18 validation" in log
    assert "1 process x batch 1 = 1 pairs a step; 5 steps an epoch, 12 in all" in log
    assert "epoch 2/8  step 8/12  " in log and " pairs/s  G " in log and "t2w_psnr" in log
    assert [r["step"] for r in records(folder, "loss")] == [4, 8, 12]
    assert [r["step"] for r in records(folder, "validation")] == [5, 10, 12]
    config = json.loads((folder / "config.json").read_text())
    assert config["blocks"] == 1 and set(config) == {f.name for f in fields(TrainConfig)}

    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    scalars = board.Tags()["scalars"]
    assert {f"loss/{term}" for term in TERMS} <= set(scalars)
    for name in ("t2w_ssim", "t2w_psnr_db", "t1w_ssim", "t1w_psnr_db"):
        points = [(e.step, pytest.approx(e.value)) for e in board.Scalars(f"validation/{name}")]
        assert points == [(r["step"], r[name]) for r in records(folder, "validation")]
    for pictures in ("samples", "progress/t1w", "progress/t2w"):
        assert [image.step for image in board.Images(pictures)] == [5, 10, 12]
    assert {name.split("/")[0] for name in scalars} == {
        "loss", "validation", "health", "speed", "schedule", "final"}
    weights = {name: board.Scalars(f"schedule/lambda_{name}")[-1].value
               for name in ("cycle_x", "cycle_y", "identity")}
    assert weights == pytest.approx({"cycle_x": 10, "cycle_y": 10, "identity": 0.1})


def test_intensities_of_real_and_generated_slices_are_histograms_in_tensorboard(run, slices,
                                                                                tmp_path):
    run("--max-steps", 7)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"histograms": 0}).Reload()
    assert sorted(board.Tags()["histograms"]) == [
        f"intensity/{domain}_{kind}" for domain in ("t1w", "t2w") for kind in ("generated", "real")]
    store = SliceStore(slices)
    real = board.Histograms("intensity/t2w_real")
    assert [h.step for h in real] == [5, 7]
    rows = validation.fixed_rows(store, 32)
    inside = (store.t2w[rows].astype(np.float32)[store.mask(rows)] + 1) / 2
    found = real[0].histogram_value
    assert found.num == inside.size
    assert found.sum / found.num == pytest.approx(inside.mean(), abs=0.5 / 64)
    assert found.bucket == list(np.histogram(inside, 64, (0, 1))[0])
    made = [h.histogram_value.bucket for h in board.Histograms("intensity/t2w_generated")]
    assert made[0] != made[1], "the nets have learnt in between"


def test_hyper_parameters_stand_beside_the_last_figures_in_the_same_run(run, tmp_path):
    run("--max-steps", 5, "--lr", 3e-4)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    content = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert start["lr"].number_value == 3e-4 and start["gan_loss"].string_value == "lsgan"
    assert start["flip"].number_value == 1 and start["lambda_cycle"].string_value == "[10.0, 10.0]"
    assert set(start) == {f.name for f in fields(TrainConfig)}
    last = records(tmp_path / "run", "validation")[-1]
    assert board.Scalars("final/t2w_ssim")[0].value == pytest.approx(last["t2w_ssim"])


def test_progress_is_kept_each_epoch_and_shown_on_demand(run, tmp_path):
    folder = tmp_path / "run"
    run("--max-steps", 12)
    kept = sorted(path.name for path in (folder / "progress").iterdir())
    assert kept == [f"step_{step:08d}.npz" for step in (5, 10, 12)]
    before = {domain: (folder / f"progress_{domain}.gif").read_bytes() for domain in ("t1w", "t2w")}
    for path in folder.glob("*.gif"):
        path.unlink()
    outcome = run_command(train.main, "--gif", "--run", folder)  # needs no store
    assert outcome.code == 0 and str(folder / "progress_t2w.gif") in outcome.out
    for domain, content in before.items():
        assert (folder / f"progress_{domain}.gif").read_bytes() == content
        with Image.open(folder / f"progress_{domain}.gif") as gif:
            assert gif.n_frames == 3
    nothing = run_command(train.main, "--gif", "--run", tmp_path / "nowhere")
    assert nothing.code == 2 and "progress: nothing kept there" in nothing.complaint


def test_a_run_in_parts_keeps_the_same_progress_and_drops_what_was_not_saved(run, tmp_path):
    run("--max-steps", 12, folder="whole")
    run("--max-steps", 10)
    folder = tmp_path / "run" / "progress"
    stray = folder / "step_00000011.npz"  # of a run that was killed before it saved
    stray.write_bytes(b"cut off")
    run("--max-steps", 12)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole" / "progress").iterdir()}


def test_a_moment_shows_what_the_averaged_nets_make_of_the_fixed_slices(slices):
    t, store = alone(), SliceStore(slices)
    moment = look(t, store, kept_slices=2, counted=8)
    rows = validation.fixed_rows(store, 2)
    real_x, real_y = (torch.from_numpy(a[rows].astype(np.float32))[:, None]
                      for a in (store.t1w, store.t2w))
    with torch.no_grad():
        G, F = t.ema.G, t.ema.F
        wanted = {"t1w": real_x, "to_t2w": G(real_x), "t1w_again": F(G(real_x)),
                  "t2w": real_y, "to_t1w": F(real_y), "t2w_again": G(F(real_y))}
        for name, slices_ in wanted.items():
            found = getattr(moment, name)
            assert found.dtype == np.uint8
            np.testing.assert_allclose(found / 255, (slices_[:, 0] + 1) / 2, atol=0.51 / 255)
        rows = validation.fixed_rows(store, 8)
        fake = G(torch.from_numpy(store.t1w[rows].astype(np.float32))[:, None])[:, 0]
    values = ((fake + 1) / 2).numpy()[store.mask(rows)]
    assert moment.t2w_counts[1].tolist() == np.histogram(values, 64, (0, 1))[0].tolist()
    assert (moment.step, moment.epoch) == (0, 1)


def test_a_terminal_shows_one_line_and_a_log_one_an_interval(slices, tmp_path):
    """Under a pseudo-terminal the bar has the losses, and the lines of intervals go to log.txt."""
    command = [sys.executable, "train.py", "--slices", slices, "--run", tmp_path / "run", *TINY,
               "--max-steps", 6, "--steps-per-epoch", 6, "--log-every", 2]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    with subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=theirs, stderr=theirs) as p:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # Linux says so when the other end is closed
            while block := os.read(ours, 4096):
                shown += block
        os.close(ours)
    text = shown.decode()
    assert p.returncode == 0 and "100%" in text and "D_Y" in text
    assert "pairs/s" not in text and "validation" in text
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count(" pairs/s  G ") == 3


def test_the_sample_grid_shows_real_translated_cycled_and_identity_slices(slices):
    t, store = alone(), SliceStore(slices)
    grid = sample_grid(t, store, count=2)
    assert grid.shape == (3, 2 * 34 + 2, 8 * 34 + 2)  # 2 pixels around each
    panels = [grid[0, 2:34, 2 + 34 * k:34 + 34 * k] * 2 - 1 for k in range(8)]
    row = store.rows("val")[np.linspace(0, 17, 4).astype(int)[1]]
    real_x, real_y = (torch.from_numpy(a[row].astype(np.float32))[None, None]
                      for a in (store.t1w, store.t2w))
    with torch.no_grad():
        G, F = t.ema.G, t.ema.F
        wanted = [real_x, G(real_x), F(G(real_x)), F(real_x),
                  real_y, F(real_y), G(F(real_y)), G(real_y)]
    for panel, slice_ in zip(panels, wanted):
        torch.testing.assert_close(panel, slice_[0, 0], atol=1e-5, rtol=0)


def test_sample_pictures_are_files_that_open(run, tmp_path):
    run("--max-steps", 1)
    picture = Image.open(tmp_path / "run" / "samples" / "epoch_0001.png")
    assert picture.size == (8 * 34 + 2, 4 * 34 + 2)


def test_validation_figures_are_scikit_images_and_a_person_counts_once(slices):
    t, store = alone(), SliceStore(slices)
    found = validate(t, store)
    people = {}
    for session in store.subjects:
        if session["split"] == "val":
            rows = slice(session["first_row"], session["first_row"] + session["n_slices"])
            real_x, real_y = (torch.from_numpy(a[rows].astype(np.float32))[:, None]
                              for a in (store.t1w, store.t2w))
            with torch.no_grad():
                fake_y = (t.ema.G(real_x)[:, 0].numpy() + 1) / 2
            for fake, real, mask in zip(fake_y, (real_y[:, 0].numpy() + 1) / 2, store.mask(rows)):
                _, similarity = structural_similarity(
                    fake, real, data_range=1, gaussian_weights=True, sigma=1.5,
                    use_sample_covariance=False, full=True)
                psnr = 10 * np.log10(1 / ((fake - real)[mask].astype(float) ** 2).mean())
                people.setdefault(session["subject"], []).append([similarity[mask].mean(), psnr])
    assert len(people) == 2
    wanted = np.mean([np.mean(values, axis=0) for values in people.values()], axis=0)
    assert found["t2w_ssim"] == pytest.approx(wanted[0], abs=1e-5)
    assert found["t2w_psnr_db"] == pytest.approx(wanted[1], abs=1e-4)


def test_validation_shows_the_nets_standard_histograms_and_compares_with_real_ones(slices):
    store = SliceStore(slices)
    standard = StandardRows(store, find_standard(store))
    t = Training(CONFIG, Process(0, 1, CPU), 10, standard=standard)
    people = {}
    for session in (s for s in store.subjects if s["split"] == "val"):
        rows = session["first_row"] + np.arange(session["n_slices"])
        mask = torch.from_numpy(store.mask(rows))[:, None]
        given, real = shown(to_tensor(store.t1w[rows]), rows, "t1w", standard), store.t2w[rows]
        with torch.no_grad():
            fake, again = t.ema.G(given), t.ema.F(t.ema.G(given))
        people.setdefault(session["subject"], []).append(torch.stack([
            psnr_db((fake + 1) / 2, (to_tensor(real) + 1) / 2, mask),
            mae((again + 1) / 2, (given + 1) / 2, mask)], dim=1))
    wanted = torch.stack([torch.cat(found).mean(0) for found in people.values()]).mean(0)
    found = validate(t, store)
    assert found["t2w_psnr_db"] == pytest.approx(float(wanted[0]), abs=1e-4)
    assert found["t2w_cycle_error"] == pytest.approx(float(wanted[1]), abs=1e-6)
    assert found["t2w_psnr_db"] != pytest.approx(validate(alone(), store)["t2w_psnr_db"], abs=1e-3)
    plain, given = sample_grid(alone(), store), sample_grid(t, store)
    assert plain.shape == given.shape and not torch.equal(plain, given)


def test_a_checkpoint_records_the_histograms_that_its_nets_were_shown(run, slices, tmp_path):
    run("--max-steps", 1)
    assert run("--max-steps", 1, "--standardise", "none", folder="plain").code == 0
    standard, plain = (checkpoint.load(tmp_path / folder / "best.pt")["preprocessing"]
                       for folder in ("run", "plain"))
    assert standard["standard"] == find_standard(SliceStore(slices), ["t1w"]).record()
    assert "standard" not in plain
    others = write_store(tmp_path / "others", {**SPLITS, "train": ["01", "02", "06"],
                                               "test": ["03"]})
    assert run("--max-steps", 2, "--override", store=others).code == 0
    again = checkpoint.load(tmp_path / "run" / "last.pt")["preprocessing"]
    assert again["standard"] == standard["standard"]  # the nets know no other


def test_validation_figures_that_need_no_pairs(slices):
    store = SliceStore(slices)
    t = Training(CONFIG, Process(0, 1, CPU), 10, quantiles=intensity_quantiles(store))
    found = validate(t, store)
    errors, distances, people = [], [], {s["subject"] for s in store.subjects
                                         if s["split"] == "val"}
    training = store.rows("train")
    real = np.asarray(store.t1w, np.float32)[training][store.mask(training)]
    for person in sorted(people):
        rows = np.concatenate([np.arange(s["first_row"], s["first_row"] + s["n_slices"])
                               for s in store.subjects if s["subject"] == person])
        mask, real_y = store.mask(rows), torch.from_numpy(store.t2w[rows].astype(np.float32))
        with torch.no_grad():
            fake_x = t.ema.F(real_y[:, None])
            cycled_y = t.ema.G(fake_x)[:, 0]
        difference = (cycled_y - real_y).abs().numpy() / 2
        errors.append(np.mean([d[m].mean() for d, m in zip(difference, mask)]))
        distances.append(wasserstein_distance(fake_x[:, 0].numpy()[mask], real) / 2)
    assert found["t1w_cycle_error"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert found["t1w_histogram_distance"] == pytest.approx(np.mean(distances), rel=0.02)
    without = validate(alone(), store)  # nothing to compare with
    assert set(found) - set(without) == {"t2w_histogram_distance", "t1w_histogram_distance"}


def test_best_pt_is_the_step_of_the_best_validation_ssim(run, tmp_path):
    assert run("--lr", 0.002, "--epochs", 5, "--epochs-decay", 0, "--keep-best", 2).code == 0
    folder = tmp_path / "run"
    validated = records(folder, "validation")
    best = max(validated, key=lambda r: r["t2w_ssim"])
    state = checkpoint.load(folder / "best.pt")
    assert state["step"] == best["step"]
    assert state["best"]["t2w_ssim"] == best["t2w_ssim"]
    top = sorted(validated, key=lambda r: -r["t2w_ssim"])[:2]
    assert set(folder.glob("best_*.pt")) == {
        folder / f"best_{r['t2w_ssim']:.4f}_{r['step'] // 5:04d}.pt" for r in top}


def test_the_top_few_are_kept_the_others_go_and_an_epoch_stands_once(tmp_path):
    t = alone(replace(CONFIG, run=str(tmp_path), keep_best=2))

    def names():
        return sorted(p.name for p in tmp_path.glob("*.pt"))

    for epoch, value in enumerate((0.5, 0.7, 0.6)):
        t.epoch, t.step = epoch, 10 * epoch
        train.save_best(t, {"t2w_ssim": value, "t2w_psnr_db": 20.0})
    assert names() == ["best.pt", "best_0.6000_0003.pt", "best_0.7000_0002.pt"]
    assert checkpoint.load(tmp_path / "best.pt")["epoch"] == 2
    # the third epoch goes on after --max-steps, and is judged again at its end
    train.save_best(t, {"t2w_ssim": 0.8, "t2w_psnr_db": 20.0})
    assert names() == ["best.pt", "best_0.7000_0002.pt", "best_0.8000_0003.pt"]
    assert checkpoint.load(tmp_path / "best.pt")["best"]["t2w_ssim"] == 0.8
    train.save_best(t, {"t2w_ssim": 0.80001, "t2w_psnr_db": 20.0})  # the same name
    assert names() == ["best.pt", "best_0.7000_0002.pt", "best_0.8000_0003.pt"]
    assert t.best["kept"] == [[0.80001, 3], [0.7, 2]]


def test_without_validation_subjects_best_pt_is_the_latest(run, tmp_path):
    store = write_store(tmp_path / "slices", {"train": ["01", "02"], "test": ["03"]})
    outcome = run("--max-steps", 7, store=store)
    assert outcome.code == 0 and "no subjects: best.pt is the latest" in outcome.out
    assert checkpoint.load(tmp_path / "run" / "best.pt")["step"] == 7
    assert not list((tmp_path / "run").glob("best_*.pt"))


def test_a_checkpoint_holds_what_the_design_says_in_plain_types_and_plain_names(run, tmp_path):
    run("--max-steps", 2)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert set(checkpoint.RESUME_KEYS) == set(state)
    assert state["slices_seen"] == 2 and state["preprocessing"]["subjects"]["train"] == [
        "painted_sub-01", "painted_sub-02", "painted_sub-03"]
    nets = alone().nets
    for name in ("G", "F"):
        assert state["generators"][name].keys() == getattr(nets, name).state_dict().keys()
        assert state["ema"][name].keys() == getattr(nets, name).state_dict().keys()
    for name in ("D_X", "D_Y"):
        assert state["discriminators"][name].keys() == getattr(nets, name).state_dict().keys()
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert set(best) == set(checkpoint.INFERENCE_KEYS)


# ------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("first, workers", [(7, 0), (10, 2)], ids=["mid-epoch", "epoch's end"])
def test_a_run_in_two_parts_equals_one_in_one_part_to_the_bit(run, tmp_path, first, workers):
    options = ["--history-size", 3, "--batch-size", 2, "--log-every", 3, "--epochs", 2,
               "--epochs-decay", 2, "--workers", workers]
    assert run(*options, "--max-steps", 14, folder="whole").code == 0
    assert run(*options, "--max-steps", first, folder="parts").code == 0
    assert run(*options, "--max-steps", 14, "--resume", folder="parts").code == 0
    whole, parts = (torch.load(tmp_path / f / "last.pt", weights_only=True)
                    for f in ("whole", "parts"))
    assert whole["history"][0]["x"]["count"] == 3
    for key in ("step", "epoch", "slices_seen", "generators", "discriminators", "ema",
                "optimizers", "schedulers", "scaler", "history", "sampler"):
        assert same(whole[key], parts[key], key) == ""
    for kind in ("loss", "schedule"):
        assert records(tmp_path / "whole", kind) == records(tmp_path / "parts", kind)
    steps = [r["step"] for r in records(tmp_path / "parts", "loss")]
    assert steps == [3, 6, 9, 12]


def test_a_strictly_unpaired_run_is_one_from_the_first_step(run, slices, tmp_path):
    assert run("--max-steps", 3, "--strict-unpaired").code == 0
    assert run("--max-steps", 3, folder="other").code == 0
    strict, other = (checkpoint.load(tmp_path / name / "last.pt") for name in ("run", "other"))
    assert same(strict["generators"], other["generators"])
    assert strict["config"]["strict_unpaired"]
    refused = run("--max-steps", 5)
    assert refused.code == 2 and "--strict-unpaired True (now False)" in refused.complaint


def test_health_is_logged_each_epoch_and_warnings_reach_log_and_metrics(run, tmp_path):
    outcome = run("--max-steps", 10)
    found = records(tmp_path / "run", "health")
    assert [r["step"] for r in found] == [5, 10]
    assert {*WATCHED, "waiting", "peak_memory_gib"} <= found[0].keys()
    assert 0 <= found[0]["D_X_right_real"] <= 1 and 0.1 < found[0]["peak_memory_gib"] < 64
    judged = records(tmp_path / "run", "validation")
    for record, health_of in zip(judged, found):
        said = [r["text"] for r in records(tmp_path / "run", "warning")
                if r["step"] == record["step"]]
        assert said == health.warnings({**health_of, **record})
        assert all(f"warning: epoch {record['step'] // 5}: {line}" in outcome.out for line in said)
    assert records(tmp_path / "run", "warning"), "nets of ten steps translate nothing"


def test_nothing_is_left_to_train_at_the_end_and_more_steps_or_epochs_go_on(run, tmp_path):
    options = ["--epochs", 1, "--epochs-decay", 1]
    assert run(*options).code == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    outcome = run(*options)
    assert outcome.code == 0 and "nothing left to train: step 10 of 10 is done" in outcome.out
    assert run(*options, "--max-steps", 4).out.count("nothing left to train") == 1
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert run("--epochs", 1, "--epochs-decay", 2, "--log-every", 1).code == 0
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] == 15
    # the rate is the new schedule's from the first step on, not the old one's zero
    rates = [r["lr"] for r in records(tmp_path / "run", "schedule")]
    assert rates == pytest.approx([2e-4 * k / 10 for k in (5, 4, 3, 2, 1)])


def test_steps_that_a_killed_run_logged_but_did_not_save_are_logged_once(run, tmp_path):
    run("--max-steps", 4, "--log-every", 1)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as metrics:
        metrics.write('{"kind": "loss", "step": 5, "G": 9}\n{"kind": "loss", "st')
    run("--max-steps", 6, "--log-every", 1)
    assert [r["step"] for r in records(tmp_path / "run", "loss")] == [1, 2, 3, 4, 5, 6]


def test_an_epoch_that_was_judged_but_not_saved_as_judged_is_logged_once(run, tmp_path):
    """Killed after the validation's lines and before last.pt, which is of the epoch's last step."""
    run("--max-steps", 10)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    judged = [line for line in lines if json.loads(line)["step"] == 10
              and json.loads(line)["kind"] in ("validation", "health", "warning")]
    state = checkpoint.load(tmp_path / "run" / "last.pt", resume=True)
    state["best"]["judged_step"] = 5  # as a save within the epoch, at its last step, has it
    state["sampler"].update(epoch=1, step=5, epoch_counted=5)
    checkpoint.save(tmp_path / "run" / "last.pt", state)
    assert run("--max-steps", 10).code == 0
    again = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in again if json.loads(line)["step"] == 10]
    assert kinds.count("validation") == kinds.count("health") == 1 and len(judged) >= 2
    assert len([r for r in records(tmp_path / "run", "validation")]) == 2


def test_changed_options_are_refused_by_name_and_taken_with_override(run, tmp_path):
    run("--max-steps", 2)
    outcome = run("--max-steps", 4, "--lr", 0.001, "--betas", 0.9, 0.99, "--history-size", 7)
    assert outcome.code == 2
    for part in ("last.pt: was trained with", "--lr 0.0002 (now 0.001)",
                 "--history-size 50 (now 7)", "--betas [0.5, 0.999] (now [0.9, 0.99])",
                 "--override"):
        assert part in outcome.complaint
    outcome = run("--max-steps", 4, "--lr", 0.001, "--betas", 0.9, 0.99, "--history-size", 7,
                  "--batch-size", 2, "--gan-loss", "hinge", "--no-flip", "--override",
                  "--log-every", 1)
    assert outcome.code == 0
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert [r["lr"] for r in records(tmp_path / "run", "schedule")] == [0.001, 0.001]
    for optimizer in state["optimizers"].values():
        assert tuple(optimizer["param_groups"][0]["betas"]) == (0.9, 0.99)
        assert optimizer["param_groups"][0]["lr"] == 0.001
    assert state["history"][0]["x"]["size"] == 7
    assert state["slices_seen"] == 2 + 2 * 2


def test_a_checkpoint_from_before_an_option_goes_on_without_it(run, tmp_path):
    run("--max-steps", 2, "--deform", 0, "--start-pairs", 0)
    state = checkpoint.load(tmp_path / "run" / "last.pt", resume=True)
    for name in ("deform", "start_pairs"):
        del state["config"][name]
    for sums in ("sums", "epoch_sums"):  # of fewer terms than now
        state["sampler"][sums] = [part[:-2] for part in state["sampler"][sums]]
    checkpoint.save(tmp_path / "run" / "last.pt", state)
    outcome = run("--max-steps", 3, "--deform", 1)
    assert outcome.code == 2
    assert "--start-pairs 0 (now 500), --deform 0.0 (now 1.0); give these" in outcome.complaint
    assert run("--max-steps", 3, "--deform", 0, "--start-pairs", 0).code == 0


def test_the_nets_of_a_run_cannot_change_even_with_override(run):
    run("--max-steps", 1)
    outcome = run("--max-steps", 2, "--features", 6, "--override")
    assert outcome.code == 2
    assert "--features 4 (now 6)" in outcome.complaint and "--override" not in outcome.complaint


def test_options_that_change_nothing_that_is_learnt_may_differ(run):
    run("--max-steps", 1)
    outcome = run("--max-steps", 2, "--workers", 2, "--log-every", 1, "--save-minutes", 0,
                  "--keep-best", 1, "--epochs", 9)
    assert outcome.code == 0


def test_resume_without_anything_to_resume_is_an_error(run, tmp_path):
    for resume in (["--resume"], ["--resume", tmp_path / "other" / "last.pt"]):
        outcome = run("--max-steps", 1, *resume)
        assert outcome.code == 2
        assert "last.pt: no such checkpoint" in outcome.complaint
    assert not (tmp_path / "run").exists()


def test_a_run_can_go_on_in_another_folder(run, tmp_path):
    run("--max-steps", 3, folder="old")
    assert run("--max-steps", 5, "--resume", tmp_path / "old" / "last.pt", folder="new").code == 0
    assert checkpoint.load(tmp_path / "new" / "last.pt")["step"] == 5
    assert (tmp_path / "new" / "best.pt").exists()


def test_a_best_pt_cannot_be_resumed(run, tmp_path):
    run("--max-steps", 1)
    outcome = run("--max-steps", 2, "--resume", tmp_path / "run" / "best.pt")
    assert outcome.code == 2 and "resume from last.pt" in outcome.complaint


def damage(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    for place in range(middle, middle + 256):  # a single byte may lie in the zip's padding
        content[place] ^= 1
    path.write_bytes(content)


def test_a_damaged_last_pt_falls_back_to_the_one_before_and_ends_alike(run, tmp_path):
    options = ["--max-steps", 9, "--history-size", 3]
    run(*options, folder="whole")
    run(*options)
    damage(tmp_path / "run" / "last.pt")
    outcome = run(*options)
    assert outcome.code == 0
    assert "damaged" in outcome.out and "going on from" in outcome.out
    assert "last.previous.pt, step 5" in outcome.out
    whole, again = (torch.load(tmp_path / f / "last.pt", weights_only=True)
                    for f in ("whole", "run"))
    for key in ("generators", "discriminators", "optimizers", "history", "ema"):
        assert same(whole[key], again[key], key) == ""


def test_a_run_killed_between_the_two_renames_goes_on_from_the_one_before(run, tmp_path):
    run("--max-steps", 7)
    (tmp_path / "run" / "last.pt").unlink()
    outcome = run("--max-steps", 9)
    assert outcome.code == 0 and "last.previous.pt, step 5" in outcome.out


def test_two_damaged_checkpoints_are_one_error(run, tmp_path):
    run("--max-steps", 7)
    damage(tmp_path / "run" / "last.pt")
    damage(tmp_path / "run" / "last.previous.pt")
    outcome = run("--max-steps", 9)
    assert outcome.code == 2 and "last.previous.pt: not a checkpoint" in outcome.complaint


@pytest.mark.parametrize("content, said", [
    (b"some text", "not a checkpoint of this program"), (b"", "not a checkpoint of this program"),
    ({"state_dict": {}}, "not a checkpoint of this program"),
    ({"format": {"name": checkpoint.FORMAT, "version": 99}}, "version 99, this program reads"),
], ids=["text", "empty", "another program's", "another version's"])
def test_a_checkpoint_that_is_none_is_one_error(run, tmp_path, content, said):
    path = tmp_path / "other.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    outcome = run("--max-steps", 1, "--resume", path)
    assert outcome.code == 2 and said in outcome.complaint


def test_another_store_is_refused(run, tmp_path):
    run("--max-steps", 1)
    larger = write_store(tmp_path / "larger", SPLITS, size=40)
    outcome = run("--max-steps", 2, "--override", store=larger)
    assert outcome.code == 2
    assert "made with size 40, " in outcome.complaint and "trained on 32" in outcome.complaint

    others = write_store(tmp_path / "others", {**SPLITS, "train": ["01", "02", "06"],
                                               "test": ["03"]})
    outcome = run("--max-steps", 2, store=others)
    assert outcome.code == 2 and "painted_sub-03 for one" in outcome.complaint
    assert run("--max-steps", 2, "--override", store=others).code == 0
    state = checkpoint.load(tmp_path / "run" / "best.pt")  # has seen all four by now
    assert state["preprocessing"]["subjects"]["train"] == [
        f"painted_sub-0{k}" for k in (1, 2, 3, 6)]


def test_other_validation_subjects_are_refused_or_judge_from_the_beginning(run, tmp_path):
    run("--max-steps", 5)
    others = write_store(tmp_path / "others", {**SPLITS, "val": ["06"], "test": ["04"]})
    outcome = run("--max-steps", 10, store=others)
    assert outcome.code == 2 and "its val split differs" in outcome.complaint
    path = tmp_path / "run" / "last.pt"
    state = checkpoint.load(path, resume=True)
    state["best"]["t2w_ssim"] = 0.999  # of heads that are easy, no bar for the new ones
    checkpoint.save(path, state)
    assert run("--max-steps", 10, "--override", store=others).code == 0
    state = checkpoint.load(tmp_path / "run" / "best.pt")
    assert state["step"] == 10 and state["best"]["t2w_ssim"] < 0.999
    assert state["preprocessing"]["subjects"]["val"] == ["painted_sub-06"]
    # a restart with the same line, as torchrun does it, is no change: the bar stays
    state = checkpoint.load(path, resume=True)
    state["best"]["t2w_ssim"] = 0.999
    checkpoint.save(path, state)
    before = (tmp_path / "run" / "best.pt").read_bytes()
    assert run("--max-steps", 15, "--override", store=others).code == 0
    assert checkpoint.load(path, resume=True)["best"]["t2w_ssim"] == 0.999
    assert (tmp_path / "run" / "best.pt").read_bytes() == before


def test_a_run_whose_last_pt_is_gone_is_not_written_over(run, tmp_path):
    run("--max-steps", 10)
    folder = tmp_path / "run"
    for path in folder.glob("last*.pt"):
        path.unlink()
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    outcome = run("--max-steps", 5)
    assert outcome.code == 2 and "best.pt: is there and last.pt is not" in outcome.complaint
    assert before == {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert run("--max-steps", 5, folder="another").code == 0


def test_a_run_killed_in_its_first_epoch_begins_again(run, tmp_path):
    run("--max-steps", 5)
    for path in (tmp_path / "run").glob("last*.pt"):
        path.unlink()  # best.pt is written just before it
    assert run("--max-steps", 5).code == 0


# ------------------------------------------------------------------------------------ stopping


@pytest.fixture
def terminate_soon(tmp_path):
    """Send this process SIGTERM once the run has logged a step; start it before the run."""
    def wait_and_send():
        metrics = tmp_path / "run" / "metrics.jsonl"
        for _ in range(6000):
            if metrics.exists() and metrics.stat().st_size:
                return os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # a run that ends early harms nobody
    thread = threading.Thread(target=wait_and_send)
    yield thread
    thread.join()
    signal.signal(signal.SIGTERM, before)


def test_a_terminated_run_saves_and_the_same_command_goes_on_to_the_same_end(
        run, tmp_path, terminate_soon):
    options = ["--steps-per-epoch", 0, "--max-steps", 45, "--log-every", 1, "--history-size", 3]
    terminate_soon.start()
    outcome = run(*options)
    stopped_at = checkpoint.load(tmp_path / "run" / "last.pt")["step"]
    assert outcome.code == 1 and stopped_at < 45
    assert f"stopped at step {stopped_at} of 45" in outcome.out and outcome.err == ""
    assert run(*options).code == 0
    assert run(*options, folder="whole").code == 0
    whole, parts = (torch.load(tmp_path / f / "last.pt", weights_only=True)
                    for f in ("whole", "run"))
    for key in ("generators", "discriminators", "optimizers", "history", "ema", "sampler"):
        assert same(whole[key], parts[key], key) == ""
    assert records(tmp_path / "whole", "loss") == records(tmp_path / "run", "loss")


def test_a_run_stopped_at_an_epochs_last_step_is_validated_when_it_goes_on(slices, tmp_path):
    config = replace(CONFIG, slices=str(slices), run=str(tmp_path), workers=0)
    store = SliceStore(slices)
    loader = UnpairedBatches(store, batch_size=1, steps_per_epoch=5)
    t = Training(config, Process(0, 1, CPU), 5, preprocessing_record(store))
    t.config = replace(config, epochs=1, epochs_decay=0)
    log = train.RunLog(tmp_path, t.process, 0)

    class StopAtFive(train.StopRequest):
        asked = property(lambda self: t.step == 5, lambda self, value: None)

    assert not train.loop(t, loader, store, log, StopAtFive())
    assert t.best["judged_step"] == 0
    log.close()
    outcome = run_command(train.main, "--slices", slices, "--run", tmp_path, *TINY, "--epochs", 1,
                          "--epochs-decay", 0, "--steps-per-epoch", 5, "--override")
    assert outcome.code == 0 and "nothing left" not in outcome.out
    assert [r["step"] for r in records(tmp_path, "validation")] == [5]
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 5


def test_a_run_stopped_while_it_validates_ends_at_once_and_judges_later(
        run, tmp_path, monkeypatch):
    """The signal comes with the first of two subjects; the second one is not waited for."""
    judge, judged = validation._validate_subject, []

    def interrupted(*arguments):
        judged.append(judge(*arguments))
        if len(judged) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return judged[-1]

    monkeypatch.setattr(validation, "_validate_subject", interrupted)
    outcome = run("--max-steps", 10)
    assert outcome.code == 1 and "stopped at step 5 of 10" in outcome.out and len(judged) == 1
    assert records(tmp_path / "run", "validation") == []
    assert run("--max-steps", 10).code == 0 and run("--max-steps", 10, folder="whole").code == 0
    assert records(tmp_path / "run", "validation") == records(tmp_path / "whole", "validation")
    whole, parts = (torch.load(tmp_path / f / "last.pt", weights_only=True)
                    for f in ("whole", "run"))
    for key in ("generators", "ema", "optimizers", "history", "sampler", "best"):
        assert same(whole[key], parts[key], key) == ""


def test_a_second_run_in_one_folder_is_turned_away(run, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    assert run("--max-steps", 1).code == 0
    monkeypatch.setattr(run_folder.only_writer.__wrapped__, "__defaults__", (0.3,))
    handle = os.open(tmp_path / "run", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        outcome = run("--max-steps", 2)
        assert outcome.code == 2 and "another train.py is writing there" in outcome.complaint
    finally:
        os.close(handle)
    assert run("--max-steps", 2).code == 0


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


def test_a_checkpoint_says_what_its_training_subjects_were_like(run, slices, tmp_path):
    run("--max-steps", 1)
    record = checkpoint.load(tmp_path / "run" / "best.pt")["preprocessing"]["training"]
    store = SliceStore(slices)
    first = np.concatenate([((store.t1w[rows].astype(np.float32) + 1) / 2)[store.mask(rows)][None]
                            for rows in [store.rows("train")[:6]]])
    assert record["subjects"] == 3 and len(record["t1w"]["mean"]) == len(record["percentiles"])
    median = record["percentiles"].index(50)
    assert abs(np.median(first) - record["t1w"]["mean"][median]) < 0.1


def test_the_signal_handlers_of_before_come_back(run):
    def mine(*_):
        pass

    before = signal.signal(signal.SIGINT, mine)
    try:
        run("--max-steps", 1)
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


# -------------------------------------------------------------------------------------- errors


def test_losses_that_are_nan_stop_the_run_by_name_in_one_line(run, tmp_path):
    store = write_store(tmp_path / "slices", {"train": ["01", "02"], "val": ["03"]})
    change_rows(store, "t1w.npy", slice(0, 12), np.nan)
    outcome = run("--max-steps", 5, "--log-every", 2, store=store)
    assert outcome.code == 1
    assert ("G, cycle_x, identity_x, structure_x, D_X, D_Y not finite at step 1 (epoch 1)"
            in outcome.complaint)
    x, y = UnpairedBatches(SliceStore(store), batch_size=1).rows(0, 0)
    assert (f"slices t1w row {x[0]} (painted 0{1 + x[0] // 6}_T1w.nii.gz); t2w row {y[0]} "
            f"(painted 0{1 + y[0] // 6}_T2w.nii.gz)") in outcome.complaint
    assert not list((tmp_path / "run").glob("*.pt"))
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_lost_weights_do_not_replace_good_ones(run, tmp_path):
    run("--max-steps", 2)
    good = (tmp_path / "run" / "last.pt").read_bytes()
    # the losses of step 3 are finite, its gradients are not; --save-minutes 0 saves every step
    outcome = run("--max-steps", 9, "--lambda-cycle", 1e39, "--override", "--save-minutes", 0)
    assert outcome.code == 1
    assert "gradient_G, gradient_F not finite at step 3" in outcome.complaint
    assert (tmp_path / "run" / "last.pt").read_bytes() == good
    # nor are they judged where the run ends with that step
    checkpoints = sorted((tmp_path / "run").glob("*.pt"))
    outcome = run("--max-steps", 3, "--lambda-cycle", 1e39, "--override")
    assert outcome.code == 1 and "gradient_G, gradient_F not" in outcome.complaint
    assert (tmp_path / "run" / "last.pt").read_bytes() == good
    assert sorted((tmp_path / "run").glob("*.pt")) == checkpoints
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_lost_weights_are_found_though_losses_and_gradients_are_finite():
    t = alone()
    t.note(train_step(t, *draw_slices(1)))
    t.check_finite()
    with torch.no_grad():
        next(t.nets.D_X.parameters()).view(-1)[0] = math.nan
    with pytest.raises(FloatingPointError, match="weights of D_X not finite by step 1"):
        t.check_finite()


@pytest.mark.parametrize("options, said", [
    (["--batch-size", 0], "--batch-size 0: must be at least 1"),
    (["--batch-size", 19], "has 18 slices, a step of 1 x 19 needs 19"),
    (["--epochs", 0, "--epochs-decay", 0], "nothing to train"),
    (["--lr", 2], "--lr 2.0"), (["--lr", "nan"], "--lr nan"), (["--ema", 1], "--ema 1.0"),
    (["--lambda-identity", "nan"], "--lambda-identity nan"),
    (["--lambda-cycle", "inf"], "--lambda-cycle"), (["--lambda-cycle", 1, 2, 3], "one or two"),
    (["--betas", 0.5], "--betas (0.5,)"), (["--betas", 0.5, 1], "--betas (0.5, 1.0)"),
    (["--history-size", -1], "--history-size -1"), (["--seed", -1], "--seed -1"),
    (["--gan-loss", "l2"], "invalid choice"), (["--device", "gpu"], "--device gpu"),
    (["--precision", "fp16"], "needs a CUDA device"), (["--steps", 5], "--steps"),
])
def test_options_that_cannot_work_are_one_error_before_anything_is_written(run, tmp_path, options,
                                                                           said):
    outcome = run("--max-steps", 1, *options)
    assert outcome.code == 2 and said in outcome.complaint
    assert not (tmp_path / "run").exists()


def test_a_store_that_is_none_is_one_error(run, tmp_path):
    outcome = run(store=tmp_path / "nothing")
    assert outcome.code == 2 and "no slice store there" in outcome.complaint
    (tmp_path / "run").write_text("a file")
    outcome = run("--max-steps", 1)
    assert outcome.code == 2 and "is a file; name a folder" in outcome.complaint


def test_a_store_without_training_subjects_is_one_error(run, tmp_path):
    untrained = write_store(tmp_path / "untrained", {"val": ["04"], "test": ["06"]})
    outcome = run("--max-steps", 1, store=untrained)
    assert outcome.code == 2 and "the train split has 0 slices" in outcome.complaint


def test_no_constant_part_is_fine(run):
    assert run("--epochs", 0, "--epochs-decay", 1).code == 0


def test_options_come_from_a_file_and_the_command_line_stands_above_it(run, tmp_path):
    (tmp_path / "c.toml").write_text("lr = 1e-3\nbatch-size = 2\nlambda_cycle = [5, 7]\n"
                                     "flip = false\nfeatures = 8\n")
    assert run("--max-steps", 1, "--config", tmp_path / "c.toml", "--lr", 5e-4).code == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["lr"], config["batch_size"], config["flip"]) == (5e-4, 2, False)
    assert config["lambda_cycle"] == [5.0, 7.0] and config["features"] == 4, "TINY names features"
    again = run("--config", tmp_path / "run" / "config.json", folder="again")
    assert again.code == 0
    repeated = json.loads((tmp_path / "again" / "config.json").read_text())
    assert repeated == {**config, "run": str(tmp_path / "again"), "epochs": 4, "epochs_decay": 4,
                        "steps_per_epoch": 5}


@pytest.mark.parametrize("name, text, said", [
    ("c.toml", "lambda_cyle = 1", "'lambda_cyle' is no option of train.py; is lambda_cycle meant?"),
    ("c.toml", "lr = 'fast'", "lr is 'fast', should be like 0.0002"),
    ("c.toml", "batch_size = 2.5", "batch_size is 2.5, should be like 1"),
    ("c.toml", "flip = 1", "flip is 1, should be like True"),
    ("c.toml", "epochs = true", "epochs is True, should be like 100"),
    ("c.toml", "lr = -1", "--lr -1.0"),
    ("c.toml", "lr =", "c.toml: not TOML"), ("c.json", "{", "c.json: not JSON"),
    ("c.toml", None, "c.toml: no such file"),
])
def test_a_config_file_that_cannot_be_used_is_one_error(run, tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    outcome = run("--config", tmp_path / name)
    assert outcome.code == 2 and said in outcome.complaint
    assert not (tmp_path / "run").exists()


def test_run_folder_and_checkpoint_say_what_they_were_made_with(run, tmp_path):
    run("--max-steps", 1)
    found = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert found["torch"] == torch.__version__ and found["precision"] == "float32"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert found["commit"] == commit.stdout.strip()
    for name in ("last", "best"):
        assert checkpoint.load(tmp_path / "run" / f"{name}.pt")["format"]["made_with"] == found


def test_training_imports_no_imaging_libraries():
    program = ("import sys, train\n"
               "others = 'nibabel', 'SimpleITK', 'scipy', 'matplotlib', 'HD_BET', 'nilearn'\n"
               "print([name for name in others if name in sys.modules])")
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True,
                           text=True, check=True)
    assert found.stdout.strip() == "[]"


# --------------------------------------------------------------------------------- two processes


def digest(nets):
    content = hashlib.sha256()
    for p in nets.parameters():
        content.update(p.detach().cpu().numpy().tobytes())
    return content.hexdigest()


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


def test_two_processes_gradient_is_that_of_one_with_the_double_batch(two_processes, slices):
    (first, second), _ = two_processes
    store = SliceStore(slices)
    batches = [next(UnpairedBatches(store, batch_size=1, rank=r, world=2).batches(0))
               for r in (0, 1)]
    t = alone(replace(CONFIG, history_size=0))
    train_step(t, *(torch.cat(pair) for pair in zip(*batches)))
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
    batches = [next(UnpairedBatches(store, batch_size=1, rank=r, world=2).batches(0))
               for r in (0, 1)]
    t = alone(replace(CONFIG, history_size=0))
    train_step(t, *(torch.cat(pair) for pair in zip(*batches)))
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


# ------------------------------------------------------------------------------------------ CUDA


@pytest.mark.cuda
@pytest.mark.skipif(NO_GPU, reason="no CUDA GPU here")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_on_a_gpu_moves_all_nets_and_agrees_with_the_cpus(precision):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    on_gpu = Training(replace(CONFIG, precision=precision), Process(0, 1, torch.device("cuda", 0)),
                      10)
    on_cpu = alone()
    before = copy.deepcopy(on_gpu.nets.state_dict())
    real_x, real_y = draw_slices(2)
    wanted = train_step(on_cpu, real_x, real_y)
    found = train_step(on_gpu, real_x.cuda(), real_y.cuda())
    close = 1e-4 if precision == "fp32" else 0.03
    n = len(TERMS)
    torch.testing.assert_close(found.cpu()[:n], wanted[:n], atol=close, rtol=close)
    assert found.dtype == torch.float32
    for _ in range(10 if precision == "fp16" else 0):  # its first steps find a scale that holds
        train_step(on_gpu, real_x.cuda(), real_y.cuda())
    after = on_gpu.nets.state_dict()
    assert all(v.isfinite().all() and v.dtype == torch.float32 for v in after.values())
    assert {k.split(".")[0] for k, v in after.items() if not torch.equal(v, before[k])} == {
        "G", "F", "D_X", "D_Y"}
    assert on_gpu.scaler.is_enabled() == (precision == "fp16")


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


@pytest.mark.cuda
@pytest.mark.skipif(NO_GPU, reason="no CUDA GPU here")
def test_a_run_moves_between_cpu_and_gpu_and_between_precisions(run, tmp_path):
    assert run("--max-steps", 2).code == 0
    for steps, options in ((4, ["--device", "cuda", "--precision", "fp16"]),
                           (6, ["--device", "cuda", "--precision", "bf16"]),
                           (8, ["--device", "cuda", "--precision", "fp16"]),
                           (10, ["--device", "cpu", "--precision", "fp32"])):
        outcome = run("--max-steps", steps, *options)
        assert outcome.code == 0, outcome.err
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] == 10


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
