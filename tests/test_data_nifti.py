"""NIfTI files: what is read, where it lies, what is refused, and what is written back."""

import errno
import gzip
import re
import struct
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from conftest import lay_affine, paint
from nibabel.affines import apply_affine

from data import nifti

SHAPE = (12, 10, 9)
AFFINE = lay_affine(SHAPE, (1, 1.3, 2.1), "LPS", turn_deg=(10, 5, 20), middle=(3, 4, 5))
NUMBERS = np.random.default_rng(0).integers(0, 200, SHAPE)


def image(dtype=np.int16, kind=nib.Nifti1Image, axes=None, data=NUMBERS):
    turned = lay_affine(SHAPE, (1, 1.3, 2.1), axes or "LPS", turn_deg=(8, -4, 15))
    affine = turned if axes else AFFINE
    return kind(data.astype(dtype), affine, dtype=dtype)


def with_forms(sform, qform):
    made = image()
    made.set_sform(AFFINE, sform)
    made.set_qform(AFFINE, qform)
    return made


def with_two_affines():
    made = with_forms(1, 1)
    made.set_qform(lay_affine(SHAPE, (1, 1.3, 2.1), "RAS", middle=(40, 0, 0)), 2)
    return made


def big_endian(kind=nib.Nifti1Image):
    header = kind.header_class(endianness=">")
    header.set_data_dtype(">i2")
    return kind(NUMBERS.astype(">i2"), AFFINE, header)


def with_slope():
    made = image(np.int16)
    made.header.set_slope_inter(0.25, -7)
    return made


def sheared():
    affine = AFFINE.copy()
    affine[0, 1] += 0.3
    return nib.Nifti1Image(NUMBERS.astype(np.int16), affine)


def with_extension():
    made = image()
    made.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"kept as it is"))
    return made


KINDS = {
    "RAS": lambda: image(axes="RAS"), "LPS": lambda: image(axes="LPS"),
    "LAS": lambda: image(axes="LAS"), "PIR": lambda: image(axes="PIR"),
    "SAL": lambda: image(axes="SAL"), "nifti2": lambda: image(kind=nib.Nifti2Image),
    "big-endian": big_endian, "big-endian-nifti2": lambda: big_endian(nib.Nifti2Image),
    "sform-only": lambda: with_forms(1, 0), "qform-only": lambda: with_forms(0, 1),
    "no-form": lambda: with_forms(0, 0), "two-affines": with_two_affines, "sheared": sheared,
    "uint8": lambda: image(np.uint8), "uint16": lambda: image(np.uint16),
    "float64": lambda: image(np.float64), "slope": with_slope, "extension": with_extension,
    "4d-one-volume": lambda: image(data=NUMBERS[..., None]),
}


# ----------------------------------------------------------------------------- reading, writing


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "PIR", "SAL", "IRP"])
def test_a_head_in_any_orientation_is_read_at_its_own_place_in_the_world(axes, tmp_path):
    shape, spacing = (30, 36, 25), (6, 6, 7)
    affine = lay_affine(shape, spacing, axes, turn_deg=(7, -12, 20), middle=(5, -3, 8))
    head = nib.Nifti1Image(paint(shape, affine, extracted=False), affine)
    head.to_filename(tmp_path / "head.nii.gz")
    read = nifti.read_volume(tmp_path / "head.nii.gz")
    assert nib.aff2axcodes(read.affine) == ("R", "A", "S")
    expected = paint(read.data.shape, read.affine, extracted=False)
    # the file keeps its affine as float32
    np.testing.assert_allclose(read.data, expected, atol=0.5)
    assert np.abs(read.data - read.data[::-1]).mean() > 5, "a flipped head must not pass"


