"""Brain masks: from HD-BET, from deepbet, from a given mask, or from an already extracted volume.

Owns how a mask is found and whether it can be a brain. A mask is (I, J, K) bool on T1w's own grid;
T2w, registered, shares it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from data.volume import NEGATIVE_SHARE, Volume, grid_of, read_volume, resample, same_grid

METHODS = ("hd-bet", "deepbet", "mask", "none")
ADULT_ML = (800.0, 2000.0)  # brains of adults, with room for atrophy and for the cortical CSF
MAX_STRAY_SHARE = 0.1  # of a mask may lie apart from its largest piece
Extractor = Callable[[Volume], np.ndarray]


def make_extractor(method: str, *, device: str = "cpu") -> Extractor:
    """Load what a method needs, once for all subjects.

    Parameters
    ----------
    method : "hd-bet", "hd-bet+tta" (with test-time augmentation: the mean over eight mirrored
        volumes, eight times as long), "deepbet" or "none" ("mask" is read by `given_mask`, it is a
        file's business)
    device : "cpu" or "cuda[:K]", for the two that run a network

    Returns
    -------
    A function from a T1w `Volume` to its brain, (I, J, K) bool

    Raises
    ------
    ValueError : the method's package or its weights are missing (says how to get them)
    """
    if method == "none":
        return nonzero_mask
    if method == "deepbet":
        return _deepbet(device)
    if method in ("hd-bet", "hd-bet+tta"):
        from data import hdbet

        return hdbet.make_extractor(device, tta=method == "hd-bet+tta")
    raise ValueError(f"brain extraction '{method}' is unknown; choose one of {', '.join(METHODS)}")


def nonzero_mask(volume: Volume) -> np.ndarray:
    """The brain of an already extracted volume: where it is not zero, holes filled.

    The few values below zero that interpolation leaves around an extracted brain are background;
    where more than 2 % are negative the volume was standardised, and only exact zeros are.
    """
    return ndimage.binary_fill_holes(signal_mask(volume))


def signal_mask(volume: Volume) -> np.ndarray:
    """(I, J, K) bool: where an extracted volume has signal at all (`nonzero_mask`, holes open)."""
    nonzero = volume.data != 0
    negative = volume.data < 0
    leftovers = negative.sum() <= NEGATIVE_SHARE * max(int(nonzero.sum()), 1)
    return nonzero & ~negative if leftovers else nonzero


def given_mask(path: Path, t1w: Volume) -> np.ndarray:
    """Read a mask file (brain > 0) and bring it onto T1w's grid, nearest neighbour.

    Raises
    ------
    ValueError, FileNotFoundError : as `read_volume`, and where the mask does not meet T1w
    """
    mask = read_volume(path)
    if same_grid(grid_of(mask), grid_of(t1w)):
        return mask.data > 0.5
    moved = resample(mask.data > 0.5, mask.affine, grid_of(t1w), nearest=True)
    if not moved.any():
        raise ValueError(f"{path}: does not overlap {t1w.path}; the mask belongs to another scan")
    return moved


def looks_extracted(volume: Volume, limits_ml: tuple[float, float] = ADULT_ML) -> bool:
    """Whether a volume is a brain on empty background: its signal fills a brain's room."""
    mask = nonzero_mask(volume)
    rim = np.concatenate([mask[[0, -1]].ravel(), mask[:, [0, -1]].ravel(),
                          mask[:, :, -1].ravel()])  # the neck leaves through k = 0
    size_ml = float(mask.sum()) * volume.voxel_ml
    return limits_ml[0] <= size_ml <= limits_ml[1] and float(rim.mean()) < 0.2


def judge_mask(mask: np.ndarray, t1w: Volume, *,
               limits_ml: tuple[float, float] = ADULT_ML) -> tuple[np.ndarray, float]:
    """Accept a mask as a brain or say why not.

    Parameters
    ----------
    mask : (I, J, K) bool
    t1w : the volume it belongs to
    limits_ml : smallest and largest brain believed

    Returns
    -------
    mask : its largest connected piece
    brain_ml : that piece's volume in millilitres

    Raises
    ------
    ValueError : a mask too small or too large, in pieces, or reaching all sides of the volume
    """
    pieces, count = ndimage.label(mask)
    if count > 1:
        sizes = np.bincount(pieces.ravel())[1:]
        stray = 1 - sizes.max() / sizes.sum()
        if stray > MAX_STRAY_SHARE:
            raise ValueError(f"{t1w.path}: brain mask is in pieces ({stray:.0%} apart from the "
                             "largest); look at it, or give one with --brain-extraction mask")
        mask = pieces == 1 + int(sizes.argmax())
    brain_ml = float(mask.sum()) * t1w.voxel_ml
    low, high = limits_ml
    if not low <= brain_ml <= high:
        raise ValueError(f"{t1w.path}: brain mask has {brain_ml:.0f} ml, believed are {low:.0f} to "
                         f"{high:.0f}; look at it, or widen with --brain-ml")
    sides = [mask.take(end, axis=axis).any() for axis in range(3) for end in (0, -1)]
    if all(sides):
        raise ValueError(f"{t1w.path}: brain mask touches all six sides of the volume; "
                         "it is no brain, choose another --brain-extraction")
    return mask, brain_ml


def _deepbet(device: str) -> Extractor:
    """deepbet (Fisch et al. 2024); its weights are part of its package."""
    try:
        from deepbet.bet import BrainExtraction
    except ImportError as error:
        raise ValueError(f"brain extraction deepbet: {error}; pip install '.[deepbet]'") from None
    with warnings.catch_warnings():  # torch.jit.load is deprecated, and that is deepbet's business
        warnings.simplefilter("ignore", FutureWarning)
        network = BrainExtraction(no_gpu=device == "cpu")

    def extract(volume: Volume) -> np.ndarray:
        image = nib.Nifti1Image(volume.data, volume.affine)
        try:
            mask = network.run(image)[1]
        except (AssertionError, ValueError, RuntimeError) as error:  # found nothing like a head
            raise ValueError(f"{volume.path}: deepbet found no brain ({error}); "
                             "look at the scan") from None
        return np.asarray(mask.dataobj) > 0

    return extract
