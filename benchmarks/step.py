"""How many slice pairs a second one update takes in, against the update as textbooks write it.

    python benchmarks/step.py                                   this machine's fastest way
    python benchmarks/step.py --device cuda --batches 1 16 64 --compile yes
    python benchmarks/step.py --parts memory --batches 4        peak memory, in a process of its own

The textbook's update is single precision, eager, one pair at a time, every forward pass on its own;
ours is `train_step` as train.py runs it, with its histories, averages and figures to watch. Equal
nets and losses, random slices that are on the device; both in turns in one process, medians of
the turns. GFLOP are counted (torch's own counter) in the textbook's update, without its optimisers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # where `step` is the training's, and not this script

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.flop_counter import FlopCounterMode

import console
from config import TrainConfig
from device import PRECISIONS, Process, choose_device, choose_precision, peak_memory_gib
from models.cyclegan import init_weights
from step import train_step
from training import Training

# ratios to the textbook's update that are asked for, and GiB
TARGETS = {"cpu": {1: 3.5, 4: 4.8, 16: 5.2}, "cuda": {1: 4.0, 16: 15.0}}
BEST_ON_CUDA, SHARE_OF_PEAK, MOST_GIB = 25.0, 0.4, 4.0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line of this script."""
    p = console.OneLineParser(description=__doc__, formatter_class=console.Formatter)
    p.add_argument("--parts", nargs="+", choices=("speed", "memory"), default=("speed",),
                   help="what to measure")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--batches", type=int, nargs="+", default=(1, 4, 16), help="pairs an update")
    p.add_argument("--features", type=int, default=64, help="of the nets")
    p.add_argument("--blocks", type=int, default=6, help="of the nets")
    p.add_argument("--size", type=int, default=128, help="pixels a side")
    p.add_argument("--precision", choices=PRECISIONS, default="auto", help="of ours")
    p.add_argument("--compile", choices=("yes", "no"), default="no", help="compile ours")
    p.add_argument("--cuda-graph", action=argparse.BooleanOptionalAction, default=True,
                   help="record ours")
    p.add_argument("--repeats", type=int, default=5, help="turns, for the medians")
    p.add_argument("--seconds", type=float, default=1.0, help="least time of a turn on CUDA")
    p.add_argument("--only", action="store_true", help="only take ours a few times, then print "
                                                       "this process's peak memory in GiB")
    args = p.parse_args(argv)
    if min(args.repeats, *args.batches) < 1:
        raise ValueError("--repeats and --batches: at least 1")
    return args


