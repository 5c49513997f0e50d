"""What can be had without a net: a table that looks at one pixel and at nothing around it.

A translator must beat it to have used any context. Unlike the nets it is fitted to pairs, and so
it is the best that any such table could reach, not a rival.
"""

from __future__ import annotations

import torch
from torch import Tensor

BACKGROUND = -1.0


class LookUpTable:
    """Map each intensity of one contrast to the other's mean there, inside the brain.

    The mean, since it minimises the squared error: no table with these bins has a higher PSNR on
    the slices that it was fitted to. Intensities are those of the store, [-1, 1], and a fitted
    table is called as a net is.

    Parameters
    ----------
    bins : how many intervals of equal width [-1, 1] is cut into
    """

    def __init__(self, bins: int = 256) -> None:
        if bins < 2:
            raise ValueError(f"bins is {bins}; a table needs at least 2")
        self.bins = bins
        self._sums = torch.zeros(bins, dtype=torch.float64)
        self._counts = torch.zeros(bins, dtype=torch.float64)

    def update(self, source: Tensor, target: Tensor, mask: Tensor) -> None:
        """Add a batch of pairs.

        Parameters
        ----------
        source, target : (N, 1, H, W) float in [-1, 1], pixel by pixel the same place
        mask : (N, 1, H, W) bool, the brain

        Raises
        ------
        ValueError : shapes do not fit, or a pixel of the brain is not finite
        """
        if source.shape != target.shape or source.shape != mask.shape or mask.dtype != torch.bool:
            raise ValueError(f"source is {tuple(source.shape)}, target {tuple(target.shape)}, mask "
                             f"{tuple(mask.shape)} {mask.dtype}; need equal shapes, the mask bool")
        x, y = source[mask].double(), target[mask].double()
        if not bool((x.isfinite() & y.isfinite()).all()):
            raise ValueError("a pixel of the brain is NaN or infinite; check the store")
        place = ((x + 1) / 2 * self.bins).long().clamp(0, self.bins - 1)
        self._sums += torch.bincount(place, y, self.bins).cpu()
        self._counts += torch.bincount(place, minlength=self.bins).cpu()

    def table(self) -> Tensor:
        """Return (bins,) float64: the target at the middle of each bin.

        A bin that no pixel fell into lies on the line between its neighbours, or is the first or
        last that has one.

        Raises
        ------
        ValueError : nothing was added yet
        """
        filled = self._counts.nonzero().flatten()
        if len(filled) == 0:
            raise ValueError("the table has seen no pixel of any brain; update it first")
        means = self._sums[filled] / self._counts[filled]
        return _interpolate(torch.arange(self.bins, dtype=torch.float64), filled.double(), means)

    def __call__(self, source: Tensor) -> Tensor:
        """Translate slices (N, 1, H, W) in [-1, 1]: float32, linear between the bins' middles.

        Background (exactly -1) stays as it is. A NaN stays a NaN.
        """
        middles = (2 * torch.arange(self.bins, dtype=torch.float64) + 1) / self.bins - 1
        translated = _interpolate(source.double(), middles.to(source.device),
                                  self.table().to(source.device)).float()
        return translated.where(source != BACKGROUND, BACKGROUND)


def _interpolate(at: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Interpolate linearly between ascending places (P,), constant beyond them (numpy.interp)."""
    if len(places) == 1:
        return values[0] + 0 * at  # which keeps a NaN
    upper = torch.searchsorted(places, at.contiguous()).clamp(1, len(places) - 1)
    share = (at - places[upper - 1]) / (places[upper] - places[upper - 1])
    return torch.lerp(values[upper - 1], values[upper], share.clamp(0, 1))
