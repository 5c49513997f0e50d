"""What the commands that run nets use: device, arithmetic, and the processes beside this one."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import console

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
MEETING_S = 300.0  # for the processes of a group to find each other: some machines start slowly


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
    if kind not in ("auto", "cpu", "cuda") or (number and not number.isdecimal()):
        raise ValueError(f"--device {name}: auto, cpu, cuda or cuda:K")
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(number) if number else index
    if index >= count:
        raise ValueError(f"--device {name}: asks for GPU {index}, there are {count} here; take "
                         "another or cpu")
    return torch.device("cuda", index)


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of the nets' arithmetic: what `--precision` says, or the fastest that holds.

    "auto" is bf16 where the hardware has it (CUDA from Ampere on, CPUs with AVX512-BF16 or AMX),
    else fp16 on CUDA and fp32 on CPU.

    Raises
    ------
    ValueError : fp16 without CUDA, or none of these
    """
    if wanted not in PRECISIONS:
        raise ValueError(f"--precision {wanted}: choose from {', '.join(PRECISIONS)}")
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


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process has used, of the GPU if it has one; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


# ----------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started (alone: rank 0 of 1).

    The methods below are collective: all processes call them together.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value` in the order of ranks, on rank 0; [] on the others."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.is_main else None
        dist.gather_object(value, values)
        return values or []

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over the processes, on all of them."""
        if self.world == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.world

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is set on any process."""
        if self.world == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.float32, device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return [flag > 0 for flag in raised.tolist()]


def start_process(device: str) -> Process:
    """Join the group of torchrun, if there is one: NCCL on CUDA, gloo on CPU.

    Raises
    ------
    ValueError : no such device here, or fewer GPUs than processes
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    where = choose_device(device)
    if world > 1 and where.type == "cuda":  # one GPU a process, whatever number was named
        choose_device("cuda", int(os.environ["LOCAL_WORLD_SIZE"]) - 1)  # refused by all alike
        where = choose_device("cuda", int(os.environ["LOCAL_RANK"]))
    on_gpu = where.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(where)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_parent()
    if "RANK" in os.environ:  # a group of one, too: then it is the same program as with many
        store = _own_store(rank, world)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=30),
                                device_id=where if on_gpu else None, store=store,
                                rank=rank if store else -1, world_size=world if store else -1)
    return Process(rank, world, where)


def _own_store(rank: int, world: int) -> dist.Store | None:
    """Where this group finds itself under torchrun: torchrun's own store, below a fresh prefix.

    torchrun keeps one store for all its restarts (seen with torch 2.14), with the addresses of dead
    processes in it: who reads one of them in place of the new one waits for ever.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                          is_master=False, timeout=timedelta(seconds=MEETING_S))
    return dist.PrefixStore(f"group/{meet(store, rank, world)}", store)


def meet(store: dist.Store, rank: int, world: int, patience_s: float = MEETING_S) -> str:
    """Agree on a name with the other processes that were started together with this one.

    Nothing in the environment tells one start from the next: machines count their restarts apart
    (only the one whose worker failed counts it). So every process has a name of its own, and rank 0
    invites whoever it finds into its group until each rank has answered; names of dead processes
    are invited, too, and never answer.

    Parameters
    ----------
    store : which all of them reach, and others before them
    rank, world : this process among them

    Raises
    ------
    TimeoutError : the others have not come in time
    """
    mine, group = uuid.uuid4().hex, ""
    invited: set[str] = set()
    until = time.monotonic() + patience_s
    if rank:
        store.set(f"here/{rank}", mine)
    while time.monotonic() < until:
        if rank:
            if store.check([f"invited/{mine}"]):
                group = store.get(f"invited/{mine}").decode()
                store.set(f"joined/{group}/{rank}", "")
            if group and store.check([f"complete/{group}"]):
                return group
        else:
            found = [store.get(key).decode() for key in (f"here/{r}" for r in range(1, world))
                     if store.check([key])]
            for name in set(found) - invited:
                store.set(f"invited/{name}", mine)
                invited.add(name)
            if all(store.check([f"joined/{mine}/{r}"]) for r in range(1, world)):
                store.set(f"complete/{mine}", "")
                return mine
        time.sleep(0.02)
    raise TimeoutError(f"process {rank} of {world}: the others were not there after "
                       f"{patience_s:.0f} s")


def _end_with_parent() -> None:
    """End when torchrun has been killed: it restarts nobody then, and its successor has others."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def first_speaks() -> Iterator[None]:
    """Let one process a machine tell an error that all meet: options, store, checkpoint, NaN.

    torchrun adds a report of its own, and ends with 1 whatever the processes' exit codes are.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        yield
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except (ValueError, FileNotFoundError, FloatingPointError, SystemExit) as error:
        if isinstance(error, SystemExit) and not error.code:  # --help
            raise
        # torchrun ends all when one has ended: the first must have spoken by then
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
        # still there, so it has met this alone: a file that is damaged, or not on this machine
        print(said.getvalue() if isinstance(error, SystemExit) else f"error: {error}",
              file=sys.stderr, flush=True)
        raise SystemExit(console.FAILED) from None


# -------------------------------------------------------------------------------- random numbers


def random_state(device: torch.device) -> dict[str, Any]:
    """The global random states of this process, in plain types."""
    kind, keys, place, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    state = {"torch": torch.get_rng_state(),
             "numpy": [kind, [int(k) for k in keys], int(place), int(has_gauss), float(cached)],
             "python": [version, list(internal), gauss]}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go on with the random numbers where `random_state` was asked."""
    torch.set_rng_state(state["torch"])
    kind, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), place, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
