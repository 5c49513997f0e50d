"""Features of slices for distances between distributions: Inception v3, weights from the user.

Nothing is downloaded. The weights are torchvision's `inception_v3_google-0cc3c7bd.pth`, trained on
photographs: distances in its features rank sets of slices, and do not compare with published FIDs,
which come from another Inception.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from torchvision.models import inception_v3

from models.checkpoint import load_weights

SIDE = 299  # pixels that Inception v3 was trained on
N_FEATURES = 2048


class InceptionFeatures(nn.Module):
    """Inception v3 up to its last average: what it sees in a slice, before it names a class.

    Szegedy et al. 2016, as torchvision has it; its class layer is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        # the weights have the auxiliary classifier; `inception_v3` skips it in evaluation mode
        self.net = inception_v3(weights=None, init_weights=False, transform_input=False)

    @torch.no_grad()
    def forward(self, slices: Tensor) -> Tensor:
        """Turn slices (N, 1, H, W) in [0, 1] into features (N, 2048), float32.

        Slices are resized to 299 x 299 (bilinear, antialiased; a shape that is not square is
        stretched) and go in as grey photographs.

        Raises
        ------
        ValueError : another shape, or no floats
        """
        if slices.ndim != 4 or slices.shape[1] != 1 or not slices.is_floating_point():
            raise ValueError(f"slices are {tuple(slices.shape)} {slices.dtype}; "
                             "need (N, 1, H, W) float")
        with torch.autocast(slices.device.type, enabled=False):
            resized = nnf.interpolate(slices.float(), (SIDE, SIDE), mode="bilinear",
                                      antialias=True)
            # These weights come from TensorFlow and want [-1, 1]; ImageNet's means and deviations
            # belong to torchvision's own nets (its `transform_input` turns them back into this).
            return self.net((2 * resized - 1).expand(-1, 3, -1, -1))


def load_features(path: str | os.PathLike,
                  device: str | torch.device = "cpu") -> InceptionFeatures:
    """Build the extractor from a state dict of torchvision's Inception v3.

    Parameters
    ----------
    path : `inception_v3_google-0cc3c7bd.pth`, or a file of the same names and shapes
    device : where slices will be

    Returns
    -------
    features : callable, slices (N, 1, H, W) in [0, 1] to features (N, 2048) float32

    Raises
    ------
    FileNotFoundError : no such file
    ValueError : damaged, of another net, or with a NaN or infinity in it
    """
    weights = load_weights(path)
    extractor = InceptionFeatures()
    try:
        extractor.net.load_state_dict(weights)
    except RuntimeError:  # it lists every name, which is pages
        raise ValueError(f"{path}: not the weights of torchvision's Inception v3; need "
                         "inception_v3_google-0cc3c7bd.pth") from None
    if not all(bool(p.isfinite().all()) for p in extractor.state_dict().values()):
        raise ValueError(f"{path}: weights are not finite; fetch the file again")
    extractor.net.fc = nn.Identity()
    return extractor.to(device).eval().requires_grad_(False)
