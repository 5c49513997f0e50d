"""All that the next step of a training run depends on, and its way into and out of a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import TrainConfig, plain
from data.augment import deform, flip_left_right
from data.histogram import StandardRows
from device import Process, autocast, choose_precision, random_state, set_random_state
from losses.history import ImageHistory
from models.cyclegan import EMA, CycleGAN, init_weights
from run_folder import environment
from step import NETS, TERMS, WATCHED, Frozen, Recorded, compilation_pays, update


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
    standard : what histograms slices are shown with; None shows them as they are stored
    """

    def __init__(self, config: TrainConfig, process: Process, steps_per_epoch: int,
                 preprocessing: dict[str, Any] | None = None,
                 quantiles: dict[str, np.ndarray] | None = None,
                 standard: StandardRows | None = None):
        self.config, self.process = config, process
        self.steps_per_epoch, self.preprocessing = steps_per_epoch, preprocessing or {}
        self.standard = standard
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
        self.complain(f"weights of {', '.join(lost)} not finite by step {self.step} (epoch "
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
        self.complain(found)
        self.recent.clear()

    def complain(self, found: str, cure: str = "try a smaller --lr, or --precision fp32") -> None:
        """Raise FloatingPointError on all processes where one of them has `found` (collective)."""
        if self.process.any(bool(found))[0]:
            every = [text for text in self.process.gather(found) if text]
            raise FloatingPointError(f"{every[0] if every else found}; last.pt has the state "
                                     f"before, if one was saved; {cure}")

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
