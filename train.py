"""Train a CycleGAN between T1w (X) and T2w (Y) slices; Zhu et al. 2017.

    python train.py                                  one process
    torchrun --nproc_per_node=2 train.py             the same on two GPUs, or two CPU processes

Reads the store that preprocess.py built, writes `last.pt`, `best.pt`, `log.txt`, `metrics.jsonl`,
`config.json`, samples and TensorBoard files into the run folder. Run again, it goes on from `last.pt`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
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

import console
from data.augment import flip_left_right
from data.slices import UnpairedBatches, paired_slices, paired_subjects, to_tensor
from data.store import SliceStore
from device import PRECISIONS, autocast, choose_device, choose_precision
from losses.adversarial import GAN_KINDS, discriminator_loss, generator_loss
from losses.consistency import cycle_loss, identity_loss
from losses.history import ImageHistory
from losses.quality import psnr_db, ssim
from models import checkpoint
from models.cyclegan import EMA, CycleGAN, init_weights, unwrap
from models.generator import default_blocks

log = logging.getLogger("train")
TERMS = ("G", "F", "cycle_x", "cycle_y", "identity_x", "identity_y", "D_X", "D_Y")
# These may differ when a run goes on; any other option changes what is learnt.
FREE_ON_RESUME = ("slices", "run", "epochs", "epochs_decay", "max_steps", "device", "precision",
                  "workers", "log_every", "save_minutes", "keep_best")


@dataclass(frozen=True)
class TrainConfig:
    """All options of a run and the only place with their defaults (Zhu et al. 2017, sec. 4 and 7.1).

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
CHOICES = {"gan_loss": GAN_KINDS, "upsample": ("transpose", "nearest"),
           "precision": PRECISIONS}


def parse_args(argv: list[str] | None) -> tuple[TrainConfig, argparse.Namespace]:
    """Command line, made from the fields of `TrainConfig`."""
    parser = console.OneLineParser(description=__doc__, formatter_class=console.Formatter)
    defaults = TrainConfig()
    for title, options in HELP.items():
        group = parser.add_argument_group(title)
        for name, text in options.items():
            value, flag = getattr(defaults, name), "--" + name.replace("_", "-")
            if isinstance(value, bool):
                group.add_argument(flag, action=argparse.BooleanOptionalAction, default=value,
                                   help=text)
            elif isinstance(value, tuple):
                group.add_argument(flag, type=float, nargs="+", default=value, help=text)
            else:
                group.add_argument(flag, type=type(value), default=value, help=text,
                                   choices=CHOICES.get(name))
    group.add_argument("--resume", nargs="?", const="", metavar="CKPT",
                       help="go on from this checkpoint, or from last.pt, which must be there then "
                            "(without this option: from last.pt if it is there)")
    group.add_argument("--override", action="store_true",
                       help="on resume, take options that differ from the checkpoint's")
    args = parser.parse_args(argv)
    values = {f.name: getattr(args, f.name) for f in fields(TrainConfig)}
    for name in ("lambda_cycle", "betas"):
        pair = tuple(values[name])
        values[name] = pair * 2 if name == "lambda_cycle" and len(pair) == 1 else pair
    config = TrainConfig(**values)
    _check_config(config)
    return config, args


def _check_config(config: TrainConfig) -> None:
    least = {"epochs": 0, "epochs_decay": 0, "steps_per_epoch": 0, "max_steps": 0, "batch_size": 1,
             "features": 1, "blocks": 0, "history_size": 0, "workers": 0, "log_every": 1, "seed": 0,
             "keep_best": 0, "lambda_identity": 0, "save_minutes": 0}
    for name, low in least.items():
        if not getattr(config, name) >= low:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least {low}")
    if config.epochs + config.epochs_decay == 0:
        raise ValueError("--epochs 0 --epochs-decay 0: nothing to train; raise one")
    if len(config.lambda_cycle) != 2 or min(config.lambda_cycle) < 0:
        raise ValueError(f"--lambda-cycle {config.lambda_cycle}: one or two numbers of at least 0")
    if len(config.betas) != 2 or not all(0 <= b < 1 for b in config.betas):
        raise ValueError(f"--betas {config.betas}: two numbers from 0 to below 1")
    if not 0 < config.lr < 1 or not 0 <= config.ema < 1:
        raise ValueError(f"--lr {config.lr} --ema {config.ema}: lr lies between 0 and 1, ema from 0 to "
                         "below 1")


