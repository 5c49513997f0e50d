"""The page of `preprocess.py --report`."""

import re
import shutil

import numpy as np

import preprocess
from data.store import SliceStore
from report.preprocessing import COLUMNS, look_at, preprocessing_page, suspicion

FINE = {"id": "tree_sub-01", "split": "train", "n_slices": "4", "brain_ml": "1300.0",
        "brain_extraction": "none", "registration": "rigid", "translation_mm": "1.2",
        "rotation_deg": "0.5", "mi_before": "0.30", "mi_after": "0.35", "t2w_coverage": "1.0000",
        "cut_share": "0.0000", "note": ""}


def shown(alike=-1, **changes):
    stack = np.linspace(-1, 1, 4 * 32 * 32).reshape(4, 32, 32)
    return look_at({**FINE, **changes}, lambda: (stack, alike * stack, stack > 0))


def test_nothing_is_suspicious_about_a_fine_subject():
    assert suspicion(FINE) == ""


def test_each_figure_out_of_range_is_named():
    assert "covers 90%" in suspicion({**FINE, "t2w_coverage": "0.90"})
    assert "2.0% of the brain lies outside" in suspicion({**FINE, "cut_share": "0.02"})
    assert "moved 12 mm" in suspicion({**FINE, "translation_mm": "12.3"})
    assert suspicion({**FINE, "note": "headers kept"}) == "headers kept"


def test_a_t2w_that_looks_like_a_t1w_is_named():
    assert shown(alike=-1).alike < -0.99 and suspicion(FINE, -1.0) == ""
    mislabelled = shown(alike=1)
    assert mislabelled.alike > 0.99
    assert "T2w looks like T1w (correlation 0.87): is it a T2w?" in suspicion(FINE, 0.87)
    html = preprocessing_page([shown(), mislabelled], {}, "Slices")
    assert "tree_sub-01: T2w looks like T1w" in html


def test_histograms_count_every_voxel_of_the_brain_and_no_other():
    subject = shown()
    assert subject.t1w_counts.sum() == subject.t2w_counts.sum() == 4 * 32 * 32 / 2
    assert subject.t1w_counts[:19].sum() == 0 and subject.t2w_counts[21:].sum() == 0


def test_suspicious_subjects_come_first_and_skipped_ones_have_their_reasons():
    html = preprocessing_page([shown(), shown(id="tree_sub-02", note="headers kept")],
                              {"tree_sub-03": "no T2w <here>"}, "Slices")
    table = html[html.index("Figures"):]
    assert table.index("tree_sub-02") < table.index("tree_sub-01") < table.index("tree_sub-03")
    assert "no T2w &lt;here&gt;" in html
    assert all(title in table for title in COLUMNS.values())


def test_the_page_needs_nothing_from_outside():
    html = preprocessing_page([shown()] * 9, {}, "Slices")
    sources = re.findall(r"(?:src|href)='([^']{0,30})", html)
    assert len(sources) == 2  # eight subjects a picture
    assert "9 sessions kept, 0 skipped, 36 slices" in html
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_a_large_store_is_drawn_in_part_and_listed_whole(monkeypatch):
    monkeypatch.setattr("report.preprocessing.MOST", 9)
    many = [shown(id=f"tree_sub-{n:02}") for n in range(20)]
    html = preprocessing_page(many, {}, "Slices")
    assert html.count("<img") == 2 and "The first 9 are drawn" in html
    assert all(f"<td>tree_sub-{n:02}</td>" in html for n in range(20))


def test_the_command_draws_every_subject_of_a_store(small_store, tmp_path, capsys):
    folder = tmp_path / "slices"
    shutil.copytree(small_store, folder)
    assert preprocess.main(["--report", "--out", str(folder)]) == 0
    html = (folder / "report.html").read_text()
    assert all(f"<td>{s['id']}</td>" in html for s in SliceStore(folder).subjects)
