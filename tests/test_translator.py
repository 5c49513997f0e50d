"""Tests of translator.py: geometry by an identity net, nets, brains, contrasts, looks."""

import nibabel as nib
import numpy as np
import pytest
import torch
from painted_scans import scaled, scan, translator, write_checkpoint
from scipy import ndimage
from torch import nn

from data import contrast
from data.histogram import Standard, StandardRows, find_standard, landmarks
from data.store import SliceStore
from data.nifti import read_volume, volume_from_image
from models import checkpoint
from models.generator import DARKEST
from translator import Translator, Wanted, _share_out


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A checkpoint of random nets for slices of 48 pixels of 4 mm."""
    return write_checkpoint(tmp_path_factory.mktemp("ckpt") / "best.pt")


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


# ----------------------------------------------------------------------- contrasts and strangers


def test_the_other_contrast_is_refused_unless_forced_and_the_right_one_never(ckpt):
    made = translator(ckpt)
    t1w = scan((40, 48, 36), (4, 4, 4))
    with pytest.raises(ValueError, match=r"looks like a T1w, not like a T2w \(skewness .*--force"):
        made(t1w, "t2w-to-t1w")
    volume = volume_from_image(t1w)
    assert made.translate(volume, "t1w-to-t2w").warnings == []
    forced = made.translate(volume, "t2w-to-t1w", Wanted(force=True))
    assert [line[:40] for line in forced.warnings] == ["looks like a T1w, not like a T2w (skewne"]
    assert np.array_equal(forced.data, made.translate(volume, "t1w-to-t2w").data)
    # a T2w head whose cues disagree is translated, and that is said
    t2w = volume_from_image(scan((40, 48, 36), (4, 4, 4), suffix="T2w"))
    assert "cannot tell" in made.translate(t2w, "t2w-to-t1w").warnings[0]


def test_a_volume_unlike_the_training_data_is_translated_with_a_warning(tmp_path):
    image = scan((40, 48, 36), (4, 4, 4))
    usual = {"percentiles": list(contrast.PERCENTILES), "brain_ml": [1300.0, 1400.0],
             "slice_spacing_mm": [4.0, 4.0],
             "t1w": {"mean": [0.55, 0.65, 0.85, 0.9, 0.96], "sd": [0.05] * 5}}
    ckpt = write_checkpoint(tmp_path / "usual.pt", training=usual)
    assert translator(ckpt).translate(volume_from_image(image), "t1w-to-t2w").warnings == []
    strange = {**usual, "brain_ml": [800.0, 900.0],
               "t1w": {"mean": [0.1, 0.2, 0.3, 0.35, 0.4], "sd": [0.05] * 5}}
    ckpt = write_checkpoint(tmp_path / "strange.pt", training=strange)
    said = translator(ckpt).translate(volume_from_image(image), "t1w-to-t2w").warnings
    assert said[0].startswith("intensities are far") and "0.1 0.2 0.3 0.35 0.4" in said[0]
    assert said[1].startswith("brain 1288 ml") and said[1].endswith("in training 800 to 900")


# ------------------------------------------------------------------------------ looks and cycles


class Ramp(nn.Module):
    """Adds what depends on the place in the frame: what looks differ by, and averaging lowers."""

    def forward(self, slices):
        there = torch.arange(slices.shape[-1], dtype=torch.float32) / slices.shape[-1] - 0.5
        return slices * 0.5 + 0.2 * there


def test_looks_are_laid_back_where_they_came_from(ckpt):
    volume = volume_from_image(scan((40, 48, 36), (4, 4, 4)))
    made = translator(ckpt)
    plain = made.translate(volume, "t1w-to-t2w")
    many = made.translate(volume, "t1w-to-t2w", Wanted(looks=6, uncertainty=6))
    np.testing.assert_allclose(many.data, plain.data, atol=1e-6)  # no voxel is resampled here
    assert many.uncertainty.max() < 1e-6 and plain.uncertainty is None


def test_slices_between_slices_are_laid_back_where_they_came_from(tmp_path):
    ckpt = write_checkpoint(tmp_path / "best.pt", size=96, spacing_mm=2.5)
    volume = volume_from_image(scan((76, 96, 70), (2, 2, 2), "LPS", (4, -3, 6)))
    made = translator(ckpt)
    plain = made.translate(volume, "t1w-to-t2w")
    many = made.translate(volume, "t1w-to-t2w", Wanted(looks=3))
    inner = ndimage.binary_erosion(plain.inside, iterations=3)
    assert 0 < np.abs(many.data - plain.data)[inner].mean() < 0.01
    up, down = (np.abs(np.roll(many.data, step, axis=2) - plain.data)[inner].mean()
                for step in (1, -1))
    assert min(up, down) > 2 * np.abs(many.data - plain.data)[inner].mean()


def test_a_brain_that_begins_in_the_volumes_first_slice_is_seen_by_all_looks(tmp_path):
    """Slices of 4 mm at voxels of 1.9: those between begin 1.3 mm above the volume's first one."""
    ckpt = write_checkpoint(tmp_path / "best.pt", size=60, spacing_mm=4.0)
    whole = scan((84, 100, 84), (2, 2, 1.9))
    volume = volume_from_image(whole.slicer[:, :, 24:66])  # the brain reaches both ends
    made = translator(ckpt)
    plain = made.translate(volume, "t1w-to-t2w")
    assert plain.inside[:, :, 0].any() and plain.inside[:, :, -1].any()
    many = made.translate(volume, "t1w-to-t2w", Wanted(looks=6, uncertainty=6))
    for k in (0, 1, -2, -1):
        inner = ndimage.binary_erosion(plain.inside[:, :, k], iterations=4)
        assert np.abs(many.data - plain.data)[:, :, k][inner].mean() < 0.02
        assert many.uncertainty[:, :, k][inner].mean() < 0.03


