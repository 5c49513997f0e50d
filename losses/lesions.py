"""How much of the lesions' contrast a translation keeps, and which lesions it invents.

Unpaired training never sees what belongs together, so lesions can fade or appear, and figures over
the whole brain hardly notice. Volumes are the slices of one session put together, (D, H, W) in
[0, 1] with 0 outside the brain mask. Lesions come from masks, or from `find_candidates`: a rule of
thumb, not a segmentation. For evaluation only: it needs paired volumes.
"""
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from skimage.filters import threshold_multiotsu
from skimage.morphology import disk

SHADING_MM = 30.0  # sigma: coils' shading is smoother, lesions are smaller
BRIGHT_SDS = 2.0  # robust SDs above the median of T2w without fluid
BORDER_MM = 6.0  # from the brain's border in the slice: cortex, and fluid around it
RIM_MM = 1.5  # around fluid, and half the width of what is too thin
RING_MM = 4.5  # around a lesion, 3 pixels of 1.5 mm
LEAST_ML, LARGE_ML = 0.1, 1.0
FLUID_SHARE = 0.1  # of the ring, at most: else it is where fluid and tissue share voxels
WHITE_SHARE, RING_SDS = 0.5, 1.75  # of the ring's voxels; brighter than the ring
VISIBLE = 0.05  # contrast in the real target from which a lesion can be kept or erased
ERASED = 0.25  # share of the contrast

IN_PLANE = np.array([[[0, 1, 0], [1, 1, 1], [0, 1, 0]]], bool)  # (1, 3, 3)
ANY_SIDE = np.ones((3, 3, 3), bool)


class Candidates(NamedTuple):
    """What `find_candidates` finds.

    Attributes
    ----------
    labels : (D, H, W) int32, 1 to n in the candidates, else 0.
    suspects : (D, H, W) bool, all that is bright, thick and no fluid; candidates are parts of it.
    fluid : (D, H, W) bool.
    """

    labels: np.ndarray
    suspects: np.ndarray
    fluid: np.ndarray


class Lesion(NamedTuple):
    """One lesion: where it is and what it is compared with.

    Attributes
    ----------
    inside, around : (n,), (m,) int64 places in the flattened volume; neither is empty.
    ml : its volume.
    """

    inside: np.ndarray
    around: np.ndarray
    ml: float


def find_candidates(t1w: np.ndarray, t2w: np.ndarray, mask: np.ndarray,
                    voxel_mm: tuple[float, float, float]) -> Candidates:
    """Find what may be lesions: bright on T2w, no fluid on T1w, thick, in or beside white matter.

    A rule of thumb, not a segmentation. Both volumes are freed from shading first (divided by
    their mean within about 30 mm, of the slice's voxels below the upper of T2w's two thresholds by
    Otsu's method with three classes). Fluid is below the lower such threshold on T1w and above the
    upper one on T2w. Suspects are more than 2 robust SDs (1.4826 times the median deviation) above
    the median of T2w without its upper class, 6 mm and more from the brain's border in the slice,
    not beside fluid, and as wide as 3 pixels of 1.5 mm. Components of at least 0.1 ml are
    candidates if less than a tenth of the 4.5 mm around them is fluid and, below 1 ml, if half of
    it is brighter than the median of T1w (white matter, mostly) and they are 1.75 SDs brighter than
    it on T2w.

    Chosen by eye on seven real heads: it has both gliomas (sub-tcga6692, sub-tcga7294) and most
    plaques of sub-ms19 and sub-msp03 that lie in white matter, but none near the cortex
    (sub-ms07). Healthy tissue comes along: hippocampus, the midline, the sides of the midbrain, the
    edge of a ventricle between thick slices. All that it has of sub-ms07, sub-msp01 and sub-msp04
    is of that kind, 0.1 to 0.3 ml each.

    Parameters
    ----------
    t1w, t2w : (D, H, W) float in [0, 1].
    mask : (D, H, W) bool, the brain.
    voxel_mm : distance of slices, then of rows and of columns, which are equal.

    Returns
    -------
    candidates : Candidates; nothing where a volume has too few intensities for three classes.

    Raises
    ------
    ValueError
        If the shapes differ or a voxel size is not positive.
    """
    _check(mask, voxel_mm, t1w, t2w)
    t2w_levels = _three_classes(t2w[mask])
    nothing = Candidates(np.zeros(mask.shape, np.int32), *np.zeros((2, *mask.shape), bool))
    if t2w_levels is None:
        return nothing
    dry = mask & (t2w <= t2w_levels[1])
    t1w, t2w = _without_shading((t1w, t2w), dry, SHADING_MM / voxel_mm[1])
    t1w_levels, t2w_levels = _three_classes(t1w[mask]), _three_classes(t2w[mask])
    if t1w_levels is None or t2w_levels is None:
        return nothing
    dark = mask & (t1w < t1w_levels[0])
    fluid = dark & (t2w > t2w_levels[1])
    median = np.median(t2w[dry])
    sd = 1.4826 * np.median(np.abs(t2w[dry] - median))
    rim = _pixels(RIM_MM, voxel_mm)
    suspects = ndimage.binary_erosion(mask, disk(_pixels(BORDER_MM, voxel_mm))[None] > 0)
    suspects &= t2w > median + BRIGHT_SDS * sd
    suspects &= ~ndimage.binary_dilation(fluid, IN_PLANE, iterations=rim)
    suspects = ndimage.binary_opening(suspects, IN_PLANE, iterations=rim)
    labels = _components(suspects)
    white = t1w > np.median(t1w[mask])
    kept = np.zeros(labels.max() + 1, np.int32)
    for number, place, own, ring in _rings(labels, mask, voxel_mm):
        ml = float(own.sum()) * np.prod(voxel_mm) / 1000
        if ml < LEAST_ML or fluid[place][ring].mean() >= FLUID_SHARE:
            continue
        if ml < LARGE_ML:
            beside = ring & ~dark[place] & ~suspects[place]
            if white[place][ring].mean() < WHITE_SHARE or not beside.any():
                continue
            if t2w[place][own].mean() - t2w[place][beside].mean() <= RING_SDS * sd:
                continue
        kept[number] = kept.max() + 1
    return Candidates(kept[labels], suspects, fluid)


