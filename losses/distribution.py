"""How far apart two sets of slices are as a whole, in the features of a net: no pairs needed.

Features are (N, D) float, one row a slice. Sums are taken in float64; a NaN in any feature makes
the distance NaN.
"""
from typing import NamedTuple

import torch
from torch import Tensor


class KernelDistance(NamedTuple):
    """Mean and standard deviation (n - 1) over subsets, float64 scalars of `kernel_distance`."""

    mean: Tensor
    sd: Tensor


def frechet_distance(features_a: Tensor, features_b: Tensor) -> Tensor:
    """Compute the Frechet distance between Gaussians fitted to two sets (Heusel et al. 2017, FID).

    |m_a - m_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)), covariances with n - 1. The root's trace
    is the sum of the singular values of A B^T, where A^T A = C_a and B^T B = C_b: exact for
    covariances of any rank, with no root of a matrix and nothing added to its diagonal.

    The estimate is biased upwards, the more so the fewer rows there are (Chong and Forsyth 2020),
    and covariances are short of rank where N <= D. So compare only figures of equally many rows,
    and read `kernel_distance` beside it.

    Parameters
    ----------
    features_a : (N_a, D) float; N_a at least 2.
    features_b : (N_b, D) float; N_b at least 2.

    Returns
    -------
    distance : float64 scalar, at least 0, in squared units of the features.

    Raises
    ------
    ValueError
        If shapes do not fit, or a set has one row only.
    """
    _check(features_a, features_b)
    a, b = features_a.double(), features_b.double()
    if not bool(a.isfinite().all() & b.isfinite().all()):  # LAPACK refuses them
        return a.new_tensor(torch.nan)
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = ((a.mean(dim=0) - b.mean(dim=0)).square().sum()
                + root_a.square().sum() + root_b.square().sum() - 2 * cross)
    return distance.clamp(min=0)  # of equal sets, rounding may leave a hair less than 0


def kernel_distance(features_a: Tensor, features_b: Tensor, *, subsets: int = 50,
                    subset_size: int = 1000, generator: torch.Generator) -> KernelDistance:
    """Compute the kernel distance of two sets (Binkowski et al. 2018, KID).

    The unbiased estimate of the squared maximum mean discrepancy for the kernel
    (x . y / D + 1)^3, over random subsets without repeats. Its mean does not depend on the number
    of rows, so figures of few slices compare too. Multiplied by 1000 it is easier to read.

    Parameters
    ----------
    features_a : (N_a, D) float; N_a at least 2.
    features_b : (N_b, D) float; N_b at least 2.
    subsets : how many, at least 1.
    subset_size : rows drawn from each set, at least 2; as many as the smaller set has if that is
        less. Where both sets are used up, every subset is the same, and one is enough.
    generator : on the CPU; draws the subsets, the same for every device.

    Returns
    -------
    distance : KernelDistance; the mean is near 0 for sets of one distribution, and may be below.
        The spread is that of subsets (NaN for one), not the error of the mean.

    Raises
    ------
    ValueError
        If shapes do not fit, a set has one row only, or a number of subsets or rows is too small.
    """
    _check(features_a, features_b)
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"subsets is {subsets}, subset_size {subset_size}; "
                         "need at least 1 of at least 2 rows")
    size = min(subset_size, len(features_a), len(features_b))
    distances = torch.stack([_kernel_distance(_draw(features_a, size, generator),
                                              _draw(features_b, size, generator))
                             for _ in range(subsets)])
    sd = distances.std() if subsets > 1 else distances.new_tensor(torch.nan)
    return KernelDistance(distances.mean(), sd)


def _covariance_root(features: Tensor) -> Tensor:
    """Return A (min(N, D), D) with A^T A the covariance (n - 1) of float64 features."""
    centred = (features - features.mean(dim=0)) / (len(features) - 1) ** 0.5
    if len(features) <= features.shape[1]:
        return centred
    return torch.linalg.qr(centred, mode="r").R


def _draw(features: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw rows without repeats, as float64."""
    rows = torch.randperm(len(features), generator=generator)[:size]
    return features[rows.to(features.device)].double()


def _kernel_distance(a: Tensor, b: Tensor) -> Tensor:
    """Estimate the squared maximum mean discrepancy of two float64 subsets of equal size."""
    size, n_features = a.shape
    aa, bb, ab = ((x @ y.T / n_features + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    # without the diagonals, where a row meets itself; this is what makes it unbiased
    within = aa.sum() - aa.trace() + bb.sum() - bb.trace()
    return within / (size * (size - 1)) - 2 * ab.mean()


def _check(features_a: Tensor, features_b: Tensor) -> None:
    """Raise ValueError unless both are (N, D) float of the same D, with two rows or more."""
    shapes = f"features are {tuple(features_a.shape)} and {tuple(features_b.shape)}"
    if features_a.ndim != 2 or features_b.ndim != 2 or features_a.shape[1] != features_b.shape[1]:
        raise ValueError(f"{shapes}; need (N, D) with the same D")
    if not (features_a.is_floating_point() and features_b.is_floating_point()):
        raise ValueError(f"features are {features_a.dtype} and {features_b.dtype}; need float")
    if min(len(features_a), len(features_b)) < 2:
        raise ValueError(f"{shapes}; need at least 2 rows each")
