"""What an input and its translation must have in common, whatever their contrasts: structure.

Not in Zhu et al. 2017. Needs no pairs: it compares a slice with its own translation. Where two
images are of one place, one is in every small window nearly a linear function of the other, with a
slope of either sign; so contrast may turn round, but edges may not move, vanish or be made up. The
measure is the local correlation ratio of image registration (squared local cross-correlation,
Avants et al. 2008).
"""
import torch
from torch import Tensor
from torch.nn import functional as nnf

WINDOW = 7
LEAST_VARIANCE = 1e-3  # of [-1, 1]: noise in a flat window is no structure


def structure_loss(real: Tensor, fake: Tensor, window: int = WINDOW) -> Tensor:
    """Measure how little of a translation's structure is that of its input.

    1 - r^2, r the correlation coefficient of the two in a square window, averaged over a slice's
    brain, then over slices:

        r^2 = cov(real, fake)^2 / ((var(real) + c) (var(fake) + c)),   c = 1e-3

    Windows count what lies in the brain only, which is where `real` is no background.

    Parameters
    ----------
    real : (N, 1, H, W) in [-1, 1], any float dtype, background exactly -1
    fake : the same shape, G(real) or F(real); gradients go through it
    window : pixels a side, odd

    Returns
    -------
    loss : scalar, float32, in [0, 1]; 0 if there is no brain

    Raises
    ------
    ValueError
        If the shapes differ or the window is even.
    """
    if real.shape != fake.shape:
        raise ValueError(f"shapes differ: {tuple(real.shape)} and {tuple(fake.shape)}")
    if window % 2 == 0:
        raise ValueError(f"window is {window}; must be odd")
    brain = (real > -1).float()
    a, b = real.float() * brain, fake.float() * brain
    # all sums over windows in one pass
    sums = nnf.avg_pool2d(torch.cat([brain, a, b, a * a, b * b, a * b], 1), window, 1, window // 2)
    share, mean_a, mean_b, of_aa, of_bb, of_ab = sums.unbind(1)
    share = share.clamp(min=1e-3)  # of the window that is brain
    mean_a, mean_b = mean_a / share, mean_b / share
    variance_a = (of_aa / share - mean_a * mean_a).clamp(min=0)
    variance_b = (of_bb / share - mean_b * mean_b).clamp(min=0)
    covariance = of_ab / share - mean_a * mean_b
    alike = covariance ** 2 / ((variance_a + LEAST_VARIANCE) * (variance_b + LEAST_VARIANCE))
    lost = ((1 - alike) * brain[:, 0]).sum((1, 2)) / brain.sum((1, 2, 3)).clamp(min=1)
    return lost.mean()
