"""Tests of step.py: its update is the one of Zhu et al. 2017, written out a line a term."""

import copy
from dataclasses import replace

import pytest
import torch
from trainings import CONFIG, NO_GPU, alone, draw_slices

from device import Process
from losses.history import ImageHistory
from losses.structure import structure_loss
from step import TERMS, WATCHED, train_step
from training import Training


class Textbook:
    """The update of Zhu et al. 2017 a line a term, every forward on its own, plain Adam."""

    def __init__(self, nets, lambda_identity, history, lr=2e-4, lambda_structure=1.5):
        self.G, self.F, self.D_X, self.D_Y = (copy.deepcopy(net) for net in
                                              (nets.G, nets.F, nets.D_X, nets.D_Y))
        self.generators = [*self.G.parameters(), *self.F.parameters()]
        self.discriminators = [*self.D_X.parameters(), *self.D_Y.parameters()]
        self.adam_g = torch.optim.Adam(self.generators, lr, (0.5, 0.999))
        self.adam_d = torch.optim.Adam(self.discriminators, lr, (0.5, 0.999))
        self.lambda_identity, self.history = lambda_identity, history
        self.lambda_structure = lambda_structure

    def step(self, x, y, aim_x=None, aim_y=None):
        """Returns the terms in the order of `TERMS`; the gradients stay in the parameters.

        `aim_x`, `aim_y`: the slices as D and the cycle see them, where not as they are translated.
        """
        aim_x, aim_y = x if aim_x is None else aim_x, y if aim_y is None else aim_y

        def l1(a, b):
            return (a - b).abs().mean()

        gan_g = ((self.D_Y(self.G(x)) - 1) ** 2).mean()
        gan_f = ((self.D_X(self.F(y)) - 1) ** 2).mean()
        cycle_x, cycle_y = l1(self.F(self.G(x)), aim_x), l1(self.G(self.F(y)), aim_y)
        same_x = same_y = torch.zeros(())
        loss = gan_g + gan_f + 10 * cycle_x + 10 * cycle_y
        if self.lambda_identity:
            same_x, same_y = l1(self.F(aim_x), aim_x), l1(self.G(aim_y), aim_y)
            loss = loss + self.lambda_identity * (same_x + same_y)
        kept_x = kept_y = torch.zeros(())
        if self.lambda_structure:
            kept_x = structure_loss(x, self.G(x))
            kept_y = structure_loss(y, self.F(y))
            loss = loss + self.lambda_structure * (kept_x + kept_y)
        fake_y, fake_x = self.G(x).detach(), self.F(y).detach()
        self._update(self.adam_g, self.generators, loss)

        old_x, old_y = self.history["x"].query(fake_x), self.history["y"].query(fake_y)
        d_x = (((self.D_X(aim_x) - 1) ** 2).mean() + (self.D_X(old_x) ** 2).mean()) / 2
        d_y = (((self.D_Y(aim_y) - 1) ** 2).mean() + (self.D_Y(old_y) ** 2).mean()) / 2
        self._update(self.adam_d, self.discriminators, d_x + d_y)
        return [gan_g, gan_f, cycle_x, cycle_y, same_x, same_y, kept_x, kept_y, d_x, d_y]

    @staticmethod
    def _update(adam, parameters, loss):
        # only this loss and only these parameters: nothing can come from another step
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            p.grad = gradient
        adam.step()


@pytest.mark.parametrize("lambda_identity, lambda_structure",
                         [(0.1, 1.5), (0.1, 0.0), (0.0, 0.0), (5.0, 3.0)])
@pytest.mark.parametrize("n, aimed", [(1, ""), (3, ""), (2, "y"), (1, "xy")])
def test_one_step_is_the_textbooks_step(lambda_identity, lambda_structure, n, aimed):
    t = alone(replace(CONFIG, lambda_identity=lambda_identity, lambda_structure=lambda_structure))
    book = Textbook(t.nets, lambda_identity, {k: ImageHistory(50) for k in "xy"},
                    lambda_structure=lambda_structure)
    real_x, real_y = draw_slices(n)
    aims = [a if name in aimed else None for name, a in zip("xy", draw_slices(n, seed=9))]
    terms = train_step(t, *(real if aim is None else torch.cat([real, aim], 1)
                            for real, aim in zip((real_x, real_y), aims)))[:len(TERMS)]
    wanted = book.step(real_x, real_y, *aims)
    torch.testing.assert_close(terms, torch.stack(wanted).detach(), atol=1e-6, rtol=1e-5)
    for name in ("G", "F", "D_X", "D_Y"):
        ours = dict(getattr(t.nets, name).named_parameters())
        for key, theirs in getattr(book, name).named_parameters():
            torch.testing.assert_close(ours[key].grad, theirs.grad, atol=1e-5, rtol=1e-4)
            # Adam's first step is lr times the gradient's sign: compared where that is no noise
            real = theirs.grad.abs() > 1e-5
            assert (ours[key] - theirs)[real].abs().max() < 1e-5 if real.any() else True
            assert (ours[key] - theirs).abs().max() <= 4.1e-4
    assert all(p.requires_grad for p in t.nets.parameters())  # D is no longer frozen
    assert (t.step, t.epoch_step, t.slices_seen) == (1, 1, n)


