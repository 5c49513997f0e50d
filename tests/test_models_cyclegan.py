"""Tests of models/cyclegan.py."""
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from losses.adversarial import generator_loss
from losses.consistency import cycle_loss
from models.cyclegan import EMA, CycleGAN, init_weights, unwrap
from models.discriminator import PatchDiscriminator
from models.generator import UPSAMPLING, ResnetGenerator


@pytest.fixture
def nets() -> CycleGAN:
    nets = CycleGAN(features=2, blocks=1)
    init_weights(nets, torch.Generator().manual_seed(0))
    return nets


@pytest.fixture
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def change(net: nn.Module, by: float) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(by)


def test_the_four_nets_are_those_of_the_paper_and_share_nothing():
    nets = CycleGAN(features=4, blocks=3, upsample="nearest")
    assert isinstance(nets.G, ResnetGenerator) and isinstance(nets.F, ResnetGenerator)
    assert isinstance(nets.D_X, PatchDiscriminator) and isinstance(nets.D_Y, PatchDiscriminator)
    assert len(nets.G.transform) == 3
    assert any(isinstance(m, nn.Upsample) for m in nets.F.modules())
    ids = [id(p) for p in nets.parameters()]
    assert len(ids) == len(set(ids))


def test_the_two_optimisers_share_out_all_parameters(nets):
    generators, discriminators = nets.generators(), nets.discriminators()
    assert {id(p) for p in generators + discriminators} == {id(p) for p in nets.parameters()}
    assert not {id(p) for p in generators} & {id(p) for p in discriminators}
    assert {id(p) for p in nets.D_Y.parameters()} <= {id(p) for p in discriminators}


@pytest.mark.parametrize("upsample", UPSAMPLING)
def test_weights_are_drawn_from_a_normal_of_deviation_0_02_and_biases_are_zero(upsample):
    nets = CycleGAN(features=16, blocks=2, upsample=upsample)
    init_weights(nets, torch.Generator().manual_seed(0))
    for p in nets.parameters():
        if p.ndim == 1:
            assert (p == 0).all()
        elif p.numel() > 5000:
            assert abs(p.mean()) < 1e-3
            assert 0.018 < p.std() < 0.022


def test_weights_depend_on_the_given_generator_alone():
    def drawn(global_seed: int, seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        nets = CycleGAN(features=2, blocks=1)
        init_weights(nets, torch.Generator().manual_seed(seed))
        return weights(nets)

    assert torch.equal(drawn(1, seed=5), drawn(2, seed=5))
    assert not torch.equal(drawn(1, seed=5), drawn(1, seed=6))


def test_initialising_with_a_generator_leaves_the_global_random_state_alone(nets):
    before = torch.get_rng_state()
    init_weights(nets, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_the_global_random_state_decides(nets):
    torch.manual_seed(3)
    init_weights(nets)
    first = weights(nets)
    torch.manual_seed(3)
    init_weights(nets)
    assert torch.equal(weights(nets), first)


def test_gradients_reach_both_generators_but_not_frozen_discriminators(nets):
    for p in nets.discriminators():
        p.requires_grad_(False)
    real_x = torch.rand(1, 1, 32, 32) * 2 - 1
    fake_y = nets.G(real_x)
    loss = generator_loss(nets.D_Y(fake_y)) + cycle_loss(real_x, nets.F(fake_y))
    loss.backward()
    for net in (nets.G, nets.F):
        assert all(p.grad.abs().sum() > 0 for p in net.parameters() if p.ndim == 4)
    assert all(p.grad is None for p in nets.discriminators())


def test_the_average_follows_the_hand_computed_one_through_the_warm_up(nets):
    ema = EMA(nets, decay=0.5)
    wanted_g, wanted_f = weights(nets.G).double(), weights(nets.F).double()
    for step in range(15):
        change(nets.G, 0.1 * (step + 1))
        change(nets.F, -0.2)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))  # 0.1, 2/11, ... and 0.5 from step 8 on
        wanted_g = decay * wanted_g + (1 - decay) * weights(nets.G)
        wanted_f = decay * wanted_f + (1 - decay) * weights(nets.F)
    torch.testing.assert_close(weights(ema.G).double(), wanted_g, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(weights(ema.F).double(), wanted_f, atol=1e-6, rtol=1e-6)


def test_late_steps_use_the_full_decay(nets):
    ema = EMA(nets, decay=0.999)
    before = weights(ema.G)
    change(nets.G, 1.0)
    ema.update(step=10 ** 6)
    torch.testing.assert_close(weights(ema.G), before + 0.001, atol=1e-7, rtol=0)


def test_the_averages_are_frozen_float32_copies_of_their_own(nets):
    nets.G.bfloat16()
    nets.train()
    ema = EMA(nets)
    for net in (ema.G, ema.F):
        assert not net.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in net.parameters())
    before = weights(ema.F)
    change(nets.F, 1.0)
    assert torch.equal(weights(ema.F), before)
    ema.update(0)
    assert nets.training and all(p.requires_grad for p in nets.parameters())
    assert nets.G.to_slice.weight.dtype == torch.bfloat16


def test_the_copies_leave_gradients_behind(nets):
    nets.G(torch.rand(1, 1, 16, 16)).mean().backward()
    assert all(p.grad is None for p in EMA(nets).G.parameters())


def test_the_average_goes_on_from_its_saved_state(nets, tmp_path):
    ema = EMA(nets, decay=0.9)
    change(nets, 0.3)
    ema.update(0)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    resumed = EMA(nets, decay=0.9)
    assert not torch.equal(weights(resumed.G), weights(ema.G))
    resumed.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    change(nets, 0.3)
    ema.update(1)
    resumed.update(1)
    assert torch.equal(weights(resumed.G), weights(ema.G))
    assert torch.equal(weights(resumed.F), weights(ema.F))


def test_the_average_may_be_given_nets_by_name_and_keeps_plain_names(nets):
    compiled = torch.compile(nets.F, backend="eager")
    ema = EMA({"G": nets.G, "F": compiled})
    assert ema.state_dict()["F"].keys() == nets.F.state_dict().keys()
    change(nets.F, 1.0)
    ema.update(0)
    # The first update keeps a tenth of the old weights.
    torch.testing.assert_close(weights(ema.F), weights(nets.F) - 0.1)


def test_the_average_follows_nets_inside_ddp_and_compile(nets, one_process_group):
    plain = nets.G
    nets.G = torch.compile(DistributedDataParallel(plain), backend="eager")
    ema = EMA(nets)
    assert type(ema.G) is ResnetGenerator
    assert ema.state_dict()["G"].keys() == plain.state_dict().keys()
    change(plain, 1.0)
    ema.update(0)
    torch.testing.assert_close(weights(ema.G), weights(plain) - 0.1)


def test_unwrap_finds_the_net_inside_any_wrappers(nets, one_process_group):
    net = nets.G
    ddp = DistributedDataParallel(net)
    compiled = torch.compile(net, backend="eager")
    for wrapped in (net, ddp, compiled, torch.compile(ddp, backend="eager"),
                    DistributedDataParallel(compiled)):
        assert unwrap(wrapped) is net


def test_the_average_refuses_missing_nets_and_impossible_decays(nets):
    with pytest.raises(ValueError, match="F is missing"):
        EMA({"G": nets.G})
    with pytest.raises(ValueError, match="G is missing from ResnetGenerator"):
        EMA(nets.G)
    with pytest.raises(ValueError, match="1.5"):
        EMA(nets, decay=1.5)
