"""The scanner's uneven brightness (bias field): estimated and divided out by N4.

Not done by default: it takes some seconds a volume, and what it takes out cannot be put back from
the store's record. What it changes for training: benchmarks/RECIPES.md.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import SimpleITK as sitk

CORRECTIONS = ("none", "n4")
# The field is smooth: voxels of 8 mm find it as those of 3 mm do, in a tenth of the time.
COARSE_MM = 8.0
ITERATIONS, CONVERGED = (50, 50, 30), 1e-4
# A few voxels below zero are leftovers of somebody's interpolation; more means that zero is no
# longer "no signal" (a z-scored volume, say).
NEGATIVE_SHARE = 0.02
FEWEST = 500  # coarse voxels of brain below which no field can be told from anatomy


def bias_correction_of(record: dict[str, Any]) -> str:
    """How a store's or a checkpoint's volumes were corrected: of `CORRECTIONS`."""
    return record.get("intensity", {}).get("bias_correction", "none")


def correct_n4(data: np.ndarray, mask: np.ndarray, spacing_mm: np.ndarray, *,
               path: str | os.PathLike = "the volume") -> np.ndarray:
    """Divide a volume by its bias field (N4: Tustison et al., IEEE TMI 2010; SimpleITK's).

    Parameters
    ----------
    data : (I, J, K) float32, scanner units; only positive voxels of the brain are looked at
    mask : (I, J, K) bool, the brain
    spacing_mm : (3,) voxel size

    Returns
    -------
    corrected : (I, J, K) float32 in the same units: the field's geometric mean in the brain is 1

    Raises
    ------
    ValueError : values below zero in the brain (a field multiplies, so zero must be no signal), too
        little brain, or no field that is one (says which file)
    """
    def image(array: np.ndarray) -> sitk.Image:
        made = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
        made.SetSpacing([float(mm) for mm in spacing_mm])
        return made

    inside = mask & (data > 0)
    negative = float((data[mask] < 0).mean()) if mask.any() else 0.0
    if negative > NEGATIVE_SHARE:
        raise ValueError(f"{path}: {negative:.0%} of the brain is below zero, so zero is not \"no "
                         "signal\" and N4 cannot tell a field; take --bias-correction none")
    whole = image(np.asarray(data, np.float32))
    steps = [max(1, min(round(COARSE_MM / mm), n // 4)) for mm, n in zip(spacing_mm, data.shape)]
    coarse, coarse_mask = (sitk.Shrink(each, steps)
                           for each in (whole, image(inside.astype(np.uint8))))
    found = int(sitk.GetArrayViewFromImage(coarse_mask).sum())
    if found < FEWEST:
        raise ValueError(f"{path}: {found} voxels of {COARSE_MM:g} mm of brain are too few for "
                         f"--bias-correction n4 (at least {FEWEST}); take none")
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetNumberOfThreads(1)  # workers share the cores, and sums in one order give the same bytes
    n4.SetMaximumNumberOfIterations(ITERATIONS)
    n4.SetConvergenceThreshold(CONVERGED)
    try:
        n4.Execute(coarse, coarse_mask)
    except RuntimeError as error:  # of ITK
        raise ValueError(f"{path}: N4 failed ({str(error).splitlines()[-1].strip()}); take "
                         "--bias-correction none") from None
    log_field = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(whole)).T
    if not np.isfinite(log_field[inside]).all():
        raise ValueError(f"{path}: N4 finds no bias field; take --bias-correction none")
    return (data / np.exp(log_field - log_field[inside].mean())).astype(np.float32)
