"""Batches from the slice store: unpaired for training, subject by subject for measuring.

Which rows a step sees is a pure function of (seed, epoch, step, process): nothing is carried along,
so a resumed run, or one on another number of processes, knows at once where it is.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.histogram import CONTRASTS, StandardRows
from data.splits import split_value
from data.store import RowReader, SliceStore, rows_of, spans_of

BLOCK = 128  # pairs that a thread reads at once, at least: a handover costs as much as reading 20
# Up to so many slices a pass is shuffled as a whole (0.2 s, 16 MiB). Beyond, a place of the order
# is computed when it is needed, so that a store of any size opens at once.
SHUFFLED = 2 ** 22
PART, ROUNDS = 2 ** 14, 6  # places computed at once; rounds of `scatter`


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
    balanced : give each volume the same number of slices a pass, give or take one, however many it
        has: those of few come several times (never twice in one step of all processes, unless the
        volume has fewer slices than the step takes of it), of those with many each pass takes
        others
    standard : what histograms slices are shown with; None leaves them as they are stored
    targets : those of its contrasts come twice, side by side as channels: as they are shown, and
        with this histogram

    Raises
    ------
    ValueError
        If there are fewer training slices, or subjects, than one step takes.
    """

    def __init__(self, store: SliceStore, *, batch_size: int, steps_per_epoch: int = 0,
                 seed: int = 0, rank: int = 0, world: int = 1, strict: bool = False,
                 balanced: bool = False, standard: StandardRows | None = None,
                 targets: StandardRows | None = None) -> None:
        spans = _half_spans(store) if strict else (store.spans("train"),) * 2
        self._slices = tuple(Spans(each) for each in spans)
        self._taken = batch_size * world
        fewest = min(map(len, self._slices))
        if not fewest:
            raise ValueError(f"{store.folder}: the train split"
                             f"{' of one contrast' if strict else ''} is empty; take "
                             f"{'more subjects' if strict else 'another --split of preprocess.py'}")
        if fewest < self._taken:
            raise ValueError(f"{store.folder}: the train split has {fewest} slices"
                             f"{' in one of its halves' if strict else ''}, a step of {world} x "
                             f"{batch_size} needs {self._taken}; take a smaller --batch-size")
        self._readers = RowReader(store.t1w), RowReader(store.t2w)
        wanted = targets.standard.wanted if targets else {}
        self._shapes = tuple((2 if name in wanted else 1, *store.t1w.shape[1:])
                             for name in CONTRASTS)
        self._batch_size, self._seed, self._rank = batch_size, seed, rank
        self._balanced, self._standard, self._targets = balanced, standard, targets
        self._steps_a_pass = fewest // self._taken
        self.steps_per_epoch = steps_per_epoch or self._steps_a_pass
        self._orders: dict[tuple[int, int, int, int], np.ndarray] = {}

    def rows(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows ((N,) for X, (N,) for Y) that this process sees in a step of an epoch."""
        turn, place = divmod(step, self._steps_a_pass)
        first = place * self._taken + self._rank * self._batch_size
        x, y = (self._rows(epoch, turn, domain, first) for domain in (0, 1))
        return x, y

    def batches(self, epoch: int, first_step: int = 0, workers: int = 1, *, half: bool = False,
                pin: bool = False) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield real_x, real_y, each (N, 1, H, W) in [-1, 1], from `first_step` to the end.

        With `targets` (N, 2, H, W): as it is shown, and the target.

        Parameters
        ----------
        workers : threads that read ahead, each the batches of a block (at least `BLOCK` pairs);
            0 reads a batch when asked
        half : float16 as stored, half the bytes to copy; widen it on the device. Else float32.
        pin : in page-locked memory, from which a GPU copies while the program goes on
        """
        steps = range(first_step, self.steps_per_epoch)
        dtype = torch.float16 if half else torch.float32
        if workers == 0:
            for step in steps:
                buffers = self._buffers(1, dtype, pin)
                self._load(epoch, range(step, step + 1), *buffers)
                yield buffers[0][0], buffers[1][0]
            return
        a_block = max(1, BLOCK // self._batch_size)
        blocks = (steps[i:i + a_block] for i in range(0, len(steps), a_block))
        with ThreadPoolExecutor(workers, "reader") as pool:
            ahead: deque[Future[tuple[Tensor, Tensor]]] = deque()
            try:
                while True:
                    # one more than there are threads: none of them waits while a block is used up
                    for block in itertools.islice(blocks, workers + 1 - len(ahead)):
                        buffers = self._buffers(len(block), dtype, pin)
                        ahead.append(pool.submit(self._load, epoch, block, *buffers))
                    if not ahead:
                        return
                    yield from zip(*ahead.popleft().result())
            finally:
                for future in ahead:
                    future.cancel()

    def _buffers(self, steps: int, dtype: torch.dtype, pin: bool) -> tuple[Tensor, Tensor]:
        """Make two (steps, N, 1, H, W) to read into; not in a thread, which has no GPU set."""
        x, y = (torch.empty((steps, self._batch_size, *shape), dtype=dtype, pin_memory=pin)
                for shape in self._shapes)
        return x, y

    def _load(self, epoch: int, steps: range, real_x: Tensor,
              real_y: Tensor) -> tuple[Tensor, Tensor]:
        """Fill the buffers with the slices that these steps see."""
        drawn = zip(*(self.rows(epoch, step) for step in steps))
        for reader, buffer, steps_rows, contrast in zip(self._readers, (real_x, real_y), drawn,
                                                        CONTRASTS):
            rows = np.concatenate(steps_rows)
            out = buffer.numpy().reshape(-1, *buffer.shape[2:])
            is_stored = out.dtype == np.float16 and out.shape[1] == 1
            stored = out[:, 0] if is_stored else np.empty((len(rows), *out.shape[2:]), np.float16)
            reader.read_into(stored, rows)
            if out.shape[1] == 2 and self._targets:
                aimed_at = stored.copy()
                self._targets.show(aimed_at, rows, contrast)
                np.copyto(out[:, 1], aimed_at)
            if self._standard:
                self._standard.show(stored, rows, contrast)
            if not is_stored:
                # by NumPy: torch would do it with threads of its own, which those that train on
                # the same cores would have to wait for
                np.copyto(out[:, 0], stored)
        return real_x, real_y

    def _rows(self, epoch: int, turn: int, domain: int, first: int) -> np.ndarray:
        """Which of a domain's rows this process takes from place `first` of a pass on."""
        slices = self._slices[domain]
        if not self._balanced:
            return slices.rows(self._places(epoch, turn, domain, first, self._batch_size))
        own = self._rank * self._batch_size
        places = self._places(epoch, turn, domain, first - own, self._taken)  # all processes'
        drawn = np.random.SeedSequence([self._seed, epoch, turn, domain]).generate_state(1)[0]
        rows = slices.apart(slices.balanced_rows(places, drawn / 2 ** 32))
        return rows[own:own + self._batch_size]

    def _places(self, epoch: int, turn: int, domain: int, first: int, n_places: int) -> np.ndarray:
        """Which of a domain's slices, counted from 0, come from place `first` of a pass on.

        Orders are kept a while: whole, or of a large split the part that `first` lies in.
        """
        n = len(self._slices[domain])
        part = n if n <= SHUFFLED else self._taken * -(-PART // self._taken)
        begin = first - first % part
        key = (epoch, turn, domain, begin)
        found = self._orders.get(key)  # several threads ask, and any of them may forget it
        if found is None:
            # the present pass and the one that is read ahead; older ones are done with
            for old in sorted(self._orders)[:-3]:
                self._orders.pop(old, None)
            seeds = [self._seed, epoch, turn, domain]
            if n <= SHUFFLED:
                found = np.random.default_rng(seeds).permutation(n).astype(np.uint32)
            else:
                found = scatter(np.arange(begin, min(begin + part, n)), n, seeds)
            self._orders[key] = found
        return found[first - begin:first - begin + n_places]


class Spans:
    """The slices of some subjects, counted from 0, and their rows in the store."""

    def __init__(self, spans: np.ndarray) -> None:
        first, counts = spans.T
        self._first, self._counts = first, counts
        self._ends = np.cumsum(counts)
        self._shift = first - (self._ends - counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def rows(self, places: np.ndarray) -> np.ndarray:
        """(n,) int64 rows of the slices at these places."""
        return places + self._shift[np.searchsorted(self._ends, places, side="right")]

    def balanced_rows(self, places: np.ndarray, shift: float) -> np.ndarray:
        """(n,) int64 rows, as many of each volume as of any other where all places are asked for.

        Systematic resampling: places lie at equal steps along a line on which each volume has the
        same length, and its slices equal parts of that; `shift` in [0, 1) moves them by less than
        a step, so that by and by each slice has its turn.
        """
        at = (places + shift) / len(self) * len(self._counts)
        volume = np.minimum(at.astype(np.int64), len(self._counts) - 1)
        counts = self._counts[volume]
        inside = ((at - volume) * counts).astype(np.int64)
        return self._first[volume] + np.minimum(inside, counts - 1)

    def apart(self, rows: np.ndarray) -> np.ndarray:
        """These rows, where one that comes again gives way to the next free one of its volume."""
        new = np.zeros(len(rows), bool)
        new[np.unique(rows, return_index=True)[1]] = True
        if new.all():
            return rows
        taken, rows = set(rows.tolist()), rows.copy()
        for place in np.flatnonzero(~new):
            volume = np.searchsorted(self._first, rows[place], side="right") - 1
            first, count = int(self._first[volume]), int(self._counts[volume])
            ahead = (first + (int(rows[place]) - first + k) % count for k in range(1, count))
            rows[place] = next((row for row in ahead if row not in taken), rows[place])
            taken.add(int(rows[place]))
        return rows


def scatter(places: np.ndarray, n: int, seeds: list[int]) -> np.ndarray:
    """What stands at some places of a random order of range(n), without drawing the others.

    A Feistel network mixes the bits of each place, which no two places leave alike; what comes out
    beyond `n` goes in again (Black and Rogaway 2002, cycle walking).

    Parameters
    ----------
    places : (k,) integers in [0, n)
    seeds : of the order
    """
    half = np.uint64(((n - 1).bit_length() + 1) // 2)
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence(seeds).generate_state(ROUNDS, np.uint64)
    found = places.astype(np.uint64)
    outside = np.arange(len(found))
    while len(outside):
        left, right = found[outside] >> half, found[outside] & low
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & low)
        found[outside] = (left << half) | right
        outside = outside[found[outside] >= n]
    return found.astype(np.int64)


def halves(store: SliceStore) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one half of the training subjects, and of the other, all sessions of one together.

    By the hash that decides the split, so a new subject moves few of the others.

    Raises
    ------
    ValueError : fewer than two training subjects
    """
    x, y = map(rows_of, _half_spans(store))
    return x, y


def training_sessions(store: SliceStore, strict: bool = False) -> dict[str, list[dict[str, Any]]]:
    """The sessions that training draws `t1w` and `t2w` from: all, or with `strict` a half each.

    Raises
    ------
    ValueError : fewer than two training subjects, with `strict`
    """
    training = paired_subjects(store, "train")
    if not strict:
        return {"t1w": training, "t2w": training}
    people = {(s["dataset"], s["subject"]) for s in training}
    if len(people) < 2:
        raise ValueError(f"{store.folder}: has {len(people)} training subjects, --strict-unpaired "
                         "needs two at least")
    ordered = sorted(people, key=lambda person: (split_value(*person), person))
    first = set(ordered[:len(ordered) // 2])
    return {name: [s for s in training if ((s["dataset"], s["subject"]) in first) == wanted]
            for name, wanted in (("t1w", True), ("t2w", False))}


def _half_spans(store: SliceStore) -> tuple[np.ndarray, np.ndarray]:
    """The rows of `halves` as `spans_of`."""
    x, y = map(spans_of, training_sessions(store, strict=True).values())
    return x, y


def to_tensor(slices: np.ndarray) -> Tensor:
    """(N, H, W) float16 of the store to (N, 1, H, W) float32."""
    # torch widens 15 times as fast as NumPy does
    return torch.from_numpy(np.array(slices)).float()[:, None]


def shown(slices: Tensor, rows: np.ndarray, contrast: str, standard: StandardRows | None) -> Tensor:
    """Rows of a store (N, 1, H, W) in [-1, 1] as nets are shown them: with a standard histogram.

    Parameters
    ----------
    rows : (N,) which of the store they are
    contrast : "t1w" or "t2w"
    standard : None leaves them as they are
    """
    if standard is None or contrast not in standard.standard.wanted:
        return slices
    found = slices.clone()
    standard.show(found.numpy()[:, 0], rows, contrast)
    return found


def paired_subjects(store: SliceStore, split: str) -> list[dict[str, Any]]:
    """The rows of `subjects.tsv` in a split, for `paired_slices`."""
    store.spans(split)  # refuses an unknown split
    return [store.subjects[place] for place in np.flatnonzero(store.subjects.splits == split)]


def numbered(store: SliceStore, subject: dict[str, Any],
             ) -> Iterator[tuple[np.ndarray, tuple[Tensor, Tensor, Tensor]]]:
    """`paired_slices` with the rows (N,) of the store that they are."""
    first = subject["first_row"]
    for batch in paired_slices(store, subject):
        yield np.arange(first, first + len(batch[0])), batch
        first += len(batch[0])


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
