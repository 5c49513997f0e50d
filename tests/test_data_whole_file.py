"""data/whole_file.py: what counts as a whole scan or text."""

import contextlib
import gzip
import sys
import zlib

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("graphql", reason="the local server needs graphql-core")

from data import whole_file  # noqa: E402
from data.nifti import read_volume  # noqa: E402
from data.whole_file import Checker, Damaged, Helper, inspect  # noqa: E402
from small_archive import write_scan  # noqa: E402
from small_archive import quiet_environment_fixture  # noqa: E402, F401


def broken(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def nifti(tmp_path, **kind):
    path = tmp_path / "x.nii"
    image = nib.Nifti2Image if kind.get("version") == 2 else nib.Nifti1Image
    image(np.ones((9, 9, 9), np.int16), np.eye(4)).to_filename(path)
    return path.read_bytes()


@pytest.mark.parametrize("version", [1, 2])
def test_a_nifti_file_is_whole_with_and_without_gzip(tmp_path, version):
    content = nifti(tmp_path, version=version)
    inspect(broken(tmp_path, "a.nii", content), "a.nii")
    packed = gzip.compress(content[:500]) + gzip.compress(content[500:])  # two members are legal
    assert inspect(broken(tmp_path, "a.part", packed), "a.nii.gz")["size"] == len(packed)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("length", [16, 180, 400, 60_000])
def test_a_header_with_a_long_extension_is_as_good_as_one_without(tmp_path, version, length):
    """AFNI writes such; only the first bytes of a file are kept to judge its header by."""
    kind = nib.Nifti2Image if version == 2 else nib.Nifti1Image
    image = kind(np.ones((9, 9, 9), np.int16), np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("afni", b"<" * length))
    for name in ("a.nii", "a.nii.gz"):
        image.to_filename(tmp_path / name)
        assert inspect(tmp_path / name, name)["size"] == (tmp_path / name).stat().st_size
    whole = (tmp_path / "a.nii").read_bytes()
    with pytest.raises(Damaged, match="cut off"):
        inspect(broken(tmp_path, "b.nii", whole[:-1]), "b.nii")


def test_damaged_files_of_all_kinds_are_told_from_whole_ones(tmp_path):
    content = nifti(tmp_path)
    packed = gzip.compress(content)
    cases = {
        "a.nii.gz": [b"", packed[:-1], packed[:-9], packed[:40], content[:-1],
                     packed[:-8] + b"\0" * 8, packed[:60] + b"\xff" + packed[61:],
                     gzip.compress(b""), gzip.compress(content[:-1]), gzip.compress(b"\0" * 2000),
                     gzip.compress(packed), b'{"error": "x"}', b"<html>"],
        "a.nii": [b"", content[:-1], content[:300], packed[:-1], packed[:1],
                  b"\0" * 2000, b"\n <!doctype HTML>"],
        "a.json": [b"", b"{", b'{"error": "x"}', b"<html>", b'{"a": 1', "ü".encode("latin-1")],
        "a.tsv": [b'{"error": "file not found"}', b"<html><body>", b"<?xml version='1.0'?>"],
        "README": [b'{"error": "x", "code": 1}', b"<head>"]}
    for name, contents in cases.items():
        for bad in contents:
            with pytest.raises(Damaged):
                inspect(broken(tmp_path, "file.part", bad), name)
    for name, good in {"a.json": b'\xef\xbb\xbf{"a": 1}', "b.json": b'{"errors": 0.1, "b": 1}',
                       "README": b"", "README.md": b"<p align=center>Heads</p>",
                       "a.tsv": "id\tname\n1\tü".encode("latin-1")}.items():
        inspect(broken(tmp_path, "file.part", good), name)


@pytest.mark.parametrize("step", [1, 100_000])
def test_compression_is_told_by_the_content_of_a_nifti_file_and_not_by_its_name(tmp_path, step):
    write_scan(tmp_path / "x.nii", 0, side=9)
    content = (tmp_path / "x.nii").read_bytes()
    for name, stored in (("a.nii.gz", content), ("a.nii", gzip.compress(content))):
        checker = Checker(name)
        for start in range(0, len(stored), step):
            checker.feed(stored[start:start + step])
        assert checker.finish()["size"] == len(stored)
        assert read_volume(broken(tmp_path, name, stored)).data.shape == (9, 9, 9)


def test_nibabel_checks_the_header_of_every_file(tmp_path, caplog):
    content = bytearray(nifti(tmp_path))
    inspect(broken(tmp_path, "a.nii", bytes(content)), "a.nii")
    assert not caplog.messages
    content[252:254] = (99).to_bytes(2, sys.byteorder)  # qform_code, of which there are five
    inspect(broken(tmp_path, "a.nii", bytes(content)), "a.nii")
    assert "qform_code" in caplog.text


@pytest.mark.parametrize("library", ["zlib", "isal.isal_zlib"])
def test_a_flipped_bit_is_found_with_either_library(tmp_path, monkeypatch, library):
    module = pytest.importorskip(library)
    monkeypatch.setattr(whole_file, "inflate", module)
    monkeypatch.setattr(whole_file, "InflateError", module.error)
    content = nifti(tmp_path)
    packed = gzip.compress(content)
    assert verdict(packed) == ""
    for bit in range(80, 8 * len(packed)):  # the ten bytes before are its time and the like
        flipped = bytearray(packed)
        flipped[bit // 8] ^= 1 << bit % 8
        harmless = zlib.decompressobj(31)  # of bits that pad, or of a copy from elsewhere
        with contextlib.suppress(zlib.error):
            if harmless.decompress(bytes(flipped)) == content and harmless.eof:
                continue
        assert verdict(bytes(flipped)), bit
    assert all(verdict(packed[:size]) for size in range(len(packed)))


def verdict(packed):
    """What is wrong with the bytes of a `.nii.gz`, "" if nothing is."""
    checker = Checker("a.nii.gz")
    try:
        checker.feed(packed)
        checker.finish()
    except Damaged as error:
        return str(error)
    return ""


def test_a_helper_judges_as_one_thread_does(tmp_path):
    write_scan(tmp_path / "a.nii.gz", 1, side=128)
    packed = (tmp_path / "a.nii.gz").read_bytes()
    damaged = packed[:-90_000] + bytes(8) + packed[-89_992:]
    helper = Helper()
    for content in (packed, damaged, packed[:-1]):
        checker = Checker("a.nii.gz", helper)
        with contextlib.nullcontext() if content == packed else pytest.raises(Damaged):
            for start in range(0, len(content), 1 << 16):
                checker.feed(content[start:start + (1 << 16)])
            assert checker.finish() == inspect(tmp_path / "a.nii.gz", "a.nii.gz")
    helper.close()