@pytest.mark.parametrize("kind", KINDS)
def test_reading_and_writing_back_keeps_header_geometry_bit_for_bit_and_every_value(kind, tmp_path):
    KINDS[kind]().to_filename(tmp_path / "in.nii.gz")
    read = nifti.read_volume(tmp_path / "in.nii.gz")
    nifti.write_like(read, read.data, tmp_path / "out.nii.gz")
    before, after = nib.load(tmp_path / "in.nii.gz"), nib.load(tmp_path / "out.nii.gz")
    assert after.affine.tobytes() == before.affine.tobytes()
    assert type(after) is type(before) and after.header.endianness == before.header.endianness
    for field in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b",
                  "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "pixdim",
                  "xyzt_units"):
        assert after.header[field].tobytes() == before.header[field].tobytes(), field
    assert [e.get_content() for e in after.header.extensions] == \
        [e.get_content() for e in before.header.extensions]
    assert after.get_data_dtype().kind == "f" and after.get_data_dtype().itemsize == 4
    np.testing.assert_array_equal(after.get_fdata(), before.get_fdata().reshape(SHAPE))


@pytest.mark.parametrize("kind", KINDS)
def test_every_voxel_keeps_its_value_and_its_world_coordinates(kind, tmp_path):
    KINDS[kind]().to_filename(tmp_path / "in.nii")
    read, source = nifti.read_volume(tmp_path / "in.nii"), nib.load(tmp_path / "in.nii")
    voxels = np.indices(SHAPE).reshape(3, -1).T
    world = apply_affine(source.affine, voxels)
    there = apply_affine(np.linalg.inv(read.affine), world)
    np.testing.assert_allclose(there, np.rint(there), atol=1e-4)
    i, j, k = np.rint(there).astype(int).T
    np.testing.assert_array_equal(read.data[i, j, k], source.get_fdata().ravel().astype(np.float32))
    assert read.data.dtype == np.float32


def test_a_mask_is_written_as_uint8_and_other_shapes_are_refused(tmp_path):
    image().to_filename(tmp_path / "in.nii.gz")
    read = nifti.read_volume(tmp_path / "in.nii.gz")
    nifti.write_like(read, read.data > 100, tmp_path / "new" / "mask.nii")
    mask = nib.load(tmp_path / "new" / "mask.nii")
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(mask.dataobj), NUMBERS > 100)
    with pytest.raises(ValueError, match=r"\(3, 3, 3\).*\(12, 10, 9\)"):
        nifti.write_like(read, np.zeros((3, 3, 3)), tmp_path / "no.nii")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["mask.nii"]


def test_a_written_file_depends_on_nothing_but_its_content(tmp_path):
    read = nifti.volume_from_image(image())
    for name in ("a.nii.gz", "b.nii.gz"):
        nifti.write_like(read, read.data, tmp_path / name)
    content = (tmp_path / "a.nii.gz").read_bytes()
    assert content == (tmp_path / "b.nii.gz").read_bytes()
    assert content[4:8] == bytes(4), "no time of day in the gzip header"


def test_compression_is_told_by_the_content_not_by_the_name(tmp_path):
    raw = image().to_bytes()
    (tmp_path / "packed.nii").write_bytes(gzip.compress(raw))
    (tmp_path / "plain.nii.gz").write_bytes(raw)
    for name in ("packed.nii", "plain.nii.gz"):
        read = nifti.read_volume(tmp_path / name)
        np.testing.assert_array_equal(np.sort(read.data, None), np.sort(NUMBERS, None))


def raw_with(offset, content, source=None):
    raw = (source or with_forms(1, 0)).to_bytes()
    return raw[:offset] + content + raw[offset + len(content):]


