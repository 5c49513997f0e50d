"""Tests of train.py that is stopped, killed or damaged, and goes on: to the bit, or one error."""

import json
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from commands import TINY, run_command
from painted_store import write_store
from trainings import CONFIG, CPU, SPLITS, records
from trainings import run_fixture, slices_fixture  # noqa: F401

import run_folder
import train
import validation
from data.slices import UnpairedBatches
from data.store import SliceStore
from device import Process
from models import checkpoint
from run_folder import preprocessing_record
from training import Training


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


def test_best_files_of_another_folder_are_no_bar_and_take_no_place_in_this_one(run, tmp_path):
    run("--max-steps", 10, folder="old")
    state = checkpoint.load(tmp_path / "old" / "last.pt", resume=True)
    state["best"].update(t2w_ssim=0.99)  # as if its first epochs had been the best
    checkpoint.save(tmp_path / "old" / "last.pt", state)
    run("--max-steps", 20, "--resume", tmp_path / "old" / "last.pt", folder="new")
    best = checkpoint.load(tmp_path / "new" / "last.pt", resume=True)["best"]
    assert best["t2w_ssim"] < 0.99 and sorted(epoch for _, epoch in best["kept"]) == [3, 4]
    assert len(list((tmp_path / "new").glob("best_*.pt"))) == 2
    assert checkpoint.load(tmp_path / "new" / "best.pt")["epoch"] == best["epoch"]


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


# --------------------------------------------------------------------------------------- stopping


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


def test_the_signal_handlers_of_before_come_back(run):
    def mine(*_):
        pass

    before = signal.signal(signal.SIGINT, mine)
    try:
        run("--max-steps", 1)
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_begun_from_another_folder_goes_on_from_its_own_last_pt(run, tmp_path):
    run("--max-steps", 3, folder="old")
    options = ["--resume", tmp_path / "old" / "last.pt"]
    run("--max-steps", 5, *options, folder="new")
    outcome = run("--max-steps", 8, *options, folder="new")  # as torchrun begins a run again
    assert outcome.code == 0 and "going on from" in outcome.out and "step 5" in outcome.out
    steps = [r["step"] for r in records(tmp_path / "new", "validation")]
    assert steps == [5, 8]


def test_a_damaged_last_pt_is_put_aside_and_not_kept_as_the_one_before(run, tmp_path):
    run("--max-steps", 7)
    damage(tmp_path / "run" / "last.pt")
    damaged = (tmp_path / "run" / "last.pt").read_bytes()
    assert run("--max-steps", 9).code == 0
    assert checkpoint.load(tmp_path / "run" / "last.previous.pt", resume=True)["step"] == 5
    assert (tmp_path / "run" / "last.damaged.pt").read_bytes() == damaged


@pytest.mark.parametrize("part, name", [("best", "judged_step"), ("sampler", "sums"),
                                        ("preprocessing", "subjects"), ("ema", "F")])
def test_a_checkpoint_that_lacks_something_inside_is_one_error(run, tmp_path, part, name):
    run("--max-steps", 1)
    path = tmp_path / "run" / "last.pt"
    state = checkpoint.load(path, resume=True)
    del state[part][name]
    checkpoint.save(path, state, keep_previous=False)
    outcome = run("--max-steps", 2)
    assert outcome.code == 2 and f"checkpoint lacks {part}.{name}" in outcome.complaint


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_same_subjects_of_other_scans_are_another_store(run, tmp_path, split):
    stores = {}
    for name in ("first", "again"):
        stores[name] = write_store(tmp_path / name, SPLITS)
        table = stores[name] / "subjects.tsv"
        names, *lines = [line.split("\t") for line in table.read_text().splitlines()]
        for cells in lines:
            changed = name == "again" and cells[names.index("split")] == split
            cells[names.index("t1w_sha256")] = f"{int(changed)}{cells[0]}".encode().hex()
        table.write_text("\n".join("\t".join(cells) for cells in [names, *lines]) + "\n")
    assert run("--max-steps", 5, store=stores["first"]).code == 0
    outcome = run("--max-steps", 10, store=stores["again"])
    assert outcome.code == 2
    assert f"its {split} split has the same subjects" in outcome.complaint
    assert run("--max-steps", 10, store=stores["first"]).code == 0
    state = checkpoint.load(tmp_path / "run" / "last.pt", resume=True)
    state["best"]["t2w_ssim"] = 0.999  # of the scans before
    checkpoint.save(tmp_path / "run" / "last.pt", state)
    assert run("--max-steps", 15, "--override", store=stores["again"]).code == 0
    best = checkpoint.load(tmp_path / "run" / "last.pt", resume=True)["best"]
    assert (best["t2w_ssim"] == 0.999) == (split == "train")
