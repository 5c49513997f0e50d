"""A name stands for the whole content or for what was there before."""

import errno
import os

import pytest

from data import atomic


def test_what_is_written_replaces_what_was_there_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "a.json"
    for content in (b"first", b"second, longer", b""):
        atomic.write_atomically(path, content)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_failure_on_the_way_keeps_what_was_there_and_names_the_file(at, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    atomic.write_atomically(path, b"before")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if at == "write":
        content = (b for b in [b"x"] if full())
        with pytest.raises(OSError, match="No space left.*a.json"):
            atomic.write_synced(tmp_path / "a.json.new", content)
    else:
        monkeypatch.setattr(atomic.os, at, full)
        with pytest.raises(OSError, match="No space left"):
            atomic.write_atomically(path, b"after")
        assert os.listdir(tmp_path) == ["a.json"]
    assert path.read_bytes() == b"before"
