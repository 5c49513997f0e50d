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
import difflib
import functools
import hashlib
import json
import logging
import math
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

try:
    import fcntl
except ImportError:  # Windows: the user has to see to it that one run writes
    fcntl = None  # type: ignore[assignment]
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import console
import health
from data.augment import flip_left_right
from data.slices import UnpairedBatches, paired_slices, paired_subjects, to_tensor
from data.store import SPLITS, SliceStore, write_atomically
from device import (PRECISIONS, Process, autocast, choose_precision, first_speaks,
                    peak_memory_gib, random_state, set_random_state, start_process)
from losses.adversarial import (GAN_KINDS, discriminator_loss, generator_loss,
                                rightly_judged)
from losses.consistency import cycle_loss, identity_loss
from losses.history import ImageHistory
from losses.quality import correlation, mae, psnr_db, ssim
from models import checkpoint
from models.cyclegan import EMA, CycleGAN, init_weights
from models.generator import UPSAMPLING, default_blocks

log = logging.getLogger("train")
TERMS = ("G", "F", "cycle_x", "cycle_y", "identity_x", "identity_y", "D_X", "D_Y")
NETS = ("G", "F", "D_X", "D_Y")
# Watched beside the terms: shares of patches that D judges rightly, norms of the gradients, and
# whether fp16 skipped an update.
WATCHED = ("D_X_right_real", "D_X_right_fake", "D_Y_right_real", "D_Y_right_fake",
           *(f"gradient_{name}" for name in NETS), "skipped")
# What a run may change when it goes on: nothing that is learnt from depends on these ...
FREE_ON_RESUME = ("slices", "run", "epochs", "epochs_decay", "max_steps", "device", "precision",
                  "workers", "log_every", "save_minutes", "keep_best")
# ... and what it cannot, whatever is asked for: the weights would not fit.
FIXED_ON_RESUME = ("features", "blocks", "upsample")


@dataclass(frozen=True)
class TrainConfig:
    """All options of a run and the only place with their defaults (Zhu et al. 2017, sec. 4, 7.1).

    Two differ from the paper: the identity weight is 0.1 (T1w and T2w contrast is inverted, and on
    real heads a weight of 5 taught copying), and G and F are averaged for use (`ema`).
    """

    slices: str = "slices"
    run: str = "runs/default"
    epochs: int = 100
    epochs_decay: int = 100
    steps_per_epoch: int = 0
    max_steps: int = 0
    batch_size: int = 1
    strict_unpaired: bool = False
    flip: bool = True
    features: int = 64
    blocks: int = 0
    upsample: str = "transpose"
    gan_loss: str = "lsgan"
    lambda_cycle: tuple[float, float] = (10.0, 10.0)
    lambda_identity: float = 0.1
    history_size: int = 50
    lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    ema: float = 0.999
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    workers: int = 1
    log_every: int = 50
    save_minutes: float = 10.0
    keep_best: int = 3


HELP = {
    "data": {
        "slices": "the store that preprocess.py built",
        "batch_size": "slices of each domain a step, in each process",
        "strict_unpaired": "T1w from one half of the training subjects, T2w from the other, so "
                           "that no head is seen in both",
        "flip": "mirror slices left to right at random",
        "workers": "batches read ahead by threads (0: read when asked)",
    },
    "model": {
        "features": "channels after the first layer of each net",
        "blocks": "residual blocks of a generator (0: 9 above 128 pixels, else 6)",
        "upsample": "transposed convolution (the paper) or nearest neighbour, then convolution",
    },
    "loss": {
        "gan_loss": "least squares, log form of eq. 1, or hinge",
        "lambda_cycle": "weight of the cycle loss of T1w and of T2w (one number serves both)",
        "lambda_identity": "weight of the identity loss",
        "history_size": "generated slices kept for the discriminators, in each process (0: off)",
    },
    "optimiser": {
        "epochs": "epochs at the full learning rate",
        "epochs_decay": "epochs of linear decay to 0 after them",
        "steps_per_epoch": "steps (0: one pass over the training slices)",
        "max_steps": "end after so many steps (0: no limit)",
        "lr": "learning rate of Adam",
        "betas": "of Adam",
        "ema": "share that the averaged G and F keep of themselves a step",
    },
    "run": {
        "run": "folder of checkpoints and logs",
        "seed": "of weights, drawing and history",
        "device": "auto, cpu or cuda",
        "precision": "auto: bf16 where the hardware has it, else fp16 on CUDA, fp32 on CPU",
        "log_every": "steps between two lines of the log",
        "save_minutes": "minutes between two writes of last.pt inside an epoch",
        "keep_best": "checkpoints best_SSIM_EPOCH.pt kept",
    },
}
CHOICES = {"gan_loss": GAN_KINDS, "upsample": UPSAMPLING, "precision": PRECISIONS}


