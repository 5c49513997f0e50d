"""Bring a subject's T2w onto its T1w: one rigid transform by mutual information (SimpleITK).

Owns the search and its judgement. It moves nothing: the transform found goes into the ONE
interpolation of `data.volume.resample`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from data.nifti import Grid, Volume
from data.volume import grid_of, resample, to_sitk

BINS = 40
MAX_MOVE_MM = 30.0
MAX_TURN_DEG = 30.0
WRONG_HEADERS = 2.0  # times the mutual information that they have, by a search that went far off
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Registration:
    """A rigid map from T1w's world to T2w's, and how it was found.

    Attributes
    ----------
    matrix : (4, 4) RAS mm on T1w to RAS mm on T2w
    method : "rigid" (searched), "headers" (search refused, see `note`) or "same-grid" (not needed)
    translation_mm : how far the brain's middle moved
    rotation_deg : by which angle
    mi_before, mi_after : mutual information in nats with the headers' alignment and with `matrix`,
        over the same voxels; NaN where nothing was searched
    note : why a search was refused, empty otherwise
    """

    matrix: np.ndarray
    method: str
    translation_mm: float = 0.0
    rotation_deg: float = 0.0
    mi_before: float = float("nan")
    mi_after: float = float("nan")
    note: str = ""


@dataclass(frozen=True)
class Fixed:
    """What a registration needs of T1w; its voxels may go before those of T2w come.

    Attributes
    ----------
    grid : T1w's own
    mask : (I, J, K) bool on `grid`, the brain
    brain : (N,) float32, T1w's values where the mask is
    middle_lps : of the brain, in mm
    coarse, fine : T1w and the brain widened by a rim, on grids of 3 mm and of 1.5 mm
    """

    grid: Grid
    mask: np.ndarray
    brain: np.ndarray
    middle_lps: list[float]
    coarse: tuple[sitk.Image, sitk.Image]
    fine: tuple[sitk.Image, sitk.Image]


def make_fixed(t1w: Volume, mask: np.ndarray) -> Fixed:
    """Take from T1w, a whole head or an extracted brain, what `register_rigid` needs of it.

    Parameters
    ----------
    t1w : Volume
    mask : (I, J, K) bool on T1w's grid, the brain
    """
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    return Fixed(grid_of(t1w), mask, t1w.data[mask], _middle_lps(t1w.affine, mask),
                 _fixed(t1w, mask, 3.0, 10.0), _fixed(t1w, mask, 1.5, 3.0))


def register_rigid(t1w: Fixed, t2w: Volume, *, seed: int = 0) -> Registration:
    """Find the rigid transform that brings T2w onto T1w.

    Mattes mutual information (Mattes et al. 2003) in and around the brain, from the headers'
    alignment and, should that hardly overlap, from the images' centres; coarse to fine. One thread
    and a fixed seed: the same scans give the same bits.

    Parameters
    ----------
    t1w : from `make_fixed`
    t2w : a whole head or an extracted brain, as T1w was
    seed : of the voxels drawn for the metric

    Returns
    -------
    Registration : of method "headers" where the search moved the brain by more than 30 mm or
        30 degrees, lowered the mutual information or failed
    """
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        matrix = _matrix(_search(t1w, t2w, seed))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][:120]
        return Registration(np.eye(4), "headers", note=f"search failed: {reason}")
    before = mutual_information(t1w, t2w, np.eye(4))
    after = mutual_information(t1w, t2w, matrix)
    moved = _matrix_moves(matrix, t1w.middle_lps)
    if moved[0] > MAX_MOVE_MM or moved[1] > MAX_TURN_DEG:
        note = (f"search moved {moved[0]:.0f} mm and {moved[1]:.0f} degrees, mutual information "
                f"{before:.3f} to {after:.3f}; headers kept")
        if after > WRONG_HEADERS * before:
            note += ", which seem wrong: look at it, or leave the pair out"
        return Registration(np.eye(4), "headers", 0.0, 0.0, before, before, note)
    if not after >= before:
        # within a millimetre and a degree the headers were right, and there is nothing to note
        note = "" if max(moved) < 1 else (
            f"search lowered mutual information {before:.3f} to {after:.3f}; headers kept")
        return Registration(np.eye(4), "headers", 0.0, 0.0, before, before, note)
    return Registration(matrix, "rigid", *moved, before, after)


def mutual_information(t1w: Fixed, t2w: Volume, matrix: np.ndarray) -> float:
    """Mutual information (nats, 32 x 32 bins) of T1w and the mapped T2w over the brain.

    Parameters
    ----------
    matrix : (4, 4) RAS mm on T1w to RAS mm on T2w
    """
    a, b = t1w.brain, resample(t2w.data, t2w.affine, t1w.grid, matrix=matrix)[t1w.mask]
    edges = [np.quantile(v, [0.005, 0.995]) for v in (a, b)]
    if any(lo == hi for lo, hi in edges):
        return 0.0
    a, b = (np.clip(v, lo, hi) for v, (lo, hi) in zip((a, b), edges))
    joint = _joint_histogram(a, b)
    joint /= joint.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    full = joint > 0
    return float((joint[full] * np.log(joint[full] / apart[full])).sum())


def _joint_histogram(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(32, 32) counts; in pieces, since NumPy takes 50 bytes a voxel on the way."""
    ends = [np.array([v.min(), v.max()]) for v in (a, b)]
    bins = list(np.histogram2d(ends[0], ends[1], bins=32)[1:])
    step, joint = 1 << 20, np.zeros((32, 32))
    for i in range(0, len(a), step):
        joint += np.histogram2d(a[i:i + step], b[i:i + step], bins=bins)[0]
    return joint