# ------------------------------------------------------------------------------- the machine


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started (alone: rank 0 of 1)."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, in the order of ranks; all processes call it together."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def start_process(device: str) -> Process:
    """Join the group of torchrun, if there is one: NCCL on CUDA, gloo on CPU."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    where = choose_device(device, local)
    if world > 1 and where.type == "cuda":
        where = choose_device("cuda", local)  # one GPU a process, whatever number was named
    if where.type == "cuda":
        torch.cuda.set_device(where)
        torch.backends.cudnn.benchmark = True  # sizes never change
    if world > 1:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    return Process(rank, world, where)


# ------------------------------------------------------------------------------ nets and state


class Training:
    """All that the next step depends on: nets, averages, optimisers, schedules, histories."""

    def __init__(self, config: TrainConfig, process: Process, steps_per_epoch: int):
        self.config, self.process = config, process
        nets = CycleGAN(config.features, config.blocks, config.upsample)
        init_weights(nets, torch.Generator().manual_seed(config.seed))
        self.nets = nets.to(process.device)
        self.ema = EMA(self.nets, config.ema)
        self.optimizers = {
            name: torch.optim.Adam(parameters, lr=config.lr, betas=config.betas, fused=True)
            for name, parameters in (("generators", nets.generators()),
                                     ("discriminators", nets.discriminators()))}

        def factor(step: int) -> float:
            """Constant, then linearly to 0."""
            past = step / steps_per_epoch - config.epochs
            return 1.0 if past <= 0 else max(0.0, 1 - past / max(config.epochs_decay, 1e-9))

        self.schedulers = {name: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
                           for name, optimizer in self.optimizers.items()}
        self.precision = choose_precision(config.precision, process.device)
        self.scaler = torch.amp.GradScaler(process.device.type,
                                           enabled=self.precision == torch.float16)
        # each process keeps its own histories: what its discriminators' share of a batch comes from
        seeds = [2 * (config.seed * 10007 + process.rank) + domain for domain in (0, 1)]
        self.history = {name: ImageHistory(config.history_size, seed)
                        for name, seed in zip(("x", "y"), seeds)}
        self.flips = torch.Generator()
        self.step = 0
        self.slices_seen = 0
        self.best: dict[str, Any] = {"t2w_ssim": -1.0, "epoch": -1, "kept": []}
        self.G, self.F, self.D_X, self.D_Y = (self._wrap(net) for net in
                                              (nets.G, nets.F, nets.D_X, nets.D_Y))

    def _wrap(self, net: nn.Module) -> nn.Module:
        if self.process.world == 1:
            return net
        ids = [self.process.device.index] if self.process.device.type == "cuda" else None
        return DistributedDataParallel(net, device_ids=ids, broadcast_buffers=False)

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

    def state(self, epoch: int, epoch_step: int, preprocessing: dict) -> dict[str, Any] | None:
        """What `last.pt` holds; None on other ranks than 0. All processes call it together."""
        mine = {"history": {name: pool.state_dict() for name, pool in self.history.items()},
                "rng": _random_state(self.process.device)}
        every = self.process.gather(mine)
        if not self.process.is_main:
            return None
        nets = {name: unwrap(getattr(self.nets, name)).state_dict()
                for name in ("G", "F", "D_X", "D_Y")}
        return {
            **self.inference_state(epoch, preprocessing),
            "generators": {name: nets[name] for name in ("G", "F")},
            "discriminators": {name: nets[name] for name in ("D_X", "D_Y")},
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
            "schedulers": {name: s.state_dict() for name, s in self.schedulers.items()},
            "scaler": self.scaler.state_dict(),
            "history": [part["history"] for part in every],
            "sampler": {"epoch": epoch, "step": epoch_step, "world": self.process.world},
            "rng": [part["rng"] for part in every],
        }

    def inference_state(self, epoch: int, preprocessing: dict) -> dict[str, Any]:
        """What `best.pt` holds."""
        return {"config": _plain(asdict(self.config)), "preprocessing": _plain(preprocessing),
                "step": self.step, "epoch": epoch, "slices_seen": self.slices_seen,
                "ema": self.ema.state_dict(), "best": dict(self.best)}

    def load(self, state: dict[str, Any]) -> tuple[int, int]:
        """Take over a checkpoint; returns epoch and step inside it to go on with."""
        for name in ("G", "F"):
            getattr(self.nets, name).load_state_dict(state["generators"][name])
        for name in ("D_X", "D_Y"):
            getattr(self.nets, name).load_state_dict(state["discriminators"][name])
        self.ema.load_state_dict(state["ema"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
            self.schedulers[name].load_state_dict(state["schedulers"][name])
        self.scaler.load_state_dict(state["scaler"] if self.scaler.is_enabled() else {})
        self.step, self.slices_seen = state["step"], state["slices_seen"]
        self.best = dict(state["best"])
        rank = self.process.rank
        if rank < len(state["history"]):
            for name, pool in self.history.items():
                pool.load_state_dict(state["history"][rank][name])
            _set_random_state(state["rng"][rank])
        return state["sampler"]["epoch"], state["sampler"]["step"]


def _random_state(device: torch.device) -> dict[str, Any]:
    kind, keys, place, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    state = {"torch": torch.get_rng_state(),
             "numpy": [kind, [int(k) for k in keys], int(place), int(has_gauss), float(cached)],
             "python": [version, list(internal), gauss]}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    kind, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), place, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _plain(value: Any) -> Any:
    """Tuples to lists all through, as a weights-only file and JSON want it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# ------------------------------------------------------------------------------------ one step


