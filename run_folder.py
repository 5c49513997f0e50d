"""A run folder: who writes there, what is logged there, and which checkpoint a run goes on from."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import os
import platform
import subprocess
import time
from collections.abc import Container, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

try:
    import fcntl
except ImportError:  # Windows: the user has to see to it that one run writes
    fcntl = None  # type: ignore[assignment]

from config import BEFORE_THERE_WAS, FIXED_ON_RESUME, FREE_ON_RESUME, TrainConfig, flag, plain
from data.atomic import naming, write_atomically
from data.splits import SPLITS
from data.store import SliceStore, scans_of
from device import Process
from models import checkpoint
from report import progress

log = logging.getLogger("train")
JUDGED = ("validation", "health", "warning")  # kinds of lines that belong to an epoch's end


@contextlib.contextmanager
def only_writer(run: Path, process: Process, patience_s: float = 30) -> Iterator[None]:
    """Hold a run folder for this run; a killed run's processes may take a moment to end.

    A folder that was made for this and stays empty is removed.

    Raises
    ------
    ValueError : another run goes on there
    """
    fresh = process.is_main and not run.exists()
    if process.is_main:
        run.mkdir(parents=True, exist_ok=True)
    handle = os.open(run, os.O_RDONLY) if process.is_main and fcntl else None
    try:
        until = time.monotonic() + patience_s
        while handle is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ValueError(f"{run}: another train.py is writing there; wait for it, or "
                                     "choose another --run") from None
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        process.any(False)  # the others wait, too: what the run of before still writes is not read
        yield
    finally:
        if handle is not None:
            os.close(handle)
        if fresh and not any(run.iterdir()):
            run.rmdir()


def environment(process: Process, precision: torch.dtype) -> dict[str, Any]:
    """What a run was made with, for its checkpoints: commit, versions, device, processes."""
    def git(*words: str) -> str:
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git, or no repository
            return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True,
                                  text=True, timeout=10, check=True).stdout.strip()
        return ""

    on_gpu = process.device.type == "cuda"
    return {"commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
            "python": platform.python_version(), "torch": str(torch.__version__),
            "numpy": np.__version__, "processes": process.world,
            "device": torch.cuda.get_device_name(process.device) if on_gpu
            else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "precision": str(precision).removeprefix("torch.")}


class RunLog:
    """The run folder's `log.txt`, `metrics.jsonl` and TensorBoard files; silent on other ranks.

    Parameters
    ----------
    folder : of the run
    process : this one
    step : where the run goes on; what an interrupted one logged after it goes
    judged_step : the last step whose validation is part of the checkpoint; a later one is repeated
    """

    def __init__(self, folder: Path, process: Process, step: int, judged_step: int = 0):
        self._on = process.is_main
        if not self._on:
            return
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        self._handler.setFormatter(
            logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(self._handler)
        log.setLevel(logging.INFO)
        metrics = folder / "metrics.jsonl"
        before = (metrics.read_text(encoding="utf-8", errors="replace").splitlines()
                  if metrics.exists() else [])
        kept = "".join(line + "\n" for line in before
                       if _step_of(line, JUDGED) <= judged_step
                       and _step_of(line) <= step)
        write_atomically(metrics, kept.encode())
        self._metrics = open(metrics, "a", encoding="utf-8")
        for path in (folder / "progress").glob("step_*.npz"):
            if path > progress.path_of(folder, step):
                path.unlink()
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def record(self, kind: str, step: int, values: dict[str, float]) -> None:
        """One line of metrics and one TensorBoard point a value; `kind` names the group."""
        if self._on:
            self._write([{"kind": kind, "step": step, **values}])
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def interval(self, text: str, on_screen: bool) -> None:
        """A line of the log; not on screen where a progress bar shows the same."""
        if not self._on:
            return
        if on_screen:
            log.info("%s", text)
        else:
            self._handler.handle(log.makeRecord(log.name, logging.INFO, "", 0, text, (), None))

    def alarm(self, step: int, epoch: int, lines: list[str]) -> None:
        """Warnings of an epoch, for the reports that are made of metrics.jsonl."""
        if self._on:
            self._write([{"kind": "warning", "step": step, "epoch": epoch, "text": line}
                         for line in lines])

    def _write(self, entries: list[dict[str, Any]]) -> None:
        with naming(self._folder / "metrics.jsonl"):
            self._metrics.write("".join(json.dumps(entry) + "\n" for entry in entries))
            self._metrics.flush()

    def picture(self, picture: Tensor, step: int, path: Path) -> None:
        """An image grid for TensorBoard and as a file."""
        if self._on:
            self._board.add_image("samples", picture, step)
            path.parent.mkdir(exist_ok=True)
            from torchvision.utils import save_image  # whose import would delay the first step

            content = io.BytesIO()
            save_image(picture, content, format="png")
            write_atomically(path, content.getvalue())

    def moment(self, moment: progress.Moment) -> None:
        """Keep what the nets make of the fixed slices: a small file, histograms and pictures."""
        if not self._on:
            return
        path = progress.path_of(self._folder, moment.step)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, progress.pack(moment))
        for name, counts in moment.counts().items():
            self._board.add_histogram_raw(f"intensity/{name}", **progress.histogram(counts),
                                          global_step=moment.step)
        for domain in progress.DIRECTIONS:
            frame = next(progress.draw(iter([moment]), domain))
            self._board.add_image(f"progress/{domain}", frame, moment.step, dataformats="HWC")

    def conclude(self, config: dict[str, Any], figures: dict[str, float], step: int) -> None:
        """Hyper-parameters beside the last figures, for TensorBoard's table of runs."""
        if not self._on:
            return
        flat = {name: value if isinstance(value, (bool, int, float, str)) else str(value)
                for name, value in config.items()}
        final = {f"final/{name}": value for name, value in {**figures, "step": step}.items()}
        # SummaryWriter.add_hparams would put them into a folder of their own, as another run
        writer = self._board._get_file_writer()
        for summary in hparams(flat, final):
            writer.add_summary(summary)
        for name, value in final.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is buffered, leave the logger as it was."""
        if self._on:
            self._board.close()
            self._metrics.close()
            log.removeHandler(self._handler)
            self._handler.close()


def _step_of(line: str, kinds: Container[str] | None = None) -> float:
    """The step of a line of metrics; infinity where a kill cut the line short, or it is none.

    With `kinds`, -infinity for a line of another kind.
    """
    try:
        found = json.loads(line)
        step = float(found["step"])
        return step if kinds is None or found["kind"] in kinds else -math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def find_resume(config: TrainConfig, args: argparse.Namespace,
                record: dict[str, Any]) -> tuple[dict[str, Any] | None, Path]:
    """The checkpoint to go on from: named, or `last.pt` of the run; None to start afresh.

    Parameters
    ----------
    config, args : the command line
    record : of the store's preprocessing; takes up the subjects that the checkpoint was trained on

    Raises
    ------
    ValueError : options or data differ from the checkpoint's (names them), or a run whose `last.pt`
        is gone would be written over
    FileNotFoundError : `--resume` was given and there is nothing to resume
    """
    last = Path(args.resume) if args.resume else Path(config.run) / "last.pt"
    own = Path(config.run) / "last.pt"
    if last.parent.resolve() != own.parent.resolve() and (
            own.exists() or checkpoint.previous(own).exists()):
        log.info("%s: is there, so the run goes on from it, not from %s", own, last)
        last = own  # killed since, or begun anew by torchrun: the same command goes on
    before = checkpoint.previous(last)
    if not last.exists() and before.exists():
        last = before  # killed between the two renames
    if not last.exists() and args.resume is None:
        _refuse_to_write_over(Path(config.run))
        return None, last
    try:
        state = checkpoint.load(last, resume=True)
    except ValueError as error:
        if last == before or not before.exists():
            raise
        log.warning("%s; going on from %s", error, before)
        last, state = before, checkpoint.load(before, resume=True)
    if last.parent.resolve() != Path(config.run).resolve():  # whose best files stay where they are
        state["best"].update(t2w_ssim=-1.0, kept=[])
    _check_options(config, args, state, last)
    _check_data(config, args, state, last, record)
    return state, last


def put_aside(run: Path, gone_on_from: Path) -> None:
    """Rename a `last.pt` that was too damaged to go on from: the next save would keep it as the
    one before, in place of the good one."""
    last = run / "last.pt"
    if gone_on_from == checkpoint.previous(last) and last.exists():
        os.replace(last, run / "last.damaged.pt")


def _refuse_to_write_over(run: Path) -> None:
    """Starting afresh would replace the `best.pt` and the logs of a run whose `last.pt` is gone."""
    best = run / "best.pt"
    if not best.exists():
        return
    try:
        epochs = checkpoint.load(best)["epoch"]
    except (OSError, ValueError):
        epochs = math.inf  # whatever it is, it is not ours to replace
    if epochs > 1:  # one that is killed in its first epoch leaves a best.pt and no last.pt, too
        raise ValueError(f"{best}: is there and last.pt is not, so this run would start afresh and "
                         "replace it; choose another --run, or move it away")


def _check_options(config: TrainConfig, args: argparse.Namespace, state: dict[str, Any],
                   last: Path) -> None:
    """Refuse options that change what is learnt."""
    now, before = plain(asdict(config)), {**BEFORE_THERE_WAS, **state["config"]}
    changed = [name for name, value in before.items()
               if name not in FREE_ON_RESUME and now.get(name) != value]
    if args.override:
        changed = [name for name in changed if name in FIXED_ON_RESUME]
    if changed:
        was = ", ".join(f"{flag(name)} {before[name]} (now {now.get(name)})"
                        for name in changed)
        cure = "" if args.override else "add --override, "
        raise ValueError(f"{last}: was trained with {was}; give these again, {cure}or choose "
                         "another --run")


def _check_data(config: TrainConfig, args: argparse.Namespace, state: dict[str, Any], last: Path,
                record: dict[str, Any]) -> None:
    """Refuse slices made otherwise, and other subjects; add those trained on before to `record`.

    With other validation subjects and `--override`, `best` in `state` begins anew.
    """
    trained = state["preprocessing"]
    for name in ("size", "spacing_mm", "intensity"):
        if trained[name] != record[name]:
            raise ValueError(f"{config.slices}: made with {name} {record[name]}, {last} was "
                             f"trained on {trained[name]}; point to that store with --slices, or "
                             "choose another --run")
    for split, used in (("train", "trained on"), ("val", "judged by")):
        old, new = (set(r["subjects"][split]) for r in (trained, record))
        if old != new and not args.override:
            raise ValueError(f"{config.slices}: its {split} split differs from the one that {last} "
                             f"was {used}, {sorted(old ^ new)[0]} for one; point to that store "
                             "with --slices, add --override, or choose another --run")
        if old != new and split == "val":  # figures of other heads are no bar for these
            state["best"].update(t2w_ssim=-1.0, kept=[])
    # evaluate.py refuses all that were ever trained on; a best.pt to come is these val subjects'
    if not args.override:
        _check_scans(config, trained, last, record)
    elif _scans_differ(trained, record, "val"):
        state["best"].update(t2w_ssim=-1.0, kept=[])
    record["subjects"]["train"] = sorted({*trained["subjects"]["train"],
                                          *record["subjects"]["train"]})
    record["train_scans"] = sorted({*trained.get("train_scans", ()), *record["train_scans"]})


def _scans_differ(trained: dict[str, Any], record: dict[str, Any], split: str) -> bool:
    """Whether both records know their scans and those of a split are others (of the training
    split: has some that were not trained on, which grew with each --override)."""
    old, new = (set(r.get(f"{split}_scans", ())) for r in (trained, record))
    return bool(old and new) and not (new <= old if split == "train" else new == old)


def _check_scans(config: TrainConfig, trained: dict[str, Any], last: Path,
                 record: dict[str, Any]) -> None:
    """Refuse a store that was made again of other scans, or of other slices of them."""
    for split in ("train", "val"):
        if _scans_differ(trained, record, split):
            raise ValueError(f"{config.slices}: its {split} split has the same subjects as "
                             f"{last}'s, but other scans; point to that store with --slices, add "
                             "--override, or choose another --run")
    old, new = (r.get("min_brain_area") for r in (trained, record))
    if old is not None and old != new:
        raise ValueError(f"{config.slices}: made with min_brain_area {new}, {last} was trained on "
                         f"{old}; point to that store with --slices, add --override, or choose "
                         "another --run")


def preprocessing_record(store: SliceStore) -> dict[str, Any]:
    """What `evaluate.py` and `translate.py` must do alike: copied from the store's header."""
    keys = ("size", "spacing_mm", "min_brain_area", "intensity", "layout", "sources", "counts",
            "versions")
    lacking = [key for key in keys if key not in store.header]
    if lacking:
        raise ValueError(f"{store.folder / 'store.json'}: lacks {', '.join(lacking)}; delete the "
                         "store and run preprocess.py again")
    return {**{key: store.header[key] for key in keys},
            "brain_extraction": sorted({s["brain_extraction"] for s in store.subjects}),
            **{f"{split}_scans": sorted({scan for s in store.subjects if s["split"] == split
                                         for scan in scans_of(s)}) for split in ("train", "val")},
            "subjects": {split: [s["id"] for s in store.subjects if s["split"] == split]
                         for split in SPLITS}}


def best_name(value: float, epoch: int) -> str:
    """File name of one of the top few checkpoints."""
    return f"best_{value:.4f}_{epoch:04d}.pt"