def _search(t1w: Fixed, t2w: Volume, seed: int) -> sitk.Euler3DTransform:
    """Gradient descent on coarse grids from several starts, then Powell's method on the best.

    Near the optimum Powell's line searches end 0.02 mm apart from different starts on thick-slice
    scans, where gradient descent stops up to 2 mm short; gradient descent reaches further.
    """
    fixed, rim = t1w.coarse
    moving = _coarse_image(t2w, 3.0)
    starts = _starts(fixed, moving, t1w.middle_lps)
    coarse = list(starts)
    for start in starts:
        with contextlib.suppress(RuntimeError):  # this start has no overlap
            coarse.append(_descend(fixed, moving, rim, start, seed))
    values = [_value(fixed, moving, rim, start) for start in coarse]
    if max(values) <= 0:
        raise RuntimeError("T1w and T2w do not overlap")
    fixed, rim = t1w.fine
    return _powell(fixed, to_sitk(t2w.data, t2w.affine), rim,
                   coarse[int(np.argmax(values))], seed)


def _fixed(t1w: Volume, mask: np.ndarray, spacing_mm: float,
           margin_mm: float) -> tuple[sitk.Image, sitk.Image]:
    """T1w and its brain mask, widened by a rim (the scalp carries an edge), on a coarser grid."""
    grid = _coarse_grid(t1w, spacing_mm)
    outside_mm = ndimage.distance_transform_edt(~resample(mask, t1w.affine, grid, nearest=True),
                                                sampling=grid.spacing_mm)
    return (to_sitk(resample(t1w.data, t1w.affine, grid), grid.affine),
            to_sitk((outside_mm <= margin_mm).astype(np.uint8), grid.affine))


def _coarse_image(volume: Volume, spacing_mm: float) -> sitk.Image:
    grid = _coarse_grid(volume, spacing_mm)
    return to_sitk(resample(volume.data, volume.affine, grid), grid.affine)


def _coarse_grid(volume: Volume, spacing_mm: float) -> Grid:
    """The volume's box with voxels of at least `spacing_mm`."""
    native = volume.spacing_mm
    wanted = np.maximum(native, spacing_mm)
    i, j, k = (int(n) for n in np.ceil(np.array(volume.data.shape) * native / wanted))
    affine = volume.affine.copy()
    affine[:3, :3] = affine[:3, :3] * (wanted / native)
    affine[:3, 3] += volume.affine[:3, :3] @ ((wanted / native - 1) / 2)
    return Grid((i, j, k), affine)


def _starts(fixed: sitk.Image, moving: sitk.Image,
            middle: list[float]) -> list[sitk.Euler3DTransform]:
    """The headers' alignment, the boxes' middles and the centres of mass."""
    headers = sitk.Euler3DTransform()
    headers.SetCenter(middle)
    initialise = sitk.CenteredTransformInitializerFilter
    return [headers, *(
        sitk.Euler3DTransform(sitk.CenteredTransformInitializer(
            fixed, moving, sitk.Euler3DTransform(), how))
        for how in (initialise.GEOMETRY, initialise.MOMENTS))]


