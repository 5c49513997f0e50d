"""Synthetic heads for all tests: ellipsoids with the contrasts of T1w and T2w, painted on any grid.

A head is a function of world coordinates (RAS mm), so a scan on any grid, in any orientation and
after any rigid movement is exact: nothing is interpolated. Left and right, front and back, top and
bottom all differ. The brain has 1.2 to 1.6 litres.
"""

import base64
import json
import os
import shutil

# The nets of the tests are tiny: threads that share them wait for each other, ten times as long
# where other programs want the cores. Read when torch is imported, and by child processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import ndimage

# files that take minutes, longest first
LONG = ("test_preprocess_datasets", "test_preprocess", "test_evaluate", "test_train_resume",
        "test_train", "test_whole_path", "test_data_simulate", "test_data_download",
        "test_data_download_resume", "test_data_hdbet", "test_training", "test_train_torchrun",
        "test_models_export", "test_models_features")


def pytest_collection_modifyitems(items):
    """Begin with what takes longest: side by side, no process is left with it at the end."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


# centre and half axes in mm, T1w and T2w signal; each is painted over those above it
SCALP_TO_CSF = (
    ((0, 0, 0), (84, 104, 80), 900, 500),
    ((0, 0, 0), (79, 98, 75), 100, 80),
    ((0, 0, 0), (73, 91, 67), 250, 1500),
    ((-32, 82, -25), (12, 12, 12), 150, 1600),
    ((32, 82, -25), (12, 12, 12), 150, 1600),
)
BRAIN = (
    ((0, 0, 0), (66, 83, 60), 600, 900),
    ((0, 2, 3), (52, 68, 45), 900, 600),
    ((0, -48, -36), (33, 20, 15), 760, 800),
    ((-13, 4, 8), (8, 25, 12), 200, 1500),
    ((11, 8, 6), (6, 19, 9), 200, 1500),
    ((31, 24, 22), (10, 8, 9), 400, 1300),
    ((-20, -8, -14), (12, 14, 8), 680, 520),
)


def paint(shape, affine, suffix="T1w", *, person=0, extracted=True, matrix=None):
    """(I, J, K) float32 of a head; `matrix` (4, 4) moves it: head mm to scan mm."""
    points = np.indices(shape).reshape(3, -1)
    there = affine if matrix is None else np.linalg.inv(matrix) @ affine
    x, y, z = world = there[:3, :3] @ points + there[:3, 3:]
    draws = np.random.default_rng(person)
    size = draws.uniform(0.95, 1.04, (3, 1))
    value = np.zeros(points.shape[1])
    for centre, axes, *signals in (*(() if extracted else SCALP_TO_CSF), *BRAIN):
        moved = np.array(centre) + draws.uniform(-1, 1, 3) * (np.linalg.norm(centre) > 0)
        radius = np.linalg.norm((world / size - moved[:, None]) / np.array(axes)[:, None], axis=0)
        share = 1 / (1 + np.exp(np.clip((radius - 1) * min(axes) / 1.5, -30, 30)))
        value += share * (signals[suffix == "T2w"] - value)
    value *= 1 + 0.06 * np.sin(x / 9) * np.cos(y / 11) * np.sin(z / 8 + x / 20)
    if extracted:
        inside = np.linalg.norm(world / size / np.array(BRAIN[0][1])[:, None], axis=0) <= 1
        value = np.where(inside, value, 0)
    return np.maximum(value, 0).reshape(shape).astype(np.float32)


def lay_affine(shape, spacing, axes="RAS", *, turn_deg=(0, 0, 0), middle=(0, 0, 0)):
    """(4, 4) affine: axes towards `axes`, turned about x, y, z; the box's middle at `middle`."""
    towards = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, letter in enumerate(axes):
        row, sign = towards[letter]
        affine[row, column] = sign * np.broadcast_to(spacing, 3)[column]
    affine = rigid(turn_deg) @ affine
    affine[:3, 3] = np.array(middle) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def rigid(turn_deg=(0, 0, 0), shift_mm=(0, 0, 0)):
    """(4, 4) turn about x, then y, then z through the origin, then shift."""
    matrix = np.eye(4)
    for axis, angle in enumerate(np.radians(turn_deg)):
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        turn = np.eye(4)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    matrix[:3, 3] = shift_mm
    return matrix