def parse_args(argv: list[str] | None) -> tuple[TrainConfig, argparse.Namespace]:
    """Command line, made from the fields of `TrainConfig`."""
    parser = console.OneLineParser(description=__doc__, formatter_class=console.Formatter,
                                   allow_abbrev=False)
    defaults = TrainConfig()
    for title, options in HELP.items():
        group = parser.add_argument_group(title)
        for name, text in options.items():
            value, flag = getattr(defaults, name), _flag(name)
            if isinstance(value, bool):
                group.add_argument(flag, action=argparse.BooleanOptionalAction, default=value,
                                   help=text)
            elif isinstance(value, tuple):
                group.add_argument(flag, type=float, nargs="+", default=value, help=text)
            else:
                group.add_argument(flag, type=type(value), default=value, help=text,
                                   choices=CHOICES.get(name))
    group.add_argument("--config", type=Path, metavar="FILE", default=argparse.SUPPRESS,
                       help="options from a TOML file, or from a run's config.json; the command "
                            "line stands above it")
    group.add_argument("--resume", nargs="?", const="", metavar="CKPT",
                       help="go on from this checkpoint, or from last.pt, which must be there then "
                            "(without this option: from last.pt if it is there)")
    group.add_argument("--override", action="store_true",
                       help="on resume, take options or subjects that differ from the checkpoint's")
    file = parser.parse_known_args(argv)[0]
    if hasattr(file, "config"):
        parser.set_defaults(**read_config(file.config))
    args = parser.parse_args(argv)
    values = {f.name: getattr(args, f.name) for f in fields(TrainConfig)}
    values["betas"] = tuple(values["betas"])
    weights = tuple(values["lambda_cycle"])
    values["lambda_cycle"] = weights * 2 if len(weights) == 1 else weights
    config = TrainConfig(**values)
    _check_config(config)
    return config, args


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_config(path: Path) -> dict[str, Any]:
    """Options of `TrainConfig` from a file, by their names (`batch_size` or `batch-size`).

    Raises
    ------
    FileNotFoundError, ValueError : no such file, not TOML or JSON, an unknown option or a value of
        another kind than its default
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"--config {path}: not a text file") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"--config {path}: no such file") from None
    try:
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:  # of either
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ValueError(f"--config {path}: not {kind} ({error})") from None
    defaults, values = asdict(TrainConfig()), {}
    for key, value in (content.items() if isinstance(content, dict) else ()):
        name = key.replace("-", "_")
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            raise ValueError(f"--config {path}: '{key}' is no option of train.py"
                             + (f"; is {near[0]} meant?" if near else ""))
        values[name] = _as_kind(value, defaults[name], f"--config {path}: {key}")
    return values


def _as_kind(value: Any, default: Any, where: str) -> Any:
    """A value of a config file, refused where it is not of its default's kind."""
    if isinstance(default, tuple):
        found = value if isinstance(value, list) else [value]
        return tuple(_as_kind(item, default[0], where) for item in found)
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
        raise ValueError(f"{where} is {value!r}, should be like {default!r}")
    return type(default)(value)


