"""The checkpoint format; the only place that calls `torch.load`.

A checkpoint is a plain dict of tensors, numbers, strings, lists and dicts, so that
`torch.load(weights_only=True)` reads it. `last.pt` holds all that the next step depends on,
`best.pt` what inference needs: nets, config and the preprocessing record, nothing outside the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from models.generator import ResnetGenerator

FORMAT = "t1w-t2w-cyclegan"
VERSION = 1
INFERENCE_KEYS = ("format", "config", "preprocessing", "step", "epoch", "slices_seen", "ema",
                  "best")
RESUME_KEYS = INFERENCE_KEYS + ("generators", "discriminators", "optimizers", "schedulers",
                                "scaler", "history", "sampler", "rng")
# What is looked up inside them, of every checkpoint that there has been
_INSIDE = {"config": ("features", "blocks", "upsample"), "ema": ("G", "F"),
           "preprocessing": ("size", "spacing_mm", "intensity", "subjects")}
_INSIDE_TO_RESUME = {"generators": ("G", "F"), "discriminators": ("D_X", "D_Y"),
                     "optimizers": ("generators", "discriminators"),
                     "schedulers": ("steps_per_epoch",), "best": ("judged_step", "kept"),
                     "sampler": ("epoch", "step", "world", "sums", "epoch_sums", "counted",
                                 "epoch_counted")}


def save(path: Path, state: dict[str, Any], *, keep_previous: bool = True) -> None:
    """Write a checkpoint, whole or not at all.

    Parameters
    ----------
    path : ends in `.pt`
    state : has at least `INFERENCE_KEYS` except `format`; name and version are added to what it
        has there
    keep_previous : let the file of before stay as `NAME.previous.pt`

    Raises
    ------
    OSError : the disk is full, say; the file of before is as it was
    """
    state = {**state, "format": {**state.get("format", {}), "name": FORMAT, "version": VERSION}}
    missing = [key for key in INFERENCE_KEYS if key not in state]
    assert not missing, f"checkpoint lacks {missing}"
    content = io.BytesIO()  # torch.save makes a riddle of what a full disk says
    torch.save(state, content)
    # always the same name: what a killed process left there is written over
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as out:
            out.write(content.getbuffer())
            out.flush()
            os.fsync(out.fileno())
        if keep_previous and path.exists():
            os.replace(path, previous(path))
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path}: not written, {error.strerror}; make room and run again") from None
    finally:
        temporary.unlink(missing_ok=True)


def previous(path: Path) -> Path:
    """Where `save` keeps the checkpoint before."""
    return path.with_name(f"{path.stem}.previous.pt")


def load(path: str | os.PathLike, *, resume: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Parameters
    ----------
    path : file
    resume : ask for all that training needs, not only for what inference needs

    Raises
    ------
    FileNotFoundError : no such file
    ValueError : not a checkpoint of this program, of another version, damaged, or without what was
        asked for
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; train.py writes best.pt and last.pt "
                                "into its --run folder")
    try:
        state = _read(path)
        name, version = state["format"]["name"], state["format"]["version"]
    except OSError:  # the disk's fault, not the file's
        raise
    except Exception:  # a damaged archive fails in as many ways as it has bytes
        raise ValueError(f"{path}: not a checkpoint of this program, or damaged; choose a best.pt "
                         "or last.pt that train.py wrote") from None
    if name != FORMAT or version != VERSION:
        raise ValueError(f"{path}: checkpoint format {name} version {version}, this program reads "
                         f"{FORMAT} version {VERSION}; train again, or use the version that wrote "
                         "it")
    lacking = [key for key in (RESUME_KEYS if resume else INFERENCE_KEYS) if key not in state]
    for part, names in {**_INSIDE, **(_INSIDE_TO_RESUME if resume else {})}.items():
        there = state.get(part, ())
        lacking += [f"{part}.{name}" for name in names if part in state
                    and not (isinstance(there, dict) and name in there)]
    if lacking:
        cure = "resume from last.pt" if resume else "train again"
        raise ValueError(f"{path}: checkpoint lacks {', '.join(lacking)}; {cure}")
    return state


@contextlib.contextmanager
def said_of(path: str | os.PathLike) -> Iterator[None]:
    """Put the file's name before what is said of a checkpoint's content (ValueError)."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_generators(state: dict[str, Any],
                    device: str | torch.device = "cpu") -> tuple[ResnetGenerator, ResnetGenerator]:
    """Build the translators G and F of a checkpoint: the averaged nets, in evaluation mode.

    Raises
    ------
    ValueError : the weights do not fit the nets that the config names, or are NaN or infinite
    """
    config = state["config"]
    nets = []
    for name in ("G", "F"):
        with torch.device("meta"):  # no first weights are drawn, they would be thrown away
            net = ResnetGenerator(config["features"], config["blocks"], config["upsample"],
                                  config.get("keep_background", False))
        try:
            net.load_state_dict(state["ema"][name], assign=True)
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"checkpoint's weights of {name} do not fit its config: "
                             f"{str(error).splitlines()[0]}") from None
        if not all(bool(p.isfinite().all()) for p in net.parameters()):
            raise ValueError(f"checkpoint's weights of {name} are not finite; train again")
        nets.append(net.to(device).eval().requires_grad_(False))
    return nets[0], nets[1]


def load_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read weights that another program saved: names to tensors, on the CPU.

    Raises
    ------
    FileNotFoundError : no such file
    ValueError : damaged, or holds anything but tensors by name
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        weights = _read(path)
        if not all(isinstance(value, torch.Tensor) for value in weights.values()):
            raise TypeError("holds more than tensors")
    except OSError:  # the disk's fault, not the file's
        raise
    except Exception:
        raise ValueError(f"{path}: damaged, or not a state dict that torch.save wrote") from None
    return weights


def _read(path: Path) -> dict[str, Any]:
    """Read a file of torch.save; raises whatever comes where it is damaged or holds no dict."""
    with open(path, "rb") as content:
        is_archive = content.read(2) == b"PK"  # before 2020 torch.save wrote files without sums
    if is_archive:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load takes flipped bits without a word
        if damaged:
            raise ValueError(f"{damaged} differs from its checksum")
    with warnings.catch_warnings():  # of a file that is none of ours
        warnings.simplefilter("ignore")
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise TypeError(f"holds a {type(state).__name__}")
    return state


def fingerprint(path: str | os.PathLike) -> str:
    """SHA-256 of a checkpoint file, for the records of what was made with it."""
    digest = hashlib.sha256()
    with open(path, "rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
