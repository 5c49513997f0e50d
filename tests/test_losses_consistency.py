"""Tests of losses/consistency.py."""
import math

import pytest
import torch

from losses.consistency import cycle_loss, identity_loss

LOSSES = [cycle_loss, identity_loss]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_the_mean_absolute_difference(loss):
    real = torch.tensor([[-1.0, 0.5], [1.0, 0.0]]).view(1, 1, 2, 2)
    other = torch.tensor([[-0.5, 0.5], [-1.0, 0.1]]).view(1, 1, 2, 2)
    assert loss(real, other).item() == pytest.approx((0.5 + 0 + 2 + 0.1) / 4)
    assert loss(real, real) == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_the_sign_of_the_difference_over_the_number_of_pixels(loss):
    real = torch.tensor([0.0, 1.0, -1.0, 0.5]).view(1, 1, 2, 2)
    other = torch.tensor([0.2, 0.3, -0.8, -0.5]).view(1, 1, 2, 2).requires_grad_()
    loss(real, other).backward()
    assert other.grad.flatten().tolist() == [0.25, -0.25, 0.25, -0.25]


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_slices_are_compared_in_float32(loss):
    real = torch.rand(2, 1, 33, 31, generator=torch.Generator().manual_seed(0)).bfloat16()
    other = real.flip(3)
    assert loss(real, other).dtype == torch.float32
    assert loss(real, other) == loss(real.float(), other.float())


@pytest.mark.parametrize("loss", LOSSES)
def test_shapes_that_would_broadcast_are_refused_with_both(loss):
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\) and \(1, 1, 4, 4\)"):
        loss(torch.zeros(2, 1, 4, 4), torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_nan_pixel_shows_in_the_loss(loss):
    assert loss(torch.zeros(1, 1, 1, 2), torch.tensor([0.0, math.nan]).view(1, 1, 1, 2)).isnan()
