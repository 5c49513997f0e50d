"""Tests of evaluate.py: figures by scikit-image and by hand, comparisons, refusals, the report."""

import base64
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, open_page
from commands import TINY, run_command
from conftest import content
from painted_lesions import LESIONS, write_lesion_store, write_lesions
from painted_store import write_store
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchvision.models import inception_v3

import evaluate
import measuring
import train
from data.histogram import Standard, StandardRows
from data.slices import shown, to_tensor
from data.store import SliceStore
from data.tissues import find_tissues, tissue_slices
from losses.distribution import frechet_distance, kernel_distance
from measuring import Method, copy_input, measure_session
from models import checkpoint
from models.baseline import LookUpTable
from models.features import load_features
from summary import (best_median_worst, contrast_checks, lesion_rows, lesion_summary,
                     lesion_warnings)

CPU = torch.device("cpu")
SPLITS = {"train": ["01", "02"], "val": ["03"], "test": ["04", "05", "06_ses-a", "06_ses-b"]}
N_SLICES = {"01": 4, "02": 4, "03": 3, "04": 3, "05": 5, "06_ses-a": 2, "06_ses-b": 4}
DIRECTIONS = ("t1w-to-t2w", "t2w-to-t1w")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with three people to test on, one of them in two sessions; read only."""
    folder = tmp_path_factory.mktemp("evaluate") / "slices"
    return SliceStore(write_store(folder, SPLITS, n_slices=N_SLICES))


@pytest.fixture(scope="module")
def ckpt(store, tmp_path_factory):
    """A checkpoint that has seen the store's training split; read only."""
    run = tmp_path_factory.mktemp("run")
    assert run_command(train.main, "--slices", store.folder, "--run", run, *TINY, "--max-steps", 2,
                       "--steps-per-epoch", 2).code == 0
    return run / "best.pt"


def evaluated(ckpt, slices, out, *options):
    return run_command(evaluate.main, "--ckpt", ckpt, "--slices", slices, "--out", out,
                       "--precision", "fp32", "--device", "cpu", *options)


@pytest.fixture(scope="module")
def results(ckpt, store, tmp_path_factory):
    """What an evaluation wrote: the folder."""
    out = tmp_path_factory.mktemp("out") / "evaluation"
    outcome = evaluated(ckpt, store.folder, out, "--batch-size", 2)
    assert outcome.code == 0 and outcome.err == ""
    (out / "printed.txt").write_text(outcome.out)
    return out


def table(path):
    """Rows of a CSV file, numbers as numbers."""
    def value(text):
        return float(text) if re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", text) else text

    with open(path, newline="") as lines:
        return [{k: value(v) for k, v in row.items()} for row in csv.DictReader(lines)]


def given(ckpt, store, rows, contrast):
    """Rows of a store (n, 1, H, W), as the nets of a checkpoint are shown them."""
    standard = Standard.of_record(checkpoint.load(ckpt)["preprocessing"])
    array = store.t1w if contrast == "t1w" else store.t2w
    return shown(to_tensor(array[rows]), rows, contrast, StandardRows(store, standard))


def tables_of(store):
    """The look-up tables that the training split's pairs give, T1w to T2w and back."""
    rows = store.rows("train")
    x, y = (torch.from_numpy(a[rows].astype(np.float32))[:, None] for a in (store.t1w, store.t2w))
    mask = torch.from_numpy(store.mask(rows))[:, None]
    tables = LookUpTable(), LookUpTable()
    tables[0].update(x, y, mask)
    tables[1].update(y, x, mask)
    return tables


# ---------------------------------------------------------------------------------- figures


def test_every_slice_is_measured_both_ways_as_scikit_image_does(results, ckpt, store):
    nets = dict(zip(DIRECTIONS, checkpoint.load_generators(checkpoint.load(ckpt))))
    settings = {"data_range": 1, "gaussian_weights": True, "sigma": 1.5,
                "use_sample_covariance": False}
    rows = table(results / "slices.csv")
    assert len(rows) == 14 * 2 * 3 * 3  # slices, directions, methods, protocols
    assert {r["method"] for r in rows} == {"model", "floor", "table"}
    tables = dict(zip(DIRECTIONS, tables_of(store)))
    for r in rows:
        row = int(r["row"])
        real = {"t1w": store.t1w[row].astype(np.float32), "t2w": store.t2w[row].astype(np.float32)}
        source, target = (real[name] for name in r["direction"].split("-to-"))
        translate = {"model": nets[r["direction"]], "floor": torch.clone,
                     "table": tables[r["direction"]]}[r["method"]]
        slices = torch.from_numpy(source)[None, None]
        if r["method"] == "model":  # the others take slices as they are stored
            slices = given(ckpt, store, np.array([row]), r["direction"][:3])
        with torch.no_grad():
            image = translate(slices)[0, 0].numpy()
        assert r["ckpt"] == (str(ckpt) if r["method"] == "model" else "")
        image, target = (image + 1) / 2, (target + 1) / 2
        mask = store.mask(slice(row, row + 1))[0]
        if r["protocol"] == "box":
            i, j = (np.flatnonzero(mask.any(axis=a)) for a in (1, 0))
            image, target = (torch.nn.functional.interpolate(
                torch.from_numpy(v[i[0]:i[-1] + 1, j[0]:j[-1] + 1].copy())[None, None], (128, 128),
                mode="bilinear", antialias=True)[0, 0].numpy() for v in (image, target))
        mean, similarity = structural_similarity(image, target, full=True, **settings)
        if r["protocol"] == "brain":
            ssim, image, target = similarity[mask].mean(), image[mask], target[mask]
            ncc = np.corrcoef(image, target)[0, 1] if image.std() > 1e-6 else 0
            assert r["ncc"] == pytest.approx(ncc, abs=1e-4)
        else:
            ssim = mean
        assert r["ssim"] == pytest.approx(ssim, abs=2e-5)
        assert r["psnr_db"] == pytest.approx(
            peak_signal_noise_ratio(target, image, data_range=1), abs=2e-4)
        assert r["mae"] == pytest.approx(np.abs(image - target).mean(), abs=1e-6)


def test_the_subject_is_the_unit_of_the_summary(results):
    slices = table(results / "slices.csv")
    summary = json.loads((results / "summary.json").read_text())
    for direction in DIRECTIONS:
        for method, part in (("model", summary[direction]), ("floor", summary[direction]["floor"]),
                             ("table", summary[direction]["table"])):
            for protocol in ("brain", "slice", "box"):
                for metric in ("ssim", "psnr_db", "mae"):
                    people = {}
                    for s in slices:
                        if (s["direction"], s["method"], s["protocol"]) == (direction, method,
                                                                            protocol):
                            person = s["id"].replace("_ses-a", "").replace("_ses-b", "")
                            people.setdefault(person, []).append(s[metric])
                    assert [len(v) for v in people.values()] == [3, 5, 6]
                    means = [sum(v) / len(v) for v in people.values()]
                    mean = sum(means) / 3
                    sd = (sum((m - mean) ** 2 for m in means) / 2) ** 0.5
                    found = part[protocol][metric]
                    assert found["mean"] == pytest.approx(mean)
                    assert found["sd"] == pytest.approx(sd)
                    low, high = found["ci95"]
                    assert min(means) - 1e-9 <= low < mean < high <= max(means) + 1e-9
    assert summary["n_subjects"] == 3 and summary["n_sessions"] == 4 and summary["n_slices"] == 14


