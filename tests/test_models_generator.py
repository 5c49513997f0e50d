"""Tests of models/generator.py."""
import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from models.cyclegan import init_weights
from models.generator import UPSAMPLING, InstanceNorm, R, ResnetGenerator, default_blocks, u


def small_generator(upsample: str = "transpose") -> nn.Module:
    net = ResnetGenerator(features=4, blocks=2, upsample=upsample)
    init_weights(net, torch.Generator().manual_seed(1))
    return net


def random_slices(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("upsample", UPSAMPLING)
@pytest.mark.parametrize("blocks, parameters", [(6, 7_825_153), (9, 11_365_633)])
def test_the_generator_has_the_papers_number_of_parameters(blocks, parameters, upsample):
    net = ResnetGenerator(features=64, blocks=blocks, upsample=upsample)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_the_layers_are_those_of_the_appendix_in_order():
    net = ResnetGenerator(features=64, blocks=6)
    convs = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    widths = [conv.out_channels for conv in convs]
    assert widths == [64, 128, 256] + 6 * [256, 256] + [128, 64, 1]
    assert [conv.kernel_size[0] for conv in convs] == [7] + 16 * [3] + [7]
    assert [conv.stride[0] for conv in convs] == [1, 2, 2] + 12 * [1] + [2, 2, 1]
    padding = [conv.padding_mode for conv in convs]
    halvings = doublings = ["zeros", "zeros"]
    assert padding == ["reflect"] + halvings + 12 * ["reflect"] + doublings + ["reflect"]
    assert sum(isinstance(m, InstanceNorm) for m in net.modules()) == 17  # all but the last
    assert all(conv.bias is not None for conv in convs)


@pytest.mark.parametrize("size, blocks", [(64, 6), (128, 6), (132, 9), (256, 9)])
def test_six_blocks_up_to_128_pixels_and_nine_above(size, blocks):
    assert default_blocks(size) == blocks


@pytest.mark.parametrize("upsample", UPSAMPLING)
@pytest.mark.parametrize("height, width", [(8, 8), (32, 48), (36, 20)])
def test_the_output_has_the_inputs_shape_and_lies_between_minus_one_and_one(
        height, width, upsample):
    out = small_generator(upsample)(random_slices(2, 1, height, width))
    assert out.shape == (2, 1, height, width)
    assert out.abs().max() <= 1


def test_the_blur_is_the_binomial_filter_with_the_edge_repeated():
    up = u(3, 5, "blur")
    convolution, blur, norm = up[0], up[1], up[2:]
    features = random_slices(2, 3, 8, 12)
    rough = convolution(features)
    row = torch.tensor([0.25, 0.5, 0.25])
    weight = (row[:, None] * row).expand(5, 1, 3, 3)
    smooth = nnf.conv2d(nnf.pad(rough, (1, 1, 1, 1), mode="replicate"), weight, groups=5)
    torch.testing.assert_close(blur(rough), smooth)
    torch.testing.assert_close(up(features), norm(smooth))


@pytest.mark.parametrize("upsample, found", [("blur", False), ("nearest", False),
                                             ("transpose", True)])
def test_flat_features_come_out_with_a_checkerboard_from_the_transposed_convolution_alone(
        upsample, found):
    flat = torch.full((1, 3, 16, 16), 0.7)
    with torch.no_grad():
        inner = u(3, 4, upsample)[:-2](flat)[..., 4:-4, 4:-4]
    size = inner.shape[-1]
    spectrum = torch.fft.fft2(inner - inner.mean((2, 3), keepdim=True)).abs() / size ** 2
    finest = torch.cat([spectrum[..., size // 2, :].flatten(), spectrum[..., size // 2].flatten()])
    assert (float(finest.max()) > 0.01) == found and (found or float(finest.max()) < 1e-6)


@pytest.mark.parametrize("height, width", [(30, 32), (32, 34), (4, 32), (32, 4)])
def test_sides_the_net_cannot_halve_twice_are_refused_with_both_values(height, width):
    with pytest.raises(ValueError, match=f"{height} x {width}.*divisible by 4"):
        small_generator()(random_slices(1, 1, height, width))


def test_wrong_ranks_and_channels_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\)"):
        small_generator()(random_slices(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\(32, 32\)"):
        small_generator()(random_slices(32, 32))


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="bicubic.*blur, transpose, nearest"):
        ResnetGenerator(upsample="bicubic")
    with pytest.raises(ValueError, match="blocks"):
        ResnetGenerator(blocks=0)
    with pytest.raises(ValueError, match="features"):
        ResnetGenerator(features=0)


def test_a_residual_block_whose_convolutions_are_zero_changes_nothing():
    block = R(3)
    for p in block.parameters():
        nn.init.zeros_(p)
    features = torch.randn(1, 3, 8, 8)
    assert torch.equal(block(features), features)


def test_background_is_kept_exactly_and_nothing_else_becomes_background():
    kept = ResnetGenerator(features=4, blocks=2, keep_background=True)
    init_weights(kept, torch.Generator().manual_seed(1))
    plain = small_generator()
    slices = random_slices(2, 1, 32, 32)
    slices[:, :, :, :9] = -1
    slices[0, 0, 20, 20] = -1
    torch.testing.assert_close(kept(slices)[slices > -1], plain(slices)[slices > -1])
    assert bool((kept(slices)[slices == -1] == -1).all()) and plain(slices)[0, 0, 5, 4] > -0.9
    with torch.no_grad():
        kept.to_slice.bias -= 100  # as dark as tanh can be
    found = kept(slices)
    assert torch.equal(found == -1, slices == -1)
    assert torch.equal(kept(found) == -1, slices == -1)  # on the way back, too
    assert kept(slices * float("nan")).isnan().all()


def test_no_gradient_comes_from_background_that_is_kept():
    net = ResnetGenerator(features=4, blocks=1, keep_background=True)
    slices = random_slices(1, 1, 16, 16)
    slices[..., 8:] = -1
    (net(slices) * (slices == -1)).sum().backward()
    assert all(float(p.grad.abs().sum()) == 0 for p in net.parameters())
    net(slices).sum().backward()
    assert float(net.to_slice.weight.grad.abs().sum()) > 0


def test_slices_of_a_batch_do_not_influence_each_other():
    net, slices = small_generator(), random_slices(3, 1, 16, 16)
    together = net(slices)
    alone = torch.cat([net(one[None]) for one in slices])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_training_and_evaluation_mode_translate_alike():
    net, slices = small_generator(), random_slices(1, 1, 16, 16)
    assert torch.equal(net.train()(slices), net.eval()(slices))


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-4), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("features_layout", LAYOUTS)
@pytest.mark.parametrize("gradient_layout", LAYOUTS)
def test_instance_norm_is_exact_for_large_means_in_every_dtype_and_layout(
        dtype, error, batch, features_layout, gradient_layout):
    # Mean 100, deviation 0.5: in bfloat16 the mean alone may be off by half a deviation. nnf's
    # instance_norm fails here for bfloat16, and for batch 1 with a channels_last gradient.
    draw = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    features = (100 + 0.5 * draw).to(dtype).contiguous(memory_format=features_layout)
    gradient = (draw + draw.flip(3)).to(dtype).contiguous(memory_format=gradient_layout)
    exact = features.double().contiguous().requires_grad_()
    wanted = nnf.instance_norm(exact)
    wanted.backward(gradient.double().contiguous())
    found = InstanceNorm()(features.requires_grad_())
    found.backward(gradient)
    assert found.dtype == dtype
    assert (found.double() - wanted).abs().max() < error
    assert relative_error(features.grad, exact.grad) < error


def test_instance_norm_keeps_float32_statistics_under_bfloat16_autocast():
    # nnf's instance_norm is off by about 0.1 here.
    draw = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    features = (100 + 0.5 * draw).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = InstanceNorm()(features)
    wanted = nnf.instance_norm(features.double())
    assert found.dtype == torch.bfloat16
    assert (found - wanted).abs().max() < 0.01


@pytest.mark.parametrize("upsample", UPSAMPLING)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_agree_with_a_float64_copy(batch, layout, upsample):
    net = small_generator(upsample)
    exact = copy.deepcopy(net).double()
    slices, target = random_slices(batch, 1, 32, 32), random_slices(batch, 1, 32, 32, seed=1)
    net = net.to(memory_format=layout)
    (net(slices.contiguous(memory_format=layout)) - target).square().mean().backward()
    (exact(slices.double()) - target.double()).square().mean().backward()
    for found, wanted in zip(net.parameters(), exact.parameters()):
        if found.ndim == 4:
            assert relative_error(found.grad, wanted.grad) < 1e-4
    # Biases before a norm have no effect: their gradient is rounding noise around 0.
    biases = [p.grad.abs().max() for p in net.parameters() if p.ndim == 1]
    assert max(biases[:-1]) < 1e-6 < biases[-1]


def test_bfloat16_autocast_gives_float32_slices_near_the_exact_ones_and_usable_gradients():
    net = small_generator()
    exact = copy.deepcopy(net).double()
    slices, target = random_slices(1, 1, 32, 32), random_slices(1, 1, 32, 32, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(slices)
    wanted = exact(slices.double())
    assert out.dtype == torch.float32
    assert (out - wanted).abs().mean() < 0.02
    (out - target).square().mean().backward()
    (wanted - target.double()).square().mean().backward()
    found = torch.cat([p.grad.flatten() for p in net.parameters()]).double()
    right = torch.cat([p.grad.flatten() for p in exact.parameters()])
    assert nnf.cosine_similarity(found, right, dim=0) > 0.95


def test_the_generator_compiles_to_one_graph():
    # "aot_eager" traces forward and backward as the default backend does, without its C++ compiler.
    net, slices = small_generator(), random_slices(1, 1, 16, 16)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(slices), net(slices))
    compiled(slices).mean().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_instance_norm_is_exact_for_large_means_on_cuda(dtype, layout):
    draw = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    features = (100 + 0.5 * draw).to(dtype).cuda().contiguous(memory_format=layout)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        found = InstanceNorm()(features)
    wanted = nnf.instance_norm(features.double().contiguous())
    assert found.dtype == dtype
    assert (found.double() - wanted).abs().max() < 0.01
