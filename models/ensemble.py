"""Several looks at one stack of slices: mirrored and shifted, undone after, averaged or compared.

A net answers a mirrored or shifted slice a little otherwise. The mean of such answers is smoother
(strided convolutions favour every fourth pixel), their scatter says where the net is unsure: of
itself only, not of what training never showed it. Owns the looks and the running figures over them;
what lies between slices is laid out by the caller, who knows the volume.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_SHIFT = 3  # pixels; the nets halve twice, so a shift by 4 would be nothing new to them
PHASES = (0.0, 1 / 3, -1 / 3)


@dataclass(frozen=True)
class Look:
    """One way to show slices to a net.

    Attributes
    ----------
    mirrored : left and right exchanged
    shift : pixels down and to the right
    phase : where between its neighbours each slice is cut, in slices, -0.5 to 0.5
    """

    mirrored: bool = False
    shift: tuple[int, int] = (0, 0)
    phase: float = 0.0

    def show(self, slices: np.ndarray) -> np.ndarray:
        """(n, H, W) as the net shall see them.

        What a shift pushes out comes in at the other side, so that `undo` loses nothing; it is
        background, but for a brain that fills the frame.
        """
        slices = slices[:, :, ::-1] if self.mirrored else slices
        return np.ascontiguousarray(np.roll(slices, self.shift, axis=(1, 2)))

    def undo(self, slices: np.ndarray) -> np.ndarray:
        """The inverse of `show`."""
        slices = np.roll(slices, tuple(-s for s in self.shift), axis=(1, 2))
        return np.ascontiguousarray(slices[:, :, ::-1] if self.mirrored else slices)


def draw_looks(count: int, *, between: bool, seed: int = 0) -> list[Look]:
    """Choose looks: the plain one first, then mirrored and plain ones in turns, each shifted.

    Parameters
    ----------
    count : how many, at least 1; the first few of many are those of few
    between : whether slices may be cut between their places (the scan must be finer than they are,
        or the interpolation would blur it)
    seed : of the shifts
    """
    steps = range(-MOST_SHIFT, MOST_SHIFT + 1)
    shifts = [(down, right) for down in steps for right in steps if down or right]
    order = np.random.default_rng(seed).permutation(len(shifts))
    looks = [Look()]
    for number in range(1, count):
        phase = PHASES[number % len(PHASES)] if between else 0.0
        looks.append(Look(number % 2 == 1, shifts[order[number // 2 % len(order)]], phase))
    return looks


class Scatter:
    """Mean and standard deviation of arrays that come one by one (Welford 1962)."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: np.ndarray = np.zeros(0)
        self._squares: np.ndarray = np.zeros(0)

    def add(self, values: np.ndarray) -> None:
        """Take one more array, of the same shape as those before."""
        self.count += 1
        if self.count == 1:
            self._mean, self._squares = values.astype(np.float32), np.zeros(values.shape, "f4")
            return
        away = values - self._mean
        self._mean += away / self.count
        self._squares += away * (values - self._mean)

    @property
    def mean(self) -> np.ndarray:
        """Mean of all arrays so far, float32."""
        return self._mean

    @property
    def sd(self) -> np.ndarray:
        """Standard deviation (n - 1) of all arrays so far, float32; needs two."""
        return np.sqrt(self._squares / (self.count - 1))
