"""Tests of step.py: what makes an update fast changes no numbers beyond rounding."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist

import step
from config import TrainConfig
from device import Process
from models.cyclegan import EMA
from step import NETS, TERMS, Frozen, Recorded, compilation_pays, train_step
from training import Training

CPU, NO_GPU = torch.device("cpu"), not torch.cuda.is_available()
CONFIG = TrainConfig(features=4, blocks=1, precision="fp32", epochs=4, epochs_decay=4,
                     history_size=3, compile="no")


def draw_slices(n, seed=0, size=32):
    return torch.rand(2, n, 1, size, size,
                      generator=torch.Generator().manual_seed(seed)) * 2 - 1


def training(config, device=CPU):
    return Training(config, Process(0, 1, device), 10)


def gradients(t):
    """Each net's gradient as one vector, float64 on the CPU."""
    return {name: torch.cat([p.grad.flatten() for p in getattr(t.nets, name).parameters()])
            .double().cpu() for name in NETS}


def assert_same_gradients(found, wanted, error):
    for name in NETS:
        off = float((found[name] - wanted[name]).norm() / wanted[name].norm())
        assert wanted[name].norm() > 0 and off < error, f"{name}: gradient off by {off:.2g}"


def test_a_frozen_net_passes_gradients_on_and_keeps_none():
    t = training(CONFIG)
    slices = draw_slices(2)[0].requires_grad_()
    scores = Frozen(t.nets.D_X)(t.nets.D_Y, slices)
    plain = t.nets.D_Y(slices)
    torch.testing.assert_close(scores, plain, rtol=0, atol=0)
    passed, = torch.autograd.grad(scores.square().sum(), slices)
    wanted, = torch.autograd.grad(plain.square().sum(), slices)
    torch.testing.assert_close(passed, wanted, rtol=0, atol=0)
    assert all(p.grad is None and p.requires_grad for p in t.nets.D_Y.parameters())


def test_a_frozen_net_is_as_it_is_now_and_not_as_it_was_at_first():
    t = training(CONFIG)
    judge, slices = Frozen(t.nets.D_X), draw_slices(1)[0]
    before = judge(t.nets.D_X, slices)
    with torch.no_grad():
        t.nets.D_X.to_score.bias.add_(1.5)
    torch.testing.assert_close(judge(t.nets.D_X, slices), before + 1.5)


@pytest.mark.parametrize("n", [1, 3])
def test_compiled_nets_have_the_gradients_of_plain_ones_step_after_step(n, monkeypatch):
    # the compiler's own front end, which is where gradients would vanish; no code is generated
    monkeypatch.setattr(step.torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    plain, compiled = training(CONFIG), training(replace(CONFIG, compile="yes"))
    assert compiled.compiled and not plain.compiled
    for k in range(3):
        compiled.load(plain.state())  # or rounding would grow from step to step
        values = [train_step(t, *draw_slices(n, seed=k)) for t in (compiled, plain)]
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
        assert_same_gradients(gradients(compiled), gradients(plain), 1e-4)


def test_compiled_nets_in_a_group_of_processes_have_the_gradients_of_plain_ones(monkeypatch,
                                                                                tmp_path):
    monkeypatch.setattr(step.torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    plain = training(CONFIG)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        compiled = training(replace(CONFIG, compile="yes"))
        assert isinstance(compiled.G, torch.nn.parallel.DistributedDataParallel)
        for k in range(2):
            compiled.load(plain.state())
            values = [train_step(t, *draw_slices(2, seed=k)) for t in (compiled, plain)]
            torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
            assert_same_gradients(gradients(compiled), gradients(plain), 1e-4)
        assert not any("module." in k or "_orig_mod" in k for k in compiled.state()["ema"]["G"])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("config, wanted", [
    (dict(compile="yes", max_steps=1), True), (dict(compile="no", max_steps=10 ** 9), False),
    (dict(max_steps=50_000), False), (dict(max_steps=100_000), True),
    (dict(max_steps=100_000, features=16), False), (dict(max_steps=10_000, batch_size=16), True),
    (dict(max_steps=100_000, epochs=1, epochs_decay=0), False)])
def test_auto_compiles_where_the_planned_steps_repay_it(config, wanted, monkeypatch):
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: name)
    config = replace(CONFIG, **{"compile": "auto", "epochs": 1000, "features": 64, **config})
    assert compilation_pays(config, torch.device("cuda", 0), steps_per_epoch=400) == wanted
    assert compilation_pays(config, CPU, steps_per_epoch=400) == (config.compile == "yes")


def test_auto_does_not_compile_where_the_compiler_is_not_installed(monkeypatch):
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: None)
    config = replace(CONFIG, compile="auto", epochs=10 ** 6)
    assert not compilation_pays(config, torch.device("cuda", 0), steps_per_epoch=400)


