"""Tests of models/discriminator.py."""
import pytest
import torch
from torch import nn

from models.cyclegan import init_weights
from models.discriminator import PatchDiscriminator
from models.generator import InstanceNorm


def without_norms(net: nn.Module) -> nn.Module:
    """Replace the norms, whose statistics see the whole slice, by nothing."""
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, InstanceNorm):
                setattr(module, name, nn.Identity())
    return net


def test_the_discriminator_has_the_papers_number_of_parameters():
    assert sum(p.numel() for p in PatchDiscriminator(64).parameters()) == 2_762_689


def test_the_layers_are_those_of_the_appendix_in_order():
    net = PatchDiscriminator(64)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [64, 128, 256, 512, 1]
    assert [conv.stride[0] for conv in convs] == [2, 2, 2, 1, 1]
    assert {conv.kernel_size for conv in convs} == {(4, 4)}
    assert all(conv.bias is not None for conv in convs)
    assert not any(isinstance(m, InstanceNorm) for m in net.patches[0].modules())
    assert sum(isinstance(m, InstanceNorm) for m in net.modules()) == 3
    assert {m.negative_slope for m in net.modules() if isinstance(m, nn.LeakyReLU)} == {0.2}


def test_one_score_depends_on_exactly_70_by_70_pixels():
    # Without norms and in float64 with positive weights no influence can cancel or underflow.
    net = without_norms(PatchDiscriminator(4)).double()
    for p in net.parameters():
        nn.init.constant_(p, 0.1)
    slices = torch.ones(1, 1, 160, 160, dtype=torch.float64, requires_grad=True)
    net(slices)[0, 0, 9, 9].backward()
    touched = slices.grad[0, 0] != 0
    rows, columns = touched.any(1).nonzero(), touched.any(0).nonzero()
    assert touched.sum() == 70 * 70
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == 70


def test_with_its_norms_a_score_depends_mostly_on_its_70_by_70_pixels():
    net = PatchDiscriminator(8)
    init_weights(net, torch.Generator().manual_seed(0))
    slices = torch.rand(1, 1, 160, 160, generator=torch.Generator().manual_seed(1))
    slices.requires_grad_()
    net(slices)[0, 0, 9, 9].backward()
    bare = torch.ones(1, 1, 160, 160, requires_grad=True)
    without_norms(net)(bare)[0, 0, 9, 9].backward()
    inside = bare.grad != 0
    energy = slices.grad.square()
    assert energy[inside].sum() / energy.sum() > 0.9
    assert energy[~inside].sum() > 0


@pytest.mark.parametrize("height, width, rows, columns", [
    (128, 128, 14, 14), (256, 256, 30, 30), (70, 70, 6, 6), (24, 24, 1, 1), (31, 40, 1, 3)])
def test_the_map_of_scores_has_the_documented_size(height, width, rows, columns):
    scores = PatchDiscriminator(2)(torch.zeros(2, 1, height, width))
    assert scores.shape == (2, 1, rows, columns)
    assert (rows, columns) == (height // 8 - 2, width // 8 - 2)


@pytest.mark.parametrize("height, width", [(23, 64), (64, 16)])
def test_slices_too_small_for_one_score_are_refused(height, width):
    with pytest.raises(ValueError, match=f"{height} x {width}.*24 x 24"):
        PatchDiscriminator(2)(torch.zeros(1, 1, height, width))


def test_wrong_channels_and_features_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 2, 64, 64\)"):
        PatchDiscriminator(2)(torch.zeros(1, 2, 64, 64))
    with pytest.raises(ValueError, match="features"):
        PatchDiscriminator(0)


def test_scores_are_not_squashed():
    net = PatchDiscriminator(2)
    nn.init.constant_(net.to_score.bias, 7.0)
    nn.init.zeros_(net.to_score.weight)
    assert (net(torch.zeros(1, 1, 32, 32)) == 7).all()


def test_scores_under_bfloat16_autocast_are_near_the_exact_ones():
    net = PatchDiscriminator(8)
    init_weights(net, torch.Generator().manual_seed(0))
    slices = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = net(slices)
    torch.testing.assert_close(scores.float(), net(slices), atol=0.05, rtol=0.05)