def _check_config(c: TrainConfig) -> None:
    """Refuse what would fail later, or never end."""
    least = {"epochs": 0, "epochs_decay": 0, "steps_per_epoch": 0, "max_steps": 0, "batch_size": 1,
             "features": 1, "blocks": 0, "history_size": 0, "workers": 0, "log_every": 1, "seed": 0,
             "keep_best": 0, "lambda_identity": 0, "save_minutes": 0}
    for name, low in least.items():
        if not low <= getattr(c, name) < math.inf:
            raise ValueError(f"{_flag(name)} {getattr(c, name)}: must be at least {low}")
    if c.epochs + c.epochs_decay == 0:
        raise ValueError("--epochs 0 --epochs-decay 0: nothing to train; raise one")
    if len(c.lambda_cycle) != 2 or not all(0 <= weight < math.inf for weight in c.lambda_cycle):
        raise ValueError(f"--lambda-cycle {c.lambda_cycle}: one or two numbers of at least 0")
    if len(c.betas) != 2 or not all(0 <= beta < 1 for beta in c.betas):
        raise ValueError(f"--betas {c.betas}: two numbers from 0 to below 1")
    if not 0 < c.lr < 1 or not 0 <= c.ema < 1:
        raise ValueError(f"--lr {c.lr} --ema {c.ema}: lr lies between 0 and 1, ema from 0 to "
                         "below 1")
    if Path(c.run).exists() and not Path(c.run).is_dir():
        raise ValueError(f"--run {c.run}: is a file; name a folder")


