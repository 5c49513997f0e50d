"""NIfTI volumes and arrays: read, reorient, resample, scale, crop, slice; each inverse beside it.

Owns the geometry and the intensities of one volume. Two volumes of one head are brought together in
`data/registration.py`, brains are found in `data/brain.py`, files are chosen in `data/bids.py`.

Conventions: inside the program a volume is (I, J, K) float32 with axes towards right, anterior and
superior (RAS); world coordinates are RAS mm; intensities are in [-1, 1] with background exactly -1.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel.fileholders import FileHolder
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from scipy import ndimage

from data.bias import NEGATIVE_SHARE, correct_n4

try:  # ten times as fast as zlib, files 1 to 2 % larger
    from isal.igzip import IGzipFile as GzipWriter
    _LEVEL = 2
except ImportError:  # not made for this processor
    from gzip import GzipFile as GzipWriter  # type: ignore[assignment]
    _LEVEL = 6

BACKGROUND = -1.0
MIN_SLICES = 8  # fewer along an axis is a localiser or a strip, not a head
MAX_VOXELS = 2 ** 29  # a whole head at 0.25 mm, the finest there is; more is a broken header
MAX_SPARE = 2 ** 26  # bytes before the voxels (header extensions), or after them
_MAX_DEFLATE = 1032  # zlib packs no tighter
# How a text starts that stands in a file's place until it is fetched, and by what
_POINTERS = {b"/annex/objects/": "datalad get", b"version https://git-lfs": "git lfs pull"}
MAX_STRETCH = 0.02  # of a voxel: sizes that two programs have rounded differ by less
UPPER_PERCENTILE = 99.5
FLAT = 1e-5  # a share of the brightest: what interpolation leaves of one value is below
RIM = 2  # voxels, as far as an interpolation mixes the brain with its background
_RAS = np.array([[0, 1], [1, 1], [2, 1]], dtype=float)
_LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


# ---------------------------------------------------------------------------------------- reading


class NotNow(ValueError):
    """A scan that could not be read for want of memory or of a disk; another time it may be."""


@dataclass(frozen=True)
class Volume:
    """One scan in RAS order, with what is needed to write a result on the grid that it came from.

    Attributes
    ----------
    data : (I, J, K) float32, scanner units, RAS axes
    affine : (4, 4) float64, voxel indices to RAS mm
    path : the file, for messages
    orientation : (3, 2) nibabel orientation of the file's own axes
    header : the file's own NIfTI header
    file_affine : (4, 4) float64, the affine of the file's own axes
    """

    data: np.ndarray
    affine: np.ndarray
    path: Path
    orientation: np.ndarray
    header: nib.Nifti1Header
    file_affine: np.ndarray

    @property
    def spacing_mm(self) -> np.ndarray:
        """(3,) voxel size in mm along i, j, k."""
        return nib.affines.voxel_sizes(self.affine)

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in millilitres (right for sheared axes, too)."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000


def read_volume(path: str | os.PathLike, *, is_map: bool = False) -> Volume:
    """Read a 3-D NIfTI file (.nii or .nii.gz) as a float32 RAS volume.

    The whole file is decompressed with its CRC checked, so a cut or damaged file never passes.

    Parameters
    ----------
    path : file name; a 4-D file is taken where its fourth axis has one volume
    is_map : of lesions or of a tissue, and may have one value throughout: there may be none

    Returns
    -------
    Volume

    Raises
    ------
    FileNotFoundError : there is no such file
    ValueError : not a NIfTI file, damaged, not 3-D, too few slices, an affine that maps to nothing,
        NaN or infinite voxels, or one value throughout; the message names file and cure
    NotNow : a ValueError, too: no memory is left, or the disk does not answer
    """
    path = Path(path)
    with _reading(path), _open(path) as stream:
        image = _decode(path, stream)
        _check_geometry(path, image)
        _check_claim(path, image, isinstance(stream, gzip.GzipFile))
        data = _voxels(path, image)
        _check_rest(path, stream)
        return _volume(path, image, data, is_map)


def read_grid(path: str | os.PathLike) -> Grid:
    """Read the grid of a NIfTI file, as `read_volume` would lay it, from its header alone.

    Raises
    ------
    FileNotFoundError, ValueError : as `read_volume`, where the header already shows it
    """
    path = Path(path)
    with _reading(path), _open(path) as stream:
        image = _decode(path, stream)
        _check_geometry(path, image)
    axes = np.argsort(io_orientation(image.affine)[:, 0])
    i, j, k = (int(image.shape[axis]) for axis in axes)
    return Grid((i, j, k), _ras_affine(image))


def doubt_geometry(path: str | os.PathLike) -> str:
    """Say what of a file's place in the world is a guess, "" where its header tells all.

    For slices that nets are to learn from. A single volume is read without: whatever is made of it
    goes back to the same voxels.

    Raises
    ------
    FileNotFoundError, ValueError : as `read_grid`, and where the header has no voxel size, or an
        sform that stretches the head
    """
    path = Path(path)
    with _reading(path), _open(path) as stream:
        start = stream.read(540)
        stream.seek(0)
        _check_geometry(path, _decode(path, stream))
    header = _own_header(_kind(start), start)
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    pixdim = np.abs(header["pixdim"][1:4].astype(float))
    if sform > 0:
        rows = np.stack([header[f"srow_{axis}"][:3] for axis in "xyz"]).astype(float)
        _check_stretch(path, np.linalg.norm(rows, axis=0), pixdim)
    elif not pixdim.all():
        raise ValueError(f"{path}: pixdim {_sizes(pixdim)} mm gives no voxel size, and there is no "
                         "sform; mend its header, or convert the scan again")
    return "" if sform > 0 or qform > 0 else (
        f"{path.name} does not say how the head lies (sform and qform codes 0): left and right "
        "are a guess")


def _check_stretch(path: Path, sform_mm: np.ndarray, pixdim_mm: np.ndarray) -> None:
    known = pixdim_mm > 0
    if (np.abs(sform_mm - pixdim_mm)[known] > MAX_STRETCH * pixdim_mm[known]).any():
        raise ValueError(
            f"{path}: voxels are {_sizes(sform_mm)} mm by its sform, {_sizes(pixdim_mm)} mm by its "
            "pixdim: stretched to a template, as it seems; set sform_code to 0 if the qform is the "
            "scanner's, or convert the scan again")


def _sizes(spacing_mm: np.ndarray) -> str:
    return " x ".join(f"{size:.3g}" for size in spacing_mm)


def volume_from_image(image: Any, path: str | os.PathLike = "the image") -> Volume:
    """Check a nibabel image and bring it into RAS order; see `read_volume`."""
    path = Path(path)
    if not isinstance(image.header, nib.Nifti1Header):  # FreeSurfer's, for one
        try:
            image = nib.Nifti1Image.from_image(image)
        except Exception as error:  # nibabel raises a dozen kinds
            raise ValueError(f"{path}: not a NIfTI image ({error}); convert it") from None
    with _reading(path):
        _check_geometry(path, image)
        return _volume(path, image, _voxels(path, image))


def _volume(path: Path, image: Any, data: np.ndarray, is_map: bool = False) -> Volume:
    """Check the voxels and bring them into RAS order."""
    bad = data.size - int(np.isfinite(data).sum())
    if bad:
        raise ValueError(f"{path}: {bad} voxels are NaN or infinite; mend or leave out the file")
    if data.min() == data.max() and not is_map:
        raise ValueError(f"{path}: every voxel is {data.min():g}; an empty volume, leave it out")
    orientation = io_orientation(image.affine)
    data = np.ascontiguousarray(apply_orientation(data, orientation))
    return Volume(data, _ras_affine(image), path, orientation, image.header.copy(),
                  np.array(image.affine))


def _ras_affine(image: Any) -> np.ndarray:
    orientation = io_orientation(image.affine)
    return image.affine @ nib.orientations.inv_ornt_aff(orientation, image.shape[:3])


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Tell a damaged file, which stays so, from want of memory and from a disk that is away."""
    try:
        yield
    except MemoryError:
        raise NotNow(f"{path}: no memory left to read it; run again with fewer processes beside "
                     "it") from None
    except FileNotFoundError:
        raise
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:  # gzip and nibabel give none
            raise NotNow(f"{path}: cannot be read ({error.strerror}); see to its disk, then run "
                         "again") from None
        raise _damaged(path, error) from None