def train_step(t: Training, real_x: Tensor, real_y: Tensor) -> Tensor:
    """One update of G and F, then of D_X and D_Y, from slices (N, 1, H, W) in [-1, 1].

    Returns the unweighted terms in the order of `TERMS`, (8,) float32, without waiting for a GPU.
    """
    c = t.config
    n = len(real_x)
    with_identity = c.lambda_identity > 0

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
        identity_x, identity_y = identity_loss(real_x, from_y[n:]), identity_loss(real_y, from_x[n:])
        loss = loss + c.lambda_identity * (identity_x + identity_y)
    t.scaler.scale(loss).backward()
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
    t.scaler.step(t.optimizers["discriminators"])
    t.scaler.update()  # once a step, for both

    t.ema.update(t.step)
    with _no_order_warning():
        for scheduler in t.schedulers.values():
            scheduler.step()
    t.step += 1
    t.slices_seen += n * t.process.world
    return torch.stack([gan_g, gan_f, cycle_x, cycle_y, identity_x, identity_y, loss_d_x,
                        loss_d_y]).detach()


@contextlib.contextmanager
def _no_order_warning():
    """A skipped fp16 step looks to PyTorch like a scheduler that runs before its optimiser."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        yield


# ---------------------------------------------------------------------------------- validation


@torch.no_grad()
def validate(t: Training, store: SliceStore) -> dict[str, float]:
    """Brain SSIM and PSNR of the averaged G and F on the paired validation subjects.

    Subjects are shared out among the processes and their figures gathered, so the result does not
    depend on how many there are. Mean over a subject's slices, then over subjects; {} without any.
    """
    subjects = paired_subjects(store, "val")
    mine = [(i, _validate_subject(t, store, s)) for i, s in enumerate(subjects)
            if i % t.process.world == t.process.rank]
    parts = dict(pair for part in t.process.gather(mine) for pair in part)
    figures = [parts[i] for i in sorted(parts)]
    return {name: float(np.mean([f[name] for f in figures])) for name in figures[0]} if figures else {}


def _validate_subject(t: Training, store: SliceStore, subject: dict[str, Any]) -> dict[str, float]:
    figures: dict[str, list[float]] = {}
    for real_x, real_y, mask in paired_slices(store, subject):
        real_x, real_y, mask = (v.to(t.process.device) for v in (real_x, real_y, mask))
        with t.autocast():
            fake_y, fake_x = t.ema.G(real_x), t.ema.F(real_y)
        for name, fake, real in (("t2w", fake_y, real_y), ("t1w", fake_x, real_x)):
            fake, real = (fake.float() + 1) / 2, (real + 1) / 2
            # a perfect slice would be infinitely good
            psnr = psnr_db(fake, real, mask).clamp(max=100)
            figures.setdefault(f"{name}_ssim", []).extend(ssim(fake, real, mask).tolist())
            figures.setdefault(f"{name}_psnr_db", []).extend(psnr.tolist())
    return {name: float(np.mean(values)) for name, values in figures.items()}


@torch.no_grad()
def sample_grid(t: Training, store: SliceStore, count: int = 4) -> Tensor:
    """Real, translated, cycled and identity slices, both ways, as one picture (3, H, W) in [0, 1].

    Rows: T1w to T2w and back, then T2w to T1w and back, of the same `count` slices each epoch.
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
    """The run folder's `log.txt`, `metrics.jsonl` and TensorBoard files; silent on other ranks."""

    def __init__(self, folder: Path, process: Process):
        self._on = process.is_main
        if self._on:
            folder.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(folder / "log.txt")
            handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
            log.addHandler(handler)
            self._board = SummaryWriter(str(folder / "tensorboard"))
            self._metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8")
        else:
            log.setLevel(logging.ERROR)

    def record(self, kind: str, step: int, values: dict[str, float]) -> None:
        """One line of metrics and one TensorBoard point a value; `kind` names the group."""
        if self._on:
            self._metrics.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._metrics.flush()
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def picture(self, picture: Tensor, step: int, path: Path) -> None:
        """An image grid for TensorBoard and as a file."""
        if self._on:
            self._board.add_image("samples", picture, step)
            path.parent.mkdir(exist_ok=True)
            save_image(picture, path)

    def close(self) -> None:
        """Write out what is buffered."""
        if self._on:
            self._board.close()
            self._metrics.close()


