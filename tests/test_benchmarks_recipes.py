"""benchmarks/recipes.py: folds, rows of the table, the rule without pairs, and a whole tiny run."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from painted_store import write_store

from benchmarks import recipes
from data.store import SliceStore, check
from models import checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes") / "slices"
    return write_store(folder, {"train": ["01", "02"], "val": ["03"], "test": ["04"]})


def test_a_fold_is_a_sound_store_of_the_same_slices_with_its_own_split(slices, tmp_path):
    whole = SliceStore(slices)
    people = sorted({s["subject"] for s in whole.subjects})
    folder = recipes.write_fold(whole, people[:2], tmp_path / "fold")
    assert check(folder) == []
    fold = SliceStore(folder)
    assert {s["subject"] for s in fold.subjects if s["split"] == "val"} == set(people[:2])
    assert {s["subject"] for s in fold.subjects if s["split"] == "train"} == set(people[2:])
    assert np.array_equal(fold.t1w, whole.t1w) and np.array_equal(fold.t2w, whole.t2w)
    recipes.write_fold(whole, people[2:], tmp_path / "fold")  # anew, in the same place
    assert {s["subject"] for s in SliceStore(folder).subjects
            if s["split"] == "train"} == set(people[:2])
    assert check(slices) == []  # where the slices come from


def test_a_fold_of_unknown_or_of_all_subjects_is_refused(slices, tmp_path):
    whole = SliceStore(slices)
    with pytest.raises(ValueError, match="--held-out nobody: not in .*subjects.tsv; it has "):
        recipes.write_fold(whole, ["nobody"], tmp_path / "fold")
    with pytest.raises(ValueError, match="nobody is left to train on"):
        recipes.write_fold(whole, [s["subject"] for s in whole.subjects], tmp_path / "fold")


@pytest.mark.parametrize("options, said", [
    (["--epochs", "4"], "--epochs 4: at least 5"),
    (["--epochs", "8", "--pairs", "7"], "--pairs 7: at least 8"),
    (["--pairs", "19"], "--pairs 19: at least 20")])
def test_pieces_of_a_run_are_enough_to_swing_and_hold_a_pair_each(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        recipes.main(["--held-out", "03", "--out", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()


def test_a_recipe_is_a_name_or_options():
    assert recipes.recipe_of("paper") == ("paper", ("--recipe", "paper"))
    assert recipes.recipe_of("x-1=--lr 1e-3 --no-flip") == ("x-1", ("--lr", "1e-3", "--no-flip"))
    for wrong in ("../up=--lr 1", "fold0", "=--lr 1", "a b"):
        with pytest.raises(ValueError, match="a name of letters"):
            recipes.recipe_of(wrong)


def test_the_rule_takes_the_epoch_that_comes_back_best_and_looks_at_no_pairs():
    def point(cycle, histogram):
        return {f"{name}_{what}": value for name in ("t1w", "t2w")
                for what, value in (("cycle_error", cycle), ("histogram_distance", histogram))}
    assert recipes.pick([point(0.3, 0.01), point(0.1, 0.05), point(0.02, 0.2)]) == 1
    assert recipes.pick([point(0.3, 0.3), point(0.1, 0.2), point(0.02, 0.4)]) == 1


def test_spread_is_between_seeds_of_the_mean_over_folds():
    rows = [{"seed": seed, "brain_ssim": value}
            for seed, value in ((0, 0.5), (0, 0.7), (1, 0.6), (1, 0.8))]
    assert recipes.spread(rows) == f"+-{0.1 / 2 ** 0.5:.3f}"
    assert recipes.spread(rows[:2]) == ""


def test_two_recipes_are_trained_measured_and_not_repeated(slices, tmp_path):
    people = sorted({s["subject"] for s in SliceStore(slices).subjects})
    command = [sys.executable, str(ROOT / "benchmarks" / "recipes.py"), "--slices", str(slices),
               "--out", str(tmp_path / "out"), "--held-out", ",".join(people[:2]),
               "--recipes", "default", "paper", "--pairs", "20", "--features", "2",
               "--device", "cpu", "--ceiling"]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = first.stdout.splitlines()
    found = json.loads(lines[-1])["runs"]
    models = [r for r in found if r["method"] == "model"]
    assert first.returncode == any(r["copied"] or r["inverted"] for r in models), first.stderr
    assert {(r["recipe"], r["fold"], r["direction"]) for r in models} == {
        (recipe, 0, direction) for recipe in ("default", "paper")
        for direction in ("t1w-to-t2w", "t2w-to-t1w")}
    for row in models:
        folder = tmp_path / "out" / row["recipe"] / f"fold{row['fold']}_seed0"
        summary = json.loads((folder / "evaluation" / "summary.json").read_text())
        assert row["brain_ssim"] == summary[row["direction"]]["brain"]["ssim"]["mean"]
        check = summary["checks"][row["direction"]]
        assert row["inverted"] == (check["correlation"] < 0)
        assert row["copied"] == (check["copy_ratio"] < 0.5)
        curve = [r["t2w_ssim" if row["direction"] == "t1w-to-t2w" else "t1w_ssim"]
                 for r in map(json.loads, (folder / "run" / "metrics.jsonl").open())
                 if r["kind"] == "validation"]
        assert len(curve) == 20 and summary["slices_seen"] == 20
        assert row["swing"] == max(curve[-5:]) - min(curve[-5:])
        assert row["best_epoch"] == max(curve) and row["without_pairs"] in curve
        # train.py and evaluate.py measure the same nets alike
        assert row["brain_ssim"] == pytest.approx(curve[-1], abs=5e-3)
    ceilings = [r for r in found if r["method"] == "ceiling"]
    assert len(ceilings) == 2 and {r["seed"] for r in ceilings} == {0}
    titles, *table = lines[:-1]
    assert titles.split()[:3] == ["recipe", "direction", "runs"] and len(table) == 2 * 5
    config = json.loads((tmp_path / "out/paper/fold0_seed0/run/config.json").read_text())
    assert config["lambda_identity"] == 5 and config["ema"] == 0
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.pt")}
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.stdout == first.stdout
    assert written == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.pt")}
    # and are not taken for those of another question
    for options, said in ((["--features", "3"], "other features"),
                          (["--pairs", "40"], "other pairs"),
                          (["--held-out", people[2]], "other subjects_sha256")):
        other = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert other.returncode == 2 and said in other.stderr and "--out" in other.stderr


def test_a_recipes_batches_take_no_more_pairs_than_asked_for(slices, tmp_path, monkeypatch):
    asked = []

    def call(script, *options, log):
        asked.append(dict(zip(options, options[1:]))["--steps-per-epoch"])
        raise RuntimeError("as far as this")

    monkeypatch.setattr(recipes, "call", call)
    for name, options in (("a", "--batch-size=4"), ("b", "--batch-size 4"), ("c", "--lr 1e-3")):
        with pytest.raises(RuntimeError, match="as far as this"):
            recipes.main(["--slices", str(slices), "--out", str(tmp_path), "--held-out", "01",
                          "--recipes", f"{name}={options}", "--pairs", "80", "--epochs", "5"])
    assert asked == [4, 4, 16]


def test_a_folder_with_a_run_of_unknown_options_is_refused(slices, tmp_path):
    (tmp_path / "default" / "fold0_seed0" / "run").mkdir(parents=True)
    with pytest.raises(ValueError, match="has a run, and no job.json"):
        recipes.main(["--slices", str(slices), "--out", str(tmp_path), "--held-out", "01",
                      "--recipes", "default"])


def test_a_batch_that_no_epoch_can_fill_is_refused_before_any_run(slices, tmp_path):
    with pytest.raises(ValueError, match="--recipes b: --batch-size 4 is more than the 3 pairs"):
        recipes.main(["--slices", str(slices), "--out", str(tmp_path), "--held-out", "01",
                      "--recipes", "a=--batch-size 2", "b=--batch-size 4", "--pairs", "15",
                      "--epochs", "5"])
    assert not (tmp_path / "a").exists()


def test_a_mistaken_option_claims_no_folder(slices, tmp_path):
    command = ["--slices", str(slices), "--out", str(tmp_path), "--held-out", "01", "--pairs", "20",
               "--epochs", "5", "--recipes"]
    with pytest.raises(ValueError, match="--lr 5.0"):
        recipes.main([*command, "x=--lr 5"])
    assert not (tmp_path / "x").exists()


def test_a_job_that_never_ran_may_get_other_options(slices, tmp_path, monkeypatch):
    def call(*_, **__):
        raise ChildProcessError("as far as this")

    monkeypatch.setattr(recipes, "call", call)
    for options in ("--lr 1e-3", "--lr 1e-4"):
        with pytest.raises(ChildProcessError, match="as far as this"):
            recipes.main(["--slices", str(slices), "--out", str(tmp_path), "--held-out", "01",
                          "--pairs", "20", "--epochs", "5", "--recipes", f"x={options}"])
        said = json.loads((tmp_path / "x" / "fold0_seed0" / "job.json").read_text())
        assert said["options"] == options.split()


def test_a_run_is_done_when_its_checkpoint_is_of_the_last_step_and_judged(tmp_path):
    state = {"config": {"features": 4, "blocks": 1, "upsample": "transpose"},
             "preprocessing": {"size": 32, "spacing_mm": 4.0, "intensity": {}, "subjects": {}},
             "step": 10, "epoch": 5, "slices_seen": 10, "ema": {"G": {}, "F": {}},
             "best": {"judged_step": 10}}
    assert not recipes.is_trained(tmp_path, 10)
    for step, judged, done in ((10, 10, True), (8, 8, False), (10, 8, False)):
        checkpoint.save(tmp_path / "last.pt", {**state, "step": step,
                                               "best": {"judged_step": judged}})
        assert recipes.is_trained(tmp_path, 10) is done
    (tmp_path / "last.pt").write_bytes(b"cut")
    assert not recipes.is_trained(tmp_path, 10)


def test_a_line_of_metrics_that_a_kill_cut_short_is_passed_over(tmp_path):
    line = '{"kind": "validation", "step": 3}'
    (tmp_path / "metrics.jsonl").write_text(f'{line}\n12\n{{"step": 1}}\n{line[:20]}')
    assert recipes.read_curve(tmp_path) == [{"kind": "validation", "step": 3}]


def test_a_child_that_fails_is_one_line_with_its_log(tmp_path):
    with pytest.raises(ValueError, match="train.py --lr 5: exit code 2, see .*a.log"):
        recipes.call("train.py", "--lr", 5, log=tmp_path / "a.log")