def test_uncertainty_is_the_scatter_of_the_looks_and_their_mean_is_steadier(ckpt):
    volume = volume_from_image(scan((40, 48, 36), (4, 4, 4)))
    made = translator(ckpt, (Ramp(), Ramp()))
    found = made.translate(volume, "t1w-to-t2w", Wanted(uncertainty=4))
    again = made.translate(volume, "t1w-to-t2w", Wanted(uncertainty=4, looks=8))
    assert np.array_equal(found.data, made.translate(volume, "t1w-to-t2w").data)
    assert np.array_equal(found.uncertainty, again.uncertainty)
    assert not found.uncertainty[~found.inside].any()
    assert (found.uncertainty[found.inside] > 1e-3).mean() > 0.9
    halved = scaled(scan((40, 48, 36), (4, 4, 4))) * 0.5 + 0.25  # Ramp without its ramp
    error = [np.abs(f.data - halved)[f.inside].mean() for f in (found, again)]
    assert error[1] < 0.6 * error[0]  # mirrored looks cancel the ramp


def test_a_cycle_that_comes_back_has_no_error_and_one_that_does_not_has_its_distance(ckpt):
    volume = volume_from_image(scan((40, 48, 36), (4, 4, 4)))

    class Half(nn.Module):
        def forward(self, slices):
            return (slices - 1) / 2  # [0, 1] halved, in [-1, 1]

    wanted = Wanted(cycle_error=True)
    assert translator(ckpt).translate(volume, "t1w-to-t2w", wanted).cycle_error.max() < 1e-6
    found = translator(ckpt, (Half(), nn.Identity())).translate(volume, "t1w-to-t2w", wanted)
    image = scaled(scan((40, 48, 36), (4, 4, 4)))
    np.testing.assert_allclose(found.cycle_error, image / 2, atol=1e-6)
    np.testing.assert_allclose(found.data, image / 2, atol=1e-6)


def test_a_volume_is_given_to_the_nets_with_the_histogram_of_their_training(tmp_path):
    wanted = {name: landmarks(np.linspace(-0.8, top, 200)) for name, top in (("t1w", 0.4),
                                                                             ("t2w", 0.9))}
    ckpt = write_checkpoint(tmp_path / "best.pt", standard=Standard(wanted))
    image = scan((40, 48, 36), (4, 4, 4))
    found = translator(ckpt).translate(volume_from_image(image), "t1w-to-t2w",
                                       Wanted(cycle_error=True, looks=2))
    inside = found.inside
    off = np.abs(landmarks(2 * found.data[inside] - 1) - wanted["t1w"])
    assert off.max() < 0.06 and off.mean() < 0.02  # slices with little brain have no say
    assert found.data[~inside].max() == 0
    assert found.cycle_error.max() < 1e-6  # of what the nets were given
    other = nib.Nifti1Image((scaled(image) ** 1.5 * 900).astype(np.int16), image.affine)
    again = translator(ckpt).translate(volume_from_image(other), "t1w-to-t2w", Wanted(force=True))
    assert np.abs(scaled(other) - scaled(image))[inside].mean() > 0.05
    assert np.abs(again.data - found.data)[inside].mean() < 0.01