def find_resume(config: TrainConfig, args: argparse.Namespace) -> dict[str, Any] | None:
    """The checkpoint to go on from: named, or `last.pt` of the run; None to start afresh.

    Raises
    ------
    ValueError : the options differ from the checkpoint's (names them)
    FileNotFoundError : `--resume` was given and there is nothing to resume
    """
    last = Path(args.resume) if args.resume else Path(config.run) / "last.pt"
    if not last.exists() and checkpoint.previous(last).exists():
        last = checkpoint.previous(last)  # killed between the two renames
    if not last.exists() and args.resume is None:
        return None
    try:
        state = checkpoint.load(last, resume=True)
    except ValueError:
        if not checkpoint.previous(last).exists():
            raise
        log.warning("%s is damaged, going on from %s", last, checkpoint.previous(last))
        state = checkpoint.load(checkpoint.previous(last), resume=True)
    now = _plain(asdict(config))
    changed = [name for name, value in state["config"].items()
               if name not in FREE_ON_RESUME and now.get(name) != value]
    if changed and not args.override:
        was = ", ".join(f"--{name.replace('_', '-')} {state['config'][name]} (now {now.get(name)})"
                        for name in changed)
        raise ValueError(f"{last}: was trained with {was}; give these again, add --override, or choose "
                         "another --run")
    log.info("resume from %s: epoch %d, step %d", last, state["epoch"], state["step"])
    return state