def test_the_table_of_subjects_has_the_means_of_their_slices(results):
    rows = table(results / "subjects.csv")
    assert len(rows) == 3 * 2 * 3 * 4  # subjects, directions, methods, protocols with volume
    assert {r["n_slices"] for r in rows if r["protocol"] == "volume"} == {""}
    assert {(r["id"], r["n_slices"]) for r in rows if r["protocol"] != "volume"} == {
        ("painted_sub-04", 3), ("painted_sub-05", 5), ("painted_sub-06", 6)}
    slices = [s["ssim"] for s in table(results / "slices.csv") if s["id"].startswith(
        "painted_sub-06") and s["direction"] == "t1w-to-t2w" and s["method"] == "model"
        and s["protocol"] == "box"]
    found = [r["ssim"] for r in rows if r["id"] == "painted_sub-06" and r["method"] == "model"
             and r["direction"] == "t1w-to-t2w" and r["protocol"] == "box"]
    assert len(slices) == 6 and found == [pytest.approx(np.mean(slices))]


def test_what_too_few_slices_cannot_give_is_absent_and_never_nan(results):
    """Each session here has fewer slices than a window of 3-D SSIM."""
    summary = json.loads((results / "summary.json").read_text())
    rows = [r for r in table(results / "subjects.csv") if r["protocol"] == "volume"]
    assert len(rows) == 3 * 2 * 3
    for r in rows:
        assert r["ssim"] == "" and r["mae"] == "" and r["psnr_db"] > 0
    for direction in DIRECTIONS:
        for part in (summary[direction], summary[direction]["table"]):
            assert set(part["volume"]) == {"psnr_db", "slice_consistency"}
    for name in ("summary.json", "subjects.csv", "slices.csv", "printed.txt"):
        assert "nan" not in (results / name).read_text().lower()


def test_the_same_command_writes_the_same_bytes(results, ckpt, store, tmp_path):
    assert evaluated(ckpt, store.folder, tmp_path / "e", "--batch-size", 2).code == 0
    again, before = content(tmp_path / "e"), content(results)
    before.pop("printed.txt")
    assert again == before and {"summary.json", "report.html", "subjects.svg"} <= set(again)


def test_the_batch_size_changes_no_figure(results, ckpt, store, tmp_path, unpainted):
    evaluated(ckpt, store.folder, tmp_path / "e", "--batch-size", 64)
    for a, b in zip(table(tmp_path / "e" / "slices.csv"), table(results / "slices.csv")):
        assert a == {k: pytest.approx(v, abs=1e-5) for k, v in b.items()}


def test_a_single_test_subject_has_no_deviation_and_no_interval(ckpt, tmp_path, unpainted):
    slices = write_store(tmp_path / "slices", {**SPLITS, "test": ["04"]}, n_slices=3)
    outcome = evaluated(ckpt, slices, tmp_path / "e")
    assert outcome.code == 0
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    found = summary["t1w-to-t2w"]["brain"]["ssim"]
    assert found["sd"] is None and found["ci95"] is None and found["mean"] < 1
    assert summary["n_subjects"] == 1
    assert "None" not in outcome.out and "nan" not in outcome.out.lower()


def test_the_summary_is_laid_out_as_the_design_says(results, ckpt):
    summary = json.loads((results / "summary.json").read_text())
    for direction in DIRECTIONS:
        for part in (summary[direction], summary[direction]["floor"]):
            assert {"brain", "slice", "box"} <= set(part)
            for protocol in ("brain", "slice", "box"):
                for metric in ("ssim", "psnr_db"):
                    assert set(part[protocol][metric]) == {"mean", "sd", "ci95"}
    assert summary["split"] == "test" and summary["ckpt"] == str(ckpt)
    assert summary["ckpt_sha256"] == checkpoint.fingerprint(ckpt)
    assert summary["subjects"] == ["painted_sub-04", "painted_sub-05", "painted_sub-06_ses-a",
                                   "painted_sub-06_ses-b"]


# ----------------------------------------------------------------------- copies and inversions


def measured(store, translate):
    """Records of the first test subject, translated by `translate(source, target)`."""
    subject = next(s for s in store.subjects if s["split"] == "test")
    rows = slice(subject["first_row"], subject["first_row"] + subject["n_slices"])
    x, y = (torch.from_numpy(a[rows].astype(np.float32))[:, None] for a in (store.t1w, store.t2w))
    nets = {"t1w-to-t2w": lambda source: translate(source, y),
            "t2w-to-t1w": lambda source: translate(source, x)}
    return measure_session(store, subject, [Method("model", nets, "m"), copy_input()], CPU)[0]


def warnings_of(records):
    checks = contrast_checks(records, "m")
    return {direction: " ".join(checks[direction]["warnings"]) for direction in DIRECTIONS}


def test_a_net_that_copies_its_input_is_found_out(store):
    for said in warnings_of(measured(store, lambda source, target: source)).values():
        assert "nearly a copy of its input (distance to it 0%" in said
    for said in warnings_of(measured(store, lambda source, target: source + 0.05)).values():
        assert "nearly a copy" in said


def test_a_net_that_inverts_the_contrast_is_found_out(store):
    for said in warnings_of(measured(store, lambda source, target: -target)).values():
        assert "contrast is inverted (correlation with the real target -1.00)" in said


def test_a_net_that_leaves_checkerboards_is_found_out(store):
    squares = torch.from_numpy((-1.0) ** np.indices((32, 32)).sum(axis=0)).float()
    records = measured(store, lambda source, target: target + 0.1 * squares)
    for direction, check in contrast_checks(records, "m").items():
        said, = check["warnings"]
        assert f"{direction}: the upsampling leaves a checkerboard" in said
        assert check["checkerboard"] > 1.5 and f"{check['checkerboard']:.2f} times those" in said
    without = [{k: v for k, v in r.items() if k != "checkerboard"} for r in records]
    assert contrast_checks(without, "m")["t1w-to-t2w"]["checkerboard"] is None
    assert not warnings_of(without)["t1w-to-t2w"]


