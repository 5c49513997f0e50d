"""The page on which a user sees whether preprocessing did what it should, subject by subject."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from report import figures, page

SHEET = 8  # subjects in one picture
MOST = 240  # subjects drawn, suspicious ones first; all others are in the table
SLICES = 4  # drawn of a subject
BINS = 40  # of the histograms
ALIKE = 0.6  # T1w and T2w of one brain correlate less than that by far
COLUMNS = {"id": "subject", "split": "split", "n_slices": "slices", "brain_ml": "brain (ml)",
           "brain_extraction": "brain by", "registration": "T2w placed by",
           "translation_mm": "moved (mm)", "rotation_deg": "turned (deg)", "mi_before": "MI before",
           "mi_after": "MI after", "t2w_coverage": "T2w covers", "cut_share": "cut off",
           "note": "note"}


Stacks = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Shown:
    """One subject of the page.

    Attributes
    ----------
    row : of `subjects.tsv`
    read : gives T1w, T2w (n, H, W) in [-1, 1] and the mask (n, H, W) bool; not kept in memory
    t1w_counts, t2w_counts : the brain's intensities, in equal bins over [0, 1]
    alike : correlation of T1w and T2w inside the brain
    """

    row: dict[str, str]
    read: Callable[[], Stacks]
    t1w_counts: np.ndarray
    t2w_counts: np.ndarray
    alike: float


def look_at(row: dict[str, str], read: Callable[[], Stacks]) -> Shown:
    """Take the figures of a subject that the page needs; see `Shown`."""
    t1w, t2w, mask = read()
    x, y = ((array[mask].astype(np.float32) + 1) / 2 for array in (t1w, t2w))
    x_counts, y_counts = (np.histogram(v, bins=BINS, range=(0, 1))[0] for v in (x, y))
    alike = float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else 0.0
    return Shown(row, read, x_counts, y_counts, alike)


def suspicion(row: dict[str, str], alike: float = 0.0) -> str:
    """Why a subject deserves a look, "" where nothing stands out."""
    reasons = [row["note"]] if row["note"] else []
    if alike > ALIKE:
        reasons.append(f"T2w looks like T1w (correlation {alike:.2f}): is it a T2w?")
    if float(row["t2w_coverage"]) < 0.98:
        reasons.append(f"T2w covers {float(row['t2w_coverage']):.0%} of the brain")
    if float(row["cut_share"]) > 0.005:
        reasons.append(f"{float(row['cut_share']):.1%} of the brain lies outside the frame")
    if float(row["translation_mm"]) > 10 or float(row["rotation_deg"]) > 10:
        reasons.append(f"T2w moved {float(row['translation_mm']):.0f} mm and "
                       f"{float(row['rotation_deg']):.0f} degrees")
    return "; ".join(reasons)


def preprocessing_page(shown: Sequence[Shown], skipped: dict[str, str], title: str) -> str:
    """Tables and contact sheets, suspicious subjects first.

    Parameters
    ----------
    shown : the subjects
    skipped : id to reason
    title : of the page
    """
    reasons = {s.row["id"]: suspicion(s.row, s.alike) for s in shown}
    ordered = sorted(shown, key=lambda s: (not reasons[s.row["id"]], s.row["id"]))
    parts = [page.paragraph(
        f"{len(shown)} sessions kept, {len(skipped)} skipped, "
        f"{sum(int(s.row['n_slices']) for s in shown)} slices of each contrast. Each strip shows "
        "T1w with the brain mask's outline, T2w, a checkerboard of both (edges run on across the "
        "tiles where the two are aligned), and the intensities inside the brain. Subjects that "
        "deserve a look come first.")]
    if len(shown) > MOST:
        parts.append(page.paragraph(f"The first {MOST} are drawn, the table has all.", "note"))
    parts += [page.paragraph(f"{s.row['id']}: {reasons[s.row['id']]}", "warning")
              for s in ordered if reasons[s.row["id"]]]
    for first in range(0, min(len(ordered), MOST), SHEET):
        strips = [_strip(s) for s in ordered[first:min(first + SHEET, MOST)]]
        parts.append(page.picture(figures.contact_sheet(strips),
                                  "T1w, T2w, checkerboard and histograms"))
    parts += [page.heading("Figures"),
              page.table(tuple(COLUMNS.values()), [[s.row[c] for c in COLUMNS] for s in ordered])]
    if skipped:
        parts += [page.heading("Skipped"),
                  page.table(("subject", "reason"), [[i, skipped[i]] for i in sorted(skipped)])]
    return page.page(title, parts)


def _strip(shown: Shown) -> figures.Strip:
    t1w, t2w, mask = shown.read()
    places = (np.linspace(0.1, 0.9, SLICES) * (len(t1w) - 1)).astype(int)
    x, y = ((array[places].astype(np.float32) + 1) / 2 for array in (t1w, t2w))
    row = shown.row
    caption = (f"{row['id']}   {row['split']}   {row['n_slices']} slices   {row['brain_ml']} ml   "
               f"{row['registration']}")
    return figures.Strip(caption, x, y, mask[places], shown.t1w_counts, shown.t2w_counts)
