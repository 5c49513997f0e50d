"""Tests of comparison.py against hand-computed numbers and scipy.stats.wilcoxon."""

import itertools

import numpy as np
import pytest
from scipy import stats

from comparison import compare, holm, signed_rank, spread


def test_mean_deviation_and_interval_of_a_hand_computed_example():
    found = spread([1.0, 2.0, 6.0], seed=0)
    assert found["mean"] == 3.0 and found["sd"] == pytest.approx(7 ** 0.5)
    low, high = found["ci95"]
    # of 27 resamples of three one is all ones and three are (1, 1, 2): 4 in 27 lie below 1.5
    assert low in (1.0, pytest.approx(4 / 3)) and high in (6.0, pytest.approx(14 / 3))
    assert spread([2.0, 2.0], seed=0) == {"mean": 2.0, "sd": 0.0, "ci95": [2.0, 2.0]}
    assert spread([5.0], seed=0) == {"mean": 5.0, "sd": None, "ci95": None}


def test_the_interval_is_the_seeds_and_near_the_normal_one_for_many_subjects():
    values = list(np.random.default_rng(1).normal(0.8, 0.05, 200))
    first = spread(values, seed=3)
    assert first == spread(values, seed=3)
    assert first != spread(values, seed=4)
    half = 1.96 * first["sd"] / 200 ** 0.5
    assert first["ci95"] == pytest.approx([first["mean"] - half, first["mean"] + half], rel=2e-3)


def test_the_interval_holds_the_middle_95_percent_of_all_resamples():
    values = [0.2, 0.5, 0.9, 1.4]
    everything = [np.mean(drawn) for drawn in itertools.product(values, repeat=4)]  # all 256
    wanted = np.percentile(everything, [2.5, 97.5])
    assert spread(values, seed=1)["ci95"] == pytest.approx(list(wanted), abs=0.03)


def of(*values):
    """Values of subjects called a, b, c."""
    return dict(zip("abcdefghij", values))


def test_differences_are_paired_by_subject_whatever_the_order():
    first = {"ssim": of(0.1, 0.5, 0.9, 0.3)}
    second = {"ssim": dict(reversed(of(0.2, 0.7, 1.0, 0.5).items()))}
    found = compare(first, second, seed=0)["ssim"]
    assert found["mean"] == pytest.approx(0.15)
    assert found["sd"] == pytest.approx(np.std([0.1, 0.2, 0.1, 0.2], ddof=1))
    assert found["p"] == pytest.approx(stats.wilcoxon([0.1, 0.2, 0.1, 0.2]).pvalue)
    back = compare(second, first, seed=0)["ssim"]
    assert back["mean"] == pytest.approx(-found["mean"]) and back["p"] == found["p"]


def test_a_subject_or_metric_that_only_one_has_is_not_compared():
    first = {"ssim": of(0.1, 0.5, 0.9), "mae": of(0.1)}
    found = compare(first, {"ssim": {"a": 0.2, "c": 1.1}}, seed=0)
    assert set(found) == {"ssim"}
    assert found["ssim"]["mean"] == pytest.approx(0.15)


def test_the_signed_rank_test_is_exact_for_few_subjects():
    # all of one sign: of 2^n equally likely signs two are as far out
    for n in (3, 5, 6, 8):
        assert signed_rank(np.arange(1, n + 1) / 10) == pytest.approx(2 / 2 ** n)
    # ranks 1, 3, 4 and 5 rise, 2 falls: 3 of 32 signs have a sum of falling ranks up to 2
    assert signed_rank(np.array([0.1, -0.2, 0.3, 0.4, 0.5])) == pytest.approx(2 * 3 / 32)
    draws = np.random.default_rng(0).normal(0.2, 1, 30)
    assert signed_rank(draws) == stats.wilcoxon(draws).pvalue


def test_one_subject_is_no_test_and_no_difference_is_no_evidence():
    assert signed_rank(np.array([0.3])) is None
    assert signed_rank(np.zeros(5)) == 1.0
    found = compare({"ssim": of(0.1)}, {"ssim": of(0.3)}, seed=0)["ssim"]
    assert found["p"] is None and found["p_holm"] is None and found["sd"] is None


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
    # 0.01 x 4, 0.02 x 3, 0.03 x 2 and 0.04 x 1, where the last two may not fall below 0.06
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.7]) == [1.0, 1.0]  # a probability
    assert holm([0.001, None, 0.2]) == [0.002, None, 0.2]  # what was not tested counts for none
    assert holm([]) == []


def test_the_correction_is_over_the_metrics_that_were_compared():
    draws = np.random.default_rng(3)
    first, second = ({name: of(*draws.normal(shift, 1, 8)) for name in ("ssim", "psnr_db", "mae")}
                     for shift in (0, 1))
    found = compare(first, second, seed=0)
    ps = [stats.wilcoxon([second[n][k] - first[n][k] for k in first[n]]).pvalue for n in first]
    assert [entry["p"] for entry in found.values()] == pytest.approx(ps)
    assert [entry["p_holm"] for entry in found.values()] == pytest.approx(holm(ps))
    assert max(e["p_holm"] / e["p"] for e in found.values()) == pytest.approx(3)
