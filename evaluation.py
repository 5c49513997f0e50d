"""What an evaluation consists of: its methods, references, features, lesions, and the measuring."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ceiling import train_ceiling
from data.histogram import Standard, StandardRows
from data.slices import paired_slices, paired_subjects
from data.store import SliceStore, read_skipped
from data.tissues import find_lesions, find_tissues, lesion_slices, tissue_slices
from device import Process, autocast, choose_precision
from measuring import (CEILING, DIRECTIONS, MODEL, TABLE, Method, RealLesions, Record, Translate,
                       copy_input, in_batches, measure_session, person)
from models import checkpoint
from models.baseline import LookUpTable
from models.features import load_features

BINS = 64  # of the histograms


@dataclass(frozen=True)
class Measured:
    """What was found on one session.

    Attributes
    ----------
    records : as `measuring.measure_session`
    counts : direction to (2, bins): intensities in the brain, real and translated by the first
    features : direction to (2, n, D) real and translated by the first, {} without weights
    lesions : as `measuring.measure_session`
    """

    records: list[Record]
    counts: dict[str, np.ndarray]
    features: dict[str, Tensor]
    lesions: list[Record]


class Evaluation:
    """Everything that translates, on this process's device.

    Parameters
    ----------
    args : the command line
    states : the checkpoints
    store : whose slices are measured
    process : this one among those of torchrun
    sessions : that will be measured
    """

    def __init__(self, args: argparse.Namespace, states: Sequence[dict[str, Any]],
                 store: SliceStore, process: Process, sessions: Sequence[dict[str, Any]]):
        self.args, self.states, self.store, self.process = args, states, store, process
        self.precision = choose_precision(args.precision, process.device)
        self.notes: list[str] = []
        if args.bids and (left_out := read_skipped(store.folder)):
            self.notes.append(f"{len(left_out)} sessions left out by preprocess.py, see "
                              f"{store.folder / 'skipped.tsv'}")
        self.notes += acquaintances(sessions, states)
        args.out.mkdir(parents=True, exist_ok=True)
        self.methods = [self._translators(MODEL, state, str(path))
                        for path, state in zip(args.ckpt, states)]
        self.features = load_features(args.features, process.device) if args.features else None
        self.tissues = find_tissues(args.tissues or (), sessions)
        if args.tissues and len(self.tissues) < len(sessions):
            self.notes.append(f"contrast order measured on {len(self.tissues)} of {len(sessions)} "
                              "sessions; of the others there are no maps of tissues in --tissues")
        self.lesions = find_lesions(args.lesions or (), sessions)
        if args.lesions and len(self.lesions) < len(sessions):
            self.notes.append(f"lesions measured on {len(self.lesions)} of {len(sessions)} "
                              "sessions; of the others there are no masks in --lesions")
        self.methods += [copy_input(), *self._references()]  # last: it may train for hours

    def _translators(self, kind: str, state: dict[str, Any], ckpt: str = "") -> Method:
        device = self.process.device
        with checkpoint.said_of(ckpt or "the ceiling's checkpoint"):
            nets = checkpoint.load_generators(state, device)
            standard = Standard.of_record(state["preprocessing"])

        def translator(net: torch.nn.Module) -> Translate:
            def translate(real: Tensor) -> Tensor:
                with torch.no_grad(), autocast(device, self.precision):
                    return net(real.to(device)).float()
            return translate

        return Method(kind, {d: translator(net) for d, net in zip(DIRECTIONS, nets)}, ckpt,
                      StandardRows(self.store, standard) if standard else None)

    def _references(self) -> list[Method]:
        """What is fitted on the training split: the look-up table and, if wanted, the ceiling."""
        training = self._training_store()
        if training is None:
            if self.args.ceiling:
                raise ValueError(f"--ceiling: needs training slices like the checkpoint's, "
                                 f"{self.args.slices} has none; name their store with --slices")
            self.notes.append("look-up table not measured: no training slices like the "
                              f"checkpoint's in {self.args.slices}")
            return []
        found = [fit_look_up_table(training)]
        if self.args.ceiling:
            path = self.args.out / "ceiling.pt"
            state = train_ceiling(path, self.states[0], training, self.process.device,
                                  self.precision, alone=self.process.world == 1)
            found.append(self._translators(CEILING, state))
        return found

    def _training_store(self) -> SliceStore | None:
        """The store with the training split, if it is there and made like the checkpoint's."""
        store = self.store
        if self.args.bids:
            try:
                store = SliceStore(self.args.slices)
            except (ValueError, FileNotFoundError):
                return None
        trained = self.states[0]["preprocessing"]
        alike = all(trained[name] == store.header[name] for name in ("size", "spacing_mm",
                                                                     "intensity"))
        return store if alike and len(store.rows("train")) else None

    def shown_otherwise(self, ckpts: Sequence[str]) -> set[str]:
        """Checkpoints whose nets are shown other histograms than the first's; a note says so."""
        first, *_ = standards = [state["preprocessing"].get("standard") for state in self.states]
        found = {name for name, standard in zip(ckpts, standards) if standard != first}
        if found:
            self.notes.append("cycle error not compared: the checkpoints' nets are shown different "
                              "histograms (--standardise), and it is measured in these")
        return found

    def measure(self, sessions: Sequence[dict[str, Any]]) -> list[Measured]:
        """Measure sessions, shared out among the processes; all of them on rank 0, in order."""
        rank, world = self.process.rank, self.process.world
        mine = [(i, session) for i, session in enumerate(sessions) if i % world == rank]
        bar = tqdm(mine, unit="session", desc="evaluate",
                   disable=None if self.process.is_main else True)
        parts = self.process.gather([(i, self._measure(session)) for i, session in bar])
        return [found for _, found in sorted((pair for part in parts for pair in part),
                                             key=lambda pair: pair[0])]

    def _measure(self, session: dict[str, Any]) -> Measured:
        device, batch_size = self.process.device, self.args.batch_size
        known = self.tissues.get(session["id"])
        tissues = (torch.from_numpy(tissue_slices(self.store, session, *known, str(device)))
                   if known else None)
        records, translated, lesions = measure_session(
            self.store, session, self.methods, device, batch_size, tissues,
            self._real_lesions(session))
        counts, features = {}, {}
        for direction, (_, real, fake, mask) in self.beside(session, translated).items():
            counts[direction] = np.stack([np.histogram(v[mask].numpy(), BINS, (0, 1))[0]
                                          for v in (real, fake)])
            if self.features:
                features[direction] = torch.stack([
                    torch.cat([self.features(v[i:i + batch_size].to(device)).cpu()
                               for i in range(0, len(v), batch_size)]) for v in (real, fake)])
        return Measured(records, counts, features, lesions)

    def _real_lesions(self, session: dict[str, Any]) -> RealLesions | None:
        """A session's lesions: from --lesions, else by rule; None where --lesions has none."""
        if not self.args.lesions:
            return RealLesions(self.store, session)
        known = self.lesions.get(session["id"])
        return RealLesions(self.store, session, lesion_slices(
            self.store, session, *known, str(self.process.device))) if known else None

    def beside(self, session: dict[str, Any],
               translated: Mapping[str, Tensor] | None = None) -> dict[str, tuple[Tensor, ...]]:
        """Direction to source, target, the first checkpoint's translation ([0, 1]), and mask."""
        parts = list(paired_slices(self.store, session, self.args.batch_size))
        real_x, real_y, mask = (torch.cat(column) for column in zip(*parts))
        rows, method = session["first_row"] + np.arange(session["n_slices"]), self.methods[0]
        found = {}
        for direction, (source, target) in zip(DIRECTIONS, ((real_x, real_y), (real_y, real_x))):
            fake = (translated[direction] if translated else
                    in_batches(method.translate[direction], method.shown(source, rows, direction),
                               self.args.batch_size))
            found[direction] = (*((v + 1) / 2 for v in (source, target, fake)), mask)
        return found


