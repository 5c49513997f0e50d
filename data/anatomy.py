"""Random heads: smooth warps of the ICBM 152 tissue maps, as continuous fields.

Owns the shape of a simulated subject, from the maps that nilearn ships inside its package (nothing
is downloaded) to the share of each tissue at any point. Lengths are mm; world axes are RAS.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import product

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from data.sequences import Tissue, draw_tissues

LATTICE_MM = 3.0  # smooth fields (displacement, folding, texture) are kept on a lattice this fine
MINIMUM_JACOBIAN = 0.1

# Gaussian width and root mean square (mm, each axis) of the random velocity fields that make up a
# warp: whole lobes, gyri, and the wiggle of a single sulcus.
WARP_SCALES_MM = ((35.0, 3.5), (14.0, 1.3), (6.0, 0.9))


@dataclass(frozen=True)
class TissueMaps:
    """Tissue probabilities of the template head.

    Attributes
    ----------
    grey, white : (I, J, K) float32 in [0, 1]; what they leave of 1 is cerebrospinal fluid.
    brain : (I, J, K) float32 in [0, 1], blurred brain mask; the brain is where it exceeds 0.5.
    origin_mm : (3,) RAS position of voxel (0, 0, 0).
    spacing_mm : edge of a voxel; axes i, j, k run along R, A, S.
    """

    grey: np.ndarray
    white: np.ndarray
    brain: np.ndarray
    origin_mm: np.ndarray
    spacing_mm: float


@dataclass(frozen=True)
class Anatomy:
    """One subject's head, as smooth fields over the template.

    A head point x (RAS mm) lies at z = `head_to_template` x, and shows the template's tissue at
    z + displacement(z). Fields are (C, i, j, k) float32 over the template's box, `LATTICE_MM`
    apart.

    Attributes
    ----------
    head_to_template : (4, 4) affine: size, proportions, pose.
    displacement_mm : 3 components; the map z -> z + displacement keeps a positive Jacobian.
    folding : 2 log weights, of white matter and of fluid, that vary gyri and sulci.
    texture : 2 relative changes, of T1 and of T2.
    tissues : the subject's Tissue by name (`TISSUES`).
    fluid_weight : how wide this subject's fluid spaces are (1 = as in the template).
    """

    head_to_template: np.ndarray
    displacement_mm: np.ndarray
    folding: np.ndarray
    texture: np.ndarray
    tissues: dict[str, Tissue]
    fluid_weight: float


@lru_cache(maxsize=1)
def load_tissue_maps() -> TissueMaps:
    """Read the ICBM 152 (2009a, nonlinear symmetric) tissue maps that nilearn carries.

    Returns
    -------
    maps : TissueMaps at 1 mm, cut to the brain with a 10 mm margin.

    Raises
    ------
    ValueError : nilearn is not installed.
    """
    require_nilearn()
    from nilearn import datasets  # optional extra, and slow to import: only where needed

    grey_image = datasets.load_mni152_gm_template(resolution=1)
    white_image = datasets.load_mni152_wm_template(resolution=1)
    mask_image = datasets.load_mni152_brain_mask(resolution=1)
    margin = 10
    # The template ends in the middle of the brain stem. Tissue goes on beyond (an edge of fluid
    # would shine on T2w); the brain does not.
    grey, white = (
        np.pad(np.asarray(image.dataobj, np.float32), margin, mode="edge")
        for image in (grey_image, white_image)
    )
    mask = ndimage.binary_fill_holes(np.pad(np.asarray(mask_image.dataobj) > 0, margin))
    (extent,) = ndimage.find_objects(mask.astype(np.uint8))
    box = tuple(slice(axis.start - margin, axis.stop + margin) for axis in extent)
    corner = np.array([axis.start - margin for axis in box])
    return TissueMaps(
        grey=grey[box].copy(),
        white=white[box].copy(),
        brain=ndimage.gaussian_filter(mask[box].astype(np.float32), 1.0),
        origin_mm=grey_image.affine[:3, 3] + corner,
        spacing_mm=1.0,
    )


def require_nilearn() -> None:
    """Raise ValueError where the optional extra with the tissue maps is not installed."""
    if find_spec("nilearn") is None:
        raise ValueError(
            "nilearn is missing, which carries the tissue maps of simulated subjects. "
            "Install it with: pip install '.[simulate]'"
        )


def draw_anatomy(maps: TissueMaps, rng: np.random.Generator) -> Anatomy:
    """Draw one subject's head over the template (see Anatomy)."""
    extent_mm = maps.spacing_mm * (np.array(maps.brain.shape) - 1)
    shape = tuple(int(n) for n in np.ceil(extent_mm / LATTICE_MM) + 1)
    displacement_mm = draw_displacement(rng, shape)
    brain_mm = warped_brain(maps, displacement_mm)
    brain_ml = brain_mm.shape[1] * LATTICE_MM**3 / 1000
    folding = [0.7 * smooth_noise(rng, shape, 3.0 / LATTICE_MM) for _ in range(2)]
    texture = [
        0.02 * smooth_noise(rng, shape, 12.0 / LATTICE_MM)
        + 0.02 * smooth_noise(rng, shape, 3.0 / LATTICE_MM)
        for _ in range(2)
    ]
    return Anatomy(
        head_to_template=draw_head_pose(rng, brain_ml, brain_mm.mean(axis=1)),
        displacement_mm=displacement_mm,
        folding=np.stack(folding),
        texture=np.clip(np.stack(texture), -0.08, 0.08),
        tissues=draw_tissues(rng),
        fluid_weight=float(np.exp(rng.uniform(-0.3, 0.9))),
    )


