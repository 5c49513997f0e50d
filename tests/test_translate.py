"""Tests of translate.py: names, trees, records, maps, exports, errors; `translate_volume`."""

import errno
import json
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from commands import run_command
from conftest import content, write_pair
from painted_scans import ON_CPU, scan, translator, write_checkpoint
from scipy import ndimage

import device
import translate
import translation_jobs
from data import brain, nifti
from data.derivatives import write_record
from data.histogram import PERCENTILES, Standard, landmarks
from models import checkpoint, export
from translate import Translator, Wanted, parse_args, translate_volume
from translation_jobs import plan_files


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A checkpoint of random nets for slices of 48 pixels of 4 mm."""
    return write_checkpoint(tmp_path_factory.mktemp("ckpt") / "best.pt")


@pytest.fixture
def command(ckpt, tmp_path):
    def call(*inputs, out="out", ckpt=ckpt):
        return run_command(translate.main, "--ckpt", ckpt, "--out", tmp_path / out, *ON_CPU,
                           *inputs)
    return call


# ---------------------------------------------------------------------------------- the command


def test_the_answer_lies_on_the_inputs_grid_bit_for_bit(ckpt, tmp_path):
    image = scan((40, 48, 30), (4, 4, 5), "LPS", (12, -7, 20))
    image.header["qform_code"], image.header["sform_code"] = 1, 2
    image.to_filename(tmp_path / "sub-01_T1w.nii.gz")
    assert run_command(translate.main, "--ckpt", ckpt, "--out", tmp_path / "out", *ON_CPU,
                       tmp_path / "sub-01_T1w.nii.gz").code == 0
    source = nib.load(tmp_path / "sub-01_T1w.nii.gz")
    found = nib.load(tmp_path / "out" / "sub-01_desc-synthetic_T2w.nii.gz")
    assert found.shape == source.shape and np.array_equal(found.affine, source.affine)
    for field in ("srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x", "pixdim", "qform_code",
                  "sform_code", "xyzt_units", "descrip"):
        assert found.header[field].tobytes() == source.header[field].tobytes(), field
    assert found.get_data_dtype() == np.float32
    data, inside = found.get_fdata(), source.get_fdata() > 0
    assert 0 <= data.min() and data.max() <= 1
    assert not data[~inside].any() and (data[inside] != 0).mean() > 0.9


def test_a_brain_larger_than_the_frame_is_said_and_filled_with_its_rim(tmp_path, command):
    ckpt = write_checkpoint(tmp_path / "small.pt", size=32)
    scan((40, 48, 36), (4, 4, 4)).to_filename(tmp_path / "sub-01_T1w.nii")
    outcome = command(tmp_path / "sub-01_T1w.nii", ckpt=ckpt)
    assert outcome.code == 0
    assert "of the brain lies outside the frame of 32 pixels" in outcome.out
    found = translator(ckpt)(nib.load(tmp_path / "sub-01_T1w.nii"), "t1w-to-t2w").get_fdata()
    inside = nib.load(tmp_path / "sub-01_T1w.nii").get_fdata() > 0
    assert (found[inside] > 0).mean() > 0.99


def test_names_say_the_direction_and_both_endings_are_read(command, tmp_path):
    scan((40, 48, 36), (4, 4, 4)).to_filename(tmp_path / "sub-01_T1w.nii.gz")
    scan((40, 48, 36), (4, 4, 4), suffix="T2w").to_filename(tmp_path / "sub-02_ses-1_T2w.nii")
    outcome = command(tmp_path / "sub-01_T1w.nii.gz", tmp_path / "sub-02_ses-1_T2w.nii")
    assert outcome.code == 0 and outcome.err == ""
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "dataset_description.json", "sub-01_desc-synthetic_T2w.json",
        "sub-01_desc-synthetic_T2w.nii.gz", "sub-02_ses-1_desc-synthetic_T1w.json",
        "sub-02_ses-1_desc-synthetic_T1w.nii.gz"]


def test_the_direction_can_be_given_for_any_name(command, tmp_path):
    scan((40, 48, 36), (4, 4, 4), suffix="T2w").to_filename(tmp_path / "brain.nii.gz")
    assert command(tmp_path / "brain.nii.gz", "--direction", "t2w-to-t1w").code == 0
    assert (tmp_path / "out" / "brain_desc-synthetic_T1w.nii.gz").exists()


def test_the_json_file_says_how_it_was_made(command, ckpt, tmp_path):
    scan((40, 48, 36), (4, 4, 4)).to_filename(tmp_path / "sub-01_T1w.nii.gz")
    command(tmp_path / "sub-01_T1w.nii.gz")
    about = json.loads((tmp_path / "out" / "sub-01_desc-synthetic_T2w.json").read_text())
    assert about["CheckpointSHA256"] == checkpoint.fingerprint(ckpt)
    assert about["Direction"] == "t1w-to-t2w" and about["Sources"] == ["sub-01_T1w.nii.gz"]
    assert about["BrainExtraction"] == "none" and about["Precision"] == "float32"
    assert about["Preprocessing"]["size"] == 48 and "not for diagnosis" in about["Description"]
    dataset = json.loads((tmp_path / "out" / "dataset_description.json").read_text())
    assert dataset["DatasetType"] == "derivative"


def test_the_same_command_writes_the_same_bytes_whatever_the_batch_size(command, tmp_path):
    scan((40, 48, 36), (4, 4, 4)).to_filename(tmp_path / "sub-01_T1w.nii.gz")
    name = "sub-01_desc-synthetic_T2w.nii.gz"
    for out, size in (("a", 16), ("b", 16), ("c", 3)):
        command(tmp_path / "sub-01_T1w.nii.gz", "--batch-size", size, out=out)
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    a, c = (nib.load(tmp_path / out / name).get_fdata() for out in "ac")
    np.testing.assert_allclose(a, c, atol=1e-5)


def test_the_python_api_gives_what_the_command_writes(command, ckpt, tmp_path):
    scan((40, 48, 36), (4, 4, 4), "LPS").to_filename(tmp_path / "sub-01_T1w.nii.gz")
    command(tmp_path / "sub-01_T1w.nii.gz")
    made = Translator(ckpt, device="cpu", precision="fp32")
    t2w = made(nib.load(tmp_path / "sub-01_T1w.nii.gz"), "t1w-to-t2w")
    written = nib.load(tmp_path / "out" / "sub-01_desc-synthetic_T2w.nii.gz")
    assert np.array_equal(t2w.get_fdata(), written.get_fdata())
    assert np.array_equal(t2w.affine, written.affine)
    assert t2w.get_data_dtype() == np.float32
    with pytest.raises(ValueError, match="direction 't1' is unknown; one of t1w-to-t2w"):
        made(nib.load(tmp_path / "sub-01_T1w.nii.gz"), "t1")


# ------------------------------------------------------------------------------------- brains


def test_a_whole_head_is_translated_inside_its_given_mask(command, tmp_path):
    anat = write_pair(tmp_path / "heads", "01", shape=(50, 60, 40), spacing=(4, 4, 5),
                      extracted=False, mask=True)
    outcome = command(anat / "sub-01_T1w.nii.gz", anat / "sub-01_T2w.nii.gz",
                      "--brain-extraction", "mask")
    assert outcome.code == 0
    mask = nib.load(anat / "sub-01_desc-brain_mask.nii.gz").get_fdata() > 0
    for suffix in ("T1w", "T2w"):
        name = f"sub-01_desc-synthetic_{suffix}"
        found = nib.load(tmp_path / "out" / f"{name}.nii.gz").get_fdata()
        assert not found[~mask].any() and (found[mask] != 0).mean() > 0.9
        about = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert about["BrainExtraction"] == "mask"


def test_a_whole_head_takes_the_training_datas_method_and_a_brain_none(tmp_path, command):
    ckpt = write_checkpoint(tmp_path / "masked.pt", extraction=("mask", "none"))
    head = write_pair(tmp_path / "heads", "01", shape=(50, 60, 40), spacing=(4, 4, 5),
                      extracted=False, mask=True)
    brain = write_pair(tmp_path / "brains", "02", shape=(50, 60, 40), spacing=(4, 4, 5))
    assert command(head / "sub-01_T1w.nii.gz", brain / "sub-02_T1w.nii.gz", ckpt=ckpt).code == 0
    for name, method in (("sub-01", "mask"), ("sub-02", "none")):
        about = json.loads((tmp_path / "out" / f"{name}_desc-synthetic_T2w.json").read_text())
        assert about["BrainExtraction"] == method


def test_a_mask_that_is_not_there_is_one_error(command, tmp_path):
    anat = write_pair(tmp_path / "heads", "01", extracted=False)
    outcome = command(anat / "sub-01_T1w.nii.gz", "--brain-extraction", "mask")
    assert outcome.code == 2
    assert "sub-01_T1w.nii.gz: no *_desc-brain_mask.nii.gz" in outcome.complaint


def test_a_volume_too_small_for_a_brain_is_refused_or_widened(command, tmp_path):
    image = scan((40, 48, 36), (4, 4, 4))
    small = nib.Nifti1Image(np.asarray(image.dataobj), np.diag([2.0, 2, 2, 1]))
    small.to_filename(tmp_path / "sub-01_T1w.nii.gz")
    outcome = command(tmp_path / "sub-01_T1w.nii.gz", "--brain-extraction", "none")
    assert outcome.code == 2 and "--brain-ml" in outcome.complaint
    assert command(tmp_path / "sub-01_T1w.nii.gz", "--brain-ml", 100, 400).code == 0


# ------------------------------------------------------------------------------------ refusals


def test_nothing_is_written_where_any_input_cannot_work(command, tmp_path):
    good = tmp_path / "sub-01_T1w.nii.gz"
    scan((40, 48, 36), (4, 4, 4)).to_filename(good)
    (tmp_path / "unknown.nii.gz").write_bytes(good.read_bytes())
    (tmp_path / "sub-01_T1w.mgz").write_bytes(b"")
    (tmp_path / "twice").mkdir()
    (tmp_path / "twice" / good.name).write_bytes(good.read_bytes())
    for bad, said in ((tmp_path / "none_T1w.nii.gz", "no such file"),
                      (tmp_path / "unknown.nii.gz", "say which it is with --direction"),
                      (tmp_path / "sub-01_T1w.mgz", "not a .nii or .nii.gz file"),
                      (tmp_path / "twice" / good.name, "another input would be written to"),
                      (tmp_path, f"is a folder; name the volumes in it, or give a BIDS tree as "
                                 f"--bids {tmp_path}")):
        outcome = command(good, bad)
        assert outcome.code == 2 and said in outcome.complaint
        assert not (tmp_path / "out").exists()


def test_a_damaged_volume_is_one_error_that_names_it(command, tmp_path):
    scan((40, 48, 36), (4, 4, 4)).to_filename(tmp_path / "sub-01_T1w.nii.gz")
    whole = (tmp_path / "sub-01_T1w.nii.gz").read_bytes()
    for damaged in (whole[:1000], b"text", b""):
        (tmp_path / "sub-01_T1w.nii.gz").write_bytes(damaged)
        outcome = command(tmp_path / "sub-01_T1w.nii.gz")
        assert outcome.code == 2 and "sub-01_T1w.nii.gz: " in outcome.complaint
        assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_a_checkpoint_that_is_none_is_one_error(command, ckpt, tmp_path):
    scan((40, 48, 36), (4, 4, 4)).to_filename(tmp_path / "sub-01_T1w.nii.gz")
    (tmp_path / "text.pt").write_text("text")
    state = torch.load(ckpt, weights_only=True)
    torch.save({**state, "format": {"name": "x", "version": 1}}, tmp_path / "other.pt")
    for path, said in ((tmp_path / "none.pt", "no such checkpoint"),
                       (tmp_path / "text.pt", "not a checkpoint"),
                       (tmp_path / "other.pt", "checkpoint format x version 1")):
        outcome = command(tmp_path / "sub-01_T1w.nii.gz", ckpt=path)
        assert outcome.code == 2 and said in outcome.complaint


@pytest.mark.parametrize("options, said", [
    (["--brain-ml", "2000", "800"], "--brain-ml 2000.0 800.0: smallest, then largest"),
    (["--brain-ml", "800", "inf"], "--brain-ml 800.0 inf: smallest, then largest"),
    (["--batch-size", "0"], "--batch-size 0"), (["--direction", "up"], "invalid choice"),
    (["--device", "tpu"], "--device tpu"), (["--brain-extraction", "bet"], "invalid choice"),
])
def test_options_that_cannot_work_are_one_error(command, tmp_path, options, said):
    scan((40, 48, 36), (4, 4, 4)).to_filename(tmp_path / "sub-01_T1w.nii.gz")
    outcome = command(tmp_path / "sub-01_T1w.nii.gz", *options)
    assert outcome.code == 2 and said in outcome.complaint


def test_an_output_that_is_a_file_is_one_error(command, tmp_path):
    scan((40, 48, 36), (4, 4, 4)).to_filename(tmp_path / "sub-01_T1w.nii.gz")
    (tmp_path / "out").write_text("")
    outcome = command(tmp_path / "sub-01_T1w.nii.gz")
    assert outcome.code == 2 and "is a file; name a folder" in outcome.complaint


def test_outputs_are_named_after_inputs_without_their_suffix(tmp_path):
    inputs = [tmp_path / name for name in ("sub-01_T1w.nii.gz", "T2w.nii", "a.b_T1w.nii")]
    for path in inputs:
        path.write_bytes(b"")
    args = parse_args([*map(str, inputs), "--ckpt", "best.pt", "--out", str(tmp_path)])
    found = [(job.direction, job.outputs["synthetic"].name) for job in plan_files(inputs, args)]
    assert found == [("t1w-to-t2w", "sub-01_desc-synthetic_T2w.nii.gz"),
                     ("t2w-to-t1w", "desc-synthetic_T1w.nii.gz"),
                     ("t1w-to-t2w", "a.b_desc-synthetic_T2w.nii.gz")]


# ----------------------------------------------------------------------------------- whole trees


@pytest.fixture
def tree(tmp_path):
    """Three T1w of two subjects, one of them with sessions; a T2w; LPS and RAS."""
    root = tmp_path / "heads"
    write_pair(root, "01")
    write_pair(root, "02", session="a", axes="LPS", only="T1w")
    write_pair(root, "02", session="b", axes="LPS", only="T1w")
    return root


def test_all_t1w_of_a_tree_become_a_tree_of_derivatives(command, tree, tmp_path):
    outcome = command("--bids", tree, "--direction", "t1w-to-t2w")
    assert outcome.code == 0 and outcome.err == ""
    out = tmp_path / "out"
    names = ["sub-01/anat/sub-01_desc-synthetic_T2w",
             "sub-02/ses-a/anat/sub-02_ses-a_desc-synthetic_T2w",
             "sub-02/ses-b/anat/sub-02_ses-b_desc-synthetic_T2w"]
    assert sorted(content(out)) == sorted([
        "dataset_description.json", *(f"{n}{e}" for n in names for e in (".json", ".nii.gz"))])
    about = json.loads((out / f"{names[1]}.json").read_text())
    assert about["Sources"] == ["bids:raw:sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz"]
    dataset = json.loads((out / "dataset_description.json").read_text())
    assert dataset["DatasetLinks"] == {"raw": "../heads"}
    source = nib.load(tree / "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz")
    made = nib.load(out / f"{names[1]}.nii.gz")
    assert np.array_equal(made.affine, source.affine) and made.shape == source.shape


def test_a_tree_goes_on_after_a_kill_and_ends_with_the_same_bytes(command, tree, tmp_path):
    command("--bids", tree, "--direction", "t1w-to-t2w")
    out = tmp_path / "out"
    whole = content(out)
    again = command("--bids", tree, "--direction", "t1w-to-t2w")
    assert again.code == 0 and "3 of 3 volumes are there already" in again.out
    anat = out / "sub-01" / "anat"
    # killed meanwhile
    write_record(anat / "sub-01_desc-synthetic_T2w.json", translation_jobs.STARTED)
    (anat / ".sub-01_desc-synthetic_T2w.nii.gz.7.tmp").write_bytes(b"half")
    (out / "sub-02/ses-b/anat/sub-02_ses-b_desc-synthetic_T2w.nii.gz").unlink()
    untouched = out / "sub-02/ses-a/anat/sub-02_ses-a_desc-synthetic_T2w.nii.gz"
    stamp = untouched.stat().st_mtime_ns
    again = command("--bids", tree, "--direction", "t1w-to-t2w")
    assert "1 of 3 volumes are there already" in again.out
    assert content(out) == whole and untouched.stat().st_mtime_ns == stamp


def test_what_was_made_otherwise_is_refused_or_made_again(command, tree, tmp_path):
    t1w = tree / "sub-01/anat/sub-01_T1w.nii.gz"
    command(t1w)
    before = content(tmp_path / "out")
    other = write_checkpoint(tmp_path / "other.pt", spacing_mm=5.0)
    for options in ({"ckpt": other}, {}):
        more = [] if options else ["--ensemble"]
        outcome = command(t1w, *more, **options)
        assert outcome.code == 2 and "--overwrite" in outcome.complaint
        assert content(tmp_path / "out") == before
    assert command(t1w, "--overwrite", ckpt=other).code == 0
    assert content(tmp_path / "out") != before
    t1w.write_bytes((tree / "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz").read_bytes())
    assert "from another file" in command(t1w, ckpt=other).complaint


@pytest.mark.parametrize("step, whole", [("write_like", 1), ("write_record", 3)])
def test_a_run_that_is_killed_at_any_step_goes_on_by_itself(command, tree, tmp_path, monkeypatch,
                                                            step, whole):
    options = tree / "sub-01/anat/sub-01_T1w.nii.gz", "--cycle-error"
    command(*options, out="whole")
    write, calls = getattr(translate, step), []

    def killed(*args):
        calls.append(args)
        if len(calls) > whole:
            raise KeyboardInterrupt
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(translate, step, killed)
        assert command(*options).code == 1
    assert list((tmp_path / "out").glob("*.nii.gz"))
    assert command(*options).code == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert "1 of 1 volumes are there already" in command(*options).out


def test_a_map_of_another_checkpoint_does_not_stay_beside_the_new_volume(command, tree, tmp_path):
    t1w, out = tree / "sub-01/anat/sub-01_T1w.nii.gz", tmp_path / "out"
    command(t1w, "--uncertainty", 2, "--cycle-error")
    (out / "sub-01_desc-synthetic_T2w.nii.gz").unlink()
    (out / "sub-01_desc-synthetic_T2w.json").unlink()
    before = content(out)
    other = write_checkpoint(tmp_path / "other.pt", spacing_mm=5.0)
    outcome = command(t1w, ckpt=other)
    assert outcome.code == 2 and "syntheticSD" in outcome.complaint
    assert "--overwrite" in outcome.complaint and content(out) == before
    theirs = out / "sub-01_desc-cycleError_T1w.json"
    theirs.write_text("{}")  # somebody else's by now
    assert command(t1w, "--overwrite", ckpt=other).code == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "dataset_description.json", theirs.name, "sub-01_desc-cycleError_T1w.nii.gz",
        "sub-01_desc-synthetic_T2w.json", "sub-01_desc-synthetic_T2w.nii.gz"]


def test_a_corrected_brain_mask_is_noticed(command, tmp_path):
    folder = write_pair(tmp_path / "tree", "01", extracted=False, mask=True)
    options = folder / "sub-01_T1w.nii.gz", "--brain-extraction", "mask"
    assert command(*options).code == 0
    assert "1 of 1 volumes are there already" in command(*options).out
    path = folder / "sub-01_desc-brain_mask.nii.gz"
    mask = nib.load(path)
    smaller = ndimage.binary_erosion(mask.get_fdata() > 0).astype(np.uint8)
    nib.Nifti1Image(smaller, mask.affine).to_filename(path)
    assert "made with another brain mask" in command(*options).complaint
    assert command(*options, "--overwrite").code == 0
    found = nib.load(tmp_path / "out" / "sub-01_desc-synthetic_T2w.nii.gz").get_fdata()
    assert not found[smaller == 0].any()
    assert "1 of 1 volumes are there already" in command(*options).out


def test_a_file_of_somebody_elses_is_overwritten_only_where_that_is_said(command, tree, tmp_path):
    t1w, out = tree / "sub-01/anat/sub-01_T1w.nii.gz", tmp_path / "out"
    out.mkdir()
    for name, text in (("sub-01_desc-synthetic_T2w.nii.gz", b"theirs"),
                       ("sub-01_desc-cycleError_T1w.nii.gz", b"theirs"),
                       ("sub-01_desc-synthetic_T2w.json", b'{"Manufacturer": "Siemens"}'),
                       ("sub-01_desc-synthetic_T2w.json", b"{")):
        (out / name).write_bytes(text)
        outcome = command(t1w, "--cycle-error")
        assert outcome.code == 2 and "no record beside it says" in outcome.complaint
        assert content(out) == {name: text}
        (out / name).unlink()
    (out / "sub-01_desc-synthetic_T2w.nii.gz").write_bytes(b"theirs")
    assert command(t1w, "--overwrite").code == 0
    assert nib.load(out / "sub-01_desc-synthetic_T2w.nii.gz").shape == nib.load(t1w).shape


def test_another_checkpoints_volume_stays_where_more_is_wanted_now(command, tree, tmp_path):
    t1w = tree / "sub-01/anat/sub-01_T1w.nii.gz"
    command(t1w)
    before = content(tmp_path / "out")
    other = write_checkpoint(tmp_path / "other.pt", spacing_mm=5.0)
    outcome = command(t1w, "--cycle-error", ckpt=other)
    assert outcome.code == 2 and "made with another checkpoint" in outcome.complaint
    assert content(tmp_path / "out") == before


def test_no_input_is_ever_an_output(command, tmp_path):
    made, out = "sub-01_desc-synthetic_T2w", tmp_path / "out"
    out.mkdir()
    for name in ("sub-01_T1w.nii.gz", f"{made}.nii.gz", f"{made}.nii"):
        scan((40, 48, 36), (4, 4, 4)).to_filename(out / name)
    (out / f"{made}.json").write_text('{"Manufacturer": "Siemens"}')
    (tmp_path / "link.nii.gz").symlink_to(out / f"{made}.nii.gz")
    before = content(out)
    t1w, ways = out / "sub-01_T1w.nii.gz", ("--direction", "t1w-to-t2w", "--force", "--overwrite")
    for inputs in ([out / f"{made}.nii.gz"], [t1w, tmp_path / "link.nii.gz"],
                   [t1w, "--match", out / f"{made}.nii.gz"],
                   [out / f"{made}.nii"]):  # their JSON files are one
        outcome = command(*inputs, *ways)
        assert outcome.code == 2 and "that is one of the inputs" in outcome.complaint
        assert content(out) == before


def test_volumes_that_cannot_be_translated_are_named_and_the_others_made(command, tree, tmp_path):
    (tree / "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz").write_bytes(b"text")
    outcome = command("--bids", tree, "--direction", "t1w-to-t2w")
    assert outcome.code == 3 and outcome.err == ""
    assert "warning: left out: " in outcome.out and "sub-02_ses-a_T1w.nii.gz: " in outcome.out
    assert "1 of 3 volumes were left out" in outcome.out
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) == 2
    again = command("--bids", tree, "--direction", "t1w-to-t2w")
    assert again.code == 3 and "2 of 3 volumes are there already" in again.out


@pytest.fixture
def missing(monkeypatch):
    """No extractor can be made here; the methods that were asked for."""
    asked = []

    def make(method, device):
        asked.append(method)
        raise ValueError(f"brain extraction {method}: no package")

    monkeypatch.setattr("data.brain.make_extractor", make)
    return asked


def test_volumes_that_need_a_missing_net_are_left_out_and_the_others_made(command, tree, tmp_path,
                                                                          missing):
    for label in ("00", "03"):
        write_pair(tree, label, extracted=False)
    outcome = command("--bids", tree, "--direction", "t1w-to-t2w")
    assert outcome.code == 3 and outcome.err == "" and missing == ["hd-bet"]
    for label in ("00", "03"):
        assert re.search(f"left out: .*sub-{label}_T1w.nii.gz: brain extraction hd-bet: no package",
                         outcome.out)
    assert "2 of 5 volumes were left out" in outcome.out
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) == 3
    again = command("--bids", tree, "--direction", "t1w-to-t2w")
    assert again.code == 3 and "3 of 5 volumes are there already" in again.out


def test_a_brain_on_a_background_of_its_own_is_told_how_it_could_do_without_a_net(
        command, tmp_path, missing):
    image = scan((40, 48, 36), (4, 4, 4))
    nib.Nifti1Image(image.get_fdata() - 1, image.affine).to_filename(tmp_path / "sub-01_T1w.nii")
    outcome = command(tmp_path / "sub-01_T1w.nii")
    assert outcome.code == 2 and "hd-bet: no package" in outcome.complaint
    assert "if sub-01_T1w.nii is extracted already: its background is -1 and" in outcome.complaint
    outcome = command(tmp_path / "sub-01_T1w.nii", "--brain-extraction", "none")
    assert outcome.code == 2 and "sub-01_T1w.nii: background is -1 and" in outcome.complaint


def test_a_brain_on_a_background_of_its_own_that_a_net_has_worked_on_is_warned_of(
        command, tmp_path, monkeypatch):
    image = scan((40, 48, 36), (4, 4, 4))
    nib.Nifti1Image(image.get_fdata() - 1, image.affine).to_filename(tmp_path / "sub-01_T1w.nii")
    monkeypatch.setattr(brain, "make_extractor",
                        lambda *_, **__: lambda volume: volume.data > -1)
    outcome = command(tmp_path / "sub-01_T1w.nii")
    assert outcome.code == 0
    assert "taken for a whole head (brain by hd-bet); if it is extracted: its background is -1" in (
        outcome.out)


@pytest.mark.parametrize("extraction, opened", [("auto", 3), ("deepbet", 1)])
def test_a_missing_net_that_all_volumes_need_is_an_error(command, tmp_path, monkeypatch, missing,
                                                         extraction, opened):
    for label in ("01", "02", "03"):
        write_pair(tmp_path / "heads", label, extracted=False)
    paths, read = [], translate.read_volume
    monkeypatch.setattr(translate, "read_volume", lambda path: paths.append(path) or read(path))
    outcome = command("--bids", tmp_path / "heads", "--direction", "t1w-to-t2w",
                      "--brain-extraction", extraction)
    assert outcome.code == 2 and "no package" in outcome.complaint
    assert len(missing) == 1 and len(paths) == opened


@pytest.mark.parametrize("options, said", [
    ([], "name volumes, or --bids DIR"), (["--bids", "."], "say with --direction"),
    (["--bids", ".", "--export", "onnx"], "one of the three"),
    (["--bids", "none", "--direction", "t1w-to-t2w"], "no such folder"),
    (["--bids", "x", "--out", "x", "--direction", "t1w-to-t2w"], "is the tree itself"),
])
def test_what_to_translate_must_be_said_once(command, options, said):
    outcome = command(*options)
    assert outcome.code == 2 and said in outcome.complaint


# ------------------------------------------------------------------------- maps and intensities


def test_maps_of_uncertainty_and_cycle_error_lie_beside_the_volume(command, tree, tmp_path):
    t1w = tree / "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz"
    outcome = command(t1w, "--uncertainty", 3, "--cycle-error", "--ensemble")
    assert outcome.code == 0
    out, source = tmp_path / "out", nib.load(t1w)
    for name in ("desc-synthetic_T2w", "desc-syntheticSD_T2w", "desc-cycleError_T1w"):
        made = nib.load(out / f"sub-02_ses-a_{name}.nii.gz")
        assert np.array_equal(made.affine, source.affine) and made.get_data_dtype() == np.float32
        data, inside = made.get_fdata(), source.get_fdata() > 0
        assert not data[~inside].any() and (data[inside] > 0).mean() > 0.9
        about = json.loads((out / f"sub-02_ses-a_{name}.json").read_text())
        assert about["Settings"]["uncertainty"] == 3 and about["Settings"]["looks"] == 6
        assert about["CheckpointSHA256"] and about["Description"]
    assert "deviation" in json.loads((out / "sub-02_ses-a_desc-syntheticSD_T2w.json").read_text())[
        "Description"]


def test_match_gives_the_references_own_intensities(command, ckpt, tmp_path):
    source = scan((40, 48, 36), (4, 4, 4))
    source.to_filename(tmp_path / "sub-01_T1w.nii.gz")
    real = scan((40, 48, 36), (4, 4, 4), suffix="T2w")
    real.to_filename(tmp_path / "real_T2w.nii.gz")
    plain = command(tmp_path / "sub-01_T1w.nii.gz", out="plain")
    found = command(tmp_path / "sub-01_T1w.nii.gz", "--match", tmp_path / "real_T2w.nii.gz")
    assert plain.code == found.code == 0
    name = "sub-01_desc-synthetic_T2w"
    relative, matched = (nib.load(tmp_path / out / f"{name}.nii.gz").get_fdata()
                         for out in ("plain", "out"))
    voxels = real.get_fdata()
    peak = np.percentile(voxels[voxels > 0], 99.5)
    np.testing.assert_allclose(matched, relative * peak, rtol=1e-5)
    about = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert about["Intensities"].startswith(f"as real_T2w.nii.gz: 0 to 1 is 0 to {peak:.0f}"[:-1])
    command(tmp_path / "sub-01_T1w.nii.gz", "--match", tmp_path / "real_T2w.nii.gz",
            "--uncertainty", 2, "--cycle-error", out="maps")
    scatter, error = (json.loads((tmp_path / "maps" / f"sub-01_desc-{kind}.json").read_text())
                      for kind in ("syntheticSD_T2w", "cycleError_T1w"))
    assert scatter["Intensities"].startswith(f"as real_T2w.nii.gz: 1 is {peak:.0f}"[:-1])
    assert error["Intensities"] == "relative, 0 to 1"
    wrong = command(tmp_path / "sub-01_T1w.nii.gz", "--match", tmp_path / "sub-01_T1w.nii.gz",
                    out="wrong")
    assert wrong.code == 2 and "intensities of a T2w are wanted" in wrong.complaint


def test_one_reference_does_not_serve_two_contrasts(command, tree):
    anat = tree / "sub-01" / "anat"
    outcome = command(anat / "sub-01_T1w.nii.gz", anat / "sub-01_T2w.nii.gz", "--match",
                      anat / "sub-01_T2w.nii.gz")
    assert outcome.code == 2 and "in two runs" in outcome.complaint


def test_a_warning_is_printed_and_kept_in_the_record(command, tmp_path):
    scan((40, 48, 36), (4, 4, 4)).to_filename(tmp_path / "sub-01_T2w.nii.gz")
    refused = command(tmp_path / "sub-01_T2w.nii.gz")
    assert refused.code == 2 and "looks like a T1w" in refused.complaint
    assert not list((tmp_path / "out").glob("sub-*"))
    forced = command(tmp_path / "sub-01_T2w.nii.gz", "--force")
    assert forced.code == 0 and "warning: " in forced.out
    about = json.loads((tmp_path / "out" / "sub-01_desc-synthetic_T1w.json").read_text())
    assert about["Warnings"][0].startswith("looks like a T1w")


# -------------------------------------------------------------------------- notebook and exports


def test_translate_volume_takes_images_and_a_checkpoint_or_a_translator(ckpt, tmp_path):
    image = scan((40, 48, 36), (4, 4, 4), "LPS")
    made = Translator(ckpt, device="cpu", precision="fp32")
    t2w = translate_volume(image, ckpt, "t1w-to-t2w", device="cpu", precision="fp32")
    assert np.array_equal(t2w.get_fdata(), made(image, "t1w-to-t2w").get_fdata())
    assert np.array_equal(t2w.affine, image.affine)
    image.to_filename(tmp_path / "sub-01_T1w.nii.gz")
    loaded = nib.load(tmp_path / "sub-01_T1w.nii.gz")
    assert np.array_equal(translate_volume(loaded, made).get_fdata(), t2w.get_fdata())
    freesurfers = nib.MGHImage(image.get_fdata().astype(np.float32), image.affine)
    answer = translate_volume(freesurfers, made, "t1w-to-t2w")
    assert isinstance(answer, nib.Nifti1Image) and np.allclose(answer.affine, image.affine)
    assert np.abs(answer.get_fdata() - t2w.get_fdata()).max() < 1e-3
    mean = translate_volume(image, made, "t1w-to-t2w", wanted=Wanted(looks=3))
    assert not np.array_equal(mean.get_fdata(), t2w.get_fdata())
    real = scan((40, 48, 36), (4, 4, 4), suffix="T2w")
    assert translate_volume(image, made, "t1w-to-t2w", match=real).get_fdata().max() > 100
    with pytest.raises(ValueError, match="does not end in _T1w or _T2w"):
        translate_volume(real, made)
    with pytest.raises(ValueError, match="precision: give this to the Translator"):
        translate_volume(image, made, "t1w-to-t2w", precision="fp32")


def test_translate_volume_takes_a_files_name_and_refuses_what_is_no_image(ckpt, tmp_path):
    image = scan((40, 48, 36), (4, 4, 4), "LPS")
    image.to_filename(tmp_path / "sub-01_T1w.nii.gz")
    made = Translator(ckpt, device="cpu", precision="fp32")
    wanted = made(image, "t1w-to-t2w").get_fdata()
    for name in (tmp_path / "sub-01_T1w.nii.gz", str(tmp_path / "sub-01_T1w.nii.gz")):
        assert np.array_equal(translate_volume(name, made).get_fdata(), wanted)
    for no_image in (np.zeros((4, 4, 4)), None):
        with pytest.raises(ValueError, match="is no nibabel image"):
            translate_volume(no_image, made, "t1w-to-t2w")
    with pytest.raises(ValueError, match="is no nibabel image"):
        translate_volume(image, made, "t1w-to-t2w", match=np.zeros(3))


@pytest.mark.parametrize("options, said", [
    ({"precision": "fp8"}, "choose from auto, fp32"), ({"batch_size": 0}, "batch_size 0"),
    ({"brain_ml": (5, 1)}, r"brain_ml \(5, 1\)"), ({"brain_ml": (1, np.inf)}, "brain_ml"),
])
def test_a_translators_options_that_cannot_work_are_refused_at_once(ckpt, options, said):
    with pytest.raises(ValueError, match=said):
        Translator(ckpt, device="cpu", **options)


def test_a_link_to_nothing_costs_itself_only_and_names_its_cure(command, tmp_path):
    scan((40, 48, 36), (4, 4, 4)).to_filename(tmp_path / "sub-01_T1w.nii.gz")
    (tmp_path / "sub-02_T1w.nii.gz").symlink_to(tmp_path / "annex" / "gone")
    outcome = command(tmp_path / "sub-01_T1w.nii.gz", tmp_path / "sub-02_T1w.nii.gz")
    assert outcome.code == 3 and "datalad get" in outcome.out + outcome.err
    assert (tmp_path / "out" / "sub-01_desc-synthetic_T2w.nii.gz").exists()
    assert command(tmp_path / "sub-02_T1w.nii.gz").code == 2


def test_a_full_disk_is_named_with_its_cure_and_nothing_is_half_written(command, tmp_path,
                                                                        monkeypatch):
    scan((40, 48, 36), (4, 4, 4)).to_filename(tmp_path / "sub-01_T1w.nii.gz")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nifti.os, "fsync", full)
    outcome = command(tmp_path / "sub-01_T1w.nii.gz")
    assert outcome.code == 1 and "No space left on device; make room" in outcome.err
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_head_taken_for_a_brain_is_told_so_where_it_looks_like_the_other_contrast(ckpt):
    t1w = scan((40, 48, 36), (4, 4, 4))
    made = Translator(ckpt, device="cpu", precision="fp32")
    with pytest.raises(ValueError, match="if it is a whole head, say so with --brain-extraction$"):
        made(t1w, "t2w-to-t1w")
    told = Translator(ckpt, device="cpu", precision="fp32", brain_extraction="none")
    with pytest.raises(ValueError, match="or --force if it is a T2w$"):
        told(t1w, "t2w-to-t1w")


@pytest.mark.filterwarnings("ignore:.*torch.jit.load:FutureWarning")
@pytest.mark.parametrize("kind, ending", [("torchscript", ".ts"), ("torch-export", ".pt2")])
def test_both_nets_are_exported_with_what_they_take(command, ckpt, tmp_path, kind, ending):
    assert command("--export", kind).code == 0
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == sorted(
        f"{way}{ending}{end}" for way in ("t1w-to-t2w", "t2w-to-t1w") for end in ("", ".json"))
    about = json.loads((out / f"t2w-to-t1w{ending}.json").read_text())
    assert about["Shape"] == ["N", 1, 48, 48] and about["Range"] == [-1, 1]
    assert about["CheckpointSHA256"] == checkpoint.fingerprint(ckpt)
    slices = torch.rand(3, 1, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for way, net in zip(("t1w-to-t2w", "t2w-to-t1w"),
                        checkpoint.load_generators(checkpoint.load(ckpt))):
        load = torch.jit.load if kind == "torchscript" else _load_program
        torch.testing.assert_close(load(str(out / f"{way}{ending}"))(slices), net(slices))


def _load_program(path):
    return torch.export.load(path).module()


def test_one_direction_can_be_exported_alone(command, tmp_path):
    assert command("--export", "torchscript", "--direction", "t2w-to-t1w").code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["t2w-to-t1w.ts",
                                                                    "t2w-to-t1w.ts.json"]


def test_an_exported_net_comes_with_the_histogram_that_it_wants_to_be_shown(tmp_path):
    wanted = Standard({"t1w": landmarks(np.linspace(-0.8, 0.9, 100))})
    ckpt = write_checkpoint(tmp_path / "best.pt", standard=wanted)
    assert run_command(translate.main, "--ckpt", ckpt, "--out", tmp_path / "out", "--export",
                       "torchscript").code == 0
    there, back = (json.loads((tmp_path / "out" / f"{way}.ts.json").read_text())
                   for way in ("t1w-to-t2w", "t2w-to-t1w"))
    assert there["HistogramStandard"]["Landmarks"] == wanted.record()["t1w"]
    assert there["HistogramStandard"]["Percentiles"] == list(PERCENTILES)
    volume = np.random.default_rng(0).uniform(-0.9, 0.4, 5000)  # as the record describes it
    own = [-1, *np.percentile(volume, there["HistogramStandard"]["Percentiles"]), 1]
    shown = np.interp(volume, own, there["HistogramStandard"]["Landmarks"])
    ours = wanted.show(volume.reshape(1, 50, 100), np.ones((1, 50, 100), bool), "t1w")
    # `landmarks` moves the k-th by k times 1e-4, so that no two are one
    np.testing.assert_allclose(shown, ours.ravel(), atol=2e-3)
    assert "HistogramStandard" not in back  # a T2w is taken as it is


def test_another_checkpoints_net_is_written_over_only_where_that_is_said(command, tmp_path):
    options = "--export", "torchscript"
    assert command(*options).code == command(*options).code == 0
    before = content(tmp_path / "out")
    other = write_checkpoint(tmp_path / "other.pt", spacing_mm=5.0)
    outcome = command(*options, ckpt=other)
    assert outcome.code == 2 and "not of this checkpoint" in outcome.complaint
    assert content(tmp_path / "out") == before
    assert command(*options, "--overwrite", ckpt=other).code == 0
    about = json.loads((tmp_path / "out" / "t1w-to-t2w.ts.json").read_text())
    assert about["CheckpointSHA256"] == checkpoint.fingerprint(other)


def test_two_formats_in_one_folder_keep_their_records(command, tmp_path):
    for kind in ("torchscript", "torch-export"):
        assert command("--export", kind, "--direction", "t2w-to-t1w").code == 0
    for name, kind in (("t2w-to-t1w.ts", "torchscript"), ("t2w-to-t1w.pt2", "torch-export")):
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text())["Format"] == kind


def test_the_choices_are_those_of_the_modules_that_import_torch():
    assert translate.PRECISIONS == device.PRECISIONS
    assert translate.FORMATS == tuple(export.ENDINGS)


def test_a_mistake_is_told_before_torch_is_imported():
    told = subprocess.run([sys.executable, "-X", "importtime", translate.__file__, "--ckpt",
                           "none.pt", "none_T1w.nii"], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert told.stderr.splitlines()[-1] == "error: none_T1w.nii: no such file; check the name"
    assert not re.search(r"\| +torch$", told.stderr, re.MULTILINE)
