"""The whole command: stores, skips, refusals, growth, and the same bytes after any kill."""

import gzip
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tiny_hdbet
from commands import run_command
from conftest import content, lay_affine, rigid, write_pair
from drawn_once import drawn_once
from scipy import ndimage

import preprocess
import preprocessing_jobs
from data import store
from data.bids import find_subjects
from data.brain import nonzero_mask
from data.store import SliceStore
from data.subject import Settings, prepare, recipe

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data" / "bids-extracted"
SMALL = ["--size", "48", "--spacing", "4"]
EXTRACTED = [*SMALL, "--brain-extraction", "none"]


@pytest.fixture(scope="module", autouse=True)
def sheets():
    with drawn_once():
        yield


def run(out, *roots, options=EXTRACTED, workers=0):
    return run_command(preprocess.main, "--bids", *roots, "--out", out, "--workers", workers,
                       *options)


def splits(out):
    return {(s["dataset"], s["subject"]): s["split"] for s in SliceStore(out).subjects}


def skipped(out):
    return {row["id"]: row["reason"] for row in store.read_table(out / "skipped.tsv")}


def rows_of(out, name):
    """A subject's slices in a store and its line of the table."""
    opened = SliceStore(out)
    subject = next(s for s in opened.subjects if s["id"] == name)
    span = slice(subject["first_row"], subject["first_row"] + subject["n_slices"])
    return (opened.t1w[span].tobytes() + opened.t2w[span].tobytes()
            + opened.packed_mask[span].tobytes(), subject)


# ---------------------------------------------------------------------------------- what is built


def test_a_tree_becomes_a_store_that_its_own_check_calls_sound(small_store):
    opened = SliceStore(small_store)
    assert splits(small_store) == {("heads", "01"): "train", ("heads", "02"): "train",
                                   ("heads", "03"): "train", ("heads", "04"): "val",
                                   ("heads", "05"): "test"}
    assert opened.header["counts"]["subjects"] == {"all": 5, "train": 3, "val": 1, "test": 1}
    assert opened.header["sources"][0]["license"] == "CC0"
    assert (opened.header["size"], opened.header["spacing_mm"]) == (48, 4.0)
    checked = run_command(preprocess.main, "--check", "--out", small_store)
    assert (checked.code, checked.err) == (0, "")
    assert "sound: every row" in checked.out
    assert ["all", "5", "5", str(len(opened))] in [x.split() for x in checked.out.splitlines()]


def test_running_again_with_nothing_new_touches_no_file(small_tree, small_store):
    def state():
        return content(small_store), {p: p.stat().st_mtime_ns for p in small_store.iterdir()}

    before = state()
    again = run(small_store, small_tree)
    assert again.code == 0 and "done" not in again.out
    assert state() == before


def test_a_read_only_tree_by_any_path_gives_the_same_bytes(small_tree, tmp_path, monkeypatch):
    root = tmp_path / "with spaces" / "heads"
    shutil.copytree(small_tree, root)
    for path in (root, *root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = content(root)
    assert run(tmp_path / "a", root).code == 0
    monkeypatch.chdir(root.parent)
    assert run("../b", "heads/").code == 0
    monkeypatch.chdir(root)
    assert run("../../c", ".").code == 0
    assert content(tmp_path / "a") == content(tmp_path / "b") == content(tmp_path / "c")
    assert content(root) == before
    for path in root.rglob("*"):
        path.chmod(0o755)


def test_orientation_file_type_and_compression_do_not_matter(tmp_path):
    """One head, written in six ways: the same voxels, so the same slices (in six sessions, since as
    six subjects it is one person under six names)."""
    anat = write_pair(tmp_path / "heads", "01", session="1", person=7)
    one, two = nib.Nifti1Image, nib.Nifti2Image
    for n, (axes, kind, dtype, ending) in enumerate((
            ("LPS", one, np.int16, ".nii.gz"), ("LAS", one, np.uint16, ".nii"),
            ("PIR", two, np.int16, ".nii.gz"), ("SRP", one, np.float32, ".nii"),
            ("RAS", one, np.float64, ".nii.gz")), start=2):
        folder = tmp_path / "heads" / "sub-01" / f"ses-{n}" / "anat"
        folder.mkdir(parents=True)
        for suffix in ("T1w", "T2w"):
            image = nib.load(anat / f"sub-01_ses-1_{suffix}.nii.gz")
            turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine),
                                                   nib.orientations.axcodes2ornt(axes))
            image = image.as_reoriented(turn)
            data = np.asarray(image.dataobj).astype(dtype)
            data = data[..., None] if axes == "LAS" else data  # 4-D with one volume
            kind(data, image.affine, dtype=dtype).to_filename(
                folder / f"sub-01_ses-{n}_{suffix}{ending}")
    assert run(tmp_path / "out", tmp_path / "heads").code == 0
    opened = SliceStore(tmp_path / "out")
    assert len(opened.subjects) == 6
    first = rows_of(tmp_path / "out", "heads_sub-01_ses-1")[0]
    for subject in opened.subjects[1:]:
        assert rows_of(tmp_path / "out", subject["id"])[0] == first, subject["id"]


