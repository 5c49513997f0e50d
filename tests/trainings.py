"""Small trainings for tests of training.py, validation.py and train.py: nets, a store, the command.

A module and no conftest, since `benchmarks/gpu.sh` runs without what conftest.py needs. Fixtures
go by their `name`.
"""

import json
from pathlib import Path

import pytest
import torch
from commands import TINY, run_command
from painted_store import write_store

import train
from config import TrainConfig
from device import Process
from training import Training

ROOT = Path(train.__file__).parent
CPU = torch.device("cpu")
NO_GPU = not torch.cuda.is_available()
CONFIG = TrainConfig(features=4, blocks=1, precision="fp32", device="cpu", epochs=4, epochs_decay=4)
SPLITS = {"train": ["01", "02", "03"], "val": ["04", "05_ses-a", "05_ses-b"], "test": ["06"]}


@pytest.fixture(scope="session", name="slices")
def slices_fixture(tmp_path_factory):
    """Six slices of each of three subjects to train on, two people to validate on; read only."""
    return write_store(tmp_path_factory.mktemp("painted") / "slices", SPLITS)


@pytest.fixture(name="run")
def run_fixture(slices, tmp_path):
    """Call train.py on the store; the run folder is `tmp_path / "run"` unless named."""
    def call(*options, folder="run", store=slices):
        return run_command(train.main, "--slices", store, "--run", tmp_path / folder, *TINY,
                           "--steps-per-epoch", 5, "--epochs", 4, "--epochs-decay", 4, *options)
    return call


def alone(config=CONFIG, steps_per_epoch=10):
    """A training in this process."""
    record = {"size": 32, "spacing_mm": 4.0, "intensity": {}, "subjects": {}}
    return Training(config, Process(0, 1, CPU), steps_per_epoch, record)


def draw_slices(n, seed=0, size=32):
    """(2, n, 1, size, size) of noise in [-1, 1]: T1w, T2w."""
    return torch.rand(2, n, 1, size, size,
                      generator=torch.Generator().manual_seed(seed)) * 2 - 1


def records(folder, kind):
    """The lines of one kind in a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]
