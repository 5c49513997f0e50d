"""Geometry and intensities of one volume: every axis, flip and half voxel, and each inverse."""

import errno
import gzip
import re
import struct
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from conftest import lay_affine, paint, rigid
from nibabel.affines import apply_affine
from scipy import ndimage

from data import volume as vol
from data.volume import Grid

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
    read = vol.read_volume(tmp_path / "head.nii.gz")
    assert nib.aff2axcodes(read.affine) == ("R", "A", "S")
    expected = paint(read.data.shape, read.affine, extracted=False)
    # the file keeps its affine as float32
    np.testing.assert_allclose(read.data, expected, atol=0.5)
    assert np.abs(read.data - read.data[::-1]).mean() > 5, "a flipped head must not pass"


@pytest.mark.parametrize("kind", KINDS)
def test_reading_and_writing_back_keeps_header_geometry_bit_for_bit_and_every_value(kind, tmp_path):
    KINDS[kind]().to_filename(tmp_path / "in.nii.gz")
    read = vol.read_volume(tmp_path / "in.nii.gz")
    vol.write_like(read, read.data, tmp_path / "out.nii.gz")
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
    read, source = vol.read_volume(tmp_path / "in.nii"), nib.load(tmp_path / "in.nii")
    voxels = np.indices(SHAPE).reshape(3, -1).T
    world = apply_affine(source.affine, voxels)
    there = apply_affine(np.linalg.inv(read.affine), world)
    np.testing.assert_allclose(there, np.rint(there), atol=1e-4)
    i, j, k = np.rint(there).astype(int).T
    np.testing.assert_array_equal(read.data[i, j, k], source.get_fdata().ravel().astype(np.float32))
    assert read.data.dtype == np.float32


def test_a_mask_is_written_as_uint8_and_other_shapes_are_refused(tmp_path):
    image().to_filename(tmp_path / "in.nii.gz")
    read = vol.read_volume(tmp_path / "in.nii.gz")
    vol.write_like(read, read.data > 100, tmp_path / "new" / "mask.nii")
    mask = nib.load(tmp_path / "new" / "mask.nii")
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(mask.dataobj), NUMBERS > 100)
    with pytest.raises(ValueError, match=r"\(3, 3, 3\).*\(12, 10, 9\)"):
        vol.write_like(read, np.zeros((3, 3, 3)), tmp_path / "no.nii")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["mask.nii"]


def test_a_written_file_depends_on_nothing_but_its_content(tmp_path):
    read = vol.volume_from_image(image())
    for name in ("a.nii.gz", "b.nii.gz"):
        vol.write_like(read, read.data, tmp_path / name)
    content = (tmp_path / "a.nii.gz").read_bytes()
    assert content == (tmp_path / "b.nii.gz").read_bytes()
    assert content[4:8] == bytes(4), "no time of day in the gzip header"


def test_compression_is_told_by_the_content_not_by_the_name(tmp_path):
    raw = image().to_bytes()
    (tmp_path / "packed.nii").write_bytes(gzip.compress(raw))
    (tmp_path / "plain.nii.gz").write_bytes(raw)
    for name in ("packed.nii", "plain.nii.gz"):
        read = vol.read_volume(tmp_path / name)
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
        vol.read_volume(path)
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
    for reader in (vol.read_volume, vol.read_grid):
        reads.clear()
        with pytest.raises(vol.NotNow, match=re.escape(f"{path}: {message}")):
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
    assert vol.doubt_geometry(tmp_path / "a.nii.gz") == ""


