"""The page on which a user sees whether preprocessing did what it should, subject by subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from report import figures, page

SHEET = 8  # subjects in one picture
COLUMNS = {"id": "subject", "split": "split", "n_slices": "slices", "brain_ml": "brain (ml)",
           "brain_extraction": "brain by", "registration": "T2w placed by",
           "translation_mm": "moved (mm)", "rotation_deg": "turned (deg)", "mi_before": "MI before",
           "mi_after": "MI after", "t2w_coverage": "T2w covers", "cut_share": "cut off",
           "note": "note"}


@dataclass(frozen=True)
class Shown:
    """One subject of the page: its row of `subjects.tsv`, and some slices (n, H, W) in [0, 1]."""

    row: dict[str, str]
    t1w: np.ndarray
    t2w: np.ndarray
    mask: np.ndarray


def suspicion(row: dict[str, str]) -> str:
    """Why a subject deserves a look, "" where nothing stands out."""
    reasons = [row["note"]] if row["note"] else []
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
    ordered = sorted(shown, key=lambda s: (not suspicion(s.row), s.row["id"]))
    parts = [page.paragraph(
        f"{len(shown)} sessions kept, {len(skipped)} skipped. Each strip shows T1w with the brain "
        "mask's outline, T2w, and a checkerboard of both: edges run on across the tiles where the "
        "two are aligned. Subjects that deserve a look come first.")]
    parts += [page.paragraph(f"{s.row['id']}: {suspicion(s.row)}", "warning")
              for s in ordered if suspicion(s.row)]
    for first in range(0, len(ordered), SHEET):
        strips = [(f"{s.row['id']}   {s.row['split']}   {s.row['brain_ml']} ml   "
                   f"{s.row['registration']}", s.t1w, s.t2w, s.mask)
                  for s in ordered[first:first + SHEET]]
        parts.append(page.picture(figures.contact_sheet(strips), "T1w, T2w and checkerboard"))
    parts += [page.heading("Figures"),
              page.table(tuple(COLUMNS.values()), [[s.row[c] for c in COLUMNS] for s in ordered])]
    if skipped:
        parts += [page.heading("Skipped"),
                  page.table(("subject", "reason"), [[i, skipped[i]] for i in sorted(skipped)])]
    return page.page(title, parts)
