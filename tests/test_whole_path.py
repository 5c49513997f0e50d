"""The whole path as real commands: simulate, slice, train, resume, evaluate, translate."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from commands import TINY
from painted_store import write_store

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ["torchrun.py", "--nproc_per_node=2", "train.py"]


def command(*args, code=0):
    """Run a script of the project; returns the finished process with its output as text."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True,
                          text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Go the whole path once; returns the folder with all that it left, and what was printed."""
    pytest.importorskip("nilearn", reason="the simulator needs nilearn's tissue maps")
    out = tmp_path_factory.mktemp("path")
    printed = {}
    printed["preprocess"] = command(
        "preprocess.py", "--simulate", 3, "--downloads", out / "trees", "--out", out / "slices",
        "--size", 48, "--spacing", 4, "--workers", 2, "--val", "sim002", "--test", "sim003").stdout
    train = ["--slices", out / "slices", "--run", out / "run", *TINY, "--log-every", 1, "--no-flip"]
    printed["train"] = command(*TORCHRUN, *train, "--max-steps", 2).stdout
    printed["resume"] = command("train.py", *train, "--max-steps", 4, "--resume").stdout
    printed["evaluate"] = command("evaluate.py", "--slices", out / "slices", "--ckpt",
                                  out / "run" / "best.pt").stdout
    tree = out / "trees" / "simulated-seed0" / "sub-sim003" / "anat"
    printed["translate"] = command(
        "translate.py", tree / "sub-sim003_T1w.nii.gz", tree / "sub-sim003_T2w.nii.gz", "--ckpt",
        out / "run" / "best.pt", "--out", out / "translated").stdout
    return out, printed


def test_simulated_subjects_become_slices_in_three_splits(path):
    out, _ = path
    counts = json.loads((out / "slices" / "store.json").read_text())["counts"]["subjects"]
    assert counts == {"all": 3, "train": 1, "val": 1, "test": 1}


def test_two_processes_train_and_one_goes_on_where_they_stopped(path):
    out, printed = path
    assert "2 processes x batch 1 = 2 pairs a step" in printed["train"]
    assert "last.pt, step 2" in printed["resume"] and "step 4/4" in printed["resume"]
    state = torch.load(out / "run" / "last.pt", weights_only=True)
    assert state["step"] == 4 and state["slices_seen"] == 2 * 2 + 2
    assert not any(name.startswith("module.") for name in state["generators"]["G"])
    # each of the two has seen, and translated, slices of its own
    first, second = torch.load(out / "run" / "last.previous.pt", weights_only=True)["history"]
    assert first["x"]["count"] == second["x"]["count"] == 2
    assert not (first["x"]["images"] == second["x"]["images"]).flatten(1).all(1).any()
    losses = [json.loads(line) for line in (out / "run" / "metrics.jsonl").open()]
    assert [r["step"] for r in losses if r["kind"] == "loss"] == [1, 2, 3, 4]


def test_the_test_subject_is_measured_and_reported(path):
    out, printed = path
    summary = json.loads((out / "run" / "evaluation" / "summary.json").read_text())
    assert summary["subjects"] == ["simulated_sub-sim003"]
    for direction in ("t1w-to-t2w", "t2w-to-t1w"):
        assert -1 < summary[direction]["brain"]["ssim"]["mean"] < 1
        assert summary[direction]["floor"]["brain"]["psnr_db"]["mean"] > 0
    assert (out / "run" / "evaluation" / "report.html").stat().st_size > 50_000
    assert "T1w to T2w  brain" in printed["evaluate"]


def test_whole_volumes_are_translated_on_their_own_grids(path):
    out, _ = path
    tree = out / "trees" / "simulated-seed0" / "sub-sim003" / "anat"
    for source, target in (("T1w", "T2w"), ("T2w", "T1w")):
        given = nib.load(tree / f"sub-sim003_{source}.nii.gz")
        made = nib.load(out / "translated" / f"sub-sim003_desc-synthetic_{target}.nii.gz")
        assert made.shape == given.shape and np.array_equal(made.affine, given.affine)
        data = made.get_fdata()
        assert made.get_data_dtype() == np.float32
        assert 0 <= data.min() and 0.1 < data.max() <= 1 and 0.02 < (data > 0).mean() < 0.9


def test_the_run_folder_says_when_nothing_is_left(path):
    out, _ = path
    done = command("train.py", "--slices", out / "slices", "--run", out / "run", *TINY,
                   "--no-flip", "--max-steps", 4)
    assert "nothing left to train: step 4 of 4" in done.stdout


def test_under_torchrun_an_error_is_told_once(tmp_path):
    slices = write_store(tmp_path / "slices", {"train": ["01"], "val": ["02"]})
    done = command(*TORCHRUN, "--slices", slices, "--run", tmp_path / "run", *TINY, "--resume",
                   code=1)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "last.pt: no such checkpoint" in told[0]
    assert "train.py\", line" not in done.stderr  # no traceback of ours


@pytest.mark.parametrize("script", ["preprocess", "train", "evaluate", "translate"])
def test_help_is_printed_with_a_text_for_every_option(script, capsys):
    with pytest.raises(SystemExit) as leaving:
        importlib.import_module(script).main(["--help"])
    assert leaving.value.code == 0
    printed = capsys.readouterr().out
    assert "usage:" in printed and "==SUPPRESS==" not in printed
    assert len(printed.splitlines()) > 20