RAW = with_forms(1, 1).to_bytes()
PACKED = gzip.compress(RAW, mtime=0)
DAMAGED = {
    "a cut .nii": (RAW[:-100], "damaged or cut off"),
    "a cut header": (RAW[:200], "header cannot be read"),
    "a cut .gz": (PACKED[:-50], "damaged or cut off"),
    "a .gz of 8 bytes": (PACKED[:8], "damaged or cut off"),
    "a .gz without its CRC": (PACKED[:-8], "damaged or cut off"),
    "a flipped bit in .gz": (PACKED[:900] + bytes([PACKED[900] ^ 4]) + PACKED[901:], "damaged"),
    "a text": (b"not yet\tuploaded\x00\x07\n", "not a NIfTI file.*'not yetuploaded'"),
    "an unlocked annex pointer": (b"/annex/objects/MD5E-s5--0.nii.gz\n", "run 'datalad get'"),
    "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "run 'git lfs pull'"),
    "a web page": (b"<!DOCTYPE html>\n<html>", "not a NIfTI file.*<!DOCTYPE html>"),
    "a packed web page": (gzip.compress(b"<html>"), "not a NIfTI file.*<html>"),
    "nothing": (b"", "an empty file"),
    "an Analyze header": (raw_with(344, bytes(4)), "header cannot be read"),
    "an unknown voxel type": (raw_with(70, b"\x99\x99"), "header cannot be read"),
    "more voxels than memory": (raw_with(42, b"\xff\x7f" * 3),
                                "35,181,150,961,663 voxels, at most 536,870,912 are read; mend"),
    "voxels far away": (raw_with(108, struct.pack("<f", 2e9)), "start at byte 2000000000"),
    "an affine of zeros": (raw_with(280, bytes(48)), "no usable voxel size"),
    "an affine with NaN": (raw_with(280, struct.pack("<f", np.nan)), "no finite values"),
    "broken quaternions": (raw_with(256, struct.pack("<3f", 3, 3, 3), with_forms(0, 1)), "header"),
    "complex voxels": (image(np.complex64).to_bytes(), "complex64 is not a plain number"),
    "one slice": (image(data=NUMBERS[..., :1]).to_bytes(), r"\(12, 10, 1\).*at least 8 slices"),
    "two dimensions": (image(data=NUMBERS[..., 0]).to_bytes(), r"\(12, 10\) is no 3-D volume"),
    "two volumes": (image(data=np.stack([NUMBERS] * 2, -1)).to_bytes(), "has 2 volumes"),
    "a constant": (image(data=0 * NUMBERS + 3).to_bytes(), "every voxel is 3;"),
    "a NaN": (image(np.float32, data=np.where(NUMBERS == NUMBERS.max(), np.nan, 1)).to_bytes(),
              "voxels are NaN"),
    "more than float32": (image(np.float64, data=NUMBERS * 1e300).to_bytes(), "NaN or infinite"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", DAMAGED)
def test_a_file_that_is_no_sound_volume_is_refused_with_its_name_and_the_reason(what, tmp_path):
    content, message = DAMAGED[what]
    path = tmp_path / "sub-01_T1w.nii.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        nifti.read_volume(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("error, message", [
    (MemoryError(), "no memory left to read it"),
    (OSError(errno.EIO, "Input/output error"), "cannot be read (Input/output error); see to its"),
], ids=str)
@pytest.mark.parametrize("after", [0, 1])
def test_want_of_memory_or_of_a_disk_is_not_a_files_damage(error, message, after, tmp_path,
                                                           monkeypatch):
    path, reads = tmp_path / "sub-01_T1w.nii.gz", []
    path.write_bytes(PACKED)
    read = gzip.GzipFile.read

    def fail(*arguments):
        reads.append(arguments)
        if len(reads) > after:
            raise error
        return read(*arguments)

    monkeypatch.setattr(gzip.GzipFile, "read", fail)
    for reader in (nifti.read_volume, nifti.read_grid):
        reads.clear()
        with pytest.raises(nifti.NotNow, match=re.escape(f"{path}: {message}")):
            reader(path)


def with_pixdim(made, *sizes):
    """Its bytes with other voxel sizes in pixdim; nibabel itself would write what agrees."""
    return raw_with(80, struct.pack("<3f", *sizes), made)


@pytest.mark.parametrize("content", [
    with_forms(1, 1).to_bytes(), with_forms(0, 1).to_bytes(), with_forms(4, 0).to_bytes(),
    big_endian().to_bytes(), big_endian(nib.Nifti2Image).to_bytes(),
    with_pixdim(with_forms(1, 0), 1.01, 1.29, 2.1),  # rounded by another program
    with_pixdim(with_forms(1, 0), 0, 0, 0)])
def test_a_geometry_that_its_header_tells_is_in_no_doubt(content, tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content))
    assert nifti.doubt_geometry(tmp_path / "a.nii.gz") == ""


def test_an_orientation_that_no_header_tells_is_called_a_guess(tmp_path):
    with_forms(0, 0).to_filename(tmp_path / "a.nii.gz")
    assert "a.nii.gz does not say how the head lies" in nifti.doubt_geometry(tmp_path / "a.nii.gz")


