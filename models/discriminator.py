"""The 70 x 70 PatchGAN discriminator, for D_X and D_Y alike (Zhu et al. 2017, appendix 7.2)."""
from torch import Tensor, nn

from models.generator import InstanceNorm

# Three halvings, then two 4x4 convolutions that take one pixel away each, must leave one score.
# (C512's norm then sees 2 x 2 values; it could do nothing with one.)
MIN_SIDE = 24


def C(channels: int, k: int, stride: int, norm: bool = True) -> nn.Sequential:
    """Build Ck: 4x4 convolution, norm (not for the first layer), leaky ReLU of slope 0.2."""
    layers: list[nn.Module] = [nn.Conv2d(channels, k, 4, stride=stride, padding=1)]
    if norm:
        layers.append(InstanceNorm())
    return nn.Sequential(*layers, nn.LeakyReLU(0.2, inplace=True))


class PatchDiscriminator(nn.Module):
    """Score overlapping patches of a slice: C64-C128-C256-C512 and a convolution to one channel.

    Each score sees 70 x 70 pixels (and, through the norms' statistics, the slice as a whole). The
    paper's text gives every Ck stride 2; its 70 pixels need stride 1 in C512 and in the last
    convolution, as in the authors' code. That is what is built here, with biases everywhere.

    Parameters
    ----------
    features : channels after the first layer; 64 in the paper.

    Raises
    ------
    ValueError
        If `features` is below 1.
    """

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features ({features}) must be at least 1")
        k = features
        self.patches = nn.Sequential(
            C(1, k, stride=2, norm=False), C(k, 2 * k, stride=2), C(2 * k, 4 * k, stride=2),
            C(4 * k, 8 * k, stride=1))
        self.to_score = nn.Conv2d(8 * k, 1, 4, stride=1, padding=1)

    def forward(self, slices: Tensor) -> Tensor:
        """Score the patches of a batch of slices.

        Parameters
        ----------
        slices : (N, 1, H, W) in [-1, 1]; H and W at least 24.

        Returns
        -------
        scores : (N, 1, H // 8 - 2, W // 8 - 2), unbounded (no sigmoid): the loss decides what they
            mean. In autocast's dtype; `losses/adversarial.py` goes on in float32.

        Raises
        ------
        ValueError
            If the shape is not one the net can take.
        """
        if slices.ndim != 4 or slices.shape[1] != 1:
            raise ValueError(f"slices have shape {tuple(slices.shape)}; need (N, 1, H, W)")
        height, width = slices.shape[2:]
        if min(height, width) < MIN_SIDE:
            raise ValueError(f"slices are {height} x {width} (height x width); the discriminator "
                             f"needs at least {MIN_SIDE} x {MIN_SIDE}")
        return self.to_score(self.patches(slices))