def _open(path: Path) -> io.BufferedIOBase:
    """The file's content, decompressed as it is read: a file is never believed to be small."""
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path}: a link to nothing; with DataLad run 'datalad get' on it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the name")
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.GzipFile(path) if packed else open(path, "rb")


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: damaged or cut off ({error}); fetch or convert the file again")


def _decode(path: Path, stream: io.BufferedIOBase) -> Any:
    """A NIfTI-1 or NIfTI-2 image of a file's decompressed bytes; its voxels are yet to be read."""
    start = stream.read(540)
    kind = _kind(start)
    if kind is None:
        text = "".join(c for c in start[:24].decode("ascii", "ignore") if c.isprintable())
        what = f"it starts with '{text}'" if start else "an empty file"
        cure = next((f"run '{command}' on it" for begin, command in _POINTERS.items()
                     if start.startswith(begin)), "fetch or convert the file again")
        raise ValueError(f"{path}: not a NIfTI file ({what}); {cure}")
    try:
        header = _own_header(kind, start)
        if not 0 <= header["vox_offset"] <= MAX_SPARE:
            raise ValueError(f"voxels would start at byte {header['vox_offset']:.0f}")
        return kind.from_file_map({"image": FileHolder(fileobj=stream)}, mmap=False)
    except Exception as error:  # nibabel raises a dozen kinds for broken headers
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise
        raise ValueError(
            f"{path}: NIfTI header cannot be read ({error}); fetch or convert the file again"
        ) from None


