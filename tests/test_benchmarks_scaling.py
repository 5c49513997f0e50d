"""The benchmark of scaling: its arithmetic, its large store, its runs of train.py."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from painted_store import write_store

from data.store import SliceStore

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def scaling():
    """The script as a module; it changes the path for itself."""
    before = list(sys.path)
    sys.path.insert(0, "")
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def run(scaling, capsys, *options):
    """Exit code and the last line as JSON."""
    code = scaling.main([str(option) for option in options])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_step_is_computing_and_what_is_left_of_the_ring(scaling):
    assert scaling.step_of(1, 0.1, 1e9, 1e9, 1, 0) == 0.1
    # two GPUs send half of 100 MB twice, at 1 GB/s, in two hops of a millisecond
    assert scaling.step_of(2, 0.1, 1e8, 1e9, 1e-3, 0) == pytest.approx(0.1 + 0.1 + 0.002)
    # eight send an eighth fourteen times, of which half of the step hides 50 ms
    assert scaling.step_of(8, 0.1, 1e8, 1e9, 1e-3, 0.5) == pytest.approx(
        0.1 + 14 / 8 * 0.1 + 0.014 - 0.05)
    assert scaling.step_of(8, 0.1, 1e6, 1e9, 0, 0.5) == 0.1, "all of it hidden"


def test_the_paper_counts_the_real_nets(scaling, capsys):
    code, found = run(scaling, capsys, "--parts", "paper", "--step-ms", 20, "--overlap", 0)
    assert code == 0
    # Zhu et al. 2017 with one channel: 2 x 7,825,153 or 11,365,633, and 2 x 2,762,689
    assert found["paper"]["bytes"] == {"6": 4 * 21_175_684, "9": 4 * 28_256_644}
    steps = found["paper"]["step_s"]
    assert set(steps["1"].values()) == {0.02}
    assert steps["2"]["200 Gb/s network"] == pytest.approx(0.02 + 84.702736e6 / 25e9 + 16e-6)
    assert "NVLink, 450 GB/s" not in steps["16"], "a machine has eight"


def test_a_large_store_is_a_real_one_and_opens(scaling, capsys, tmp_path):
    code, found = run(scaling, capsys, "--parts", "opening", "--subjects", 400, "--repeats", 1)
    assert code == 0
    assert found["opening"]["rows"] == 400 * 200 * 0.8
    assert 0 < found["opening"]["seconds"] < 1 and 0 < found["opening"]["mib"] < 200
    scaling.write_sparse(tmp_path / "large", 30)
    store = SliceStore(tmp_path / "large")
    assert len(store) == 6000 and len(store.rows("test")) == 600
    assert (tmp_path / "large" / "t1w.npy").stat().st_size > 6000 * 128 * 128 * 2


def test_the_rate_is_what_train_py_itself_logs(scaling, tmp_path):
    args = scaling.parse_args(["--features", "2", "--blocks", "1", "--steps", "4"])
    write_store(tmp_path / "slices", {"train": ["01", "02"], "val": ["03"]}, 32, 4)
    rate = scaling.train(args, tmp_path, tmp_path / "run", 2, 2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    rates = [line["pairs_per_s"] for line in lines if line["kind"] == "speed"]
    assert len(rates) == 4 and rate == sorted(rates[1:])[1]
    config = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert config["processes"] == 2 and config["device"].endswith("CPU, 1 threads")