def save_best(t: Training, run: Path, figures: dict[str, float], epoch: int,
              preprocessing: dict) -> None:
    """Keep the averaged nets if they are the best so far, by T2w SSIM on the validation subjects.

    `best.pt` is the best, `best_SSIM_EPOCH.pt` the top few. Without validation subjects `best.pt`
    is simply the latest.
    """
    value = figures.get("t2w_ssim")
    if value is None:
        t.best.update(epoch=epoch, t2w_ssim=-1.0)
        checkpoint.save(run / "best.pt", t.inference_state(epoch, preprocessing))
        return
    kept = sorted([*t.best["kept"], [value, epoch]], key=lambda k: (-k[0], k[1]))
    kept, dropped = kept[:t.config.keep_best], kept[t.config.keep_best:]
    better = value > t.best["t2w_ssim"]
    if better:
        t.best.update(epoch=epoch, **figures)
    t.best["kept"] = kept
    if better:
        checkpoint.save(run / "best.pt", t.inference_state(epoch, preprocessing))
        checkpoint.previous(run / "best.pt").unlink(missing_ok=True)
    if [value, epoch] in kept:
        checkpoint.save(run / _best_name(value, epoch), t.inference_state(epoch, preprocessing))
    for old in dropped:
        (run / _best_name(*old)).unlink(missing_ok=True)


def _best_name(value: float, epoch: int) -> str:
    return f"best_{value:.4f}_{epoch:04d}.pt"


class StopRequest:
    """SIGTERM or SIGINT: leave at the next step, with a checkpoint."""

    def __init__(self, process: Process):
        self._asked = False
        self._process = process
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, signum: int, frame: object) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """Whether any process was asked; all processes call it together."""
        if self._process.world == 1:
            return self._asked
        asked = torch.tensor([float(self._asked)], device=self._process.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())


