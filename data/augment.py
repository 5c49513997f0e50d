"""MRI-safe augmentation of a batch, on its device.

A mirrored brain is a plausible brain, and so is one that is turned, scaled, shifted or bent a
little. What chance decides is drawn on the CPU, so that a run can be repeated on any device.
Nothing is ever turned upside down. (Changing intensities as another scanner would was tried and
changed nothing: benchmarks/RECIPES.md.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as nnf

# at strength 1
TURN = math.radians(10)
SCALE, SHIFT = 0.08, 0.04  # shift as a share of the slice
BEND, KNOTS = 0.023, 5  # the furthest that a knot moves, as a share of the slice; knots a side


def flip_left_right(slices: Tensor, draws: torch.Generator) -> Tensor:
    """Mirror each slice left to right with probability 1/2.

    Parameters
    ----------
    slices : (N, 1, H, W), W from left to right
    draws : a CPU generator; the result depends on it alone
    """
    turned = torch.rand(len(slices), generator=draws) < 0.5
    return torch.where(turned.to(slices.device)[:, None, None, None], slices.flip(-1), slices)


def deform(slices: Tensor, draws: torch.Generator, strength: float = 1.0) -> Tensor:
    """Turn, scale, shift and bend each slice a little, by one bilinear interpolation.

    Turned by up to 10 degrees, scaled by up to 8 %, shifted by up to 4 % of its side, and bent by
    up to 2.3 % of it (3 of 128 pixels) at the knots of a coarse grid with smooth curves between
    them; all at `strength` 1, uniformly distributed. All channels of a slice move alike.

    Parameters
    ----------
    slices : (N, C, H, W) in [-1, 1], background exactly -1, which it is in the result, too
    draws : a CPU generator; the result depends on it alone
    strength : 0 changes nothing
    """
    n, _, height, width = slices.shape
    drawn = _uniform(draws, (n, 4 + 2 * KNOTS ** 2), slices.device) * strength
    angle, scale = drawn[:, 0] * TURN, 1 + drawn[:, 1] * SCALE
    shift = drawn[:, 2:4] * SHIFT * 2  # a grid's coordinates go from -1 to 1
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrix = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1),
                          torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = nnf.affine_grid(matrix, [n, 1, height, width], align_corners=False)
    knots = drawn[:, 4:].reshape(n, 2, KNOTS, KNOTS) * BEND * 2
    bent = nnf.interpolate(knots, (height, width), mode="bicubic", align_corners=True)
    grid = grid + bent.permute(0, 2, 3, 1)
    # zero is background for the interpolation, so that what comes from outside is background
    signal = (slices.float() + 1) / 2
    signal = torch.where(signal.isfinite(), signal, math.nan)  # else an infinite one would be 1
    brain = (~(signal <= 0)).float()  # a NaN is none, and stays
    moved, inside = nnf.grid_sample(torch.cat([signal, brain], 1), grid,
                                    align_corners=False).chunk(2, 1)
    return torch.where(inside > 0.5, moved.clamp(0, 1) * 2 - 1, -1.0)


def _uniform(draws: torch.Generator, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Uniform in [-1, 1)."""
    return (torch.rand(shape, generator=draws) * 2 - 1).to(device)
