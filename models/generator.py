"""The ResNet generator, for G: X -> Y and F: Y -> X alike (Zhu et al. 2017, appendix 7.2).

The building blocks carry the paper's letters: `c7s1`, `d`, `R`, `u`. Owns the instance norm that
the discriminator uses too. Weight initialisation is in `models/cyclegan.py`.
"""
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from models import one_channel

UPSAMPLING = ("blur", "transpose", "nearest")
DARKEST = -1 + 1e-3  # of a translated brain, where the background is kept at exactly -1


def default_blocks(size: int) -> int:
    """Choose the number of residual blocks for slices of `size` pixels a side.

    Zhu et al. 2017, sec. 4 and appendix 7.2: 6 for 128 x 128, 9 for 256 x 256 and higher. The paper
    leaves open what lies between; here anything above 128 gets 9.
    """
    return 9 if size > 128 else 6


class InstanceNorm(nn.Module):
    """Normalise each channel of each image by its own mean and variance, in float32 or wider.

    No affine parameters, no running statistics: training and evaluation compute the same.
    Statistics are never taken in half precision. Autocast alone doesn't see to that: it has no rule
    for `instance_norm`, and in bfloat16 a mean near 100 is only known to 0.25.

    Written as group norm with one group a channel, which is the same function. Two reasons against
    `nnf.instance_norm`: its CPU backward is wrong for batch 1 when the incoming gradient is
    channels_last (torch 2.14.1; relative error 1.4, no warning), and on a CPU core it takes about
    twice as long.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, features: Tensor) -> Tensor:
        """Return `features` (N, C, H, W) with mean 0 and variance 1 over each H x W, same dtype."""
        dtype, channels = features.dtype, features.shape[1]
        wide = torch.promote_types(dtype, torch.float32)
        one = zero = None
        if torch.compiler.is_compiling() and features.device.type != "cpu":
            # Spelled out, the compiler joins it with what stands before and after.
            values = features.to(wide)
            variance, mean = torch.var_mean(values, (2, 3), correction=0, keepdim=True)
            return ((values - mean) * torch.rsqrt(variance + self.eps)).to(dtype)
        if features.device.type == "cpu":
            # The CPU kernel for channels_last loses the variance of channels with a large mean
            # (float32, mean 100, deviation 0.5: results off by 0.06).
            features = features.contiguous()
            # Wide weights make the CPU kernel keep wide statistics of half-precision features: as
            # good as a cast there and back, and 8 % of a bfloat16 generator step faster.
            one = features.new_ones(channels, dtype=wide)
            zero = features.new_zeros(channels, dtype=wide)
        else:
            features = features.to(wide)
        return nnf.group_norm(features, channels, one, zero, self.eps).to(dtype)


class OneChannelConv(nn.Conv2d):
    """k x k convolution of stride 1 with one channel in or out, reflection padded.

    `nn.Conv2d` everywhere but in mixed precision on CUDA, where `models/one_channel.py` does the
    same as a matrix product (a quarter more slices a second, H100, batch 16).
    """

    def __init__(self, channels: int, k: int, side: int) -> None:
        super().__init__(channels, k, side, padding=side // 2, padding_mode="reflect")
        self.edge = side // 2

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, k, H, W)."""
        half = (torch.get_autocast_dtype("cuda") if features.is_cuda
                and torch.is_autocast_enabled("cuda") else torch.float32)
        if half == torch.float32 or not torch.compiler.is_compiling():
            return super().forward(features)
        padded = nnf.pad(features.to(half), (self.edge,) * 4, mode="reflect")
        convolve = one_channel.from_one if self.in_channels == 1 else one_channel.to_one
        return convolve(padded, self.weight, self.bias)


def c7s1(channels: int, k: int) -> nn.Sequential:
    """Build c7s1-k: 7x7 convolution of stride 1, reflection padded, norm, ReLU."""
    return nn.Sequential(OneChannelConv(channels, k, 7), InstanceNorm(), nn.ReLU(inplace=True))


def d(channels: int, k: int) -> nn.Sequential:
    """Build dk: 3x3 convolution of stride 2 (zero padded, as in the authors' code), norm, ReLU."""
    conv = nn.Conv2d(channels, k, 3, stride=2, padding=1)
    return nn.Sequential(conv, InstanceNorm(), nn.ReLU(inplace=True))


class R(nn.Module):
    """Rk: two reflection-padded 3x3 convolutions with norms, and a skip; no ReLU after the sum."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(k, k, 3, padding=1, padding_mode="reflect"), InstanceNorm(),
            nn.ReLU(inplace=True),
            nn.Conv2d(k, k, 3, padding=1, padding_mode="reflect"), InstanceNorm())

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, k, H, W) to the same shape."""
        return features + self.body(features)


