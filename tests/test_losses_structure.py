"""Tests of losses/structure.py."""
import math

import numpy as np
import pytest
import torch

from losses.structure import LEAST_VARIANCE, structure_loss


def heads(n=2, size=24, seed=0):
    """Slices (n, 1, size, size) of random texture in a disc, background -1."""
    draws = np.random.default_rng(seed)
    y, x = np.indices((size, size)) - (size - 1) / 2
    brain = np.hypot(x, y) < size * 0.4
    texture = draws.uniform(-0.9, 0.9, (n, 1, size, size))
    return torch.from_numpy(np.where(brain, texture, -1)).float()


def by_hand(real, fake, window=7):
    """The same by a loop over pixels, in float64."""
    slices = []
    for a, b in zip(real.double().numpy()[:, 0], fake.double().numpy()[:, 0]):
        found = []
        for i, j in np.argwhere(a > -1):
            r = window // 2
            part = np.s_[max(i - r, 0):i + r + 1, max(j - r, 0):j + r + 1]
            inside = a[part] > -1
            u, v = a[part][inside], b[part][inside]
            covariance = ((u - u.mean()) * (v - v.mean())).mean()
            found.append(1 - covariance ** 2 / ((u.var() + LEAST_VARIANCE)
                                                * (v.var() + LEAST_VARIANCE)))
        slices.append(np.mean(found))
    return np.mean(slices)


@pytest.mark.parametrize("window", [3, 7])
def test_it_is_one_minus_the_squared_correlation_of_windows_in_the_brain(window):
    real, fake = heads(), heads(seed=1)
    assert structure_loss(real, fake, window).item() == pytest.approx(
        by_hand(real, fake, window), rel=1e-4)
    assert structure_loss(real, fake, window) > 0.5, "nothing in common"


def test_each_slice_of_a_batch_counts_alike_however_large_its_brain():
    real, fake = heads(3), heads(3, seed=1)
    real[0, 0, :12] = -1
    alone = [structure_loss(real[i:i + 1], fake[i:i + 1]).item() for i in range(3)]
    assert structure_loss(real, fake).item() == pytest.approx(np.mean(alone), rel=1e-5)


def test_contrast_may_turn_round_and_change_but_edges_may_not_move():
    real = heads()
    for slope in (-1.0, 0.4, -0.2):  # c is little beside the texture's variance of 0.27
        assert structure_loss(real, real * slope + 0.1) < 0.1
    assert structure_loss(real, real.roll(1, 3)) > 0.6
    assert structure_loss(real, torch.zeros_like(real)) == pytest.approx(1)  # all edges are gone


def test_what_lies_outside_the_brain_does_not_count():
    real, fake = heads(), heads(seed=1)
    other = torch.where(real > -1, fake, 0.7)
    assert structure_loss(real, other) == structure_loss(real, fake)
    assert structure_loss(torch.full((1, 1, 8, 8), -1.0), fake[:1, :, :8, :8]) == 0


def test_the_gradient_is_that_of_differences_and_leads_towards_the_input():
    real, fake = heads(1, 12).double(), heads(1, 12, seed=1).double().requires_grad_()
    fake.data[real == -1] = 0
    structure_loss(real, fake).backward()
    assert float(fake.grad[real == -1].abs().max()) == 0
    i, j = 6, 5
    step = torch.zeros_like(real)
    step[0, 0, i, j] = 1e-2  # the loss is computed in float32
    with torch.no_grad():
        slope = (structure_loss(real, fake + step) - structure_loss(real, fake - step)) / 2e-2
        better = structure_loss(real, fake - 5 * fake.grad)
    assert fake.grad[0, 0, i, j].item() == pytest.approx(slope.item(), rel=0.02)
    assert better < structure_loss(real, fake)


def test_a_flat_translation_has_a_finite_gradient():
    real = heads()
    fake = torch.zeros_like(real).requires_grad_()
    structure_loss(real, fake).backward()
    assert fake.grad.isfinite().all()


def test_half_precision_slices_are_compared_in_float32():
    real, fake = heads().bfloat16(), heads(seed=1).bfloat16()
    assert structure_loss(real, fake).dtype == torch.float32
    assert structure_loss(real, fake) == structure_loss(real.float(), fake.float())


def test_other_shapes_and_even_windows_are_refused_and_a_nan_shows():
    with pytest.raises(ValueError, match=r"\(2, 1, 24, 24\) and \(1, 1, 24, 24\)"):
        structure_loss(heads(), heads(1))
    with pytest.raises(ValueError, match="window is 4; must be odd"):
        structure_loss(heads(), heads(), 4)
    fake = heads()
    fake[0, 0, 12, 12] = math.nan
    assert structure_loss(heads(), fake).isnan()
