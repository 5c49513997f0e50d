"""Tests of losses/quality.py against scikit-image."""
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.testing import data_path
from PIL import Image
from scipy import ndimage
from scipy.stats import pearsonr, wasserstein_distance
from skimage.filters import prewitt
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from skimage.transform import downscale_local_mean, resize
from torch import Tensor

from losses.quality import (GRADIENT_CONSTANT, SCALE_WEIGHTS, checkerboard, correlation,
                            crop_to_box, gradient_similarity, intensity_distance, mae, measure,
                            multiscale_ssim, psnr_db, scale_count, ssim, ssim_map)

# All that take (image, reference, mask, data_range), and what equal images reach.
IDEAL = {ssim: 1, psnr_db: math.inf, mae: 0, multiscale_ssim: 1, gradient_similarity: 1,
         intensity_distance: 0}
METRICS = [*IDEAL, correlation]  # which has no data_range
UNSEEING = [mae, psnr_db, correlation, multiscale_ssim, gradient_similarity, intensity_distance]


def peer_ssim(image: Tensor, reference: Tensor,
              data_range: float = 1.0) -> tuple[float, np.ndarray]:
    """Return scikit-image's mean and map for one (1, H, W) pair, in float64."""
    return structural_similarity(
        image[0].double().numpy(), reference[0].double().numpy(), data_range=data_range, full=True,
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False)


def real_slices() -> Tensor:
    """Return axial slices of a real head in [0, 1], (N, 1, 36, 44); nibabel ships the volume."""
    volume = nib.load(data_path / "anatomical.nii").get_fdata()
    scaled = (volume - volume.min()) / (volume.max() - volume.min())
    slices = torch.from_numpy(scaled).float().permute(2, 0, 1)[:, None]
    return torch.nn.functional.pad(slices[::4], (1, 2, 2, 1))


def big_real_slices() -> Tensor:
    """Return three of the real slices at 96 x 80, smooth as interpolated slices are."""
    pairs = [resize(image[0].numpy(), (96, 80), order=3) for image in real_slices()[2:5]]
    return torch.from_numpy(np.stack(pairs)).float()[:, None].clamp(0, 1)


def random_slices(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def noisy(images: Tensor, sd: float = 0.05) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + sd * noise).clamp(0, 1)


def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    real, big = real_slices(), big_real_slices()
    flat = torch.full((2, 1, 24, 31), 0.9)
    half = flat.clone()
    half[..., 15:] = 0.1
    return {
        "real": (noisy(real), real),
        "real inverted": (1 - real, real),
        "real against its neighbour": (real[1:], real[:-1]),
        "real upscaled": (noisy(big, 0.02), big),
        "random": (random_slices(3, 1, 40, 57), random_slices(3, 1, 40, 57, seed=1)),
        "smallest": (random_slices(2, 1, 11, 11), random_slices(2, 1, 11, 11, seed=1)),
        "constant": (flat, flat - 0.001),
        "constant halves": (half, half.flip(3)),
        "bright with faint noise": (0.99 + 1e-4 * noisy(flat), flat),
    }


CASES = list(pairs())


