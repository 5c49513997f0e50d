"""Small slice stores painted directly into arrays: no volumes, no registration, made in no time."""

import numpy as np

from data.store import Part, digest_rows, pack, write_part

HEADER = {
    "spacing_mm": 4.0, "min_brain_area": 0.25, "split": [0.8, 0.1, 0.1], "seed": 0,
    "intensity": {"rule": "painted", "upper_percentile": 99.5},
    "sources": [{"dataset": "painted", "name": "", "snapshot": "1", "doi": "", "license": "CC0"}],
    "versions": {},
}


def paint_head(person, n_slices, size):
    """(n, size, size) of t1w, t2w (float16 in [-1, 1], background -1) and mask of one person."""
    draws = np.random.default_rng(person)
    y, x = (np.indices((size, size)) - (size - 1) / 2) / (size / 2)
    t1w, t2w, masks = [], [], []
    for k in range(n_slices):
        wide = 0.75 - 0.2 * abs(k / max(n_slices - 1, 1) - 0.5) + draws.uniform(-0.05, 0.05)
        radius = np.hypot(x / wide, y / (wide + 0.1))
        mask = radius < 1
        tissue = np.cos(4 * radius) * 0.4 + 0.15 * np.sin(9 * x + person) * np.cos(7 * y - k)
        tissue += draws.normal(0, 0.02, tissue.shape)
        t1w.append(np.where(mask, tissue, -1))
        # inverted contrast, bent so that it is not the T1w turned upside down
        t2w.append(np.where(mask, 0.1 - 0.8 * tissue + 0.5 * tissue ** 2, -1))
        masks.append(mask)
    return (np.clip(t1w, -1, 1).astype(np.float16), np.clip(t2w, -1, 1).astype(np.float16),
            np.array(masks))


def write_store(folder, splits, size=32, n_slices=6):
    """Write a store and return its folder.

    `splits` maps a split to its subjects: "01", or "01_ses-a" for a session. Numbers decide what
    a subject looks like; `n_slices` may be a dict of subject to number.
    """
    rows = []
    for split, names in splits.items():
        for name in names:
            label, _, session = name.partition("_ses-")
            n = n_slices[name] if isinstance(n_slices, dict) else n_slices
            t1w, t2w, mask = paint_head(sum(map(ord, name)), n, size)
            row = {"id": f"painted_sub-{name}", "dataset": "painted", "subject": label,
                   "session": session, "n_slices": str(n), "brain_extraction": "none",
                   "t1w": f"{name}_T1w.nii.gz", "t2w": f"{name}_T2w.nii.gz",
                   "cut_share": "0", "note": "",
                   "rows_sha256": digest_rows(t1w, t2w, np.packbits(mask, axis=-1))}
            write_part(folder, Part(t1w, t2w, mask, row))
            rows.append({**row, "split": split})
    pack(folder, {**HEADER, "size": size}, rows, {}, {row["id"] for row in rows})
    return folder


def change_rows(folder, name, rows, value):
    """Overwrite rows of an array of a store, as a fault of the disk would."""
    array = np.load(folder / name, mmap_mode="r+")
    array[rows] = value
    array.flush()
