"""Pictures of slices and figures of results, as PNG and SVG; drawn off screen."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

mpl.rcParams["text.parse_math"] = False  # names of files and subjects may hold a $
COLOURS = ("tab:blue", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:cyan")


@dataclass(frozen=True)
class Picture:
    """A figure in two formats: equal figures are equal bytes in both."""

    png: bytes
    svg: bytes


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


def examples(chosen: Sequence[Example], source_name: str, target_name: str) -> Picture:
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
    return _render(figure)


def subject_plot(values: Mapping[str, Mapping[str, Sequence[float]]], labels: Sequence[str],
                 unit: str) -> Picture:
    """Draw each subject's figure, a panel a direction, models as dots and references as lines.

    Parameters
    ----------
    values : direction to name to one value a subject; names that end in "*" are references
    labels : the subjects' ids
    unit : of the vertical axis
    """
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    places = np.arange(len(labels))
    for axis, (direction, series) in zip(figure.subplots(1, len(values), squeeze=False)[0],
                                         values.items()):
        models = [name for name in series if not name.endswith("*")]
        for i, name in enumerate(models):
            shift = 0.12 * (i - (len(models) - 1) / 2)
            axis.plot(places + shift, series[name], "o", label=name,
                      color=COLOURS[i % len(COLOURS)])
        references = [name for name in series if name.endswith("*")]
        for name, marker, grey in zip(references, "x_1", ("0.3", "0.5", "0.65")):
            axis.plot(places, series[name], marker, label=name[:-1], color=grey)
        axis.set_title(direction, fontsize=10)
        axis.set_ylabel(unit)
        # many names would print over each other
        step = max(1, len(labels) // 12)
        axis.set_xticks(places[::step], [labels[i] for i in places[::step]], rotation=30,
                        ha="right", fontsize=7)
        axis.set_xlim(-0.6, len(labels) - 0.4)
        axis.legend(fontsize=7)
    return _render(figure)


def histograms(counts: Mapping[str, np.ndarray]) -> Picture:
    """Draw intensities in the brain, a panel a direction: real filled, translated as a line.

    Parameters
    ----------
    counts : direction to (2, bins), real and translated, in equal bins over [0, 1]
    """
    figure = Figure(figsize=(9.6, 2.8), layout="constrained")
    for axis, (direction, pair) in zip(figure.subplots(1, len(counts), squeeze=False)[0],
                                       counts.items()):
        shares = pair / np.maximum(pair.sum(axis=1, keepdims=True), 1)
        edges = np.linspace(0, 1, pair.shape[1] + 1)
        axis.stairs(shares[0], edges, fill=True, color="0.75", label="real")
        axis.stairs(shares[1], edges, color="tab:red", linewidth=1.4, label="translated")
        axis.set(xlim=(0, 1), yticks=[], xlabel="intensity in the brain", title=direction)
        axis.legend(fontsize=8, frameon=False)
    return _render(figure)


def curves(panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> Picture:
    """Draw lines over training steps: panel to line to (steps, values)."""
    figure = Figure(figsize=(9.6, 2.7 * -(-len(panels) // 2)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).ravel()
    for axis, (title, lines) in zip(axes, panels.items()):
        for name, (steps, values) in lines.items():
            axis.plot(steps, values, label=name, linewidth=1, marker="." if len(steps) < 3 else "")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
    for axis in axes[len(panels):]:
        axis.set_axis_off()
    return _render(figure)


def differences(values: Mapping[str, Mapping[str, tuple[float, float, float]]],
                title: str) -> Picture:
    """Draw differences of two models with their intervals, a panel a direction.

    Parameters
    ----------
    values : direction to metric to (mean, low, high), in units of the metric's SD over subjects
    title : which models
    """
    most = max(map(len, values.values()))
    figure = Figure(figsize=(9.6, 1.1 + 0.32 * most), layout="constrained")
    figure.suptitle(title, fontsize=9)
    for axis, (direction, metrics) in zip(figure.subplots(1, len(values), squeeze=False)[0],
                                          values.items()):
        places = np.arange(len(metrics))[::-1]
        for place, (mean, low, high) in zip(places, metrics.values()):
            axis.plot((low, high), (place, place), color="tab:blue")
            axis.plot(mean, place, "o", color="tab:blue")
        axis.axvline(0, color="0.6", linewidth=0.8)
        axis.set_yticks(places, list(metrics), fontsize=8)
        axis.set_title(direction, fontsize=10)
        axis.set_xlabel("difference / SD over subjects", fontsize=8)
    return _render(figure)


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


def _render(figure: Figure) -> Picture:
    out = io.BytesIO()
    # fixed names inside and no date: equal figures are equal bytes
    with mpl.rc_context({"svg.hashsalt": "t1w-t2w", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(_png(figure), out.getvalue())


def _png(figure: Figure, dots_per_inch: int = 100) -> bytes:
    """Render without a window; no program name inside, so equal figures are equal bytes."""
    out = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(out, format="png", dpi=dots_per_inch, metadata={"Software": None})
    return out.getvalue()
