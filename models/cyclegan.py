"""The four nets together, their first weights, and the moving average of G and F.

Files and their format are `models/checkpoint.py`'s; losses and optimisers are the training loop's.
"""
import copy
from typing import Any

import torch
from torch import Tensor, nn

from models.discriminator import PatchDiscriminator
from models.generator import ResnetGenerator


class CycleGAN(nn.Module):
    """Hold G: X -> Y, F: Y -> X, D_X and D_Y (Zhu et al. 2017, fig. 3); X = T1w, Y = T2w.

    Has no `forward`: which net sees what is the training loop's business. The weights are PyTorch's
    defaults until `init_weights` or a checkpoint sets them.

    Parameters
    ----------
    features : channels after the first layer of each net; 64 in the paper.
    blocks : residual blocks of each generator.
    upsample : "blur", "transpose" (the paper) or "nearest", see `models.generator.u`.
    keep_background : of the generators, see there.
    """

    def __init__(self, features: int = 64, blocks: int = 6, upsample: str = "transpose",
                 keep_background: bool = False) -> None:
        super().__init__()
        # Typed as plain modules: training puts DDP or compiled wrappers in their places.
        self.G: nn.Module = ResnetGenerator(features, blocks, upsample, keep_background)
        self.F: nn.Module = ResnetGenerator(features, blocks, upsample, keep_background)
        self.D_X: nn.Module = PatchDiscriminator(features)
        self.D_Y: nn.Module = PatchDiscriminator(features)

    def generators(self) -> list[nn.Parameter]:
        """Return the parameters of G and F, for their one optimiser."""
        return [*self.G.parameters(), *self.F.parameters()]

    def discriminators(self) -> list[nn.Parameter]:
        """Return the parameters of D_X and D_Y, for their one optimiser."""
        return [*self.D_X.parameters(), *self.D_Y.parameters()]


@torch.no_grad()
def init_weights(net: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw convolution weights from N(0, 0.02) and set biases to 0, in place.

    Zhu et al. 2017, appendix 7.1 (0.02 is the standard deviation, as in the authors' code).

    Parameters
    ----------
    net : any module; all its (transposed) convolutions are set, in the order of `net.modules()`.
    generator : a CPU generator; the weights depend on it alone, not on the device or on PyTorch's
        global state. None draws from the global state.
    """
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            # Drawn on the CPU: a generator is bound to its device, and CUDA draws other numbers.
            draw = torch.empty(layer.weight.shape, dtype=torch.float32, device="cpu")
            layer.weight.copy_(draw.normal_(0.0, 0.02, generator=generator))
            if layer.bias is not None:
                layer.bias.zero_()


def unwrap(net: nn.Module) -> nn.Module:
    """Return the net inside DistributedDataParallel and torch.compile wrappers, however nested."""
    for name in ("module", "_orig_mod"):
        inner = getattr(net, name, None)
        if isinstance(inner, nn.Module):
            return unwrap(inner)
    return net


class EMA:
    """Keep an exponential moving average of G and F: steadier nets than the last step's.

    Not in Zhu et al. 2017. The averages `ema.G` and `ema.F` are float32 copies in evaluation mode
    that need no gradient; they have no wrappers, even where the trained nets do. Only parameters
    are averaged: the generators have no buffers.

    Parameters
    ----------
    nets : a `CycleGAN`, or {"G": net, "F": net}; on their final device, wrapped or not.
    decay : share of the old average that a late step keeps, in [0, 1].

    Raises
    ------
    ValueError
        If `decay` lies outside [0, 1] or a net is missing.
    """

    def __init__(self, nets: dict[str, nn.Module] | nn.Module, decay: float = 0.999) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"EMA decay is {decay}; must lie in [0, 1]")
        self.decay = decay
        trained = [_net_named(name, nets) for name in ("G", "F")]
        self.G, self.F = (_frozen_copy(net) for net in trained)
        self._trained = [p for net in trained for p in net.parameters()]
        self._averages: list[Tensor] = [*self.G.parameters(), *self.F.parameters()]

    def update(self, step: int) -> None:
        """Move the averages towards the nets as they are now; call after the optimiser's step.

        Parameters
        ----------
        step : optimiser steps before this one (0 for the first)
        """
        self.move(self.weight(step))

    def weight(self, step: int) -> float:
        """Share of the nets that goes into their averages at a step.

        One minus min(decay, (1 + step) / (10 + step)), so that the first weights are soon
        forgotten.
        """
        return 1.0 - min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def move(self, weight: float | Tensor) -> None:
        """Let the averages be `weight` of the nets and the rest of themselves.

        Parameters
        ----------
        weight : a number, or a scalar tensor on the nets' device (a recorded update reads it there)
        """
        nets = [p.float() for p in self._trained]
        # Few fused calls for all tensors: a loop would start some hundred small kernels a step.
        if isinstance(weight, Tensor):
            way = torch._foreach_sub(nets, self._averages)
            torch._foreach_mul_(way, weight)
            torch._foreach_add_(self._averages, way)
        else:
            torch._foreach_lerp_(self._averages, nets, weight)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return {"G": ..., "F": ...}, each the state of a net, with unwrapped names."""
        return {"G": self.G.state_dict(), "F": self.F.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Set both averages from `state_dict()`'s result; the trained nets stay as they are."""
        self.G.load_state_dict(state["G"])
        self.F.load_state_dict(state["F"])


def _net_named(name: str, nets: dict[str, nn.Module] | nn.Module) -> nn.Module:
    """Return the unwrapped net of that name."""
    net = nets.get(name) if isinstance(nets, dict) else getattr(unwrap(nets), name, None)
    if not isinstance(net, nn.Module):
        raise ValueError(f"EMA needs nets G and F; {name} is missing from {type(nets).__name__}")
    return unwrap(net)


def _frozen_copy(net: nn.Module) -> nn.Module:
    """Copy a net to average into: float32, evaluation mode, no gradients."""
    return copy.deepcopy(net).float().eval().requires_grad_(False)