def test_the_real_target_and_one_with_some_noise_raise_no_warning(store):
    noise = 0.1 * torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for translate in (lambda source, target: target, lambda source, target: target + noise):
        assert warnings_of(measured(store, translate)) == {d: "" for d in DIRECTIONS}


def test_a_perfect_translation_has_figures_that_can_be_averaged_and_written(store):
    perfect = [r for r in measured(store, lambda source, target: target) if r["method"] == "model"]
    for r in perfect:
        assert r["psnr_db"] == 100
        if r["protocol"] == "volume":
            assert r["slice_consistency"] == pytest.approx(1, abs=1e-5)
            continue
        assert r["ssim"] == pytest.approx(1) and r["mae"] == 0
        if r["protocol"] == "brain":
            assert r["ncc"] == pytest.approx(1, abs=1e-5)
            assert r["from_input"] > 0.1
    assert json.dumps(perfect, allow_nan=False)


def test_the_floor_is_what_copying_the_input_reaches(store):
    records = measured(store, lambda source, target: source)
    copies, floors = ([r for r in records if r["method"] == m] for m in ("model", "floor"))
    assert len(copies) == len(floors) == 2 * (3 * 3 + 1)
    for copy, floor in zip(copies, floors):
        of_the_model = {"method": "model", "ckpt": "m"}
        if copy["protocol"] == "brain":
            of_the_model["cycle_error"] = copy["cycle_error"]
        assert copy == {**floor, **of_the_model}


def test_warnings_are_printed_and_stand_in_the_report(ckpt, store, results):
    printed = (results / "printed.txt").read_text()
    checks = json.loads((results / "summary.json").read_text())["checks"]
    html = (results / "report.html").read_text()
    said = [w for d in DIRECTIONS for w in checks[d]["warnings"]]
    assert said  # after two steps a net is not yet one to use
    for warning in said:
        assert f"warning: {warning}" in printed
        assert warning in html


# ------------------------------------------------------------------------------------ lesions


def test_lesions_of_each_session_are_told_real_against_translated(tmp_path, unpainted):
    """Two subjects with lesions and one without."""
    store = write_lesion_store(tmp_path / "slices", {
        "train": {"01": ()}, "test": {"02": LESIONS, "03": (), "04": LESIONS[:1]}})
    run = tmp_path / "run"
    assert run_command(train.main, "--slices", store.folder, "--run", run, *TINY, "--max-steps", 1,
                       "--steps-per-epoch", 1).code == 0
    outcome = evaluated(run / "best.pt", store.folder, tmp_path / "e")
    assert outcome.code == 0, outcome.err
    rows = table(tmp_path / "e" / "lesions.csv")
    assert len(rows) == 2 * 3 * 3  # directions, methods, sessions
    by_place = {(r["direction"], r["method"], r["id"][-2:]): r for r in rows}
    for (direction, method, name), r in by_place.items():
        assert r["n_lesions"] == {"02": 2, "03": 0, "04": 1}[name] and r["found_by"] == "rule"
        assert (r["kept"] == "") == (name == "03")
        assert r["ckpt"] == (str(run / "best.pt") if method == "model" else "")
        assert (r["invented_ml"] == "") == (method == "floor")
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    html = (tmp_path / "e" / "report.html").read_text()
    assert summary["lesions"]["found_by"] == "rule" and summary["n_subjects"] == 3
    for direction in DIRECTIONS:
        for method in ("model", "floor", "table"):
            found = summary["lesions"][direction][method]
            assert (found["n_subjects"], found["n_lesions"]) == (2, 3)
            kept = [by_place[direction, method, name]["kept"] for name in ("02", "04")]
            assert found["kept"]["mean"] == pytest.approx(np.mean(kept))
        floor = summary["lesions"][direction]["floor"]
        assert floor["erased"]["mean"] == 1 and floor["kept"]["mean"] < -0.5
        r = by_place[direction, "model", "02"]
        assert f"<td>{r['contrast_translated']:.3f}</td><td>{r['kept']:.2f}</td>" in html
    assert "<h2>Lesions: real against translated</h2>" in html and "<td>3 (2)<br>" in html
    erased = [d for d in DIRECTIONS if summary["lesions"][d]["model"]["erased"]["mean"] > 0.5]
    for direction in DIRECTIONS:
        said = f"warning: {direction}: lesions are mostly erased"
        assert (said in outcome.out + outcome.err) == (direction in erased)


def test_lesions_are_averaged_over_sessions_then_subjects():
    ids = {"direction": "t1w-to-t2w", "method": "model", "ckpt": "m"}
    none = {"n_visible": 0, "n_invented": 0, "invented_ml": 0.0, "lesion_ml": 0.0}
    some = {**none, "n_lesions": 2, "lesion_ml": 1.0, "n_visible": 2, "contrast_real": 0.2,
            "contrast_translated": 0.1}
    records = [{**ids, **some, "id": "a_ses-1", "kept": 0.2, "erased": 1.0},
               {**ids, **some, "id": "a_ses-2", "kept": 0.4, "erased": 0.5},
               {**ids, **some, "id": "b", "kept": 0.9, "erased": 0.5, "invented_ml": 3.0},
               {**ids, **none, "id": "c", "n_lesions": 0}]
    summary = lesion_summary(records, "m", seed=0)
    found = summary["t1w-to-t2w"]["model"]
    assert (found["n_subjects"], found["n_lesions"]) == (2, 6) and summary["t2w-to-t1w"] == {}
    assert found["kept"]["mean"] == pytest.approx((0.3 + 0.9) / 2)
    assert found["erased"]["mean"] == pytest.approx((0.75 + 0.5) / 2)
    assert found["invented_ml"]["mean"] == pytest.approx(1.0)  # of all three
    said, = lesion_warnings(summary)
    assert said == ("t1w-to-t2w: lesions are mostly erased (62% of them; 60% of their contrast is "
                    "kept)")
    titles, row = lesion_rows(summary)
    assert row[:4] == ["T1w to T2w", "translated", "6 (2)\n0.67 ml a subject", "0.200 to 0.100"]
    assert row[4].startswith("0.60 ±") and row[5].startswith("0.62 ±")
    assert len(titles) == len(row)
    healthy = lesion_summary(records[3:], "m", seed=0)
    assert "kept" not in healthy["t1w-to-t2w"]["model"] and lesion_warnings(healthy) == []
    assert lesion_rows(healthy)[1][2:] == ["0 (0)\n0.00 ml a subject", "", "", "", "0.00"]
    nothing = lesion_summary([], "m", seed=0)
    assert lesion_rows(nothing) == [] and lesion_warnings(nothing) == []


