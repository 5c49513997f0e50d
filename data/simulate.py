"""Simulated T1w and T2w subjects: random heads imaged by signal equations, written as BIDS.

Owns everything between heads (`data/anatomy.py`), signals (`data/sequences.py`) and a BIDS tree of
NIfTI files. Owns no preprocessing: the tree goes through the same pipeline as real scans. A
simulated subject is for trying and testing the programs; it has no skull, no vessels and no
lesions, so it says nothing about how well a net does on people.

Lengths are mm, world axes RAS.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from data.anatomy import (Anatomy, TissueMaps, draw_anatomy, load_tissue_maps, require_nilearn,
                          sample, smooth_noise, tissue_fractions, transform, warp, warped_brain)
from data.sequences import (TISSUES, Sequence, draw_fast_spin_echo, draw_mprage, mix_signals,
                            rician_magnitude)
from data.transfer import lock
from data.workers import Workers

log = logging.getLogger("preprocess.simulate")  # the command that shows what this module says
SIMULATOR = "data/simulate.py"
VERSION = "1"  # raise it whenever the same seed would give other voxels
AXES = {
    "R": (1, 0, 0), "A": (0, 1, 0), "S": (0, 0, 1),
    "L": (-1, 0, 0), "P": (0, -1, 0), "I": (0, 0, -1),
}

TEMPLATE_NOTICE = (
    "Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological "
    "Institute, McGill University. Permission to use, copy, modify, and distribute this software "
    "and its documentation for any purpose and without fee is hereby granted, provided that the "
    "above copyright notice appear in all copies. The authors and McGill University make no "
    "representations about the suitability of this software for any purpose. It is provided "
    '"as is" without express or implied warranty. The authors are not responsible for any data '
    "loss, equipment damage, property loss, or injury to subjects or patients resulting from the "
    "use or misuse of this software package."
)

README = f"""Simulated T1w and T2w brain MRI (seed {{seed}}), made by {SIMULATOR} version {VERSION}.

No person was scanned. Each subject is a random smooth warp of the ICBM 152 template's tissue maps
(Fonov et al. 2011, NeuroImage 54:313), imaged by the signal equations of MPRAGE and fast spin echo
at 3 T. There is no skull: the volumes are 0 outside the brain. derivatives/simulated holds the
truth: brain mask, tissue shares, and the rigid transform between the two scans.

The template's notice: {TEMPLATE_NOTICE}
"""


@dataclass(frozen=True)
class Grid:
    """A volume's voxel grid: shape and voxel-to-world affine (RAS mm)."""

    shape: tuple[int, int, int]
    affine: np.ndarray


@dataclass(frozen=True)
class Scan:
    """One simulated volume and the truth behind it.

    Attributes
    ----------
    grid : Grid of all volumes here.
    volume : (I, J, K) int16, 0 outside the brain and at least 1 inside.
    brain : (I, J, K) bool; N of its voxels are True.
    fractions : (3, N) float32, shares of `TISSUES` in the brain's voxels, summing to 1.
    sequence : Mprage or FastSpinEcho
    snr : signal-to-noise ratio of white matter.
    """

    grid: Grid
    volume: np.ndarray
    brain: np.ndarray
    fractions: np.ndarray
    sequence: Sequence
    snr: float


@dataclass(frozen=True)
class Motion:
    """How the head moved between the scans: T2w world to T1w world, RAS mm.

    x_T1w = R (x_T2w - centre) + centre + translation, R the turn by the rotation vector.
    """

    translation_mm: np.ndarray
    rotation_deg: np.ndarray
    centre_mm: np.ndarray

    @property
    def t2w_to_t1w(self) -> np.ndarray:
        """The (4, 4) matrix."""
        matrix = np.eye(4)
        matrix[:3, :3] = Rotation.from_rotvec(self.rotation_deg, degrees=True).as_matrix()
        turned = (matrix[:3, :3] * self.centre_mm).sum(axis=1)
        matrix[:3, 3] = self.centre_mm + self.translation_mm - turned
        return matrix


