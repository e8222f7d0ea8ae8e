"""The digest of a large file is taken while it is written."""

import hashlib
import os
from pathlib import Path

import pytest

from sdd.store import hashed
from sdd.store.hashed import CHUNK, HashedFile, taken_digest


def test_bytes_and_digest_are_those_of_a_plain_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(2 * CHUNK + 12_345)
    source, path = tmp_path / "source", tmp_path / "file"
    source.write_bytes(data)
    with source.open("rb") as reader, HashedFile(path) as writer:
        writer.write(b"head")
        writer.write(b"")
        reader.seek(100)
        writer.copy(reader, CHUNK + 7)
        writer.write(memoryview(data))
        reader.seek(0)
        for _ in range(3):
            writer.copy(reader, 5)
    expected = b"head" + data[100 : CHUNK + 107] + data + data[:15]
    assert path.read_bytes() == expected
    monkeypatch.setattr(hashed, "file_digest", lambda path: pytest.fail("read again"))
    assert taken_digest(path) == hashlib.sha256(expected).hexdigest()


def test_a_file_that_has_changed_since_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with HashedFile(path) as writer:
        writer.write(b"before")
    path.write_bytes(b"afterwards")
    assert taken_digest(path) == hashlib.sha256(b"afterwards").hexdigest()


def test_a_file_that_was_cut_short_is_read(tmp_path: Path) -> None:
    source, path = tmp_path / "source", tmp_path / "file"
    source.write_bytes(b"123")
    with pytest.raises(AssertionError), source.open("rb") as reader, HashedFile(path) as writer:
        writer.copy(reader, 4)
    assert taken_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
