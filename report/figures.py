"""Pictures of slices and figures of results, as PNG bytes; drawn off screen."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Example:
    """One slice to show: all (H, W) float in [0, 1].

    Attributes
    ----------
    title : what makes it worth a look
    source, translated, real : slices
    mask : (H, W) bool, the brain
    caption : figures of the slice
    """

    title: str
    source: np.ndarray
    translated: np.ndarray
    real: np.ndarray
    mask: np.ndarray
    caption: str


def examples(chosen: Sequence[Example], source_name: str, target_name: str) -> bytes:
    """Draw examples in rows: input, translated, real and the error inside the brain (0 to 0.5)."""
    figure = Figure(figsize=(9.6, 2.55 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), 4, squeeze=False)
    names = (f"{source_name} (input)", f"{target_name} translated", f"{target_name} real",
             "absolute error")
    for row, example in zip(axes, chosen):
        pictures = (example.source, example.translated, example.real)
        error = np.where(example.mask, np.abs(example.translated - example.real), 0)
        for axis, picture, name in zip(row, pictures, names):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(name, fontsize=9)
        shown = row[3].imshow(error, cmap="inferno", vmin=0, vmax=0.5, interpolation="nearest")
        row[3].set_title(names[3], fontsize=9)
        figure.colorbar(shown, ax=row[3], fraction=0.046)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(example.title, fontsize=9)
        row[1].set_xlabel(example.caption, fontsize=8)
    return _png(figure)


def subject_plot(values: Mapping[str, Mapping[str, Sequence[float]]], labels: Sequence[str],
                 unit: str) -> bytes:
    """Draw each subject's figure for the model and for the floor, a panel a direction.

    Parameters
    ----------
    values : direction to {"model": one value a subject, "floor": the same}
    labels : the subjects' ids
    unit : of the vertical axis
    """
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    for axis, (direction, series) in zip(figure.subplots(1, len(values), squeeze=False)[0],
                                         values.items()):
        places = np.arange(len(labels))
        axis.plot(places, series["model"], "o", label="translated")
        axis.plot(places, series["floor"], "x", label="copied input (floor)")
        axis.vlines(places, series["floor"], series["model"], linewidth=0.6)
        axis.set_title(direction, fontsize=10)
        axis.set_ylabel(unit)
        # many names would print over each other
        step = max(1, len(labels) // 12)
        axis.set_xticks(places[::step], [labels[i] for i in places[::step]], rotation=30,
                        ha="right", fontsize=7)
        axis.legend(fontsize=8)
    return _png(figure)


@dataclass(frozen=True)
class Strip:
    """A subject in a row of pictures: n slices (n, H, W) in [0, 1] (mask bool), and counts.

    `t1w_counts` and `t2w_counts` are the brain's intensities in equal bins over [0, 1].
    """

    caption: str
    t1w: np.ndarray
    t2w: np.ndarray
    mask: np.ndarray
    t1w_counts: np.ndarray
    t2w_counts: np.ndarray


def contact_sheet(strips: Sequence[Strip]) -> bytes:
    """Draw subjects in rows: T1w with the mask's outline, T2w, a checkerboard, histograms."""
    figure = Figure(figsize=(13.5, 0.2 + 1.35 * len(strips)), layout="constrained")
    axes = figure.subplots(len(strips), 2, squeeze=False, width_ratios=[12, 1.5])
    for (left, right), strip in zip(axes, strips):
        parts = [np.concatenate(list(part), axis=1) for part in (
            strip.t1w, strip.t2w, checkerboard(strip.t1w, strip.t2w))]
        left.imshow(np.concatenate(parts, axis=1), cmap="gray", vmin=0, vmax=1,
                    interpolation="nearest")
        left.contour(np.concatenate(list(strip.mask), axis=1), levels=[0.5], colors="tab:red",
                     linewidths=0.5)
        left.set_title(strip.caption, fontsize=8, loc="left")
        left.set_axis_off()
        for counts, name, colour in ((strip.t1w_counts, "T1w", "tab:blue"),
                                     (strip.t2w_counts, "T2w", "tab:orange")):
            right.stairs(counts, np.linspace(0, 1, len(counts) + 1), color=colour, label=name)
        right.set_yticks([])
        right.tick_params(labelsize=5, length=2)
        right.legend(fontsize=5, frameon=False)
    return _png(figure, dots_per_inch=130)


def checkerboard(first: np.ndarray, second: np.ndarray, tile: int = 16) -> np.ndarray:
    """(n, H, W) of alternating tiles of two stacks: edges run on where the two are aligned."""
    height, width = np.indices(first.shape[1:])
    return np.where((height // tile + width // tile) % 2 == 0, first, second)


def _png(figure: Figure, dots_per_inch: int = 100) -> bytes:
    """Render without a window; no program name inside, so equal figures are equal bytes."""
    out = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(out, format="png", dpi=dots_per_inch, metadata={"Software": None})
    return out.getvalue()