def test_masks_of_lesions_are_taken_where_they_are_given(trained_on_heads, small_store,
                                                         segmented_tree, tmp_path, unpainted):
    write_lesions(segmented_tree, "sub-05")
    options = ("--lesions", segmented_tree)
    outcome = evaluated(trained_on_heads, small_store, tmp_path / "e", *options)
    assert outcome.code == 0, outcome.err
    rows = table(tmp_path / "e" / "lesions.csv")
    assert {(r["found_by"], r["n_lesions"]) for r in rows} == {("mask", 1)}
    floor, = (r for r in rows if r["method"] == "floor" and r["direction"] == "t1w-to-t2w")
    assert floor["contrast_real"] > 0.2 and floor["kept"] < 0  # dark on T1w
    assert json.loads((tmp_path / "e" / "summary.json").read_text())["lesions"][
        "found_by"] == "mask"
    other = evaluated(trained_on_heads, small_store, tmp_path / "v", *options, "--split", "val")
    assert "lesions measured on 0 of 1 sessions" in other.out
    assert table(tmp_path / "v" / "lesions.csv") == []
    assert "Lesions: real" not in (tmp_path / "v" / "report.html").read_text()
    missing = evaluated(trained_on_heads, small_store, tmp_path / "e", "--lesions",
                        tmp_path / "nowhere")
    assert missing.code == 2 and "nowhere" in missing.complaint


# -------------------------------------------------------------------------------- the report


def test_the_figure_shows_the_best_the_median_and_the_worst_slice(results, ckpt):
    slices = table(results / "slices.csv")
    for direction in DIRECTIONS:
        shown = best_median_worst(slices, direction, str(ckpt))
        ssim = sorted(s["ssim"] for s in slices if s["direction"] == direction
                      and s["protocol"] == "brain" and s["method"] == "model")
        assert [shown[title]["ssim"] for title in ("best", "median", "worst")] == [
            ssim[-1], ssim[7], ssim[0]]
        picture = Image.open(results / f"slices_{direction}.png")
        assert picture.height > 2 * 0.75 * picture.width / 4  # three rows of four panels


class References(HTMLParser):
    """Collect what a page refers to."""

    def __init__(self, html):
        super().__init__()
        self.sources, self.links, self.tags = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [v for k, v in attributes if k in ("src", "srcset", "poster", "data")]
        self.links += [v for k, v in attributes if k in ("href", "action")]


def test_the_report_opens_from_disk_with_all_pictures_inside(results):
    html = (results / "report.html").read_text(encoding="utf-8")
    found = References(html)
    assert not found.links and "http://" not in html and "https://" not in html
    assert not {"link", "iframe", "object"} & set(found.tags)
    assert "url(" not in html and "@import" not in html and "fetch(" not in html
    prefix = "data:image/png;base64,"
    inside = [base64.b64decode(source.removeprefix(prefix)) for source in found.sources]
    names = ("subjects", "slices_t1w-to-t2w", "slices_t2w-to-t1w", "histograms", "training")
    assert inside == [(results / f"{name}.png").read_bytes() for name in names]
    assert all(png.startswith(b"\x89PNG") for png in inside)
    for name in names:
        assert (results / f"{name}.svg").read_bytes().startswith(b"<?xml")


def test_the_report_says_what_was_measured_on_whom_and_its_limits(results, ckpt):
    html = (results / "report.html").read_text(encoding="utf-8")
    summary = json.loads((results / "summary.json").read_text())
    brain = summary["t1w-to-t2w"]["brain"]["ssim"]
    low, high = brain["ci95"]
    assert (f"<td>{brain['mean']:.3f} ± {brain['sd']:.3f}<br><small>[{low:.3f}, {high:.3f}]"
            "</small></td>") in html
    for text in ("3 subjects, 14 slices", "test split", "Not for diagnosis", "lambda_identity",
                 "painted", "CC0", "floor: copied input", "look-up table",
                 "not measured: no weights"):
        assert text in html


def test_the_table_is_printed_with_units(results):
    printed = (results / "printed.txt").read_text().splitlines()
    assert "PSNR (dB)" in printed[0]
    assert [line[:35].strip() for line in printed[1:4]] == [
        "T1w to T2w  brain     translated", "T1w to T2w  brain     floor: copied",
        "T1w to T2w  brain     look-up table"]
    assert "3 subjects, 14 slices, test split" in printed[1 + 2 * 4 * 3]
    assert "t1w-to-t2w, Frechet distance: not measured: no weights" in printed


# ------------------------------------------------------------------- comparison and distances