def outline(lesions: np.ndarray, mask: np.ndarray, fluid: np.ndarray,
            voxel_mm: tuple[float, float, float]) -> list[Lesion]:
    """Say for each lesion which voxels are in it, and which in the 4.5 mm around it.

    Parameters
    ----------
    lesions : (D, H, W) int labels, as `find_candidates` gives; or bool, then touching voxels
        (edges and corners count) are one lesion.
    mask, fluid : (D, H, W) bool; what is around a lesion is in the brain's mask, in its slices, in
        no other lesion and no fluid.
    voxel_mm : as `find_candidates`

    Returns
    -------
    outlines : those that lie in the mask and have something around them, by their labels.

    Raises
    ------
    ValueError
        As `find_candidates`.
    """
    _check(mask, voxel_mm, lesions, fluid)
    labels = (_components(lesions & mask) if lesions.dtype == bool
              else np.where(mask, lesions, 0))
    places = np.arange(labels.size).reshape(labels.shape)
    found = []
    for _, place, own, ring in _rings(labels, mask, voxel_mm):
        ring &= (labels[place] == 0) & ~fluid[place]
        if ring.any():
            found.append(Lesion(places[place][own], places[place][ring],
                                float(own.sum() * np.prod(voxel_mm) / 1000)))
    return found


def contrasts(volume: np.ndarray, lesions: Sequence[Lesion]) -> np.ndarray:
    """Subtract the mean around each lesion from the mean inside: (n,) float64, above 0 if bright.

    Parameters
    ----------
    volume : (D, H, W) float, in the unit of the result.
    lesions : from `outline`
    """
    flat = volume.reshape(-1).astype(np.float64)
    return np.array([flat[lesion.inside].mean() - flat[lesion.around].mean()
                     for lesion in lesions])


def compare(real: np.ndarray, translated: np.ndarray, ml: np.ndarray) -> dict[str, float]:
    """Put the lesions' contrasts side by side, weighted by their volumes.

    Only lesions with a contrast of 0.05 and more in the real target are compared: what cannot be
    seen there can be neither kept nor erased.

        kept = sum(ml * sign(real) * translated) / sum(ml * abs(real))

    Parameters
    ----------
    real, translated : (n,) from `contrasts`, intensities in [0, 1].
    ml : (n,) volumes.

    Returns
    -------
    figures : `n_visible`; and where that is not 0, `contrast_real` and `contrast_translated`
        (weighted means), `kept` (1 perfect, 0 erased, below 0 turned round) and `erased`, the
        share of the lesions that keep less than a quarter.
    """
    visible = np.abs(real) >= VISIBLE
    if not visible.any():
        return {"n_visible": 0}
    real, translated, ml = real[visible], translated[visible], ml[visible]
    along = translated * np.sign(real)
    return {"n_visible": int(visible.sum()),
            "contrast_real": float(np.average(real, weights=ml)),
            "contrast_translated": float(np.average(translated, weights=ml)),
            "kept": float((ml * along).sum() / (ml * np.abs(real)).sum()),
            "erased": float(np.mean(along < ERASED * np.abs(real)))}


