"""What the nets make of the same few slices while they learn: kept small, shown as moving pictures.

`train.py` keeps a `Moment` each epoch in the run's `progress/` folder; the GIFs are made of those
files alone, at the end of a run or whenever they are asked for.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# what is synthesised, what from
DIRECTIONS = {"t1w": ("T1w", "T2w"), "t2w": ("T2w", "T1w")}
BINS = 64
FRAMES = 60  # of a GIF: of more epochs evenly spaced ones, the first and the last among them
COLOURS = 64
SHOWN_MS, LAST_MS = 150, 2500  # of a frame, of the last one
PANEL = 128  # pixels that a slice takes at least
_DOTS = 100  # per inch
_PLOT, _HEAD = 300, 44  # pixels: the histogram's width, the room for titles


@dataclass(frozen=True)
class Moment:
    """What the nets made of the fixed slices at one step.

    Attributes
    ----------
    step, epoch : steps done, and the epoch (from 1) they ended in
    t1w, t2w : the real slices, (n, H, W) uint8, 0 to 255 for intensities 0 to 1
    to_t2w, t1w_again : G(T1w) and F of that, alike
    to_t1w, t2w_again : F(T2w) and G of that, alike
    t1w_counts, t2w_counts : (2, 64) int64, intensities in the brain, real and generated, in equal
        bins over [0, 1]; of more slices than are shown
    """

    step: int
    epoch: int
    t1w: np.ndarray
    to_t2w: np.ndarray
    t1w_again: np.ndarray
    t2w: np.ndarray
    to_t1w: np.ndarray
    t2w_again: np.ndarray
    t1w_counts: np.ndarray
    t2w_counts: np.ndarray

    def counts(self) -> Mapping[str, np.ndarray]:
        """The histograms by name."""
        return {f"{domain}_{kind}": counts for domain in DIRECTIONS
                for kind, counts in zip(("real", "generated"), getattr(self, f"{domain}_counts"))}


def path_of(run: Path, step: int) -> Path:
    """Where a moment of a run is kept."""
    return run / "progress" / f"step_{step:08d}.npz"


def pack(moment: Moment) -> bytes:
    """A moment as the bytes of an `.npz` file: equal moments are equal bytes."""
    out = io.BytesIO()
    values: dict[str, Any] = {f.name: getattr(moment, f.name) for f in fields(Moment)}
    np.savez_compressed(out, **values)
    return out.getvalue()


def read(path: Path) -> Moment:
    """A moment from its file.

    Raises
    ------
    ValueError : not such a file
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            values = {f.name: found[f.name] for f in fields(Moment)}
        return Moment(**{**values, "step": int(values["step"]), "epoch": int(values["epoch"])})
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it, the others are enough") from None


def make_gif(run: Path, domain: str, frames: int = FRAMES) -> bytes:
    """How translations into a domain became what they are, as the bytes of a GIF.

    Parameters
    ----------
    run : a run's folder
    domain : what is synthesised, "t1w" or "t2w"
    frames : at most so many

    Raises
    ------
    FileNotFoundError, ValueError : nothing is kept there, or it is damaged
    """
    paths = sorted((run / "progress").glob("step_*.npz"))
    if not paths:
        raise FileNotFoundError(f"{run / 'progress'}: nothing kept there; give the --run of a "
                                "training that has finished an epoch")
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(frames, len(paths))).round().astype(int))
    pictures = [Image.fromarray(frame) for frame in
                draw((read(paths[i]) for i in chosen), domain)]
    # one palette, or colours would flicker
    palette = pictures[-1].quantize(COLOURS)
    small = [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures]
    out = io.BytesIO()
    small[0].save(out, "GIF", save_all=True, append_images=small[1:], loop=0, optimize=False,
                  duration=[SHOWN_MS] * (len(small) - 1) + [LAST_MS])
    return out.getvalue()