@dataclass(frozen=True)
class Subject:
    """One simulated subject: two scans of one anatomy with a small motion between them."""

    anatomy: Anatomy
    motion: Motion
    t1w: Scan
    t2w: Scan


def draw_motion(rng: np.random.Generator, centre_mm: np.ndarray) -> Motion:
    """Draw how a head moved between two scans: 0.5-4 mm and 0.3-4 degrees, any direction."""
    directions = rng.standard_normal((2, 3))
    directions /= np.sqrt(np.sum(np.square(directions), axis=1, keepdims=True))
    shift_mm, turn_deg = rng.uniform(0.5, 4.0), rng.uniform(0.3, 4.0)
    return Motion(shift_mm * directions[0], turn_deg * directions[1], centre_mm)


def draw_grid(
    rng: np.random.Generator, brain_mm: np.ndarray, voxel_mm: np.ndarray, axcodes: str
) -> Grid:
    """Lay a voxel grid around a brain.

    Parameters
    ----------
    brain_mm : (3, N) world points of the brain, RAS mm.
    voxel_mm : (3,) voxel edges along i, j, k.
    axcodes : where i, j, k point, such as "LPS". Half of the grids are oblique, up to 10 degrees.
    """
    axes = np.stack([AXES[code] for code in axcodes], axis=1)
    tilt_deg = rng.uniform(-10.0, 10.0, 3) * (rng.uniform() < 0.5)
    direction = Rotation.from_euler("xyz", tilt_deg, degrees=True).as_matrix() @ axes
    along = np.stack([(direction[:, axis, None] * brain_mm).sum(axis=0) for axis in range(3)])
    low = along.min(axis=1) - rng.uniform(8.0, 20.0, 3)
    high = along.max(axis=1) + rng.uniform(8.0, 20.0, 3)
    affine = np.eye(4)
    affine[:3, :3] = direction * voxel_mm
    affine[:3, 3] = (direction * low).sum(axis=1)
    shape = np.ceil((high - low) / voxel_mm).astype(int) + 1
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


