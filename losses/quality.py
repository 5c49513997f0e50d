"""How near translated slices come to their references, batched, on the slices' device.

PSNR, SSIM, MAE (`measure` has them under all protocols), and beside them correlation, multi-scale
SSIM, gradient similarity, the distance between histograms and traces of upsampling. Cycle error is
`mae` of the cycled slice against the real one. Whole volumes are `losses/volume_quality.py`'s.

For validation and evaluation only: they need paired slices, which training must never see. Images
are (N, 1, H, W) float, by convention in [0, 1] (`data_range=1`), and nothing is clipped. Each
measure gives one float32 number a slice. Three protocols (`measure`):

    brain  pixels of the brain mask only: the honest one
    slice  the whole stored slice, where background makes every number look better
    box    each slice cropped to its brain's box and resized to 128 x 128

Sums are taken in float64: SSIM's variances, E[x^2] - E[x]^2, cancel to noise in float32. A NaN
anywhere in a slice makes that slice's `brain` and `slice` numbers NaN.
"""
import itertools

import torch
from torch import Tensor
from torch.nn import functional as nnf

# Wang et al. 2004, as scikit-image has it with gaussian_weights=True, sigma=1.5 and
# use_sample_covariance=False: the Gaussian is cut at 3.5 sigma, so 11 taps.
SIGMA, RADIUS = 1.5, 5
WINDOW = 2 * RADIUS + 1
K1, K2 = 0.01, 0.03
# Wang et al. 2003: the weights of the scales, finest first.
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# Xue et al. 2014 take 170 for intensities up to 255; the constant goes with their square.
GRADIENT_CONSTANT = 170 / 255 ** 2
# Nets that double the side twice leave patterns of 2 and 4 pixels.
LONGEST_PERIOD = 4
PEAK, NEAR, FAR = 1, 3, 5  # bins from such a frequency: its peak, and what lies around it
CHECKERBOARD_SIDE = LONGEST_PERIOD * (PEAK + FAR + 1)  # pixels, so that neighbours are no peaks
FAINT = 1e-12  # power of a bin (of intensities up to 1) below which there is nothing to compare


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