def fit_look_up_table(store: SliceStore) -> Method:
    """The best that a pixel's intensity alone can tell, from the training split's pairs."""
    tables = {direction: LookUpTable() for direction in DIRECTIONS}
    for session in paired_subjects(store, "train"):
        for real_x, real_y, mask in paired_slices(store, session, 64):
            for direction, (source, target) in zip(DIRECTIONS, ((real_x, real_y),
                                                                (real_y, real_x))):
                tables[direction].update(source, target, mask)
    return Method(TABLE, tables)


# ------------------------------------------------------------------------------------ results


def acquaintances(sessions: Sequence[dict[str, Any]],
                  states: Sequence[dict[str, Any]]) -> list[str]:
    """A line for whom the checkpoints were trained on, and for whom they were chosen by."""
    # last.pt, which has its optimisers, is of the end, whatever anybody's figures were then
    chosen = [state for state in states
              if "t2w_ssim" in state["best"] and "optimizers" not in state]
    said = []
    for split, of, what in (
            ("train", states, "were trained on"),
            ("val", chosen, "chose which epoch became best.pt")):
        people = {person(i) for state in of for i in state["preprocessing"]["subjects"][split]}
        if count := sum(person(s["id"]) in people for s in sessions):
            much = "far" if split == "train" else "a little"
            said.append(f"{count} of {len(sessions)} sessions {what}, so their figures are {much} "
                        "too good; those of new subjects are --split test")
    return said
