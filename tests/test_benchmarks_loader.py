"""The benchmark of the loader: what it measures is what it says, however small."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_store_is_faster_and_smaller_than_files_and_what_is_missed_is_said(tmp_path):
    done = subprocess.run(
        [sys.executable, "benchmarks/loader.py", "--pairs", "160", "--files", "20", "--views", "1",
         "--repeats", "1", "--seconds", "0.05"], cwd=ROOT, capture_output=True, text=True,
        check=False)
    found = json.loads(done.stdout.splitlines()[-1])
    files, views = found["files"]["file a slice"], found["files"]["file a view"]
    # 128 x 128 of 2 bytes and a bit of mask beside 256 x 256 of 4 bytes, or beside a volume
    assert 0.12 < files["share"] < 0.14 and views["share"] < 0.002
    assert files["times"] > 3 and views["times"] > 30, "far below what an idle machine gives"
    assert [line["batch"] for line in found["waiting"]] == [1, 4, 16, 64, 128, 1, 4, 16]
    assert all(0 < line["waiting"] < 1 for line in found["waiting"])
    assert set(found["cold"]) == {"told first", "touched", "times"}
    assert done.returncode == 1
    assert f"{100 * files['share']:.2f} % of the bytes of file a slice, at most 2" in done.stderr


def test_a_store_of_fewer_pairs_than_a_batch_is_refused():
    done = subprocess.run([sys.executable, "benchmarks/loader.py", "--pairs", "100"], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "128" in done.stderr