def test_sessions_stay_in_one_split_and_the_table_says_which_runs_were_taken(tmp_path):
    root = tmp_path / "study"
    for label, session in (("01", "a"), ("01", "b"), ("02", ""), ("03", ""), ("04", "z")):
        anat = write_pair(root, label, session=session)
        stem = f"sub-{label}" + (f"_ses-{session}" if session else "")
        if label in ("01", "02"):  # a repeat, noisy: it must not be the one taken
            scan = anat / f"{stem}_T1w.nii.gz"
            noise = nib.load(scan)
            noise = nib.Nifti1Image(np.asarray(noise.dataobj)[::-1], noise.affine)
            noise.to_filename(anat / f"{stem}_run-2_T1w.nii.gz")
            scan.rename(anat / f"{stem}_run-1_T1w.nii.gz")
    assert run(tmp_path / "out", root, options=[*EXTRACTED, "--split", ".4", ".3", ".3"]).code == 0
    table = {s["id"]: s for s in SliceStore(tmp_path / "out").subjects}
    assert list(table) == ["study_sub-01_ses-a", "study_sub-01_ses-b", "study_sub-02",
                           "study_sub-03", "study_sub-04_ses-z"]
    assert table["study_sub-01_ses-b"]["t1w"] == "sub-01/ses-b/anat/sub-01_ses-b_run-1_T1w.nii.gz"
    assert table["study_sub-02"]["t1w"] == "sub-02/anat/sub-02_run-1_T1w.nii.gz"
    assert table["study_sub-02"]["t2w"] == "sub-02/anat/sub-02_T2w.nii.gz"
    assert table["study_sub-01_ses-a"]["split"] == table["study_sub-01_ses-b"]["split"]
    assert SliceStore(tmp_path / "out").header["counts"]["subjects"]["all"] == 4


def test_names_limit_and_split_choose_the_subjects(small_tree, tmp_path):
    chosen = run(tmp_path / "out", small_tree,
                 options=[*EXTRACTED, "--limit", "3", "--val", "sub-01", "--test", "heads/02"])
    assert chosen.code == 0
    assert splits(tmp_path / "out") == {("heads", "01"): "val", ("heads", "02"): "test",
                                        ("heads", "03"): "train"}


def test_an_empty_split_is_filled_and_that_is_said(small_tree, tmp_path):
    # 0.188, 0.947, 0.035, 0.549, 0.064: nobody falls into val
    out = run(tmp_path / "out", small_tree)
    assert "note: split val was empty: sub-04 of heads moved there from train" in out.out
    assert splits(tmp_path / "out")["heads", "04"] == "val"
    assert splits(tmp_path / "out")["heads", "02"] == "test"


def test_with_limit_only_the_taken_subjects_can_be_skipped(small_tree, tmp_path):
    shutil.copytree(small_tree, tmp_path / "heads")
    (tmp_path / "heads" / "sub-05" / "anat" / "sub-05_T2w.nii.gz").unlink()
    assert run(tmp_path / "out", tmp_path / "heads", options=[*EXTRACTED, "--limit", "2"]).code == 0
    assert skipped(tmp_path / "out") == {}
    assert run(tmp_path / "out", tmp_path / "heads").code == 3
    assert skipped(tmp_path / "out") == {"heads_sub-05": "sub-05/anat: has a T1w but no T2w"}


# ------------------------------------------------------------------------------------ bad input


def spoilt_copy(path, content_of):
    path.write_bytes(content_of(path.read_bytes()))


def rewrite(change):
    def spoil(path):
        image = nib.load(path)
        data, affine = change(np.asarray(image.dataobj), image.affine.copy())
        nib.Nifti1Image(data, affine).to_filename(path)
    return spoil


def with_nan(data, affine):
    data = data.astype(np.float32)
    data[5, 5, 5] = np.nan
    return data, affine


def zero_affine(path):
    header = bytearray(gzip.decompress(path.read_bytes()))
    header[280:328] = bytes(48)
    path.write_bytes(gzip.compress(bytes(header)))


def link_to_nothing(path):
    path.unlink()
    path.symlink_to("/nowhere/annex/object")


