"""Simulated subjects: signal equations, anatomy, and the BIDS tree. Needs nilearn's package data.

Two real subjects are simulated once for the module by two workers; what needs no brain is tested on
numbers.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

pytest.importorskip("nilearn")

from data import anatomy, sequences, simulate  # noqa: E402

ROOT = Path(__file__).parents[1]
LABELS = ("sub-sim001", "sub-sim002")
MPRAGE = sequences.Mprage(
    repetition_ms=2300.0, inversion_ms=900.0, echo_ms=2.5, echo_spacing_ms=7.0,
    n_excitations=176, flip_deg=8.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "tree"
    return simulate.simulate_dataset(folder, 2, workers=2, progress=False)


@pytest.fixture(scope="module")
def maps():
    return anatomy.load_tissue_maps()


def raw(tree, label, suffix):
    return nib.load(tree / label / "anat" / f"{label}_{suffix}.nii.gz")


def truth(tree, label, name):
    return tree / "derivatives" / "simulated" / label / "anat" / f"{label}_{name}"


def shares(tree, label):
    """True tissue shares on the T1w grid: (3, I, J, K)."""
    names = [f"label-{tissue}_probseg.nii.gz" for tissue in sequences.TISSUES]
    return np.stack([nib.load(truth(tree, label, name)).get_fdata() for name in names])


def content(tree):
    return {str(p.relative_to(tree)): p.read_bytes() for p in tree.rglob("*") if p.is_file()}


def recorded_motion(tree, label):
    return json.loads(truth(tree, label, "from-T2w_to-T1w_mode-image_xfm.json").read_text())


def t2w_at(tree, label, t2w_to_t1w, t1w_voxels):
    """Interpolate the T2w at (3, N) voxels of the T1w grid, taken there by the inverse motion."""
    t1w, t2w = raw(tree, label, "T1w"), raw(tree, label, "T2w")
    places = np.linalg.inv(t2w_to_t1w @ t2w.affine) @ t1w.affine
    points = nib.affines.apply_affine(places, t1w_voxels.T).T
    return ndimage.map_coordinates(np.asarray(t2w.dataobj, np.float32), points, order=1)


def explained(values, fractions, voxels):
    """Share of the variance that the true tissue shares explain, slow bias fields removed."""
    values, places = np.log(np.maximum(values, 1.0)), voxels / 100.0 - 1.0
    bias = [places[a] * places[b] for a in range(3) for b in range(a, 3)]
    design = np.stack([*fractions, *places, *bias], axis=1)
    left = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return 1 - left.var() / values.var()


def test_grids_hold_the_brain_and_point_where_asked():
    rng = np.random.default_rng(0)
    brain_mm = rng.uniform(-70.0, 70.0, (3, 300))
    for axcodes in ("RAS", "LAS", "LPS", "PSR"):
        grid = simulate.draw_grid(rng, brain_mm, np.array([0.9, 0.9, 2.5]), axcodes)
        voxels = np.linalg.inv(grid.affine) @ np.vstack([brain_mm, np.ones(300)])
        assert nib.aff2axcodes(grid.affine) == tuple(axcodes)
        assert np.allclose(nib.affines.voxel_sizes(grid.affine), [0.9, 0.9, 2.5])
        assert (voxels[:3] > 2).all() and (voxels[:3].T < np.array(grid.shape) - 3).all()


def test_tissue_shares_add_up_even_where_both_round_up():
    fractions = np.array([[0.5, 0.2], [0.5, 0.3], [0.0, 0.5]], np.float32)
    grid = simulate.Grid((2, 1, 1), np.eye(4))
    scan = simulate.Scan(grid, np.zeros(1), np.ones((2, 1, 1), bool), fractions, MPRAGE, 30.0)
    total = np.sum(simulate.share_volumes(scan), axis=0, dtype=int)
    assert total.ravel().tolist() == [255, 255]


# Subjects as files


@pytest.mark.parametrize("label", LABELS)
def test_tissues_lie_in_the_order_of_their_weighting(tree, label):
    t1w, matrix = raw(tree, label, "T1w").get_fdata(), recorded_motion(tree, label)["Matrix"]
    means = []
    for share in shares(tree, label):
        voxels = np.stack(np.nonzero(share > 0.9))
        t2w = t2w_at(tree, label, matrix, voxels)
        assert voxels.shape[1] > 5000
        means.append((t1w[tuple(voxels)].mean(), t2w[t2w > 0].mean()))
    (grey_t1w, grey_t2w), (white_t1w, white_t2w), (fluid_t1w, fluid_t2w) = means
    assert white_t1w > 1.1 * grey_t1w > 1.1 * 1.1 * fluid_t1w
    assert fluid_t2w > 1.3 * grey_t2w > 1.3 * 1.2 * white_t2w


@pytest.mark.parametrize("label", LABELS)
def test_volumes_are_zero_outside_the_brain_and_nowhere_inside(tree, label):
    brain = np.asarray(nib.load(truth(tree, label, "desc-brain_mask.nii.gz")).dataobj) > 0
    assert np.array_equal(np.asarray(raw(tree, label, "T1w").dataobj) > 0, brain)
    t2w_brain = np.asarray(raw(tree, label, "T2w").dataobj) > 0
    for mask in (brain, t2w_brain):
        assert np.array_equal(ndimage.binary_fill_holes(mask), mask)
        assert ndimage.label(mask)[1] == 1
        assert not any(np.take(mask, (0, -1), axis).any() for axis in range(3))


@pytest.mark.parametrize("label", LABELS)
def test_brains_have_an_adults_volume_the_same_in_both_scans(tree, label):
    litres = [
        np.count_nonzero(image.dataobj) * abs(np.linalg.det(image.affine[:3, :3])) / 1e6
        for image in (raw(tree, label, "T1w"), raw(tree, label, "T2w"))
    ]
    assert 1.1 < litres[0] < 1.7
    assert litres[1] == pytest.approx(litres[0], rel=0.01)


@pytest.mark.parametrize("label", LABELS)
def test_tissue_shares_fill_the_brain_with_an_adults_mix(tree, label):
    fractions = shares(tree, label)
    brain = np.asarray(nib.load(truth(tree, label, "desc-brain_mask.nii.gz")).dataobj) > 0
    assert np.allclose(fractions.sum(axis=0), brain, atol=1e-6)
    grey, white, fluid = fractions.sum(axis=(1, 2, 3)) / brain.sum()
    assert 0.35 < grey < 0.65 and 0.25 < white < 0.5 and 0.05 < fluid < 0.3


@pytest.mark.parametrize("label", LABELS)
def test_the_recorded_transform_fits_better_than_any_near_it(tree, label):
    brain = np.asarray(nib.load(truth(tree, label, "desc-brain_mask.nii.gz")).dataobj) > 0
    inside = ndimage.binary_erosion(brain, iterations=6)
    voxels = np.stack(np.nonzero(inside))[:, ::5]
    fractions = shares(tree, label)[:, inside][:, ::5]
    matrix = np.array(recorded_motion(tree, label)["Matrix"])
    best = explained(t2w_at(tree, label, matrix, voxels), fractions, voxels)
    assert best > 0.9
    for shift_mm in (*np.eye(3), *-np.eye(3)):
        moved = matrix.copy()
        moved[:3, 3] += shift_mm
        assert explained(t2w_at(tree, label, moved, voxels), fractions, voxels) < best
    assert explained(t2w_at(tree, label, np.eye(4), voxels), fractions, voxels) < best


def test_the_recorded_motion_is_small_rigid_and_spelled_out_twice(tree):
    for label in LABELS:
        record = recorded_motion(tree, label)
        matrix, centre = np.array(record["Matrix"]), np.array(record["Centre"])
        assert np.allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-12)
        assert np.linalg.det(matrix[:3, :3]) == pytest.approx(1.0)
        assert np.allclose(matrix[:3, :3] @ centre + matrix[:3, 3] - centre, record["Translation"])
        angle = np.degrees(np.arccos((np.trace(matrix[:3, :3]) - 1) / 2))
        assert angle == pytest.approx(np.linalg.norm(record["Rotation"]), abs=1e-6)
        assert 0.5 <= np.linalg.norm(record["Translation"]) <= 4.0 and 0.3 <= angle <= 4.0


def test_the_tree_has_the_names_and_sidecars_of_bids(tree):
    description = json.loads((tree / "dataset_description.json").read_text())
    assert description["DatasetType"] == "raw" and "ICBM 152" in description["License"]
    inner = json.loads((tree / "derivatives/simulated/dataset_description.json").read_text())
    assert inner["DatasetType"] == "derivative" and inner["GeneratedBy"][0]["Seed"] == 0
    assert (tree / "participants.tsv").read_text().split() == ["participant_id", *LABELS]
    assert "No person was scanned" in (tree / "README").read_text()
    for label in LABELS:
        t1w = json.loads((tree / label / "anat" / f"{label}_T1w.json").read_text())
        t2w = json.loads((tree / label / "anat" / f"{label}_T2w.json").read_text())
        assert t1w["EchoTime"] < 0.01 < t1w["InversionTime"] < t1w["RepetitionTime"] < 3
        assert 0.07 < t2w["EchoTime"] < 0.12 and 3 < t2w["RepetitionTime"] < 7
        for suffix in ("T1w", "T2w"):
            image = raw(tree, label, suffix)
            assert image.get_data_dtype() == np.int16
            assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 1
    assert not list(tree.rglob("*.part"))


def test_another_seed_or_number_is_another_subject(tree, maps):
    first = raw(tree, LABELS[0], "T1w")
    other_seed = simulate.simulate_subject(maps, 1, 1)
    for volume in (np.asarray(raw(tree, LABELS[1], "T1w").dataobj), other_seed.t1w.volume):
        assert not np.array_equal(volume, np.asarray(first.dataobj))


def python(program):
    """Start a program from the repository root; its output is a pipe of text."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def test_killed_midway_one_process_goes_on_to_the_bytes_two_workers_made(tree, tmp_path):
    folder = tmp_path / "killed"
    process = python(  # kills itself with a file half done: a kill from here could come too late
        "import os, signal\n"
        "from data import simulate\n"
        "def replace(part, path, finish=os.replace):\n"
        "    if path.name.endswith('WM_probseg.nii.gz'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    finish(part, path)\n"
        "os.replace = replace\n"
        f"simulate.simulate_dataset(simulate.Path({str(folder)!r}), 1, progress=False)"
    )
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert list(folder.rglob("*WM_probseg.nii.gz.*.part")) and list(folder.rglob("*_mask.nii.gz"))
    simulate.simulate_dataset(folder, 1, progress=False)
    expected = {n: b for n, b in content(tree).items() if LABELS[1] not in n}
    expected["participants.tsv"] = f"participant_id\n{LABELS[0]}\n".encode()
    assert content(folder) == expected


