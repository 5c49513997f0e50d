"""What a run looks at after each epoch: figures of the validation subjects, and pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.slices import numbered, paired_subjects, shown, to_tensor
from data.store import SliceStore
from losses.quality import correlation, mae, psnr_db, ssim
from report import progress
from training import Training


@torch.no_grad()
def validate(t: Training, store: SliceStore,
             stopped: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """Judge the averaged G and F on the paired validation subjects, in the brain (collective).

    SSIM, PSNR, correlation with the real target; distance to the input over the real target's
    (`copy_ratio`), and the share of generated signal `outside` the brain. Two figures need no
    pairs: `cycle_error` (MAE of what comes back) and `histogram_distance` (mean difference between
    the quantiles of a translation's intensities and of the training slices of that contrast, the
    1-D Wasserstein distance); all on [0, 1] images.

    Inputs are as the nets are shown them, targets as they are stored. Subjects are shared out among
    the processes and their figures gathered, so the result does not depend on how many there are.
    Mean over a subject's slices, then over subjects; {} without any, and on other ranks than 0.
    Left unfinished, so of no use, once it is `stopped`.

    Raises
    ------
    FloatingPointError : a figure is not finite: no epoch could be better than the first
    """
    subjects: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for session in paired_subjects(store, "val"):
        subjects.setdefault((session["dataset"], session["subject"]), []).append(session)
    rank, world = t.process.rank, t.process.world
    mine = [(i, _validate_subject(t, store, sessions))
            for i, sessions in enumerate(subjects.values())
            if i % world == rank and not stopped()]
    lost = [(list(subjects.values())[i], sorted(name for name, value in found.items()
                                                if not np.isfinite(value))) for i, found in mine]
    t.complain(next((f"validation of {_files(sessions)} at step {t.step}: {', '.join(names)} not "
                     "finite" for sessions, names in lost if names), ""),
               "look at these scans and make their slices again, or try --precision fp32")
    parts = dict(pair for part in t.process.gather(mine) for pair in part)
    figures = [parts[i] for i in sorted(parts)]
    names = figures[0] if figures else ()
    return {name: float(np.mean([f[name] for f in figures])) for name in names}


def check_masks(store: SliceStore) -> None:
    """Refuse validation slices without a brain, before the first epoch is trained.

    Raises
    ------
    ValueError : a slice has none; names its row
    """
    for session in paired_subjects(store, "val"):
        rows = np.arange(session["first_row"], session["first_row"] + session["n_slices"])
        empty = rows[~store.mask(rows).any(axis=(1, 2))]
        if len(empty):
            raise ValueError(f"{store.folder / 'mask.npy'}: no brain in row {empty[0]} "
                             f"({session['id']}), a validation slice; delete the store and run "
                             "preprocess.py again")


def _files(sessions: list[dict[str, Any]]) -> str:
    return "; ".join(f"{s['dataset']} {s['t1w']}, {s['t2w']}" for s in sessions)


def _validate_subject(t: Training, store: SliceStore,
                      sessions: list[dict[str, Any]]) -> dict[str, float]:
    figures: dict[str, list[float]] = {}
    intensities: dict[str, list[Tensor]] = {"t2w": [], "t1w": []}
    for rows, (real_x, real_y, mask) in (b for s in sessions for b in numbered(store, s)):
        given_x, given_y = (shown(real, rows, contrast, t.standard) for real, contrast in
                            ((real_x, "t1w"), (real_y, "t2w")))
        real_x, real_y, given_x, given_y, mask = (
            v.to(t.process.device) for v in (real_x, real_y, given_x, given_y, mask))
        with t.autocast():
            fake_y, fake_x = t.ema.G(given_x), t.ema.F(given_y)
            cycled_x, cycled_y = t.ema.F(fake_y), t.ema.G(fake_x)
        for name, fake, real, given, cycled in (("t2w", fake_y, real_y, given_x, cycled_x),
                                                ("t1w", fake_x, real_x, given_y, cycled_y)):
            intensities[name].append(fake[mask].float().cpu())
            fake, real, given, cycled = ((v.float() + 1) / 2 for v in (fake, real, given, cycled))
            signal_all = fake.sum((1, 2, 3)).clamp(min=1e-6)
            measured = {
                "ssim": ssim(fake, real, mask),
                # a perfect slice would be infinitely good
                "psnr_db": psnr_db(fake, real, mask).clamp(max=100),
                "correlation": correlation(fake, real, mask),
                "copy_ratio": mae(fake, given, mask) / mae(real, given, mask).clamp(min=1e-6),
                "outside": (fake * ~mask).sum((1, 2, 3)) / signal_all,
                "cycle_error": mae(cycled, given, mask),
            }
            for what, values in measured.items():
                figures.setdefault(f"{name}_{what}", []).extend(values.tolist())
    for name, wanted in t.quantiles.items():
        shares = np.linspace(0, 1, len(wanted))
        there = np.quantile(torch.cat(intensities[name]).numpy(), shares)
        distance = np.abs(there - wanted.cpu().numpy()).mean() / 2  # of [0, 1] images
        figures[f"{name}_histogram_distance"] = [float(distance)]
    return {name: float(np.mean(values)) for name, values in figures.items()}


def fixed_rows(store: SliceStore, count: int) -> np.ndarray:
    """`count` rows of the store, spread over the validation subjects: the same each time."""
    rows = store.rows("val")
    rows = rows if len(rows) else store.rows("train")
    return rows[np.linspace(0, len(rows) - 1, count + 2).astype(int)[1:-1]]


def as_shown(t: Training, store: SliceStore, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """T1w and T2w of these rows (N, 1, H, W), as the nets are shown them, on their device."""
    x, y = (shown(to_tensor(a[rows]), rows, contrast, t.standard).to(t.process.device)
            for a, contrast in ((store.t1w, "t1w"), (store.t2w, "t2w")))
    return x, y


@torch.no_grad()
def sample_grid(t: Training, store: SliceStore, count: int = 4) -> Tensor:
    """Draw the same `count` slices each epoch as one picture (3, H, W) in [0, 1], a row a slice.

    Columns: T1w, translated, cycled, identity, then T2w, translated, cycled, identity.
    """
    from torchvision.utils import make_grid  # whose import would delay the first step

    real_x, real_y = as_shown(t, store, fixed_rows(store, count))
    with t.autocast():
        fake_y, fake_x = t.ema.G(real_x), t.ema.F(real_y)
        picture = torch.stack([real_x, fake_y, t.ema.F(fake_y), t.ema.F(real_x),
                               real_y, fake_x, t.ema.G(fake_x), t.ema.G(real_y)], dim=1)
    return make_grid(picture.flatten(0, 1).float().cpu(), nrow=8, value_range=(-1, 1),
                     normalize=True, pad_value=0.3)


@torch.no_grad()
def look(t: Training, store: SliceStore, kept_slices: int = 3,
         counted: int = 32) -> progress.Moment:
    """What the averaged nets make of the same slices each epoch, for the pictures of progress.

    Parameters
    ----------
    kept_slices : slices that are kept
    counted : slices whose intensities in the brain are counted
    """
    def to_bytes(slices: Tensor) -> np.ndarray:
        return ((slices.float() + 1) * 127.5).round().byte().cpu().numpy()[:, 0]

    def count(slices: Tensor, inside: Tensor) -> np.ndarray:
        values = (slices.float().cpu()[inside] + 1) / 2
        return np.histogram(values.numpy(), progress.BINS, (0, 1))[0]

    real_x, real_y = as_shown(t, store, fixed_rows(store, kept_slices))
    with t.autocast():
        fake_y, fake_x = t.ema.G(real_x), t.ema.F(real_y)
        kept = {"t1w": real_x, "to_t2w": fake_y, "t1w_again": t.ema.F(fake_y),
                "t2w": real_y, "to_t1w": fake_x, "t2w_again": t.ema.G(fake_x)}
    counts = np.zeros((4, progress.BINS), np.int64)
    for row in np.array_split(fixed_rows(store, counted), max(counted // 8, 1)):
        inside = torch.from_numpy(store.mask(row))[:, None]
        real_x, real_y = as_shown(t, store, row)
        with t.autocast():
            every = (real_x, t.ema.F(real_y), real_y, t.ema.G(real_x))
        counts += np.stack([count(slices, inside) for slices in every])
    return progress.Moment(step=t.step, epoch=t.epoch + 1, t1w_counts=counts[:2],
                           t2w_counts=counts[2:], **{k: to_bytes(v) for k, v in kept.items()})
