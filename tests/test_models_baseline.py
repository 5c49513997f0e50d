"""Tests of models/baseline.py against numpy and scipy."""

import math

import numpy as np
import pytest
import torch
from painted_store import paint_head
from scipy.stats import binned_statistic

from models.baseline import LookUpTable


@pytest.fixture(scope="module")
def pair():
    """T1w, T2w (float32 in [-1, 1]) and mask of a painted head, (8, 1, 48, 48) each."""
    t1w, t2w, mask = (torch.from_numpy(v)[:, None] for v in paint_head(7, 8, 48))
    return t1w.float(), t2w.float(), mask


@pytest.mark.parametrize("bins", [2, 16, 256])
def test_a_table_holds_scipys_binned_means_and_numpys_lines_between_them(pair, bins):
    source, target, mask = pair
    lut = LookUpTable(bins)
    lut.update(*pair)
    x, y = source[mask].double().numpy(), target[mask].double().numpy()
    means = binned_statistic(x, y, "mean", bins, (-1, 1)).statistic
    filled = np.flatnonzero(~np.isnan(means))
    wanted = np.interp(np.arange(bins), filled, means[filled])
    np.testing.assert_allclose(lut.table(), wanted, atol=1e-9)
    middles = -1 + (2 * np.arange(bins) + 1) / bins
    found = lut(source)
    assert found.dtype == torch.float32 and found.shape == source.shape
    np.testing.assert_allclose(
        found[mask], np.interp(source[mask].double().numpy(), middles, wanted), atol=1e-6)


def test_batches_add_up_to_the_whole(pair):
    whole, parts = LookUpTable(), LookUpTable()
    whole.update(*pair)
    for row in range(8):
        parts.update(*(v[row:row + 1] for v in pair))
    torch.testing.assert_close(parts.table(), whole.table())


def test_a_mapping_of_single_intensities_is_found(pair):
    source, _, mask = pair
    lut = LookUpTable()
    lut.update(source, 0.3 - 0.8 * source, mask)
    torch.testing.assert_close(lut(source)[mask], 0.3 - 0.8 * source[mask], atol=0.01, rtol=0)


def test_no_other_table_has_a_smaller_squared_error_in_its_bins(pair):
    source, target, mask = pair
    lut = LookUpTable(32)
    lut.update(*pair)
    x, y = source[mask].double(), target[mask].double()
    place = ((x + 1) / 2 * 32).long().clamp(0, 31)
    best = (lut.table()[place] - y).square().mean()
    draws = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = lut.table() + 0.05 * torch.randn(32, generator=draws)
        assert (other[place] - y).square().mean() > best


def test_a_table_beats_the_copied_input_on_a_head_that_it_never_saw(pair):
    lut = LookUpTable()
    lut.update(*pair)
    t1w, t2w, mask = (torch.from_numpy(v)[:, None] for v in paint_head(11, 8, 48))
    error, floor = ((v.float() - t2w.float())[mask].square().mean() for v in (lut(t1w), t1w))
    assert error < floor / 2


def test_what_lies_outside_the_brain_has_no_say_and_background_stays(pair):
    source, target, mask = pair
    one, other = LookUpTable(), LookUpTable()
    one.update(*pair)
    other.update(torch.where(mask, source, 0.2), torch.where(mask, target, math.nan), mask)
    assert torch.equal(one.table(), other.table())
    assert (one(source)[source == -1] == -1).all()
    assert (one(torch.full((1, 1, 2, 2), -0.999)) > -1).all()


def test_empty_bins_lie_between_their_neighbours_and_the_ends_go_on():
    lut = LookUpTable(8)  # middles -0.875, -0.625, ...
    source = torch.tensor([[[[-0.6, -0.6, 0.4, 0.4]]]])
    lut.update(source, torch.tensor([[[[0.1, 0.3, 0.8, 0.8]]]]), source > -1)
    assert lut.table().tolist() == pytest.approx([0.2, 0.2, 0.35, 0.5, 0.65, 0.8, 0.8, 0.8])
    assert lut(torch.tensor([[[[-0.99, -0.5, 0.99, 2.0]]]])).flatten().tolist() == pytest.approx(
        [0.2, 0.275, 0.8, 0.8])


def test_one_filled_bin_is_everywhere():
    lut = LookUpTable()
    lut.update(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.4), torch.ones(1, 1, 2, 2) > 0)
    assert lut(torch.tensor([[[[-0.9, 0.0, 1.0]]]])).flatten().tolist() == pytest.approx(3 * [0.4])


def test_slices_of_any_precision_and_a_nan_among_them(pair):
    source, target, mask = pair  # made of float16, so exact in all three
    wanted = LookUpTable()
    wanted.update(*pair)
    for dtype in (torch.float16, torch.float64):
        lut = LookUpTable()
        lut.update(source.to(dtype), target.to(dtype), mask)
        assert torch.equal(lut.table(), wanted.table())
        assert torch.equal(lut(source.to(dtype)), wanted(source))
    assert wanted(torch.tensor([[[[math.nan, 0.0]]]])).isnan().flatten().tolist() == [True, False]


def test_what_cannot_be_fitted_is_refused(pair):
    source, target, mask = pair
    with pytest.raises(ValueError, match="bins is 1"):
        LookUpTable(1)
    with pytest.raises(ValueError, match="no pixel"):
        LookUpTable().table()
    with pytest.raises(ValueError, match=r"\(8, 1, 48, 48\), target \(4, 1, 48, 48\)"):
        LookUpTable().update(source, target[:4], mask)
    with pytest.raises(ValueError, match="torch.uint8"):
        LookUpTable().update(source, target, mask.byte())
    with pytest.raises(ValueError, match="NaN or infinite"):
        LookUpTable().update(torch.where(mask, math.nan, source), target, mask)
