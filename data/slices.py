"""Batches from the slice store: unpaired for training, subject by subject for measuring.

Which rows a step sees is a pure function of (seed, epoch, step, process): nothing is carried along,
so a resumed run, or one on another number of processes, knows at once where it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.store import SliceStore, split_value


class UnpairedBatches:
    """Draw T1w and T2w slices of the training split independently of each other.

    Each domain has its own permutation of the rows a pass; processes take disjoint parts of it, and
    what is left over at the end of a pass (fewer than one batch for every process) waits for the
    next permutation. Nothing says which T2w belongs to which T1w.

    Parameters
    ----------
    store : where the slices are
    batch_size : slices of each domain a step and process
    steps_per_epoch : 0 takes one pass over the training slices
    seed, rank, world : of the permutations; this process and how many there are
    strict : take T1w from one half of the subjects and T2w from the other (`halves`), so that no
        head is seen in both domains

    Raises
    ------
    ValueError
        If there are fewer training slices, or subjects, than one step takes.
    """

    def __init__(self, store: SliceStore, *, batch_size: int, steps_per_epoch: int = 0,
                 seed: int = 0, rank: int = 0, world: int = 1, strict: bool = False) -> None:
        self._store = store
        self._rows = halves(store) if strict else (store.rows("train"),) * 2
        self._taken = batch_size * world
        fewest = min(map(len, self._rows))
        if fewest < self._taken:
            raise ValueError(f"{store.folder}: the train split has {fewest} slices"
                             f"{' in one of its halves' if strict else ''}, a step of {world} x "
                             f"{batch_size} needs {self._taken}; take a smaller --batch-size")
        self._batch_size, self._seed, self._rank = batch_size, seed, rank
        self._steps_a_pass = fewest // self._taken
        self.steps_per_epoch = steps_per_epoch or self._steps_a_pass
        self._permutations: dict[tuple[int, int, int], np.ndarray] = {}

    def rows(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows ((N,) for X, (N,) for Y) that this process sees in a step of an epoch."""
        turn, place = divmod(step, self._steps_a_pass)
        first = place * self._taken + self._rank * self._batch_size
        x, y = (self._permutation(epoch, turn, domain)[first:first + self._batch_size]
                for domain in (0, 1))
        return x, y

    def batches(self, epoch: int, first_step: int = 0,
                workers: int = 1) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield real_x, real_y, each (N, 1, H, W) float32 in [-1, 1], from `first_step` to the end.

        Parameters
        ----------
        workers : batches read ahead, each by a thread; 0 reads when asked
        """
        steps = iter(range(first_step, self.steps_per_epoch))
        if workers == 0:
            yield from (self._load(epoch, step) for step in steps)
            return
        with ThreadPoolExecutor(workers) as pool:
            ahead: deque[Future] = deque()
            for step in steps:
                ahead.append(pool.submit(self._load, epoch, step))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _load(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        x, y = self.rows(epoch, step)
        return to_tensor(self._store.t1w[x]), to_tensor(self._store.t2w[y])

    def _permutation(self, epoch: int, turn: int, domain: int) -> np.ndarray:
        key = (epoch, turn, domain)
        found = self._permutations.get(key)  # several threads ask, and any of them may forget it
        if found is None:
            # the present pass and the one that is read ahead; older ones are done with
            for old in sorted(self._permutations)[:-3]:
                self._permutations.pop(old, None)
            draws = np.random.default_rng([self._seed, epoch, turn, domain])
            found = self._permutations[key] = draws.permutation(self._rows[domain])
        return found


def halves(store: SliceStore) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one half of the training subjects, and of the other, all sessions of one together.

    By the hash that decides the split, so a new subject moves few of the others.

    Raises
    ------
    ValueError : fewer than two training subjects
    """
    people = {(s["dataset"], s["subject"]) for s in store.subjects if s["split"] == "train"}
    if len(people) < 2:
        raise ValueError(f"{store.folder}: has {len(people)} training subjects, --strict-unpaired "
                         "needs two at least")
    ordered = sorted(people, key=lambda person: (split_value(*person), person))
    first = set(ordered[:len(ordered) // 2])
    x, y = ([np.arange(s["first_row"], s["first_row"] + s["n_slices"], dtype=np.int64)
             for s in store.subjects if s["split"] == "train"
             and ((s["dataset"], s["subject"]) in first) == wanted] for wanted in (True, False))
    return np.concatenate(x), np.concatenate(y)


def to_tensor(slices: np.ndarray) -> Tensor:
    """(N, H, W) float16 of the store to (N, 1, H, W) float32."""
    return torch.from_numpy(np.asarray(slices, dtype=np.float32))[:, None]


def paired_subjects(store: SliceStore, split: str) -> list[dict[str, Any]]:
    """The rows of `subjects.tsv` in a split, for `paired_slices`."""
    store.rows(split)  # refuses an unknown split
    return [s for s in store.subjects if s["split"] == split]


def paired_slices(store: SliceStore, subject: dict[str, Any],
                  batch_size: int = 16) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield a subject's slices in order, for validation and evaluation: real pairs.

    These are real_x and real_y (N, 1, H, W) float32 in [-1, 1] and mask (N, 1, H, W) bool.
    """
    end = subject["first_row"] + subject["n_slices"]
    for first in range(subject["first_row"], end, batch_size):
        span = slice(first, min(first + batch_size, end))
        yield (to_tensor(store.t1w[span]), to_tensor(store.t2w[span]),
               torch.from_numpy(store.mask(span))[:, None])
