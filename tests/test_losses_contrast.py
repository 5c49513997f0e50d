"""Tests of losses/contrast.py, on tissue maps of the ICBM 152 template and by hand."""
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from data.anatomy import load_tissue_maps
from data.sequences import TISSUES as SIMULATED_TISSUES
from losses.contrast import TISSUES, contrast_order

LEVELS = {"T1w": (0.5, 0.8, 0.1), "T2w": (0.5, 0.3, 0.9)}  # GM, WM, CSF


@pytest.fixture(scope="module")
def shares() -> Tensor:
    """(6, 3, H, W) shares of grey matter, white matter and fluid in axial template slices."""
    pytest.importorskip("nilearn")
    maps = load_tissue_maps()
    grey, white, brain = (torch.from_numpy(np.moveaxis(v[:, :, 60:120:10], 2, 0))
                          for v in (maps.grey, maps.white, maps.brain))
    fluid = (1 - grey - white).clamp(min=0)
    return torch.stack([grey, white, fluid], dim=1) * (brain[:, None] > 0.5)


def image_of(shares: Tensor, contrast: str) -> Tensor:
    levels = torch.tensor(LEVELS[contrast])[:, None, None]
    noise = torch.randn(len(shares), 1, *shares.shape[2:],
                        generator=torch.Generator().manual_seed(0))
    return (shares * levels).sum(dim=1, keepdim=True) + 0.02 * noise


def test_the_channels_are_those_of_simulated_subjects():
    assert TISSUES == SIMULATED_TISSUES


def test_a_contrast_is_in_its_own_order_and_not_in_the_others(shares):
    for contrast, other in (("T1w", "T2w"), ("T2w", "T1w")):
        image = image_of(shares, contrast)
        assert (contrast_order(image, shares, contrast).is_right == 1).all()
        assert (contrast_order(image, shares, other).is_right == 0).all()
        assert (contrast_order(1 - image, shares, other).is_right == 1).all()


def test_means_are_numpys_weighted_averages_and_near_the_tissues_own_in_pure_voxels(shares):
    image = image_of(shares, "T2w")
    found, pure = (contrast_order(image, maps, "T2w").means for maps in (shares, shares > 0.95))
    for row in range(len(image)):
        for channel in range(3):
            wanted = np.average(image[row, 0].double().numpy(),
                                weights=shares[row, channel].double().numpy())
            assert found[row, channel].item() == pytest.approx(wanted, abs=1e-6)
    assert found.shape == (6, 3) and found.dtype == torch.float32
    np.testing.assert_allclose(pure.nanmean(dim=0), LEVELS["T2w"], atol=0.02)


def test_a_volume_is_measured_as_a_whole(shares):
    image = image_of(shares, "T1w")
    means, is_right = contrast_order(image.transpose(0, 1)[None], shares.transpose(0, 1)[None],
                                     "T1w")
    wanted = (image * shares).sum(dim=(0, 2, 3)) / shares.sum(dim=(0, 2, 3))
    torch.testing.assert_close(means[0], wanted, rtol=1e-4, atol=0)
    assert is_right.tolist() == [1]


def test_what_lies_outside_all_tissues_changes_nothing(shares):
    image = image_of(shares, "T1w")
    elsewhere = torch.where(shares.sum(dim=1, keepdim=True) > 0, image, 7)
    assert torch.equal(contrast_order(elsewhere, shares, "T1w").means,
                       contrast_order(image, shares, "T1w").means)


def test_each_row_stands_alone(shares):
    image = image_of(shares, "T1w")
    image[2] = 1 - image[2]
    together = contrast_order(image, shares, "T1w")
    assert together.is_right.tolist() == [1, 1, 0, 1, 1, 1]
    for row in range(len(image)):
        alone = contrast_order(image[row:row + 1], shares[row:row + 1], "T1w")
        torch.testing.assert_close(alone.means[0], together.means[row])


def test_two_equal_tissues_are_not_in_order():
    tissues = torch.eye(3).bool()[None, :, None]  # one pixel of each
    image = torch.tensor([0.5, 0.5, 0.1])[None, None, None]
    means, is_right = contrast_order(image, tissues, "T1w")
    assert means[0].tolist() == pytest.approx([0.5, 0.5, 0.1]) and is_right.tolist() == [0]


def test_a_tissue_that_is_not_there_or_a_nan_leaves_the_order_open(shares):
    image, tissues = image_of(shares, "T2w"), shares.clone()
    tissues[1, 2] = 0
    image[3, 0, 0, 0] = math.nan  # outside the brain, too
    means, is_right = contrast_order(image, tissues, "T2w")
    assert means[1].isnan().tolist() == [False, False, True] and means[3].isnan().all()
    assert is_right.isnan().tolist() == [False, True, False, True, False, False]


def test_images_of_any_precision_are_averaged_in_the_highest(shares):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        image = image_of(shares, "T1w").to(dtype)
        means, is_right = contrast_order(image, shares, "T1w")
        assert means.dtype == is_right.dtype == torch.float32
        torch.testing.assert_close(means, contrast_order(image.double(), shares, "T1w").means)


def test_arguments_that_do_not_fit_are_refused():
    image, tissues = torch.zeros(2, 1, 4, 5), torch.zeros(2, 3, 4, 5)
    with pytest.raises(ValueError, match="'t1w'.*T1w, T2w"):
        contrast_order(image, tissues, "t1w")
    with pytest.raises(ValueError, match=r"\(2, 2, 4, 5\).*\(2, 3, 4, 5\).*GM, WM, CSF"):
        contrast_order(image, tissues[:, :2], "T1w")
    with pytest.raises(ValueError, match=r"\(2, 4, 5\)"):
        contrast_order(image[:, 0], tissues, "T1w")
    with pytest.raises(ValueError, match="int64"):
        contrast_order(image.long(), tissues, "T1w")
