"""PSNR, SSIM and MAE of translated slices against their references, batched, on the slices' device.

For validation and evaluation only: they need paired slices, which training must never see. Images
are (N, 1, H, W) float, by convention in [0, 1] (`data_range=1`), and nothing is clipped. Each
measure gives one float32 number a slice. Three protocols (`measure`):

    brain  pixels of the brain mask only: the honest one
    slice  the whole stored slice, where background makes every number look better
    box    each slice cropped to its brain's box and resized to 128 x 128

Sums are taken in float64: SSIM's variances, E[x^2] - E[x]^2, cancel to noise in float32. A NaN
anywhere in a slice makes that slice's `brain` and `slice` numbers NaN.
"""
import torch
from torch import Tensor
from torch.nn import functional as nnf

# Wang et al. 2004, as scikit-image has it with gaussian_weights=True, sigma=1.5 and
# use_sample_covariance=False: the Gaussian is cut at 3.5 sigma, so 11 taps.
SIGMA, RADIUS = 1.5, 5
K1, K2 = 0.01, 0.03


def psnr_db(image: Tensor, reference: Tensor, mask: Tensor | None = None,
            data_range: float = 1.0) -> Tensor:
    """Compute the peak signal-to-noise ratio, 10 log10(data_range^2 / mean squared error).

    Parameters
    ----------
    image, reference : (N, 1, H, W), the same float dtype.
    mask : (N, 1, H, W) bool; the error is averaged where it is True, without it everywhere.
    data_range : largest minus smallest possible intensity; never taken from the images.

    Returns
    -------
    psnr_db : (N,) float32, dB; inf where image and reference are equal, so cap it before averaging.

    Raises
    ------
    ValueError
        If shapes or dtypes differ, `mask` is empty in a row, or `data_range` is not positive.
    """
    _check(image, reference, mask, data_range)
    mean_squared_error = _mean((image.double() - reference.double()).square(), mask)
    return (10 * torch.log10(data_range ** 2 / mean_squared_error)).float()


def mae(image: Tensor, reference: Tensor, mask: Tensor | None = None,
        data_range: float = 1.0) -> Tensor:
    """Compute the mean absolute error as a share of `data_range`.

    Parameters and errors are those of `psnr_db`. Returns (N,) float32, 0 for equal images.
    """
    _check(image, reference, mask, data_range)
    return (_mean((image.double() - reference.double()).abs(), mask) / data_range).float()