def _method(rim: sitk.Image, share: float, seed: int) -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricFixedMask(rim)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(share, seed + 1)  # a seed of 0 would mean the clock
    method.SetInterpolator(sitk.sitkLinear)
    # Only values are asked for, unless `_descend` says otherwise. Left on, ITK makes an image of
    # gradients first: three doubles a voxel of the fine T2w, and half of the time.
    method.MetricUseFixedImageGradientFilterOff()
    method.MetricUseMovingImageGradientFilterOff()
    return method


def _value(fixed: sitk.Image, moving: sitk.Image, rim: sitk.Image,
           at: sitk.Euler3DTransform) -> float:
    """Mutual information in nats, 0 where the two do not overlap."""
    method = _method(rim, 0.5, 0)
    method.SetInitialTransform(at)
    try:
        return -float(method.MetricEvaluate(fixed, moving))
    except RuntimeError:
        return 0.0


def _descend(fixed: sitk.Image, moving: sitk.Image, rim: sitk.Image,
             start: sitk.Euler3DTransform, seed: int) -> sitk.Euler3DTransform:
    method = _method(rim, 0.5, seed)
    method.MetricUseFixedImageGradientFilterOn()
    method.MetricUseMovingImageGradientFilterOn()
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0, minStep=1e-2, numberOfIterations=150, relaxationFactor=0.6,
        gradientMagnitudeTolerance=1e-8)
    method.SetOptimizerScalesFromPhysicalShift()
    return _execute(method, fixed, moving, start, smoothing_mm=[4.0, 2.0])


def _powell(fixed: sitk.Image, moving: sitk.Image, rim: sitk.Image,
            start: sitk.Euler3DTransform, seed: int) -> sitk.Euler3DTransform:
    method = _method(rim, 0.15, seed)
    method.SetOptimizerAsPowell(numberOfIterations=10, maximumLineIterations=30, stepLength=0.5,
                                stepTolerance=1e-3, valueTolerance=1e-4)
    method.SetOptimizerScales([60.0] * 3 + [1.0] * 3)  # a radian moves the cortex about 60 mm
    return _execute(method, fixed, moving, start, smoothing_mm=[0.0])


def _execute(method: sitk.ImageRegistrationMethod, fixed: sitk.Image, moving: sitk.Image,
             start: sitk.Euler3DTransform, smoothing_mm: list[float]) -> sitk.Euler3DTransform:
    method.SetShrinkFactorsPerLevel([1] * len(smoothing_mm))
    method.SetSmoothingSigmasPerLevel(smoothing_mm)
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(sitk.Euler3DTransform(start), inPlace=False)
    found = method.Execute(fixed, moving)
    if found.GetName() == "CompositeTransform":
        found = sitk.CompositeTransform(found)
        found = found.GetNthTransform(found.GetNumberOfTransforms() - 1)
    return sitk.Euler3DTransform(found)


def _matrix(transform: sitk.Euler3DTransform) -> np.ndarray:
    """(4, 4) RAS mm to RAS mm of an ITK rigid transform."""
    rotation = np.array(transform.GetMatrix()).reshape(3, 3)
    centre = np.array(transform.GetCenter())
    lps = np.eye(4)
    lps[:3, :3] = rotation
    lps[:3, 3] = np.array(transform.GetTranslation()) + centre - rotation @ centre
    return _LPS @ lps @ _LPS


def _middle_lps(affine: np.ndarray, mask: np.ndarray) -> list[float]:
    """The mask's centre of mass, from counts along each axis (SciPy's makes doubles of it all)."""
    counts = [mask.sum(axis=others) for others in ((1, 2), (0, 2), (0, 1))]
    middle = np.array([float(n @ np.arange(len(n))) / float(n.sum()) for n in counts])
    world = affine[:3, :3] @ middle + affine[:3, 3]
    return [float(-world[0]), float(-world[1]), float(world[2])]


def _matrix_moves(matrix: np.ndarray, middle_lps: list[float]) -> tuple[float, float]:
    """How far (mm) a rigid transform moves the brain's middle, and its angle (degrees)."""
    middle = np.array([-middle_lps[0], -middle_lps[1], middle_lps[2]])
    shift = matrix[:3, :3] @ middle + matrix[:3, 3] - middle
    cosine = np.clip((np.trace(matrix[:3, :3]) - 1) / 2, -1, 1)
    return float(np.linalg.norm(shift)), float(np.degrees(np.arccos(cosine)))