def write_pair(root, label, *, session="", shape=(38, 48, 29), spacing=(4, 4, 5), axes="RAS",
               turn_deg=(0, 0, 0), middle=(0, 0, 0), person=None, extracted=True, matrix=None,
               t2w_shape=None, t2w_affine=None, dtype=np.int16, ending=".nii.gz", only=None,
               mask=False):
    """Write a subject of a BIDS tree; returns its `anat` folder.

    `only` leaves out the other scan, `mask` adds a *_desc-brain_mask.nii.gz beside T1w; T2w stands
    on T1w's grid unless it gets a grid of its own; `matrix` is how the head moved before T2w.
    """
    root.mkdir(parents=True, exist_ok=True)
    about = {"Name": root.name, "BIDSVersion": "1.8.0", "License": "CC0"}
    (root / "dataset_description.json").write_text(json.dumps(about))
    stem = f"sub-{label}" + (f"_ses-{session}" if session else "")
    anat = root.joinpath(*stem.split("_"), "anat")
    anat.mkdir(parents=True, exist_ok=True)
    affine = lay_affine(shape, spacing, axes, turn_deg=turn_deg, middle=middle)
    person = sum(map(ord, label)) if person is None else person
    grids = {"T1w": (shape, affine, None),
             "T2w": (t2w_shape or shape, affine if t2w_affine is None else t2w_affine, matrix)}
    for suffix, (size, place, move) in grids.items():
        if only in (None, suffix):
            data = paint(size, place, suffix, person=person, extracted=extracted, matrix=move)
            scan = nib.Nifti1Image(data.astype(dtype), place)
            scan.to_filename(anat / f"{stem}_{suffix}{ending}")
    if mask:
        data = paint(shape, affine, person=person) > 0
        name = anat / f"{stem}_desc-brain_mask.nii.gz"
        nib.Nifti1Image(data.astype(np.uint8), affine).to_filename(name)
    return anat


@pytest.fixture(scope="session")
def small_tree(tmp_path_factory):
    """A BIDS tree of five extracted heads, `sub-01` to `sub-05`; for reading only."""
    root = tmp_path_factory.mktemp("bids") / "heads"
    for label in ("01", "02", "03", "04", "05"):
        write_pair(root, label)
    return root


@pytest.fixture(scope="session")
def small_store(small_tree, tmp_path_factory):
    """The slice store of `small_tree`: 48 pixels of 4 mm; 3 train, 1 val, 1 test; only to read."""
    import preprocess

    out = tmp_path_factory.mktemp("store") / "slices"
    assert preprocess.main(["--bids", str(small_tree), "--out", str(out), "--size", "48",
                            "--spacing", "4", "--brain-extraction", "none", "--workers", "0",
                            "--val", "04", "--test", "05"]) == 0
    return out


PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAA"
                         "AgABSK+kcQAAAABJRU5ErkJggg==")


@pytest.fixture
def unpainted(monkeypatch):
    """For tests of numbers: each picture is one pixel, which saves most of an evaluation's time."""
    def savefig(figure, out, *, format, **_):
        out.write(PIXEL if format == "png" else b"<?xml version='1.0'?><svg/>")

    monkeypatch.setattr(Figure, "savefig", savefig)


# signals of painted T1w scans that are of one tissue
TISSUES = {"CSF": (1, 400), "GM": (400, 750), "WM": (750, 2000)}


@pytest.fixture
def segmented_tree(small_tree, tmp_path):
    """A copy of `small_tree` with maps of the tissues of its subjects 04 and 05."""
    tree = tmp_path / "heads"
    shutil.copytree(small_tree, tree)
    for label in ("sub-04", "sub-05"):
        scan = nib.load(tree / label / "anat" / f"{label}_T1w.nii.gz")
        values, folder = scan.get_fdata(), tree / "derivatives" / "painted" / label / "anat"
        folder.mkdir(parents=True)
        inside = ndimage.binary_erosion(values > 0, iterations=3)  # the rim is a bit of everything
        for name, (low, high) in TISSUES.items():
            share = (values >= low) & (values < high) & inside
            share = nib.Nifti1Image(share.astype(np.uint8), scan.affine)
            share.to_filename(folder / f"{label}_label-{name}_probseg.nii.gz")
    return tree


def content(folder):
    """Every file below a folder: relative name to bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file()}
