"""The L1 terms of the objective: cycle consistency and identity (Zhu et al. 2017, eq. 2, sec. 5.2).

One domain at a time and without weights: lambda_cycle and lambda_identity are the training loop's.
"""
from torch import Tensor


def cycle_loss(real: Tensor, cycled: Tensor) -> Tensor:
    """Measure what a slice loses on its way to the other domain and back (eq. 2, one of its terms).

    Parameters
    ----------
    real : (N, 1, H, W) in [-1, 1], real_x (or real_y), any float dtype.
    cycled : the same shape, F(G(real_x)) (or G(F(real_y))).

    Returns
    -------
    loss : scalar, float32, mean absolute difference over all pixels. (Eq. 2 writes the L1 norm, a
        sum; the authors' code takes the mean, and lambda = 10 belongs to the mean.)

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    return _mean_absolute_difference(real, cycled)


def identity_loss(real: Tensor, same: Tensor) -> Tensor:
    """Measure how far a generator changes a slice that is in its target domain already (sec. 5.2).

    Parameters
    ----------
    real : (N, 1, H, W) in [-1, 1], real_y for G (real_x for F), any float dtype.
    same : the same shape, G(real_y) (or F(real_x)).

    Returns
    -------
    loss : scalar, float32, mean absolute difference over all pixels.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    return _mean_absolute_difference(real, same)


def _mean_absolute_difference(first: Tensor, second: Tensor) -> Tensor:
    """Average |first - second| in float32; refuse to broadcast."""
    if first.shape != second.shape:
        raise ValueError(f"shapes differ: {tuple(first.shape)} and {tuple(second.shape)}")
    return (first.float() - second.float()).abs().mean()
