"""Tests of losses/distribution.py against scipy and numpy."""
import math

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor

from losses.distribution import frechet_distance, kernel_distance


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def features(n_rows: int, n_features: int, seed: int = 0) -> Tensor:
    """Features as of a net: not below 0, correlated with each other, of unequal size."""
    mixing = draws(n_features, n_features, seed=99) / n_features ** 0.5
    return (draws(n_rows, n_features, seed=seed) @ mixing + 0.3).clamp(min=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def peer_frechet(a: Tensor, b: Tensor) -> float:
    """Return the formula of Heusel et al. 2017 with scipy's root of a matrix."""
    x, y = a.double().numpy(), b.double().numpy()
    cov_x, cov_y = (np.cov(v, rowvar=False) for v in (x, y))
    root = linalg.sqrtm(cov_x @ cov_y).real
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(cov_x + cov_y - 2 * root)


def peer_kernel(a: Tensor, b: Tensor) -> float:
    """Return the unbiased squared maximum mean discrepancy, summed pair by pair."""
    def kernel(u, v):
        return (u @ v / len(u) + 1) ** 3

    x, y = a.double().numpy(), b.double().numpy()
    within = [np.mean([kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j])
              for s in (x, y)]
    return sum(within) - 2 * np.mean([kernel(u, v) for u in x for v in y])


@pytest.mark.parametrize("n_a, n_b, n_features", [(300, 300, 24), (500, 60, 24), (25, 400, 24),
                                                  (24, 24, 24)])
def test_frechet_distance_is_the_papers_formula_with_scipys_matrix_root(n_a, n_b, n_features):
    a, b = features(n_a, n_features), 1.3 * features(n_b, n_features, seed=1) + 0.1
    assert frechet_distance(a, b).item() == pytest.approx(peer_frechet(a, b), rel=1e-4)


def test_frechet_distance_of_fewer_rows_than_features_is_that_in_the_space_they_span():
    a, b = features(9, 40), features(14, 40, seed=1) + 0.2
    # Turned so that all rows lie in the first 23 axes: those alone give the distance.
    turn = np.linalg.qr(torch.cat([a, b]).double().numpy().T)[0]
    assert turn.shape == (40, 23)
    x, y = a.double() @ torch.from_numpy(turn), b.double() @ torch.from_numpy(turn)
    ridge = 1e-10 * np.eye(23)  # scipy's root needs full rank
    cov_x, cov_y = (np.cov(v.numpy(), rowvar=False) + ridge for v in (x, y))
    wanted = ((x.mean(0) - y.mean(0)).square().sum().item()
              + np.trace(cov_x + cov_y - 2 * linalg.sqrtm(cov_x @ cov_y).real))
    assert frechet_distance(a, b).item() == pytest.approx(wanted, abs=1e-4)


def test_frechet_distance_by_hand():
    a = torch.tensor([[-1.0, 0], [1, 0], [0, -2], [0, 2]])
    covariance = torch.tensor([2 / 3, 8 / 3])  # of the axes, which do not correlate
    moved = frechet_distance(a, a + torch.tensor([3.0, 4]))
    assert moved.item() == pytest.approx(25)
    scaled = frechet_distance(a, 3 * a)  # (sd - 3 sd)^2 along each axis
    assert scaled.item() == pytest.approx(4 * covariance.sum().item())
    turned = frechet_distance(a, a.flip(1))  # the axes' variances change places
    assert turned.item() == pytest.approx(
        2 * (covariance.sqrt()[0] - covariance.sqrt()[1]).square().item())


def test_frechet_distance_falls_with_the_number_of_rows_and_kernel_distance_does_not():
    def alike(n):  # pairs of sets of one distribution
        return [(features(n, 16, seed=2 * s), features(n, 16, seed=2 * s + 1)) for s in range(40)]

    frechet = [np.mean([frechet_distance(a, b) for a, b in alike(n)]) for n in (20, 80, 320)]
    assert frechet[0] > 2 * frechet[1] > 4 * frechet[2] > 0
    kernel = [[kernel_distance(a, b, subsets=1, generator=generator()).mean.item()
               for a, b in alike(n)] for n in (10, 80)]
    for of_size in kernel:  # around 0, on both sides
        assert min(of_size) < 0 < max(of_size)
        assert abs(np.mean(of_size)) < 3 * np.std(of_size) / 40 ** 0.5


@pytest.mark.parametrize("n_rows", [2, 7, 30])
def test_kernel_distance_of_whole_sets_is_that_of_all_pairs(n_rows):
    a, b = features(n_rows, 12), features(n_rows, 12, seed=1) + 0.2
    found = kernel_distance(a, b, subsets=3, generator=generator())
    assert found.mean.item() == pytest.approx(peer_kernel(a, b), rel=1e-6)
    assert found.sd.item() == pytest.approx(0, abs=1e-12)


def test_kernel_distance_has_scikit_learns_polynomial_kernel():
    polynomial_kernel = pytest.importorskip("sklearn.metrics.pairwise").polynomial_kernel
    a, b = features(40, 12), features(40, 12, seed=1) + 0.2
    aa, bb, ab = (polynomial_kernel(x.double().numpy(), y.double().numpy(), degree=3, coef0=1)
                  for x, y in ((a, a), (b, b), (a, b)))
    apart = ~np.eye(40, dtype=bool)
    wanted = aa[apart].mean() + bb[apart].mean() - 2 * ab.mean()
    found = kernel_distance(a, b, subsets=1, generator=generator())
    assert found.mean.item() == pytest.approx(wanted, rel=1e-6)
    assert found.sd.isnan()


def test_subsets_scatter_around_the_distance_of_the_whole_sets():
    a, b = features(200, 12), features(200, 12, seed=1) + 0.05
    whole = kernel_distance(a, b, subsets=1, generator=generator()).mean.item()
    found = kernel_distance(a, b, subsets=400, subset_size=50, generator=generator())
    assert found.sd > 0
    assert abs(found.mean.item() - whole) < 4 * found.sd.item() / 400 ** 0.5


def test_the_generator_decides_which_subsets_are_drawn():
    a, b = features(60, 12), features(80, 12, seed=1)
    one, same, other = (kernel_distance(a, b, subsets=5, subset_size=20, generator=generator(seed))
                        for seed in (0, 0, 1))
    assert one.mean == same.mean and one.sd == same.sd and one.mean != other.mean


def test_equal_sets_are_0_apart_and_sets_may_change_places():
    for a, b in ((features(200, 12), features(100, 12, seed=1)),
                 (features(10, 40), features(20, 40, seed=1))):
        assert frechet_distance(a, a).item() == pytest.approx(0, abs=1e-9)
        assert frechet_distance(a, a) >= 0
        assert frechet_distance(a, b).item() == pytest.approx(frechet_distance(b, a).item())
        mixed = a[torch.randperm(len(a), generator=generator())]
        assert frechet_distance(a, mixed).item() == pytest.approx(0, abs=1e-9)
    a, b = features(30, 12), features(30, 12, seed=1)
    there, back = (kernel_distance(x, y, subsets=1, generator=generator()).mean.item()
                   for x, y in ((a, b), (b, a)))
    assert there == pytest.approx(back)


def test_features_of_any_precision_are_measured_in_the_highest():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        a, b = features(50, 12).to(dtype), features(50, 12, seed=1).to(dtype)
        wanted = frechet_distance(a.double(), b.double())
        found = frechet_distance(a, b)
        assert found.dtype == torch.float64 and found == wanted
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert frechet_distance(a, b) == wanted
        kernel = kernel_distance(a, b, generator=generator(), subsets=1).mean
        assert kernel.dtype == torch.float64
        torch.testing.assert_close(
            kernel, kernel_distance(a.double(), b.double(), generator=generator()).mean)


def test_a_nan_in_a_feature_shows():
    a, b = features(20, 12), features(20, 12, seed=1)
    a[3, 4] = math.nan
    assert frechet_distance(a, b).isnan() and frechet_distance(b, a).isnan()
    assert kernel_distance(a, b, generator=generator()).mean.isnan()


def test_arguments_that_do_not_fit_are_refused_with_both_values():
    def kernel(a, b):
        return kernel_distance(a, b, generator=generator())

    a = features(20, 12)
    for distance in (frechet_distance, kernel):
        with pytest.raises(ValueError, match=r"\(20, 12\) and \(20, 11\).*same D"):
            distance(a, a[:, :11])
        with pytest.raises(ValueError, match=r"\(20, 12\) and \(12,\)"):
            distance(a, a[0])
        with pytest.raises(ValueError, match=r"\(1, 12\).*at least 2 rows"):
            distance(a[:1], a)
        with pytest.raises(ValueError, match="int64"):
            distance(a.long(), a)
    with pytest.raises(ValueError, match="subsets is 0"):
        kernel_distance(a, a, subsets=0, generator=generator())
    with pytest.raises(ValueError, match="subset_size 1"):
        kernel_distance(a, a, subset_size=1, generator=generator())
