"""A first guess of a translation, which needs no pairs, to lead the first steps towards.

Not in Zhu et al. 2017. T1w and T2w show a brain in reversed order: fluid is the darkest in one and
the brightest in the other. Nets that are left alone mostly begin by copying, since that serves the
cycle, and turn the contrast round only after some thousand slices, early or late as chance has it
(benchmarks/RECIPES.md). Its weight, lambda_start, and its end are the training loop's.
"""
import torch
from torch import Tensor


def turned(slices: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Give slices the other contrast's histogram in reversed order: a first guess of a translation.

    What is darkest becomes brightest, as fluid, grey and white matter do between T1w and T2w; the
    share of darker pixels becomes the share of brighter ones. Needs no pairs: only how the
    intensities of each contrast are distributed.

    Parameters
    ----------
    slices : (N, 1, H, W) float in [-1, 1], background exactly -1 (and -1 in the result)
    source, target : (Q,) ascending quantiles of the brain's intensities at equal steps from 0 to 1,
        of the contrast of `slices` and of the other one, in [-1, 1]

    Returns
    -------
    turned : (N, 1, H, W) float32 in [-1, 1]
    """
    values, last = slices.float(), len(source) - 1
    above = torch.searchsorted(source, values.contiguous()).clamp(1, last)
    low, high = source[above - 1], source[above]
    share = ((values - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    rank = last - (above - 1 + share)
    below = rank.nan_to_num(0).floor().clamp(0, last - 1).long()  # a NaN stays one
    there = torch.lerp(target[below], target[below + 1], rank - below)
    return torch.where(values <= -1, -1.0, there)


def start_loss(guess: Tensor, fake: Tensor) -> Tensor:
    """Measure how far a translation is from a guess of it.

    Parameters
    ----------
    guess : (N, 1, H, W) in [-1, 1], any float dtype
    fake : the same shape, G(real_x) or F(real_y)

    Returns
    -------
    loss : scalar, float32, mean absolute difference over all pixels

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if guess.shape != fake.shape:
        raise ValueError(f"shapes differ: {tuple(guess.shape)} and {tuple(fake.shape)}")
    return (guess.float() - fake.float()).abs().mean()