@pytest.fixture(scope="module")
def compared(store, ckpt, tmp_path_factory):
    """Two checkpoints on the training split: the folder, both checkpoints, what was printed."""
    run = tmp_path_factory.mktemp("other")
    assert run_command(train.main, "--slices", store.folder, "--run", run / "run", *TINY,
                       "--seed", 1, "--max-steps", 12, "--steps-per-epoch", 12, "--lr",
                       0.002).code == 0
    other = run / "run" / "last.pt"
    out = run / "evaluation"
    outcome = run_command(evaluate.main, "--ckpt", ckpt, other, "--slices", store.folder, "--out",
                          out, "--split", "train", "--precision", "fp32", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    return out, ckpt, other, outcome.out


def by_subject(rows, ckpt, direction, metric):
    return {r["id"]: r[metric] for r in rows if r["ckpt"] == str(ckpt) and r["protocol"] == "brain"
            and r["direction"] == direction}


def test_checkpoints_are_compared_by_paired_differences_over_subjects(compared):
    out, first, other, printed = compared
    summary, rows = json.loads((out / "summary.json").read_text()), table(out / "subjects.csv")
    found, = summary["others"]
    assert summary["ckpt"] == str(first) and found["ckpt"] == str(other)
    assert found["ckpt_sha256"] == checkpoint.fingerprint(other)
    written = {(r["direction"], r["metric"]): r for r in table(out / "comparison.csv")}
    assert len(written) == 2 * 10
    for direction in DIRECTIONS:
        assert list(found["difference"][direction]) == [
            "ssim", "psnr_db", "mae", "rescaled_ssim", "rescaled_psnr_db", "ms_ssim", "ncc",
            "gradient_similarity", "intensity_distance", "cycle_error"]
        for metric, entry in found["difference"][direction].items():
            a, b = (by_subject(rows, ckpt, direction, metric) for ckpt in (first, other))
            assert list(a) == list(b) == ["painted_sub-01", "painted_sub-02"]
            one, two = (b[person] - a[person] for person in a)
            assert entry["mean"] == pytest.approx((one + two) / 2)
            assert entry["sd"] == pytest.approx(abs(one - two) / 2 ** 0.5)
            assert entry["ci95"] == pytest.approx(sorted((one, two)))  # a quarter each of resamples
            # two signs: 2 of 4 are as far out as both alike, all as far as one of each
            assert entry["p"] == (0.5 if one * two > 0 else 1.0) and entry["p_holm"] == 1.0
            line = written[direction, metric]
            assert line["ckpt"] == str(other)
            assert [line[k] for k in ("mean", "sd", "low", "high", "p", "p_holm")] == [
                entry["mean"], entry["sd"], *entry["ci95"], entry["p"], entry["p_holm"]]
            assert found[direction]["brain"][metric]["mean"] == pytest.approx(
                np.mean(list(b.values())))
        assert found["difference"][direction]["ssim"]["mean"] != 0
    assert "Comparison of checkpoints" in (out / "report.html").read_text()
    assert (out / "comparison_1.svg").exists() and str(other) in printed


def test_the_training_split_is_measured_by_name(compared):
    out, *_ = compared
    summary = json.loads((out / "summary.json").read_text())
    assert summary["split"] == "train" and summary["n_slices"] == 8
    assert [note for note in summary["notes"] if note.startswith(
        "2 of 2 sessions were trained on, so their figures are far too good")]


def test_cycle_errors_in_different_intensities_are_not_compared(ckpt, store, tmp_path, unpainted):
    state = checkpoint.load(ckpt)
    assert state["preprocessing"].pop("standard")
    checkpoint.save(tmp_path / "plain.pt", state)
    outcome = run_command(evaluate.main, "--ckpt", ckpt, tmp_path / "plain.pt", "--slices",
                          store.folder, "--out", tmp_path / "e", "--precision", "fp32", "--device",
                          "cpu")
    assert outcome.code == 0 and "note: cycle error not compared" in outcome.out + outcome.err
    found, = json.loads((tmp_path / "e" / "summary.json").read_text())["others"]
    for direction in DIRECTIONS:
        assert "ssim" in found["difference"][direction]
        assert "cycle_error" not in found["difference"][direction]
        assert found[direction]["brain"]["cycle_error"]["mean"] > 0  # each is told on its own


def test_a_comparison_of_before_does_not_stay(compared, store, tmp_path, unpainted):
    out, _, other, _ = compared
    shutil.copytree(out, tmp_path / "e")
    shutil.copy(other, tmp_path / "best.pt")  # as it was sent elsewhere: no metrics.jsonl beside it
    names = {"comparison.csv", "comparison_1.png", "training.png", "training.svg"}
    assert names <= set(content(tmp_path / "e"))
    theirs = {"comparison.py", "comparison_notes.md", "training.log", "comparison_1.svg.bak"}
    for name in theirs:  # of the user's own
        (tmp_path / "e" / name).write_text("kept")
    (tmp_path / "e" / "comparison").mkdir()
    assert evaluated(tmp_path / "best.pt", store.folder, tmp_path / "e").code == 0
    assert not names & set(content(tmp_path / "e"))
    assert all((tmp_path / "e" / name).read_text() == "kept" for name in theirs)
    assert (tmp_path / "e" / "comparison").is_dir()
    assert "No metrics.jsonl beside the checkpoint" in (tmp_path / "e/report.html").read_text()


def test_distances_are_taken_in_the_features_of_the_given_weights(ckpt, tmp_path, unpainted):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = inception_v3(weights=None, init_weights=False, transform_input=True)
        for part in net.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.momentum = 1.0  # takes over the batch's own figures, else features fade to 0
        with torch.no_grad():
            net(torch.randn(2, 3, 299, 299))
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    store = SliceStore(write_store(tmp_path / "slices", {"train": ["01"], "test": ["04", "05"]},
                                   n_slices={"01": 2, "04": 1, "05": 2}))
    outcome = evaluated(ckpt, store.folder, tmp_path / "e", "--features",
                        tmp_path / "inception.pth")
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "e" / "summary.json").read_text())["distribution"]
    features = load_features(tmp_path / "inception.pth")
    nets = checkpoint.load_generators(checkpoint.load(ckpt))
    rows = store.rows("test")
    t1w, t2w = (given(ckpt, store, rows, contrast) for contrast in ("t1w", "t2w"))
    targets = to_tensor(store.t2w[rows]), to_tensor(store.t1w[rows])
    for direction, net, source, target in zip(DIRECTIONS, nets, (t1w, t2w), targets):
        with torch.no_grad():
            real, fake = (features((v + 1) / 2) for v in (target, net(source)))
        assert found[direction]["Frechet distance"] == pytest.approx(
            float(frechet_distance(real, fake)), rel=1e-3)
        kernel = kernel_distance(real, fake, generator=torch.Generator().manual_seed(0))
        assert found[direction]["kernel distance x 1000"] == pytest.approx(
            1000 * float(kernel.mean), rel=1e-3)
        value = found[direction]["Frechet distance"]
        assert value > 0
        assert f"{direction}, Frechet distance: {value:.4g}" in outcome.out
        assert f"<td>{value:.4g}</td>" in (tmp_path / "e" / "report.html").read_text()


# -------------------------------------------------------------- the ceiling, many processes


def test_the_ceiling_is_a_row_that_is_trained_once(ckpt, store, tmp_path, unpainted):
    out = tmp_path / "e"
    assert evaluated(ckpt, store.folder, out, "--ceiling").code == 0
    summary = json.loads((out / "summary.json").read_text())
    state = checkpoint.load(out / "ceiling.pt")
    nets = checkpoint.load_generators(state)
    standard = StandardRows(store, Standard.of_record(state["preprocessing"]))
    person, = (s for s in store.subjects if s["id"] == "painted_sub-04")
    paired = Method("ceiling", dict(zip(DIRECTIONS, nets)), standard=standard)
    records, *_ = measure_session(store, person, [paired], CPU)
    wanted = np.mean([r["ssim"] for r in records if r["direction"] == "t1w-to-t2w"
                      and r["protocol"] == "brain"])
    found, = (r["ssim"] for r in table(out / "subjects.csv") if r["id"] == "painted_sub-04"
              and (r["method"], r["protocol"], r["direction"]) == ("ceiling", "brain",
                                                                   "t1w-to-t2w"))
    assert found == pytest.approx(wanted, abs=1e-6)
    assert set(summary["t1w-to-t2w"]["ceiling"]) == {"brain", "slice", "box", "volume"}
    assert "ceiling: paired training" in (out / "report.html").read_text()
    before = (out / "ceiling.pt").stat().st_mtime_ns
    assert evaluated(ckpt, store.folder, out, "--ceiling").code == 0
    assert (out / "ceiling.pt").stat().st_mtime_ns == before
    (out / "ceiling.pt").write_bytes(ckpt.read_bytes())
    outcome = evaluated(ckpt, store.folder, out, "--ceiling")
    assert outcome.code == 2 and "ceiling.pt: is not the ceiling" in outcome.complaint


