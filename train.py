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
import json
import logging
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import console
import health
from config import TrainConfig, parse_args, plain
from data.atomic import write_atomically
from data.contrast import intensity_quantiles, training_figures
from data.histogram import STANDARDISED, Standard, StandardRows, find_standard
from data.slices import UnpairedBatches, training_sessions
from data.store import SliceStore
from device import Process, first_speaks, peak_memory_gib, start_process
from models import checkpoint
from models.generator import default_blocks
from report import progress
from run_folder import (RunLog, best_name, find_resume, only_writer, preprocessing_record,
                        put_aside)
from step import NETS, train_step
from training import Training
from validation import check_masks, look, sample_grid, validate

log = logging.getLogger("train")


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
    except (RuntimeError, MemoryError) as error:  # torch's of a GPU, of a CPU, and numpy's
        text = str(error)
        if isinstance(error, RuntimeError) and not (
                isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text):
            raise
        print(f"error: no memory left ({text.splitlines()[0] if text else 'MemoryError'}); take a "
              "smaller --batch-size, --features or --history-size", file=sys.stderr)
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
    state, last = find_resume(config, args, record)
    check_masks(store)
    seen = training_sessions(store, config.strict_unpaired)
    standard, targets = find_histograms(config, store, state, seen)
    if standard:
        record["standard"] = standard.standard.record()
    if targets:
        record["standard_targets"] = targets.standard.record()
    loader = UnpairedBatches(store, batch_size=config.batch_size, seed=config.seed,
                             steps_per_epoch=config.steps_per_epoch, rank=process.rank,
                             world=process.world, strict=config.strict_unpaired,
                             balanced=config.balance, standard=standard, targets=targets)
    quantiles = intensity_quantiles(store, sessions=seen,
                                    standard=standard.standard if standard else None)
    t = Training(config, process, loader.steps_per_epoch, record, quantiles, standard)
    t.where = functools.partial(name_slices, store, loader)
    if state:
        t.load(state)
    check_place(t)
    if process.is_main:  # all have read it by now
        put_aside(run, last)
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
            try:
                write_gifs(run)
            except (ValueError, FileNotFoundError) as error:  # pictures of a training that is done
                log.warning("warning: no progress_*.gif: %s", error)
        log.info("done: %s", run / "best.pt")
        return console.DONE


def check_place(t: Training) -> None:
    """Refuse processes that begin at different steps (collective)."""
    mine = torch.tensor([t.step, t.epoch, t.epoch_step], dtype=torch.float64,
                        device=t.process.device)
    if t.process.any(not torch.equal(t.process.mean(mine), mine))[0]:
        raise ValueError(f"{t.config.run}: processes found different checkpoints there, one of "
                         f"them that of step {t.step}; --run has to be a folder that all machines "
                         "share")


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


def find_histograms(config: TrainConfig, store: SliceStore, state: dict[str, Any] | None,
                    seen: Mapping[str, Sequence[dict[str, Any]]],
                    ) -> tuple[StandardRows | None, StandardRows | None]:
    """What histograms the nets are shown slices with, and targets that differ: known on resume.

    `seen` are the sessions that slices of each contrast are drawn from.
    """
    inputs = STANDARDISED[config.standardise]
    targets = [c for c in STANDARDISED[config.standardise_targets] if c not in inputs]
    known: dict[str, np.ndarray] = {}
    record = state["preprocessing"] if state else {}
    for name in ("standard", "standard_targets"):
        before = Standard.of_record({"standard": record.get(name)})
        known |= before.wanted if before else {}
    missing = [c for c in (*inputs, *targets) if c not in known]
    wanted = known | find_standard(store, missing, seen).wanted

    def standard(contrasts: Sequence[str]) -> StandardRows | None:
        found = {c: wanted[c] for c in contrasts if c in wanted}
        return StandardRows(store, Standard(found)) if contrasts else None

    return standard(inputs), standard(targets)


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
        figures = validate(t, store, lambda: stop.asked)
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
