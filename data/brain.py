"""Brain masks: from HD-BET, from deepbet, from a given mask, or from an already extracted volume.

Owns how a mask is found and whether it can be a brain. A mask is (I, J, K) bool on T1w's own grid;
T2w, registered, shares it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from data.bias import NEGATIVE_SHARE
from data.nifti import NotNow, Volume, read_volume
from data.volume import grid_of, resample, same_grid

METHODS = ("hd-bet", "deepbet", "mask", "none")
ADULT_ML = (800.0, 2000.0)  # brains of adults, with room for atrophy and for the cortical CSF
MOST_EMPTY = 0.3  # of a given mask may be 0 in T1w, as dark fluid and air in its sinuses are
MOST_OUTSIDE = 0.1  # of it may lie outside T1w's box
MAX_STRAY_SHARE = 0.1  # of a mask may lie apart from its largest piece
# Of a side of the volume; where each of the six has more, the mask is the box or a part of a head.
# A brain cropped to its box has 0.001 to 0.15 on a side, one that is cut there at most 0.8.
MAX_SIDE_SHARE = 0.5


# How torch, CUDA and its libraries speak of a GPU that no later scan would fare better on
_GPU_FAILED = re.compile("(CUDA|HIP) error|(CUDA|NVIDIA) driver|CUDA GPUs|NVML|NVRTC|"
                         "CUDNN|CUBLAS|CUSOLVER|CUFFT", re.IGNORECASE)
_NO_MEMORY = re.compile("of memory|allocate memory|ALLOC_FAILED|bad_alloc")


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
    mask = signal_mask(volume)
    box = _box(mask)
    mask[box] = ndimage.binary_fill_holes(mask[box])
    return mask


def _box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds all of a mask; outside of it neither holes nor pieces are."""
    hits = [np.flatnonzero(mask.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    return tuple(slice(hit[0], hit[-1] + 1) if len(hit) else slice(0) for hit in hits)


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
    found = _on_grid_of(t1w, mask, path)
    dark = float((t1w.data[found] == 0).sum()) / max(int(found.sum()), 1)
    if dark > MOST_EMPTY:
        raise ValueError(f"{path}: {dark:.0%} of it is empty in {t1w.path}; it lies elsewhere, so "
                         "save it on that scan's grid")
    return found


def _on_grid_of(t1w: Volume, mask: Volume, path: Path) -> np.ndarray:
    if same_grid(grid_of(mask), grid_of(t1w)):
        return mask.data > 0.5
    shapes = [volume.header.get_data_shape()[:3] for volume in (mask, t1w)]
    if shapes[0] == shapes[1] and np.array_equal(mask.file_affine, np.eye(4)):
        raise ValueError(f"{path}: has as many voxels as {t1w.path}, but the identity for an "
                         "affine; save the mask with the scan's affine")
    moved = resample(mask.data > 0.5, mask.affine, grid_of(t1w), nearest=True)
    if not moved.any():
        raise ValueError(f"{path}: does not overlap {t1w.path}; the mask belongs to another scan")
    lost = 1 - float(moved.sum()) * t1w.voxel_ml / (float((mask.data > 0.5).sum()) * mask.voxel_ml)
    if lost > MOST_OUTSIDE:
        raise ValueError(f"{path}: {lost:.0%} of it lies outside {t1w.path}; save it on that "
                         "scan's grid")
    return moved


def looks_extracted(volume: Volume, limits_ml: tuple[float, float] = ADULT_ML) -> bool:
    """Whether a volume is a brain on empty background: its signal fills a brain's room."""
    mask = nonzero_mask(volume)
    rim = np.concatenate([mask[[0, -1]].ravel(), mask[:, [0, -1]].ravel(),
                          mask[:, :, -1].ravel()])  # the neck leaves through k = 0
    size_ml = float(mask.sum()) * volume.voxel_ml
    return limits_ml[0] <= size_ml <= limits_ml[1] and float(rim.mean()) < 0.2


def strange_background(volume: Volume) -> str:
    """Say that a volume's background is not 0, and how to mend it; "" where that is not so.

    Background is the one value that most voxels of the six sides have; in a whole head they differ.
    """
    sides = [volume.data.take(end, axis=axis).ravel() for axis in range(3) for end in (0, -1)]
    values, counts = np.unique(np.concatenate(sides), return_counts=True)
    value = float(values[counts.argmax()])
    if value == 0 or counts.max() <= counts.sum() / 2:
        return ""
    return (f"background is {value:.4g} and not 0, so it does not look extracted; subtract the "
            "background from every voxel and save that as float32")


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
    ValueError : a mask too small or too large, in pieces, or over most of all six sides of the
        volume, as that of an extracted volume is whose background is not 0
    """
    box = _box(mask)
    pieces, count = ndimage.label(mask[box])
    if count > 1:
        sizes = np.bincount(pieces.ravel())[1:]
        stray = 1 - sizes.max() / sizes.sum()
        if stray > MAX_STRAY_SHARE:
            raise ValueError(f"{t1w.path}: brain mask is in pieces ({stray:.0%} apart from the "
                             "largest); look at it, or give one with --brain-extraction mask")
        mask = np.zeros(mask.shape, bool)
        mask[box] = pieces == 1 + int(sizes.argmax())
    brain_ml = float(mask.sum()) * t1w.voxel_ml
    all_sides = all(mask.take(end, axis=axis).mean() > MAX_SIDE_SHARE
                    for axis in range(3) for end in (0, -1))
    if all_sides and (fault := strange_background(t1w)):
        raise ValueError(f"{t1w.path}: {fault}")
    low, high = limits_ml
    if not low <= brain_ml <= high:
        raise ValueError(f"{t1w.path}: brain mask has {brain_ml:.0f} ml, believed are {low:.0f} to "
                         f"{high:.0f}; look at it, or widen with --brain-ml")
    if all_sides:
        raise ValueError(f"{t1w.path}: brain mask fills all six sides of the volume; "
                         "it is no brain, choose another --brain-extraction")
    return mask, brain_ml


def _deepbet(device: str) -> Extractor:
    """deepbet (Fisch et al. 2024); its weights are part of its package."""
    try:
        from deepbet.bet import BrainExtraction
    except ImportError as error:
        raise ValueError(f"brain extraction deepbet: {error}; pip install '.[deepbet]'") from None
    except Exception as error:  # packages that do not fit each other have many words for it
        raise ValueError("brain extraction deepbet: its package cannot be imported "
                         f"({type(error).__name__}: {error}); pip install --force-reinstall "
                         "deepbet") from error
    with warnings.catch_warnings():  # torch.jit.load is deprecated, and that is deepbet's business
        warnings.simplefilter("ignore", FutureWarning)
        try:
            network = BrainExtraction(no_gpu=device == "cpu")
        except (RuntimeError, MemoryError) as error:  # no scan has been looked at yet
            raise OSError(f"brain extraction deepbet: cannot be loaded on {device} "
                          f"({describe(error)}); run again, or use --device cpu") from error

    def extract(volume: Volume) -> np.ndarray:
        try:
            return _run_deepbet(network, volume.data)
        except (AssertionError, ValueError) as error:  # nothing like a head is there
            raise ValueError(f"{volume.path}: deepbet found no brain ({error}); "
                             "look at the scan") from None
        except (RuntimeError, MemoryError) as error:
            raise machine_fault(volume.path, "deepbet", error) or NotNow(
                f"{volume.path}: deepbet failed ({describe(error)}); look at the scan") from error

    return extract


def machine_fault(path: Path, network: str, error: Exception) -> Exception | None:
    """What a network failed by, in one line, where that is the machine's fault; else None.

    `OSError` where the GPU is broken, so that the run ends before every scan is blamed for it;
    `NotNow` where memory is wanting, which leaves one scan out until another time.
    """
    text = str(error)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        return NotNow(f"{path}: no memory left for {network} ({describe(error)}); run again with "
                      "fewer --workers, or with --device cpu")
    if _GPU_FAILED.search(text):
        return OSError(f"brain extraction {network}: the GPU failed at {path} ({describe(error)}); "
                       "run again, or use --device cpu")
    return None


def describe(error: Exception) -> str:
    """An error of another's program in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:180]


def _run_deepbet(network: Any, data: np.ndarray) -> np.ndarray:
    """The mask of `BrainExtraction.run`, to the bit, without its copies of the whole volume.

    Those take a gigabyte for a head at 0.5 mm. All else is deepbet's: a look at the volume squeezed
    to 128^3 for the brain's box, one at the box squeezed to 256^3, the largest piece, its holes.
    """
    import fill_voids
    import torch
    from deepbet.utils import keep_largest_connected_component, normalize
    from torch.nn.functional import interpolate

    def look(net: Any, part: torch.Tensor, sides: int) -> torch.Tensor:
        squeezed = interpolate(part[None, None], (sides,) * 3, mode="nearest-exact")[0, 0]
        limits.extend(squeezed.quantile(q) for q in (0.005, 0.995)[len(limits):])  # of the first
        with torch.no_grad():
            return (net(normalize(squeezed, *limits)[None, None])[0, 1] > 0.5).float()

    limits: list[torch.Tensor] = []
    device = next(network.model.parameters()).device
    whole = torch.from_numpy(np.require(data, requirements="W")).to(device)
    rough = keep_largest_connected_component(look(network.bbox_model, whole, 128).cpu().numpy())
    box = network.get_bbox_with_margin(torch.from_numpy(rough), data.shape, 0.1)
    fine = look(network.model, whole[box], 256)[None, None]
    inside = interpolate(fine, whole[box].shape, mode="nearest-exact")[0, 0].cpu().numpy() > 0
    mask = np.zeros(data.shape, bool)
    mask[box] = fill_voids.fill(keep_largest_connected_component(inside))
    return mask