def _kind(start: bytes) -> Any:
    """The kind of image whose header a file starts with, None if it is none."""
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    return nib.Nifti1Image if 348 in sizes else nib.Nifti2Image if 540 in sizes else None


def _own_header(kind: Any, start: bytes) -> Any:
    """The header as it is in the file, before nibabel mends what it can."""
    return kind.header_class(start[:kind.header_class.sizeof_hdr], check=False)


def _check_claim(path: Path, image: Any, packed: bool) -> None:
    """Refuse few bytes that claim gigabytes: nibabel takes the memory before it misses them."""
    size, claimed = path.stat().st_size, math.prod(image.shape) * image.get_data_dtype().itemsize
    if claimed > size * (_MAX_DEFLATE if packed else 1):
        raise _damaged(path, EOFError(f"{size:,} bytes for {claimed:,} bytes of voxels"))


def _check_rest(path: Path, stream: io.BufferedIOBase) -> None:
    """Read a compressed file to its end, where its CRC is; keep nothing of it."""
    spare = 0
    while isinstance(stream, gzip.GzipFile) and (block := stream.read(1 << 20)):
        spare += len(block)
        if spare > MAX_SPARE:
            raise ValueError(f"{path}: goes on for more than {MAX_SPARE >> 20} MiB after the "
                             "voxels that its header tells of; fetch or convert the file again")


