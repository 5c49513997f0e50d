"""One update of G and F, then of D_X and D_Y: eager, compiled, or replayed as one CUDA graph.

What chance decides (the exchange with the histories) is drawn on the CPU beforehand, so that the
update itself never waits for a GPU. `--no-cuda-graph` and `--compile no` switch the fast ways off.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from losses.adversarial import discriminator_loss, generator_loss, rightly_judged
from losses.consistency import cycle_loss, identity_loss
from losses.start import start_loss, turned
from losses.structure import structure_loss

if TYPE_CHECKING:
    from config import TrainConfig
    from training import Training

TERMS = ("G", "F", "cycle_x", "cycle_y", "identity_x", "identity_y", "structure_x", "structure_y",
         "D_X", "D_Y")
NETS = ("G", "F", "D_X", "D_Y")
# Watched beside the terms: shares of patches that D judges rightly, norms of the gradients, and
# whether fp16 skipped an update.
WATCHED = ("D_X_right_real", "D_X_right_fake", "D_Y_right_real", "D_Y_right_fake",
           *(f"gradient_{name}" for name in NETS), "skipped")
# Compiling costs about so many seconds, and gains so many a slice pair at 64 features on an H100;
# on a CPU with AVX512-BF16 it gained nothing (benchmarks/RESULTS.md).
COMPILING_S = 100.0
GAINED_S = 0.003
WARM_UPS = 3  # updates before a graph is recorded: compilation and the optimisers' state


def train_step(t: Training, real_x: Tensor, real_y: Tensor) -> Tensor:
    """One update from slices (N, 1, H, W) in [-1, 1], and the counters after it.

    Slices (N, 2, H, W) are as the nets are shown them, and as D and the cycle see them.

    Returns the unweighted terms in the order of `TERMS`, then what `WATCHED` names, (19,) float32,
    without waiting for a GPU.
    """
    rate = t.learning_rate
    for group in (g for optimizer in t.optimizers.values() for g in optimizer.param_groups):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    exchange = torch.stack([part for name in ("x", "y")
                            for part in t.history[name].draw(len(real_x))])
    values = t.update(real_x, real_y, exchange, t.ema.weight(t.step), t.start_weight)
    t.step += 1
    t.epoch_step += 1
    t.slices_seen += len(real_x) * t.process.world
    return values


def update(t: Training, real_x: Tensor, real_y: Tensor, exchange: Tensor,
           ema_weight: float | Tensor, start_weight: float | Tensor = 0.0) -> Tensor:
    """What `train_step` does on the device: terms, gradients, weights, averages, histories.

    Parameters
    ----------
    exchange : (4, N) int64, of `ImageHistory.draw` for X and for Y
    ema_weight : share of the nets that goes into their averages
    start_weight : of the distance to the first guess; a number of 0 leaves it out
    """
    c = t.config
    n = len(real_x)
    real_x, real_y, aim_x, aim_y = real_x[:, :1], real_y[:, :1], real_x[:, -1:], real_y[:, -1:]
    with_identity = c.lambda_identity > 0

    # G and F: fool D, come back, leave the target domain alone (eq. 3 with sec. 5.2), keep edges.
    t.optimizers["generators"].zero_grad(set_to_none=True)
    with t.autocast():
        # one pass for translation and identity: instance norm keeps the slices of a batch apart
        from_x = t.G(torch.cat([real_x, aim_y]) if with_identity else real_x)
        from_y = t.F(torch.cat([real_y, aim_x]) if with_identity else real_y)
        fake_y, fake_x = from_x[:n], from_y[:n]
        cycled_x, cycled_y = t.F(fake_y), t.G(fake_x)
        scores_y, scores_x = t.judge(t.nets.D_Y, fake_y), t.judge(t.nets.D_X, fake_x)
    gan_g, gan_f = (generator_loss(scores, c.gan_loss) for scores in (scores_y, scores_x))
    cycle_x, cycle_y = cycle_loss(aim_x, cycled_x), cycle_loss(aim_y, cycled_y)
    loss = gan_g + gan_f + c.lambda_cycle[0] * cycle_x + c.lambda_cycle[1] * cycle_y
    identity_x = identity_y = structure_x = structure_y = torch.zeros((), device=real_x.device)
    if with_identity:
        identity_x = identity_loss(aim_x, from_y[n:])
        identity_y = identity_loss(aim_y, from_x[n:])
        loss = loss + c.lambda_identity * (identity_x + identity_y)
    if c.lambda_structure > 0:  # of the T1w and the T2w that were translated
        structure_x, structure_y = structure_loss(real_x, fake_y), structure_loss(real_y, fake_x)
        loss = loss + c.lambda_structure * (structure_x + structure_y)
    if isinstance(start_weight, Tensor) or start_weight > 0:
        guess_y = turned(real_x, t.quantiles["t1w"], t.quantiles["t2w"])
        guess_x = turned(real_y, t.quantiles["t2w"], t.quantiles["t1w"])
        loss = loss + start_weight * (start_loss(guess_y, fake_y) + start_loss(guess_x, fake_x))
    t.scaler.scale(loss).backward()
    norms_g, skipped_g = _gradient_norms(t, "generators", ("G", "F"))
    t.scaler.step(t.optimizers["generators"])

    # D_X and D_Y: real slices against slices from the history.
    t.optimizers["discriminators"].zero_grad(set_to_none=True)
    old_x = t.history["x"].exchange(fake_x, *exchange[:2])
    old_y = t.history["y"].exchange(fake_y, *exchange[2:])
    with t.autocast():
        on_x = t.D_X(torch.cat([aim_x, old_x]))
        on_y = t.D_Y(torch.cat([aim_y, old_y]))
    loss_d_x = discriminator_loss(on_x[:n], on_x[n:], c.gan_loss)
    loss_d_y = discriminator_loss(on_y[:n], on_y[n:], c.gan_loss)
    t.scaler.scale(loss_d_x + loss_d_y).backward()
    norms_d, skipped_d = _gradient_norms(t, "discriminators", ("D_X", "D_Y"))
    t.scaler.step(t.optimizers["discriminators"])
    t.scaler.update()  # once a step, for both

    t.ema.move(ema_weight)
    right = [*rightly_judged(on_x[:n], on_x[n:], c.gan_loss),
             *rightly_judged(on_y[:n], on_y[n:], c.gan_loss)]
    return torch.stack([gan_g, gan_f, cycle_x, cycle_y, identity_x, identity_y, structure_x,
                        structure_y, loss_d_x, loss_d_y, *right, *norms_g, *norms_d,
                        (skipped_g + skipped_d) / 2]).detach()


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


def compilation_pays(config: TrainConfig, device: torch.device, steps_per_epoch: int) -> bool:
    """Whether to compile the nets: what `--compile` says, or whether the planned steps repay it.

    Decided by the whole run, not by what is left of it, so that a resumed run decides alike.
    """
    if config.compile != "auto":
        return config.compile == "yes"
    if device.type != "cuda" or not importlib.util.find_spec("triton"):
        return False
    steps = min((config.epochs + config.epochs_decay) * steps_per_epoch,
                config.max_steps or sys.maxsize)
    gained = steps * config.batch_size * (config.features / 64) ** 2 * GAINED_S
    return gained > 2 * COMPILING_S


class Frozen:
    """Call a net so that gradients pass through to its input and none is left in its weights.

    Its weights go in as plain tensors: switching `requires_grad` off and on again would do, too,
    but not for a compiled net, whose gradients then vanish without a word.

    Parameters
    ----------
    like : a net of the same architecture as all that are called
    compiled : whether to compile the call
    """

    def __init__(self, like: nn.Module, compiled: bool = False):
        def run(weights: dict[str, Tensor], slices: Tensor) -> Tensor:
            return torch.func.functional_call(like, weights, (slices,))

        self._run: Callable[..., Tensor] = torch.compile(run, dynamic=False) if compiled else run

    def __call__(self, net: nn.Module, slices: Tensor) -> Tensor:
        """What `net` makes of slices."""
        return self._run({name: p.detach() for name, p in net.named_parameters()}, slices)


class Recorded:
    """`update`, recorded once as a CUDA graph and replayed: no kernel waits for Python.

    The first updates run as they are. Recorded once more without the first guess when that has
    served; slices of another shape than at first run as they are.

    Parameters
    ----------
    t : its optimisers capturable, with learning rates on the device
    """

    def __init__(self, t: Training):
        self._t = t
        self.forget()

    def forget(self) -> None:
        """Record anew: something that the graphs refer to has been replaced."""
        self._left = WARM_UPS
        self._shape: torch.Size | None = None
        # by whether the first guess takes part: graph, its inputs, what it gives
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, real_x: Tensor, real_y: Tensor, exchange: Tensor, ema_weight: float,
                 start_weight: float = 0.0) -> Tensor:
        """As `update`; what it returns is the caller's."""
        t, device, led = self._t, self._t.process.device, start_weight > 0
        numbers = [ema_weight, start_weight] if led else [ema_weight]
        fresh = [real_x, real_y, exchange.pin_memory(),
                 *(torch.tensor(number).pin_memory() for number in numbers)]
        self._shape = self._shape or real_x.shape
        if self._left or real_x.shape != self._shape:
            inputs = [v.to(device, non_blocking=True) for v in fresh]
            side = torch.cuda.Stream(device)  # as torch wants it before a recording
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                values = update(t, *inputs)
            torch.cuda.current_stream(device).wait_stream(side)
            self._left = max(self._left - 1, 0)
            return values
        if led not in self._graphs:
            self._graphs.clear()  # one that has served is not needed again
            inputs = [v.to(device, copy=True) for v in fresh]
            graph = torch.cuda.CUDAGraph()
            # other threads of this process may use the GPU meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                recorded = update(t, *inputs)
            self._graphs[led] = graph, inputs, recorded
        graph, inputs, recorded = self._graphs[led]
        for into, value in zip(inputs, fresh):
            into.copy_(value, non_blocking=True)
        graph.replay()
        return recorded.clone()
