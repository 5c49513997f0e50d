"""Volumes and slices: resample, scale, crop, cut; each inverse beside it.

Owns the geometry and the intensities of one volume. Files are read and written in `data/nifti.py`,
two volumes of one head are brought together in `data/registration.py`, brains found in
`data/brain.py`.

Conventions: inside the program a volume is (I, J, K) float32 with axes towards right, anterior and
superior (RAS); world coordinates are RAS mm; intensities are in [-1, 1] with background exactly -1.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from data.bias import NEGATIVE_SHARE, correct_n4
from data.nifti import Grid, Volume

BACKGROUND = -1.0
UPPER_PERCENTILE = 99.5
FLAT = 1e-5  # a share of the brightest: what interpolation leaves of one value is below
RIM = 2  # voxels, as far as an interpolation mixes the brain with its background
_LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


# --------------------------------------------------------------------------------------- geometry


def grid_of(volume: Volume) -> Grid:
    """The volume's own grid."""
    i, j, k = volume.data.shape
    return Grid((i, j, k), volume.affine)


def slicing_grid(volume: Volume, spacing_mm: float) -> Grid:
    """Lay the grid on which a volume is cut into axial slices.

    In-plane voxels become `spacing_mm`; along k the volume's own spacing stays where it is coarser
    (thick slices are not cut into invented thin ones). The grid keeps the volume's axes (an oblique
    scan is cut along its own planes) and the middle of its field of view.
    """
    native = volume.spacing_mm
    wanted = np.array([spacing_mm, spacing_mm, max(spacing_mm, native[2])])
    wanted = np.where(np.abs(wanted - native) < 1e-3, native, wanted)
    shape = np.array(volume.data.shape)
    new_shape = np.where(wanted == native, shape, np.ceil(shape * native / wanted - 1e-6))
    new_shape = np.maximum(new_shape.astype(int), 1)
    affine = volume.affine.copy()
    affine[:3, :3] = volume.affine[:3, :3] * (wanted / native)
    middle = volume.affine[:3, :3] @ ((shape - 1) / 2) + volume.affine[:3, 3]
    affine[:3, 3] = middle - affine[:3, :3] @ ((new_shape - 1) / 2)
    i, j, k = (int(n) for n in new_shape)
    return Grid((i, j, k), affine)


def same_grid(a: Grid, b: Grid, tolerance_mm: float = 1e-2) -> bool:
    """Whether two grids put every voxel at the same place, to `tolerance_mm`."""
    if a.shape != b.shape:
        return False
    corners = np.array([[i, j, k, 1] for i in (0, a.shape[0]) for j in (0, a.shape[1])
                        for k in (0, a.shape[2])], dtype=float)
    return bool(np.abs(corners @ (a.affine - b.affine).T).max() < tolerance_mm)