@pytest.mark.parametrize("case", CASES)
def test_ssim_and_its_map_equal_scikit_images_to_1e_minus_5(case):
    image, reference = pairs()[case]
    found, found_map = ssim(image, reference), ssim_map(image, reference)
    assert found.dtype == found_map.dtype == torch.float32
    assert found.shape == (len(image),) and found_map.shape == image.shape
    for row in range(len(image)):
        wanted, wanted_map = peer_ssim(image[row], reference[row])
        assert found[row].item() == pytest.approx(wanted, abs=1e-5)
        np.testing.assert_allclose(found_map[row, 0], wanted_map, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_masked_ssim_is_the_mean_of_scikit_images_full_map_over_the_mask(case):
    image, reference = pairs()[case]
    mask = random_slices(*image.shape, seed=2) > 0.6
    mask[..., 0, 0] = True  # the map's border counts too
    found = ssim(image, reference, mask)
    for row in range(len(image)):
        wanted = peer_ssim(image[row], reference[row])[1][mask[row, 0].numpy()].mean()
        assert found[row].item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_psnr_and_mae_equal_scikit_image_and_numpy(case):
    image, reference = pairs()[case]
    mask = random_slices(*image.shape, seed=2) > 0.6
    for row in range(len(image)):
        x, y = image[row].double().numpy(), reference[row].double().numpy()
        inside = mask[row].numpy()
        assert psnr_db(image, reference)[row].item() == pytest.approx(
            peak_signal_noise_ratio(y, x, data_range=1), rel=1e-6)
        assert psnr_db(image, reference, mask)[row].item() == pytest.approx(
            -10 * math.log10(mean_squared_error(x[inside], y[inside])), rel=1e-6)
        assert mae(image, reference)[row].item() == pytest.approx(abs(x - y).mean(), rel=1e-6)
        assert mae(image, reference, mask)[row].item() == pytest.approx(
            abs(x - y)[inside].mean(), rel=1e-6)


def test_hand_computed_values():
    reference = torch.zeros(1, 1, 12, 12)
    image = torch.full_like(reference, 0.1)
    assert psnr_db(image, reference).item() == pytest.approx(20)
    assert mae(image, reference).item() == pytest.approx(0.1)
    # No variance anywhere: SSIM is c1 / (0.1^2 + c1) with c1 = 0.01^2.
    assert ssim(image, reference).item() == pytest.approx(1e-4 / (1e-2 + 1e-4), rel=1e-5)
    mask = torch.zeros_like(reference).bool()
    mask[..., :2] = True
    image[..., 2:] = 1
    assert psnr_db(image, reference, mask).item() == pytest.approx(20)
    assert mae(image, reference, mask).item() == pytest.approx(0.1)


@pytest.mark.parametrize("metric", IDEAL)
def test_intensities_and_range_scaled_together_change_nothing(metric):
    image, reference = noisy(real_slices()), real_slices()
    torch.testing.assert_close(metric(255 * image, 255 * reference, data_range=255),
                               metric(image, reference))


def test_ssim_follows_scikit_image_for_another_data_range():
    image, reference = noisy(real_slices()), real_slices()
    wanted = peer_ssim(image[3], reference[3], data_range=2.0)[0]
    assert ssim(image, reference, data_range=2.0)[3].item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("metric", IDEAL)
def test_identical_slices_reach_the_ideal_exactly(metric):
    images = real_slices()
    for given in (None, images > 0.02):
        assert (metric(images, images, given) == IDEAL[metric]).all()
    assert (ssim_map(images, images) == 1).all()


@pytest.mark.parametrize("metric", METRICS)
def test_image_and_reference_may_change_places(metric):
    image, reference = noisy(real_slices()), real_slices()
    for given in (None, reference > 0.02):
        torch.testing.assert_close(metric(image, reference, given),
                                   metric(reference, image, given))


@pytest.mark.parametrize("metric", UNSEEING)
def test_with_a_mask_what_lies_outside_changes_nothing(metric):
    image, reference = noisy(big_real_slices()), big_real_slices()
    mask = reference > 0.1
    elsewhere = torch.where(mask, image, random_slices(*image.shape, seed=3))
    found = metric(image, reference, mask)
    assert torch.equal(metric(elsewhere, reference, mask), found)
    assert not torch.allclose(metric(elsewhere, reference), found)


def test_rows_are_measured_one_by_one():
    image, reference = noisy(real_slices()), real_slices()
    mask = reference > 0.1
    rows = [r for r in range(len(image)) if mask[r].any()]
    for metric in METRICS:
        together = metric(image[rows], reference[rows], mask[rows])
        for place, row in enumerate(rows):
            one = slice(row, row + 1)
            torch.testing.assert_close(
                metric(image[one], reference[one], mask[one]), together[place:place + 1])


def test_images_of_any_precision_are_measured_in_the_highest():
    image, reference = noisy(real_slices()), real_slices()
    for metric in METRICS:
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            x, y = image.to(dtype), reference.to(dtype)
            for given in (None, reference >= 0):
                found = metric(x, y, given)
                assert found.dtype == torch.float32
                torch.testing.assert_close(found, metric(x.double(), y.double(), given))


def test_autocast_does_not_change_a_measure():
    image, reference = noisy(real_slices()), real_slices()
    wanted = measure(image, reference, reference >= 0)
    alone = [metric(image, reference, reference >= 0) for metric in METRICS]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = measure(image, reference, reference >= 0)
        for metric, value in zip(METRICS, alone):
            assert torch.equal(metric(image, reference, reference >= 0), value)
    for protocol, values in wanted.items():
        for name, value in values.items():
            assert torch.equal(found[protocol][name], value)


def test_a_nan_shows_in_its_own_row_even_outside_the_mask():
    image, reference = noisy(real_slices()[2:5]), real_slices()[2:5]
    image[1, 0, 0, 0] = math.nan
    mask = torch.zeros_like(image).bool()
    mask[..., 20:, 20:] = True
    for metric in METRICS:
        for given in (None, mask):
            assert metric(image, reference, given).isnan().tolist() == [False, True, False]


def test_the_box_is_cut_at_the_masks_first_and_last_pixels():
    images = random_slices(2, 2, 30, 40)
    mask = torch.zeros(2, 1, 30, 40).bool()
    mask[0, 0, 3, 10] = mask[0, 0, 18, 4] = mask[0, 0, 9, 19] = True  # rows 3-18, columns 4-19
    mask[1, 0, 14:, 24:] = True                                       # up to the last pixel
    boxes = crop_to_box(images, mask, size=16)  # both boxes are 16 x 16: nothing to resize
    torch.testing.assert_close(boxes[0], images[0, :, 3:19, 4:20])
    torch.testing.assert_close(boxes[1], images[1, :, 14:, 24:])


def test_a_box_is_resized_as_pillow_does_it_by_default_to_128_pixels():
    images = big_real_slices()
    mask = torch.zeros_like(images).bool()
    mask[:, :, 8:88, 10:70] = True
    up, down = crop_to_box(images, mask), crop_to_box(images, mask, size=32)
    assert up.shape == (3, 1, 128, 128)
    for row, image in enumerate(images):
        box = Image.fromarray(image[0, 8:88, 10:70].numpy())
        for found in (up, down):
            wanted = box.resize(found.shape[2:], Image.Resampling.BILINEAR)
            np.testing.assert_allclose(found[row, 0], np.asarray(wanted), atol=1e-5)


def test_each_protocol_measures_what_it_says():
    image, reference = noisy(real_slices()[1:6]), real_slices()[1:6]
    mask = torch.zeros_like(reference).bool()
    for row in range(5):
        mask[row, :, 4 + row:30, 6:37 - row] = True
    mask &= torch.from_numpy(ndimage.binary_fill_holes(reference[2, 0] > 0.15))
    found = measure(image, reference, mask)
    boxes = [crop_to_box(images, mask) for images in (image, reference)]
    for name, metric in (("ssim", ssim), ("psnr_db", psnr_db), ("mae", mae)):
        assert torch.equal(found["brain"][name], metric(image, reference, mask))
        assert torch.equal(found["slice"][name], metric(image, reference))
        assert torch.equal(found["box"][name], metric(*boxes))
    assert {tuple(values) for values in found.values()} == {("ssim", "psnr_db", "mae")}
    assert all(v.shape == (5,) for values in found.values() for v in values.values())


def test_only_the_brain_protocol_ignores_the_background():
    reference = real_slices()[2:5]
    mask = torch.zeros_like(reference).bool()
    mask[:, :, 14:22, 16:28] = True
    image = torch.where(mask, reference, 1 - reference)
    found = measure(image, reference, mask)
    assert (found["brain"]["psnr_db"] == math.inf).all() and (found["brain"]["mae"] == 0).all()
    assert (found["box"]["mae"] == 0).all()
    assert (found["slice"]["mae"] > 0.1).all()


def test_an_empty_mask_is_refused_with_its_rows():
    images = random_slices(4, 1, 16, 16)
    mask = torch.ones_like(images).bool()
    mask[1] = mask[3] = False
    for metric in (*METRICS, measure):
        with pytest.raises(ValueError, match="empty in rows 1, 3 of 4"):
            metric(images, images, mask)
    with pytest.raises(ValueError, match="empty in rows 1, 3 of 4"):
        crop_to_box(images, mask)
    with pytest.raises(ValueError, match="empty in row 1 of 2"):
        mae(images[:2], images[:2], mask[:2])


def test_arguments_that_do_not_fit_are_refused_with_both_values():
    images = random_slices(2, 1, 16, 16)
    for metric in (*METRICS, ssim_map):
        with pytest.raises(ValueError, match=r"\(2, 1, 16, 16\).*\(1, 1, 16, 16\)"):
            metric(images, images[:1])
        with pytest.raises(ValueError, match="float32.*float64"):
            metric(images, images.double())
        with pytest.raises(ValueError, match="int32"):
            metric(images.int(), images.int())
        with pytest.raises(ValueError, match=r"\(2, 16, 16\)"):
            metric(images[:, 0], images[:, 0])
    for metric in (*IDEAL, ssim_map):
        with pytest.raises(ValueError, match="data_range is 0"):
            metric(images, images, data_range=0)
    for metric in (*METRICS, measure):
        with pytest.raises(ValueError, match=r"\(2, 1, 16, 16\) torch.uint8.*torch.bool"):
            metric(images, images, torch.ones_like(images).byte())
        with pytest.raises(ValueError, match=r"\(1, 1, 16, 16\).*\(2, 1, 16, 16\)"):
            metric(images, images, torch.ones(1, 1, 16, 16).bool())
    for metric in (ssim, multiscale_ssim):
        with pytest.raises(ValueError, match="10 x 16.*11 x 11"):
            metric(images[:, :, :10], images[:, :, :10])


def test_no_slices_give_no_numbers():
    images = torch.zeros(0, 1, 16, 16)
    found = measure(images, images, images.bool())
    assert all(v.shape == (0,) for values in found.values() for v in values.values())
    for metric in METRICS:
        assert metric(images, images).shape == metric(images, images, images.bool()).shape == (0,)


@pytest.mark.parametrize("case", CASES)
def test_correlation_is_scipys_pearson(case):
    image, reference = pairs()[case]
    mask = random_slices(*image.shape, seed=2) > 0.6
    for given in (None, mask):
        found = correlation(image, reference, given)
        for row in range(len(image)):
            inside = mask[row].numpy() if given is not None else ...
            x, y = (v[row].double().numpy()[inside].ravel() for v in (image, reference))
            wanted = 0 if np.ptp(x) == 0 or np.ptp(y) == 0 else pearsonr(x, y).statistic
            assert found[row].item() == pytest.approx(wanted, abs=1e-6)


def test_correlation_is_blind_to_brightness_and_contrast_and_zero_for_a_constant():
    image, reference = noisy(real_slices()), real_slices()
    torch.testing.assert_close(correlation(0.2 + 0.5 * image, reference),
                               correlation(image, reference))
    torch.testing.assert_close(correlation(1 - image, reference), -correlation(image, reference))
    for constant in (0.0, 0.3, 1.0):
        assert (correlation(image, torch.full_like(image, constant)) == 0).all()


@pytest.mark.parametrize("case", CASES)
def test_intensity_distance_is_scipys_wasserstein_distance(case):
    image, reference = pairs()[case]
    mask = random_slices(*image.shape, seed=2) > torch.linspace(0.2, 0.9, len(image))[:, None,
                                                                                      None, None]
    for given in (None, mask):
        found = intensity_distance(image, reference, given)
        for row in range(len(image)):
            inside = mask[row].numpy() if given is not None else ...
            x, y = (v[row].double().numpy()[inside].ravel() for v in (image, reference))
            assert found[row].item() == pytest.approx(wasserstein_distance(x, y), abs=1e-6)


def test_intensity_distance_asks_how_bright_and_not_where():
    images = real_slices()
    places = torch.randperm(36 * 44, generator=torch.Generator().manual_seed(0))
    moved = images.flatten(2)[..., places].reshape(images.shape)
    assert (intensity_distance(moved, images) == 0).all()
    torch.testing.assert_close(intensity_distance(images + 0.25, images),
                               torch.full((len(images),), 0.25))
    whole = intensity_distance(noisy(images).reshape(1, 1, -1, 44), images.reshape(1, 1, -1, 44))
    wanted = wasserstein_distance(noisy(images).flatten().numpy(), images.flatten().numpy())
    assert whole.item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_gradient_similarity_follows_scikit_images_prewitt(case):
    image, reference = pairs()[case]
    mask = random_slices(*image.shape, seed=2) > 0.6
    for given in (None, mask):
        found = gradient_similarity(image, reference, given)
        for row in range(len(image)):
            inside = mask[row, 0].numpy() if given is not None else np.ones(image.shape[2:], bool)
            # scikit-image has the mean of the two axes' squares where the paper has their sum
            x, y = (2 ** 0.5 * prewitt(v[row, 0].double().numpy() * inside, mode="nearest")
                    for v in (image, reference))
            similarity = (2 * x * y + 170 / 255 ** 2) / (x ** 2 + y ** 2 + 170 / 255 ** 2)
            assert found[row].item() == pytest.approx(similarity[inside].mean(), abs=1e-6)


def test_gradient_similarity_of_a_ramp_by_hand():
    ramp = torch.arange(12.0).expand(1, 1, 12, 12) / 100
    found = gradient_similarity(ramp, torch.zeros_like(ramp))[0].item()
    # a step of 0.01 a pixel, so 0.02 across the kernel; half of that at the two outer columns
    columns = 10 * [0.02] + 2 * [0.01]
    wanted = np.mean([GRADIENT_CONSTANT / (g ** 2 + GRADIENT_CONSTANT) for g in columns])
    assert found == pytest.approx(wanted, rel=1e-5)
    assert (gradient_similarity(1 - ramp, ramp) > 1 - 1e-6).all()  # sign does not count


def peer_multiscale_ssim(x: np.ndarray, y: np.ndarray, mask: np.ndarray | None) -> float:
    """Return multi-scale SSIM of (H, W) float64 images, made of scikit-image's SSIM."""
    n_scales = scale_count(*x.shape)
    share = None if mask is None else mask.astype(float)
    x, y = (x, y) if mask is None else (x * mask, y * mask)
    product, total = 1.0, sum(SCALE_WEIGHTS[:n_scales])
    for scale, weight in enumerate(SCALE_WEIGHTS[:n_scales], start=1):
        # so large a K1 makes the luminance 1 everywhere: what is left is contrast and structure
        mean, full = structural_similarity(
            x, y, data_range=1, full=True, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, K1=0.01 if scale == n_scales else 1e6)
        value = mean if share is None else (full * share).sum() / share.sum()
        product *= max(value, 0) ** (weight / total)
        odd = [(0, side % 2) for side in x.shape]
        x, y = (downscale_local_mean(np.pad(v, odd, mode="edge"), (2, 2)) for v in (x, y))
        if share is not None:
            share = downscale_local_mean(np.pad(share, odd, mode="edge"), (2, 2))
    return product


@pytest.mark.parametrize("height, width", [(36, 44), (45, 57), (87, 96), (128, 128), (176, 201)])
def test_multiscale_ssim_follows_scikit_image_scale_by_scale(height, width):
    reference = torch.nn.functional.interpolate(
        big_real_slices(), (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    for image in (noisy(reference), reference.roll(2, 3), 1 - reference):
        for mask in (None, reference > 0.2):
            found = multiscale_ssim(image, reference, mask)
            for row in range(len(image)):
                x, y = (v[row, 0].double().numpy() for v in (image, reference))
                given = None if mask is None else mask[row, 0].numpy()
                assert found[row].item() == pytest.approx(
                    peer_multiscale_ssim(x, y, given), abs=1e-5)


def test_a_slice_of_128_pixels_has_four_scales_and_one_of_176_all_five():
    assert [scale_count(side, 500) for side in (11, 22, 44, 87, 88, 128, 175, 176, 256)] == [
        1, 2, 3, 3, 4, 4, 4, 5, 5]
    assert scale_count(500, 128) == 4
    images = random_slices(2, 1, 16, 16)
    torch.testing.assert_close(multiscale_ssim(images, images.flip(3)).clamp(min=1e-9),
                               ssim(images, images.flip(3)).clamp(min=1e-9))


def test_an_inverted_contrast_has_no_multiscale_ssim():
    reference = big_real_slices()
    assert (multiscale_ssim(1 - reference, reference) == 0).all()
    assert (ssim(1 - reference, reference) < 0.2).all()


# ------------------------------------------------------------------------------- checkerboards


def head_slices(size: int = 128, n: int = 8) -> Tensor:
    """Return noisy slices with edges in many directions, (n, 1, size, size) in [0, 1]."""
    draws = np.random.default_rng(0)
    y, x = (np.indices((size, size)) - (size - 1) / 2) / (size / 2)
    radius = np.hypot(x / 0.75, y / 0.9)
    tissue = [0.5 + 0.25 * np.cos(9 * radius + k) + 0.1 * np.sin(17 * x * y + 3 * k)
              for k in range(n)]
    images = (np.stack(tissue) + draws.normal(0, 0.01, (n, size, size))) * (radius < 1)
    return torch.from_numpy(images).float()[:, None].clamp(0, 1)


PATTERNS = {
    "rows of 2": lambda y, x: (-1.0) ** y,
    "columns of 2": lambda y, x: (-1.0) ** x,
    "squares of 2": lambda y, x: (-1.0) ** (x + y),
    "columns of 4": lambda y, x: np.cos(np.pi / 2 * x),
    "squares of 4": lambda y, x: np.cos(np.pi / 2 * x) * np.cos(np.pi / 2 * y) * 2,
    "4 along, 2 across": lambda y, x: np.cos(np.pi / 2 * x) * (-1.0) ** y,
}


def pattern(name: str, size: int = 128) -> Tensor:
    return torch.from_numpy(PATTERNS[name](*np.indices((size, size)))).float()


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_of_upsampling_show_where_the_eye_hardly_sees_them(name):
    real = head_slices()
    mask = real > 0
    for strength, least in ((0.01, 1.15), (0.02, 1.5)):
        found = checkerboard(real + strength * pattern(name), real, mask)
        assert found.shape == (8,) and found.dtype == torch.float32
        assert float(found.min()) > least, strength
    outside = torch.where(mask, real, real + 0.1 * pattern(name))
    assert torch.equal(checkerboard(outside, real, mask), torch.ones(8))


def test_what_is_no_pattern_of_upsampling_leaves_the_figure_at_one():
    real, other = head_slices(), noisy(head_slices().flip(0), 0.02)
    mask = real > 0
    y, x = torch.meshgrid(torch.arange(128.), torch.arange(128.), indexing="ij")
    gain = 1 + 0.3 * torch.sin(x / 20) * torch.cos(y / 25)
    same = {"itself": real, "darker": 0.3 * real, "with a smooth gain": real * gain}
    for name, image in same.items():
        found = checkerboard(image, real, mask)
        assert (found - 1).abs().max() < 0.1 and abs(float(found.mean()) - 1) < 0.02, name
    torch.testing.assert_close(checkerboard(0.3 * real, real, mask), torch.ones(8))
    stripes = real + 0.02 * torch.sin(2 * torch.pi * x / 3)  # 3 pixels are not of upsampling
    blurred = torch.from_numpy(ndimage.gaussian_filter(real.numpy(), (0, 0, 1, 1)))
    for name, image in {"noise": noisy(real, 0.02), "another slice": other, "stripes": stripes,
                        "blurred": blurred}.items():
        assert abs(float(checkerboard(image, real, mask).mean()) - 1) < 0.1, name


def test_a_blur_takes_a_pattern_away_and_the_figure_falls_with_it():
    real = head_slices()
    marked = (real + 0.02 * pattern("columns of 2")).numpy()
    found = [float(checkerboard(torch.from_numpy(ndimage.gaussian_filter(marked, (0, 0, s, s))),
                                real, real > 0).mean()) for s in (0, 0.5, 1)]
    assert found[0] > 1.5 and found[0] > found[1] > found[2] and found[2] < 1.15


def test_the_checkerboard_is_that_of_the_whole_spectrum_taken_bin_by_bin():
    """On sides that are not alike, nor multiples of 4."""
    def peaks(image):
        power, ratios = np.abs(np.fft.fft2(image)) ** 2, []
        for u, v in ((a, b) for a in range(4) for b in range(4) if a or b):
            rolled = np.roll(power, (20 - round(30 * u / 4), 20 - round(45 * v / 4)), (0, 1))
            box = rolled[15:26, 15:26]
            inner = np.zeros((11, 11), bool)
            inner[3:8, 3:8] = True
            ratios.append(box[4:7, 4:7].mean() / box[~inner].mean())
        return np.mean(ratios)

    image, real = random_slices(3, 1, 30, 45), random_slices(3, 1, 30, 45, seed=1)
    mask = random_slices(3, 1, 30, 45, seed=2) > 0.3
    x, y = ((v.double() * mask).numpy()[:, 0] for v in (image, real))
    wanted = [(peaks(a) / peaks(b)) ** 0.5 for a, b in zip(x, y)]
    assert checkerboard(image, real, mask).tolist() == pytest.approx(wanted, rel=1e-5)


def test_slices_with_nothing_in_them_have_no_checkerboard():
    empty = torch.zeros(2, 1, 32, 32)
    assert checkerboard(empty, empty).tolist() == [1, 1]
    nan = empty.clone()
    nan[0, 0, 0, 0] = math.nan
    assert checkerboard(nan, empty).isnan().tolist() == [True, False]
    with pytest.raises(ValueError, match="27 x 32; .* at least 28"):
        checkerboard(empty[:, :, :27], empty[:, :, :27])
    with pytest.raises(ValueError, match="empty in rows 0, 1"):
        checkerboard(empty, empty, empty.bool())