def _check_geometry(path: Path, image: Any) -> None:
    shape = image.shape
    if len(shape) > 3 and np.prod(shape[3:]) != 1:
        raise ValueError(
            f"{path}: shape {shape} has {int(np.prod(shape[3:]))} volumes; need one 3-D volume, "
            "so take out the one you want"
        )
    if len(shape) < 3 or min(shape[:3]) < MIN_SLICES:
        raise ValueError(
            f"{path}: shape {shape} is no 3-D volume with at least {MIN_SLICES} slices each way; "
            "leave this file out"
        )
    if math.prod(shape) > MAX_VOXELS:
        raise ValueError(f"{path}: shape {shape} has {math.prod(shape):,} voxels, at most "
                         f"{MAX_VOXELS:,} are read; mend its header, or resample the scan")
    affine = image.affine
    if affine is None or not np.isfinite(affine).all():
        raise ValueError(f"{path}: affine has no finite values; repair qform and sform")
    spacing = nib.affines.voxel_sizes(affine)
    if abs(np.linalg.det(affine[:3, :3])) < 1e-6 or spacing.min() < 0.05 or spacing.max() > 20:
        raise ValueError(
            f"{path}: affine {np.round(affine[:3, :3], 3).tolist()} gives no usable voxel size in "
            "mm; repair qform and sform"
        )


def _voxels(path: Path, image: Any) -> np.ndarray:
    """(I, J, K) float32 in the file's own axis order."""
    dtype = image.get_data_dtype()
    if dtype.kind not in "iufb":
        raise ValueError(f"{path}: voxel type {dtype} is not a plain number; convert the file")
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold is said by _volume
            data = np.asarray(image.dataobj, dtype=np.float32)
    except ValueError as error:
        raise _damaged(path, error) from None
    return data.reshape(data.shape[:3])


