"""Tests of train.py: what a run leaves, its options, one line for what cannot work."""

import contextlib
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from commands import TINY, run_command
from painted_store import change_rows, write_store
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from trainings import CONFIG, NO_GPU, ROOT, SPLITS, alone, records
from trainings import run_fixture, slices_fixture  # noqa: F401

import health
import train
import validation
from config import TrainConfig
from data.contrast import intensity_quantiles
from data.histogram import StandardRows, find_standard
from data.slices import UnpairedBatches, shown, to_tensor
from data.store import SliceStore
from models import checkpoint
from step import TERMS, WATCHED


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


def test_the_rates_of_a_run_are_logged_as_they_were_used(run, tmp_path):
    assert run("--epochs", 1, "--epochs-decay", 1, "--log-every", 1).code == 0
    rates = [r["lr"] for r in records(tmp_path / "run", "schedule")]
    assert rates == pytest.approx([2e-4] * 6 + [2e-4 * (1 - k / 5) for k in (1, 2, 3, 4)])


# ------------------------------------------------------------------------------ what a run leaves


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


def test_a_terminal_shows_one_line_and_a_log_one_an_interval(slices, tmp_path):
    """Under a pseudo-terminal the bar has the losses, and the lines of intervals go to log.txt."""
    command = [sys.executable, "train.py", "--slices", slices, "--run", tmp_path / "run", *TINY,
               "--max-steps", 6, "--steps-per-epoch", 6, "--log-every", 2]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    with subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=theirs, stderr=theirs) as p:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # Linux says so when the other end is closed
            while block := os.read(ours, 4096):
                said += block
        os.close(ours)
    text = said.decode()
    assert p.returncode == 0 and "100%" in text and "D_Y" in text
    assert "pairs/s" not in text and "validation" in text
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count(" pairs/s  G ") == 3


def test_sample_pictures_are_files_that_open(run, tmp_path):
    run("--max-steps", 1)
    picture = Image.open(tmp_path / "run" / "samples" / "epoch_0001.png")
    assert picture.size == (8 * 34 + 2, 4 * 34 + 2)


def test_the_nets_are_shown_standard_histograms_in_training(run, slices, monkeypatch):
    seen, step = [], train.train_step

    def watched(t, real_x, real_y):
        seen.append((t, real_x.clone(), real_y.clone()))
        return step(t, real_x, real_y)

    monkeypatch.setattr(train, "train_step", watched)
    store = SliceStore(slices)
    for options, contrasts in (((), ["t1w"]), (("--standardise", "none"), []),
                               (("--standardise", "both"), ["t1w", "t2w"])):
        seen.clear()
        run("--max-steps", 2, "--no-flip", "--deform", 0, "--standardise-targets", "none", *options,
            folder="-".join(options) or "x")
        standard = StandardRows(store, find_standard(store, contrasts))
        loader = UnpairedBatches(store, batch_size=1, balanced=True)
        for number, (t, *real) in enumerate(seen):
            for rows, array, name, found in zip(loader.rows(0, number), (store.t1w, store.t2w),
                                                ("t1w", "t2w"), real):
                wanted = shown(to_tensor(array[rows]).half(), rows, name, standard).float()
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
                assert torch.equal(found, to_tensor(array[rows])) == (name not in contrasts)
            wanted = intensity_quantiles(store, standard=standard.standard)
            assert all(np.array_equal(t.quantiles[name].numpy(), wanted[name]) for name in wanted)
            assert set(t.standard.standard.wanted if t.standard else ()) == set(contrasts)
    assert number == 1


@pytest.mark.parametrize("options, channels, apart", [
    (("--standardise", "none"), (2, 2), ["t1w", "t2w"]), ((), (1, 2), ["t2w"]),
    (("--standardise", "both"), (1, 1), [])])
def test_targets_have_standard_histograms_whatever_is_shown(run, slices, tmp_path, monkeypatch,
                                                            options, channels, apart):
    seen, step = [], train.train_step

    def watched(t, *real):
        seen.append(real)
        return step(t, *(r.clone() for r in real))

    monkeypatch.setattr(train, "train_step", watched)
    assert run("--max-steps", 2, "--no-flip", "--deform", 0, "--standardise-targets", "both",
               *options).code == 0
    store = SliceStore(slices)
    targets = StandardRows(store, find_standard(store))
    loader = UnpairedBatches(store, batch_size=1, balanced=True)
    for number, real in enumerate(seen):
        assert tuple(r.shape[1] for r in real) == channels
        for rows, array, name, found in zip(loader.rows(0, number), (store.t1w, store.t2w),
                                            ("t1w", "t2w"), real):
            wanted = shown(to_tensor(array[rows]).half(), rows, name, targets).float()
            torch.testing.assert_close(found[:, -1:], wanted, rtol=0, atol=1e-3)
            assert torch.equal(found[:, :1], to_tensor(array[rows])) == (name in apart)
    record = checkpoint.load(tmp_path / "run" / "best.pt")["preprocessing"]
    kept = record.get("standard_targets", {})
    assert [name for name in ("t1w", "t2w") if name in kept] == apart
    for name in apart:  # what the nets are shown in use has nothing to do with it
        assert kept[name] == targets.standard.record()[name]
        assert name not in record.get("standard", {})


def test_a_run_goes_on_with_the_targets_that_it_began_with(run, tmp_path):
    def record():
        return checkpoint.load(tmp_path / "run" / "last.pt")["preprocessing"]

    run("--max-steps", 1, "--standardise-targets", "both")
    before = record()
    others = write_store(tmp_path / "others", {**SPLITS, "train": ["01", "02", "06"],
                                               "test": ["03"]})
    assert run("--max-steps", 2, "--override", "--standardise-targets", "both",
               store=others).code == 0
    assert record()["standard_targets"] == before["standard_targets"]
    assert run("--max-steps", 3, "--override", "--standardise", "both", "--standardise-targets",
               "both", store=others).code == 0
    assert record()["standard"]["t2w"] == before["standard_targets"]["t2w"]
    assert "standard_targets" not in record()


