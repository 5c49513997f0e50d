"""A generator as a file that other programs run: ONNX, TorchScript, torch.export.

Each takes slices (N, 1, size, size) float32 in [-1, 1], background exactly -1, and gives their
translations alike; N is free, the size is that of the training. Cutting volumes into such slices
and laying them back is not part of the file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

INPUT, OUTPUT = "slices", "translated"
MAX_BATCH = 2 ** 16


def export(net: nn.Module, size: int, kind: str, path: Path) -> None:
    """Write a net in one of the formats that `ENDINGS` lists, float32.

    Parameters
    ----------
    net : on the CPU, in evaluation mode
    size : pixels a side of its slices
    kind : "onnx", "torchscript" or "torch-export"
    path : the file; written at once, or not at all where the export fails

    Raises
    ------
    ValueError : a package that the format needs is missing (says how to get it)
    """
    if kind == "onnx":
        require_onnx()
    # two slices, and not one: a batch of one would be taken for a constant
    example = torch.zeros(2, 1, size, size)
    with torch.no_grad(), _quiet():
        content = _WRITERS[kind](net.float(), example)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content)
    temporary.replace(path)


def require_onnx() -> None:
    """Raise ValueError where what torch needs for ONNX is not installed."""
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"--export onnx: needs {' and '.join(missing)}; pip install '.[export]'")


def _onnx(net: nn.Module, example: Tensor) -> bytes:
    program = torch.onnx.export(net, (example,), dynamo=True, verbose=False, input_names=[INPUT],
                                output_names=[OUTPUT], dynamic_shapes=_free_batch())
    assert program is not None  # only the older exporter gives nothing back
    return program.model_proto.SerializeToString()


def _torchscript(net: nn.Module, example: Tensor) -> bytes:
    content = io.BytesIO()
    torch.jit.save(torch.jit.trace(net, example, check_trace=False), content)
    return content.getvalue()


def _torch_export(net: nn.Module, example: Tensor) -> bytes:
    content = io.BytesIO()
    torch.export.save(torch.export.export(net, (example,), dynamic_shapes=_free_batch()), content)
    return content.getvalue()


def _free_batch() -> tuple:
    return ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from telling how it exports, and that tracing is out of fashion."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


_WRITERS: dict[str, Callable[[nn.Module, Tensor], bytes]] = {
    "onnx": _onnx, "torchscript": _torchscript, "torch-export": _torch_export}
ENDINGS = {"onnx": ".onnx", "torchscript": ".ts", "torch-export": ".pt2"}