def test_averages_move_alike_by_a_number_and_by_a_tensor():
    first, second = training(CONFIG), training(CONFIG)
    for t in (first, second):
        with torch.no_grad():
            for p in t.nets.parameters():
                p.add_(0.1)
    first.ema.move(0.3)
    second.ema.move(torch.tensor(0.3))
    for a, b, new in zip(first.ema.G.parameters(), second.ema.G.parameters(),
                         first.nets.G.parameters()):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, new - 0.07)
    assert EMA(first.nets, 0.999).weight(0) == pytest.approx(0.9)
    assert EMA(first.nets, 0.999).weight(10 ** 6) == pytest.approx(0.001)


def test_a_checkpoint_of_a_recorded_run_is_one_of_any_other(monkeypatch):
    t = training(CONFIG)
    train_step(t, *draw_slices(1))
    t._fit_optimizers(recorded=True)
    groups = [g for o in t.state()["optimizers"].values() for g in o["param_groups"]]
    assert [(type(g["lr"]), g["capturable"]) for g in groups] == [(float, False)] * 2
    resumed = training(CONFIG)
    resumed.load(t.state())
    train_step(resumed, *draw_slices(1))
    assert type(resumed.optimizers["generators"].param_groups[0]["lr"]) is float


def led(config, device=CPU):
    quantiles = {name: np.linspace(-0.9, high, 33, dtype=np.float32)
                 for name, high in (("t1w", 0.9), ("t2w", 0.5))}
    return Training(config, Process(0, 1, device), 10, quantiles=quantiles)


def test_the_first_guess_leads_less_and_less_and_then_no_more():
    t, weights = led(replace(CONFIG, start_pairs=4, lambda_start=8.0)), []
    for k in range(6):
        weights.append(t.start_weight)
        train_step(t, *draw_slices(1, seed=k))
    assert weights == [8.0, 6.0, 4.0, 2.0, 0.0, 0.0]
    assert training(replace(CONFIG, start_pairs=4)).start_weight == 0  # nothing to guess from


def test_led_nets_turn_the_contrast_round():
    config = replace(CONFIG, features=8, lr=2e-3, start_pairs=10 ** 6, lambda_start=50.0)
    t, real_x = led(config), torch.linspace(-0.8, 0.8, 32).expand(1, 1, 32, 32).contiguous()
    for _ in range(40):
        train_step(t, real_x, real_x)
    inner = t.nets.G(real_x)[0, 0, :, 4:-4].mean(0)
    assert np.corrcoef(inner.detach(), real_x[0, 0, 0, 4:-4])[0, 1] < -0.8


# ------------------------------------------------------------------------------------------ CUDA