def test_steps_with_a_full_history_judge_what_the_history_gives_back():
    t = alone(replace(CONFIG, history_size=2, seed=3))
    seeds = {"x": 2 * 3 * 10007, "y": 2 * 3 * 10007 + 1}
    book = Textbook(t.nets, 0.1, {k: ImageHistory(2, seed) for k, seed in seeds.items()})
    replay, old = {k: ImageHistory(2, seed) for k, seed in seeds.items()}, {"x": 0, "y": 0}
    for step in range(6):
        real_x, real_y = draw_slices(2, seed=step)
        values, wanted = train_step(t, real_x, real_y), book.step(real_x, real_y)
        torch.testing.assert_close(values[:len(TERMS)], torch.stack(wanted).detach(), atol=1e-3,
                                   rtol=1e-3)
        for name, history in replay.items():
            new = torch.full((2, 1, 1, 1), float(step))
            old[name] += int((history.query(new) != new).sum())
    assert old["x"] > 0 and old["y"] > 0  # D_X and D_Y did judge older slices


def test_what_is_watched_is_read_off_the_step():
    t = alone(replace(CONFIG, history_size=0))
    real_x, real_y = draw_slices(3)
    with torch.no_grad():
        fake_y, fake_x = t.nets.G(real_x), t.nets.F(real_y)
        scores = {"D_X": (t.nets.D_X(real_x), t.nets.D_X(fake_x)),
                  "D_Y": (t.nets.D_Y(real_y), t.nets.D_Y(fake_y))}
    values = dict(zip((*TERMS, *WATCHED), train_step(t, real_x, real_y).tolist()))
    for net, (real, fake) in scores.items():
        assert values[f"{net}_right_real"] == pytest.approx((real > 0.5).float().mean().item())
        assert values[f"{net}_right_fake"] == pytest.approx((fake < 0.5).float().mean().item())
    for net in ("G", "F", "D_X", "D_Y"):
        norm = sum(p.grad.square().sum() for p in getattr(t.nets, net).parameters()) ** 0.5
        assert values[f"gradient_{net}"] == pytest.approx(norm.item(), rel=1e-5)
    assert values["skipped"] == 0


def test_one_step_in_bf16_has_the_losses_of_fp32_within_a_hundredth():
    """From the same weights; longer comparisons are chaotic."""
    config = replace(CONFIG, features=16, blocks=2)
    real_x, real_y = draw_slices(4, size=64)
    wanted, found = (train_step(alone(replace(config, precision=precision)), real_x, real_y)
                     for precision in ("fp32", "bf16"))
    torch.testing.assert_close(found[:len(TERMS)], wanted[:len(TERMS)], rtol=0.01, atol=1e-3)
    assert not torch.equal(found, wanted), "bf16 did take part"


def test_neither_optimiser_moves_the_others_nets():
    for silenced, others in (("generators", ("D_X", "D_Y")), ("discriminators", ("G", "F"))):
        t = alone()
        before = copy.deepcopy(t.nets.state_dict())
        t.optimizers[silenced].param_groups[0]["params"] = []
        train_step(t, *draw_slices(1))
        moved = {name.split(".")[0] for name, value in t.nets.state_dict().items()
                 if not torch.equal(value, before[name])}
        assert moved == set(others)


@pytest.mark.cuda
@pytest.mark.skipif(NO_GPU, reason="no CUDA GPU here")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_on_a_gpu_moves_all_nets_and_agrees_with_the_cpus(precision):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    on_gpu = Training(replace(CONFIG, precision=precision), Process(0, 1, torch.device("cuda", 0)),
                      10)
    on_cpu = alone()
    before = copy.deepcopy(on_gpu.nets.state_dict())
    real_x, real_y = draw_slices(2)
    wanted = train_step(on_cpu, real_x, real_y)
    found = train_step(on_gpu, real_x.cuda(), real_y.cuda())
    close = 1e-4 if precision == "fp32" else 0.03
    n = len(TERMS)
    torch.testing.assert_close(found.cpu()[:n], wanted[:n], atol=close, rtol=close)
    assert found.dtype == torch.float32
    for _ in range(10 if precision == "fp16" else 0):  # its first steps find a scale that holds
        train_step(on_gpu, real_x.cuda(), real_y.cuda())
    after = on_gpu.nets.state_dict()
    assert all(v.isfinite().all() and v.dtype == torch.float32 for v in after.values())
    assert {k.split(".")[0] for k, v in after.items() if not torch.equal(v, before[k])} == {
        "G", "F", "D_X", "D_Y"}
    assert on_gpu.scaler.is_enabled() == (precision == "fp16")
