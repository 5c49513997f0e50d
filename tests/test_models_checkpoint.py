"""Tests of models/checkpoint.py."""

import os
import subprocess
import sys
import zipfile

import pytest
import torch

from models import checkpoint
from models.cyclegan import EMA, CycleGAN, init_weights

CONFIG = {"features": 2, "blocks": 1, "upsample": "nearest"}


@pytest.fixture
def nets():
    nets = CycleGAN(**CONFIG)
    init_weights(nets, torch.Generator().manual_seed(0))
    return nets


@pytest.fixture
def state(nets):
    preprocessing = {"size": 32, "spacing_mm": 3.0, "intensity": {"rule": "x"},
                     "subjects": {"train": ["a_sub-01"]}}
    return {"config": CONFIG, "preprocessing": preprocessing, "step": 7, "epoch": 1,
            "slices_seen": 14, "ema": EMA(nets).state_dict(),
            "best": {"t2w_ssim": 0.5, "kept": [[0.5, 1]]}}


def flip_a_bit(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_comes_back_as_it_was_saved(state, tmp_path):
    checkpoint.save(tmp_path / "best.pt", state)
    loaded = checkpoint.load(tmp_path / "best.pt")
    assert loaded["format"] == {"name": "t1w-t2w-cyclegan", "version": 1}
    for key in ("config", "preprocessing", "step", "epoch", "slices_seen", "best"):
        assert loaded[key] == state[key]
    for net in ("G", "F"):
        assert all(torch.equal(loaded["ema"][net][k], v) for k, v in state["ema"][net].items())


def test_pytorch_reads_a_checkpoint_without_running_code_from_it(state, tmp_path):
    checkpoint.save(tmp_path / "best.pt", state)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 7


def test_the_file_of_before_stays_unless_told_otherwise(state, tmp_path):
    path = tmp_path / "last.pt"
    for step in (1, 2, 3):
        checkpoint.save(path, {**state, "step": step})
    assert checkpoint.load(path)["step"] == 3
    assert checkpoint.load(checkpoint.previous(path))["step"] == 2
    checkpoint.save(tmp_path / "best.pt", state, keep_previous=False)
    checkpoint.save(tmp_path / "best.pt", state, keep_previous=False)
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.previous.pt", "last.pt"]


def test_a_write_that_fails_leaves_the_checkpoint_of_before(state, tmp_path):
    checkpoint.save(tmp_path / "last.pt", state)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(tmp_path / "last.pt", {**state, "step": lambda: 0})
    assert os.listdir(tmp_path) == ["last.pt"]
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_full_disk_is_said_and_leaves_the_checkpoint_of_before(state, tmp_path):
    resource = pytest.importorskip("resource")  # limits the size of a file: Unix only
    checkpoint.save(tmp_path / "last.pt", state)
    before = (tmp_path / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="last.pt: not written, File too large; make room"):
            checkpoint.save(tmp_path / "last.pt", state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["last.pt"]
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_write_that_is_killed_leaves_the_checkpoint_of_before(state, tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, state)
    before = path.read_bytes()
    program = ("import os, sys, torch\nfrom pathlib import Path\nfrom models import checkpoint\n"
               "path = Path(sys.argv[1])\nstate = checkpoint.load(path)\n"
               "os.fsync = lambda handle: os.kill(os.getpid(), 9)\n"  # before the rename
               "checkpoint.save(path, state)\n")
    killed = subprocess.run([sys.executable, "-c", program, path], cwd=os.getcwd())
    assert killed.returncode == -9
    assert path.read_bytes() == before
    checkpoint.save(path, {**state, "step": 8})
    assert sorted(os.listdir(tmp_path)) == ["last.previous.pt", "last.pt"]  # no litter


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="best.pt: no such checkpoint"):
        checkpoint.load(tmp_path / "best.pt")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        checkpoint.load(tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "best.pt"
    for content in (b"", b"some text\n", b"PK\x03\x04 nearly an archive", os.urandom(5000)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="best.pt: not a checkpoint of this program"):
            checkpoint.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(ValueError, match="not a checkpoint of this program"):
        checkpoint.load(path)
    for other in (torch.ones(3), [1], {"format": 1}, {"state_dict": {}}, {"format": {"name": "x"}}):
        torch.save(other, path)
        with pytest.raises(ValueError, match="not a checkpoint of this program"):
            checkpoint.load(path)


def test_a_file_with_code_in_it_is_refused_and_the_code_not_run(state, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({**state, "format": {"name": checkpoint.FORMAT, "version": 1}, "extra": Code()},
               tmp_path / "best.pt")
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "best.pt")
    assert not (tmp_path / "ran").exists()


def test_a_cut_or_flipped_file_is_refused_wherever_the_damage_is(state, tmp_path):
    path = tmp_path / "best.pt"
    checkpoint.save(path, state)
    whole = path.read_bytes()
    for share in (0.05, 0.3, 0.6, 0.9, 0.999):
        path.write_bytes(whole[:int(len(whole) * share)])
        with pytest.raises(ValueError, match="damaged"):
            checkpoint.load(path)
    # in the tensors: PyTorch alone reads this without a word
    path.write_bytes(whole)
    flip_a_bit(path)
    assert torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(path)


def test_another_format_or_version_is_refused_with_both_values(state, tmp_path):
    path = tmp_path / "best.pt"
    torch.save({**state, "format": {"name": checkpoint.FORMAT, "version": 2}}, path)
    with pytest.raises(ValueError, match="version 2, this program reads .* version 1"):
        checkpoint.load(path)
    torch.save({**state, "format": {"name": "someone", "version": 1}}, path)
    with pytest.raises(ValueError, match="format someone version 1"):
        checkpoint.load(path)


def test_a_best_pt_is_not_enough_to_resume_from(state, tmp_path):
    checkpoint.save(tmp_path / "best.pt", state)
    with pytest.raises(ValueError, match="lacks generators, .*; resume from last.pt"):
        checkpoint.load(tmp_path / "best.pt", resume=True)
    torch.save({"format": {"name": checkpoint.FORMAT, "version": 1}}, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="lacks config, .*; train again"):
        checkpoint.load(tmp_path / "best.pt")


def test_the_generators_are_the_averages_ready_for_use(nets, state, tmp_path):
    averages = EMA(nets)
    with torch.no_grad():
        for p in nets.parameters():
            p.add_(1)
    G, F = checkpoint.load_generators({**state, "ema": averages.state_dict()})
    slices = torch.rand(2, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(G(slices), averages.G(slices), rtol=0, atol=0)
        torch.testing.assert_close(F(slices), averages.F(slices), rtol=0, atol=0)
    assert not torch.equal(G(slices), nets.G(slices))
    for net in (G, F):
        assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_weights_that_do_not_fit_the_config_or_are_nan_are_refused(state):
    with pytest.raises(ValueError, match="weights of G do not fit its config"):
        checkpoint.load_generators({**state, "config": {**CONFIG, "features": 3}})
    state["ema"]["F"]["to_slice.bias"][0] = float("nan")
    with pytest.raises(ValueError, match="weights of F are not finite"):
        checkpoint.load_generators(state)


def test_the_fingerprint_is_the_files_sha256(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"abc")
    assert checkpoint.fingerprint(tmp_path / "a.pt") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
