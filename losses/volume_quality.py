"""How near a translated volume comes to the real one, and whether its slices hang together.

Volumes are stacks of slices, (N, 1, D, H, W) float, by convention in [0, 1]; slices (K, 1, H, W) of
one subject become one by `slices.transpose(0, 1)[None]`. Windows are counted in voxels, whatever
those measure along D. For evaluation only: they need paired volumes. As in `losses/quality.py`,
sums are taken in float64, masks leave NaN visible, and nothing is clipped.
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from losses.quality import (RADIUS, WINDOW, check_mask, psnr_db, similarity_terms,
                            smoothing_matrix)

SLAB = 16  # slices whose similarity is computed at once: five float64 maps of these and a margin


def volume_psnr_db(volume: Tensor, reference: Tensor, mask: Tensor | None = None,
                   data_range: float = 1.0) -> Tensor:
    """Compute the peak signal-to-noise ratio over all voxels of a volume, or of its mask.

    Parameters
    ----------
    volume, reference : (N, 1, D, H, W), the same float dtype.
    mask : (N, 1, D, H, W) bool, True somewhere in each row.
    data_range : largest minus smallest possible intensity.

    Returns
    -------
    psnr_db : (N,) float32, dB; inf where volume and reference are equal.

    Raises
    ------
    ValueError
        If shapes or dtypes differ, `mask` is empty in a row, or `data_range` is not positive.
    """
    _check(volume, reference, mask)
    return psnr_db(volume.flatten(2, 3), reference.flatten(2, 3),
                   None if mask is None else mask.flatten(2, 3), data_range)


def volume_ssim(volume: Tensor, reference: Tensor, mask: Tensor | None = None,
                data_range: float = 1.0) -> Tensor:
    """Compute the structural similarity in three dimensions (Wang et al. 2004, windows of 11^3).

    Equal to scikit-image's 3-D `structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False)` to 1e-5: without a mask the mean leaves out a border of 5 voxels,
    with a mask it is the mean of the full map over the mask's voxels. Slabs of 16 slices keep the
    memory at about half a gigabyte for slices of 256 x 256.

    Parameters are those of `volume_psnr_db`. Returns (N,) float32 in [-1, 1].

    Raises
    ------
    ValueError
        As `volume_psnr_db`, and if a side is below 11 voxels.
    """
    _check(volume, reference, mask)
    if not data_range > 0:
        raise ValueError(f"data_range is {data_range}; must be above 0")
    if min(volume.shape[2:]) < WINDOW:
        raise ValueError(f"volumes are {' x '.join(map(str, volume.shape[2:]))}; SSIM's window "
                         f"needs at least {WINDOW} voxels along each axis")
    rows = []
    for row in range(len(volume)):
        given = None if mask is None else mask[row, 0]
        total = count = torch.zeros((), dtype=torch.float64, device=volume.device)
        for first, similarity in _slabs(volume[row, 0], reference[row, 0], data_range):
            weights = _weights(first, similarity, given, len(volume[row, 0]))
            total = total + (similarity * weights).sum()
            count = count + weights.sum()
        rows.append(total / count)
    return torch.stack(rows).float() if rows else volume.new_zeros(0, dtype=torch.float32)


def slice_step(volume: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the mean absolute difference between neighbouring slices of a volume.

    Parameters
    ----------
    volume : (N, 1, D, H, W) float, D at least 2.
    mask : (N, 1, D, H, W) bool; a difference counts where both of its voxels are inside.

    Returns
    -------
    step : (N,) float32, in the unit of the intensities.

    Raises
    ------
    ValueError
        If shapes do not fit, there is one slice only, or no two neighbours are inside the mask.
    """
    _check(volume, volume, mask)
    if volume.shape[2] < 2:
        raise ValueError(f"volume has {volume.shape[2]} slice; neighbours need at least 2")
    difference = volume.double().diff(dim=2).abs()
    if mask is None:
        return difference.mean(dim=(1, 2, 3, 4)).float()
    both = mask[:, :, 1:] & mask[:, :, :-1]
    count = both.sum(dim=(1, 2, 3, 4))
    if not bool(count.all()):
        raise ValueError("mask has no two neighbours along the slice axis in row "
                         f"{int((count == 0).nonzero()[0])} of {len(mask)}")
    return ((difference * both).sum(dim=(1, 2, 3, 4)) / count).float()


def slice_consistency(volume: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compare `slice_step` of a translated volume with the real one's, as a ratio.

    Slices translated one by one may jump in brightness from one to the next (above 1), or all show
    the same (below 1). Anatomy changes from slice to slice too, so only the ratio says anything.

    Parameters and errors are those of `volume_psnr_db` and `slice_step`. Returns (N,) float32, 1
    where slices change as much as in the real volume; inf (or NaN) where that does not change.
    """
    _check(volume, reference, mask)
    return slice_step(volume, mask) / slice_step(reference, mask)


def _slabs(x: Tensor, y: Tensor, data_range: float) -> Iterator[tuple[int, Tensor]]:
    """Yield a volume's SSIM map (D, H, W) in slabs of float64: where it begins, and the slab."""
    along, down, across = (smoothing_matrix(side, x.device) for side in x.shape)
    for first in range(0, len(x), SLAB):
        last = min(first + SLAB, len(x))
        near = slice(max(first - RADIUS, 0), last + RADIUS)  # all that the slab's windows reach
        a, b = x[near].double(), y[near].double()
        means = down @ torch.stack([a, b, a * a, b * b, a * b]) @ across.T
        means = torch.einsum("ij,cjhw->cihw", along[first:last, near], means)
        luminance, structure = similarity_terms(means, data_range)
        yield first, luminance * structure


def _weights(first: int, slab: Tensor, mask: Tensor | None, depth: int) -> Tensor:
    """Weigh a slab's voxels: 1 in the mask, or without one all but the volume's border, else 0."""
    if mask is not None:
        return mask[first:first + len(slab)].double()
    weights = torch.zeros_like(slab)
    begin, end = max(RADIUS - first, 0), max(depth - RADIUS - first, 0)
    weights[begin:end, RADIUS:-RADIUS, RADIUS:-RADIUS] = 1
    return weights


def _check(volume: Tensor, reference: Tensor, mask: Tensor | None) -> None:
    """Raise ValueError unless all arguments fit together."""
    if volume.shape != reference.shape or volume.dtype != reference.dtype:
        raise ValueError(f"volume is {tuple(volume.shape)} {volume.dtype}, "
                         f"reference is {tuple(reference.shape)} {reference.dtype}")
    if volume.ndim != 5 or volume.shape[1] != 1 or not volume.is_floating_point():
        raise ValueError(f"volumes are {tuple(volume.shape)} {volume.dtype}; "
                         "need (N, 1, D, H, W) float")
    if mask is not None:
        check_mask(mask, tuple(volume.shape))