# ------------------------------------------------------------------------------ nets and state


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
    """

    def __init__(self, config: TrainConfig, process: Process, steps_per_epoch: int,
                 preprocessing: dict[str, Any] | None = None):
        self.config, self.process = config, process
        self.steps_per_epoch, self.preprocessing = steps_per_epoch, preprocessing or {}
        nets = CycleGAN(config.features, config.blocks, config.upsample)
        init_weights(nets, torch.Generator().manual_seed(config.seed))
        self.nets = nets.to(process.device)
        self.ema = EMA(self.nets, config.ema)
        self.optimizers = {
            name: torch.optim.Adam(parameters, lr=config.lr, betas=config.betas, fused=True)
            for name, parameters in (("generators", nets.generators()),
                                     ("discriminators", nets.discriminators()))}
        self.precision = choose_precision(config.precision, process.device)
        self.scaler = torch.amp.GradScaler(process.device.type,
                                           enabled=self.precision == torch.float16)
        # each process keeps its own histories: what its discriminators' share of a batch comes from
        seeds = [2 * (config.seed * 10007 + process.rank) + domain for domain in (0, 1)]
        self.history = {name: ImageHistory(config.history_size, seed)
                        for name, seed in zip(("x", "y"), seeds)}
        self.flips = torch.Generator()
        self.step = self.slices_seen = 0
        self.epoch = self.epoch_step = 0  # epochs that are finished, steps of the one that is not
        self.best: dict[str, Any] = {"t2w_ssim": -1.0, "epoch": -1, "kept": [], "judged_step": 0}
        # of terms and what is watched, since the last line of the log and in this epoch
        self.sums, self.counted = torch.zeros(len(TERMS) + len(WATCHED), device=process.device), 0
        self.epoch_sums, self.epoch_counted = self.sums.clone(), 0
        self.recent: list[tuple[int, int, int, Tensor]] = []  # step, epoch, its step, values
        self.environment = environment(process, self.precision)
        self.where: Callable[[int, int], str] = lambda epoch, epoch_step: ""  # names its slices
        self.G, self.F, self.D_X, self.D_Y = (self._wrap(getattr(nets, name)) for name in NETS)

    def _wrap(self, net: nn.Module) -> nn.Module:
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

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision for the nets' forward passes; the losses compute in float32."""
        return autocast(self.process.device, self.precision)

    def augment(self, real_x: Tensor, real_y: Tensor) -> tuple[Tensor, Tensor]:
        """Mirror at random; drawn from seed, step and rank, so a resumed run draws the same."""
        if not self.config.flip:
            return real_x, real_y
        words = np.random.SeedSequence([self.config.seed, self.step, self.process.rank])
        self.flips.manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1))
        return flip_left_right(real_x, self.flips), flip_left_right(real_y, self.flips)

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
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
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
        return {"config": _plain(asdict(self.config)), "preprocessing": _plain(self.preprocessing),
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
            for group in optimizer.param_groups:
                group["betas"] = self.config.betas
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
        if state["sampler"]["world"] == self.process.world:
            for sums in ("sums", "epoch_sums"):
                getattr(self, sums).copy_(state["sampler"][sums][rank])
            self.counted = state["sampler"]["counted"]
            self.epoch_counted = state["sampler"]["epoch_counted"]


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """Tensors to the CPU: sent from one process to another they would take up its own GPU there."""
    return {key: value.cpu() if isinstance(value, Tensor) else value
            for key, value in state.items()}


def _plain(value: Any) -> Any:
    """Tuples to lists all through, as a weights-only file and JSON want it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# ------------------------------------------------------------------------------------ one step


def train_step(t: Training, real_x: Tensor, real_y: Tensor) -> Tensor:
    """One update of G and F, then of D_X and D_Y, from slices (N, 1, H, W) in [-1, 1].

    Returns the unweighted terms in the order of `TERMS`, then what `WATCHED` names, (17,) float32,
    without waiting for a GPU.
    """
    c = t.config
    n = len(real_x)
    with_identity = c.lambda_identity > 0
    for optimizer in t.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = t.learning_rate

    # G and F: fool D, come back, leave the target domain alone (eq. 3 with sec. 5.2).
    for net in (t.nets.D_X, t.nets.D_Y):
        net.requires_grad_(False)
    t.optimizers["generators"].zero_grad(set_to_none=True)
    with t.autocast():
        # one pass for translation and identity: instance norm keeps the slices of a batch apart
        from_x = t.G(torch.cat([real_x, real_y]) if with_identity else real_x)
        from_y = t.F(torch.cat([real_y, real_x]) if with_identity else real_y)
        fake_y, fake_x = from_x[:n], from_y[:n]
        cycled_x, cycled_y = t.F(fake_y), t.G(fake_x)
        # D without its DDP wrapper: it learns nothing here, so there is nothing to reduce
        scores_y, scores_x = t.nets.D_Y(fake_y), t.nets.D_X(fake_x)
    gan_g, gan_f = (generator_loss(scores, c.gan_loss) for scores in (scores_y, scores_x))
    cycle_x, cycle_y = cycle_loss(real_x, cycled_x), cycle_loss(real_y, cycled_y)
    loss = gan_g + gan_f + c.lambda_cycle[0] * cycle_x + c.lambda_cycle[1] * cycle_y
    identity_x = identity_y = torch.zeros((), device=real_x.device)
    if with_identity:
        identity_x = identity_loss(real_x, from_y[n:])
        identity_y = identity_loss(real_y, from_x[n:])
        loss = loss + c.lambda_identity * (identity_x + identity_y)
    t.scaler.scale(loss).backward()
    norms_g, skipped_g = _gradient_norms(t, "generators", ("G", "F"))
    t.scaler.step(t.optimizers["generators"])

    # D_X and D_Y: real slices against slices from the history.
    for net in (t.nets.D_X, t.nets.D_Y):
        net.requires_grad_(True)
    t.optimizers["discriminators"].zero_grad(set_to_none=True)
    old_x, old_y = t.history["x"].query(fake_x), t.history["y"].query(fake_y)
    with t.autocast():
        on_x = t.D_X(torch.cat([real_x, old_x]))
        on_y = t.D_Y(torch.cat([real_y, old_y]))
    loss_d_x = discriminator_loss(on_x[:n], on_x[n:], c.gan_loss)
    loss_d_y = discriminator_loss(on_y[:n], on_y[n:], c.gan_loss)
    t.scaler.scale(loss_d_x + loss_d_y).backward()
    norms_d, skipped_d = _gradient_norms(t, "discriminators", ("D_X", "D_Y"))
    t.scaler.step(t.optimizers["discriminators"])
    t.scaler.update()  # once a step, for both

    t.ema.update(t.step)
    t.step += 1
    t.epoch_step += 1
    t.slices_seen += n * t.process.world
    right = [*rightly_judged(on_x[:n], on_x[n:], c.gan_loss),
             *rightly_judged(on_y[:n], on_y[n:], c.gan_loss)]
    return torch.stack([gan_g, gan_f, cycle_x, cycle_y, identity_x, identity_y, loss_d_x, loss_d_y,
                        *right, *norms_g, *norms_d, (skipped_g + skipped_d) / 2]).detach()


def _gradient_norms(t: Training, optimizer: str,
                    nets: tuple[str, ...]) -> tuple[list[Tensor], Tensor]:
    """L2 norm of each net's gradient, and 1 where fp16 overflowed and its update will be skipped.

    An overflow is the scaler's way to find its scale, so its norm counts as 0, not as a fault.
    """
    if t.scaler.is_enabled():
        t.scaler.unscale_(t.optimizers[optimizer])
    norms = [torch.nn.utils.get_total_norm([p.grad for p in getattr(t.nets, name).parameters()
                                            if p.grad is not None]) for name in nets]
    skipped = torch.zeros((), device=t.process.device)
    if t.scaler.is_enabled():
        skipped = 1 - torch.stack(norms).isfinite().all().float()
        norms = [norm.nan_to_num(0, 0, 0) for norm in norms]
    return norms, skipped


# ---------------------------------------------------------------------------------- validation


@torch.no_grad()
def validate(t: Training, store: SliceStore) -> dict[str, float]:
    """Judge the averaged G and F on the paired validation subjects, in the brain (collective).

    SSIM, PSNR, correlation with the real target; distance to the input over the real target's
    (`copy_ratio`), and the share of generated signal `outside` the brain.

    Subjects are shared out among the processes and their figures gathered, so the result does not
    depend on how many there are. Mean over a subject's slices, then over subjects; {} without any,
    and on other ranks than 0.
    """
    subjects: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for session in paired_subjects(store, "val"):
        subjects.setdefault((session["dataset"], session["subject"]), []).append(session)
    rank, world = t.process.rank, t.process.world
    mine = [(i, _validate_subject(t, store, sessions))
            for i, sessions in enumerate(subjects.values()) if i % world == rank]
    parts = dict(pair for part in t.process.gather(mine) for pair in part)
    figures = [parts[i] for i in sorted(parts)]
    names = figures[0] if figures else ()
    return {name: float(np.mean([f[name] for f in figures])) for name in names}


def _validate_subject(t: Training, store: SliceStore,
                      sessions: list[dict[str, Any]]) -> dict[str, float]:
    figures: dict[str, list[float]] = {}
    for real_x, real_y, mask in (b for s in sessions for b in paired_slices(store, s)):
        real_x, real_y, mask = (v.to(t.process.device) for v in (real_x, real_y, mask))
        with t.autocast():
            fake_y, fake_x = t.ema.G(real_x), t.ema.F(real_y)
        for name, fake, real, given in (("t2w", fake_y, real_y, real_x),
                                        ("t1w", fake_x, real_x, real_y)):
            fake, real, given = ((v.float() + 1) / 2 for v in (fake, real, given))
            signal_all = fake.sum((1, 2, 3)).clamp(min=1e-6)
            measured = {
                "ssim": ssim(fake, real, mask),
                # a perfect slice would be infinitely good
                "psnr_db": psnr_db(fake, real, mask).clamp(max=100),
                "correlation": correlation(fake, real, mask),
                "copy_ratio": mae(fake, given, mask) / mae(real, given, mask).clamp(min=1e-6),
                "outside": (fake * ~mask).sum((1, 2, 3)) / signal_all,
            }
            for what, values in measured.items():
                figures.setdefault(f"{name}_{what}", []).extend(values.tolist())
    return {name: float(np.mean(values)) for name, values in figures.items()}


@torch.no_grad()
def sample_grid(t: Training, store: SliceStore, count: int = 4) -> Tensor:
    """Draw the same `count` slices each epoch as one picture (3, H, W) in [0, 1], a row a slice.

    Columns: T1w, translated, cycled, identity, then T2w, translated, cycled, identity.
    """
    rows = store.rows("val")
    rows = rows if len(rows) else store.rows("train")
    rows = rows[np.linspace(0, len(rows) - 1, count + 2).astype(int)[1:-1]]
    real_x, real_y = (to_tensor(a[rows]).to(t.process.device) for a in (store.t1w, store.t2w))
    with t.autocast():
        fake_y, fake_x = t.ema.G(real_x), t.ema.F(real_y)
        picture = torch.stack([real_x, fake_y, t.ema.F(fake_y), t.ema.F(real_x),
                               real_y, fake_x, t.ema.G(fake_x), t.ema.G(real_y)], dim=1)
    return make_grid(picture.flatten(0, 1).float().cpu(), nrow=8, value_range=(-1, 1),
                     normalize=True, pad_value=0.3)


# -------------------------------------------------------------------------------- run folder


class RunLog:
    """The run folder's `log.txt`, `metrics.jsonl` and TensorBoard files; silent on other ranks.

    Parameters
    ----------
    folder : of the run
    process : this one
    step : where the run goes on; what an interrupted one logged after it goes
    """

    def __init__(self, folder: Path, process: Process, step: int):
        self._on = process.is_main
        if not self._on:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        self._handler.setFormatter(
            logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(self._handler)
        log.setLevel(logging.INFO)
        metrics = folder / "metrics.jsonl"
        before = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        kept = "".join(line + "\n" for line in before if _step_of(line) <= step)
        write_atomically(metrics, kept.encode())
        self._metrics = open(metrics, "a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def record(self, kind: str, step: int, values: dict[str, float]) -> None:
        """One line of metrics and one TensorBoard point a value; `kind` names the group."""
        if self._on:
            self._metrics.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._metrics.flush()
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def alarm(self, step: int, epoch: int, lines: list[str]) -> None:
        """Warnings of an epoch, for the reports that are made of metrics.jsonl."""
        if self._on:
            for line in lines:
                text = json.dumps({"kind": "warning", "step": step, "epoch": epoch, "text": line})
                self._metrics.write(text + "\n")
            self._metrics.flush()

    def picture(self, picture: Tensor, step: int, path: Path) -> None:
        """An image grid for TensorBoard and as a file."""
        if self._on:
            self._board.add_image("samples", picture, step)
            path.parent.mkdir(exist_ok=True)
            save_image(picture, path)

    def close(self) -> None:
        """Write out what is buffered, leave the logger as it was."""
        if self._on:
            self._board.close()
            self._metrics.close()
            log.removeHandler(self._handler)
            self._handler.close()


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinity where a kill cut the line short."""
    try:
        return json.loads(line)["step"]
    except ValueError:
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
    ValueError : options or data differ from the checkpoint's (names them)
    FileNotFoundError : `--resume` was given and there is nothing to resume
    """
    last = Path(args.resume) if args.resume else Path(config.run) / "last.pt"
    before = checkpoint.previous(last)
    if not last.exists() and before.exists():
        last = before  # killed between the two renames
    if not last.exists() and args.resume is None:
        return None, last
    try:
        state = checkpoint.load(last, resume=True)
    except ValueError as error:
        if last == before or not before.exists():
            raise
        log.warning("%s; going on from %s", error, before)
        last, state = before, checkpoint.load(before, resume=True)
    _check_options(config, args, state, last)
    _check_data(config, args, state, last, record)
    return state, last


def _check_options(config: TrainConfig, args: argparse.Namespace, state: dict[str, Any],
                   last: Path) -> None:
    """Refuse options that change what is learnt."""
    now = _plain(asdict(config))
    changed = [name for name, value in state["config"].items()
               if name not in FREE_ON_RESUME and now.get(name) != value]
    if args.override:
        changed = [name for name in changed if name in FIXED_ON_RESUME]
    if changed:
        was = ", ".join(f"{_flag(name)} {state['config'][name]} (now {now.get(name)})"
                        for name in changed)
        cure = "" if args.override else "add --override, "
        raise ValueError(f"{last}: was trained with {was}; give these again, {cure}or choose "
                         "another --run")


def _check_data(config: TrainConfig, args: argparse.Namespace, state: dict[str, Any], last: Path,
                record: dict[str, Any]) -> None:
    """Refuse slices made otherwise, and other subjects; add the subjects of before to `record`."""
    trained = state["preprocessing"]
    for name in ("size", "spacing_mm", "intensity"):
        if trained[name] != record[name]:
            raise ValueError(f"{config.slices}: made with {name} {record[name]}, {last} was "
                             f"trained on {trained[name]}; point to that store with --slices, or "
                             "choose another --run")
    old, new = (set(r["subjects"]["train"]) for r in (trained, record))
    if old != new and not args.override:
        raise ValueError(f"{config.slices}: its train split differs from the one that {last} was "
                         f"trained on, {sorted(old ^ new)[0]} for one; point to that store with "
                         "--slices, add --override, or choose another --run")
    record["subjects"]["train"] = sorted(old | new)  # evaluate.py refuses all that were ever seen


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
            (run / _best_name(*old)).unlink(missing_ok=True)
    t.best["kept"] = kept
    if [value, epoch] in kept:
        checkpoint.save(run / _best_name(value, epoch), t.inference_state(epoch),
                        keep_previous=False)


def _best_name(value: float, epoch: int) -> str:
    return f"best_{value:.4f}_{epoch:04d}.pt"


def preprocessing_record(store: SliceStore) -> dict[str, Any]:
    """What `evaluate.py` and `translate.py` must do alike: copied from the store's header."""
    keys = ("size", "spacing_mm", "min_brain_area", "intensity", "layout", "sources", "counts",
            "versions")
    return {**{key: store.header[key] for key in keys},
            "brain_extraction": sorted({s["brain_extraction"] for s in store.subjects}),
            "subjects": {split: [s["id"] for s in store.subjects if s["split"] == split]
                         for split in SPLITS}}


# ---------------------------------------------------------------------------------------- main


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
        yield
    finally:
        if handle is not None:
            os.close(handle)
        if fresh and not any(run.iterdir()):
            run.rmdir()


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
        config, args = parse_args(argv)
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
    loader = UnpairedBatches(store, batch_size=config.batch_size, seed=config.seed,
                             steps_per_epoch=config.steps_per_epoch, rank=process.rank,
                             world=process.world, strict=config.strict_unpaired)
    state, last = find_resume(config, args, record)
    t = Training(config, process, loader.steps_per_epoch, record)
    t.where = functools.partial(name_slices, store, loader)
    if state:
        t.load(state)
    with contextlib.closing(RunLog(run, process, t.step)) as run_log:
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
                text = json.dumps(_plain(what), indent=1) + "\n"
                write_atomically(run / f"{name}.json", text.encode())
        with StopRequest() as stop, logging_redirect_tqdm():
            finished = loop(t, loader, store, run_log, stop)
        if not finished:
            log.info("stopped at step %d of %d; run again with --resume to go on from %s", t.step,
                     t.last_step, run / "last.pt")
            return console.FAILED
        log.info("done: %s", run / "best.pt")
        return console.DONE


def loop(t: Training, loader: UnpairedBatches, store: SliceStore, run_log: RunLog,
         stop: StopRequest) -> bool:
    """Batches, G and F, D_X and D_Y, log, validate, save; returns whether it came to the end."""
    c, process, run = t.config, t.process, Path(t.config.run)
    last_step, epochs = t.last_step, c.epochs + c.epochs_decay
    # asking the others makes the CPU wait for the GPU
    ask_every = 10 if process.world > 1 and process.device.type == "cuda" else 1
    bar = tqdm(total=last_step, initial=t.step, unit="step",
               disable=None if process.is_main else True)
    saved_at = time.monotonic()
    stopped = False

    while not stopped and (t.step < last_step or t.best["judged_step"] < t.step):
        timed, waited, since = 0, 0.0, time.monotonic()
        epoch_waited, epoch_since = 0.0, since
        batches = loader.batches(t.epoch, t.epoch_step, c.workers)
        while t.epoch_step < t.steps_per_epoch and t.step < last_step and not stopped:
            # batch
            asked_at = time.monotonic()
            real_x, real_y = next(batches)
            waited += time.monotonic() - asked_at
            epoch_waited += time.monotonic() - asked_at
            real_x, real_y = t.augment(real_x.to(process.device, non_blocking=True),
                                       real_y.to(process.device, non_blocking=True))
            # step
            learning_rate = t.learning_rate
            t.note(train_step(t, real_x, real_y))
            timed += 1
            bar.update()
            # log
            if t.step % c.log_every == 0:
                terms = t.mean_terms()
                seconds = time.monotonic() - since
                rate = timed * c.batch_size * process.world / seconds
                run_log.record("loss", t.step, terms)
                run_log.record("speed", t.step,
                               {"pairs_per_s": rate, "waiting": waited / seconds})
                run_log.record("schedule", t.step, {"lr": learning_rate})
                log.info("epoch %d/%d  step %d/%d  %.2f pairs/s  %s", t.epoch + 1, epochs, t.step,
                         last_step, rate, _line_of(terms))
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
        if stopped:
            break

        # validate and save at the end of an epoch, or of the run
        t.check_finite()
        figures = validate(t, store)
        t.check_equal()
        run_log.record("validation", t.step, figures)
        watch(t, run_log, figures, epoch_waited / max(time.monotonic() - epoch_since, 1e-9))
        t.best["judged_step"] = t.step
        if process.is_main:
            run_log.picture(sample_grid(t, store), t.step,
                            run / "samples" / f"epoch_{t.epoch + 1:04d}.png")
            save_best(t, figures)
        log.info("epoch %d/%d  step %d  validation  %s", t.epoch + 1, epochs, t.step,
                 _line_of(figures) or "no subjects: best.pt is the latest")
        if t.epoch_step == t.steps_per_epoch:
            t.epoch, t.epoch_step, t.epoch_counted = t.epoch + 1, 0, 0
            t.epoch_sums.zero_()
        _save_last(t, run)
        saved_at = time.monotonic()

    bar.close()
    return not stopped


def watch(t: Training, run_log: RunLog, figures: dict[str, float], waiting: float) -> None:
    """Log what was watched in an epoch, and a line for each figure that is not healthy."""
    found = {**t.watched(), "waiting": waiting,
             "peak_memory_gib": peak_memory_gib(t.process.device)}
    judged = {name: value for name, value in figures.items()
              if not name.endswith(("_ssim", "_psnr_db"))}
    run_log.record("health", t.step, found)
    said = health.warnings({**found, **judged})
    for line in said:
        log.warning("warning: epoch %d: %s", t.epoch + 1, line)
    run_log.alarm(t.step, t.epoch + 1, said)


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