def invented(found: np.ndarray, known: np.ndarray,
             voxel_mm: tuple[float, float, float]) -> dict[str, float]:
    """Count candidates in a translation that touch nothing known: `n_invented`, `invented_ml`.

    Parameters
    ----------
    found : (D, H, W) int labels of `find_candidates`, with the translation in the target's place.
    known : (D, H, W) bool: real lesions, and the real scans' own `suspects`.
    voxel_mm : as `find_candidates`
    """
    beside = ndimage.binary_dilation(known, ANY_SIDE)
    sizes = np.bincount(found.ravel())
    sizes[np.unique(found[beside])] = 0
    sizes[0] = 0
    return {"n_invented": int((sizes > 0).sum()),
            "invented_ml": float(sizes.sum() * np.prod(voxel_mm) / 1000)}


def _three_classes(values: np.ndarray) -> np.ndarray | None:
    """Return Otsu's two thresholds between three classes; None for too few different values."""
    try:
        return threshold_multiotsu(values, 3)
    except ValueError:
        return None


def _without_shading(volumes: Sequence[np.ndarray], dry: np.ndarray,
                     sigma: float) -> list[np.ndarray]:
    """Divide each slice by the smoothed mean of its dry voxels, as a share of their median."""
    block = max(1, int(sigma / 5))  # blocks of pixels, smoothed and spread out again: as good
    starts = [np.arange(0, n, block) for n in dry.shape[1:]]
    down, across = (np.exp(-0.5 * np.square(np.subtract.outer(
        np.arange(n), first + (block - 1) / 2) / sigma)).astype(np.float32)
        for n, first in zip(dry.shape[1:], starts))

    def smooth(values: np.ndarray) -> np.ndarray:
        rows = np.add.reduceat(values.astype(np.float32), starts[0], axis=1)
        sums = np.add.reduceat(rows, starts[1], axis=2)  # (D, h, w)
        return np.tensordot(np.tensordot(sums, down, (1, 1)), across, (1, 1))

    count = np.maximum(smooth(dry), 1e-9)
    return [v * (np.median(v[dry]) / np.maximum(smooth(v * dry) / count, 0.05)) for v in volumes]


def _pixels(mm: float, voxel_mm: tuple[float, float, float]) -> int:
    return max(1, round(mm / voxel_mm[1]))


def _components(marked: np.ndarray) -> np.ndarray:
    return ndimage.label(marked, ANY_SIDE)[0].astype(np.int32)


def _rings(labels: np.ndarray, mask: np.ndarray, voxel_mm: tuple[float, float, float],
           ) -> Iterator[tuple[int, tuple[slice, ...], np.ndarray, np.ndarray]]:
    """Yield each label, the box around it, and in the box the label's voxels and those around."""
    wide = _pixels(RING_MM, voxel_mm)
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            place = (box[0], *(slice(max(s.start - wide, 0), s.stop + wide) for s in box[1:]))
            own = labels[place] == number
            around = ndimage.binary_dilation(own, IN_PLANE, iterations=wide)
            yield number, place, own, around & ~own & mask[place]


def _check(mask: np.ndarray, voxel_mm: tuple[float, float, float], *volumes: np.ndarray) -> None:
    """Raise ValueError unless all arguments fit together."""
    shapes = [v.shape for v in (*volumes, mask)]
    if len(set(shapes)) > 1 or mask.ndim != 3 or mask.dtype != bool:
        raise ValueError(f"volumes and mask are {', '.join(map(str, shapes))}, mask {mask.dtype}; "
                         "need (D, H, W) alike and a mask of bool")
    if len(voxel_mm) != 3 or not min(voxel_mm) > 0:
        raise ValueError(f"voxels are {voxel_mm} mm; need three sizes above 0")