def correlation(image: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute Pearson's correlation (normalised cross-correlation) of two stacks of slices.

    Parameters and errors are those of `psnr_db`. Returns (N,) float32 in [-1, 1]: 1 where one is
    the other brighter or with more contrast, below 0 for an inverted contrast, 0 for a constant.
    """
    _check(image, reference, mask)
    a, b = (v - _mean(v, mask)[:, None, None, None] for v in (image.double(), reference.double()))
    norm = (_mean(a.square(), mask) * _mean(b.square(), mask)).sqrt()
    return (_mean(a * b, mask) / norm.clamp(min=1e-12)).float()


def intensity_distance(image: Tensor, reference: Tensor, mask: Tensor | None = None,
                       data_range: float = 1.0) -> Tensor:
    """Compute the Wasserstein-1 distance between two slices' intensities, wherever they lie.

    That is how far, on average, intensities have to be moved to make one histogram the other:
    scipy's `wasserstein_distance` of the pixels themselves, with no bins to choose. A whole
    subject's histogram is one slice to it: `slices.reshape(1, 1, -1, W)`.

    Parameters and errors are those of `psnr_db`. Returns (N,) float32 as a share of `data_range`.
    """
    _check(image, reference, mask, data_range)
    inside = (torch.ones_like(image, dtype=torch.bool) if mask is None else mask).flatten(1)
    count = inside.sum(dim=1, keepdim=True)
    # Pixels outside sort behind all others, whatever their number in each row.
    x, y = (v.flatten(1).where(inside, torch.inf).sort(dim=1).values.double()
            for v in (image, reference))
    is_ranked = torch.arange(x.shape[1], device=x.device) < count
    distance = ((x - y).abs().where(is_ranked, 0).sum(dim=1) / count[:, 0] / data_range).float()
    has_nan = (image.isnan() | reference.isnan()).flatten(1).any(dim=1)  # else lost in the sort
    return distance.where(~has_nan, torch.nan)


def gradient_similarity(image: Tensor, reference: Tensor, mask: Tensor | None = None,
                        data_range: float = 1.0) -> Tensor:
    """Compute the mean similarity of gradient magnitudes (Xue et al. 2014, eqs. 3 to 5).

    Prewitt's gradients, edge pixels repeated. The paper halves its photographs first, for how far
    a viewer sits from them; slices of 1 to 2 mm pixels stay as they are here. With a mask, both
    images are 0 outside it, as stored slices are, so the background of a translation has no say.

    Parameters and errors are those of `psnr_db`. Returns (N,) float32 in [0, 1]: 1 where edges are
    equally steep everywhere (their direction and sign do not count).
    """
    _check(image, reference, mask, data_range)
    x, y = (_squared_gradient(_inside(v, mask)) for v in (image, reference))
    constant = GRADIENT_CONSTANT * data_range ** 2
    return _mean((2 * (x * y).sqrt() + constant) / (x + y + constant), mask).float()


def checkerboard(image: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compare the traces that upsampling leaves in a slice with those in the real one.

    Transposed convolutions that double the side twice leave patterns of 2 and 4 pixels (Odena et
    al. 2016): peaks of the power spectrum P, of the image inside its mask, where both frequencies
    are multiples of a quarter of the sampling frequency, other than (0, 0). What is imaged has no
    reason for a peak just there. With (u, v) the 15 of them,

        C = sqrt(mean over (u, v) of (mean P within 1 bin of (u, v) / mean P 3 to 5 bins away))

    and the figure is C of the image over C of the reference. Brightness and contrast cancel, and so
    does nearly all of a smooth gain. A blur weakens a pattern of 2 pixels more than one of 4, and
    removes both from about a pixel of sigma; an image without a pattern stays at 1.

    Parameters
    ----------
    image, reference : (N, 1, H, W), the same float dtype, H and W at least 28.
    mask : (N, 1, H, W) bool; both are 0 outside it, without it they are taken as they are.

    Returns
    -------
    ratio : (N,) float32 above 0: 1 where there is as little of a pattern as in the real slice, up
        to about 4 for a strong one. Real T1w against T2w of the same head: 0.98 to 1.04 as the mean
        of a head, 0.1 SD over its slices.

    Raises
    ------
    ValueError
        As `psnr_db`, and if a side is below 28 pixels.
    """
    _check(image, reference, mask)
    if min(image.shape[2:]) < CHECKERBOARD_SIDE:
        raise ValueError(f"images are {' x '.join(map(str, image.shape[2:]))}; patterns of "
                         f"{LONGEST_PERIOD} pixels need at least {CHECKERBOARD_SIDE} a side")
    x, y = (_peaks_of_upsampling(_inside(v, mask)) for v in (image, reference))
    return (x / y).sqrt().float()


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
    return _mean(_inner(similarity) if mask is None else similarity, mask).float()


def multiscale_ssim(image: Tensor, reference: Tensor, mask: Tensor | None = None,
                    data_range: float = 1.0) -> Tensor:
    """Compute multi-scale SSIM (Wang, Simoncelli and Bovik 2003, eq. 7 with their weights).

    Contrast and structure are compared at each scale, brightness at the coarsest; a scale is the
    one before averaged over 2 x 2 pixels. Their five scales need sides of 176 pixels. Smaller
    slices take as many as keep a window of 11 pixels (`scale_count`: 4 from 88 pixels, so at 128)
    and weights scaled to sum to 1: figures of slices with another number of scales do not compare.
    A scale where contrast and structure are on average opposite counts as 0, and so does the whole.

    With a mask, both images are 0 outside it, as stored slices are (a coarse window reaches far
    beyond the brain), and coarse pixels count by their share of the mask.

    Parameters and errors are those of `ssim`. Returns (N,) float32 in [0, 1].
    """
    _check(image, reference, mask, data_range)
    x, y = _inside(image, mask), _inside(reference, mask)
    share = None if mask is None else mask.double()
    n_scales = scale_count(*x.shape[2:])
    weights = torch.tensor(SCALE_WEIGHTS[:n_scales], dtype=torch.float64)
    product = torch.ones(len(x), dtype=torch.float64, device=x.device)
    for scale, weight in enumerate((weights / weights.sum()).tolist(), start=1):
        luminance, structure = _similarity(x, y, data_range)
        similarity = structure if scale < n_scales else luminance * structure
        mean = _mean(_inner(similarity) if share is None else similarity, share)
        product *= mean.clamp(min=0) ** weight
        x, y = _halve(x), _halve(y)
        share = None if share is None else _halve(share)
    return product.float()


def scale_count(height: int, width: int) -> int:
    """Count the scales of `multiscale_ssim`, 1 to 5: a window of 11 pixels fits into each."""
    return 1 + sum(min(height, width) >= WINDOW * 2 ** s for s in range(1, len(SCALE_WEIGHTS)))


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
    check_mask(mask, (len(images), 1, *images.shape[2:]))
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
    given = {"brain": (image, reference, mask), "slice": (image, reference, None),
             "box": (boxed[:, :1], boxed[:, 1:], None)}
    similarity = _ssim_map(image.double(), reference.double(), data_range)  # for two protocols
    ssims = {"brain": _mean(similarity, mask).float(),
             "slice": _mean(_inner(similarity), None).float(),
             "box": ssim(*given["box"], data_range)}
    return {protocol: {"ssim": ssims[protocol], "psnr_db": psnr_db(*arguments, data_range),
                       "mae": mae(*arguments, data_range)}
            for protocol, arguments in given.items()}


def similarity_terms(means: Tensor, data_range: float) -> tuple[Tensor, Tensor]:
    """Compute SSIM's two factors from windowed means: luminance, and contrast times structure.

    Parameters
    ----------
    means : (5, ...) float64, the windows' means of x, y, x * x, y * y and x * y.
    """
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = means
    var_x, var_y = mean_xx - mean_x.square(), mean_yy - mean_y.square()
    covariance = mean_xy - mean_x * mean_y
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return luminance, (2 * covariance + c2) / (var_x + var_y + c2)


def smoothing_matrix(length: int, device: torch.device) -> Tensor:
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


def _similarity(x: Tensor, y: Tensor, data_range: float) -> tuple[Tensor, Tensor]:
    """Compute `similarity_terms` around each pixel of checked float64 images."""
    height, width = x.shape[2:]
    if min(height, width) < WINDOW:
        raise ValueError(f"images are {height} x {width}; SSIM's window needs at least "
                         f"{WINDOW} x {WINDOW}")
    down, across = smoothing_matrix(height, x.device), smoothing_matrix(width, x.device)
    means = down @ torch.stack([x, y, x * x, y * y, x * y]) @ across.T  # (5, N, 1, H, W)
    return similarity_terms(means, data_range)


def _ssim_map(x: Tensor, y: Tensor, data_range: float) -> Tensor:
    """Compute the map of `ssim_map` from checked float64 images, in float64."""
    luminance, structure = _similarity(x, y, data_range)
    return luminance * structure


def _inner(similarity: Tensor) -> Tensor:
    """Leave out the border whose windows reach beyond the image."""
    return similarity[..., RADIUS:-RADIUS, RADIUS:-RADIUS]


def _squared_gradient(images: Tensor) -> Tensor:
    """Square the magnitude of Prewitt's gradient (scaled as in Xue et al. 2014) of each pixel."""
    padded = nnf.pad(images, (1, 1, 1, 1), mode="replicate")
    columns = padded[..., 2:] - padded[..., :-2]
    rows = padded[..., 2:, :] - padded[..., :-2, :]
    across = (columns[..., :-2, :] + columns[..., 1:-1, :] + columns[..., 2:, :]) / 3
    down = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / 3
    return across.square() + down.square()


def _peaks_of_upsampling(images: Tensor) -> Tensor:
    """Compare the power at the frequencies of `checkerboard` with that around them: (N,)."""
    height, width = images.shape[2:]
    half = torch.fft.rfft2(images[:, 0].double(), norm="ortho")  # the rest mirrors it
    power = half.real.square() + half.imag.square()
    offsets = torch.arange(-FAR, FAR + 1, device=images.device)
    away = torch.maximum(offsets.abs()[:, None], offsets.abs())  # (11, 11) bins
    ratios = []
    for u, v in itertools.product(range(LONGEST_PERIOD), repeat=2):
        if (u, v) == (0, 0):
            continue
        rows = (round(height * u / LONGEST_PERIOD) + offsets)[:, None] % height
        columns = (round(width * v / LONGEST_PERIOD) + offsets) % width
        mirrored = columns > width // 2
        around = power[:, torch.where(mirrored, -rows % height, rows),
                       torch.where(mirrored, width - columns, columns)] + FAINT
        ratios.append(around[:, away <= PEAK].mean(dim=1) / around[:, away >= NEAR].mean(dim=1))
    return torch.stack(ratios).mean(dim=0)


def _halve(images: Tensor) -> Tensor:
    """Average 2 x 2 pixels into one; the last row or column of an odd side counts twice."""
    height, width = images.shape[2:]
    return nnf.avg_pool2d(nnf.pad(images, (0, width % 2, 0, height % 2), mode="replicate"), 2)


def _inside(images: Tensor, mask: Tensor | None) -> Tensor:
    """Return float64 images that are 0 outside the mask, except where they are NaN."""
    return images.double() if mask is None else images.double() * mask


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Average (N, 1, H, W) values over each row's mask (or by weights), or all its pixels: (N,)."""
    if mask is None:
        return values.mean(dim=(1, 2, 3))
    # Times the mask, not picked by it: a NaN outside the mask is a fault too and stays visible.
    return (values * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))


