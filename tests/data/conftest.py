"""Small shards to read, made with our own writer; `test_shard_format.py` holds that one against Megatron's."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_tools.shard_writer import write_shard

WriteShard = Callable[..., Path]


@pytest.fixture
def write_tokens(tmp_path: Path) -> WriteShard:
    """Return a function that writes documents (or one array) as the shard tmp_path/NAME and returns its prefix."""

    def write(name: str, documents: Sequence[Sequence[int]], dtype: str = "<i4") -> Path:
        write_shard(tmp_path / name, [np.asarray(document, dtype=dtype) for document in documents], np.dtype(dtype))
        return tmp_path / name

    return write