def test_two_affines_that_mirror_each_other_leave_left_and_right_in_doubt(tmp_path):
    made = with_forms(1, 1)
    made.set_qform(made.affine @ np.diag([-1, 1, 1, 1]), 1)
    made.to_filename(tmp_path / "a.nii.gz")
    assert "sform and qform mirror each other" in nifti.doubt_geometry(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("content, message", [
    (with_pixdim(with_forms(0, 1), 0, 1.3, 2.1), "pixdim 0 x 1.3 x 2.1 mm gives no voxel size"),
    (with_pixdim(with_forms(0, 0), 1, 1.3, 0), "pixdim 1 x 1.3 x 0 mm gives no voxel size"),
    (with_pixdim(with_forms(2, 1), 1, 1.2, 2.1),
     "voxels are 1 x 1.3 x 2.1 mm by its sform, 1 x 1.2 x 2.1 mm by its pixdim"),
    (b"text", "not a NIfTI file")])
def test_a_voxel_size_that_is_not_told_or_told_twice_is_refused_where_slices_are_made(
        content, message, tmp_path):
    path = tmp_path / "sub-01_T1w.nii"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        nifti.doubt_geometry(path)
    if content != b"text":
        nifti.read_volume(path)  # for translate.py, which writes to the same voxels


BOMBS = {
    "a header alone": (raw_with(42, struct.pack("<3h", 800, 800, 800)), "damaged or cut off"),
    "a megabyte": (raw_with(42, struct.pack("<3h", 500, 500, 500)) + bytes(1 << 20),
                   "bytes for 250,000,000 bytes of voxels"),
    "a packed header": (gzip.compress(raw_with(42, struct.pack("<3h", 800, 800, 800))),
                        "bytes for 1,024,000,000 bytes of voxels"),
    "packed zeros without end": (PACKED + gzip.compress(bytes(100 << 20), 1),
                                 "goes on for more than 64 MiB after the voxels"),
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_small_file_that_claims_gigabytes_is_refused_without_taking_them(what, tmp_path):
    content, message = BOMBS[what]
    (tmp_path / "bomb.nii.gz").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        nifti.read_volume(tmp_path / "bomb.nii.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize("kind", KINDS)
def test_the_grid_of_a_file_can_be_had_from_its_header_alone(kind, tmp_path):
    KINDS[kind]().to_filename(tmp_path / "in.nii.gz")
    grid, whole = nifti.read_grid(tmp_path / "in.nii.gz"), nifti.read_volume(tmp_path / "in.nii.gz")
    assert grid.shape == whole.data.shape
    assert grid.affine.tobytes() == whole.affine.tobytes()
    content = gzip.decompress((tmp_path / "in.nii.gz").read_bytes())
    (tmp_path / "cut.nii").write_bytes(content[:700])
    assert nifti.read_grid(tmp_path / "cut.nii").shape == grid.shape
    with pytest.raises(FileNotFoundError, match="no such file"):
        nifti.read_grid(tmp_path / "none.nii")


def test_a_file_is_not_held_twice_while_it_is_read(tmp_path):
    """The bytes, the file's own order and RAS order: at most two of the three at a time."""
    data = np.random.default_rng(0).integers(0, 99, (120, 110, 100)).astype(np.float32)
    nib.Nifti1Image(data, lay_affine(data.shape, 2, "LPS")).to_filename(tmp_path / "in.nii")
    for path in (tmp_path / "in.nii", tmp_path / "in.nii.gz"):
        path.write_bytes((tmp_path / "in.nii").read_bytes() if path.suffix == ".nii"
                         else gzip.compress((tmp_path / "in.nii").read_bytes(), 1))
        tracemalloc.start()
        nifti.read_volume(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2.3 * data.nbytes


def test_a_missing_file_and_a_link_to_nothing_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        nifti.read_volume(tmp_path / "none.nii")
    (tmp_path / "annexed.nii").symlink_to(".git/annex/objects/XX")
    with pytest.raises(FileNotFoundError, match="datalad get"):
        nifti.read_volume(tmp_path / "annexed.nii")