def test_only_the_subject_with_a_missing_file_is_made_again(tree):
    before = content(tree)
    lost = tree / LABELS[1] / "anat" / f"{LABELS[1]}_T1w.nii.gz"
    kept = tree / LABELS[0] / "anat" / f"{LABELS[0]}_T1w.nii.gz"
    lost.unlink()
    made = kept.stat().st_mtime_ns
    simulate.simulate_dataset(tree, 2, progress=False)
    assert content(tree) == before and kept.stat().st_mtime_ns == made


def test_two_runs_at_once_share_a_folder_and_the_second_makes_nothing_anew(tree, tmp_path):
    folder = tmp_path / "shared"
    program = ("import logging\n"
               "from data import simulate\n"
               "logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
               "make = simulate.simulate_subject\n"
               "def make_and_say(*which):\n"
               "    print('made')\n"
               "    return make(*which)\n"
               "simulate.simulate_subject = make_and_say\n"
               f"simulate.simulate_dataset(simulate.Path({str(folder)!r}), 1, progress=False)")
    both = [python(program) for _ in range(2)]
    said = "".join(process.communicate(timeout=240)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0] and said.count("made") == 1
    expected = {n: b for n, b in content(tree).items() if LABELS[1] not in n}
    expected["participants.tsv"] = f"participant_id\n{LABELS[0]}\n".encode()
    assert content(folder) == expected


