"""Tests of losses/start.py."""

import numpy as np
import pytest
import torch

from losses.start import start_loss, turned

QUANTILES = torch.tensor([-0.5, 0.0, 0.8])


def slices_of(*values):
    return torch.tensor(values).view(1, 1, 1, -1)


def test_the_darkest_becomes_the_brightest_and_the_middle_stays_in_the_middle():
    other = torch.tensor([-0.9, -0.2, 0.6])
    found = turned(slices_of(-0.5, -0.25, 0.0, 0.4, 0.8), QUANTILES, other).flatten()
    torch.testing.assert_close(found, torch.tensor([0.6, 0.2, -0.2, -0.55, -0.9]))


def test_beyond_the_quantiles_it_is_constant_and_background_stays_background():
    found = turned(slices_of(-1.0, -0.99, 1.0), QUANTILES, QUANTILES).flatten()
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.8, -0.5]))


def test_the_result_has_the_others_histogram():
    draws = np.random.default_rng(0)
    x, y = draws.beta(2, 5, 20_000) * 2 - 1, draws.beta(4, 2, 20_000) * 2 - 1
    shares = np.linspace(0, 1, 257)
    qx, qy = (torch.tensor(np.quantile(v, shares), dtype=torch.float32) for v in (x, y))
    found = turned(torch.tensor(x, dtype=torch.float32).view(1, 1, 100, 200), qx, qy)
    found = found.flatten().numpy()
    np.testing.assert_allclose(np.quantile(found, shares[5:-5]), np.quantile(y, shares[5:-5]),
                               atol=0.01)
    assert np.corrcoef(np.argsort(np.argsort(x)), np.argsort(np.argsort(found)))[0, 1] < -0.999


def test_turned_twice_it_is_the_slice_again():
    other = torch.tensor([-0.9, -0.2, 0.6])
    given = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.3 - 0.5
    torch.testing.assert_close(turned(turned(given, QUANTILES, other), other, QUANTILES), given)


def test_quantiles_that_repeat_make_no_nan():
    flat = torch.tensor([-0.5, -0.5, -0.5, 0.3])  # half of the brain of one value
    assert turned(slices_of(-0.5, 0.0, 0.3), flat, flat).isfinite().all()
    assert turned(slices_of(-0.5, 0.0, 0.3).half(), flat, flat).dtype == torch.float32


def test_a_nan_stays_one_and_touches_nothing_else():
    found = turned(slices_of(float("nan"), -0.5), QUANTILES, QUANTILES).flatten()
    assert found.isnan().tolist() == [True, False]
    nowhere = torch.full((3,), float("nan"))
    assert turned(slices_of(-0.5, 0.3), nowhere, nowhere).isnan().all()


def test_the_loss_is_the_mean_absolute_difference_and_refuses_other_shapes():
    assert start_loss(slices_of(0.0, 1.0), slices_of(0.5, 0.5)).item() == 0.5
    with pytest.raises(ValueError, match="shapes differ"):
        start_loss(slices_of(0.0, 1.0), slices_of(0.0))