def _first_and_last(present: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and last True position along the last axis of (N, 1, L): two of (N,)."""
    marks = present[:, 0].int()
    return marks.argmax(dim=1), marks.shape[1] - 1 - marks.flip(1).argmax(dim=1)


def _check(image: Tensor, reference: Tensor, mask: Tensor | None,
           data_range: float = 1.0) -> None:
    """Raise ValueError unless all arguments fit together."""
    if image.shape != reference.shape or image.dtype != reference.dtype:
        raise ValueError(f"image is {tuple(image.shape)} {image.dtype}, "
                         f"reference is {tuple(reference.shape)} {reference.dtype}")
    if image.ndim != 4 or image.shape[1] != 1 or not image.is_floating_point():
        raise ValueError(f"images are {tuple(image.shape)} {image.dtype}; need (N, 1, H, W) float")
    if not data_range > 0:
        raise ValueError(f"data_range is {data_range}; must be above 0")
    if mask is not None:
        check_mask(mask, tuple(image.shape))


def check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the mask has that shape, is bool, and marks something in each row."""
    if tuple(mask.shape) != shape or mask.dtype != torch.bool:
        raise ValueError(f"mask is {tuple(mask.shape)} {mask.dtype}; need {shape} torch.bool")
    empty = (~mask.flatten(1).any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"mask is empty in row{'s' * (len(empty) > 1)} "
                         f"{', '.join(map(str, empty))} of {len(mask)}")
