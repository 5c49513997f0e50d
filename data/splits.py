"""Who is trained on, who validates, who tests: by subject, from a stable hash of the name.

Sessions of a subject fall together, new data never moves old subjects, and nobody is in two splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from typing import cast

import numpy as np

SPLITS = ("train", "val", "test")


def split_value(dataset: str, subject: str) -> float:
    """A subject's place in [0, 1), the same wherever and whenever it is asked for."""
    digest = hashlib.sha256(f"{dataset}/{subject}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2 ** 64


def assign_splits(
    subjects: Sequence[tuple[str, str]], fractions: Sequence[float], *,
    val: Sequence[str] = (), test: Sequence[str] = (),
    settled: dict[tuple[str, str], str] | None = None,
) -> tuple[dict[tuple[str, str], str], list[str]]:
    """Put each subject into train, val or test by a stable hash of its name.

    Parameters
    ----------
    subjects : (dataset, subject label) pairs; sessions of one subject are one pair
    fractions : of train, val and test; they sum to 1
    val, test : subjects named outright, as `01`, `sub-01` or `dataset/sub-01`; a split that is
        named holds exactly these
    settled : what an earlier run decided: new data never moves old subjects, not even to fill a
        split

    Returns
    -------
    splits : each pair's split
    said : one line for each split that was empty: who was moved there, or that it stays empty

    Raises
    ------
    ValueError : a name that fits no subject, or one in both lists
    """
    pairs = sorted(set(subjects))
    named = {pair: "val" for name in val for pair in _named(name, pairs)}
    for name in test:
        for pair in _named(name, pairs):
            if pair in named:
                raise ValueError(f"subject '{name}' is in --val and in --test; keep it in one")
            named[pair] = "test"
    bounds = np.cumsum([0.0, *fractions])
    closed = {s for s, names in (("val", val), ("test", test)) if names}
    splits = {}
    for pair in pairs:
        hashed = SPLITS[int(np.searchsorted(bounds[1:-1], split_value(*pair), side="right"))]
        before = (settled or {}).get(pair, hashed)
        splits[pair] = named.get(pair, "train" if before in closed else before)
    said = [line for split, fraction in ((0, 1), (2, fractions[2]), (1, fractions[1]))
            if fraction > 0
            for line in _fill(SPLITS[split], splits, bounds, {*named, *(settled or ())})]
    return splits, said


def fitting(name: str, pairs: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The (dataset, subject label) pairs that a name means: `01`, `sub-01`, `dataset/sub-01`, or
    `dataset_sub-01`."""
    pairs = list(pairs)
    dataset, _, label = name.rpartition("/")
    label = label.removeprefix("sub-")
    fit = [p for p in pairs if p[1] == label and dataset in ("", p[0])]
    return fit or [p for p in pairs if f"{p[0]}_sub-{p[1]}" == name]


def _named(name: str, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    fit = cast(list[tuple[str, str]], fitting(name, pairs))
    if not fit:
        have = ", ".join(f"sub-{s}" for _, s in pairs[:8]) + (", ..." if len(pairs) > 8 else "")
        raise ValueError(f"subject '{name}' of --val or --test is not there; there are {have}")
    return fit


def _fill(split: str, splits: dict[tuple[str, str], str], bounds: np.ndarray,
          placed: Collection[tuple[str, str]]) -> list[str]:
    """Give an empty split the subject whose hash lies nearest to its interval."""
    if split in splits.values():
        return []
    held = list(splits.values())
    # never take a split's last subject, nor one that the user or an earlier run has placed
    free = [p for p in splits if p not in placed and held.count(splits[p]) > 1]
    if not free:
        return [f"split {split} stays empty: too few subjects that are free to move"]
    low, high = bounds[SPLITS.index(split)], bounds[SPLITS.index(split) + 1]

    def distance(pair: tuple[str, str]) -> tuple[float, tuple[str, str]]:
        value = split_value(*pair)
        return max(low - value, value - high, 0.0), pair

    pair = min(free, key=distance)
    said = f"split {split} was empty: sub-{pair[1]} of {pair[0]} moved there from {splits[pair]}"
    splits[pair] = split
    return [said]