class Textbook:
    """The update of Zhu et al. 2017 a line a term; nothing is made fast."""

    def __init__(self, features: int, blocks: int, device: torch.device):
        def generator() -> nn.Sequential:
            layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(1, features, 7),
                                       nn.InstanceNorm2d(features), nn.ReLU(True)]
            for k in (features, 2 * features):
                layers += [nn.Conv2d(k, 2 * k, 3, 2, 1), nn.InstanceNorm2d(2 * k), nn.ReLU(True)]
            layers += [PlainResidual(4 * features) for _ in range(blocks)]
            for k in (4 * features, 2 * features):
                layers += [nn.ConvTranspose2d(k, k // 2, 3, 2, 1, 1), nn.InstanceNorm2d(k // 2),
                           nn.ReLU(True)]
            return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(features, 1, 7),
                                 nn.Tanh())

        def discriminator() -> nn.Sequential:
            layers: list[nn.Module] = [nn.Conv2d(1, features, 4, 2, 1), nn.LeakyReLU(0.2, True)]
            for k, stride in ((features, 2), (2 * features, 2), (4 * features, 1)):
                layers += [nn.Conv2d(k, 2 * k, 4, stride, 1), nn.InstanceNorm2d(2 * k),
                           nn.LeakyReLU(0.2, True)]
            return nn.Sequential(*layers, nn.Conv2d(8 * features, 1, 4, 1, 1))

        self.G, self.F = generator().to(device), generator().to(device)
        self.D_X, self.D_Y = discriminator().to(device), discriminator().to(device)
        for net in (self.G, self.F, self.D_X, self.D_Y):
            init_weights(net)
        self.generators = [*self.G.parameters(), *self.F.parameters()]
        self.discriminators = [*self.D_X.parameters(), *self.D_Y.parameters()]
        self.adam_g, self.adam_d = (torch.optim.Adam(p, 2e-4, (0.5, 0.999))
                                    for p in (self.generators, self.discriminators))
        self.pools: tuple[list[Tensor], list[Tensor]] = ([], [])

    def exchange(self, pool: list[Tensor], fake: Tensor) -> Tensor:
        """One slice from a history of 50."""
        if len(pool) < 50:
            pool.append(fake)
            return fake
        if random.random() < 0.5:
            return fake
        place = random.randrange(50)
        pool[place], old = fake, pool[place]
        return old

    def __call__(self, real_x: Tensor, real_y: Tensor) -> tuple[float, float]:
        """One update from (1, 1, H, W); returns both losses, so it waits for the device."""
        for p in self.discriminators:
            p.requires_grad_(False)
        self.adam_g.zero_grad()
        fake_y, fake_x = self.G(real_x), self.F(real_y)
        scores_y, scores_x = self.D_Y(fake_y), self.D_X(fake_x)
        loss = nnf.mse_loss(scores_y, torch.ones_like(scores_y))
        loss = loss + nnf.mse_loss(scores_x, torch.ones_like(scores_x))
        loss = loss + 10 * nnf.l1_loss(self.F(fake_y), real_x)
        loss = loss + 10 * nnf.l1_loss(self.G(fake_x), real_y)
        loss = loss + 0.1 * nnf.l1_loss(self.F(real_x), real_x)
        loss = loss + 0.1 * nnf.l1_loss(self.G(real_y), real_y)
        loss.backward()
        self.adam_g.step()
        for p in self.discriminators:
            p.requires_grad_(True)
        self.adam_d.zero_grad()
        total = 0.0
        for net, pool, real, fake in ((self.D_Y, self.pools[0], real_y, fake_y),
                                      (self.D_X, self.pools[1], real_x, fake_x)):
            on_real, on_old = net(real), net(self.exchange(pool, fake.detach()))
            loss_d = 0.5 * (nnf.mse_loss(on_real, torch.ones_like(on_real))
                            + nnf.mse_loss(on_old, torch.zeros_like(on_old)))
            loss_d.backward()
            total += loss_d.item()
        self.adam_d.step()
        return loss.item(), total


class PlainResidual(nn.Module):
    """Two reflection-padded convolutions with norms, and a skip."""

    def __init__(self, k: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(k, k, 3), nn.InstanceNorm2d(k), nn.ReLU(True),
            nn.ReflectionPad2d(1), nn.Conv2d(k, k, 3), nn.InstanceNorm2d(k))

    def forward(self, features: Tensor) -> Tensor:
        """(N, k, H, W) to the same."""
        return features + self.body(features)


def ours(args: argparse.Namespace, batch: int, device: torch.device) -> Training:
    """A training of the house's own, ready to take steps."""
    config = TrainConfig(features=args.features, blocks=args.blocks, batch_size=batch,
                         precision=args.precision, compile=args.compile,
                         cuda_graph=args.cuda_graph, keep_background=False, deform=0.0,
                         start_pairs=0, lambda_structure=0.0)  # equal nets and losses
    torch.backends.cudnn.benchmark = True  # as train.py does
    return Training(config, Process(0, 1, device), 10 ** 6)


def seconds_a_call(call: Callable[[], object], device: torch.device, least_s: float) -> float:
    """Mean over as many calls as fill `least_s` on CUDA; one call on a CPU."""
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    calls = 1
    while True:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        seconds = time.perf_counter() - start
        if device.type == "cpu" or seconds >= least_s:
            return seconds / calls
        calls = max(2 * calls, int(1.2 * calls * least_s / max(seconds, 1e-9)))


def main(argv: list[str] | None = None) -> int:
    """Measure; returns 1 where a target is missed."""
    args = parse_args(argv)
    device = choose_device(args.device)
    if args.only:
        t = ours(args, args.batches[0], device)
        slices = torch.rand(2, args.batches[0], 1, args.size, args.size, device=device) * 2 - 1
        for _ in range(6):
            train_step(t, *slices)
        print(f"{peak_memory_gib(device):.3f}")
        return console.DONE
    missed = False
    found: dict[str, object] = {
        "benchmark": "step", "device": str(device), "torch": torch.__version__,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "threads": torch.get_num_threads(), "features": args.features, "blocks": args.blocks,
        "size": args.size, "compile": args.compile, "cuda_graph": args.cuda_graph,
        "precision": str(choose_precision(args.precision, device)).removeprefix("torch.")}
    if "speed" in args.parts:
        missed |= measure_speed(args, device, found)
    if "memory" in args.parts:
        missed |= measure_memory(args, found)
    print(json.dumps(found))
    return console.FAILED if missed else console.DONE


