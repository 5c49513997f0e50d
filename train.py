"""Train a CycleGAN between T1w (X) and T2w (Y) slices; Zhu et al. 2017.

    python train.py                                  one process
    torchrun --nproc_per_node=2 train.py             the same on two GPUs, or two CPU processes

Reads the store that preprocess.py built, writes `last.pt`, `best.pt`, `log.txt`, `metrics.jsonl`,
`config.json`, samples and TensorBoard files into the run folder. Run again, it goes on from
`last.pt`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import console
import health
from config import TrainConfig, parse_args, plain
from data.augment import deform, flip_left_right
from data.contrast import intensity_quantiles, training_figures
from data.slices import UnpairedBatches, paired_slices, paired_subjects, to_tensor
from data.store import SliceStore, write_atomically
from device import (Process, autocast, choose_precision, first_speaks, peak_memory_gib,
                    random_state, set_random_state, start_process)
from losses.history import ImageHistory
from losses.quality import correlation, mae, psnr_db, ssim
from models import checkpoint
from models.cyclegan import EMA, CycleGAN, init_weights
from models.generator import default_blocks
from report import progress
from run_folder import (RunLog, best_name, environment, find_resume, only_writer,
                        preprocessing_record)
from step import (NETS, TERMS, WATCHED, Frozen, Recorded, compilation_pays, train_step,
                  update)

log = logging.getLogger("train")


# ------------------------------------------------------------------------------ nets and state


def name_slices(store: SliceStore, loader: UnpairedBatches, epoch: int, epoch_step: int) -> str:
    """The slices and files that a step saw, for a message."""
    texts = []
    for column, rows in zip(("t1w", "t2w"), loader.rows(epoch, epoch_step)):
        seen = []
        for row in rows[:4]:
            subject = next(s for s in store.subjects
                           if s["first_row"] <= row < s["first_row"] + s["n_slices"])
            seen.append(f"row {row} ({subject['dataset']} {subject[column]})")
        texts.append(f"{column} {', '.join(seen)}" + (", ..." if len(rows) > 4 else ""))
    return f", slices {'; '.join(texts)}"


class Training:
    """All that the next step depends on: nets, averages, optimisers, histories, place in the data.

    Parameters
    ----------
    config : of the run, with its number of blocks
    process : this one
    steps_per_epoch : steps, what the schedule counts in
    preprocessing : record of how the slices were made, for the checkpoints
    quantiles : of `data.contrast.intensity_quantiles`, for the first guess and to judge without
        pairs; without them there is neither
    """

    def __init__(self, config: TrainConfig, process: Process, steps_per_epoch: int,
                 preprocessing: dict[str, Any] | None = None,
                 quantiles: dict[str, np.ndarray] | None = None):
        self.config, self.process = config, process
        self.steps_per_epoch, self.preprocessing = steps_per_epoch, preprocessing or {}
        nets = CycleGAN(config.features, config.blocks, config.upsample,
                        config.keep_background)
        init_weights(nets, torch.Generator().manual_seed(config.seed))
        self.nets = nets.to(process.device)
        self.ema = EMA(self.nets, config.ema)
        self.quantiles = {name: torch.from_numpy(values).to(process.device)
                          for name, values in (quantiles or {}).items()}
        self.precision = choose_precision(config.precision, process.device)
        # the all-reduce of many processes and the decisions of fp16's scaler are not in the graph
        recorded = (config.cuda_graph and process.device.type == "cuda"
                    and not dist.is_initialized() and self.precision != torch.float16)
        self.optimizers = {
            name: torch.optim.Adam(parameters, lr=config.lr, betas=config.betas, fused=True,
                                   capturable=recorded)
            for name, parameters in (("generators", nets.generators()),
                                     ("discriminators", nets.discriminators()))}
        self._fit_optimizers(recorded)
        self.scaler = torch.amp.GradScaler(process.device.type,
                                           enabled=self.precision == torch.float16)
        # each process keeps its own histories: what its discriminators' share of a batch comes from
        seeds = [2 * (config.seed * 10007 + process.rank) + domain for domain in (0, 1)]
        self.history = {name: ImageHistory(config.history_size, seed)
                        for name, seed in zip(("x", "y"), seeds)}
        self.draws = torch.Generator()  # of augmentation, seeded anew in each step
        self.step = self.slices_seen = 0
        self.epoch = self.epoch_step = 0  # epochs that are finished, steps of the one that is not
        self.best: dict[str, Any] = {"t2w_ssim": -1.0, "epoch": -1, "kept": [], "judged_step": 0}
        # of terms and what is watched, since the last line of the log and in this epoch
        self.sums, self.counted = torch.zeros(len(TERMS) + len(WATCHED), device=process.device), 0
        self.epoch_sums, self.epoch_counted = self.sums.clone(), 0
        self.recent: list[tuple[int, int, int, Tensor]] = []  # step, epoch, its step, values
        self.environment = environment(process, self.precision)
        self.where: Callable[[int, int], str] = lambda epoch, epoch_step: ""  # names its slices
        self.compiled = compilation_pays(config, process.device, steps_per_epoch)
        self.G, self.F, self.D_X, self.D_Y = (self._wrap(getattr(nets, name)) for name in NETS)
        self.judge = Frozen(nets.D_X, self.compiled)
        self.update: Callable[..., Tensor] = functools.partial(update, self)
        if recorded:
            self.update = Recorded(self)

    def _fit_optimizers(self, recorded: bool) -> None:
        """A recorded update reads its learning rates and counts on the device."""
        for group in (g for o in self.optimizers.values() for g in o.param_groups):
            group["betas"], group["capturable"] = self.config.betas, recorded
            group["lr"] = float(group["lr"])
            if recorded:
                group["lr"] = torch.tensor(group["lr"], device=self.process.device)

    def _wrap(self, net: nn.Module) -> nn.Module:
        if self.compiled:
            net = cast(nn.Module, torch.compile(net, dynamic=False))
        if not dist.is_initialized():
            return net
        ids = [self.process.device.index] if self.process.device.type == "cuda" else None
        with warnings.catch_warnings():  # some versions announce what it will mean for buffers
            warnings.simplefilter("ignore", FutureWarning)
            # there are none to keep equal, and every parameter takes part in every backward pass
            return DistributedDataParallel(net, device_ids=ids, broadcast_buffers=False)

    @property
    def last_step(self) -> int:
        """The step that the run ends with."""
        epochs = self.config.epochs + self.config.epochs_decay
        left = (epochs - self.epoch) * self.steps_per_epoch - self.epoch_step
        return min(self.step + left, self.config.max_steps or sys.maxsize)

    @property
    def learning_rate(self) -> float:
        """Constant over `epochs`, then linear to 0 over `epochs_decay`."""
        c = self.config
        left = c.epochs + c.epochs_decay - self.epoch - self.epoch_step / self.steps_per_epoch
        return c.lr * min(1.0, left / c.epochs_decay) if c.epochs_decay else c.lr

    @property
    def start_weight(self) -> float:
        """Of the distance to the first guess: falls linearly to 0 over `start_pairs`."""
        c = self.config
        left = 1 - self.slices_seen / c.start_pairs if c.start_pairs and self.quantiles else 0
        return c.lambda_start * max(left, 0.0)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision for the nets' forward passes; the losses compute in float32."""
        return autocast(self.process.device, self.precision)

    def augment(self, real_x: Tensor, real_y: Tensor) -> tuple[Tensor, Tensor]:
        """Mirror and deform at random; drawn from seed, step and rank, as a resumed run draws."""
        words = np.random.SeedSequence([self.config.seed, self.step, self.process.rank])
        self.draws.manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1))
        if self.config.flip:
            real_x, real_y = (flip_left_right(v, self.draws) for v in (real_x, real_y))
        if self.config.deform:
            real_x, real_y = (deform(v, self.draws, self.config.deform) for v in (real_x, real_y))
        return real_x, real_y

    def note(self, values: Tensor) -> None:
        """Take in what a step returned."""
        self.sums += values
        self.epoch_sums += values
        self.counted += 1
        self.epoch_counted += 1
        self.recent.append((self.step, self.epoch, self.epoch_step - 1, values))

    def mean_terms(self) -> dict[str, float]:
        """Mean of each term since the last line of the log, over all processes (collective).

        Raises
        ------
        FloatingPointError : one of them, or a gradient, is NaN or infinite; names it, the step and
            its slices
        """
        self._check_recent()
        means = self.process.mean(self.sums).div(max(self.counted, 1)).tolist()
        return dict(zip(TERMS, means))

    def watched(self) -> dict[str, float]:
        """Means over this epoch of what `WATCHED` names, over all processes (collective)."""
        means = self.process.mean(self.epoch_sums).div(max(self.epoch_counted, 1)).tolist()
        return dict(zip(WATCHED, means[len(TERMS):]))

    def check_finite(self) -> None:
        """Raise FloatingPointError on NaN or infinite terms, gradients or weights (collective).

        Called before anything is judged or saved: lost weights must not replace good ones.
        """
        self._check_recent()
        lost = [name for name in NETS
                if not all(bool(p.isfinite().all()) for p in getattr(self.nets, name).parameters())]
        self._complain(f"weights of {', '.join(lost)} not finite by step {self.step} (epoch "
                       f"{self.epoch + 1})" if lost else "")

    def _check_recent(self) -> None:
        """Look at the values of the steps since the last look, all at once."""
        found = ""
        if self.recent:
            finite = torch.stack([values for *_, values in self.recent]).isfinite().cpu()
            for (step, epoch, epoch_step, _), good in zip(self.recent, finite.tolist()):
                names = [n for n, ok in zip((*TERMS, *WATCHED), good) if not ok]
                if names:
                    terms = [n for n in names if n in TERMS] or names
                    found = (f"{', '.join(terms)} not finite at step {step} (epoch {epoch + 1})"
                             f"{self.where(epoch, epoch_step)}")
                    break
        self._complain(found)
        self.recent.clear()

    def _complain(self, found: str) -> None:
        """Raise on all processes what one of them has found (collective)."""
        if self.process.any(bool(found))[0]:
            every = [text for text in self.process.gather(found) if text]
            raise FloatingPointError(
                f"{every[0] if every else found}; last.pt has the state before, if one was saved; "
                "try a smaller --lr, or --precision fp32")

    def check_equal(self) -> None:
        """Raise RuntimeError unless all processes have the same weights to the bit (collective)."""
        if self.process.world == 1:
            return
        digest = hashlib.sha256()
        for p in self.nets.parameters():
            digest.update(p.detach().cpu().numpy().tobytes())
        every = self.process.gather(digest.hexdigest())
        if self.process.any(len(set(every)) > 1)[0]:
            raise RuntimeError(f"weights differ between processes at step {self.step}, which must "
                               f"not happen: {every}")

    def state(self) -> dict[str, Any] | None:
        """What `last.pt` holds; None on other ranks than 0 (collective)."""
        nets = {name: getattr(self.nets, name) for name in NETS}
        every = self.process.gather({
            "history": {name: _on_cpu(pool.state_dict()) for name, pool in self.history.items()},
            "rng": random_state(self.process.device), "sums": self.sums.cpu(),
            "epoch_sums": self.epoch_sums.cpu()})
        if not self.process.is_main:
            return None
        return {
            **self.inference_state(self.epoch),
            "generators": {name: nets[name].state_dict() for name in ("G", "F")},
            "discriminators": {name: nets[name].state_dict() for name in ("D_X", "D_Y")},
            "optimizers": {name: _any_device(o.state_dict())
                           for name, o in self.optimizers.items()},
            "schedulers": {"steps_per_epoch": self.steps_per_epoch,
                           "learning_rate": self.learning_rate},
            "scaler": self.scaler.state_dict(),
            "history": [part["history"] for part in every],
            "sampler": {"epoch": self.epoch, "step": self.epoch_step,
                        "world": self.process.world, "counted": self.counted,
                        "sums": [part["sums"] for part in every],
                        "epoch_counted": self.epoch_counted,
                        "epoch_sums": [part["epoch_sums"] for part in every]},
            "rng": [part["rng"] for part in every],
        }

    def inference_state(self, epoch: int) -> dict[str, Any]:
        """What `best.pt` holds."""
        return {"config": plain(asdict(self.config)), "preprocessing": plain(self.preprocessing),
                "step": self.step, "epoch": epoch, "slices_seen": self.slices_seen,
                "ema": self.ema.state_dict(), "best": dict(self.best),
                "format": {"made_with": self.environment}}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint; what --override changes begins anew."""
        for name in NETS:
            part = "generators" if name in ("G", "F") else "discriminators"
            getattr(self.nets, name).load_state_dict(state[part][name])
        self.ema.load_state_dict(state["ema"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self._fit_optimizers(isinstance(self.update, Recorded))
        if isinstance(self.update, Recorded):
            self.update.forget()
        if self.scaler.is_enabled() and state["scaler"]:  # empty where the run was not in fp16
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.slices_seen = state["step"], state["slices_seen"]
        self.best = dict(state["best"])
        self.epoch = state["sampler"]["epoch"]
        # on another number of processes an epoch has another number of steps
        self.epoch_step = (state["sampler"]["step"] * self.steps_per_epoch
                           // state["schedulers"]["steps_per_epoch"])
        rank = self.process.rank
        if rank < len(state["history"]):
            for name, pool in self.history.items():
                if state["history"][rank][name]["size"] == pool.size:
                    pool.load_state_dict(state["history"][rank][name])
            set_random_state(state["rng"][rank])
        counted = state["sampler"]["sums"][rank:rank + 1]
        # an older version knew fewer terms
        if state["sampler"]["world"] == self.process.world and len(counted[0]) == len(self.sums):
            for sums in ("sums", "epoch_sums"):
                getattr(self, sums).copy_(state["sampler"][sums][rank])
            self.counted = state["sampler"]["counted"]
            self.epoch_counted = state["sampler"]["epoch_counted"]


def _any_device(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state without what holds on this device only."""
    groups = [{**group, "lr": float(group["lr"]), "capturable": False}
              for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """Tensors to the CPU: sent from one process to another they would take up its own GPU there."""
    return {key: value.cpu() if isinstance(value, Tensor) else value
            for key, value in state.items()}


# ---------------------------------------------------------------------------------- validation


@torch.no_grad()
def validate(t: Training, store: SliceStore,
             stop: StopRequest | None = None) -> dict[str, float]:
    """Judge the averaged G and F on the paired validation subjects, in the brain (collective).

    SSIM, PSNR, correlation with the real target; distance to the input over the real target's
    (`copy_ratio`), and the share of generated signal `outside` the brain. Two figures need no
    pairs: `cycle_error` (MAE of what comes back) and `histogram_distance` (mean difference between
    the quantiles of a translation's intensities and of the training slices of that contrast, the
    1-D Wasserstein distance); all on [0, 1] images.

    Subjects are shared out among the processes and their figures gathered, so the result does not
    depend on how many there are. Mean over a subject's slices, then over subjects; {} without any,
    and on other ranks than 0. Left unfinished, so of no use, once `stop` is asked for.
    """
    subjects: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for session in paired_subjects(store, "val"):
        subjects.setdefault((session["dataset"], session["subject"]), []).append(session)
    rank, world = t.process.rank, t.process.world
    mine = [(i, _validate_subject(t, store, sessions))
            for i, sessions in enumerate(subjects.values())
            if i % world == rank and not (stop and stop.asked)]
    parts = dict(pair for part in t.process.gather(mine) for pair in part)
    figures = [parts[i] for i in sorted(parts)]
    names = figures[0] if figures else ()
    return {name: float(np.mean([f[name] for f in figures])) for name in names}


def _validate_subject(t: Training, store: SliceStore,
                      sessions: list[dict[str, Any]]) -> dict[str, float]:
    figures: dict[str, list[float]] = {}
    intensities: dict[str, list[Tensor]] = {"t2w": [], "t1w": []}
    for real_x, real_y, mask in (b for s in sessions for b in paired_slices(store, s)):
        real_x, real_y, mask = (v.to(t.process.device) for v in (real_x, real_y, mask))
        with t.autocast():
            fake_y, fake_x = t.ema.G(real_x), t.ema.F(real_y)
            cycled_x, cycled_y = t.ema.F(fake_y), t.ema.G(fake_x)
        for name, fake, real, given, cycled in (("t2w", fake_y, real_y, real_x, cycled_x),
                                                ("t1w", fake_x, real_x, real_y, cycled_y)):
            intensities[name].append(fake[mask].float().cpu())
            fake, real, given, cycled = ((v.float() + 1) / 2 for v in (fake, real, given, cycled))
            signal_all = fake.sum((1, 2, 3)).clamp(min=1e-6)
            measured = {
                "ssim": ssim(fake, real, mask),
                # a perfect slice would be infinitely good
                "psnr_db": psnr_db(fake, real, mask).clamp(max=100),
                "correlation": correlation(fake, real, mask),
                "copy_ratio": mae(fake, given, mask) / mae(real, given, mask).clamp(min=1e-6),
                "outside": (fake * ~mask).sum((1, 2, 3)) / signal_all,
                "cycle_error": mae(cycled, given, mask),
            }
            for what, values in measured.items():
                figures.setdefault(f"{name}_{what}", []).extend(values.tolist())
    for name, wanted in t.quantiles.items():
        shares = np.linspace(0, 1, len(wanted))
        there = np.quantile(torch.cat(intensities[name]).numpy(), shares)
        distance = np.abs(there - wanted.cpu().numpy()).mean() / 2  # of [0, 1] images
        figures[f"{name}_histogram_distance"] = [float(distance)]
    return {name: float(np.mean(values)) for name, values in figures.items()}


def fixed_rows(store: SliceStore, count: int) -> np.ndarray:
    """`count` rows of the store, spread over the validation subjects: the same each time."""
    rows = store.rows("val")
    rows = rows if len(rows) else store.rows("train")
    return rows[np.linspace(0, len(rows) - 1, count + 2).astype(int)[1:-1]]


@torch.no_grad()
def sample_grid(t: Training, store: SliceStore, count: int = 4) -> Tensor:
    """Draw the same `count` slices each epoch as one picture (3, H, W) in [0, 1], a row a slice.

    Columns: T1w, translated, cycled, identity, then T2w, translated, cycled, identity.
    """
    from torchvision.utils import make_grid  # whose import would delay the first step

    rows = fixed_rows(store, count)
    real_x, real_y = (to_tensor(a[rows]).to(t.process.device) for a in (store.t1w, store.t2w))
    with t.autocast():
        fake_y, fake_x = t.ema.G(real_x), t.ema.F(real_y)
        picture = torch.stack([real_x, fake_y, t.ema.F(fake_y), t.ema.F(real_x),
                               real_y, fake_x, t.ema.G(fake_x), t.ema.G(real_y)], dim=1)
    return make_grid(picture.flatten(0, 1).float().cpu(), nrow=8, value_range=(-1, 1),
                     normalize=True, pad_value=0.3)


@torch.no_grad()
def look(t: Training, store: SliceStore, shown: int = 3, counted: int = 32) -> progress.Moment:
    """What the averaged nets make of the same slices each epoch, for the pictures of progress.

    Parameters
    ----------
    shown : slices that are kept
    counted : slices whose intensities in the brain are counted
    """
    def to_bytes(slices: Tensor) -> np.ndarray:
        return ((slices.float() + 1) * 127.5).round().byte().cpu().numpy()[:, 0]

    def count(slices: Tensor, inside: Tensor) -> np.ndarray:
        values = (slices.float().cpu()[inside] + 1) / 2
        return np.histogram(values.numpy(), progress.BINS, (0, 1))[0]

    rows = fixed_rows(store, shown)
    real_x, real_y = (to_tensor(a[rows]).to(t.process.device) for a in (store.t1w, store.t2w))
    with t.autocast():
        fake_y, fake_x = t.ema.G(real_x), t.ema.F(real_y)
        kept = {"t1w": real_x, "to_t2w": fake_y, "t1w_again": t.ema.F(fake_y),
                "t2w": real_y, "to_t1w": fake_x, "t2w_again": t.ema.G(fake_x)}
    counts = np.zeros((4, progress.BINS), np.int64)
    for row in np.array_split(fixed_rows(store, counted), max(counted // 8, 1)):
        inside = torch.from_numpy(store.mask(row))[:, None]
        real_x, real_y = (to_tensor(a[row]).to(t.process.device) for a in (store.t1w, store.t2w))
        with t.autocast():
            every = (real_x, t.ema.F(real_y), real_y, t.ema.G(real_x))
        counts += np.stack([count(slices, inside) for slices in every])
    return progress.Moment(step=t.step, epoch=t.epoch + 1, t1w_counts=counts[:2],
                           t2w_counts=counts[2:], **{k: to_bytes(v) for k, v in kept.items()})


def save_best(t: Training, figures: dict[str, float]) -> None:
    """Keep the averaged nets if they are the best so far, by T2w SSIM on the validation subjects.

    `best.pt` is the best, `best_SSIM_EPOCH.pt` the top few. Without validation subjects `best.pt`
    is simply the latest.
    """
    run, epoch, value = Path(t.config.run), t.epoch + 1, figures.get("t2w_ssim")
    if value is None or value > t.best["t2w_ssim"] or not (run / "best.pt").exists():
        t.best.update(figures, epoch=epoch)
        checkpoint.save(run / "best.pt", t.inference_state(epoch), keep_previous=False)
    if value is None:
        return
    before = t.best["kept"]  # [SSIM, epoch], an epoch once
    kept = [*(k for k in before if k[1] != epoch), [value, epoch]]
    kept = sorted(kept, key=lambda k: (-k[0], k[1]))[:t.config.keep_best]
    for old in before:
        if old not in kept:
            (run / best_name(*old)).unlink(missing_ok=True)
    t.best["kept"] = kept
    if [value, epoch] in kept:
        checkpoint.save(run / best_name(value, epoch), t.inference_state(epoch),
                        keep_previous=False)


# ---------------------------------------------------------------------------------------- main


class StopRequest:
    """SIGTERM or SIGINT while it is entered: leave at the next step, with a checkpoint."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopRequest:
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, signum: int, frame: object) -> None:
        self.asked = True


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; returns the exit code."""
    with first_speaks():
        config, args = parse_args(argv, __doc__)
        if args.gif:
            return write_gifs(Path(config.run))
        store = SliceStore(config.slices)
        process = start_process(config.device)
    config = replace(config, blocks=config.blocks or default_blocks(store.size))
    torch.backends.cudnn.benchmark = True  # sizes never change
    if not process.is_main:
        log.setLevel(logging.ERROR)
    try:
        with first_speaks(), only_writer(Path(config.run), process):
            code = train(config, args, store, process)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return console.FAILED
    except torch.OutOfMemoryError as error:
        print(f"error: {str(error).splitlines()[0]} Take a smaller --batch-size or --features",
              file=sys.stderr)
        return console.FAILED
    if dist.is_initialized():  # not after an error: others may wait in the middle of a step
        dist.destroy_process_group()
    return code


def train(config: TrainConfig, args: argparse.Namespace, store: SliceStore,
          process: Process) -> int:
    """Set up, go through the loop, say how it ended; returns the exit code."""
    run, record = Path(config.run), preprocessing_record(store)
    if process.is_main:  # for translate.py, which says where a volume is unlike these
        record["training"] = training_figures(store)
    loader = UnpairedBatches(store, batch_size=config.batch_size, seed=config.seed,
                             steps_per_epoch=config.steps_per_epoch, rank=process.rank,
                             world=process.world, strict=config.strict_unpaired,
                             balanced=config.balance)
    state, last = find_resume(config, args, record)
    t = Training(config, process, loader.steps_per_epoch, record, intensity_quantiles(store))
    t.where = functools.partial(name_slices, store, loader)
    if state:
        t.load(state)
    with contextlib.closing(RunLog(run, process, t.step, t.best["judged_step"])) as run_log:
        _announce(t, store)
        if state:
            log.info("going on from %s, step %d", last, t.step)
            before = state["sampler"]["world"]
            if before != process.world:
                log.info("processes: %d then, %d now; the run goes on, but not to the bit", before,
                         process.world)
        if t.step >= t.last_step and t.best["judged_step"] == t.step:
            log.info("nothing left to train: step %d of %d is done; raise --epochs or --max-steps",
                     t.step, t.last_step)
            return console.DONE
        if process.is_main:
            for name, what in (("config", asdict(config)), ("environment", t.environment)):
                text = json.dumps(plain(what), indent=1) + "\n"
                write_atomically(run / f"{name}.json", text.encode())
        with StopRequest() as stop, logging_redirect_tqdm():
            finished = loop(t, loader, store, run_log, stop)
        if not finished:
            log.info("stopped at step %d of %d; run again with --resume to go on from %s", t.step,
                     t.last_step, run / "last.pt")
            return console.FAILED
        if process.is_main:
            write_gifs(run)
        log.info("done: %s", run / "best.pt")
        return console.DONE


def loop(t: Training, loader: UnpairedBatches, store: SliceStore, run_log: RunLog,
         stop: StopRequest) -> bool:
    """Batches, G and F, D_X and D_Y, log, validate, save; returns whether it came to the end."""
    c, process, run = t.config, t.process, Path(t.config.run)
    last_step, epochs = t.last_step, c.epochs + c.epochs_decay
    # asking the others makes the CPU wait for the GPU
    on_gpu = process.device.type == "cuda"
    ask_every = 10 if process.world > 1 and on_gpu else 1
    bar = tqdm(total=last_step, initial=t.step, unit="step",
               disable=None if process.is_main else True)
    weights = {"lambda_cycle_x": c.lambda_cycle[0], "lambda_cycle_y": c.lambda_cycle[1],
               "lambda_identity": c.lambda_identity, "lambda_structure": c.lambda_structure}
    saved_at = time.monotonic()
    stopped = False

    while not stopped and (t.step < last_step or t.best["judged_step"] < t.step):
        timed, waited, since = 0, 0.0, time.monotonic()
        epoch_since = since
        epoch_waited, epoch_pairs = 0.0, 0
        batches = loader.batches(t.epoch, t.epoch_step, c.workers, half=on_gpu, pin=on_gpu)
        while t.epoch_step < t.steps_per_epoch and t.step < last_step and not stopped:
            # batch
            asked_at = time.monotonic()
            real_x, real_y = next(batches)
            waited += time.monotonic() - asked_at
            epoch_waited += time.monotonic() - asked_at
            real_x, real_y = t.augment(*(v.to(process.device, non_blocking=True).float()
                                         for v in (real_x, real_y)))
            # step
            learning_rate, start_weight = t.learning_rate, t.start_weight
            t.note(train_step(t, real_x, real_y))
            timed += 1
            epoch_pairs += c.batch_size * process.world
            bar.update()
            # log
            if t.step % c.log_every == 0:
                terms = t.mean_terms()
                seconds = time.monotonic() - since
                rate = timed * c.batch_size * process.world / seconds
                run_log.record("loss", t.step, terms)
                run_log.record("speed", t.step,
                               {"pairs_per_s": rate, "waiting": waited / seconds})
                run_log.record("schedule", t.step, {"lr": learning_rate, **weights,
                                                    "lambda_start": start_weight})
                run_log.interval(f"epoch {t.epoch + 1}/{epochs}  step {t.step}/{last_step}  "
                                 f"{rate:.2f} pairs/s  {_line_of(terms)}", on_screen=bar.disable)
                bar.set_postfix_str(_line_of({name: terms[name] for name in NETS}), refresh=False)
                t.sums.zero_()
                t.counted, timed, waited, since = 0, 0, 0.0, time.monotonic()
            # stop or save within the epoch
            if t.step % ask_every == 0:
                due = time.monotonic() - saved_at > 60 * c.save_minutes
                stopped, due = process.any(stop.asked, due)
                if stopped or due:
                    _save_last(t, run)
                    saved_at = time.monotonic()
        batches.close()
        epoch_s = max(time.monotonic() - epoch_since, 1e-9)
        if stopped:
            break

        # validate and save at the end of an epoch, or of the run
        t.check_finite()
        figures = validate(t, store, stop)
        stopped = process.any(stop.asked)[0]
        if stopped:  # the epoch is judged when the run goes on
            _save_last(t, run)
            break
        t.check_equal()
        run_log.record("validation", t.step, figures)
        watch(t, run_log, figures,
              {"waiting": epoch_waited / epoch_s, "pairs_per_s": epoch_pairs / epoch_s})
        t.best["judged_step"] = t.step
        if process.is_main:
            run_log.picture(sample_grid(t, store), t.step,
                            run / "samples" / f"epoch_{t.epoch + 1:04d}.png")
            run_log.moment(look(t, store))
            save_best(t, figures)
        log.info("epoch %d/%d  step %d  validation  %s", t.epoch + 1, epochs, t.step,
                 _line_of(figures) or "no subjects: best.pt is the latest")
        if t.epoch_step == t.steps_per_epoch:
            t.epoch, t.epoch_step, t.epoch_counted = t.epoch + 1, 0, 0
            t.epoch_sums.zero_()
        _save_last(t, run)
        saved_at = time.monotonic()

    bar.close()
    if not stopped:
        run_log.conclude(plain(asdict(c)), figures, t.step)
    return not stopped


def watch(t: Training, run_log: RunLog, figures: dict[str, float],
          speed: dict[str, float]) -> None:
    """Log what was watched in an epoch, and a line for each figure that is not healthy."""
    found = {**t.watched(), **speed,
             "peak_memory_gib": peak_memory_gib(t.process.device)}
    judged = {name: value for name, value in figures.items()
              if not name.endswith(("_ssim", "_psnr_db"))}
    run_log.record("health", t.step, found)
    said = health.warnings({**found, **judged})
    for line in said:
        log.warning("warning: epoch %d: %s", t.epoch + 1, line)
    run_log.alarm(t.step, t.epoch + 1, said)


def write_gifs(run: Path) -> int:
    """Write progress_t1w.gif and progress_t2w.gif of a run; returns the exit code."""
    for domain in progress.DIRECTIONS:
        path = run / f"progress_{domain}.gif"
        write_atomically(path, progress.make_gif(run, domain))
        log.info("progress: %s", path)
    return console.DONE


def _save_last(t: Training, run: Path) -> None:
    t.check_finite()
    t.check_equal()
    state = t.state()
    if state is not None:
        checkpoint.save(run / "last.pt", state)


def _line_of(values: dict[str, float]) -> str:
    """Figures for a line of the log: two digits of decibels, four of anything else."""
    return "  ".join(f"{name.removesuffix('_db')} {value:.2f} dB" if name.endswith("_db")
                     else f"{name} {value:.4f}" for name, value in values.items())


def _announce(t: Training, store: SliceStore) -> None:
    c, p = t.config, t.process
    log.info("%s: %d training slices of %d pixels, %d validation", store.folder,
             len(store.rows("train")), store.size, len(store.rows("val")))
    log.info("G, F: %d features, %d blocks, %s upsampling; %s on %s", c.features, c.blocks,
             c.upsample, str(t.precision).removeprefix("torch."), p.device)
    log.info("%d process%s x batch %d = %d pairs a step; %d steps an epoch, %d in all", p.world,
             "" if p.world == 1 else "es", c.batch_size, p.world * c.batch_size,
             t.steps_per_epoch, t.last_step)


if __name__ == "__main__":
    sys.exit(console.run(main))