def brain_on_grid(
    anatomy: Anatomy, maps: TissueMaps, grid: Grid, grid_to_head: np.ndarray
) -> np.ndarray:
    """Return the brain mask of a grid's voxel centres: (I, J, K) bool, one piece without holes."""
    step = 4  # a coarse look first: three quarters of a volume is air
    coarse = np.indices([-(-n // step) for n in grid.shape]).reshape(3, -1) * float(step)
    _, voxels = warp(anatomy, maps, transform(grid_to_head, coarse))
    near = sample(maps.brain[None], voxels)[0] > 0.01
    near = near.reshape([-(-n // step) for n in grid.shape])
    near = ndimage.binary_dilation(near, np.ones((3, 3, 3)))
    for axis, length in enumerate(grid.shape):
        near = near.repeat(step, axis).take(range(length), axis)
    mask = np.zeros(grid.shape, bool)
    _, voxels = warp(anatomy, maps, transform(grid_to_head, np.stack(np.nonzero(near)) * 1.0))
    mask[near] = sample(maps.brain[None], voxels)[0] > 0.5
    labels, _ = ndimage.label(mask)
    return ndimage.binary_fill_holes(labels == np.bincount(labels[mask]).argmax())


def slice_profile(thickness_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Return offsets (in slices) and weights (sum 1) that stand for a Gaussian slice profile.

    The profile's full width at half maximum is the slice; thin slices are sampled once, since
    the tissue maps are no sharper than 1 mm anyway.
    """
    n_samples = 1 if thickness_mm <= 1.3 else 3 if thickness_mm <= 2.2 else 5
    offsets = np.linspace(-0.6, 0.6, n_samples) if n_samples > 1 else np.zeros(1)
    weights = np.exp(-4 * np.log(2) * np.square(offsets))
    return offsets, weights / weights.sum()


def image_brain(
    anatomy: Anatomy, maps: TissueMaps, brain: np.ndarray, grid_to_head: np.ndarray,
    sequence: Sequence,
) -> tuple[np.ndarray, np.ndarray]:
    """Image a head on a grid, by one interpolation from the continuous maps.

    Parameters
    ----------
    brain : (I, J, K) bool, the voxels wanted; N of them.
    grid_to_head : (4, 4) affine from voxels to the head (T1w world), RAS mm.

    Returns
    -------
    signal : (N,) float32, averaged along the slice profile, free of noise and bias.
    fractions : (3, N) float32, tissue shares averaged in the same way.
    """
    centres = np.stack(np.nonzero(brain)).astype(np.float64)
    signal = np.zeros(centres.shape[1], np.float32)
    fractions = np.zeros((len(TISSUES), centres.shape[1]), np.float32)
    thickness_mm = float(np.sqrt(np.sum(np.square(grid_to_head[:3, 2]))))
    for offset, weight in zip(*slice_profile(thickness_mm)):
        points = centres + np.array([0.0, 0.0, offset])[:, None]
        lattice, voxels = warp(anatomy, maps, transform(grid_to_head, points))
        shares = tissue_fractions(anatomy, maps, lattice, voxels)
        texture = sample(anatomy.texture, lattice)
        signal += np.float32(weight) * mix_signals(shares, texture, anatomy.tissues, sequence)
        fractions += np.float32(weight) * shares
    return signal, fractions


def draw_bias(rng: np.random.Generator, brain: np.ndarray) -> np.ndarray:
    """Draw a coil's smooth sensitivity at the N voxels of a brain: (N,) float32 around 1."""
    step = 8  # so smooth that a lattice of every 8th voxel holds it
    shape = tuple(-(-n // step) + 1 for n in brain.shape)
    log_bias = rng.uniform(0.05, 0.15) * smooth_noise(rng, shape, 0.25 * float(np.mean(shape)))
    return np.exp(sample(log_bias[None].astype(np.float32), np.stack(np.nonzero(brain)) / step)[0])


def simulate_scan(
    anatomy: Anatomy, maps: TissueMaps, grid: Grid, world_to_head: np.ndarray,
    sequence: Sequence, rng: np.random.Generator,
) -> Scan:
    """Simulate one scan: image, bias field, noise, gain, and storage as int16.

    Parameters
    ----------
    world_to_head : (4, 4) affine from the scan's world to the head (T1w world), RAS mm.
    """
    grid_to_head = world_to_head @ grid.affine
    brain = brain_on_grid(anatomy, maps, grid, grid_to_head)
    signal, fractions = image_brain(anatomy, maps, brain, grid_to_head, sequence)
    signal /= np.abs(signal[fractions[TISSUES.index("WM")] > 0.9]).mean()
    snr, gain = float(rng.uniform(20.0, 50.0)), rng.uniform(300.0, 1200.0)
    magnitude = rician_magnitude(signal * draw_bias(rng, brain), 1 / snr, rng)
    volume = np.zeros(grid.shape, np.int16)
    # At least 1: noise may round fluid down to 0, and 0 means "no brain" to what comes after.
    volume[brain] = np.clip(np.rint(gain * magnitude), 1, np.iinfo(np.int16).max)
    return Scan(grid, volume, brain, fractions, sequence, snr)


def simulate_subject(maps: TissueMaps, seed: int, number: int) -> Subject:
    """Simulate one subject; it depends on the maps and on (seed, number) only.

    Parameters
    ----------
    seed : non-negative; names the data set.
    number : which subject of it, from 1.
    """
    streams = np.random.SeedSequence(seed, spawn_key=(number,)).spawn(3)
    head_rng, t1w_rng, t2w_rng = (np.random.default_rng(stream) for stream in streams)
    anatomy = draw_anatomy(maps, head_rng)
    head_from_template = np.linalg.inv(anatomy.head_to_template)
    brain_mm = transform(head_from_template, warped_brain(maps, anatomy.displacement_mm))
    motion = draw_motion(t2w_rng, brain_mm.mean(axis=1))

    t1w_voxel_mm = np.full(3, t1w_rng.choice([0.9, 1.0, 1.0, 1.0, 1.1, 1.2]))
    t1w_axes = str(t1w_rng.choice(["RAS", "LAS", "LPS", "PSR"]))
    t1w_grid = draw_grid(t1w_rng, brain_mm, t1w_voxel_mm, t1w_axes)
    t1w = simulate_scan(anatomy, maps, t1w_grid, np.eye(4), draw_mprage(t1w_rng), t1w_rng)

    in_plane_mm = round(t2w_rng.uniform(0.8, 1.1), 2)
    t2w_voxel_mm = np.array([in_plane_mm, in_plane_mm, t2w_rng.choice([1.0, 1.5, 2.0, 2.5, 3.0])])
    t2w_axes = str(t2w_rng.choice(["RAS", "LAS", "LPS"]))
    seen_mm = transform(np.linalg.inv(motion.t2w_to_t1w), brain_mm)
    t2w_grid = draw_grid(t2w_rng, seen_mm, t2w_voxel_mm, t2w_axes)
    spin_echo = draw_fast_spin_echo(t2w_rng)
    t2w = simulate_scan(anatomy, maps, t2w_grid, motion.t2w_to_t1w, spin_echo, t2w_rng)
    return Subject(anatomy, motion, t1w, t2w)


def simulate_dataset(
    folder: Path, n_subjects: int, *, seed: int = 0, workers: int = 1, progress: bool = True
) -> Path:
    """Write simulated subjects as a BIDS tree, or go on with one that was interrupted.

    Subject k depends on (seed, k) only: asking for 5 or for 12, with any number of workers, at
    once or after a kill, gives the same bytes. Complete subjects are not made again, and none is
    ever removed: after 12, asking for 5 leaves 12. The truth (brain mask, tissue shares, the rigid
    transform between the scans) lies in `derivatives/simulated`.

    Parameters
    ----------
    folder : the tree; made if missing, refused if it holds anything else.
    n_subjects : at least 1; named sub-sim001, sub-sim002, ...
    seed : non-negative.
    workers : processes; each takes up to 1 GiB of memory.
    progress : show a bar, a step a subject.

    Returns
    -------
    folder : Path

    Raises
    ------
    ValueError : nilearn is missing, an argument is out of range, or `folder` holds another data
        set, another seed's subjects or those of another version of the simulator.
    """
    folder = Path(folder)
    if n_subjects < 1 or workers < 1 or seed < 0:
        raise ValueError(
            f"{n_subjects} subjects, {workers} workers, seed {seed}: "
            "need at least 1 subject and 1 worker, and a seed that is not negative."
        )
    check_same_simulation(folder, seed)
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        check_same_simulation(folder, seed)
        for leftover in folder.rglob(".*.part"):  # of one that was killed
            leftover.unlink()
        write_dataset_files(folder, seed)
        missing = [k for k in range(1, n_subjects + 1) if not is_complete(folder, subject_label(k))]
        if missing:
            require_nilearn()
        make = partial(write_subject, folder, seed)
        bar = tqdm(
            total=n_subjects, initial=n_subjects - len(missing), desc="simulating", unit="subject",
            disable=not progress,
        )
        with bar, Workers(min(workers, len(missing))) as pool:
            for number in missing:
                pool.submit(make, number, lambda _: bar.update())
            pool.wait()
        write_participants(folder)
    return folder


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder while it is written to; waits for another process that does so."""
    if os.name == "nt":  # opens no folders: the user has to see to it
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not lock(handle):
            log.info("%s: waiting for another process that simulates there", folder)
            lock(handle, wait=True)
        yield
    finally:
        os.close(handle)


def subject_label(number: int) -> str:
    """Return the BIDS subject of a number: 7 is "sub-sim007"."""
    return f"sub-sim{number:03d}"


def subject_paths(folder: Path, label: str) -> list[Path]:
    """List a subject's files in the order of writing; the T2w volume is the last.

    So a subject that was interrupted has no T2w, and is not a pair to any reader of the tree.
    """
    truth = [
        "desc-brain_mask.nii.gz",
        "desc-brain_mask.json",
        *(f"label-{name}_probseg.nii.gz" for name in TISSUES),
        "from-T2w_to-T1w_mode-image_xfm.json",
    ]
    raw = ["T1w.json", "T2w.json", "T1w.nii.gz", "T2w.nii.gz"]
    beside = folder / "derivatives" / "simulated" / label / "anat"
    paths = [beside / f"{label}_{name}" for name in truth]
    return paths + [folder / label / "anat" / f"{label}_{name}" for name in raw]


def is_complete(folder: Path, label: str) -> bool:
    """Say whether a subject needs no more work (each file is written whole or not at all)."""
    return all(path.is_file() for path in subject_paths(folder, label))


def write_subject(folder: Path, seed: int, number: int) -> None:
    """Simulate one subject and write its files (runs in a worker)."""
    label = subject_label(number)
    contents = subject_contents(simulate_subject(load_tissue_maps(), seed, number), label)
    for path, content in zip(subject_paths(folder, label), contents, strict=True):
        write_atomically(path, content)


def subject_contents(subject: Subject, label: str) -> list[bytes]:
    """Turn a subject into the bytes of its files, in the order of `subject_paths`."""
    t1w, t2w = subject.t1w, subject.t2w
    return [
        nifti_bytes(t1w.brain.astype(np.uint8), t1w.grid),
        json_bytes({"Type": "Brain", "Sources": [f"bids:raw:{label}/anat/{label}_T1w.nii.gz"]}),
        *(nifti_bytes(volume, t1w.grid, slope=1 / 255) for volume in share_volumes(t1w)),
        json_bytes(motion_record(subject.motion)),
        json_bytes(scan_sidecar(t1w, subject.anatomy)),
        json_bytes(scan_sidecar(t2w, subject.anatomy)),
        nifti_bytes(t1w.volume, t1w.grid),
        nifti_bytes(t2w.volume, t2w.grid),
    ]


def share_volumes(scan: Scan) -> list[np.ndarray]:
    """Return each tissue's share as uint8 volumes that add up to 255 in the brain, 0 outside."""
    grey, white = (np.rint(255 * share).astype(np.uint8) for share in scan.fractions[:2])
    white = np.minimum(white, 255 - grey)  # both may have been rounded up
    volumes = []
    for share in (grey, white, 255 - grey - white):
        volumes.append(np.zeros(scan.brain.shape, np.uint8))
        volumes[-1][scan.brain] = share
    return volumes


def nifti_bytes(volume: np.ndarray, grid: Grid, slope: float | None = None) -> bytes:
    """Return a volume as .nii.gz in scanner coordinates (mm), the same bytes every time."""
    image = nib.Nifti1Image(volume, grid.affine)
    image.set_sform(grid.affine, code="scanner")
    image.set_qform(grid.affine, code="scanner")
    image.header.set_xyzt_units("mm", "sec")
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)  # no clock in the bytes


def json_bytes(record: dict[str, Any]) -> bytes:
    """Return a record as readable JSON."""
    return (json.dumps(record, indent=2) + "\n").encode()


def scan_sidecar(scan: Scan, anatomy: Anatomy) -> dict[str, Any]:
    """Return the BIDS sidecar of a scan, and the tissue values behind it (times in seconds)."""
    tissues = {
        name: {"T1": t.t1_ms / 1000, "T2": t.t2_ms / 1000, "ProtonDensity": t.proton_density}
        for name, t in anatomy.tissues.items()
    }
    return {
        "Modality": "MR",
        "MagneticFieldStrength": 3,
        **scan.sequence.sidecar(),
        "SkullStripped": True,
        "SimulatedTissues": tissues,
        "SimulatedWhiteMatterSNR": scan.snr,
    }


def motion_record(motion: Motion) -> dict[str, Any]:
    """Describe the true rigid transform."""
    return {
        "Description": "True head motion between the scans. Matrix takes world points (RAS, mm) "
        "of the T2w file to those of the T1w file: x_T1w = Matrix x_T2w "
        "= R (x_T2w - Centre) + Centre + Translation, R the turn by the vector Rotation.",
        "Units": {"Translation": "mm", "Centre": "mm", "Rotation": "degrees"},
        "Translation": motion.translation_mm.tolist(),
        "Rotation": motion.rotation_deg.tolist(),
        "Centre": motion.centre_mm.tolist(),
        "Matrix": motion.t2w_to_t1w.tolist(),
    }


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: whoever sees the name sees all of it.

    A file that has these bytes already is left alone: another process may be reading it.
    """
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)


def dataset_description(seed: int, kind: str) -> dict[str, Any]:
    """Return dataset_description.json of the "raw" tree or of its "derivative" truth."""
    return {
        "Name": "Simulated T1w and T2w subjects" + ("" if kind == "raw" else ", ground truth"),
        "BIDSVersion": "1.9.0",
        "DatasetType": kind,
        "License": "Simulated: no person was scanned. The tissue maps derive from the ICBM 152 "
        "2009a nonlinear symmetric template as shipped with nilearn, Copyright (C) 1993-2009 Louis "
        "Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill "
        "University: any use without fee, as long as its notice is kept (README of this data set).",
        "GeneratedBy": [{"Name": SIMULATOR, "Version": VERSION, "Seed": seed}],
        "DatasetLinks": {"raw": "." if kind == "raw" else "../.."},
    }


def check_same_simulation(folder: Path, seed: int) -> None:
    """Raise ValueError unless `folder` is free, or holds this version's subjects of this seed."""
    record = folder / "dataset_description.json"
    if not record.exists():
        # Hidden files do not count: a kill in the very first moment leaves a hidden part file.
        if folder.is_file() or (
            folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
        ):
            raise ValueError(
                f"{folder}: neither free nor a simulated data set (no {record.name} in it). "
                "Choose another folder."
            )
        return
    try:
        made_by = json.loads(record.read_text())["GeneratedBy"][0]
        found = made_by["Name"], made_by["Version"], made_by["Seed"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise ValueError(
            f"{record}: not written by {SIMULATOR}, so this is another data set. "
            "Choose another folder."
        ) from None
    wanted = SIMULATOR, VERSION, seed
    if found != wanted:
        raise ValueError(
            f"{record}: holds subjects of {found[0]} version {found[1]}, seed {found[2]}; asked "
            f"for version {VERSION}, seed {seed}. Choose another folder, or delete {folder}."
        )


def write_dataset_files(folder: Path, seed: int) -> None:
    """Write what describes the tree; the description first, for it carries the seed."""
    truth = folder / "derivatives" / "simulated" / "dataset_description.json"
    raw = folder / "dataset_description.json"
    write_atomically(raw, json_bytes(dataset_description(seed, "raw")))
    write_atomically(truth, json_bytes(dataset_description(seed, "derivative")))
    write_atomically(folder / "README", README.format(seed=seed).encode())


def write_participants(folder: Path) -> None:
    """List the complete subjects of the tree in participants.tsv."""
    labels = sorted(path.name for path in folder.glob("sub-sim*"))
    rows = ["participant_id", *(label for label in labels if is_complete(folder, label)), ""]
    write_atomically(folder / "participants.tsv", "\n".join(rows).encode())
