"""Tests of report/evaluation.py: curves and alarms of a run, and what the page says."""

import json
import re

import pytest

from report import figures
from report.evaluation import direction_text, evaluation_page, spread_text, training_curves, whose


def write_metrics(run, *lines):
    run.mkdir(exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text)
    return run


def loss(step, **terms):
    return {"kind": "loss", "step": step, "G": 0.5, "F": 0.4, "D_X": 0.2, "D_Y": 0.3,
            "cycle_x": 0.1, **terms}


VALIDATION = {"kind": "validation", "step": 4, "t2w_ssim": 0.7, "t2w_psnr_db": 21.0}
ALARM = {"kind": "warning", "step": 4, "epoch": 2, "text": "D_X always wins"}


def test_curves_show_losses_and_validation_of_the_run(tmp_path):
    curves, alarms = training_curves(write_metrics(
        tmp_path, loss(2), loss(4), {"kind": "speed", "step": 4, "pairs_per_s": 9.0}, VALIDATION))
    text = curves.svg.decode()
    for words in ("losses", "cycle and identity losses", "validation SSIM (brain)",
                  "validation PSNR (dB, brain)", ">D_Y<", ">cycle_x<", ">t2w_ssim<"):
        assert words in text
    assert "pairs_per_s" not in text and "identity_x<" not in text and alarms == []


def test_the_curves_are_drawn_from_the_steps_and_values_of_the_file(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "curves", lambda panels: drawn.append(panels))
    # of another kind, though of the same name
    training_curves(write_metrics(tmp_path, loss(2, G=1.5), {"kind": "health", "step": 3, "G": 99},
                                  loss(4, G=1.25), VALIDATION))
    assert drawn[0]["losses"]["G"] == ([2, 4], [1.5, 1.25])
    assert drawn[0]["validation SSIM (brain)"] == {"t2w_ssim": ([4], [0.7])}


def test_alarms_are_told_with_their_epochs_in_order(tmp_path):
    _, alarms = training_curves(write_metrics(tmp_path, loss(2), ALARM, {**ALARM, "epoch": 3}))
    assert alarms == ["epoch 2: D_X always wins", "epoch 3: D_X always wins"]


def test_without_a_file_or_with_an_empty_one_there_are_no_curves(tmp_path):
    assert training_curves(tmp_path) == (None, [])
    assert training_curves(write_metrics(tmp_path)) == (None, [])
    assert training_curves(write_metrics(tmp_path / "folder")) == (None, [])
    (tmp_path / "folder" / "metrics.jsonl").unlink()
    (tmp_path / "folder" / "metrics.jsonl").mkdir()
    assert training_curves(tmp_path / "folder") == (None, [])


def test_lines_that_are_damaged_cost_only_themselves(tmp_path):
    whole = [loss(2), loss(4), ALARM]
    wanted = training_curves(write_metrics(tmp_path, *whole))
    found = training_curves(write_metrics(
        tmp_path, "", whole[0], "[1, 2]", "\x00\x00", whole[1], '{"kind": "loss"}', whole[2],
        '{"kind": "loss", "step": 6, "G": 0.'))
    assert found == wanted and wanted[0] and wanted[1]
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n" + json.dumps(ALARM).encode())
    assert training_curves(tmp_path) == (None, wanted[1])


def test_a_spread_is_told_as_far_as_there_are_subjects_for_it():
    several = {"mean": 0.75, "sd": 0.125, "ci95": [0.5, 1.0]}
    assert spread_text(several, 2) == "0.75 ± 0.12 [0.50, 1.00]"
    assert spread_text(several, 2, "\n") == "0.75 ± 0.12\n[0.50, 1.00]"
    assert spread_text({"mean": 0.75, "sd": None, "ci95": None}, 3) == "0.750"
    assert direction_text("t2w-to-t1w") == "T2w to T1w"
    assert whose("val") == "val split" and whose("bids") == "new scans"


# ------------------------------------------------------------------------------------ the page