def measure_speed(args: argparse.Namespace, device: torch.device,
                  found: dict[str, object]) -> bool:
    """Fill in `found` and print a table; returns whether a target is missed."""
    slices = torch.rand(64, 1, 1, args.size, args.size, device=device) * 2 - 1
    plain = Textbook(args.features, args.blocks, device)
    with FlopCounterMode(display=False) as counter:
        plain(slices[0], slices[1])
    gflop = counter.get_total_flops() / 1e9
    turn = itertools.count()
    peak = matrix_product_tflops(device)
    print(f"{found['name'] or 'CPU'}, torch {torch.__version__}: textbook's update {gflop:.0f} "
          f"GFLOP a pair; matrix product of {found['precision']} {peak:.3g} TFLOP/s")
    print("| batch | textbook (pairs/s) | ours (pairs/s) | ours / textbook | TFLOP/s | of the "
          "matrix product | first updates (s) | peak (GiB) |\n" + "|---" * 8 + "|")
    rows, missed = [], False
    for batch in args.batches:
        t = ours(args, batch, device)
        real_x, real_y = torch.rand(2, batch, 1, args.size, args.size, device=device) * 2 - 1

        def step_textbook() -> None:
            k = next(turn)
            plain(slices[k % 64], slices[(7 * k + 3) % 64])

        def step_ours() -> None:
            t.note(train_step(t, real_x, real_y))
            if t.counted % 50 == 0:  # as the loop does when it logs
                t.mean_terms()

        start = time.perf_counter()
        for _ in range(5 if device.type == "cuda" else 2):  # compile, choose kernels, record
            step_ours()
        t.mean_terms()
        first = time.perf_counter() - start
        step_textbook()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        turns = [(seconds_a_call(step_textbook, device, args.seconds),
                  seconds_a_call(step_ours, device, args.seconds)) for _ in range(args.repeats)]
        textbook_s, ours_s = (median(column) for column in zip(*turns))
        ratio = median(batch * a / b for a, b in turns)
        tflops = gflop * batch / ours_s / 1e3
        gib = peak_memory_gib(device)
        print(f"| {batch} | {1 / textbook_s:.4g} | {batch / ours_s:.4g} | {ratio:.2f} | "
              f"{tflops:.4g} | {tflops / peak:.0%} | {first:.0f} | {gib:.2f} |", flush=True)
        rows.append({"batch": batch, "textbook_pairs_per_s": 1 / textbook_s,
                     "pairs_per_s": batch / ours_s, "ratio": ratio, "tflops": tflops,
                     "share_of_matrix_product": tflops / peak, "first_updates_s": first,
                     "peak_gib": gib})
        target = TARGETS[device.type].get(batch)
        if target and ratio < target:
            missed = True
            print(f"missed: {ratio:.2f} at batch {batch}, asked for {target}")
    if device.type == "cuda":
        best = max(rows, key=lambda row: row["ratio"])
        if best["ratio"] < BEST_ON_CUDA or best["share_of_matrix_product"] < SHARE_OF_PEAK:
            missed = True
            print(f"missed: at best {best['ratio']:.1f} times the textbook and "
                  f"{best['share_of_matrix_product']:.0%} of the matrix product, asked for "
                  f"{BEST_ON_CUDA} and {SHARE_OF_PEAK:.0%}")
    found.update(gflop_a_pair=gflop, matrix_product_tflops=peak, batches=rows)
    return missed


def matrix_product_tflops(device: torch.device) -> float:
    """Rate of a large bf16 matrix product here: what the nets could reach at most."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=device).to(torch.bfloat16)
    torch.mm(a, b)
    return 2 * side ** 3 / min(seconds_a_call(lambda: torch.mm(a, b), device, 0.2)
                               for _ in range(5)) / 1e12


def measure_memory(args: argparse.Namespace, found: dict[str, object]) -> bool:
    """Peak memory of a process that takes our steps only; returns whether it is too much."""
    gib = {}
    for batch in args.batches:
        command = [sys.executable, __file__, "--only", "--batches", batch, "--device", args.device,
                   "--features", args.features, "--blocks", args.blocks, "--size", args.size,
                   "--precision", args.precision, "--compile", args.compile]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True,
                              check=True)
        gib[batch] = float(done.stdout)
        print(f"peak memory at batch {batch}: {gib[batch]:.2f} GiB")
    found["peak_gib"] = gib
    return gib.get(4, 0) > MOST_GIB


if __name__ == "__main__":
    sys.exit(console.run(main))