SPOILT = {
    "a missing twin": (Path.unlink, "has a T1w but no T2w"),
    "a truncated file": (lambda p: spoilt_copy(p, lambda b: b[:len(b) // 2]), "damaged or cut off"),
    "a text": (lambda p: p.write_text("coming soon"), "not a NIfTI file"),
    "a web page": (lambda p: p.write_text("<!DOCTYPE html>\n<p>404"), "<!DOCTYPE html>"),
    "nothing": (lambda p: p.write_bytes(b""), "an empty file"),
    "a NaN": (rewrite(with_nan), "1 voxels are NaN"),
    "a constant": (rewrite(lambda d, a: (0 * d + 7, a)), "every voxel is 7"),
    "one slice": (rewrite(lambda d, a: (d[:, :, :1], a)), "(38, 48, 1)"),
    "two volumes": (rewrite(lambda d, a: (np.stack([d, d], -1), a)), "has 2 volumes"),
    "an affine of zeros": (zero_affine, "no usable voxel size"),
    "a link to nothing": (link_to_nothing, "datalad get"),
    "another place": (rewrite(lambda d, a: (d, lay_affine(d.shape, (4, 4, 5), middle=(900, 0, 0)))),
                      "covers 0% of the brain"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_subject_that_cannot_be_used_is_left_out_with_its_reason(what, small_tree, tmp_path):
    shutil.copytree(small_tree / "sub-01", tmp_path / "heads" / "sub-01")
    shutil.copytree(small_tree / "sub-02", tmp_path / "heads" / "sub-02")
    spoil, reason = SPOILT[what]
    spoil(tmp_path / "heads" / "sub-02" / "anat" / "sub-02_T2w.nii.gz")
    result = run(tmp_path / "out", tmp_path / "heads")
    assert result.code == 3 and "Traceback" not in result.err + result.out
    assert list(splits(tmp_path / "out")) == [("heads", "01")]
    assert list(skipped(tmp_path / "out")) == ["heads_sub-02"]
    assert reason in skipped(tmp_path / "out")["heads_sub-02"]
    assert "sub-02" in skipped(tmp_path / "out")["heads_sub-02"]
    assert f"heads_sub-02: {skipped(tmp_path / 'out')['heads_sub-02']}" in result.out
    again = run(tmp_path / "out", tmp_path / "heads")
    assert again.code == 3, "as long as it is left out"


@pytest.mark.parametrize("what", SPOILT)
def test_where_nobody_is_left_the_reason_is_the_error(what, small_tree, tmp_path):
    shutil.copytree(small_tree / "sub-02", tmp_path / "heads" / "sub-02")
    spoil, reason = SPOILT[what]
    spoil(tmp_path / "heads" / "sub-02" / "anat" / "sub-02_T2w.nii.gz")
    result = run(tmp_path / "out", tmp_path / "heads")
    assert result.code == 2 and reason in result.complaint
    assert not (tmp_path / "out").exists()


def test_a_mended_subject_joins_and_leaves_the_list_of_the_skipped(small_tree, tmp_path):
    shutil.copytree(small_tree, tmp_path / "heads")
    scan = tmp_path / "heads" / "sub-02" / "anat" / "sub-02_T1w.nii.gz"
    whole = scan.read_bytes()
    scan.write_bytes(whole[:1000])
    assert run(tmp_path / "out", tmp_path / "heads").code == 3
    scan.write_bytes(whole)
    assert run(tmp_path / "out", tmp_path / "heads").code == 0
    assert skipped(tmp_path / "out") == {}
    assert run(tmp_path / "fresh", tmp_path / "heads").code == 0
    tables = [(tmp_path / o / "t1w.npy").read_bytes() for o in ("out", "fresh")]
    assert tables[0] == tables[1]


def in_fluid(suffix):
    """Paint the rim of a brain as fluid, which is what tells T1w from T2w."""
    def change(data, affine):
        rim = (data > 0) & ~ndimage.binary_erosion(data > 0)
        rim &= np.indices(data.shape).sum(axis=0) % 3 > 0
        return np.where(rim, 250 if suffix == "T1w" else 1500, data).astype(np.int16), affine
    return rewrite(change)


def swap(t1w, t2w):
    t1w.rename(t1w.with_name("other"))
    t2w.rename(t1w)
    t1w.with_name("other").rename(t2w)


DOUBTFUL = {
    "swapped": (swap, "T1w looks like a T2w, and T2w like a T1w: are the two files swapped?"),
    "T1w twice": (lambda x, y: shutil.copy(x, y), "T2w looks like a T1w: is it a T2w?"),
    "T2w twice": (lambda x, y: shutil.copy(y, x), "T1w looks like a T2w: is it a T1w?"),
}


@pytest.mark.parametrize("what", DOUBTFUL)
def test_a_scan_that_looks_like_the_other_contrast_is_taken_and_pointed_out(what, tmp_path):
    for label in ("01", "02"):
        anat = write_pair(tmp_path / "heads", label)
        scans = [anat / f"sub-{label}_{suffix}.nii.gz" for suffix in ("T1w", "T2w")]
        for scan, suffix in zip(scans, ("T1w", "T2w")):
            in_fluid(suffix)(scan)
    change, said = DOUBTFUL[what]
    change(*scans)
    result = run(tmp_path / "out", tmp_path / "heads")
    assert result.code == 0 and f"note: heads_sub-02: {said}" in result.out
    assert "note: heads_sub-01" not in result.out
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"heads_sub-02: {said}" in page and page.count("class='warning'") == 1
    assert page.index("<td>heads_sub-02</td>") < page.index("<td>heads_sub-01</td>")
    assert said in run(tmp_path / "out", tmp_path / "heads").out, "as long as it is so"


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real scans of ../shared/data")
def test_of_real_heads_only_the_swapped_one_is_pointed_out(tmp_path):
    shutil.copytree(REAL, tmp_path / "heads")
    anat = tmp_path / "heads" / "sub-ms19" / "anat"
    swap(anat / "sub-ms19_T1w.nii.gz", anat / "sub-ms19_T2w.nii.gz")
    options = ["--size", "64", "--spacing", "3", "--brain-extraction", "none"]
    assert run(tmp_path / "out", tmp_path / "heads", options=options).code == 0
    notes = {s["id"]: s["note"] for s in SliceStore(tmp_path / "out").subjects if s["note"]}
    assert notes == {"heads_sub-ms19": DOUBTFUL["swapped"][1]}


def test_simulated_heads_are_not_pointed_out(tmp_path):
    assert run_command(preprocess.main, "--simulate", 1, "--out", tmp_path / "out", "--downloads",
                       tmp_path / "downloads", *SMALL, "--workers", 0).code == 0
    assert [s["note"] for s in SliceStore(tmp_path / "out").subjects] == [""]


REFUSED = {
    "--size 50": (["--size", "50"], "--size 50: must be a multiple of 4"),
    "--size 28": (["--size", "28"], "from 32 to 1024"),
    "--spacing 0": (["--spacing", "0"], "--spacing 0"),
    "--spacing nan": (["--spacing", "nan"], "--spacing nan"),
    "--split": (["--split", ".5", ".5", ".5"], "sum to 1"),
    "--split nan": (["--split", "nan", ".5", ".5"], "sum to 1"),
    "--split 0": (["--split", "0", ".5", ".5"], "the first above 0"),
    "--limit 0": (["--limit", "0"], "--limit 0: must be at least 1"),
    "--workers": (["--workers", "-1"], "--workers -1"),
    "--seed": (["--seed", "99999999999"], "--seed 99999999999: must be at most 2147483648"),
    "--min-brain-area": (["--min-brain-area", "1.5"], "--min-brain-area 1.5"),
    "--brain-ml": (["--brain-ml", "2000", "800"], "--brain-ml 2000.0 800.0"),
    "--val nobody": (["--val", "77"], "subject '77' of --val or --test is not there"),
    "--val and --test": (["--val", "01", "--test", "01"], "in --val and in --test"),
    "an unknown option": (["--sise", "48"], "unrecognized arguments: --sise"),
    "a word": (["--size", "big"], "invalid int value: 'big'"),
    "an unknown method": (["--brain-extraction", "bet"], "invalid choice: 'bet'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_option_is_refused_in_one_line_before_any_work(what, small_tree, tmp_path):
    options, message = REFUSED[what]
    result = run(tmp_path / "out", small_tree, options=[*EXTRACTED, *options])
    assert result.code == 2 and message in result.complaint
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_trees_are_refused(small_tree, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other" / "heads").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    for roots, message in (
            ([tmp_path / "none"], "none: no such folder"),
            ([tmp_path / "empty"], "empty: no T1w or T2w found"),
            ([small_tree / "sub-01"], "sub-01: no T1w or T2w found"),
            ([small_tree / "sub-01" / "anat" / "sub-01_T1w.nii.gz"], "no such folder"),
            ([small_tree, tmp_path / "other" / "heads"], "two trees are called 'heads'")):
        result = run(tmp_path / "out", *roots)
        assert result.code == 2 and message in result.complaint
    result = run(tmp_path / "file", small_tree)
    assert result.code == 2 and "is a file" in result.complaint
    result = run_command(preprocess.main, "--out", tmp_path / "out")
    assert result.code == 2 and "required" in result.complaint
    assert not (tmp_path / "out").exists()


def test_a_tree_and_its_derivatives_would_put_one_person_into_two_splits(small_tree, tmp_path):
    raw = tmp_path / "raw"
    shutil.copytree(small_tree, raw)
    shutil.copytree(small_tree, raw / "derivatives" / "n4")
    for roots in ([raw, raw / "derivatives" / "n4"], [raw / "derivatives" / "n4", raw]):
        result = run(tmp_path / "out", *roots)
        assert result.code == 2 and "n4 lies inside" in result.complaint
        assert "sub-01, too: one person would be in two splits" in result.complaint
    assert not (tmp_path / "out").exists()
    other = raw / "derivatives" / "others"
    write_pair(other, "77")
    assert run(tmp_path / "out", raw, other).code == 0
    assert ("others", "77") in splits(tmp_path / "out")


def test_a_scan_that_comes_whole_while_others_are_worked_on_is_packed(tmp_path, monkeypatch):
    """Files are looked at ahead of the work: what was made of them is of what they were then."""
    tree = tmp_path / "heads"
    for label in ("01", "02"):
        write_pair(tree, label)
    late = tree / "sub-02" / "anat" / "sub-02_T2w.nii.gz"
    whole = late.read_bytes()
    late.write_bytes(whole[:len(whole) // 2])
    prepare = preprocessing_jobs.prepare

    def arriving(session, *arguments):
        if session.subject == "02":
            late.write_bytes(whole)
        return prepare(session, *arguments)

    monkeypatch.setattr(preprocessing_jobs, "prepare", arriving)
    assert run(tmp_path / "out", tree).code == 0
    assert splits(tmp_path / "out").keys() == {("heads", "01"), ("heads", "02")}
    monkeypatch.undo()
    before = content(tmp_path / "out")
    assert run(tmp_path / "out", tree).code == 0 and content(tmp_path / "out") == before


def test_methods_that_need_more_than_there_is_say_what(small_tree, tmp_path):
    result = run(tmp_path / "out", small_tree, options=[*SMALL, "--brain-extraction", "mask"])
    assert result.code == 2 and "no *_desc-brain_mask.nii.gz beside it" in result.complaint
    result = run(tmp_path / "out", small_tree,
                 options=[*SMALL, "--brain-extraction", "deepbet", "--device", "cuda:99x"])
    assert result.code == 2 and "--device cuda:99x: no such device" in result.complaint


def test_other_settings_than_the_stores_are_refused(small_tree, small_store, tmp_path):
    shutil.copytree(small_store, tmp_path / "out")
    for option, value, said in (("--size", "52", "built with size 48, now asked for 52"),
                                ("--spacing", "3", "built with spacing_mm 4.0, now asked for 3.0"),
                                ("--seed", "1", "built with seed 0, now asked for 1"),
                                ("--min-brain-area", "0.5", "min_brain_area 0.25")):
        result = run(tmp_path / "out", small_tree, options=[*EXTRACTED, option, value])
        assert result.code == 2 and said in result.complaint
    result = run(tmp_path / "out", small_tree, options=[*EXTRACTED, "--split", ".6", ".2", ".2"])
    assert result.code == 2 and "split [0.8, 0.1, 0.1]" in result.complaint
    assert content(tmp_path / "out") == content(small_store)


def test_a_store_of_another_version_is_refused(small_tree, small_store, tmp_path):
    shutil.copytree(small_store, tmp_path / "out")
    header = json.loads((tmp_path / "out" / "store.json").read_text())
    (tmp_path / "out" / "store.json").write_text(json.dumps({**header, "version": 2}))
    kept = content(tmp_path / "out")
    for result in (run(tmp_path / "out", small_tree),
                   run_command(preprocess.main, "--check", "--out", tmp_path / "out")):
        assert result.code == 2 and "version 2, this program reads" in result.complaint
    assert content(tmp_path / "out") == kept


def test_check_prints_each_fault_with_subject_and_rows_and_ends_with_two(small_store, tmp_path):
    shutil.copytree(small_store, tmp_path / "out")
    array = np.load(tmp_path / "out" / "t2w.npy", mmap_mode="r+")
    subject = SliceStore(small_store).subjects[3]
    row = subject["first_row"] + 2
    array[row][SliceStore(small_store).mask(slice(row, row + 1))[0]] = np.nan
    array.flush()
    result = run_command(preprocess.main, "--check", "--out", tmp_path / "out")
    assert result.code == 2 and f"t2w has NaN in rows {row}" in result.err
    assert all(line.startswith(f"error: {tmp_path / 'out'}: heads_sub-04 (rows ")
               for line in result.err.splitlines())
    nothing = run_command(preprocess.main, "--check", "--out", tmp_path / "none")
    assert nothing.code == 2 and "no slice store there" in nothing.complaint


@pytest.mark.parametrize("workers", [0, 2])
def test_hd_bet_finds_the_brains_of_a_tree(workers, small_tree, tmp_path):
    """Its own code on a tiny nnU-Net in its own folder; offline, so nothing can be fetched."""
    tiny_hdbet.build(tmp_path / "hd-bet_params" / "release_2.0.0", spacing_mm=(5.0, 4.0, 4.0))
    done = subprocess.run(
        [sys.executable, "preprocess.py", "--bids", small_tree, "--limit", "2", "--out",
         tmp_path / "out", *SMALL, "--brain-ml", "200", "3000", "--workers", str(workers),
         "--device", "cpu"], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    rows = SliceStore(tmp_path / "out").subjects
    assert [row["brain_extraction"] for row in rows] == ["hd-bet"] * 2
    assert run_command(preprocess.main, "--check", "--out", tmp_path / "out").code == 0


def test_hd_bet_without_weights_is_refused_before_any_work(small_tree, tmp_path):
    done = subprocess.run(
        [sys.executable, "preprocess.py", "--bids", small_tree, "--out", tmp_path / "out", *SMALL],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "--brain-extraction deepbet" in done.stderr and "hd-bet_params" in done.stderr
    assert not (tmp_path / "out").exists()


def test_check_prints_slices_a_session_by_dataset(small_tree, tmp_path):
    other = tmp_path / "others"
    write_pair(other, "01", shape=(38, 48, 33), spacing=(4, 4, 4), person=6)
    assert run(tmp_path / "out", small_tree, other).code == 0
    lines = run_command(preprocess.main, "--check", "--out", tmp_path / "out").out.splitlines()
    n = np.array([s["n_slices"] for s in SliceStore(tmp_path / "out").subjects
                  if s["dataset"] == "heads"])
    assert ["heads", "5", f"{n.mean():.1f}", f"{n.std(ddof=1):.1f}", str(n.min()),
            str(n.max())] in [line.split() for line in lines]
    assert any(line.split()[:2] == ["others", "1"] and line.split()[3] == "0.0" for line in lines)


def test_the_report_is_drawn_when_the_store_has_changed_and_only_then(small_tree, tmp_path):
    out = tmp_path / "out"
    assert run(out, small_tree, options=[*EXTRACTED, "--limit", "3"]).code == 0
    first = (out / "report.html").read_text()
    assert "heads_sub-03" in first and "heads_sub-04" not in first
    drawn = (out / "report.html").stat().st_mtime_ns
    assert run(out, small_tree, options=[*EXTRACTED, "--limit", "3"]).code == 0
    assert (out / "report.html").stat().st_mtime_ns == drawn
    (out / "report.html").unlink()
    assert run(out, small_tree, options=[*EXTRACTED, "--limit", "3"]).code == 0
    assert (out / "report.html").read_text() == first
    assert run(out, small_tree).code == 0
    assert "heads_sub-04" in (out / "report.html").read_text()


def test_default_workers_fit_into_the_memory_and_on_a_gpu(monkeypatch):
    def workers(gib, cores, on_gpu=False):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
        monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096,
                                                         "SC_PHYS_PAGES": gib << 18}[name])
        return preprocess._default_workers(on_gpu)

    assert workers(64, 8) == 8
    assert workers(8, 16) == 2 and workers(1, 16) == 1
    assert workers(512, 64, on_gpu=True) == 4


def test_list_names_the_files_that_would_be_taken(small_tree, tmp_path):
    result = run(tmp_path / "out", small_tree, options=[*EXTRACTED, "--list"])
    assert result.code == 0 and not (tmp_path / "out").exists()
    line = "heads_sub-03  sub-03/anat/sub-03_T1w.nii.gz  sub-03/anat/sub-03_T2w.nii.gz"
    assert line in result.out


def test_a_folder_with_other_files_keeps_them(small_tree, tmp_path):
    for name in ("notes.tmp", "old.new", "parts/sketch.npz", "parts/draft.tmp", "README"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
    kept = content(tmp_path / "out")
    for _ in range(2):
        assert run(tmp_path / "out", small_tree).code == 0
        assert kept.items() <= content(tmp_path / "out").items()


# ------------------------------------------------------------------------------------- growing


def test_a_second_tree_and_more_subjects_never_move_old_ones(small_tree, tmp_path):
    out, other = tmp_path / "out", tmp_path / "others"
    assert run(out, small_tree, options=[*EXTRACTED, "--limit", "2"]).code == 0
    seen = splits(out)
    first = {name: rows_of(out, name)[0] for name in ("heads_sub-01", "heads_sub-02")}
    for label in ("aa", "bb", "cc"):
        write_pair(other, label)
    for roots in ([other], [small_tree], [other, small_tree]):
        assert run(out, *roots).code == 0
        now = splits(out)
        assert {person: now[person] for person in seen} == seen
        seen = now
    assert len(seen) == 8
    for name, slices in first.items():
        assert rows_of(out, name)[0] == slices
    assert [s["dataset"] for s in SliceStore(out).header["sources"]] == ["heads", "others"]
    assert store.check(out) == []


def test_a_person_under_two_names_is_stored_once_and_so_in_one_split(small_tree, tmp_path):
    out, copy = tmp_path / "out", tmp_path / "heads-copy"
    for label in ("02", "03"):
        shutil.copytree(small_tree / f"sub-{label}", copy / f"sub-{label}")
    write_pair(copy, "03", session="b", person=7)
    write_pair(copy, "09")
    assert run(out, copy, small_tree).code == 3
    before = content(out)
    again = run(out, copy, small_tree)
    assert again.code == 3 and "  done  " not in again.out and content(out) == before
    assert {s["id"] for s in SliceStore(out).subjects} == {
        "heads-copy_sub-09", *(f"heads_sub-0{k}" for k in range(1, 6))}
    reasons = skipped(out)
    assert reasons["heads-copy_sub-02"] == ("same scan as heads_sub-02 (T1w); one person under two "
                                            "names would be in two splits")
    assert reasons["heads-copy_sub-03_ses-b"].startswith(
        "its session heads-copy_sub-03 has the same scan as heads_sub-03")
    assert len(reasons) == 3 and store.check(out) == []


def test_of_a_person_under_two_names_the_one_that_is_stored_stays(small_tree, tmp_path):
    out, copy = tmp_path / "out", tmp_path / "zz"
    shutil.copytree(small_tree / "sub-02", copy / "sub-02")
    assert run(out, copy).code == 0
    assert run(out, small_tree).code == 3
    assert list(skipped(out)) == ["heads_sub-02"]
    assert "zz_sub-02" in {s["id"] for s in SliceStore(out).subjects} and store.check(out) == []


def test_shards_find_a_person_under_two_names_as_one_run_does(small_tree, tmp_path):
    copy = tmp_path / "heads-copy"
    shutil.copytree(small_tree / "sub-02", copy / "sub-02")
    assert run(tmp_path / "whole", small_tree, copy).code == 3
    folders = [tmp_path / f"shard{k}" for k in (1, 2)]
    for k, folder in enumerate(folders, 1):
        assert run(folder, small_tree, copy, options=[*EXTRACTED, "--shard", f"{k}/2"]).code == 0
    merged = run_command(preprocess.main, "--merge", *folders, "--out", tmp_path / "merged")
    assert merged.code == 3 and content(tmp_path / "merged") == content(tmp_path / "whole")


def test_wider_limits_make_only_those_whom_the_narrow_ones_refused(small_tree, small_store,
                                                                   tmp_path):
    out = tmp_path / "out"
    most = max(float(s["brain_ml"]) for s in SliceStore(small_store).subjects) - 1
    narrow, wide = ([*EXTRACTED, "--brain-ml", "700", str(ml)] for ml in (most, 2200))
    assert run(out, small_tree, options=narrow).code == 3
    refused, = skipped(out)
    assert "widen with --brain-ml" in skipped(out)[refused]
    result = run(out, small_tree, options=wide)
    assert result.code == 0 and result.out.count("  done  ") == 1 and "anew" not in result.out
    assert len(SliceStore(out).subjects) == 5
    result = run(out, small_tree, options=narrow)
    assert result.code == 3 and skipped(out)[refused].endswith("; its rows of before stay")


def test_rows_whose_recipe_has_other_limits_are_good_as_long_as_these_are_asked_for(small_tree,
                                                                                    tmp_path):
    out, wide = tmp_path / "out", [*EXTRACTED, "--brain-ml", "700", "2200"]
    assert run(out, small_tree, options=wide).code == 0
    rows = store.read_table(out / "subjects.tsv")
    for row, subject in zip(rows, find_subjects(small_tree)[0]):  # as before they were left out
        row["recipe"] = recipe(subject, "none", Settings(48, 4.0, brain_ml=(700.0, 2200.0)),
                               limits=True)[2]
    (out / "subjects.tsv").write_bytes(store.table(store.COLUMNS, rows))
    before = (out / "subjects.tsv").read_bytes()
    assert "  done  " not in run(out, small_tree, options=wide).out
    assert (out / "subjects.tsv").read_bytes() == before


def test_a_changed_scan_is_made_anew_and_that_is_said(small_tree, tmp_path):
    shutil.copytree(small_tree, tmp_path / "heads")
    assert run(tmp_path / "out", tmp_path / "heads").code == 0
    before = {s["id"]: rows_of(tmp_path / "out", s["id"])[0]
              for s in SliceStore(tmp_path / "out").subjects}
    write_pair(tmp_path / "heads", "03", person=7)
    result = run(tmp_path / "out", tmp_path / "heads")
    assert result.code == 0 and "heads_sub-03: its files" in result.out
    changed = [name for name in before if rows_of(tmp_path / "out", name)[0] != before[name]]
    assert changed == ["heads_sub-03"]
    assert store.check(tmp_path / "out") == []


def sites(tmp_path):
    """Two trees called `rawdata` with other people under the same labels."""
    roots = []
    for n, site in enumerate(("siteA", "siteB")):
        roots.append(tmp_path / site / "rawdata")
        for label in ("01", "02"):
            write_pair(roots[-1], label, person=10 * n + int(label))
    return roots


@pytest.mark.parametrize("how", [[], ["--limit", "1"], ["--shard", "2/2"]], ids=str)
def test_another_tree_of_a_stored_trees_name_is_refused_and_replaces_nobody(how, tmp_path):
    site_a, site_b = sites(tmp_path)
    assert run(tmp_path / "out", site_a).code == 0
    before = content(tmp_path / "out")
    result = run(tmp_path / "out", site_b, options=[*EXTRACTED, *how])
    assert result.code == 2 and "another tree of that name? Rename its folder" in result.complaint
    assert "rawdata_sub-01" in result.complaint and "done" not in result.out
    assert {k: v for k, v in content(tmp_path / "out").items() if k in before} == before
    site_b.rename(site_b.with_name("b"))
    assert run(tmp_path / "out", site_b.with_name("b"), options=EXTRACTED).code == 0
    assert len(SliceStore(tmp_path / "out").subjects) == 4


def test_shards_of_another_tree_of_a_stored_trees_name_are_not_merged(tmp_path):
    site_a, site_b = sites(tmp_path)
    assert run(tmp_path / "out", site_a).code == 0
    before = content(tmp_path / "out")
    assert run(tmp_path / "b", site_b, options=[*EXTRACTED, "--shard", "1/1"]).code == 0
    assert run(tmp_path / "a", site_a, options=[*EXTRACTED, "--shard", "1/1"]).code == 0
    merged = run_command(preprocess.main, "--merge", tmp_path / "b", "--out", tmp_path / "out")
    assert merged.code == 2 and "another tree of that name?" in merged.complaint
    assert content(tmp_path / "out") == before
    assert run_command(preprocess.main, "--merge", tmp_path / "a", "--out",
                       tmp_path / "out").code == 0
    assert content(tmp_path / "out") == before


def test_a_tree_that_moved_grew_and_was_corrected_is_still_itself(tmp_path):
    site_a, site_b = sites(tmp_path)
    assert run(tmp_path / "out", site_a).code == 0
    moved = tmp_path / "archive" / "rawdata"
    shutil.copytree(site_a, moved)
    write_pair(moved, "01", person=7)  # both scans
    write_pair(moved, "02", person=8, only="T2w")
    write_pair(moved, "03")
    result = run(tmp_path / "out", moved)
    assert result.code == 0 and result.out.count("made anew") == 2
    shutil.rmtree(moved / "sub-01")
    shutil.rmtree(moved / "sub-02")
    write_pair(moved, "04")
    assert run(tmp_path / "out", moved).code == 0, "only those who are new"
    assert [subject for _, subject in splits(tmp_path / "out")] == ["01", "02", "03", "04"]


def test_a_stored_subject_whose_scan_is_damaged_later_keeps_its_rows(small_tree, tmp_path):
    shutil.copytree(small_tree, tmp_path / "heads")
    assert run(tmp_path / "out", tmp_path / "heads").code == 0
    before = rows_of(tmp_path / "out", "heads_sub-02")[0]
    (tmp_path / "heads" / "sub-02" / "anat" / "sub-02_T1w.nii.gz").write_text("gone")
    assert run(tmp_path / "out", tmp_path / "heads").code == 3
    assert rows_of(tmp_path / "out", "heads_sub-02")[0] == before
    assert "not a NIfTI file" in skipped(tmp_path / "out")["heads_sub-02"]
    assert skipped(tmp_path / "out")["heads_sub-02"].endswith("; its rows of before stay")


def test_parts_of_other_settings_or_of_another_tree_do_not_get_in(small_tree, tmp_path):
    out = tmp_path / "out"
    write_pair(tmp_path / "strangers", "01", person=6)
    for root, size in ((small_tree, 64), (tmp_path / "strangers", 48)):
        for subject in find_subjects(root)[0]:
            store.write_part(out, prepare(subject, "none", Settings(size, 4.0), nonzero_mask))
    assert run(out, small_tree, options=[*EXTRACTED, "--limit", "2"]).code == 0
    assert [s["id"] for s in SliceStore(out).subjects] == ["heads_sub-01", "heads_sub-02"]
    assert store.check(out) == []
    assert run(out, tmp_path / "strangers").code == 0, "whose part waited for it"
    assert len(SliceStore(out).subjects) == 3 and store.check(out) == []


def test_a_second_writer_is_turned_away(small_tree, small_store, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    shutil.copytree(small_store, tmp_path / "out")
    handle = os.open(tmp_path / "out", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        result = run(tmp_path / "out", small_tree)
    finally:
        os.close(handle)
    assert result.code == 2 and "another preprocess.py is writing there" in result.complaint
    assert content(tmp_path / "out") == content(small_store)


# ------------------------------------------------------------------------- kills and processes


KILLED = """
import os, shutil, signal, sys
sys.path.insert(0, "tests")
import preprocess
from drawn_once import drawn_once

tree, before, trials, first = sys.argv[1:5]
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")

def build(out):
    return preprocess.main(["--bids", tree, "--out", out, "--workers", "0", *sys.argv[5:]])

def attempt(out, at):
    '''Run in a child that is killed before its at-th change to a file of the store.'''
    child = os.fork()
    if not child:
        count = 0
        def watch(event, args):
            nonlocal count
            changes = event in WRITES or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
            if changes and str(args[0]).startswith(out):
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        os._exit(build(out))
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

def prepared(name):
    out = os.path.join(trials, name)
    if before:
        shutil.copytree(before, out)
    return out

with drawn_once():
    build(first)  # every child finds its contact sheet drawn
    at, killed = 0, True
    while killed:
        at += 1
        out = prepared(f"killed-at-{at:03d}")
        killed = attempt(out, at)
        attempt(out, 0)
    out, at = prepared("killed-again-and-again"), 1
    while attempt(out, at):
        at += 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("grown", [False, True], ids=["a-new-store", "a-store-that-grows"])
def test_a_run_killed_before_any_of_its_writes_ends_with_the_same_bytes(grown, tmp_path):
    """SIGKILL before each file is opened to write, renamed or removed, then the same command."""
    tree, before = tmp_path / "heads", tmp_path / "before"
    shape, spacing = (26, 32, 24), (6, 6, 6)
    write_pair(tree, "02", shape=shape, spacing=spacing)
    options = ["--size", "32", "--spacing", "6", "--brain-extraction", "none"]
    if grown:
        assert run(before, tree, options=options).code == 0
        write_pair(tree, "03", shape=shape, spacing=spacing, only="T1w")
    write_pair(tree, "01", shape=shape, spacing=spacing)
    undisturbed = tmp_path / "undisturbed"
    if grown:
        shutil.copytree(before, undisturbed)
    run(undisturbed, tree, options=options)
    (tmp_path / "trials").mkdir()
    subprocess.run([sys.executable, "-c", KILLED, tree, before if grown else "",
                    tmp_path / "trials", tmp_path / "first", *options], cwd=ROOT, check=True,
                   timeout=300, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wanted = content(undisturbed)
    assert content(tmp_path / "first").keys() == wanted.keys()
    trials = sorted((tmp_path / "trials").iterdir())
    assert len(trials) > 20
    for trial in trials:
        assert content(trial) == wanted, trial.name
    assert store.check(undisturbed) == []


@pytest.fixture(scope="module")
def raw_tree(tmp_path_factory):
    """Whole heads with masks and a T2w that moved: subjects that take a second each."""
    root = tmp_path_factory.mktemp("raw") / "whole"
    for n, label in enumerate(("01", "02", "03", "04")):
        write_pair(root, label, shape=(38, 46, 34), spacing=5, extracted=False, mask=True,
                   matrix=rigid((0, 2, n), (n, 2, 1)), turn_deg=(0, 0, 3 * n))
    return root


def start(tree, out, workers):
    command = [sys.executable, "preprocess.py", "--bids", tree, "--out", out, *SMALL,
               "--brain-extraction", "mask", "--workers", str(workers)]
    return subprocess.Popen([str(c) for c in command], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def raw_store(raw_tree, tmp_path_factory):
    """Made in one process; and how long that took, in seconds."""
    out = tmp_path_factory.mktemp("raw") / "one-process"
    begun = time.monotonic()
    process = start(raw_tree, out, 0)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    return out, time.monotonic() - begun


def test_several_processes_give_the_same_bytes_as_one(raw_tree, raw_store, tmp_path):
    process = start(raw_tree, tmp_path / "out", 3)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert content(tmp_path / "out") == content(raw_store[0])
    rows = SliceStore(raw_store[0]).subjects
    assert all(row["registration"] == "rigid" for row in rows)


def children_of(process):
    try:
        return [int(c) for c in Path(f"/proc/{process.pid}/task/{process.pid}/children")
                .read_text().split()]
    except OSError:
        return []


def assert_ended(processes):
    """Wait a moment for processes that are ending; one that ended may stay as a zombie."""
    def runs(process):
        try:
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    for _ in range(50):
        if not any(map(runs, processes)):
            return
        time.sleep(0.1)
    pytest.fail("workers outlive their parent by five seconds")


def test_the_command_killed_at_random_moments_ends_with_the_same_bytes(raw_tree, raw_store,
                                                                       tmp_path):
    out, seconds = raw_store
    draws = np.random.default_rng(0)
    kills = 0
    for share in (0.35, 0.55, 0.8):
        process = start(raw_tree, tmp_path / "out", 2)
        time.sleep(seconds * (share + draws.uniform(-0.1, 0.1)))
        workers = children_of(process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        kills += process.returncode == -signal.SIGKILL
        assert_ended(workers)
    assert kills
    process = start(raw_tree, tmp_path / "out", 2)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert content(tmp_path / "out") == content(out)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_says_one_line_and_leaves_no_process(how, raw_tree, raw_store,
                                                                    tmp_path):
    """A terminal sends SIGINT to the whole group, workers too; SIGTERM reaches the parent alone."""
    process = subprocess.Popen(
        [sys.executable, "preprocess.py", "--bids", raw_tree, "--out", tmp_path / "out", *SMALL,
         "--brain-extraction", "mask", "--workers", "2"], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True)
    for _ in itertools.count():
        if (tmp_path / "out" / "parts").exists():
            break
        assert process.poll() is None
        time.sleep(0.05)
    workers = children_of(process)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines() == ["stopped; the same command goes on from here"]
    assert len(list((tmp_path / "out" / "parts").glob("*.npz"))) < 4, "at once, not at the end"
    assert_ended(workers)


def test_a_full_disk_names_the_file_and_the_next_run_goes_on(small_tree, small_store, tmp_path):
    resource = pytest.importorskip("resource")
    command = [sys.executable, "preprocess.py", "--bids", small_tree, "--out", tmp_path / "out",
               *EXTRACTED, "--val", "04", "--test", "05", "--workers", "0"]
    sizes = [(small_store / name).stat().st_size for name in ("t1w.npy", "t2w.npy")]
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE,
                                                                (min(sizes) - 999,) * 2))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ") and "t1w.npy.new" in done.stderr
    assert run(tmp_path / "out", small_tree,
               options=[*EXTRACTED, "--val", "04", "--test", "05"]).code == 0
    assert content(tmp_path / "out") == content(small_store)


def test_a_person_whose_scans_were_compressed_anew_is_known_again(small_tree, tmp_path):
    copy = tmp_path / "copy" / "sub-other" / "anat"
    copy.mkdir(parents=True)
    for kind in ("T1w", "T2w"):
        packed = (small_tree / "sub-02" / "anat" / f"sub-02_{kind}.nii.gz").read_bytes()
        (copy / f"sub-other_{kind}.nii").write_bytes(gzip.decompress(packed))
    assert run(tmp_path / "out", small_tree, tmp_path / "copy").code == 3
    assert "same scan as" in " ".join(skipped(tmp_path / "out").values())
    assert len(SliceStore(tmp_path / "out").subjects) == 5


def test_a_test_subject_that_cannot_be_used_costs_a_note_and_not_the_store(small_tree, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(small_tree, tree)
    path = tree / "sub-03" / "anat" / "sub-03_T2w.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])
    outcome = run(tmp_path / "out", tree, "--test", "03", "04")
    assert outcome.code == 3 and "note: --test 03: was left out" in outcome.out
    assert "damaged" in skipped(tmp_path / "out")["tree_sub-03"]
    assert [s["subject"] for s in SliceStore(tmp_path / "out").subjects
            if s["split"] == "test"] == ["04"]
    assert run(tmp_path / "other", tree, "--test", "77").code == 2


def test_check_and_report_name_the_file_of_a_table_that_was_edited(small_tree, tmp_path):
    out = tmp_path / "out"
    run(out, small_tree)
    header = json.loads((out / "store.json").read_text())
    del header["sources"][0]["doi"], header["sources"][0]["name"]
    (out / "store.json").write_text(json.dumps(header))
    check = [preprocess.main, "--check", "--out", out]
    assert run_command(*check).code == 0
    del header["spacing_mm"]
    (out / "store.json").write_text(json.dumps(header))
    outcome = run_command(*check)
    assert outcome.code == 2 and "store.json: lacks spacing_mm" in outcome.err
    outcome = run_command(preprocess.main, "--report", "--out", tmp_path / "none")
    assert outcome.code == 2 and "no slice store there" in outcome.err
