"""Statistics over subjects: what a mean is worth, and whether one model is better than another.

Owns intervals and tests; which figures there are is `measuring.py`'s. The subject is the unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 9999


def spread(values: Sequence[float], seed: int) -> dict[str, Any]:
    """Mean, SD (n - 1) and 95 % percentile bootstrap interval over subjects (null for one)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "sd": None, "ci95": None}
    sd = float(np.std(values, ddof=1))
    if sd == 0:  # equal values: every resample is the same
        return {"mean": mean, "sd": sd, "ci95": [mean, mean]}
    found = stats.bootstrap((np.asarray(values),), np.mean, n_resamples=RESAMPLES,
                            method="percentile", random_state=np.random.default_rng(seed))
    low, high = found.confidence_interval
    return {"mean": mean, "sd": sd, "ci95": [float(low), float(high)]}


def compare(first: Mapping[str, Mapping[str, float]], second: Mapping[str, Mapping[str, float]],
            seed: int) -> dict[str, dict[str, Any]]:
    """Paired differences, second minus first, metric by metric.

    Parameters
    ----------
    first, second : metric to subject to value; only metrics and subjects in both are compared
    seed : of the bootstrap

    Returns
    -------
    differences : metric to `spread`'s keys, and `p` (two-sided Wilcoxon signed-rank test, exact for
        few subjects; null for one, 1 where nothing differs) and `p_holm`, corrected for the number
        of metrics tested (Holm 1979)
    """
    found = {}
    for name in first:
        people = [person for person in first[name] if person in second.get(name, {})]
        if people:
            difference = np.array([second[name][p] - first[name][p] for p in people])
            found[name] = {**spread(difference.tolist(), seed), "p": signed_rank(difference)}
    corrected = holm([entry["p"] for entry in found.values()])
    for entry, p in zip(found.values(), corrected):
        entry["p_holm"] = p
    return found


def signed_rank(differences: np.ndarray) -> float | None:
    """p of the two-sided Wilcoxon signed-rank test; None for fewer than two subjects."""
    if len(differences) < 2:
        return None
    if not np.any(differences):
        return 1.0
    return float(stats.wilcoxon(differences).pvalue)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Correct p values that were tested together (Holm 1979); what was not tested stays None."""
    tested = sorted((p, i) for i, p in enumerate(values) if p is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for place, (p, i) in enumerate(tested):
        largest = max(largest, min(p * (len(tested) - place), 1.0))
        corrected[i] = largest
    return corrected
