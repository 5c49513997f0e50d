"""Tests of losses/volume_quality.py against scikit-image and numpy."""
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.testing import data_path
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from losses.quality import psnr_db
from losses.volume_quality import (SLAB, slice_consistency, slice_step, volume_psnr_db,
                                   volume_ssim)


def real_volume() -> Tensor:
    """Return a real head in [0, 1], (1, 1, 25, 33, 41), axial slices; nibabel ships it."""
    data = nib.load(data_path / "anatomical.nii").get_fdata()
    scaled = (data - data.min()) / (data.max() - data.min())
    return torch.from_numpy(scaled).float().permute(2, 0, 1)[None, None].contiguous()


def noisy(volume: Tensor, sd: float = 0.05, seed: int = 1) -> Tensor:
    noise = torch.randn(volume.shape, generator=torch.Generator().manual_seed(seed))
    return (volume + sd * noise).clamp(0, 1)


def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    real = real_volume()
    random = torch.rand(2, 2, 1, 17, 12, 19, generator=torch.Generator().manual_seed(0))
    return {
        "real": (torch.cat([noisy(real), noisy(real, 0.2)]), torch.cat([real, real.flip(4)])),
        "real inverted": (1 - real, real),
        "deeper than two slabs": (noisy(real.transpose(2, 4)), real.transpose(2, 4)),
        "one slab exactly": (noisy(real)[:, :, :SLAB], real[:, :, :SLAB]),
        "a slab and one slice": (random[0], random[1]),
        "smallest": (random[0, ..., :11, :11, :11], random[1, ..., :11, :11, :11]),
        "constant": (torch.full((1, 1, 18, 12, 12), 0.9), torch.full((1, 1, 18, 12, 12), 0.899)),
    }


CASES = list(pairs())
METRICS = [volume_psnr_db, volume_ssim, slice_consistency]


@pytest.mark.parametrize("case", CASES)
def test_figures_of_a_volume_equal_scikit_images(case):
    volume, reference = pairs()[case]
    mask = noisy(torch.zeros(volume.shape), 1) > 0.3
    mask[:, :, 0, 0, 0] = True  # the map's border counts too
    found = {given is None: (volume_ssim(volume, reference, given),
                             volume_psnr_db(volume, reference, given)) for given in (None, mask)}
    for row in range(len(volume)):
        x, y = (v[row, 0].double().numpy() for v in (volume, reference))
        inside = mask[row, 0].numpy()
        wanted, wanted_map = structural_similarity(
            x, y, data_range=1, full=True, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False)
        for whole, ssim, error in ((True, wanted, (x - y) ** 2),
                                   (False, wanted_map[inside].mean(), (x - y)[inside] ** 2)):
            assert found[whole][0][row].item() == pytest.approx(ssim, abs=1e-5)
            assert found[whole][1][row].item() == pytest.approx(
                -10 * math.log10(error.mean()), rel=1e-5)
        assert found[True][1][row].item() == pytest.approx(
            peak_signal_noise_ratio(y, x, data_range=1), rel=1e-5)


def test_a_volume_is_its_slices_stacked():
    slices, reference = noisy(real_volume())[0].transpose(0, 1), real_volume()[0].transpose(0, 1)
    assert slices.shape == (25, 1, 33, 41)
    found = volume_psnr_db(slices.transpose(0, 1)[None], reference.transpose(0, 1)[None])
    errors = 10 ** (-psnr_db(slices, reference).double() / 10)
    assert found.item() == pytest.approx(-10 * math.log10(errors.mean()), rel=1e-6)


def test_steps_between_slices_are_numpys():
    volume, reference = noisy(real_volume()), real_volume()
    inside = reference > 0.2
    x, y, m = (v[0, 0].double().numpy() for v in (volume, reference, inside))
    both = (m[1:] * m[:-1]).astype(bool)
    steps = [abs(np.diff(v, axis=0)) for v in (x, y)]
    assert slice_step(volume).item() == pytest.approx(steps[0].mean(), rel=1e-6)
    assert slice_step(volume, inside).item() == pytest.approx(steps[0][both].mean(), rel=1e-6)
    assert slice_consistency(volume, reference, inside).item() == pytest.approx(
        steps[0][both].mean() / steps[1][both].mean(), rel=1e-6)


def test_slices_that_flicker_step_further_than_the_real_ones_and_equal_slices_not_at_all():
    reference = real_volume()
    flicker = 0.05 * (-1.0) ** torch.arange(25)[:, None, None]
    assert slice_consistency(reference + flicker, reference).item() > 1.5
    frozen = reference[:, :, 12:13].expand_as(reference)
    assert slice_consistency(frozen, reference).item() == 0
    assert slice_consistency(reference, frozen).item() == math.inf
    ramp = torch.linspace(0, 1, 11)[:, None, None].expand(1, 1, 11, 4, 4)
    assert slice_step(ramp).item() == pytest.approx(0.1)


