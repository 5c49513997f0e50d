"""A small archive that misbehaves as it is told, and downloads from it: for tests of `data/`.

Fixtures go by their `name`.
"""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("graphql", reason="the local server needs graphql-core")

from data import openneuro  # noqa: E402
from data.download import Download  # noqa: E402
from data.openneuro import Archive, make_plan  # noqa: E402
from data.transfer import Patience  # noqa: E402
from openneuro_server import OpenNeuro  # noqa: E402

ROOT = Path(__file__).parent.parent
DATASET = "ds000001"
T1W, T2W = "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz"
QUICK = Patience(attempts=4, first_wait_s=0.01, longest_wait_s=2, connect_s=2, silence_s=1,
                 listing_s=5)


@pytest.fixture(autouse=True, name="quiet_environment")
def quiet_environment_fixture(monkeypatch, tmp_path_factory):
    """No proxy before loopback, no mirror of the user's, and no 150 certificates to load."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path_factory.getbasetemp()))
    monkeypatch.delenv(openneuro.API_VARIABLE, raising=False)
    monkeypatch.delenv(openneuro.S3_VARIABLE, raising=False)


def write_scan(path, seed, side=48):
    """A NIfTI of noise, which gzip cannot shrink: 48 voxels a side are 170 kB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).integers(0, 4096, (side,) * 3, dtype=np.int16)
    nib.Nifti1Image(voxels, np.eye(4)).to_filename(path)


@pytest.fixture(scope="session", name="tree")
def tree_fixture(tmp_path_factory):
    """Two subjects with both scans, one with T1w alone, and much that nobody needs."""
    root = tmp_path_factory.mktemp("archive") / DATASET
    for i, label in enumerate(("01", "02", "03")):
        anat = root / f"sub-{label}" / "anat"
        for j, suffix in enumerate(("T1w", "T2w")):
            if (label, suffix) != ("03", "T2w"):
                write_scan(anat / f"sub-{label}_{suffix}.nii.gz", 2 * i + j)
                (anat / f"sub-{label}_{suffix}.json").write_text('{"EchoTime": 0.1}')
        (root / f"sub-{label}" / "func").mkdir()
        (root / f"sub-{label}" / "func" / f"sub-{label}_task-rest_bold.nii.gz").write_bytes(b"no")
    write_scan(root / "derivatives" / "x" / "sub-01" / "anat" / "sub-01_T1w.nii.gz", 9)
    about = {"Name": "Heads", "License": "CC0", "DatasetDOI": "doi:10.18112/openneuro.x.v1.0.0"}
    (root / "dataset_description.json").write_text(json.dumps(about))
    (root / "participants.tsv").write_text("participant_id\tage\nsub-01\t30\n")
    (root / "README").write_text("Heads of noise.")
    (root / "CHANGES").write_text("1.0.0 2020-01-01\n  - First.")
    (root / "T1w.json").write_text('{"MagneticFieldStrength": 3}')
    (root / "task-rest_bold.json").write_text("{}")
    return root


@pytest.fixture(name="server")
def server_fixture(tree):
    with OpenNeuro({DATASET: {"1.0.0": tree}}) as running:
        yield running


@pytest.fixture(scope="session", name="scans")
def scans_fixture(tree, tmp_path_factory):
    """`tree` without all that is not a scan of the first two subjects."""
    root = tmp_path_factory.mktemp("scans") / DATASET
    for name in wanted(tree):
        if name.endswith(".nii.gz"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes((tree / name).read_bytes())
    return root


@pytest.fixture(name="scan_server")
def scan_server_fixture(scans):
    with OpenNeuro({DATASET: {"1.0.0": scans}}) as running:
        yield running


@pytest.fixture(name="other_tree")
def other_tree_fixture(tree, tmp_path_factory):
    """The same names with another T1w, as a later snapshot would have."""
    root = tmp_path_factory.mktemp("later") / DATASET
    for name in data_files(tree):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((tree / name).read_bytes())
    write_scan(root / T1W, 77, side=50)
    return root


@pytest.fixture(name="crowd")
def crowd_fixture(tmp_path_factory):
    """Eight subjects of 20 kB scans."""
    root = tmp_path_factory.mktemp("crowd") / DATASET
    for i in range(8):
        for j, suffix in enumerate(("T1w", "T2w")):
            write_scan(root / f"sub-{i}/anat/sub-{i}_{suffix}.nii.gz", 2 * i + j, side=20)
    (root / "dataset_description.json").write_text('{"Name": "Crowd"}')
    with OpenNeuro({DATASET: {"1.0.0": root}}) as running:
        yield running


def fetch(server, folder, *, limit=None, patience=QUICK, spec=f"{DATASET}:1.0.0", **options):
    """Download with everything kept; returns {subject: reason}."""
    with Archive(server.api_url, server.s3_url, patience) as archive:
        plan = make_plan(archive.snapshot(spec), limit)
        options = {"keep": True, "progress": False, **options}
        with Download(archive, plan, folder, **options) as download:
            found = {}
            for subject, reason in download:
                found[subject.subject] = reason
                download.finish(subject)
    return found


def data_files(folder):
    """Names and bytes of what looks whole: no `.part`, no manifest."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and ".part" not in p.name and not p.name.startswith("manifest.json")}


def assert_whole_or_absent(folder, tree):
    """Every file below a dataset's folder is the archive's, byte for byte."""
    for name, content in data_files(folder).items():
        assert content == (tree / name).read_bytes(), name


def wanted(tree, people=("01", "02")):
    """Names that a plan of `tree` has."""
    common = ["CHANGES", "README", "T1w.json", "dataset_description.json", "participants.tsv"]
    return sorted(common + [f"sub-{p}/anat/sub-{p}_{s}.{e}" for p in people
                            for s in ("T1w", "T2w") for e in ("json", "nii.gz")])


def listed(server, spec=f"{DATASET}:1.0.0", patience=QUICK):
    with Archive(server.api_url, server.s3_url, patience) as archive:
        return archive.snapshot(spec)
