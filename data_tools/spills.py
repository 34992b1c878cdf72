"""What lies between the input and the shards? For each part a few files of tokens, sorted by the shard they go to.

A spill holds, little endian: the number of shards n; n + 1 document bounds and n + 1 token bounds (int64), so that
shard s has the documents and tokens between bounds s and s + 1; the documents' lengths (int32); the tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.shard_writer import TokenizedDocuments, write_whole
from nemotron_train.data.permutation import splitmix64, splitmix64_array
from nemotron_train.data.shard_format import read_array


def shards_of(part: int, first: int, count: int, seed: int, num_shards: int) -> NDArray[np.int64]:
    """Return the shard of documents number `first` ... of a part: a hash of their place."""
    key = np.uint64(splitmix64(splitmix64(seed) ^ part))
    numbers = np.arange(first, first + count, dtype=np.uint64)
    return (splitmix64_array(splitmix64_array(numbers) ^ key) % np.uint64(num_shards)).astype(np.int64)


def write_spill(path: Path, documents: TokenizedDocuments, shards: NDArray[np.int64], num_shards: int) -> None:
    """Write documents, each with its shard."""
    order = np.argsort(shards, kind="stable")
    lengths = documents.lengths[order]
    starts = (np.cumsum(documents.lengths) - documents.lengths)[order]
    document_bounds = np.searchsorted(shards[order], np.arange(num_shards + 1))
    token_bounds = np.concatenate(([0], np.cumsum(lengths)))[document_bounds]

    def write(file: BinaryIO) -> None:
        for array in (np.array([num_shards]), document_bounds, token_bounds):
            file.write(array.astype("<i8").tobytes())
        file.write(lengths.astype("<i4").tobytes())
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            file.write(documents.tokens[start : start + length].tobytes())

    write_whole(path, write)


def gather(spills: Sequence[Path], shard: int, dtype: np.dtype) -> TokenizedDocuments:
    """Put the documents of a shard together, in the order of the input; memory is that of the shard."""
    places = [_place(spill, shard, dtype) for spill in spills]
    tokens = np.empty(sum(place.tokens for place in places), dtype=dtype)
    lengths = np.empty(sum(place.documents for place in places), dtype=np.int64)
    token, document = 0, 0
    for spill, place in zip(spills, places, strict=True):
        tokens[token : token + place.tokens] = read_array(spill, place.tokens_at, dtype.str, place.tokens)
        lengths[document : document + place.documents] = read_array(spill, place.lengths_at, "<i4", place.documents)
        token, document = token + place.tokens, document + place.documents
    return TokenizedDocuments(tokens, lengths)


class _Place(NamedTuple):
    """Where the documents of one shard lie in a spill, in bytes, and how many there are."""

    documents: int
    lengths_at: int
    tokens: int
    tokens_at: int


def _place(spill: Path, shard: int, dtype: np.dtype) -> _Place:
    num_shards = int(read_array(spill, 0, "<i8", 1)[0])
    bounds = read_array(spill, 8, "<i8", 2 * (num_shards + 1))
    document_bounds, token_bounds = bounds[: num_shards + 1].tolist(), bounds[num_shards + 1 :].tolist()
    lengths_at = 8 * (3 + 2 * num_shards)
    tokens_at = lengths_at + 4 * document_bounds[-1]
    return _Place(
        documents=document_bounds[shard + 1] - document_bounds[shard],
        lengths_at=lengths_at + 4 * document_bounds[shard],
        tokens=token_bounds[shard + 1] - token_bounds[shard],
        tokens_at=tokens_at + dtype.itemsize * token_bounds[shard],
    )