def write_like(volume: Volume, data: np.ndarray, path: str | os.PathLike) -> None:
    """Write RAS data on the grid, in the axis order and with the header of `volume`'s own file.

    Parameters
    ----------
    volume : the scan whose grid is taken; its qform, sform and units are kept bit for bit
    data : (I, J, K) in RAS order as `volume.data`; stored as float32 (bool and uint8 as uint8)
    path : the file to write, .nii or .nii.gz; written under a temporary name and renamed
    """
    image = _image_like(volume, data, copy=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as out:
            if path.name.endswith(".gz"):
                with GzipWriter("", "wb", _LEVEL, out, mtime=0) as packed:  # no name or time
                    image.to_stream(packed)
            else:
                image.to_stream(out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def image_like(volume: Volume, data: np.ndarray) -> nib.Nifti1Image:
    """Make a NIfTI image of RAS data on the grid of the file that `volume` came from."""
    return _image_like(volume, data, copy=True)


def _image_like(volume: Volume, data: np.ndarray, *, copy: bool) -> nib.Nifti1Image:
    """`image_like`; without a copy the image may look at `data` itself."""
    if data.shape != volume.data.shape:
        raise ValueError(f"data is {data.shape}, {volume.path} is {volume.data.shape}")
    dtype = np.uint8 if data.dtype in (np.bool_, np.uint8) else np.float32
    data = reorient_from_ras(data, volume.orientation).astype(dtype, copy=copy)
    header = volume.header.copy()
    header.set_data_shape(data.shape)
    header.set_data_dtype(dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    # an affine that agrees with the header makes nibabel leave its qform and sform as they are
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    return kind(data, volume.file_affine, header)


def reorient_from_ras(data: np.ndarray, orientation: np.ndarray) -> np.ndarray:
    """Bring RAS data back to the axis order `orientation` (the inverse of `read_volume`'s step)."""
    return apply_orientation(data, ornt_transform(_RAS, orientation))


# --------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True)
class Grid:
    """A box of voxels in the world: shape (I, J, K) and affine (4, 4) to RAS mm."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing_mm(self) -> np.ndarray:
        """(3,) voxel size in mm along i, j, k."""
        return nib.affines.voxel_sizes(self.affine)


def grid_of(volume: Volume) -> Grid:
    """The volume's own grid."""
    i, j, k = volume.data.shape
    return Grid((i, j, k), volume.affine)


def slicing_grid(volume: Volume, spacing_mm: float) -> Grid:
    """Lay the grid on which a volume is cut into axial slices.

    In-plane voxels become `spacing_mm`; along k the volume's own spacing stays where it is coarser
    (thick slices are not cut into invented thin ones). The grid keeps the volume's axes (an oblique
    scan is cut along its own planes) and the middle of its field of view.
    """
    native = volume.spacing_mm
    wanted = np.array([spacing_mm, spacing_mm, max(spacing_mm, native[2])])
    wanted = np.where(np.abs(wanted - native) < 1e-3, native, wanted)
    shape = np.array(volume.data.shape)
    new_shape = np.where(wanted == native, shape, np.ceil(shape * native / wanted - 1e-6))
    new_shape = np.maximum(new_shape.astype(int), 1)
    affine = volume.affine.copy()
    affine[:3, :3] = volume.affine[:3, :3] * (wanted / native)
    middle = volume.affine[:3, :3] @ ((shape - 1) / 2) + volume.affine[:3, 3]
    affine[:3, 3] = middle - affine[:3, :3] @ ((new_shape - 1) / 2)
    i, j, k = (int(n) for n in new_shape)
    return Grid((i, j, k), affine)


def same_grid(a: Grid, b: Grid, tolerance_mm: float = 1e-2) -> bool:
    """Whether two grids put every voxel at the same place, to `tolerance_mm`."""
    if a.shape != b.shape:
        return False
    corners = np.array([[i, j, k, 1] for i in (0, a.shape[0]) for j in (0, a.shape[1])
                        for k in (0, a.shape[2])], dtype=float)
    return bool(np.abs(corners @ (a.affine - b.affine).T).max() < tolerance_mm)


def to_sitk(data: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """A SimpleITK image (LPS world, k j i array order) of RAS data."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.transpose(2, 1, 0)))
    lps = _LPS_FROM_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing([float(s) for s in spacing])
    image.SetOrigin([float(o) for o in lps[:3, 3]])
    image.SetDirection([float(d) for d in (lps[:3, :3] / spacing).ravel()])
    return image


def sitk_affine(matrix: np.ndarray) -> sitk.AffineTransform:
    """The ITK transform of a (4, 4) matrix that maps RAS mm to RAS mm."""
    lps = _LPS_FROM_RAS @ matrix @ _LPS_FROM_RAS
    transform = sitk.AffineTransform(3)
    transform.SetMatrix([float(v) for v in lps[:3, :3].ravel()])
    transform.SetTranslation([float(v) for v in lps[:3, 3]])
    return transform


def resample(data: np.ndarray, affine: np.ndarray, grid: Grid, *,
             matrix: np.ndarray | None = None, nearest: bool = False) -> np.ndarray:
    """Resample a volume onto a grid by ONE interpolation.

    Linear, after a Gaussian that removes what the coarser grid cannot hold (full width at half
    maximum so that source and filter together have the target's voxel size): plain linear
    interpolation from 0.5 mm to 1.5 mm would pick single noisy voxels.

    Parameters
    ----------
    data : (I, J, K) any real dtype, RAS axes
    affine : (4, 4) its voxel indices to RAS mm
    grid : where to
    matrix : (4, 4) maps RAS mm on `grid` to RAS mm of `data` (a registration); identity if None
    nearest : nearest neighbour without the Gaussian, for masks and labels

    Returns
    -------
    (I', J', K') float32 (bool where `data` is bool), 0 outside the source's field of view
    """
    matrix = np.eye(4) if matrix is None else matrix
    if np.array_equal(matrix, np.eye(4)) and same_grid(Grid(data.shape, affine), grid, 1e-6):
        return data.astype(bool if data.dtype == bool else np.float32)
    how = sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear
    source = _source(data, affine, None if nearest else matrix @ grid.affine)
    target = to_sitk(np.zeros((1, 1, 1), np.uint8), grid.affine)
    out = sitk.Resample(source, list(grid.shape), sitk_affine(matrix), how, target.GetOrigin(),
                        target.GetSpacing(), target.GetDirection(), 0.0)
    del source  # a fine scan has hundreds of megabytes, and each copy counts
    array = sitk.GetArrayViewFromImage(out).transpose(2, 1, 0)
    return np.array(array, dtype=bool if data.dtype == bool else np.float32, order="C")


def _source(data: np.ndarray, affine: np.ndarray, target: np.ndarray | None) -> sitk.Image:
    """A SimpleITK image of `data`, blurred for a grid of affine `target` unless that is None."""
    if target is None:
        return to_sitk(data.view(np.uint8) if data.dtype == bool else data, affine)
    turned = np.array(data.transpose(2, 1, 0), dtype=np.float32, order="C")  # ours to write into
    _antialias(turned.transpose(2, 1, 0), affine, target)
    return to_sitk(turned.transpose(2, 1, 0), affine)


def _antialias(data: np.ndarray, affine: np.ndarray, target: np.ndarray) -> None:
    """Blur in place along each axis on which the target's voxels are larger than the source's."""
    steps = np.linalg.norm(np.linalg.inv(affine)[:3, :3] @ target[:3, :3], axis=1)  # source voxels
    for axis, step in enumerate(steps):
        sigma = np.sqrt(max(step ** 2 - 1, 0)) / 2.355
        if sigma > 0.2:
            ndimage.gaussian_filter1d(data, sigma, axis=axis, output=data, mode="nearest",
                                      truncate=3)


def field_of_view(shape: tuple[int, ...], affine: np.ndarray, grid: Grid,
                  matrix: np.ndarray | None = None) -> np.ndarray:
    """(I', J', K') bool: which voxels of `grid` lie inside a scan's own box of voxels."""
    matrix = np.eye(4) if matrix is None else matrix
    to_source = np.linalg.inv(affine) @ matrix @ grid.affine
    axes = [np.arange(n, dtype=np.float64) for n in grid.shape]
    inside = np.ones(grid.shape, dtype=bool)
    for row, size in zip(to_source[:3], shape):
        place = (row[0] * axes[0][:, None, None] + row[1] * axes[1][None, :, None]
                 + row[2] * axes[2][None, None, :] + row[3])
        inside &= (place >= -0.5) & (place <= size - 0.5)
    return inside


# -------------------------------------------------------------------------------------- intensity


@dataclass(frozen=True)
class IntensityScale:
    """Scanner units at -1 (`low`) and at 1 (`high`): what it takes to undo `scale`."""

    low: float
    high: float


def fit_scale(data: np.ndarray, mask: np.ndarray, *, upper: float = UPPER_PERCENTILE,
              path: str | os.PathLike = "the volume") -> IntensityScale:
    """Find a volume's own scale inside its brain.

    Magnitude images have a true zero (no signal), which becomes -1, like the background. Where more
    than 2 % of the brain is negative, somebody has shifted the values: the (100 - upper)th
    percentile takes the place of zero.

    Parameters
    ----------
    data : (I, J, K) float32, scanner units
    mask : (I, J, K) bool, the brain
    upper : percentile in (50, 100] that becomes 1; what lies above is clipped

    Raises
    ------
    ValueError : an empty mask, or a brain of one value (says which file)
    """
    brain = data[mask]
    if brain.size == 0:
        raise ValueError(f"{path}: the brain mask covers none of it; check the mask's alignment")
    high = float(np.percentile(brain, upper))
    shifted = float((brain < 0).mean()) > NEGATIVE_SHARE
    low = float(np.percentile(brain, 100 - upper)) if shifted else 0.0
    darkest, brightest = _bulk(data, mask)
    if not min(high - low, brightest - darkest) > FLAT * max(abs(high), abs(low), 1e-30):
        raise ValueError(f"{path}: the brain has no contrast (all about {brightest:.3g}); leave "
                         "it out")
    return IntensityScale(low, high)


def _bulk(data: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Between which values nine tenths of the brain lie, without its rim where it has a depth.

    Along the rim an interpolation mixes the brain with what is around it, so that a brain of one
    value has others there too.
    """
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    core = ndimage.binary_erosion(mask[box], iterations=RIM)
    darkest, brightest = np.percentile(data[box][core if core.any() else mask[box]], (5, 95))
    return float(darkest), float(brightest)


def scale(data: np.ndarray, mask: np.ndarray, by: IntensityScale) -> np.ndarray:
    """Scanner units to [-1, 1] float32 inside the mask (clipped), exactly -1 outside."""
    scaled = np.clip((data - by.low) / (by.high - by.low), 0, 1) * 2 - 1
    return np.where(mask, scaled, BACKGROUND).astype(np.float32)


def unscale(scaled: np.ndarray, by: IntensityScale) -> np.ndarray:
    """[-1, 1] back to scanner units, float32: the inverse of `scale` except where that clipped."""
    return ((scaled + 1) / 2 * (by.high - by.low) + by.low).astype(np.float32)


# ----------------------------------------------------------------------------- frame and slices


def crop_or_pad(data: np.ndarray, centre: tuple[int, int], size: int,
                fill: float = BACKGROUND) -> np.ndarray:
    """Cut (I, J, K) to (size, size, K) around voxel `centre` (i, j), or pad it with `fill`."""
    out = np.full((size, size, data.shape[2]), fill, dtype=data.dtype)
    inner, outer = _overlap(data.shape, centre, size)
    out[outer] = data[inner]
    return out


def undo_crop_or_pad(cropped: np.ndarray, shape: tuple[int, int, int], centre: tuple[int, int],
                     fill: float = BACKGROUND) -> np.ndarray:
    """Lay (size, size, K) back into (I, J, K); what had been cut away is `fill`."""
    out = np.full(shape, fill, dtype=cropped.dtype)
    inner, outer = _overlap(shape, centre, cropped.shape[0])
    out[inner] = cropped[outer]
    return out


def _overlap(shape: tuple[int, ...], centre: tuple[int, int],
             size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a frame meets the volume: slices into the volume, slices into the frame."""
    inner, outer = [], []
    for n, middle in zip(shape[:2], centre):
        start = middle - size // 2
        lo, hi = max(start, 0), max(min(start + size, n), max(start, 0))
        inner.append(slice(lo, hi))
        outer.append(slice(lo - start, hi - start))
    return (inner[0], inner[1]), (outer[0], outer[1])


def mask_centre(mask: np.ndarray) -> tuple[int, int]:
    """The voxel (i, j) in the middle of the mask's bounding box."""
    if not mask.any():
        raise ValueError("the brain mask is empty; check the brain extraction")
    middle = []
    for axis in (0, 1):
        hit = np.flatnonzero(mask.any(axis=(1 - axis, 2)))
        middle.append(int(hit[0] + hit[-1] + 1) // 2)
    return middle[0], middle[1]


def to_slices(data: np.ndarray) -> np.ndarray:
    """(I, J, K) RAS volume to (K, H, W) axial slices, inferior to superior.

    Upright as on a screen: H runs from anterior to posterior, W from the subject's left to right.
    """
    return np.ascontiguousarray(data[:, ::-1, :].transpose(2, 1, 0))


def from_slices(slices: np.ndarray) -> np.ndarray:
    """(K, H, W) back to an (I, J, K) RAS volume: the inverse of `to_slices`."""
    return np.ascontiguousarray(slices.transpose(2, 1, 0)[:, ::-1, :])


# ------------------------------------------------------------------- one volume, there and back


@dataclass(frozen=True)
class Placement:
    """Where a stack of slices came from: all that `restore` needs."""

    grid: Grid
    centre: tuple[int, int]
    scale: IntensityScale
    cut_share: float  # share of the brain outside the frame, 0 to 1


def place(data: np.ndarray, mask: np.ndarray, grid: Grid, size: int, *,
          path: str | os.PathLike = "the volume",
          bias_correction: str = "none") -> tuple[np.ndarray, Placement]:
    """Scale and frame a volume that lies on its slicing grid.

    Parameters
    ----------
    data : (I, J, K) float32 on `grid`, scanner units
    mask : (I, J, K) bool on `grid`
    size : pixels a side of the frame
    bias_correction : of `bias.CORRECTIONS`, before the intensities are scaled

    Returns
    -------
    slices : (K, size, size) float32 in [-1, 1], background exactly -1
    placement : Placement

    Raises
    ------
    ValueError : as `fit_scale` and `bias.correct_n4`
    """
    if bias_correction == "n4":
        data = correct_n4(data, mask, grid.spacing_mm, path=path)
    by = fit_scale(data, mask, path=path)
    centre = mask_centre(mask)
    framed = crop_or_pad(scale(data, mask, by), centre, size)
    inside = crop_or_pad(mask, centre, size, fill=False)
    cut = 1 - float(inside.sum()) / float(mask.sum())
    return to_slices(framed), Placement(grid, centre, by, cut)


def restore(slices: np.ndarray, mask: np.ndarray, placement: Placement,
            target: Grid) -> np.ndarray:
    """Put slices in [-1, 1] back into the world: the inverse of `place` and of the resampling.

    The brain's rim is carried outwards before the interpolation, which would mix it with background
    otherwise; so the answer is right inside the brain, and the caller masks it on the target grid.

    Parameters
    ----------
    slices : (K, H, W) float in [-1, 1]
    mask : (I, J, K) bool on the placement's grid, the brain
    placement : where the slices were cut
    target : the grid to answer on, the scan's own as a rule

    Returns
    -------
    (I', J', K') float32 in [0, 1] on `target`, meaningful inside the brain only
    """
    framed = (from_slices(slices).astype(np.float32) + 1) / 2
    grid, centre = placement.grid, placement.centre
    on_grid = undo_crop_or_pad(framed, grid.shape, centre, fill=0.0)
    known = undo_crop_or_pad(crop_or_pad(mask, centre, framed.shape[0], fill=False),
                             grid.shape, centre, fill=False)
    part = _reach(grid, target, known)
    nearest = ndimage.distance_transform_edt(~known[part], sampling=grid.spacing_mm,
                                             return_distances=False, return_indices=True)
    on_grid[part] = on_grid[part][tuple(nearest)]
    return np.clip(resample(on_grid, grid.affine, target), 0, 1)


def _reach(grid: Grid, target: Grid, mask: np.ndarray) -> tuple[slice, ...]:
    """The box of `grid` that holds a mask and all that an interpolation onto `target` looks at."""
    to_grid = np.linalg.inv(grid.affine) @ target.affine
    corners = np.array([[i, j, k, 1] for i in (0, target.shape[0] - 1)
                        for j in (0, target.shape[1] - 1) for k in (0, target.shape[2] - 1)])
    places = (corners @ to_grid.T)[:, :3]
    # neighbours on both sides, and what `_antialias` mixes in
    rim = 2 + np.ceil(1.3 * np.linalg.norm(to_grid[:3, :3], axis=1))
    box = []
    for axis, others in enumerate(((1, 2), (0, 2), (0, 1))):
        hit = np.flatnonzero(mask.any(axis=others))
        low = min(hit[0], int(places[:, axis].min() - rim[axis]))
        high = max(hit[-1], int(places[:, axis].max() + rim[axis]))
        box.append(slice(max(low, 0), high + 1))
    return tuple(box)
