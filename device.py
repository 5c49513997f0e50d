"""Which device and which arithmetic the commands that run nets use."""

from __future__ import annotations

import contextlib

import torch

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def choose_device(name: str, index: int = 0) -> torch.device:
    """The device that `--device` names.

    Parameters
    ----------
    name : "auto" (CUDA where there is any), "cpu", "cuda" or "cuda:K"
    index : the GPU taken where `name` gives none

    Raises
    ------
    ValueError : no such device here
    """
    kind, _, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and not number.isdigit()):
        raise ValueError(f"--device {name}: auto, cpu, cuda or cuda:K")
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(number) if number else index
    if index >= count:
        raise ValueError(f"--device {name}: asks for GPU {index}, there are {count} here; take another "
                         "or cpu")
    return torch.device("cuda", index)


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of the nets' arithmetic: what `--precision` says, or the fastest that holds.

    "auto" is bf16 where the hardware has it (CUDA from Ampere on, CPUs with AVX512-BF16 or AMX),
    else fp16 on CUDA and fp32 on CPU.

    Raises
    ------
    ValueError : fp16 without CUDA
    """
    cuda = device.type == "cuda"
    if wanted == "fp16" and not cuda:
        raise ValueError("--precision fp16: needs a CUDA device (gradients underflow without its "
                         "scaler); take bf16 or fp32")
    if wanted != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]
    if cuda:  # older cards only emulate bf16
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    probes = [getattr(torch.cpu, name, lambda: False)
              for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return torch.bfloat16 if any(probe() for probe in probes) else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision for the nets' forward passes; nothing for float32."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)