def test_a_complete_tree_is_not_written_to(tree):
    before = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    simulate.simulate_dataset(tree, 2, progress=False)
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*")} == before


def test_asking_for_fewer_subjects_leaves_the_others(tree):
    before = content(tree)
    simulate.simulate_dataset(tree, 1, progress=False)
    assert content(tree) == before


def test_another_seed_or_version_in_the_same_folder_is_refused(tree, monkeypatch):
    before = content(tree)
    with pytest.raises(ValueError, match="description.json.*seed 0.*seed 7.*another folder"):
        simulate.simulate_dataset(tree, 2, seed=7, progress=False)
    monkeypatch.setattr(simulate, "VERSION", "next")
    with pytest.raises(ValueError, match="version 1.*version next.*another folder"):
        simulate.simulate_dataset(tree, 2, progress=False)
    assert content(tree) == before


def test_a_folder_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "sub-01").mkdir()
    with pytest.raises(ValueError, match="neither free nor a simulated data set"):
        simulate.simulate_dataset(tmp_path, 1, progress=False)
    (tmp_path / "dataset_description.json").write_text('{"Name": "my study"}')
    with pytest.raises(ValueError, match="another data set"):
        simulate.simulate_dataset(tmp_path, 1, progress=False)
    with pytest.raises(ValueError, match="neither free"):
        simulate.simulate_dataset(tmp_path / "dataset_description.json", 1, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dataset_description.json", "sub-01"]


@pytest.mark.parametrize("wrong", [{"n_subjects": 0}, {"seed": -1}, {"workers": 0}])
def test_numbers_out_of_range_are_refused_before_anything_is_written(wrong, tmp_path):
    with pytest.raises(ValueError, match="need at least"):
        simulate.simulate_dataset(tmp_path / "new", **{"n_subjects": 1, "progress": False, **wrong})
    assert not (tmp_path / "new").exists()


def test_without_nilearn_the_error_names_the_extra_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nilearn", None)  # what Python sees of a missing package
    with pytest.raises(ValueError, match=r"nilearn is missing.*pip install '\.\[simulate\]'"):
        simulate.simulate_dataset(tmp_path / "new", 1, progress=False)


def test_a_thick_slice_is_averaged_and_a_thin_one_is_not():
    assert simulate.slice_profile(1.0)[0].tolist() == [0.0]
    offsets, weights = simulate.slice_profile(3.0)
    assert len(offsets) == 5 and weights.sum() == pytest.approx(1.0)
    assert weights[2] == weights.max() and np.allclose(weights, weights[::-1])