def draw_displacement(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw a subject's warp: (3, I, J, K) float32 in mm on the lattice, Jacobian positive."""
    velocity = np.zeros((3, *shape), np.float32)
    for width_mm, size_mm in WARP_SCALES_MM:
        for component in velocity:
            component += (size_mm / LATTICE_MM) * smooth_noise(rng, shape, width_mm / LATTICE_MM)
    displacement = integrate_velocity(velocity)
    while jacobian_determinant(displacement).min() < MINIMUM_JACOBIAN:
        velocity *= np.float32(0.9)
        displacement = integrate_velocity(velocity)
    return displacement * np.float32(LATTICE_MM)


def draw_head_pose(
    rng: np.random.Generator, warped_ml: float, centre_mm: np.ndarray
) -> np.ndarray:
    """Draw size, proportions and pose of a head: (4, 4) affine, head to template, RAS mm.

    The brain volume is normal around 1350 ml (SD 120) and kept in 1120-1680 ml: the template's
    own 1880 ml is larger than almost any adult brain.

    Parameters
    ----------
    warped_ml, centre_mm : volume and centre of the warped brain, before scaling.
    """
    target_ml = float(np.clip(rng.normal(1350.0, 120.0), 1120.0, 1680.0))
    proportions = np.exp(np.clip(rng.normal(0.0, 0.03, 3), -0.06, 0.06))
    proportions *= np.cbrt(warped_ml / target_ml / np.prod(proportions))
    tilt = Rotation.from_euler("xyz", rng.uniform(-6.0, 6.0, 3), degrees=True).as_matrix()
    offset_mm = rng.uniform(-12.0, 12.0, 3)
    linear = proportions[:, None] * tilt
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = centre_mm - (linear * offset_mm).sum(axis=1)
    return affine


def warped_brain(maps: TissueMaps, displacement_mm: np.ndarray) -> np.ndarray:
    """Return the lattice points z whose z + displacement is brain: (3, N) RAS mm."""
    lattice_mm = LATTICE_MM * np.indices(displacement_mm.shape[1:]).reshape(3, -1)
    voxels = (lattice_mm + displacement_mm.reshape(3, -1)) / maps.spacing_mm
    inside = sample(maps.brain[None], voxels)[0] > 0.5
    return maps.origin_mm[:, None] + lattice_mm[:, inside]


def warp(anatomy: Anatomy, maps: TissueMaps, head_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find where head points fall: on the fields' lattice and in the template's maps.

    Parameters
    ----------
    head_mm : (3, N) points of the head (world of the T1w scan), RAS mm.

    Returns
    -------
    lattice, voxels : (3, N) positions in voxels of the lattice and of the maps.
    """
    template_mm = transform(anatomy.head_to_template, head_mm) - maps.origin_mm[:, None]
    lattice = template_mm / LATTICE_MM
    voxels = (template_mm + sample(anatomy.displacement_mm, lattice)) / maps.spacing_mm
    return lattice, voxels


def tissue_fractions(
    anatomy: Anatomy, maps: TissueMaps, lattice: np.ndarray, voxels: np.ndarray
) -> np.ndarray:
    """Return the share of grey, white and fluid at points of a subject's head.

    The template's maps are averages over 152 people, hence blurred. Squaring and renormalising
    them (the softmax of twice the log probability) sharpens borders while it leaves half-and-half
    voxels, such as the thalamus, as they are; smooth random weights then shift the borders, so
    that each subject has sulci and gyri of its own.

    Parameters
    ----------
    lattice, voxels : (3, N), from `warp`.

    Returns
    -------
    fractions : (3, N) float32 in [0, 1], summing to 1 over `TISSUES`.
    """
    grey, white = sample(np.stack([maps.grey, maps.white]), voxels)
    white_weight, fluid_weight = np.exp(sample(anatomy.folding, lattice))
    weights = np.stack(
        [
            np.square(grey),
            np.square(white) * white_weight,
            np.square(np.maximum(1 - grey - white, 0)) * (fluid_weight * anatomy.fluid_weight),
        ]
    )
    return weights / weights.sum(axis=0)


def integrate_velocity(velocity: np.ndarray, n_squarings: int = 6) -> np.ndarray:
    """Follow a stationary velocity field for unit time: scaling and squaring.

    Arsigny et al. 2006 (MICCAI, LNCS 4190:924): the end points form a diffeomorphism, so that
    large smooth displacements do not fold.

    Parameters
    ----------
    velocity : (3, I, J, K) float32, in voxels of its own lattice.

    Returns
    -------
    displacement : (3, I, J, K) float32, in voxels.
    """
    here = np.indices(velocity.shape[1:], dtype=np.float32)
    displacement = velocity / 2**n_squarings
    for _ in range(n_squarings):
        there = here + displacement
        displacement = displacement + sample(displacement, there.reshape(3, -1)).reshape(here.shape)
    return displacement


def jacobian_determinant(displacement: np.ndarray) -> np.ndarray:
    """Return the volume change of x -> x + displacement(x), both in voxels: (I, J, K) float32."""
    d = [np.gradient(component) for component in displacement]
    return (
        (1 + d[0][0]) * ((1 + d[1][1]) * (1 + d[2][2]) - d[1][2] * d[2][1])
        - d[0][1] * (d[1][0] * (1 + d[2][2]) - d[1][2] * d[2][0])
        + d[0][2] * (d[1][0] * d[2][1] - (1 + d[1][1]) * d[2][0])
    )


def smooth_noise(
    rng: np.random.Generator, shape: tuple[int, ...], sigma_voxels: float
) -> np.ndarray:
    """Return Gaussian-smoothed white noise, float32, mean 0 and root mean square 1 over `shape`."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    noise = ndimage.gaussian_filter(noise, sigma_voxels, mode="reflect", truncate=3.0)
    noise -= noise.mean()
    return noise / np.sqrt(np.mean(np.square(noise)))


def sample(fields: np.ndarray, points: np.ndarray, block: int = 1 << 16) -> np.ndarray:
    """Interpolate fields linearly; beyond their edge they go on unchanged.

    The same as scipy's `map_coordinates(order=1, mode="nearest")` for each field, but three to
    four times as fast, which is most of the time of a subject: the weights are made once for all
    fields, a block of points at a time so that they stay in the processor's cache.

    Parameters
    ----------
    fields : (C, I, J, K) float32.
    points : (3, N) positions in voxels.

    Returns
    -------
    values : (C, N) float32.
    """
    flat, last = fields.reshape(len(fields), -1), np.array(fields.shape[1:])[:, None] - 1
    stride_i, stride_j = fields.shape[2] * fields.shape[3], fields.shape[3]
    values = np.zeros((len(fields), points.shape[1]), np.float32)
    for start in range(0, points.shape[1], block):
        place = np.clip(points[:, start : start + block], 0, last)
        corner = np.minimum(place.astype(np.int64), last - 1)
        upper = (place - corner).astype(np.float32)
        lower = 1 - upper
        first = corner[0] * stride_i + corner[1] * stride_j + corner[2]
        out = values[:, start : start + block]
        for di, dj, dk in product((0, 1), repeat=3):
            weight = (upper if di else lower)[0] * (upper if dj else lower)[1]
            weight = weight * (upper if dk else lower)[2]
            index = first + (di * stride_i + dj * stride_j + dk)
            for field, total in zip(flat, out):
                total += weight * field.take(index)
    return values


def transform(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply a (4, 4) affine to (3, N) points."""
    # Written out, not a matrix product: BLAS may round differently with another thread count.
    x, y, z = points
    return np.stack([row[0] * x + row[1] * y + row[2] * z + row[3] for row in affine[:3]])
