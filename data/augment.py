"""MRI-safe augmentation of a batch, on its device."""

from __future__ import annotations

import torch
from torch import Tensor


def flip_left_right(slices: Tensor, draws: torch.Generator) -> Tensor:
    """Mirror each slice left to right with probability 1/2.

    A mirrored brain is a plausible brain. Upside down or stretched ones are not, so there is no
    more here.

    Parameters
    ----------
    slices : (N, 1, H, W), W from left to right
    draws : a CPU generator; the result depends on it alone
    """
    turned = torch.rand(len(slices), generator=draws) < 0.5
    return torch.where(turned.to(slices.device)[:, None, None, None], slices.flip(-1), slices)