def to_sitk(data: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """A SimpleITK image (LPS world, k j i array order) of RAS data."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.transpose(2, 1, 0)))
    lps = _LPS_FROM_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing([float(s) for s in spacing])
    image.SetOrigin([float(o) for o in lps[:3, 3]])
    image.SetDirection([float(d) for d in (lps[:3, :3] / spacing).ravel()])
    return image


def sitk_affine(matrix: np.ndarray) -> sitk.AffineTransform:
    """The ITK transform of a (4, 4) matrix that maps RAS mm to RAS mm."""
    lps = _LPS_FROM_RAS @ matrix @ _LPS_FROM_RAS
    transform = sitk.AffineTransform(3)
    transform.SetMatrix([float(v) for v in lps[:3, :3].ravel()])
    transform.SetTranslation([float(v) for v in lps[:3, 3]])
    return transform


def resample(data: np.ndarray, affine: np.ndarray, grid: Grid, *,
             matrix: np.ndarray | None = None, nearest: bool = False) -> np.ndarray:
    """Resample a volume onto a grid by ONE interpolation.

    Linear, after a Gaussian that removes what the coarser grid cannot hold (full width at half
    maximum so that source and filter together have the target's voxel size): plain linear
    interpolation from 0.5 mm to 1.5 mm would pick single noisy voxels.

    Parameters
    ----------
    data : (I, J, K) any real dtype, RAS axes
    affine : (4, 4) its voxel indices to RAS mm
    grid : where to
    matrix : (4, 4) maps RAS mm on `grid` to RAS mm of `data` (a registration); identity if None
    nearest : nearest neighbour without the Gaussian, for masks and labels

    Returns
    -------
    (I', J', K') float32 (bool where `data` is bool), 0 outside the source's field of view
    """
    matrix = np.eye(4) if matrix is None else matrix
    if np.array_equal(matrix, np.eye(4)) and same_grid(Grid(data.shape, affine), grid, 1e-6):
        return data.astype(bool if data.dtype == bool else np.float32)
    how = sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear
    source = _source(data, affine, None if nearest else matrix @ grid.affine)
    target = to_sitk(np.zeros((1, 1, 1), np.uint8), grid.affine)
    out = sitk.Resample(source, list(grid.shape), sitk_affine(matrix), how, target.GetOrigin(),
                        target.GetSpacing(), target.GetDirection(), 0.0)
    del source  # a fine scan has hundreds of megabytes, and each copy counts
    array = sitk.GetArrayViewFromImage(out).transpose(2, 1, 0)
    return np.array(array, dtype=bool if data.dtype == bool else np.float32, order="C")


def _source(data: np.ndarray, affine: np.ndarray, target: np.ndarray | None) -> sitk.Image:
    """A SimpleITK image of `data`, blurred for a grid of affine `target` unless that is None."""
    if target is None:
        return to_sitk(data.view(np.uint8) if data.dtype == bool else data, affine)
    turned = np.array(data.transpose(2, 1, 0), dtype=np.float32, order="C")  # ours to write into
    _antialias(turned.transpose(2, 1, 0), affine, target)
    return to_sitk(turned.transpose(2, 1, 0), affine)


def _antialias(data: np.ndarray, affine: np.ndarray, target: np.ndarray) -> None:
    """Blur in place along each axis on which the target's voxels are larger than the source's."""
    steps = np.linalg.norm(np.linalg.inv(affine)[:3, :3] @ target[:3, :3], axis=1)  # source voxels
    for axis, step in enumerate(steps):
        sigma = np.sqrt(max(step ** 2 - 1, 0)) / 2.355
        if sigma > 0.2:
            ndimage.gaussian_filter1d(data, sigma, axis=axis, output=data, mode="nearest",
                                      truncate=3)


def field_of_view(shape: tuple[int, ...], affine: np.ndarray, grid: Grid,
                  matrix: np.ndarray | None = None) -> np.ndarray:
    """(I', J', K') bool: which voxels of `grid` lie inside a scan's own box of voxels."""
    matrix = np.eye(4) if matrix is None else matrix
    to_source = np.linalg.inv(affine) @ matrix @ grid.affine
    axes = [np.arange(n, dtype=np.float64) for n in grid.shape]
    inside = np.ones(grid.shape, dtype=bool)
    for row, size in zip(to_source[:3], shape):
        place = (row[0] * axes[0][:, None, None] + row[1] * axes[1][None, :, None]
                 + row[2] * axes[2][None, None, :] + row[3])
        inside &= (place >= -0.5) & (place <= size - 0.5)
    return inside


# -------------------------------------------------------------------------------------- intensity


@dataclass(frozen=True)
class IntensityScale:
    """Scanner units at -1 (`low`) and at 1 (`high`): what it takes to undo `scale`."""

    low: float
    high: float


def fit_scale(data: np.ndarray, mask: np.ndarray, *, upper: float = UPPER_PERCENTILE,
              path: str | os.PathLike = "the volume") -> IntensityScale:
    """Find a volume's own scale inside its brain.

    Magnitude images have a true zero (no signal), which becomes -1, like the background. Where more
    than 2 % of the brain is negative, somebody has shifted the values: the (100 - upper)th
    percentile takes the place of zero.

    Parameters
    ----------
    data : (I, J, K) float32, scanner units
    mask : (I, J, K) bool, the brain
    upper : percentile in (50, 100] that becomes 1; what lies above is clipped

    Raises
    ------
    ValueError : an empty mask, or a brain of one value (says which file)
    """
    brain = data[mask]
    if brain.size == 0:
        raise ValueError(f"{path}: the brain mask covers none of it; check the mask's alignment")
    high = float(np.percentile(brain, upper))
    shifted = float((brain < 0).mean()) > NEGATIVE_SHARE
    low = float(np.percentile(brain, 100 - upper)) if shifted else 0.0
    darkest, brightest = _bulk(data, mask)
    if not min(high - low, brightest - darkest) > FLAT * max(abs(high), abs(low), 1e-30):
        raise ValueError(f"{path}: the brain has no contrast (all about {brightest:.3g}); leave "
                         "it out")
    return IntensityScale(low, high)


def _bulk(data: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Between which values nine tenths of the brain lie, without its rim where it has a depth.

    Along the rim an interpolation mixes the brain with what is around it, so that a brain of one
    value has others there too.
    """
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    core = ndimage.binary_erosion(mask[box], iterations=RIM)
    darkest, brightest = np.percentile(data[box][core if core.any() else mask[box]], (5, 95))
    return float(darkest), float(brightest)


def scale(data: np.ndarray, mask: np.ndarray, by: IntensityScale) -> np.ndarray:
    """Scanner units to [-1, 1] float32 inside the mask (clipped), exactly -1 outside."""
    scaled = np.clip((data - by.low) / (by.high - by.low), 0, 1) * 2 - 1
    return np.where(mask, scaled, BACKGROUND).astype(np.float32)


def unscale(scaled: np.ndarray, by: IntensityScale) -> np.ndarray:
    """[-1, 1] back to scanner units, float32: the inverse of `scale` except where that clipped."""
    return ((scaled + 1) / 2 * (by.high - by.low) + by.low).astype(np.float32)


# ----------------------------------------------------------------------------- frame and slices


def crop_or_pad(data: np.ndarray, centre: tuple[int, int], size: int,
                fill: float = BACKGROUND) -> np.ndarray:
    """Cut (I, J, K) to (size, size, K) around voxel `centre` (i, j), or pad it with `fill`."""
    out = np.full((size, size, data.shape[2]), fill, dtype=data.dtype)
    inner, outer = _overlap(data.shape, centre, size)
    out[outer] = data[inner]
    return out


def undo_crop_or_pad(cropped: np.ndarray, shape: tuple[int, int, int], centre: tuple[int, int],
                     fill: float = BACKGROUND) -> np.ndarray:
    """Lay (size, size, K) back into (I, J, K); what had been cut away is `fill`."""
    out = np.full(shape, fill, dtype=cropped.dtype)
    inner, outer = _overlap(shape, centre, cropped.shape[0])
    out[inner] = cropped[outer]
    return out


def _overlap(shape: tuple[int, ...], centre: tuple[int, int],
             size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a frame meets the volume: slices into the volume, slices into the frame."""
    inner, outer = [], []
    for n, middle in zip(shape[:2], centre):
        start = middle - size // 2
        lo, hi = max(start, 0), max(min(start + size, n), max(start, 0))
        inner.append(slice(lo, hi))
        outer.append(slice(lo - start, hi - start))
    return (inner[0], inner[1]), (outer[0], outer[1])


def mask_centre(mask: np.ndarray) -> tuple[int, int]:
    """The voxel (i, j) in the middle of the mask's bounding box."""
    if not mask.any():
        raise ValueError("the brain mask is empty; check the brain extraction")
    middle = []
    for axis in (0, 1):
        hit = np.flatnonzero(mask.any(axis=(1 - axis, 2)))
        middle.append(int(hit[0] + hit[-1] + 1) // 2)
    return middle[0], middle[1]


def to_slices(data: np.ndarray) -> np.ndarray:
    """(I, J, K) RAS volume to (K, H, W) axial slices, inferior to superior.

    Upright as on a screen: H runs from anterior to posterior, W from the subject's left to right.
    """
    return np.ascontiguousarray(data[:, ::-1, :].transpose(2, 1, 0))


def from_slices(slices: np.ndarray) -> np.ndarray:
    """(K, H, W) back to an (I, J, K) RAS volume: the inverse of `to_slices`."""
    return np.ascontiguousarray(slices.transpose(2, 1, 0)[:, ::-1, :])


# ------------------------------------------------------------------- one volume, there and back


@dataclass(frozen=True)
class Placement:
    """Where a stack of slices came from: all that `restore` needs."""

    grid: Grid
    centre: tuple[int, int]
    scale: IntensityScale
    cut_share: float  # share of the brain outside the frame, 0 to 1


def place(data: np.ndarray, mask: np.ndarray, grid: Grid, size: int, *,
          path: str | os.PathLike = "the volume",
          bias_correction: str = "none") -> tuple[np.ndarray, Placement]:
    """Scale and frame a volume that lies on its slicing grid.

    Parameters
    ----------
    data : (I, J, K) float32 on `grid`, scanner units
    mask : (I, J, K) bool on `grid`
    size : pixels a side of the frame
    bias_correction : of `bias.CORRECTIONS`, before the intensities are scaled

    Returns
    -------
    slices : (K, size, size) float32 in [-1, 1], background exactly -1
    placement : Placement

    Raises
    ------
    ValueError : as `fit_scale` and `bias.correct_n4`
    """
    if bias_correction == "n4":
        data = correct_n4(data, mask, grid.spacing_mm, path=path)
    by = fit_scale(data, mask, path=path)
    centre = mask_centre(mask)
    framed = crop_or_pad(scale(data, mask, by), centre, size)
    inside = crop_or_pad(mask, centre, size, fill=False)
    cut = 1 - float(inside.sum()) / float(mask.sum())
    return to_slices(framed), Placement(grid, centre, by, cut)


def restore(slices: np.ndarray, mask: np.ndarray, placement: Placement,
            target: Grid) -> np.ndarray:
    """Put slices in [-1, 1] back into the world: the inverse of `place` and of the resampling.

    The brain's rim is carried outwards before the interpolation, which would mix it with background
    otherwise; so the answer is right inside the brain, and the caller masks it on the target grid.

    Parameters
    ----------
    slices : (K, H, W) float in [-1, 1]
    mask : (I, J, K) bool on the placement's grid, the brain
    placement : where the slices were cut
    target : the grid to answer on, the scan's own as a rule

    Returns
    -------
    (I', J', K') float32 in [0, 1] on `target`, meaningful inside the brain only
    """
    framed = (from_slices(slices).astype(np.float32) + 1) / 2
    grid, centre = placement.grid, placement.centre
    on_grid = undo_crop_or_pad(framed, grid.shape, centre, fill=0.0)
    known = undo_crop_or_pad(crop_or_pad(mask, centre, framed.shape[0], fill=False),
                             grid.shape, centre, fill=False)
    part = _reach(grid, target, known)
    nearest = ndimage.distance_transform_edt(~known[part], sampling=grid.spacing_mm,
                                             return_distances=False, return_indices=True)
    on_grid[part] = on_grid[part][tuple(nearest)]
    return np.clip(resample(on_grid, grid.affine, target), 0, 1)


def _reach(grid: Grid, target: Grid, mask: np.ndarray) -> tuple[slice, ...]:
    """The box of `grid` that holds a mask and all that an interpolation onto `target` looks at."""
    to_grid = np.linalg.inv(grid.affine) @ target.affine
    corners = np.array([[i, j, k, 1] for i in (0, target.shape[0] - 1)
                        for j in (0, target.shape[1] - 1) for k in (0, target.shape[2] - 1)])
    places = (corners @ to_grid.T)[:, :3]
    # neighbours on both sides, and what `_antialias` mixes in
    rim = 2 + np.ceil(1.3 * np.linalg.norm(to_grid[:3, :3], axis=1))
    box = []
    for axis, others in enumerate(((1, 2), (0, 2), (0, 1))):
        hit = np.flatnonzero(mask.any(axis=others))
        low = min(hit[0], int(places[:, axis].min() - rim[axis]))
        high = max(hit[-1], int(places[:, axis].max() + rim[axis]))
        box.append(slice(max(low, 0), high + 1))
    return tuple(box)