def test_under_torchrun_all_files_are_the_same_to_the_byte(ckpt, tmp_path, monkeypatch):
    """Two sessions among three processes: they are shared out, and one process has none."""
    splits = {"train": ["01"], "test": ["04", "05"]}
    write_store(tmp_path / "slices", splits, n_slices={"01": 2, "04": 3, "05": 5})
    options = ["--ckpt", "run/best.pt", "--slices", "../slices", "--out", "out", "--device", "cpu",
               "--precision", "fp32", "--batch-size", "2"]
    for name in ("alone", "many"):
        shutil.copytree(ckpt.parent, tmp_path / name / "run")
    root = Path(evaluate.__file__).parent
    done = subprocess.run(
        [sys.executable, root / "torchrun.py", "--standalone", "--nproc-per-node=3",
         root / "evaluate.py", *options], cwd=tmp_path / "many", capture_output=True, text=True,
        timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("2 subjects, 8 slices") == 1
    monkeypatch.chdir(tmp_path / "alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as torchrun gives: sums are rounded by their order
    try:
        assert run_command(evaluate.main, *options).code == 0
    finally:
        torch.set_num_threads(threads)
    alone, many = (content(tmp_path / name / "out") for name in ("alone", "many"))
    assert alone == many
    assert {"summary.json", "subjects.csv", "slices.csv", "lesions.csv", "report.html"} <= set(
        alone)


# --------------------------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def opened(results, tmp_path_factory):
    """The report in a browser, its viewer ready."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with open_page(results / "report.html", tmp_path_factory.mktemp("profile")) as page:
        page.wait_for("document.getElementById('viewer-number').textContent")
        yield page


def text_of(page, name):
    return page.run(f"document.getElementById({name!r}).textContent")


def choose(page, number, k, blend=100, direction="t1w-to-t2w"):
    """Set the viewer's controls: the subject by its number."""
    if page.run("document.getElementById('viewer-subject').value") != str(number):
        # else it would load again, and go to the middle slice when it has
        page.set("viewer-subject", number)
    slices = list(N_SLICES.values())[3 + number]
    page.wait_for(f"document.getElementById('viewer-number').textContent.endsWith('of {slices}')")
    page.set("viewer-direction", direction)
    page.set("viewer-slice", k)
    page.set("viewer-blend", blend)


def grey(page, name):
    """(H, W) of a canvas that shows grey."""
    found = np.array(page.pixels(name))
    assert (found == found[..., :1]).all()
    return found[..., 0]


def shades(slices):
    """What 0 to 255 an image in [-1, 1] is shown as."""
    return np.round((slices.astype(np.float32) + 1) / 2 * 255).astype(int)


def test_the_report_opens_in_a_browser_without_complaint_or_network(opened, results):
    assert opened.run("document.title") == "T1w / T2w translation: evaluation"
    assert opened.run("[...document.images].every(i => i.naturalWidth > 300)")
    assert opened.run("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    assert not opened.complaints
    others = {url for url in opened.requests if not url.startswith("data:")}
    assert others == {(results / "report.html").resolve().as_uri()}


def test_the_slice_slider_moves_to_the_next_slice_by_a_key(opened, store):
    choose(opened, 1, 1)
    before = grey(opened, "viewer-input")
    opened.press("viewer-slice", "ArrowRight", 39)
    assert text_of(opened, "viewer-number") == "3 of 5"
    after = grey(opened, "viewer-input")
    assert not np.array_equal(before, after) and not opened.complaints
    first = store.rows("test")[3]  # of the second subject
    assert np.array_equal(before, shades(store.t1w[first + 1]))
    assert np.array_equal(after, shades(store.t1w[first + 2]))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_blend_goes_from_the_stores_real_slice_to_the_translated_one(
        opened, store, ckpt, direction):
    """Of every slice of two subjects."""
    source, target = ((store.t1w, store.t2w) if direction == "t1w-to-t2w"
                      else (store.t2w, store.t1w))
    net = checkpoint.load_generators(checkpoint.load(ckpt))[DIRECTIONS.index(direction)]
    row = int(store.rows("test")[0])
    for number, n in ((0, 3), (1, 5)):
        for k in range(n):
            choose(opened, number, k, 0, direction)
            real = grey(opened, "viewer-result")
            assert np.array_equal(real, shades(target[row]))
            assert np.array_equal(grey(opened, "viewer-input"), shades(source[row]))
            choose(opened, number, k, 100, direction)
            made = grey(opened, "viewer-result")
            with torch.no_grad():
                fake = net(given(ckpt, store, np.array([row]), direction[:3]))[0, 0]
            assert np.abs(made - shades(fake.numpy())).max() <= 1
            assert np.abs(made - real).max() > 20
            row += 1
    choose(opened, 1, 4, 50, direction)
    assert np.abs(grey(opened, "viewer-result") - (real + made) / 2).max() <= 0.5
    assert not opened.complaints


def test_captions_and_the_error_map_are_of_the_slice_that_is_shown(opened, store, results, ckpt):
    rows = [r for r in table(results / "slices.csv") if r["id"].endswith("06_ses-b")
            and r["method"] == "model" and r["protocol"] == "brain"]
    for direction in DIRECTIONS:
        for k, r in enumerate(r for r in rows if r["direction"] == direction):
            choose(opened, 3, k, 100, direction)
            assert f"SSIM {r['ssim']:.3f}   PSNR {r['psnr_db']:.1f} dB" in text_of(
                opened, "viewer-caption")
            error = np.array(opened.pixels("viewer-error")).sum(axis=-1)
            inside = store.mask(slice(int(r["row"]), int(r["row"]) + 1))[0]
            assert not error[~inside].any() and (error[inside] > 0).mean() > 0.9
        assert text_of(opened, "viewer-number") == "4 of 4"
        target = {"t1w-to-t2w": "T2w", "t2w-to-t1w": "T1w"}[direction]
        assert text_of(opened, "viewer-result-name") == f"{target} translated"


def test_a_slider_moved_while_another_subject_loads_does_no_harm(opened):
    choose(opened, 0, 0)
    opened.run("""(() => { const at = name => document.getElementById('viewer-' + name);
        at('subject').value = 1; at('subject').dispatchEvent(new Event('change'));
        at('slice').value = 2; at('slice').dispatchEvent(new Event('input')); })()""")
    opened.wait_for("document.getElementById('viewer-number').textContent === '3 of 5'")
    assert not opened.complaints


# ---------------------------------------------------------------------------------- new scans


@pytest.fixture(scope="module")
def trained_on_heads(small_store, tmp_path_factory):
    """A checkpoint trained on `small_store`, that is on sub-01 to sub-03 of the tree `heads`."""
    run = tmp_path_factory.mktemp("heads") / "run"
    assert run_command(train.main, "--slices", small_store, "--run", run, *TINY,
                       "--max-steps", 1).code == 0
    return run / "best.pt"


def test_new_scans_go_through_the_checkpoints_own_pipeline(
        trained_on_heads, small_store, small_tree, tmp_path, unpainted):
    """The test subject's scans, in a tree of their own, give the figures of the store's test."""
    root = tmp_path / "new"
    shutil.copytree(small_tree / "sub-05", root / "sub-05")
    shutil.copytree(small_tree / "sub-05", root / "sub-06")
    (root / "sub-06" / "anat" / "sub-05_T2w.nii.gz").unlink()  # no pair: left out
    assert evaluated(trained_on_heads, small_store, tmp_path / "known").code == 0
    outcome = evaluated(trained_on_heads, small_store, tmp_path / "e", "--bids", root)
    assert outcome.code == 0, outcome.err
    known, found = (json.loads((tmp_path / name / "summary.json").read_text())
                    for name in ("known", "e"))
    assert found["subjects"] == ["new_sub-05"] and found["split"] == "bids"
    for direction in DIRECTIONS:  # floor, look-up table (of the training slices) and model
        assert found[direction] == known[direction] and "table" in found[direction]
    assert SliceStore(tmp_path / "e" / "slices").header["size"] == 48
    assert "1 subjects" in outcome.out and "new scans" in outcome.out
    # another tree into the same folder: only that one is measured
    shutil.copytree(small_tree / "sub-04", tmp_path / "newer" / "sub-04")
    outcome = evaluated(trained_on_heads, tmp_path / "none", tmp_path / "e", "--bids",
                        tmp_path / "newer")
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert found["subjects"] == ["newer_sub-04"]
    assert "slices-newer" in found["slices"]  # a head is in a store but once, and these are alike
    # of a tree of the same name what is there is measured, not what was there before
    shutil.rmtree(root / "sub-06")
    shutil.copytree(small_tree / "sub-04", root / "sub-04")
    for path in (root / "sub-05").rglob("*_T2w.nii.gz"):
        path.unlink()
    outcome = evaluated(trained_on_heads, tmp_path / "none", tmp_path / "e", "--bids", root)
    assert outcome.code == 0, outcome.err
    again = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert again["subjects"] == ["new_sub-04"]
    # and without the training slices there is no table, which is said
    said = "look-up table not measured: no training slices like the checkpoint's"
    assert "table" not in found["t1w-to-t2w"] and said in outcome.out
    assert said in (tmp_path / "e" / "report.html").read_text().replace("&#x27;", "'")


def test_new_scans_of_a_subject_that_was_trained_on_are_refused(
        trained_on_heads, small_store, small_tree, tmp_path, unpainted):
    outcome = evaluated(trained_on_heads, small_store, tmp_path / "e", "--bids", small_tree)
    assert outcome.code == 2
    assert "heads_sub-01 is among the scans in --bids, but" in outcome.complaint
    assert not (tmp_path / "e" / "summary.json").exists()


def test_a_subject_that_was_trained_on_is_known_under_another_name(
        trained_on_heads, small_store, small_tree, tmp_path, unpainted):
    for path in (small_tree / "sub-01").rglob("*.nii.gz"):
        target = tmp_path / "other" / "sub-09" / "anat" / path.name.replace("sub-01", "sub-09")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    outcome = evaluated(trained_on_heads, small_store, tmp_path / "e", "--bids", tmp_path / "other")
    assert outcome.code == 2
    assert "other_sub-09 is among the scans in --bids, but" in outcome.complaint


def test_a_split_is_of_a_store_and_a_store_is_no_place_for_results(ckpt, store, tmp_path):
    outcome = evaluated(ckpt, store.folder, tmp_path / "e", "--bids", tmp_path, "--split", "val")
    assert outcome.code == 2 and "--split val: goes with --slices" in outcome.complaint
    before = sorted(p.name for p in store.folder.iterdir())
    outcome = evaluated(ckpt, store.folder, store.folder)
    assert outcome.code == 2 and "is a slice store" in outcome.complaint
    assert before == sorted(p.name for p in store.folder.iterdir())


def test_the_ceiling_of_new_scans_needs_the_training_slices(
        trained_on_heads, small_store, small_tree, tmp_path, unpainted):
    shutil.copytree(small_tree / "sub-05", tmp_path / "new" / "sub-05")
    outcome = evaluated(trained_on_heads, tmp_path / "none", tmp_path / "e", "--bids",
                        tmp_path / "new", "--ceiling")
    assert outcome.code == 2 and "name their store with --slices" in outcome.complaint


def test_brains_of_other_sizes_can_be_believed_in_new_scans(
        trained_on_heads, small_tree, tmp_path, unpainted, capfd):
    shutil.copytree(small_tree / "sub-05", tmp_path / "new" / "sub-05")
    options = "--bids", tmp_path / "new", "--brain-ml"
    refused = evaluated(trained_on_heads, tmp_path / "none", tmp_path / "e", *options, 300, 900)
    assert refused.code == 2 and "believed are 300 to 900" in capfd.readouterr().err
    outcome = evaluated(trained_on_heads, tmp_path / "none", tmp_path / "e", *options, 300, 2500)
    assert outcome.code == 0, outcome.err


def test_scans_that_preprocessing_refuses_are_one_error_more(trained_on_heads, store, tmp_path):
    (tmp_path / "empty").mkdir()
    outcome = evaluated(trained_on_heads, store.folder, tmp_path / "e", "--bids",
                        tmp_path / "empty")
    assert outcome.code == 2
    assert "preprocess.py ended with exit code 2, see above" in outcome.complaint


# ---------------------------------------------------------------------------------- refusals


def test_subjects_that_the_checkpoint_was_trained_on_are_refused(ckpt, tmp_path):
    slices = write_store(tmp_path / "slices", {"train": ["04"], "test": ["05", "02"]}, n_slices=3)
    outcome = evaluated(ckpt, slices, tmp_path / "e")
    assert outcome.code == 2
    assert "painted_sub-02 is in the test split, but" in outcome.complaint
    assert "was trained on it" in outcome.complaint and not (tmp_path / "e").exists()


def test_another_session_of_a_trained_subject_is_refused_too(ckpt, tmp_path):
    slices = write_store(tmp_path / "slices", {"train": ["04"], "test": ["02_ses-2"]}, n_slices=3)
    outcome = evaluated(ckpt, slices, tmp_path / "e")
    assert outcome.code == 2 and "painted_sub-02 is in the test split" in outcome.complaint


def test_an_empty_split_is_refused_with_a_cure(ckpt, tmp_path):
    slices = write_store(tmp_path / "slices", {"train": ["01"]}, n_slices=3)
    outcome = evaluated(ckpt, slices, tmp_path / "e")
    assert outcome.code == 2
    assert "the test split has no subjects; name some with preprocess.py --test" \
        in outcome.complaint


def test_a_store_of_another_size_is_refused_with_both(ckpt, tmp_path):
    slices = write_store(tmp_path / "slices", SPLITS, size=40, n_slices=3)
    outcome = evaluated(ckpt, slices, tmp_path / "e")
    assert outcome.code == 2
    assert "made with size 40" in outcome.complaint and "trained on 32" in outcome.complaint


def test_a_checkpoint_or_store_that_is_none_is_one_error(ckpt, store, tmp_path):
    (tmp_path / "text.pt").write_text("text")
    state = torch.load(ckpt, weights_only=True)
    torch.save({**state, "format": {"name": checkpoint.FORMAT, "version": 2}}, tmp_path / "new.pt")
    state["ema"]["G"]["to_slice.bias"] += float("nan")
    torch.save(state, tmp_path / "nan.pt")
    state["ema"]["G"]["to_slice.bias"].zero_()
    state["preprocessing"]["standard"] = {"percentiles": [1, 50, 99]}
    torch.save(state, tmp_path / "old.pt")
    for path, slices, said in (
            (tmp_path / "none.pt", store.folder, "no such checkpoint"),
            (tmp_path / "text.pt", store.folder, "not a checkpoint"),
            (tmp_path / "new.pt", store.folder, "version 2, this program reads"),
            (tmp_path / "nan.pt", store.folder, "nan.pt: checkpoint's weights of G are not finite"),
            (tmp_path / "old.pt", store.folder, "old.pt: checkpoint's histograms"),
            (ckpt, tmp_path, "no slice store there"),
            (ckpt, tmp_path / "none", "no slice store there")):
        outcome = evaluated(path, slices, tmp_path / "e")
        assert outcome.code == 2 and said in outcome.complaint


@pytest.mark.parametrize("options, said", [
    (["--batch-size", 0], "--batch-size 0"), (["--split", "all"], "invalid choice"),
    (["--device", "tpu"], "--device tpu"), (["--precision", "fp16"], "needs a CUDA device"),
    (["--seed", -1], "--seed -1"), (["--batch", 4], "unrecognized arguments: --batch 4"),
    (["--brain-extraction", "none"], "--brain-extraction: goes with --bids"),
    (["--brain-ml", "100", "900"], "--brain-ml: goes with --bids"),
    (["--features", "none.pth"], "none.pth: no such file of weights"),
    (["--ckpt", "a.pt", "b.pt", "a.pt"], "--ckpt: one is named twice"),
])
def test_options_that_cannot_work_are_one_error(ckpt, store, tmp_path, options, said):
    outcome = evaluated(ckpt, store.folder, tmp_path / "e", *options)
    assert outcome.code == 2 and said in outcome.complaint


@pytest.mark.parametrize("option", ["--features", "--tissues", "--lesions"])
def test_a_name_that_is_nowhere_is_told_before_a_ceiling_is_trained(ckpt, store, tmp_path, option):
    outcome = evaluated(ckpt, store.folder, tmp_path / "e", "--ceiling", option, tmp_path / "none")
    assert outcome.code == 2 and "none" in outcome.complaint
    assert not (tmp_path / "e" / "ceiling.pt").exists()


def test_results_go_beside_the_checkpoint_unless_told_otherwise(ckpt, store, tmp_path, unpainted):
    beside = tmp_path / "best.pt"
    beside.write_bytes(ckpt.read_bytes())
    assert run_command(evaluate.main, "--ckpt", beside, "--slices", store.folder,
                       "--device", "cpu").code == 0
    assert (tmp_path / "evaluation" / "report.html").exists()
    (tmp_path / "file").write_text("")
    outcome = evaluated(beside, store.folder, tmp_path / "file")
    assert outcome.code == 2 and "is a file; name a folder" in outcome.complaint


def test_the_order_of_tissues_is_told_where_they_are_known(small_store, segmented_tree, tmp_path,
                                                           unpainted):
    """Subject 05 has maps: its scans are in order, and a copied T1w is no T2w."""
    run = tmp_path / "run"
    assert run_command(train.main, "--slices", small_store, "--run", run, *TINY, "--max-steps", 1,
                       "--steps-per-epoch", 1).code == 0
    out = tmp_path / "evaluation"
    outcome = evaluated(run / "best.pt", small_store, out, "--tissues", segmented_tree)
    assert outcome.code == 0, outcome.err
    summary = json.loads((out / "summary.json").read_text())
    for direction in DIRECTIONS:
        assert summary[direction]["floor"]["volume"]["contrast_order"]["mean"] == 0
        assert summary[direction]["volume"]["contrast_order"]["mean"] in (0, 1)
    store = SliceStore(small_store)
    row = next(s for s in store.subjects if s["split"] == "test")
    known = find_tissues([segmented_tree], [row])[row["id"]]
    shares = torch.from_numpy(tissue_slices(store, row, *known))
    rows = slice(row["first_row"], row["first_row"] + row["n_slices"])
    for name, scan in (("T1w", store.t1w), ("T2w", store.t2w)):
        real = torch.from_numpy(scan[rows].astype(np.float32))[:, None]
        assert measuring.measure_order(real, shares, name) == {"contrast_order": 1}
    assert measuring.measure_order(real, None, "T2w") == {}
    assert summary["notes"] == [] and "contrast order" in (out / "report.html").read_text()
    other = evaluated(run / "best.pt", small_store, out, "--tissues", segmented_tree, "--split",
                      "train")
    assert "contrast order measured on 0 of 3 sessions" in other.out
    missing = evaluated(run / "best.pt", small_store, out, "--tissues", tmp_path / "nowhere")
    assert missing.code == 2 and "nowhere" in missing.complaint


def test_a_split_that_chose_the_checkpoint_says_so(ckpt, store, results, tmp_path, unpainted):
    assert "chose which epoch" not in (results / "printed.txt").read_text()
    outcome = evaluated(ckpt, store.folder, tmp_path / "val", "--split", "val")
    assert outcome.code == 0 and "note: 1 of 1 sessions chose which epoch became best.pt" in (
        outcome.out + outcome.err)
    notes = json.loads((tmp_path / "val" / "summary.json").read_text())["notes"]
    assert [note for note in notes if "--split test" in note]
    # nobody chose the end of a run
    last = evaluated(ckpt.with_name("last.pt"), store.folder, tmp_path / "last", "--split", "val")
    assert last.code == 0 and "chose which epoch" not in last.out + last.err


def test_subjects_that_chose_the_checkpoint_are_known_in_another_stores_test_split(
        ckpt, tmp_path, unpainted):
    swapped = {"train": ["01", "02"], "val": ["04"], "test": ["03", "05"]}
    write_store(tmp_path / "swapped", swapped, n_slices=N_SLICES)
    outcome = evaluated(ckpt, tmp_path / "swapped", tmp_path / "e")
    assert outcome.code == 0 and "note: 1 of 2 sessions chose which epoch became best.pt" in (
        outcome.out + outcome.err)