class Blur(nn.Module):
    """Binomial filter, [1 2 1] / 4 each way: nothing of 2 pixels' period passes. No weights."""

    def forward(self, features: Tensor) -> Tensor:
        """Blur each channel of (N, C, H, W), the edge repeated; same shape and dtype."""
        k = features.shape[1]
        # Made here, of kernels alone: nets are built without memory, and recorded as CUDA graphs.
        row = 0.5 - (torch.arange(3, device=features.device) - 1).abs().to(features.dtype) / 4
        weight = (row[:, None] * row).expand(k, 1, 3, 3)
        # As a convolution: on CPU cores average pooling in bfloat16 takes several times as long.
        return nnf.conv2d(nnf.pad(features, (1, 1, 1, 1), mode="replicate"), weight, groups=k)


def u(channels: int, k: int, upsample: str) -> nn.Sequential:
    """Build uk: double height and width, norm, ReLU.

    "transpose" is the paper's fractionally strided 3x3 convolution, whose outputs get one, two or
    four of its weights in turns: a checkerboard (Odena et al. 2016). "blur" is that and a binomial
    filter, which takes it away. "nearest" repeats pixels, then convolves. All have as many
    parameters.
    """
    widen: list[nn.Module]
    if upsample == "nearest":
        widen = [nn.Upsample(scale_factor=2, mode="nearest"),
                 nn.Conv2d(channels, k, 3, padding=1, padding_mode="reflect")]
    else:
        widen = [nn.ConvTranspose2d(channels, k, 3, stride=2, padding=1, output_padding=1)]
    if upsample == "blur":
        widen.append(Blur())
    return nn.Sequential(*widen, InstanceNorm(), nn.ReLU(inplace=True))


class ResnetGenerator(nn.Module):
    """Translate slices: c7s1-64, d128, d256, R256 x blocks, u128, u64, c7s1-1 (appendix 7.2).

    Differs from the paper in one place: slices have one channel, not three. As in the authors' code
    the last c7s1 has no norm and tanh instead of ReLU, and every convolution keeps its bias.

    Parameters
    ----------
    features : channels after the first layer; 64 in the paper.
    blocks : number of residual blocks, see `default_blocks`.
    upsample : "blur", "transpose" (the paper) or "nearest", see `u`.
    keep_background : give background (exactly -1) where the input has it, and nowhere else. Not in
        the paper; the nets then need not learn where a head ends (benchmarks/RECIPES.md).

    Raises
    ------
    ValueError
        If `upsample` is none of these, or `features` or `blocks` is below 1.
    """

    def __init__(self, features: int = 64, blocks: int = 6, upsample: str = "transpose",
                 keep_background: bool = False) -> None:
        super().__init__()
        if upsample not in UPSAMPLING:
            raise ValueError(f"upsample is {upsample!r}; choose one of {', '.join(UPSAMPLING)}")
        if features < 1 or blocks < 1:
            raise ValueError(f"features ({features}) and blocks ({blocks}) must be at least 1")
        k = features
        self.keep_background = keep_background
        self.encode = nn.Sequential(c7s1(1, k), d(k, 2 * k), d(2 * k, 4 * k))
        self.transform = nn.Sequential(*(R(4 * k) for _ in range(blocks)))
        self.decode = nn.Sequential(u(4 * k, 2 * k, upsample), u(2 * k, k, upsample))
        self.to_slice = OneChannelConv(k, 1, 7)

    def forward(self, slices: Tensor) -> Tensor:
        """Translate a batch of slices.

        Parameters
        ----------
        slices : (N, 1, H, W) in [-1, 1]; H and W divisible by 4 and at least 8.

        Returns
        -------
        translated : (N, 1, H, W) in [-1, 1]; float32 also under autocast.

        Raises
        ------
        ValueError
            If the shape is not one the net can take.
        """
        check_slices(slices)
        features = self.decode(self.transform(self.encode(slices)))
        # tanh in float32: near the background (-1) half precision has too few levels left.
        out = self.to_slice(features)
        out = torch.tanh(out.to(torch.promote_types(out.dtype, torch.float32)))
        if self.keep_background:
            out = torch.where(slices <= -1, -1.0, out.clamp(min=DARKEST))
        return out


def check_slices(slices: Tensor) -> None:
    """Raise ValueError unless `slices` is (N, 1, H, W) with sides divisible by 4 and at least 8."""
    if slices.ndim != 4 or slices.shape[1] != 1:
        raise ValueError(f"slices have shape {tuple(slices.shape)}; need (N, 1, H, W)")
    height, width = slices.shape[2:]
    # 8: two halvings leave 2 x 2, the least that reflection padding by 1 can take.
    if height % 4 or width % 4 or min(height, width) < 8:
        raise ValueError(f"slices are {height} x {width} (height x width); the generator needs "
                         "both divisible by 4 and at least 8: crop or pad them")