DIRECTIONS = ("t1w-to-t2w", "t2w-to-t1w")
SUMMARY = {
    "ckpt": "runs/a/best.pt", "n_subjects": 3, "n_slices": 14, "split": "bids",
    "slices": "evaluation/slices",
    "warnings": ["it <copies>"], "notes": ["look-up table not measured"],
    "distribution": {d: {"Frechet distance": 12.3456, "kernel distance": "not measured: no weights"}
                     for d in DIRECTIONS},
    "checks": {d: {"correlation": 0.5, "copy_ratio": 0.25, "warnings": []} for d in DIRECTIONS}}
STATE = {"step": 9, "slices_seen": 18, "config": {"lambda_cycle": 10.0, "lr": 0.0002},
         "format": {"made_with": {"torch": "2.9"}},
         "preprocessing": {"size": 32, "spacing_mm": 1.5, "intensity": {"rule": "p"},
                           "brain_extraction": ["hd-bet"], "sources": [
                               {"dataset": "ds1", "snapshot": "1.0", "doi": "10/1",
                                "license": "CC0"}],
                           "subjects": {"train": ["a", "b"], "val": [], "test": ["c"]}}}


def build(pictures=(), alarms=(), differences=(), lesions=((), ())):
    names = ("subjects", "slices_t1w-to-t2w", "slices_t2w-to-t1w", "histograms", *pictures)
    return evaluation_page(SUMMARY, {"In the brain": [["method", "SSIM"], ["floor", "0.4"]]},
                           {name: figures.Picture(name.encode(), b"") for name in names}, [],
                           STATE, alarms, differences, lesions)


def test_the_page_says_of_what_it_is_and_what_was_wrong():
    html = build()
    for text in ("runs/a/best.pt, step 9, 18 slice pairs seen", "3 subjects, 14 slices",
                 "new scans", "<p class='warning'>it &lt;copies&gt;</p>",
                 "<p class='note'>look-up table not measured</p>", "<td>0.4</td>", "12.35",
                 "not measured: no weights", "ds1", "10/1", "CC0", "lambda_cycle", "0.0002",
                 "hd-bet", "torch", "<td>train</td><td>2</td>", "25% of the real T2w",
                 "<h2>Limits</h2>", "Not for diagnosis"):
        assert text in html, text


@pytest.mark.parametrize("pictures, alarms, told, hidden", [
    ((), (), "No metrics.jsonl beside the checkpoint", "alarm"),
    (("training",), (), "No alarm fired in training", "No metrics.jsonl"),
    (("training",), ("epoch 2: one", "epoch 7: two"),
     "2 alarms fired in training, the last in epoch 7", "No alarm"),
])
def test_alarms_of_training_are_counted_and_listed(pictures, alarms, told, hidden):
    html = build(pictures, alarms)
    part = html[html.index("<h2>Training</h2>"):html.index("<h2>Data of the checkpoint</h2>")]
    assert told in part and hidden not in part
    assert all(f"<p>{alarm}</p>" in part for alarm in alarms)
    assert ("<img" in part) == bool(pictures)


def test_checkpoints_are_compared_only_where_there_are_several():
    assert "Comparison of checkpoints" not in build()
    html = build(("comparison_1", "comparison_2"),
                 differences=[["checkpoint", "p"], ["b.pt", "0.04"]])
    part = html[html.index("Comparison of checkpoints"):html.index("All slices of a subject")]
    assert len(re.findall("<img", part)) == 2 and "<td>b.pt</td><td>0.04</td>" in part


def test_lesions_have_a_table_of_subjects_and_one_of_sessions_that_opens():
    assert "Lesions: real" not in build()
    html = build(lesions=([["direction", "kept"], ["T1w to T2w", "0.34"]],
                          [["session", "kept"], ["sub-01", "0.12"]]))
    part = html[html.index("Lesions: real against translated"):html.index("Distance between sets")]
    first, second = part.split("<details>")
    assert "<td>0.34</td>" in first and "<td>sub-01</td><td>0.12</td>" in second
    assert "a rule of thumb" in second and "below 0 it is turned round" in second
