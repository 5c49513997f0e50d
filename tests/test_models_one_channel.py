"""Tests of models/one_channel.py: the same sums as the library's convolution, forwards and back."""

import pytest
import torch
from torch.nn import functional as nnf

from models import one_channel


def draw(*shape, seed):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.requires_grad_()


@pytest.mark.parametrize("k", [3, 7])
@pytest.mark.parametrize("convolve, channels_in, channels_out", [
    (one_channel.from_one, 1, 5), (one_channel.to_one, 5, 1)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_all_gradients_are_those_of_a_convolution(k, convolve, channels_in,
                                                             channels_out, with_bias):
    given = (draw(2, channels_in, 20, 17, seed=0), draw(channels_out, channels_in, k, k, seed=1),
             *([draw(channels_out, seed=2)] if with_bias else []))
    weight = draw(2, channels_out, 21 - k, 18 - k, seed=3).detach()
    found, wanted = ((out := call(*given, *([] if with_bias else [None])),
                      *torch.autograd.grad((out * weight).sum(), given))
                     for call in (convolve, nnf.conv2d))
    for ours, library in zip(found, wanted, strict=True):
        # sums over neighbours are taken in float32
        torch.testing.assert_close(ours.double(), library, rtol=1e-5, atol=1e-5)


def test_half_precision_goes_in_and_float32_comes_out_of_the_last_convolution():
    features, kernel = draw(1, 4, 14, 14, seed=0).bfloat16(), draw(1, 4, 7, 7, seed=1).bfloat16()
    out = one_channel.to_one(features, kernel, None)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, nnf.conv2d(features.float(), kernel.float()), rtol=0.05,
                               atol=0.5)