def test_a_volume_equals_itself():
    volume = real_volume()
    for given in (None, volume > 0.2):
        assert volume_ssim(volume, volume, given).item() == 1
        assert volume_psnr_db(volume, volume, given).item() == math.inf
        assert slice_consistency(volume, volume, given).item() == 1


@pytest.mark.parametrize("metric", [volume_ssim, volume_psnr_db])
def test_a_pair_may_change_places_and_scale(metric):
    volume, reference = noisy(real_volume()), real_volume()
    for given in (None, reference > 0.2):
        found = metric(volume, reference, given)
        torch.testing.assert_close(metric(reference, volume, given), found)
        torch.testing.assert_close(metric(255 * volume, 255 * reference, given, data_range=255),
                                   found)


@pytest.mark.parametrize("metric", METRICS)
def test_rows_are_measured_one_by_one(metric):
    volume, reference = pairs()["real"]
    mask = reference > 0.2
    for given in (None, mask):
        together = metric(volume, reference, given)
        for row in (0, 1):
            one = slice(row, row + 1)
            alone = metric(volume[one], reference[one], None if given is None else mask[one])
            torch.testing.assert_close(alone, together[one])


@pytest.mark.parametrize("metric", METRICS)
def test_volumes_of_any_precision_are_measured_in_the_highest(metric):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        volume, reference = noisy(real_volume()).to(dtype), real_volume().to(dtype)
        found = metric(volume, reference)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, metric(volume.double(), reference.double()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(metric(volume, reference), found)


@pytest.mark.parametrize("metric", [volume_psnr_db, slice_consistency])
def test_with_a_mask_what_lies_outside_changes_nothing(metric):
    volume, reference = noisy(real_volume()), real_volume()
    mask = reference > 0.2
    elsewhere = torch.where(mask, volume, noisy(reference, 0.5, seed=2))
    assert torch.equal(metric(elsewhere, reference, mask), metric(volume, reference, mask))
    assert metric(elsewhere, reference) != metric(volume, reference)


def test_background_reaches_masked_ssim_only_through_windows_at_the_masks_edge():
    volume, reference = noisy(real_volume()), real_volume()
    mask = torch.zeros_like(reference).bool()
    mask[..., 10:15, 14:20, 16:22] = True
    far = torch.ones_like(mask)
    far[..., 5:20, 9:25, 11:27] = False
    elsewhere = torch.where(far, 1 - volume, volume)
    torch.testing.assert_close(volume_ssim(elsewhere, reference, mask),
                               volume_ssim(volume, reference, mask))


@pytest.mark.parametrize("metric", METRICS)
def test_a_nan_shows_in_its_own_row_even_outside_the_mask(metric):
    volume, reference = pairs()["real"]
    volume[1, 0, 0, 0, 0] = math.nan
    mask = torch.zeros_like(volume).bool()
    mask[..., 18:, 20:, 20:] = True
    for given in (None, mask):
        assert metric(volume, reference, given).isnan().tolist() == [False, True]


def test_arguments_that_do_not_fit_are_refused_with_both_values():
    volume = real_volume()
    everywhere = torch.ones_like(volume).bool()
    for metric in METRICS:
        with pytest.raises(ValueError, match=r"\(1, 1, 25, 33, 41\).*\(1, 1, 24, 33, 41\)"):
            metric(volume, volume[:, :, 1:])
        with pytest.raises(ValueError, match="float32.*float64"):
            metric(volume, volume.double())
        with pytest.raises(ValueError, match=r"\(1, 25, 33, 41\).*\(N, 1, D, H, W\)"):
            metric(volume[0], volume[0])
        with pytest.raises(ValueError, match="int32"):
            metric(volume.int(), volume.int())
        with pytest.raises(ValueError, match="torch.uint8.*torch.bool"):
            metric(volume, volume, everywhere.byte())
        with pytest.raises(ValueError, match="empty in row 0 of 1"):
            metric(volume, volume, ~everywhere)
    for metric in (volume_psnr_db, volume_ssim):
        with pytest.raises(ValueError, match="data_range is 0"):
            metric(volume, volume, data_range=0)
    with pytest.raises(ValueError, match="10 x 33 x 41.*11"):
        volume_ssim(volume[:, :, :10], volume[:, :, :10])
    with pytest.raises(ValueError, match="1 slice;.*at least 2"):
        slice_step(volume[:, :, :1])
    every_second = everywhere.clone()
    every_second[:, :, ::2] = False
    with pytest.raises(ValueError, match="no two neighbours.*row 0 of 1"):
        slice_step(volume, every_second)


def test_no_volumes_give_no_numbers():
    none = torch.zeros(0, 1, 12, 12, 12)
    for metric in METRICS:
        assert metric(none, none).shape == metric(none, none, none.bool()).shape == (0,)
