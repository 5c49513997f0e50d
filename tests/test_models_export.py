"""Tests of models/export.py: each format gives the slices that the net gives."""

import sys
import warnings

import numpy as np
import pytest
import torch

from models import export
from models.generator import ResnetGenerator


@pytest.fixture(scope="module", params=[("transpose", False), ("nearest", False),
                                        ("transpose", True), ("blur", True)])
def net(request):
    torch.manual_seed(0)
    return ResnetGenerator(4, 1, *request.param).eval().requires_grad_(False)


def run(kind, path, slices):
    """Run an exported net the way its users would, without this program."""
    if kind == "onnx":
        from onnx.reference import ReferenceEvaluator

        return ReferenceEvaluator(str(path)).run(None, {export.INPUT: slices.numpy()})[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript's end is announced
        made = (torch.jit.load(str(path)) if kind == "torchscript"
                else torch.export.load(str(path)).module())
    return made(slices).numpy()


@pytest.mark.parametrize("kind", export.ENDINGS)
def test_an_exported_net_gives_the_same_slices_for_any_batch(net, kind, tmp_path):
    if kind == "onnx":
        pytest.importorskip("onnxscript", reason="ONNX needs the export extra")
    path = tmp_path / f"net{export.ENDINGS[kind]}"
    export.export(net, 32, kind, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    for count in (1, 2, 5):
        slices = torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
        slices[:, :, :, :10] = -1
        found = run(kind, path, slices)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, net(slices).numpy(), atol=1e-5)


def test_a_package_that_is_missing_is_said_with_how_to_get_it(net, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [])
    for name in ("onnx", "onnxscript"):
        for loaded in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
            monkeypatch.delitem(sys.modules, loaded)
    with pytest.raises(ValueError, match=r"needs onnx and onnxscript; pip install '.\[export\]'"):
        export.export(net, 32, "onnx", tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
