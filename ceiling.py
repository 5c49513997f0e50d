"""The ceiling: what nets of the same size reach when they may see which slices belong together.

A reference row of `evaluate.py`, never a translator to use: paired regression (L1) by the same G
and F, for as many slice pairs, in the same batches, at the same learning rate with the same decay.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.augment import deform, flip_left_right
from data.histogram import CONTRASTS, Standard, StandardRows
from data.slices import Spans, shown, to_tensor
from data.store import SliceStore
from device import autocast
from losses.consistency import cycle_loss
from models import checkpoint
from models.cyclegan import EMA, init_weights
from models.generator import ResnetGenerator

SAVE_MINUTES = 5.0


def train_ceiling(path: Path, state: dict[str, Any], store: SliceStore, device: torch.device,
                  precision: torch.dtype, *, alone: bool = True) -> dict[str, Any]:
    """Train the paired nets, or go on, or take them as they are if they are done.

    Parameters
    ----------
    path : their checkpoint, of the same format as any; written every few minutes and when stopped
    state : the checkpoint that they are a ceiling for: size of the nets, options, pairs seen
    store : its training split is learnt from, in pairs
    device, precision : as in training
    alone : whether this process may train; several would write over each other's file

    Returns
    -------
    state : as `models.checkpoint.load`

    Raises
    ------
    ValueError : `path` holds something else, the store has too few training slices, or there is
        something left to train and this process is not alone
    """
    paired = Paired(state, store, device, precision)
    if path.exists():
        try:
            found = checkpoint.load(path)
        except ValueError as error:
            raise ValueError(f"{path}: cannot be read ({error}); delete it, it is trained "
                             "anew") from None
        if found.get("paired") != paired.about:
            raise ValueError(f"{path}: is not the ceiling of this checkpoint and store; delete it, "
                             "or choose another --out")
        paired.load(found)
    if paired.step < paired.steps or not path.exists():
        if not alone:
            raise ValueError(f"{path}: is not there or not finished, and is trained by one "
                             "process; run this once without torchrun")
        _train(path, paired)
    return checkpoint.load(path)


def _train(path: Path, paired: Paired) -> None:
    """Take the steps that are left; keep what is learnt when stopped, too."""
    saved_at = time.monotonic()
    bar = tqdm(total=paired.steps, initial=paired.step, unit="step", desc="ceiling", disable=None)
    try:
        while paired.step < paired.steps:
            paired.learn()
            bar.update()
            if time.monotonic() - saved_at > 60 * SAVE_MINUTES:
                checkpoint.save(path, paired.state(), keep_previous=False)
                saved_at = time.monotonic()
    finally:
        bar.close()
        if paired.whole:  # else half a step would be taken twice; the file of before is good
            checkpoint.save(path, paired.state(), keep_previous=False)


class Paired:
    """G and F, each learning to make the other contrast of the same slice.

    Attributes
    ----------
    step, steps : done, and wanted
    about : what it is the ceiling of, in plain types
    whole : no step is half taken: weights, averages and `step` belong together
    """

    def __init__(self, state: dict[str, Any], store: SliceStore, device: torch.device,
                 precision: torch.dtype):
        c = self._config = state["config"]
        self._preprocessing, self._store = state["preprocessing"], store
        self._device = device  # fp16 would need a scaler
        self._precision = torch.float32 if precision == torch.float16 else precision
        self._slices = Spans(store.spans("train"))
        standard = Standard.of_record(self._preprocessing)
        self._standard = StandardRows(store, standard) if standard else None
        self._batch = c["batch_size"]
        if len(self._slices) < self._batch:
            raise ValueError(f"{store.folder}: its train split has {len(self._slices)} slices, the "
                             f"ceiling needs {self._batch} a step")
        self._nets = torch.nn.ModuleDict({
            name: ResnetGenerator(c["features"], c["blocks"], c["upsample"],
                                  c.get("keep_background", False)) for name in "GF"})
        init_weights(self._nets, torch.Generator().manual_seed(c["seed"]))
        self._nets.to(device)
        self._ema = EMA({name: self._nets[name] for name in "GF"}, c["ema"])
        self._adam = torch.optim.Adam(self._nets.parameters(), c["lr"], tuple(c["betas"]))
        self._draws = torch.Generator()  # of augmentation, seeded anew in each step
        self.whole = True
        self.step, self.steps = 0, -(-state["slices_seen"] // self._batch)
        self.about = {"slices_seen": self.steps * self._batch, "ckpt_step": state["step"],
                      "subjects": sorted(s["rows_sha256"] for s in store.subjects
                                         if s["split"] == "train"),
                      **{key: c[key] for key in ("features", "blocks", "upsample", "batch_size",
                                                 "lr", "betas", "ema", "flip", "seed", "epochs",
                                                 "epochs_decay")},
                      "deform": c.get("deform", 0.0),
                      "keep_background": c.get("keep_background", False),
                      # not there in the ceilings of before there was this option
                      **({"balance": True} if c.get("balance", False) else {}),
                      **({"standard": standard.record()} if standard else {})}

    def learn(self) -> Tensor:
        """One step on a batch of pairs; returns the loss."""
        c = self._config
        real_x, real_y = self._batch_of(self.step)
        for group in self._adam.param_groups:
            group["lr"] = c["lr"] * self._share_of_rate()
        self._adam.zero_grad(set_to_none=True)
        with autocast(self._device, self._precision):
            fake_y, fake_x = self._nets["G"](real_x), self._nets["F"](real_y)
        loss = cycle_loss(real_y, fake_y) + cycle_loss(real_x, fake_x)  # both are mean L1
        loss.backward()
        self.whole = False
        self._adam.step()
        self._ema.update(self.step)
        self.step += 1
        self.whole = True
        return loss.detach()

    def _share_of_rate(self) -> float:
        """Constant, then linear to 0, in the proportion of the checkpoint's epochs."""
        c = self._config
        epochs = (1 - self.step / self.steps) * (c["epochs"] + c["epochs_decay"])  # left
        return min(1.0, epochs / c["epochs_decay"]) if c["epochs_decay"] else 1.0

    def _batch_of(self, step: int) -> tuple[Tensor, Tensor]:
        turn, place = divmod(step, len(self._slices) // self._batch)
        draws = np.random.default_rng([self._config["seed"], turn])
        places = draws.permutation(len(self._slices))[place * self._batch:(place + 1) * self._batch]
        rows = np.sort(self._slices.balanced_rows(places, draws.random())
                       if self._config.get("balance", False) else self._slices.rows(places))
        pair = torch.cat([shown(to_tensor(a[rows]), rows, contrast, self._standard)
                          for a, contrast in zip((self._store.t1w, self._store.t2w), CONTRASTS)],
                         dim=1)
        words = np.random.SeedSequence([self._config["seed"], step])
        self._draws.manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1))
        if self._config["flip"]:
            pair = flip_left_right(pair, self._draws)  # both alike
        if self._config.get("deform", 0):
            pair = deform(pair, self._draws, self._config["deform"])
        return pair[:, :1].to(self._device), pair[:, 1:].to(self._device)

    def state(self) -> dict[str, Any]:
        """For `models.checkpoint.save`."""
        return {"config": self._config, "preprocessing": self._preprocessing, "step": self.step,
                "epoch": 0, "slices_seen": self.step * self._batch, "paired": self.about,
                "ema": self._ema.state_dict(), "best": {},
                "generators": {name: self._nets[name].state_dict() for name in "GF"},
                "optimizers": {"generators": self._adam.state_dict()}}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for name in "GF":
            self._nets[name].load_state_dict(state["generators"][name])
        self._adam.load_state_dict(state["optimizers"]["generators"])
        self._ema.load_state_dict(state["ema"])
        self.step = state["step"]