GPU = torch.device("cuda", 0)


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.cuda
@pytest.mark.skipif(NO_GPU, reason="no CUDA GPU here")
@pytest.mark.parametrize("n", [1, 4])
def test_a_recorded_run_is_an_eager_one(n, exact):
    config = replace(CONFIG, history_size=6)
    eager, recorded = training(replace(config, cuda_graph=False), GPU), training(config, GPU)
    assert isinstance(recorded.update, Recorded) and not isinstance(eager.update, Recorded)
    for k in range(8):
        recorded_before = dict(recorded.update._graphs)
        slices = draw_slices(n, seed=k).cuda()
        values = [train_step(t, *slices) for t in (recorded, eager)]
        torch.testing.assert_close(*values, rtol=1e-3, atol=1e-4)
        assert_same_gradients(gradients(recorded), gradients(eager), 1e-3)
        for p, q in zip(recorded.ema.G.parameters(), eager.ema.G.parameters()):
            if p.ndim > 1:  # biases before a norm: their gradient is rounding, of either sign
                torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
        # from the same weights each time, or rounding would grow; a replay reads them in place
        for t in (recorded, eager):
            with torch.no_grad():
                for p, q in zip(t.nets.parameters(), eager.nets.parameters()):
                    p.copy_(q)
        torch.testing.assert_close(recorded.history["x"].state_dict()["images"],
                                   eager.history["x"].state_dict()["images"], rtol=1e-3, atol=1e-4)
    assert recorded_before and recorded.update._graphs == recorded_before


@pytest.mark.cuda
@pytest.mark.skipif(NO_GPU, reason="no CUDA GPU here")
def test_a_recorded_run_is_led_as_an_eager_one_is(exact):
    config = replace(CONFIG, start_pairs=12)
    eager, recorded = led(replace(config, cuda_graph=False), GPU), led(config, GPU)
    for k in range(8):  # three as they are, three replays with the guess, two without
        slices = draw_slices(2, seed=k).cuda()
        for p, q in zip(recorded.nets.parameters(), eager.nets.parameters()):
            p.data.copy_(q)
        values = [train_step(t, *slices) for t in (recorded, eager)]
        torch.testing.assert_close(*values, rtol=1e-3, atol=1e-4)
        assert_same_gradients(gradients(recorded), gradients(eager), 1e-3)
        assert k < 3 or list(recorded.update._graphs) == [k < 6]


@pytest.mark.cuda
@pytest.mark.skipif(NO_GPU, reason="no CUDA GPU here")
def test_a_recorded_run_follows_its_learning_rate_and_goes_on_from_a_checkpoint(exact):
    t = training(replace(CONFIG, epochs=0, epochs_decay=1), GPU)
    slices, moved = draw_slices(2).cuda(), []
    for _ in range(9):
        before = [p.detach().clone() for p in t.nets.parameters()]
        train_step(t, *slices)
        moved.append(max(float((p - q).abs().max()) for p, q in zip(t.nets.parameters(), before)))
    assert moved[-1] < 0.5 * moved[4]  # nine of ten steps of a decay to 0
    resumed = training(replace(CONFIG, epochs=0, epochs_decay=1), GPU)
    resumed.load(t.state())
    values = [train_step(each, *slices) for each in (t, resumed)]
    torch.testing.assert_close(*values, rtol=1e-3, atol=1e-4)
    assert_same_gradients(gradients(resumed), gradients(t), 1e-3)


@pytest.mark.cuda
@pytest.mark.skipif(NO_GPU, reason="no CUDA GPU here")
@pytest.mark.parametrize("precision, error", [("fp32", 2e-3), ("bf16", 0.35), ("fp16", 0.1)])
def test_a_compiled_and_recorded_update_has_the_gradients_of_the_plain_one(precision, error, exact):
    config = replace(CONFIG, features=16, precision=precision)
    fast = training(replace(config, compile="yes"), GPU)
    wide = training(replace(config, precision="fp32", cuda_graph=False), GPU)
    fast.scaler = torch.amp.GradScaler("cuda", init_scale=128.0, enabled=precision == "fp16")
    for k in range(5):
        for p, q in zip(wide.nets.parameters(), fast.nets.parameters()):
            p.data.copy_(q)
        slices = draw_slices(2, seed=k, size=64).cuda()
        fast.history["x"].load_state_dict(wide.history["x"].state_dict())
        fast.history["y"].load_state_dict(wide.history["y"].state_dict())
        if isinstance(fast.update, Recorded):
            fast.update.forget()
            fast.update._left = 0 if k else step.WARM_UPS
        found, wanted = train_step(fast, *slices), train_step(wide, *slices)
        n = len(TERMS)
        torch.testing.assert_close(found[:n], wanted[:n], atol=0.03, rtol=0.03)
        assert_same_gradients(gradients(fast), gradients(wide), error)
