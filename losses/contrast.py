"""Whether tissues are as bright as they should be, from maps of where each of them is.

For evaluation only, where the tissues are known: simulated subjects. Needs no paired scan.
"""
from typing import NamedTuple

import torch
from torch import Tensor

TISSUES = ("GM", "WM", "CSF")  # the maps' channels, in the order of `data/sequences.py`
DARK_TO_BRIGHT = {"T1w": ("CSF", "GM", "WM"), "T2w": ("WM", "GM", "CSF")}


class ContrastOrder(NamedTuple):
    """What `contrast_order` finds.

    Attributes
    ----------
    means : (N, 3) float32, mean intensity of `TISSUES`; NaN for one that is not there.
    is_right : (N,) float32: 1 in order, 0 not, NaN where a tissue is not there.
    """

    means: Tensor
    is_right: Tensor


def contrast_order(images: Tensor, tissues: Tensor, contrast: str) -> ContrastOrder:
    """Average each tissue's intensity and tell whether their order is the contrast's.

    On T2w, cerebrospinal fluid is brighter than grey matter and grey brighter than white; on T1w
    the other way round. Equal means are not in order.

    Parameters
    ----------
    images : (N, 1, H, W) float slices, or (N, 1, D, H, W) volumes, in any unit.
    tissues : (N, 3, H, W) or (N, 3, D, H, W), the share or mask (float, not below 0, or bool) of
        grey matter, white matter and CSF. A voxel counts by its share, so pure voxels alone
        (`shares > 0.9`) give the tissues' own values.
    contrast : "T1w" or "T2w", what the images should look like.

    Returns
    -------
    order : ContrastOrder. A NaN in an image makes its row NaN.

    Raises
    ------
    ValueError
        If the maps do not fit the images, or the contrast is another word.
    """
    if contrast not in DARK_TO_BRIGHT:
        raise ValueError(f"contrast is {contrast!r}; need one of {', '.join(DARK_TO_BRIGHT)}")
    if images.ndim not in (4, 5) or images.shape[1] != 1 or not images.is_floating_point():
        raise ValueError(f"images are {tuple(images.shape)} {images.dtype}; need (N, 1, H, W) or "
                         "(N, 1, D, H, W) float")
    wanted = (len(images), len(TISSUES), *images.shape[2:])
    if tuple(tissues.shape) != wanted:
        raise ValueError(f"tissues are {tuple(tissues.shape)}; need {wanted}, "
                         f"one channel each for {', '.join(TISSUES)}")
    shares = tissues.double().flatten(2)  # (N, 3, voxels)
    means = (images.double().flatten(2) * shares).sum(dim=2) / shares.sum(dim=2)
    ordered = means[:, [TISSUES.index(name) for name in DARK_TO_BRIGHT[contrast]]]
    is_right = (ordered.diff(dim=1) > 0).all(dim=1).float()
    return ContrastOrder(means.float(), is_right.where(~means.isnan().any(dim=1), torch.nan))
