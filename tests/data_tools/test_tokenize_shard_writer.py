"""Oracle: what is in the folder at the very moment of writing, and after a write that failed half way."""

import errno
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from data_tools import shard_writer
from data_tools.shard_writer import write_shard, write_whole
from nemotron_train.errors import DataError


def test_a_file_keeps_its_old_content_until_the_new_one_is_whole(tmp_path: Path) -> None:
    """Fails if a reader, or a kill, in the middle of writing finds half a file under the final name."""
    path = tmp_path / "web_00000.bin"
    path.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"new" * 1_000_000)
        assert path.read_bytes() == b"old"

    write_whole(path, write)
    assert path.read_bytes() == b"new" * 1_000_000
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    """Fails if half a file stays behind, or the user gets a traceback."""

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match=r"web_00000\.bin cannot be written: No space left on device"):
        write_whole(tmp_path / "web_00000.bin", write)
    assert list(tmp_path.iterdir()) == []


def test_the_index_appears_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if there is a moment in which a shard has an index but not yet its tokens."""

    def stop(*_: object) -> None:
        assert (tmp_path / "web_00000.bin").stat().st_size == 40
        raise OSError(errno.EIO, "stopped here")

    monkeypatch.setattr(shard_writer, "write_index", stop)
    with pytest.raises(DataError, match=r"web_00000\.idx cannot be written"):
        write_shard(tmp_path / "web_00000", [np.arange(10)], np.dtype("<i4"))
    assert [path.name for path in tmp_path.iterdir()] == ["web_00000.bin"]
