"""Convolutions with one channel in or out, as matrix products: for tensor cores.

The generator's first and last convolution have one channel on one side. A library's kernels fill
that up to eight, sixteen or more, and most of the work is lost. Here the k x k neighbours of a
pixel become k * k channels, and a 1 x 1 convolution does the rest: the same sums in another order.

    neighbours : (N, 1, H + k - 1, W + k - 1) -> (N, k * k, H, W)
    gathered   : its adjoint, but for the order of k * k
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

WHOLE = 8  # tensor cores take channels by eights


def from_one(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve (N, 1, H + k - 1, W + k - 1) with `weight` (C, 1, k, k), without padding."""
    k = weight.shape[-1]
    fill = -k * k % WHOLE
    columns = nnf.pad(_Neighbours.apply(image, k), (0, 0, 0, 0, 0, fill))
    return nnf.conv2d(columns.contiguous(memory_format=torch.channels_last),
                      nnf.pad(weight.flatten(1), (0, fill))[:, :, None, None], bias)


def to_one(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve (N, C, H + k - 1, W + k - 1) with `weight` (1, C, k, k), without padding.

    Summed over the k * k neighbours in float32, and given back so.
    """
    k = weight.shape[-1]
    fill = -k * k % WHOLE
    kernels = nnf.pad(weight[0].flatten(1).t(), (0, 0, 0, fill))[:, :, None, None]
    out = _Gathered.apply(nnf.conv2d(features, kernels), k)
    return out if bias is None else out + bias[:, None, None]


def _neighbours(image: Tensor, k: int) -> Tensor:
    """Channel i * k + j has image[h + i, w + j] at (h, w)."""
    height, width = image.shape[2] - k + 1, image.shape[3] - k + 1
    return torch.cat([image[:, :, i:i + height, j:j + width]
                      for i in range(k) for j in range(k)], dim=1)


def _gathered(columns: Tensor, k: int) -> Tensor:
    """Sum of columns[i * k + j][h + i, w + j]; float32."""
    height, width = columns.shape[2] - k + 1, columns.shape[3] - k + 1
    out = columns[:, 0, :height, :width].float()
    for place in range(1, k * k):
        i, j = divmod(place, k)
        out = out + columns[:, place, i:i + height, j:j + width]
    return out[:, None]


class _Neighbours(torch.autograd.Function):
    """Written out since a compiler makes of k * k slices k * k sums in the backward pass."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, k: int) -> Tensor:
        ctx.k = k
        return _neighbours(image, k)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        edge = (ctx.k - 1,) * 4
        return _gathered(nnf.pad(gradient.flip(1), edge), ctx.k).to(gradient.dtype), None


class _Gathered(torch.autograd.Function):
    """The same for the last convolution; its channels beyond k * k count nothing."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, k: int) -> Tensor:
        ctx.k, ctx.channels, ctx.dtype = k, columns.shape[1], columns.dtype
        return _gathered(columns, k)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        columns = _neighbours(nnf.pad(gradient.to(ctx.dtype), (ctx.k - 1,) * 4), ctx.k).flip(1)
        fill = nnf.pad(columns, (0, 0, 0, 0, 0, ctx.channels - ctx.k ** 2))
        return fill.contiguous(memory_format=torch.channels_last), None