def correlation(image: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """(N,) Pearson correlation of two stacks (N, 1, H, W) inside the mask; 0 for a constant."""
    count = mask.sum((1, 2, 3), keepdim=True)
    a, b = ((v - (v * mask).sum((1, 2, 3), keepdim=True) / count) * mask
            for v in (image, reference))
    norm = (a.square().sum((1, 2, 3)) * b.square().sum((1, 2, 3))).sqrt()
    return (a * b).sum((1, 2, 3)) / norm.clamp(min=1e-12)


def ssim_map(image: Tensor, reference: Tensor, data_range: float = 1.0) -> Tensor:
    """Compute the structural similarity around each pixel (Wang et al. 2004).

    Gaussian window of sigma 1.5 and 11 taps, population covariance, edges mirrored with the edge
    pixel repeated: equal to scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, full=True)` to 1e-5.

    Parameters
    ----------
    image, reference : (N, 1, H, W), the same float dtype, H and W at least 11.
    data_range : largest minus smallest possible intensity.

    Returns
    -------
    similarity : (N, 1, H, W) float32 in [-1, 1].

    Raises
    ------
    ValueError
        If shapes or dtypes differ, a side is below 11 pixels, or `data_range` is not positive.
    """
    _check(image, reference, None, data_range)
    return _ssim_map(image.double(), reference.double(), data_range).float()


def ssim(image: Tensor, reference: Tensor, mask: Tensor | None = None,
         data_range: float = 1.0) -> Tensor:
    """Average `ssim_map` over a slice.

    Without a mask the mean leaves out a border of 5 pixels, as scikit-image does; with a mask it
    is the mean of the full map over the mask's pixels. Parameters and errors are those of
    `psnr_db`, and sides below 11 pixels are a ValueError. Returns (N,) float32 in [-1, 1].
    """
    _check(image, reference, mask, data_range)
    similarity = _ssim_map(image.double(), reference.double(), data_range)
    if mask is None:
        similarity = similarity[..., RADIUS:-RADIUS, RADIUS:-RADIUS]
    return _mean(similarity, mask).float()


def crop_to_box(images: Tensor, mask: Tensor, size: int = 128) -> Tensor:
    """Crop each slice to its mask's bounding box and resize that to `size` x `size`.

    The box is the row's own, the same for all its channels; so put images that are to be compared
    side by side: `crop_to_box(torch.cat([image, reference], dim=1), mask).split(1, dim=1)`. The
    resize is bilinear with antialiasing and does not keep the aspect ratio.

    Parameters
    ----------
    images : (N, C, H, W), float.
    mask : (N, 1, H, W) bool, True somewhere in each row.
    size : side of the result in pixels.

    Returns
    -------
    boxes : (N, C, size, size) float32.

    Raises
    ------
    ValueError
        If the mask does not fit the images, or is empty in a row (says which).
    """
    _check_mask(mask, (len(images), 1, *images.shape[2:]))
    rows, columns = _first_and_last(mask.any(dim=3)), _first_and_last(mask.any(dim=2))
    boxes = torch.stack([*rows, *columns], dim=1).tolist()  # one wait for the device, not N
    resized = torch.empty(len(images), images.shape[1], size, size, device=images.device)
    for row, (top, bottom, left, right) in enumerate(boxes):
        crop = images[row, None, :, top:bottom + 1, left:right + 1].float()
        resized[row] = nnf.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
    return resized


def measure(image: Tensor, reference: Tensor, mask: Tensor,
            data_range: float = 1.0) -> dict[str, dict[str, Tensor]]:
    """Compute all measures under all three protocols.

    Parameters
    ----------
    image, reference : (N, 1, H, W) in [0, 1], the same float dtype, H and W at least 11.
    mask : (N, 1, H, W) bool, the brain; True somewhere in each row.
    data_range : largest minus smallest possible intensity.

    Returns
    -------
    measures : {"brain" | "slice" | "box": {"ssim" | "psnr_db" | "mae": (N,) float32}}.

    Raises
    ------
    ValueError
        As `psnr_db` and `ssim`.
    """
    _check(image, reference, mask, data_range)
    boxed = crop_to_box(torch.cat([image, reference], dim=1), mask)
    protocols = {"brain": (image, reference, mask), "slice": (image, reference, None),
                 "box": (boxed[:, :1], boxed[:, 1:], None)}
    return {protocol: {"ssim": ssim(*given, data_range), "psnr_db": psnr_db(*given, data_range),
                       "mae": mae(*given, data_range)} for protocol, given in protocols.items()}


def _ssim_map(x: Tensor, y: Tensor, data_range: float) -> Tensor:
    """Compute the map of `ssim_map` from checked float64 images, in float64."""
    height, width = x.shape[2:]
    if min(height, width) < 2 * RADIUS + 1:
        raise ValueError(f"images are {height} x {width}; SSIM's window needs at least "
                         f"{2 * RADIUS + 1} x {2 * RADIUS + 1}")
    down, across = _smoothing_matrix(height, x.device), _smoothing_matrix(width, x.device)
    means = down @ torch.stack([x, y, x * x, y * y, x * y]) @ across.T  # (5, N, 1, H, W)
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = means
    var_x, var_y = mean_xx - mean_x.square(), mean_yy - mean_y.square()
    covariance = mean_xy - mean_x * mean_y
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return luminance * (2 * covariance + c2) / (var_x + var_y + c2)


def _smoothing_matrix(length: int, device: torch.device) -> Tensor:
    """Return (length, length) float64 weights: row i averages a Gaussian window around pixel i.

    Mirrored edges are folded in (scipy's mode "reflect": d c b a | a b c d), so that no padded
    copies are needed.
    """
    offsets = torch.arange(-RADIUS, RADIUS + 1, device=device)
    weights = torch.exp(-0.5 * (offsets.double() / SIGMA).square())
    source = torch.arange(length, device=device)[:, None] + offsets  # (length, 11)
    source = torch.where(source < 0, -1 - source, source)
    source = torch.where(source >= length, 2 * length - 1 - source, source)
    matrix = torch.zeros(length, length, dtype=torch.float64, device=device)
    return matrix.scatter_add_(1, source, (weights / weights.sum()).expand(length, -1))


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Average (N, 1, H, W) values over each row's mask, or over all its pixels: (N,)."""
    if mask is None:
        return values.mean(dim=(1, 2, 3))
    # Times the mask, not picked by it: a NaN outside the mask is a fault too and stays visible.
    return (values * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))


def _first_and_last(present: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and last True position along the last axis of (N, 1, L): two of (N,)."""
    marks = present[:, 0].int()
    return marks.argmax(dim=1), marks.shape[1] - 1 - marks.flip(1).argmax(dim=1)


def _check(image: Tensor, reference: Tensor, mask: Tensor | None, data_range: float) -> None:
    """Raise ValueError unless all arguments fit together."""
    if image.shape != reference.shape or image.dtype != reference.dtype:
        raise ValueError(f"image is {tuple(image.shape)} {image.dtype}, "
                         f"reference is {tuple(reference.shape)} {reference.dtype}")
    if image.ndim != 4 or image.shape[1] != 1 or not image.is_floating_point():
        raise ValueError(f"images are {tuple(image.shape)} {image.dtype}; need (N, 1, H, W) float")
    if not data_range > 0:
        raise ValueError(f"data_range is {data_range}; must be above 0")
    if mask is not None:
        _check_mask(mask, tuple(image.shape))


def _check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the mask has that shape, is bool, and marks something in each row."""
    if tuple(mask.shape) != shape or mask.dtype != torch.bool:
        raise ValueError(f"mask is {tuple(mask.shape)} {mask.dtype}; need {shape} torch.bool")
    empty = (~mask.flatten(1).any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"mask is empty in row{'s' * (len(empty) > 1)} "
                         f"{', '.join(map(str, empty))} of {len(mask)}")
