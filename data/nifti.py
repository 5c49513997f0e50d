"""NIfTI files and volumes: read, checked, reoriented, written back as they were.

Owns what a file may get wrong: nothing cut, damaged, claimed or without a place in the world gets
past. What is done with a volume is `data/volume.py`'s.

A volume is (I, J, K) float32 with axes towards right, anterior and superior (RAS); the world's
coordinates are RAS mm.
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
from nibabel.fileholders import FileHolder
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

from data.atomic import naming

try:  # ten times as fast as zlib, files 1 to 2 % larger
    from isal.igzip import IGzipFile as GzipWriter
    _LEVEL = 2
except ImportError:  # not made for this processor
    from gzip import GzipFile as GzipWriter  # type: ignore[assignment]
    _LEVEL = 6

MIN_SLICES = 8  # fewer along an axis is a localiser or a strip, not a head
MAX_VOXELS = 2 ** 29  # a whole head at 0.25 mm, the finest there is; more is a broken header
MAX_SPARE = 2 ** 26  # bytes before the voxels (header extensions), or after them
_MAX_DEFLATE = 1032  # zlib packs no tighter
# How a text starts that stands in a file's place until it is fetched, and by what
_POINTERS = {b"/annex/objects/": "datalad get", b"version https://git-lfs": "git lfs pull"}
MAX_STRETCH = 0.02  # of a voxel: sizes that two programs have rounded differ by less
_RAS = np.array([[0, 1], [1, 1], [2, 1]], dtype=float)


class NotNow(ValueError):
    """A scan that cannot be used for want of memory, of a disk or the like; later it may be."""


@dataclass(frozen=True)
class Grid:
    """A box of voxels in the world: shape (I, J, K) and affine (4, 4) to RAS mm."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing_mm(self) -> np.ndarray:
        """(3,) voxel size in mm along i, j, k."""
        return nib.affines.voxel_sizes(self.affine)


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
    if sform > 0 and qform > 0 and _mirrored(header):
        return (f"{path.name}: sform and qform mirror each other; the sform is taken, left and "
                "right are a guess")
    return "" if sform > 0 or qform > 0 else (
        f"{path.name} does not say how the head lies (sform and qform codes 0): left and right "
        "are a guess")


def _mirrored(header: Any) -> bool:
    """Whether a header's two affines have left and right in two places."""
    with contextlib.suppress(Exception):  # a qform that is none, in one of several ways
        sform, qform = (affine[:3, :3] for affine in (header.get_sform(), header.get_qform()))
        return bool(np.linalg.det(sform) * np.linalg.det(qform) < 0)
    return False


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
        with naming(path), open(temporary, "wb") as out:
            if path.name.endswith(".gz"):
                with GzipWriter("", "wb", _LEVEL, out, mtime=0) as packed:  # no name or time
                    image.to_stream(packed)
            else:
                image.to_stream(out)
            out.flush()
            os.fsync(out.fileno())
        with naming(path):
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
