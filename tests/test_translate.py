"""Tests of translate.py: geometry by an identity net, names, brains, errors."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from commands import run_command
from conftest import lay_affine, paint, write_pair
from scipy import ndimage
from torch import nn

import translate
from models import checkpoint
from models.cyclegan import EMA, CycleGAN, init_weights
from translate import Translator, parse_args, plan_files

CONFIG = {"features": 4, "blocks": 1, "upsample": "transpose"}
ON_CPU = ["--device", "cpu", "--precision", "fp32"]


def write_checkpoint(path, *, size=48, spacing_mm=4.0, extraction=("none",)):
    nets = CycleGAN(**CONFIG)
    init_weights(nets, torch.Generator().manual_seed(0))
    record = {"size": size, "spacing_mm": spacing_mm, "brain_extraction": list(extraction),
              "intensity": {"rule": "painted", "upper_percentile": 99.5}, "subjects": {}}
    checkpoint.save(path, {"config": CONFIG, "preprocessing": record, "step": 1, "epoch": 1,
                           "slices_seen": 1, "ema": EMA(nets).state_dict(), "best": {}})
    return path


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


def translator(ckpt, nets=(nn.Identity(), nn.Identity()), **options):
    """A translator whose nets are replaced."""
    made = Translator(ckpt, device="cpu", precision="fp32", **options)
    made.generators = dict(zip(("t1w-to-t2w", "t2w-to-t1w"), nets))
    return made


def scan(shape, spacing, axes="RAS", turn_deg=(0, 0, 0), dtype=np.int16, suffix="T1w"):
    """An extracted brain as a nibabel image."""
    affine = lay_affine(shape, spacing, axes, turn_deg=turn_deg, middle=(3, -5, 8))
    moved = np.eye(4)
    moved[:3, 3] = (3, -5, 8)
    data = paint(shape, affine, suffix, matrix=moved)
    image = nib.Nifti1Image(data.astype(dtype), affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"kept"
    return image


def scaled(image):
    """What identity should give: zero to 0, the brain's 99.5th percentile to 1, clipped."""
    data = image.get_fdata()
    return np.clip(data / np.percentile(data[data > 0], 99.5), 0, 1)


# ------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("shape, spacing, axes, turn_deg", [
    ((40, 48, 36), (4, 4, 4), "RAS", (0, 0, 0)), ((40, 48, 36), (4, 4, 4), "LPS", (0, 0, 0)),
    ((40, 48, 36), (4, 4, 4), "LAS", (0, 0, 0)), ((48, 36, 40), (4, 4, 4), "PSR", (0, 0, 0)),
    ((40, 48, 36), (4, 4, 4), "LPS", (12, -7, 20)), ((40, 48, 24), (4, 4, 6), "LPS", (0, 0, 0)),
], ids=["RAS", "LPS", "LAS", "sagittal", "oblique", "thick"])
def test_identity_returns_the_volume_where_no_voxel_is_resampled(ckpt, shape, spacing, axes,
                                                                 turn_deg):
    image = scan(shape, spacing, axes, turn_deg)
    for direction in ("t1w-to-t2w", "t2w-to-t1w"):
        found = translator(ckpt)(image, direction, force=True).get_fdata()
        np.testing.assert_allclose(found, scaled(image), atol=1e-6)


@pytest.mark.parametrize("shape, spacing, axes, turn_deg", [
    ((60, 72, 50), (2.7, 2.7, 2.7), "LAS", (0, 0, 0)),
    ((54, 50, 26), (3, 4, 6), "LPS", (0, 0, 0)),
    ((50, 54, 46), (3.3, 3.6, 3), "RPI", (15, 10, -25)),
], ids=["isotropic", "anisotropic", "oblique"])
def test_identity_returns_the_volume_to_interpolation_error(tmp_path, shape, spacing, axes,
                                                            turn_deg):
    ckpt = write_checkpoint(tmp_path / "best.pt", size=96, spacing_mm=2.0)
    image = scan(shape, spacing, axes, turn_deg)
    found, wanted = translator(ckpt)(image, "t1w-to-t2w").get_fdata(), scaled(image)
    brain = wanted > 0
    assert np.abs(found - wanted)[brain].mean() < 0.015
    inner = ndimage.binary_erosion(brain, iterations=2)
    assert np.abs(found - wanted)[inner].max() < 0.15
    assert np.corrcoef(found[brain], wanted[brain])[0, 1] > 0.99