def draw(moments: Iterator[Moment], domain: str) -> Iterator[np.ndarray]:
    """Draw moments alike, (H, W, 3) uint8: real, translated, cycled, real target, histograms."""
    target, source = DIRECTIONS[domain]
    canvas = None
    for moment in moments:
        stacks = [getattr(moment, name) for name in
                  (f"{source}".lower(), f"to_{domain}", f"{source.lower()}_again", domain)]
        grid = np.concatenate([np.concatenate(list(stack)) for stack in stacks], axis=1)
        scale = -(-PANEL // stacks[0].shape[-1])
        grid = grid.repeat(scale, axis=0).repeat(scale, axis=1)
        counts = getattr(moment, f"{domain}_counts")
        if canvas is None:
            canvas = _Canvas(grid.shape, (f"{source}, real", f"{target}, translated",
                                          f"{source}, cycled", f"{target}, real"), target)
        yield canvas.draw(grid, counts, f"epoch {moment.epoch}, step {moment.step}")


class _Canvas:
    """One figure that is drawn again and again: pixels stay pixels, histograms keep their scale."""

    def __init__(self, shape: tuple[int, ...], names: tuple[str, ...], target: str):
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # a run starts without it
        from matplotlib.figure import Figure

        height, width = max(shape[0], 2 * PANEL) + _HEAD, shape[1] + _PLOT
        self._figure = Figure(figsize=(width / _DOTS, height / _DOTS), dpi=_DOTS)
        self._canvas = FigureCanvasAgg(self._figure)
        self._width, self._shape, self._target = width, shape, target
        slices = self._figure.add_axes((0, 0, shape[1] / width, shape[0] / height))
        slices.set_axis_off()
        self._slices = slices.imshow(np.zeros((*shape, 3), np.uint8), interpolation="nearest",
                                     aspect="auto")
        for i, name in enumerate(names):
            self._figure.text((i + 0.5) * shape[1] / len(names) / width, shape[0] / height, name,
                              ha="center", va="bottom", fontsize=9)
        self._title = self._figure.text((shape[1] + 0.5 * _PLOT) / width, 1 - 8 / height, "",
                                        ha="center", va="top", fontsize=10)
        self._plot = self._figure.add_axes(((shape[1] + 28) / width, 44 / height,
                                            (_PLOT - 44) / width, (height - 44 - 40) / height))
        self._top = 0.0

    def draw(self, grid: np.ndarray, counts: np.ndarray, title: str) -> np.ndarray:
        """One frame."""
        self._slices.set_data(np.stack([grid] * 3, axis=-1))  # as RGB, levels stay exact
        self._title.set_text(title)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        self._top = self._top or 2 * float(shares[0].max()) or 1.0
        edges, plot = np.linspace(0, 1, counts.shape[1] + 1), self._plot
        plot.clear()
        plot.stairs(shares[0], edges, fill=True, color="0.75", label=f"{self._target} real")
        plot.stairs(shares[1], edges, color="tab:red", linewidth=1.4,
                    label=f"{self._target} translated")
        plot.set(xlim=(0, 1), ylim=(0, self._top), yticks=[])
        plot.set_xlabel("intensity in the brain", fontsize=8)
        plot.tick_params(labelsize=7)
        plot.legend(fontsize=8, frameon=False, loc="upper right")
        self._canvas.draw()
        return np.asarray(self._canvas.buffer_rgba())[..., :3].copy()


def histogram(counts: np.ndarray) -> dict[str, Any]:
    """Counts in equal bins over [0, 1] as the arguments of TensorBoard's `add_histogram_raw`."""
    edges = np.linspace(0, 1, len(counts) + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    filled = np.flatnonzero(counts)
    ends = (edges[filled[0]], edges[filled[-1] + 1]) if len(filled) else (0.0, 1.0)
    return {"min": ends[0], "max": ends[1], "num": int(counts.sum()),
            "sum": float(counts @ centres), "sum_squares": float(counts @ centres ** 2),
            "bucket_limits": edges[1:].tolist(), "bucket_counts": counts.tolist()}
