"""Brains with planted lesions, painted into arrays and stores; lesion masks of painted heads."""

import nibabel as nib
import numpy as np
from painted_store import HEADER

from data.store import Part, SliceStore, digest_rows, pack, write_part

VOXEL_MM = (3.0, 1.5, 1.5)
SHAPE = (10, 96, 96)
# middle (slice, row, column) and radius in pixels of lesions in white matter, 1.5 and 0.6 ml
LESIONS = (((5, 30, 36), 7), ((4, 62, 64), 5))
SIGNAL = {"cortex": (0.55, 0.45), "fluid": (0.15, 0.9), "white": (0.8, 0.3), "lesion": (0.55, 0.6)}


def inside(middle, radius, shape=SHAPE):
    """(D, H, W) bool: a ball, its slices 3 mm apart, its pixels 1.5 mm."""
    k, y, x = np.indices(shape)
    return (2 * (k - middle[0])) ** 2 + (y - middle[1]) ** 2 + (x - middle[2]) ** 2 < radius ** 2


def paint(lesions=LESIONS, seed=0, shading=0.0):
    """T1w, T2w (D, H, W) float32 in [0, 1], brain mask and planted lesions.

    Ventricles of 8 pixels in the middle, 2 pixels each of cortex and fluid at the border, noise.
    """
    y, x = (np.indices(SHAPE[1:]) - 47.5)
    radius = np.broadcast_to(np.hypot(x / 0.9, y), SHAPE)
    mask = radius < 44
    planted = np.zeros(SHAPE, bool)
    for middle, size in lesions:
        planted |= inside(middle, size)
    volumes = []
    for contrast in (0, 1):
        volume = np.full(SHAPE, SIGNAL["white"][contrast])
        volume[planted] = SIGNAL["lesion"][contrast]
        volume[radius > 40] = SIGNAL["cortex"][contrast]
        volume[(radius > 42) | (radius < 8)] = SIGNAL["fluid"][contrast]
        volume *= 1 + shading * x / 48
        volume += np.random.default_rng(seed + contrast).normal(0, 0.02, SHAPE)
        volumes.append(np.where(mask, np.clip(volume, 0, 1), 0).astype(np.float32))
    return (*volumes, mask, planted)


def write_lesion_store(folder, splits):
    """A store of painted brains; `splits` maps a split to {subject: lesions}."""
    rows = []
    for split, people in splits.items():
        for name, lesions in people.items():
            t1w, t2w, mask, _ = paint(lesions, seed=sum(map(ord, name)))
            t1w, t2w = ((2 * v - 1).astype(np.float16) for v in (t1w, t2w))
            row = {"id": f"painted_sub-{name}", "dataset": "painted", "subject": name,
                   "session": "", "n_slices": str(len(mask)), "brain_extraction": "none",
                   "t1w": f"{name}_T1w.nii.gz", "t2w": f"{name}_T2w.nii.gz", "cut_share": "0",
                   "slice_spacing_mm": str(VOXEL_MM[0]), "note": "",
                   "rows_sha256": digest_rows(t1w, t2w, np.packbits(mask, axis=-1))}
            write_part(folder, Part(t1w, t2w, mask, row))
            rows.append({**row, "split": split})
    pack(folder, {**HEADER, "size": SHAPE[1], "spacing_mm": VOXEL_MM[1]}, rows, {},
         {row["id"] for row in rows})
    return SliceStore(folder)


def write_lesions(tree, label, name="label-lesion_mask", folder="derivatives/raters"):
    """Mark the bright spot that the painted heads have in their left (31, 24, 22 mm)."""
    scan = nib.load(tree / label / "anat" / f"{label}_T2w.nii.gz")
    points = np.indices(scan.shape).reshape(3, -1)
    world = scan.affine[:3, :3] @ points + scan.affine[:3, 3:]
    near = np.linalg.norm((world - [[31], [24], [22]]) / [[10], [8], [9]], axis=0) < 1
    where = tree / folder / label / "anat"
    where.mkdir(parents=True, exist_ok=True)
    marked = nib.Nifti1Image(near.reshape(scan.shape).astype(np.uint8), scan.affine)
    marked.to_filename(where / f"{label}_{name}.nii.gz")