def complain_if_not_finite(terms: Tensor, epoch: int, step: int) -> None:
    """Stop on NaN or infinity: the weights are lost, `last.pt` still has good ones."""
    bad = [name for name, value in zip(TERMS, terms.tolist()) if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(f"loss {', '.join(bad)} is not finite by step {step} of epoch {epoch}; "
                                 "last.pt holds the state before; try a smaller --lr or --precision fp32")


def preprocessing_record(store: SliceStore) -> dict[str, Any]:
    """What `evaluate.py` and `translate.py` must do alike: copied from the store's header."""
    keys = ("size", "spacing_mm", "min_brain_area", "intensity", "layout", "sources", "counts",
            "versions")
    extraction = sorted({s["brain_extraction"] for s in store.subjects})
    subjects = {split: [s["id"] for s in store.subjects if s["split"] == split]
                for split in ("train", "val", "test")}
    # of a large study only the number: the list would outgrow the nets
    if len(store.subjects) > 2000:
        subjects = {}
    return {**{key: store.header[key] for key in keys}, "brain_extraction": extraction,
            "subjects": subjects}


# ---------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; returns the exit code."""
    config, args = parse_args(argv)
    store = SliceStore(config.slices)
    if not config.blocks:
        config = TrainConfig(**{**asdict(config), "blocks": default_blocks(store.size)})
    process = start_process(config.device)
    try:
        return train(config, args, store, process)
    finally:
        if process.world > 1:
            dist.destroy_process_group()


def train(config: TrainConfig, args: argparse.Namespace, store: SliceStore,
          process: Process) -> int:
    """The loop: batches, G and F, D_X and D_Y, log, validate, save."""
    run = Path(config.run)
    resumed = find_resume(config, args)
    run_log = RunLog(run, process)
    loader = UnpairedBatches(store, batch_size=config.batch_size, seed=config.seed,
                             steps_per_epoch=config.steps_per_epoch, rank=process.rank,
                             world=process.world)
    t = Training(config, process, loader.steps_per_epoch)
    epoch, epoch_step = t.load(resumed) if resumed else (0, 0)
    record = preprocessing_record(store)
    epochs = config.epochs + config.epochs_decay
    last_step = min(epochs * loader.steps_per_epoch, config.max_steps or sys.maxsize)
    _announce(t, store, loader, last_step)
    if process.is_main:
        (run / "config.json").write_text(json.dumps(_plain(asdict(config)), indent=1) + "\n")
    if t.step >= last_step:
        log.info("nothing left to train: step %d of %d is done; raise --epochs or --max-steps", t.step,
                 last_step)
        run_log.close()
        return console.DONE
    stop = StopRequest(process)
    bar = tqdm(total=last_step, initial=t.step, unit="step", disable=None if process.is_main else True)
    saved_at = time.monotonic()
    stopped = False

    while t.step < last_step and not stopped:
        sums, counted, waited, since = torch.zeros(len(TERMS), device=process.device), 0, 0.0, time.monotonic()
        batches = loader.batches(epoch, epoch_step, config.workers)
        while epoch_step < loader.steps_per_epoch and t.step < last_step and not stopped:
            # batch
            asked_at = time.monotonic()
            real_x, real_y = next(batches)
            waited += time.monotonic() - asked_at
            real_x, real_y = t.augment(real_x.to(process.device, non_blocking=True),
                                       real_y.to(process.device, non_blocking=True))
            # step
            sums += train_step(t, real_x, real_y)
            epoch_step += 1
            counted += 1
            bar.update()
            # log
            if t.step % config.log_every == 0:
                terms = sums / counted
                complain_if_not_finite(terms, epoch, epoch_step)
                seconds = time.monotonic() - since
                rate = counted * config.batch_size * process.world / seconds
                values = dict(zip(TERMS, terms.tolist()))
                run_log.record("loss", t.step, values)
                run_log.record("speed", t.step, {"pairs_per_s": rate, "waiting": waited / seconds})
                run_log.record("schedule", t.step,
                               {"lr": float(t.schedulers["generators"].get_last_lr()[0])})
                line = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
                log.info("epoch %d/%d  step %d/%d  %.2f pairs/s  %s", epoch + 1, epochs, t.step,
                         last_step, rate, line)
                sums.zero_()
                counted, waited, since = 0, 0.0, time.monotonic()
            # stop or save within the epoch
            if t.step % (1 if process.world == 1 else 10) == 0:
                stopped = stop.agreed()
            due = process.gather(time.monotonic() - saved_at > 60 * config.save_minutes)[0] \
                if t.step % 10 == 0 else False
            if stopped or due:
                _save_last(t, run, epoch, epoch_step, record)
                saved_at = time.monotonic()
        batches.close()
        if counted:
            complain_if_not_finite(sums / counted, epoch, epoch_step)
        if stopped:
            break

        # validate and save at the end of an epoch, or of the run
        figures = validate(t, store)
        finished = epoch_step == loader.steps_per_epoch
        run_log.record("validation", t.step, figures)
        if process.is_main:
            run_log.picture(sample_grid(t, store), t.step, run / "samples" / f"epoch_{epoch + 1:04d}.png")
            save_best(t, run, figures, epoch + 1, record)
        log.info("epoch %d/%d  step %d  %s", epoch + 1, epochs, t.step, _figures_line(figures))
        if finished:
            epoch, epoch_step = epoch + 1, 0
        _save_last(t, run, epoch, epoch_step, record)
        saved_at = time.monotonic()

    bar.close()
    run_log.close()
    if stopped:
        log.info("stopped at step %d of %d; the same command goes on from %s", t.step, last_step,
                 run / "last.pt")
        return console.FAILED
    log.info("done: %s", run / "best.pt")
    return console.DONE


def _save_last(t: Training, run: Path, epoch: int, epoch_step: int, record: dict) -> None:
    state = t.state(epoch, epoch_step, record)
    if state is not None:
        checkpoint.save(run / "last.pt", state)


def _figures_line(figures: dict[str, float]) -> str:
    if not figures:
        return "no validation subjects: best.pt is the latest"
    return "validation  " + "  ".join(
        f"{name} {value:.2f}" if name.endswith("db") else f"{name} {value:.4f}"
        for name, value in figures.items())


def _announce(t: Training, store: SliceStore, loader: UnpairedBatches, last_step: int) -> None:
    c, p = t.config, t.process
    log.info("%s: %d training slices of %d pixels, %d validation", store.folder,
             len(store.rows("train")), store.size, len(store.rows("val")))
    log.info("G, F: %d features, %d blocks, %s upsampling; %s on %s", c.features, c.blocks, c.upsample,
             str(t.precision).removeprefix("torch."), p.device)
    log.info("%d process%s x batch %d = %d pairs a step; %d steps an epoch, %d in all", p.world,
             "" if p.world == 1 else "es", c.batch_size, p.world * c.batch_size,
             loader.steps_per_epoch, last_step)


if __name__ == "__main__":
    sys.exit(console.run(main))