def test_other_contrasts_to_standardise_leave_those_that_the_nets_know(run, tmp_path):
    def landmarks():
        return checkpoint.load(tmp_path / "run" / "last.pt")["preprocessing"]["standard"]

    run("--max-steps", 1, "--standardise-targets", "none")
    known = landmarks()
    others = write_store(tmp_path / "others", {**SPLITS, "train": ["01", "02", "06"],
                                               "test": ["03"]})
    assert run("--max-steps", 2, "--override", "--standardise", "both", store=others).code == 0
    assert landmarks()["t1w"] == known["t1w"]
    assert landmarks()["t2w"] == find_standard(SliceStore(others)).record()["t2w"]


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


# --------------------------------------------------------------------------------------- stopping


def test_a_checkpoint_says_what_its_training_subjects_were_like(run, slices, tmp_path):
    run("--max-steps", 1)
    record = checkpoint.load(tmp_path / "run" / "best.pt")["preprocessing"]["training"]
    store = SliceStore(slices)
    first = np.concatenate([((store.t1w[rows].astype(np.float32) + 1) / 2)[store.mask(rows)][None]
                            for rows in [store.rows("train")[:6]]])
    assert record["subjects"] == 3 and len(record["t1w"]["mean"]) == len(record["percentiles"])
    median = record["percentiles"].index(50)
    assert abs(np.median(first) - record["t1w"]["mean"][median]) < 0.1


# ----------------------------------------------------------------------------------------- errors


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


@pytest.mark.parametrize("options, said", [
    (["--batch-size", 0], "--batch-size 0: must be at least 1"),
    (["--batch-size", 19], "has 18 slices, a step of 1 x 19 needs 19"),
    (["--epochs", 0, "--epochs-decay", 0], "nothing to train"),
    (["--lr", 2], "--lr 2.0"), (["--lr", "nan"], "--lr nan"), (["--ema", 1], "--ema 1.0"),
    (["--lambda-identity", "nan"], "--lambda-identity nan"),
    (["--lambda-cycle", "inf"], "--lambda-cycle"), (["--lambda-cycle", 1, 2, 3], "one or two"),
    (["--betas", 0.5], "--betas (0.5,)"), (["--betas", 0.5, 1], "--betas (0.5, 1.0)"),
    (["--history-size", -1], "--history-size -1"), (["--seed", -1], "--seed -1"),
    (["--seed", 2 ** 32], "--seed 4294967296: must be below"),
    (["--history-size", 10 ** 24], "--history-size: must be at most"),
    (["--start-pairs", "1" + 400 * "0"], "--start-pairs: must be at most"),
    (["--device", "cuda:²"], "--device cuda:²"),
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


def test_a_validation_slice_without_a_brain_is_found_before_an_epoch_is_trained(run, tmp_path):
    store = write_store(tmp_path / "blank", SPLITS)
    row = SliceStore(store).spans("val")[0][0] + 2
    change_rows(store, "mask.npy", row, 0)
    outcome = run("--max-steps", 1, store=store)
    assert outcome.code == 2
    assert f"mask.npy: no brain in row {row} (painted_sub-04)" in outcome.complaint
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_store_that_lacks_a_setting_is_one_error(run, tmp_path):
    store = write_store(tmp_path / "poor", SPLITS)
    header = json.loads((store / "store.json").read_text())
    del header["spacing_mm"]
    (store / "store.json").write_text(json.dumps(header))
    outcome = run("--max-steps", 1, store=store)
    assert outcome.code == 2 and "store.json: lacks spacing_mm" in outcome.complaint


def test_no_memory_left_is_one_line(run, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(train, "train_step", full)
    outcome = run("--max-steps", 1)
    assert outcome.code == 1 and "no memory left" in outcome.err
    assert "--history-size" in outcome.err


def test_damaged_pictures_of_progress_spoil_no_finished_training(run, tmp_path):
    run("--max-steps", 5)
    next((tmp_path / "run" / "progress").glob("*.npz")).write_bytes(b"x")
    outcome = run("--max-steps", 10)
    assert outcome.code == 0 and "warning: no progress_*.gif" in outcome.out
    assert "done: " in outcome.out
    assert run("--gif").code == 2


@pytest.mark.parametrize("line", [b"\xff\xfe\n", b"12\n", b'{"kind": "loss"}\n', b"[]\n"])
def test_a_damaged_line_of_metrics_goes_and_the_others_stay(run, tmp_path, line):
    run("--max-steps", 5)
    path = tmp_path / "run" / "metrics.jsonl"
    before = path.read_bytes()
    path.write_bytes(before + line)
    assert run("--max-steps", 5).code == 0
    assert path.read_bytes() == before


def test_a_store_without_training_subjects_is_one_error(run, tmp_path):
    untrained = write_store(tmp_path / "untrained", {"val": ["04"], "test": ["06"]})
    outcome = run("--max-steps", 1, store=untrained)
    assert outcome.code == 2 and "the train split is empty" in outcome.complaint


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
    ("c.json", "[]", "should hold options by name"), ("c.json", "3", "should hold options"),
    ("c.json", "[" * 99_999, "not JSON"),
    ("c.json", '{"lr": 1' + 400 * "0" + "}", "beyond any number"),
    ("c.toml", "recipe = 'paper'", "named on the command line, with --recipe paper"),
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


# ------------------------------------------------------------------------------------------- CUDA


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