def test_an_orientation_that_no_header_tells_is_called_a_guess(tmp_path):
    with_forms(0, 0).to_filename(tmp_path / "a.nii.gz")
    assert "a.nii.gz does not say how the head lies" in vol.doubt_geometry(tmp_path / "a.nii.gz")


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
        vol.doubt_geometry(path)
    if content != b"text":
        vol.read_volume(path)  # for translate.py, which writes to the same voxels


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
        vol.read_volume(tmp_path / "bomb.nii.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize("kind", KINDS)
def test_the_grid_of_a_file_can_be_had_from_its_header_alone(kind, tmp_path):
    KINDS[kind]().to_filename(tmp_path / "in.nii.gz")
    grid, whole = vol.read_grid(tmp_path / "in.nii.gz"), vol.read_volume(tmp_path / "in.nii.gz")
    assert grid.shape == whole.data.shape
    assert grid.affine.tobytes() == whole.affine.tobytes()
    content = gzip.decompress((tmp_path / "in.nii.gz").read_bytes())
    (tmp_path / "cut.nii").write_bytes(content[:700])
    assert vol.read_grid(tmp_path / "cut.nii").shape == grid.shape
    with pytest.raises(FileNotFoundError, match="no such file"):
        vol.read_grid(tmp_path / "none.nii")


def test_a_file_is_not_held_twice_while_it_is_read(tmp_path):
    """The bytes, the file's own order and RAS order: at most two of the three at a time."""
    data = np.random.default_rng(0).integers(0, 99, (120, 110, 100)).astype(np.float32)
    nib.Nifti1Image(data, lay_affine(data.shape, 2, "LPS")).to_filename(tmp_path / "in.nii")
    for path in (tmp_path / "in.nii", tmp_path / "in.nii.gz"):
        path.write_bytes((tmp_path / "in.nii").read_bytes() if path.suffix == ".nii"
                         else gzip.compress((tmp_path / "in.nii").read_bytes(), 1))
        tracemalloc.start()
        vol.read_volume(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2.3 * data.nbytes


def test_a_missing_file_and_a_link_to_nothing_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        vol.read_volume(tmp_path / "none.nii")
    (tmp_path / "annexed.nii").symlink_to(".git/annex/objects/XX")
    with pytest.raises(FileNotFoundError, match="datalad get"):
        vol.read_volume(tmp_path / "annexed.nii")


# ------------------------------------------------------------------------------------- geometry


def grid_between(axes, shape, spacing, **how):
    return Grid(shape, lay_affine(shape, spacing, axes, **how))


SOURCE = grid_between("RAS", (14, 17, 11), (2, 1.5, 3), turn_deg=(12, -7, 25), middle=(4, -6, 3))
TARGETS = {
    "straight": grid_between("RAS", (21, 22, 25), (1.2, 1.4, 1.3)),
    "oblique": grid_between("RAS", (19, 23, 21), (1.4, 1.3, 1.4), turn_deg=(-9, 14, -30)),
    "flipped": grid_between("LPI", (21, 22, 25), (1.2, 1.4, 1.3), turn_deg=(5, 5, 5)),
}
MOVE = rigid((6, -10, 8), (3, -2, 4))


def indices_in_source(grid, matrix):
    points = np.indices(grid.shape).reshape(3, -1).T
    world = apply_affine(matrix, apply_affine(grid.affine, points))
    return apply_affine(np.linalg.inv(SOURCE.affine), world).T


@pytest.mark.parametrize("matrix", [None, MOVE], ids=["headers", "registered"])
@pytest.mark.parametrize("target", TARGETS)
def test_resampling_is_linear_interpolation_at_the_world_coordinates_of_each_voxel(target, matrix):
    data = np.random.default_rng(1).uniform(50, 100, SOURCE.shape).astype(np.float32)
    grid = TARGETS[target]
    index = indices_in_source(grid, np.eye(4) if matrix is None else matrix)
    inside = np.all((index > -0.5) & (index < np.array(SOURCE.shape)[:, None] - 0.5), axis=0)
    expected = np.where(inside, ndimage.map_coordinates(data, index, order=1, mode="nearest"), 0)
    got = vol.resample(data, SOURCE.affine, grid, matrix=matrix)
    assert got.shape == grid.shape and got.dtype == np.float32
    assert 0.2 < inside.mean() < 0.9, "the two boxes must meet in part"
    np.testing.assert_allclose(got.ravel(), expected, atol=2e-2)


def test_resampling_a_mask_takes_the_nearest_voxel_and_stays_boolean():
    mask = np.random.default_rng(2).random(SOURCE.shape) < 0.5
    index = indices_in_source(TARGETS["oblique"], MOVE)
    inside = np.all((index > -0.5) & (index < np.array(SOURCE.shape)[:, None] - 0.5), axis=0)
    expected = ndimage.map_coordinates(mask.astype(float), index, order=0, mode="nearest") * inside
    got = vol.resample(mask, SOURCE.affine, TARGETS["oblique"], matrix=MOVE, nearest=True)
    assert got.dtype == bool
    assert (got.ravel() == expected.astype(bool)).mean() > 0.9999


def test_nearest_neighbour_keeps_labels_of_any_type():
    labels = np.random.default_rng(2).integers(0, 5, SOURCE.shape).astype(np.int16)
    got = vol.resample(labels, SOURCE.affine, TARGETS["oblique"], nearest=True)
    assert got.dtype == np.float32 and set(np.unique(got)) == {0, 1, 2, 3, 4}


def test_field_of_view_is_the_box_of_voxels_with_their_halves():
    for grid, matrix in ((TARGETS["oblique"], MOVE), (TARGETS["flipped"], None)):
        index = indices_in_source(grid, np.eye(4) if matrix is None else matrix)
        brute = np.array([all(-0.5 <= c <= n - 0.5 for c, n in zip(place, SOURCE.shape))
                          for place in index.T]).reshape(grid.shape)
        got = vol.field_of_view(SOURCE.shape, SOURCE.affine, grid, matrix)
        np.testing.assert_array_equal(got, brute)
        filled = vol.resample(np.ones(SOURCE.shape, np.float32), SOURCE.affine, grid, matrix=matrix)
        np.testing.assert_array_equal(got, filled > 0.5)


def test_the_same_grid_is_not_interpolated_at_all():
    data = np.random.default_rng(3).normal(size=SOURCE.shape).astype(np.float32)
    same = vol.resample(data, SOURCE.affine, Grid(SOURCE.shape, SOURCE.affine.copy()))
    np.testing.assert_array_equal(same, data)
    assert same is not data and not np.shares_memory(same, data)


def test_same_grid_notices_a_hundredth_of_a_millimetre_and_another_shape():
    other = SOURCE.affine.copy()
    other[1, 3] += 0.02
    assert not vol.same_grid(SOURCE, Grid(SOURCE.shape, other))
    assert not vol.same_grid(SOURCE, Grid((14, 17, 12), SOURCE.affine))
    assert not vol.same_grid(SOURCE, Grid(SOURCE.shape, rigid((0, 0, 0.1)) @ SOURCE.affine))
    rounded = SOURCE.affine.astype(np.float32).astype(float)
    assert vol.same_grid(SOURCE, Grid(SOURCE.shape, rounded))


def test_a_coarser_grid_is_blurred_first_and_only_along_its_coarse_axes():
    """A turn by 90 degrees about x lays the target's coarse k along the source's j."""
    shape = (15, 20, 15)
    data = np.random.default_rng(4).normal(100, 20, shape).astype(np.float32)
    affine = lay_affine(shape, 1)
    target = Grid((15, 15, 5), lay_affine((15, 15, 5), (1, 1, 4)))
    got = vol.resample(data, affine, target, matrix=rigid((90, 0, 0)))
    # full widths at half maximum add as squares: 4^2 = 1^2 + (2.355 sigma)^2
    sigma = np.sqrt(4 ** 2 - 1) / 2.355
    blurred = ndimage.gaussian_filter1d(data, sigma, axis=1, mode="nearest", truncate=3)
    points = np.indices(target.shape).reshape(3, -1).T
    index = apply_affine(np.linalg.inv(affine) @ rigid((90, 0, 0)) @ target.affine, points).T
    expected = ndimage.map_coordinates(blurred, index, order=1, mode="nearest")
    np.testing.assert_allclose(got.ravel(), expected, atol=1e-2)


def test_resampling_leaves_its_source_as_it_was():
    """The blur works in place, on a copy."""
    data = np.random.default_rng(4).normal(100, 20, (15, 20, 15)).astype(np.float32)
    coarse = Grid((5, 6, 5), lay_affine((5, 6, 5), 3))
    for source in (data, np.asfortranarray(data), data[::-1, ::-1]):
        before = source.copy()
        vol.resample(source, lay_affine(data.shape, 1), coarse)
        np.testing.assert_array_equal(source, before)


@pytest.mark.parametrize("axes", ["RAS", "LAS"])
def test_resampling_to_a_coarser_grid_moves_nothing(axes):
    shape = (60, 70, 50)
    affine = lay_affine(shape, (1, 1.2, 1.5), "RAS", turn_deg=(5, 10, -15))
    middle = np.array([6.3, -9.1, 4.7])
    world = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    blob = np.exp(-((world - middle) ** 2).sum(-1) / (2 * 6 ** 2)).astype(np.float32)
    coarse = Grid((30, 34, 26), lay_affine((30, 34, 26), (2.5, 2.6, 3), axes))
    moved = vol.resample(blob, affine, coarse)
    found = apply_affine(coarse.affine, ndimage.center_of_mass(moved))
    np.testing.assert_allclose(found, middle, atol=0.03)


def make_volume(shape, affine, **how):
    return vol.volume_from_image(nib.Nifti1Image(paint(shape, affine, **how), affine))


def test_the_slicing_grid_keeps_axes_and_middle_and_covers_the_whole_field_of_view():
    scan = make_volume((40, 50, 30), lay_affine((40, 50, 30), (4.1, 3.7, 4.5), turn_deg=(9, 4, 2)))
    grid = vol.slicing_grid(scan, 3.0)
    np.testing.assert_allclose(grid.spacing_mm, [3.0, 3.0, 4.5])
    turned = [a[:3, :3] / vol.nib.affines.voxel_sizes(a) for a in (grid.affine, scan.affine)]
    np.testing.assert_allclose(*turned, atol=1e-9)
    middles = [apply_affine(g.affine, (np.array(g.shape) - 1) / 2)
               for g in (grid, vol.grid_of(scan))]
    np.testing.assert_allclose(*middles, atol=1e-9)
    box, native = np.array(grid.shape) * grid.spacing_mm, np.array((40, 50, 30)) * scan.spacing_mm
    assert (box >= native - 1e-6).all() and (box < native + grid.spacing_mm).all()


def test_along_k_the_slicing_grid_only_ever_gets_coarser():
    shape = (30, 30, 60)
    fine, thick = (make_volume(shape, lay_affine(shape, (4, 4, k))) for k in (1.0, 4.0))
    np.testing.assert_allclose(vol.slicing_grid(fine, 1.5).spacing_mm, 1.5)
    assert vol.slicing_grid(fine, 1.5).shape == (80, 80, 40)
    np.testing.assert_allclose(vol.slicing_grid(thick, 1.5).spacing_mm, [1.5, 1.5, 4.0])
    assert vol.slicing_grid(thick, 1.5).shape[2] == 60


def test_a_scan_that_has_the_spacing_already_keeps_its_own_voxels():
    shape = (36, 46, 28)
    scan = make_volume(shape, lay_affine(shape, (4.0003, 3.9996, 5)))
    grid = vol.slicing_grid(scan, 4.0)
    assert grid.shape == shape
    assert grid.affine[:3, :3].tobytes() == scan.affine[:3, :3].tobytes()
    np.testing.assert_array_equal(vol.resample(scan.data, scan.affine, grid), scan.data)


# ------------------------------------------------------------------------------------ intensity


def test_zero_becomes_minus_one_and_the_percentile_one():
    data = np.linspace(0, 1000, 1001, dtype=np.float32).reshape(7, 11, 13)
    mask = np.ones(data.shape, bool)
    by = vol.fit_scale(data, mask, upper=90)
    assert by == vol.IntensityScale(0.0, 900.0)
    scaled = vol.scale(data, mask, by)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled.ravel()[[0, 450, 900, 1000]], [-1, 0, 1, 1], atol=1e-6)


def test_the_scale_is_that_of_the_brain_alone_and_background_is_exactly_minus_one():
    data = np.random.default_rng(5).uniform(1, 100, (8, 9, 10)).astype(np.float32)
    mask = np.zeros(data.shape, bool)
    mask[2:6, 2:6, 2:6] = True
    wild = np.where(mask, data, 1e6).astype(np.float32)
    assert vol.fit_scale(wild, mask) == vol.fit_scale(data, mask)
    scaled = vol.scale(wild, mask, vol.fit_scale(wild, mask))
    assert (scaled[~mask] == -1).all() and (scaled[mask] > -1).all()


@pytest.mark.parametrize("shift", [0, -40], ids=["magnitude", "z-scored"])
def test_unscale_undoes_scale_except_where_that_clipped(shift):
    data = np.random.default_rng(6).uniform(0, 80, (12, 12, 12)).astype(np.float32) + shift
    mask = np.ones(data.shape, bool)
    by = vol.fit_scale(data, mask)
    back = vol.unscale(vol.scale(data, mask, by), by)
    held = (data >= by.low) & (data <= by.high)
    assert held.mean() > 0.98
    np.testing.assert_allclose(back[held], data[held], atol=1e-4)
    clipped = np.clip(data, by.low, by.high)
    np.testing.assert_allclose(back, clipped, atol=1e-4)
    assert back.max() == pytest.approx(by.high, abs=1e-4)


def test_a_few_negative_leftovers_keep_zero_as_the_floor_and_a_shifted_volume_gets_its_own():
    data = np.random.default_rng(7).uniform(1, 100, 10_000).astype(np.float32).reshape(10, 100, 10)
    mask = np.ones(data.shape, bool)
    data.ravel()[:150] = -5  # 1.5 %
    assert vol.fit_scale(data, mask).low == 0
    data.ravel()[:250] = -5  # 2.5 %
    assert vol.fit_scale(data, mask).low == -5
    dark = data - 500  # a brain below zero throughout
    assert -506 < vol.fit_scale(dark, mask).low < vol.fit_scale(dark, mask).high < -400


def test_a_brain_without_contrast_and_an_empty_mask_are_refused_by_file_name():
    data = np.full((8, 8, 8), 7.0, np.float32)
    data[0] = 0
    with pytest.raises(ValueError, match="x.nii: the brain mask covers none"):
        vol.fit_scale(data, np.zeros(data.shape, bool), path="x.nii")
    with pytest.raises(ValueError, match="x.nii: the brain has no contrast"):
        vol.fit_scale(data * 0, data > 1, path="x.nii")


def blob(inside, outside=0.0):
    """A ball of 40 mm radius on 2 mm voxels, its mask, and both on a coarser grid."""
    affine = lay_affine((48, 48, 48), (2, 2, 2))
    mask = np.linalg.norm(np.indices((48, 48, 48)) - 23.5, axis=0) < 20
    data = np.where(mask, inside, outside).astype(np.float32)
    grid = vol.Grid((30, 30, 30), lay_affine((30, 30, 30), (3.1, 3.1, 3.1), middle=(0.3, 0.2, 0.1)))
    return (data, mask), (vol.resample(data, affine, grid),
                          vol.resample(mask, affine, grid, nearest=True))


@pytest.mark.parametrize("outside", [0, 90])
def test_a_brain_of_one_value_is_refused_whatever_is_around_it_and_on_any_grid(outside):
    for data, mask in blob(5, outside):
        with pytest.raises(ValueError, match=r"x.nii: the brain has no contrast \(all about 5\)"):
            vol.fit_scale(data, mask, path="x.nii")
    (data, mask), _ = blob(5)
    data[20:26, 20:23, 20:23] = 9  # 54 of 33 000 voxels: a speck is no contrast
    with pytest.raises(ValueError, match="no contrast"):
        vol.fit_scale(data, mask)
    thin = np.zeros(mask.shape, bool)
    thin[:, :, 24] = mask[:, :, 24]  # all rim
    with pytest.raises(ValueError, match="no contrast"):
        vol.fit_scale(np.where(thin, 5, 0).astype(np.float32), thin)


def test_a_little_contrast_is_enough_for_a_scale_far_from_zero_or_of_two_values():
    draws = np.random.default_rng(8)
    (data, mask), _ = blob(1)
    noisy = (10_000 + draws.uniform(0, 1, data.shape)).astype(np.float32)
    assert vol.fit_scale(noisy, mask) == vol.IntensityScale(0, pytest.approx(10_001, abs=0.1))
    two = np.where(draws.random(data.shape) < 0.1, 2, data).astype(np.float32)
    assert vol.fit_scale(two, mask).high == 2
    assert vol.fit_scale((1e-9 * two).astype(np.float32), mask).high == pytest.approx(2e-9)


# ----------------------------------------------------------------------------- frame and slices


def test_cropping_and_padding_put_the_centre_at_half_the_size_and_come_back_bit_equal():
    draws = np.random.default_rng(8)
    for _ in range(60):
        shape = tuple(int(n) for n in draws.integers(5, 40, 3))
        centre = tuple(int(draws.integers(0, n)) for n in shape[:2])
        size = int(draws.integers(2, 12)) * 4
        data = draws.normal(size=shape).astype(np.float32)
        framed = vol.crop_or_pad(data, centre, size)
        assert framed.shape == (size, size, shape[2])
        expected = np.full_like(framed, -1)
        kept = np.zeros(shape, bool)
        for i in range(shape[0]):
            for j in range(shape[1]):
                u, v = i - centre[0] + size // 2, j - centre[1] + size // 2
                if 0 <= u < size and 0 <= v < size:
                    expected[u, v], kept[i, j] = data[i, j], True
        np.testing.assert_array_equal(framed, expected)
        back = vol.undo_crop_or_pad(framed, shape, centre)
        np.testing.assert_array_equal(back, np.where(kept, data, -1))
        np.testing.assert_array_equal(vol.crop_or_pad(back, centre, size), framed)


def test_a_frame_beside_the_volume_is_all_fill():
    data = np.ones((5, 6, 3), np.float32)
    for centre in ((-30, 2), (40, 2), (2, 50), (2, -50)):
        assert (vol.crop_or_pad(data, centre, 8) == -1).all()
        back = vol.undo_crop_or_pad(vol.crop_or_pad(data, centre, 8), (5, 6, 3), centre)
        assert back.shape == data.shape and (back == -1).all()


def test_the_frame_is_centred_on_the_mask():
    mask = np.zeros((50, 60, 5), bool)
    mask[7:21, 30:52, 1:3] = True
    framed = vol.crop_or_pad(mask, vol.mask_centre(mask), 24, fill=False)
    i, j = (np.flatnonzero(framed.any(axis=a)) for a in ((1, 2), (0, 2)))
    assert (i[0], i[-1]) == (5, 18) and (j[0], j[-1]) == (1, 22)
    assert framed.sum() == mask.sum()
    with pytest.raises(ValueError, match="empty"):
        vol.mask_centre(np.zeros((4, 4, 4), bool))


def test_slices_run_upwards_with_anterior_on_top_and_the_right_side_at_the_end_of_a_row():
    data = np.zeros((4, 5, 6))
    data[3, 4, 5] = 1  # right, anterior, superior
    data[0, 1, 2] = 2
    slices = vol.to_slices(data)
    assert slices.shape == (6, 5, 4)
    assert slices[5, 0, 3] == 1 and slices[2, 3, 0] == 2 and slices.sum() == 3


def test_from_slices_undoes_to_slices():
    data = np.random.default_rng(9).normal(size=(4, 5, 6)).astype(np.float32)
    np.testing.assert_array_equal(vol.from_slices(vol.to_slices(data)), data)


# ------------------------------------------------------------------- one volume, there and back


def test_place_and_restore_on_the_scans_own_voxels_give_it_back_exactly():
    shape = (38, 48, 29)
    scan = make_volume(shape, lay_affine(shape, (4, 4, 5), turn_deg=(8, 3, -5), middle=(20, 9, 0)))
    mask = scan.data > 0
    grid = vol.slicing_grid(scan, 4.0)
    slices, placement = vol.place(scan.data, mask, grid, 48)
    assert slices.shape == (29, 48, 48) and placement.cut_share == 0
    assert slices.min() == -1 and slices.max() == 1
    back = vol.restore(slices, mask, placement, vol.grid_of(scan))
    expected = np.clip(scan.data / placement.scale.high, 0, 1)
    np.testing.assert_allclose(back[mask], expected[mask], atol=1e-6)


def test_place_and_restore_through_another_spacing_stay_within_interpolation_error():
    shape = (58, 72, 30)
    scan = make_volume(shape, lay_affine(shape, (2.6, 2.6, 5), turn_deg=(8, 3, -5)))
    mask = scan.data > 0
    grid = vol.slicing_grid(scan, 2.0)
    on_grid = vol.resample(mask, scan.affine, grid, nearest=True)
    slices, placement = vol.place(vol.resample(scan.data, scan.affine, grid), on_grid, grid, 96)
    back = vol.restore(slices, on_grid, placement, vol.grid_of(scan))
    expected = np.clip(scan.data / placement.scale.high, 0, 1)
    error = np.abs(back - expected)[mask]
    deep = ndimage.binary_erosion(mask, iterations=2)
    assert error.mean() < 0.01 and np.abs(back - expected)[deep].max() < 0.04
    for axis in range(3):
        shifted = np.abs(np.roll(back, 1, axis) - expected)[mask].mean()
        flipped = np.abs(np.flip(back, axis) - expected)[mask].mean()
        assert min(shifted, flipped) > 3 * error.mean(), "one voxel off must be worse"


def test_restoring_keeps_the_rim_of_the_brain_free_of_background():
    shape = (40, 40, 20)
    affine = lay_affine(shape, (4, 4, 5), turn_deg=(0, 0, 12))
    ball = np.linalg.norm(apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)), axis=-1) < 45
    data = np.where(ball, 500, 0).astype(np.float32)
    data[:18][ball[:18]] = 400
    grid = Grid(shape, affine)
    slices, placement = vol.place(data, ball, grid, 32)
    target = Grid((120, 120, 60), lay_affine((120, 120, 60), 1.4, turn_deg=(0, 0, 5)))
    fine = vol.resample(ball, affine, target, nearest=True)
    back = vol.restore(slices, ball, placement, target)
    assert back[fine].min() > 0.79


def test_what_the_frame_cuts_off_is_counted():
    data = np.random.default_rng(10).uniform(1, 2, (40, 20, 4)).astype(np.float32)
    mask = np.ones(data.shape, bool)
    _, placement = vol.place(data, mask, Grid(data.shape, np.eye(4)), 32)
    assert placement.cut_share == pytest.approx(8 / 40)