def test_the_nets_are_given_what_they_would_be_given_from_the_store(small_tree, small_store,
                                                                    tmp_path):
    store = SliceStore(small_store)
    standard = find_standard(store)
    made = translator(write_checkpoint(tmp_path / "best.pt", standard=standard))
    by_row = StandardRows(store, standard)
    for session in store.subjects:
        given = []
        made.generators["t1w-to-t2w"].register_forward_hook(
            lambda _, slices, out: given.append(slices[0][:, 0].numpy()))
        volume = read_volume(small_tree / session["t1w"])
        made.translate(volume, "t1w-to-t2w", Wanted(force=True))
        rows = session["first_row"] + np.arange(session["n_slices"])
        wanted = np.array(store.t1w[rows])
        by_row.show(wanted, rows, "t1w")
        assert not np.array_equal(wanted, store.t1w[rows])
        found = np.concatenate(given)
        off = [np.abs(found - slices).max(axis=(1, 2)).min() for slices in wanted.astype("f4")]
        assert max(off) < 2e-3  # but for the rounding of the store


@pytest.mark.parametrize("wrong", [{"looks": 0}, {"uncertainty": 1}, {"uncertainty": -2}])
def test_looks_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="at least"):
        Wanted(**wrong)


def test_half_precision_gives_what_autocast_gives(ckpt):
    made = Translator(ckpt, device="cpu", precision="bf16")
    plain = Translator(ckpt, device="cpu", precision="fp32")
    slices = np.random.default_rng(0).random((5, 48, 48)).astype(np.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = plain.generators["t1w-to-t2w"](torch.from_numpy(slices)[:, None])
    assert np.array_equal(made.net("t1w-to-t2w")(slices), wanted[:, 0].float().numpy())
    full = plain.net("t1w-to-t2w")(slices)
    assert 0 < np.abs(full - wanted[:, 0].float().numpy()).mean() < 0.02


def test_the_darkest_brain_is_no_background_in_half_precision(tmp_path):
    kept = write_checkpoint(tmp_path / "best.pt", config={"keep_background": True})
    made = Translator(kept, device="cpu", precision="bf16")
    plain = Translator(kept, device="cpu", precision="fp32")
    slices = np.random.default_rng(0).random((5, 48, 48)).astype(np.float32)
    slices[:, :10], slices[:, 10:14], slices[:, 14:18] = -1, DARKEST, -1 + 1e-5
    for direction in ("t1w-to-t2w", "t2w-to-t1w"):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            wanted = plain.generators[direction](torch.from_numpy(slices)[:, None])[:, 0].numpy()
        found = made.net(direction)(slices)
        assert np.array_equal(found, wanted)
        assert np.array_equal(found == -1, slices == -1)


def test_cores_that_work_side_by_side_give_what_one_gives(ckpt):
    made = Translator(ckpt, device="cpu", precision="bf16")
    slices = np.random.default_rng(0).random((11, 48, 48)).astype(np.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = made.net("t1w-to-t2w")(slices)
        torch.set_num_threads(3)
        assert np.array_equal(made.net("t1w-to-t2w")(slices), alone)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 76, 97])
def test_workers_get_equally_many_slices_in_batches_that_are_not_too_large(count):
    numbers = np.arange(100, 100 + count)
    alone, shared = _share_out(numbers, 4, 1), _share_out(numbers, 4, 2)
    for batches in (alone, shared):
        assert np.array_equal(np.concatenate(batches), numbers)
        assert all(0 < len(batch) <= 4 for batch in batches)
    sizes = [len(batch) for batch in shared]
    assert max(sizes) - min(sizes) <= 1 and len(shared) % 2 == (count == 1)
    assert len(alone) == -(-count // 4)