def test_a_coarser_pixel_blurs_but_moves_nothing(tmp_path):
    ckpt = write_checkpoint(tmp_path / "best.pt", size=48, spacing_mm=4.0)
    image = scan((84, 100, 74), (2, 2, 2), "LPS", (5, 3, 9))
    found, wanted = translator(ckpt)(image, "t1w-to-t2w").get_fdata(), scaled(image)
    brain = ndimage.binary_erosion(wanted > 0, iterations=4)

    def error(shift):
        return np.abs(np.roll(found, shift, axis=(0, 1, 2)) - wanted)[brain].mean()

    here = error((0, 0, 0))
    assert here < 0.03
    for shift in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)):
        assert error(shift) > here


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


def test_leftovers_below_zero_and_holes_of_an_extracted_brain_stay_empty(ckpt):
    image = scan((40, 48, 36), (4, 4, 4), dtype=np.float32)
    data = image.get_fdata().astype(np.float32)
    rim = ndimage.binary_dilation(data > 0) & (data == 0)
    data[rim] = np.where(np.arange(rim.sum()) % 16 == 0, -3, 0)  # as splines leave them
    data[20, 24, 18] = 0
    image = nib.Nifti1Image(data, image.affine)
    one = nn.Hardtanh(min_val=1, max_val=1.0001)
    found = translator(ckpt, (one, one))(image, "t1w-to-t2w").get_fdata()
    assert not found[data <= 0].any()
    assert (found[data > 0] == 1).all()


def test_each_direction_has_its_net_and_each_net_sees_slices_as_in_training(ckpt):
    seen = []

    class Constant(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, slices):
            seen.append(slices)
            return torch.full_like(slices, self.value)

    image = scan((40, 48, 36), (4, 4, 4))
    both = translator(ckpt, (Constant(0.5), Constant(-0.5)), batch_size=7)
    brain = image.get_fdata() > 0
    assert np.allclose(both(image, "t1w-to-t2w").get_fdata()[brain], 0.75)
    assert np.allclose(both(image, "t2w-to-t1w", force=True).get_fdata()[brain], 0.25)
    slices = torch.cat(seen)
    assert slices.shape[1:] == (1, 48, 48) and slices.dtype == torch.float32
    assert slices.min() == -1 and slices.max() == 1
    assert max(len(batch) for batch in seen) == 7
    assert (slices > -1).any(dim=-1).any(dim=-1).all()  # none of them is empty


def test_g_makes_t2w_and_f_makes_t1w(ckpt):
    made = Translator(ckpt, device="cpu", precision="fp32")
    slices = torch.rand(1, 1, 48, 48) * 2 - 1
    for direction, net in zip(("t1w-to-t2w", "t2w-to-t1w"),
                              checkpoint.load_generators(checkpoint.load(ckpt))):
        assert torch.equal(made.generators[direction](slices), net(slices))


def test_a_brain_larger_than_the_frame_is_said_and_filled_with_its_rim(tmp_path, command):
    ckpt = write_checkpoint(tmp_path / "small.pt", size=32)
    scan((40, 48, 36), (4, 4, 4)).to_filename(tmp_path / "sub-01_T1w.nii")
    outcome = command(tmp_path / "sub-01_T1w.nii", ckpt=ckpt)
    assert outcome.code == 0
    assert "of the brain lies outside the frame of 32 pixels" in outcome.out
    found = translator(ckpt)(nib.load(tmp_path / "sub-01_T1w.nii"), "t1w-to-t2w").get_fdata()
    inside = nib.load(tmp_path / "sub-01_T1w.nii").get_fdata() > 0
    assert (found[inside] > 0).mean() > 0.99


# ---------------------------------------------------------------------------------- the command


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
                      (tmp_path, "no such file")):
        outcome = command(good, bad)
        assert outcome.code == 2 and said in outcome.complaint
        assert not (tmp_path / "out").exists()


def test_a_damaged_volume_is_one_error_that_names_it(command, tmp_path):
    scan((40, 48, 36), (4, 4, 4)).to_filename(tmp_path / "sub-01_T1w.nii.gz")
    content = (tmp_path / "sub-01_T1w.nii.gz").read_bytes()
    for damaged in (content[:1000], b"text", b""):
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
