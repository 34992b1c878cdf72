"""What lies between the input and the shards? For each part a few files of tokens, sorted by the shard they go to.

A spill holds, little endian: for each of n shards, and once more at the end, how many documents and tokens lie before
those of that shard (int64, n + 1 pairs); the documents' lengths (int32); the tokens. What a shard has in a spill is
found by two small reads, however many shards there are: with thousands of both, all pairs of them are looked up.
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
        file.write(np.stack((document_bounds, token_bounds), axis=1).astype("<i8").tobytes())
        file.write(lengths.astype("<i4").tobytes())
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            file.write(documents.tokens[start : start + length].data)

    write_whole(path, write)


class SpilledShard:
    """The documents of one shard, still in the spills; numbered in the order of the input."""

    def __init__(self, spills: Sequence[Path], shard: int, num_shards: int, dtype: np.dtype) -> None:
        self._dtype = dtype
        self._places = [place for spill in spills if (place := _find(spill, shard, num_shards, dtype)).documents]
        lengths = [read_array(place.spill, place.lengths_at, "<i4", place.documents) for place in self._places]
        self.lengths: NDArray[np.int64] = np.concatenate([np.zeros(0, np.int64), *lengths])

    def tokens_of(self, documents: NDArray[np.int64]) -> NDArray:
        """Return the tokens of some documents, one after the other; memory is theirs, and one spill's share."""
        order = np.argsort(documents)
        sorted_documents, lengths = documents[order], self.lengths[documents]
        targets = (np.cumsum(lengths) - lengths)[order]
        tokens = np.empty(int(lengths.sum()), dtype=self._dtype)
        first = 0
        for place in self._places:
            begin, end = np.searchsorted(sorted_documents, (first, first + place.documents)).tolist()
            if begin < end:
                here = self.lengths[first : first + place.documents]
                numbers = sorted_documents[begin:end] - first
                starts, sizes = (np.cumsum(here) - here)[numbers], here[numbers]
                source = read_array(place.spill, place.tokens_at, self._dtype.str, place.tokens)
                for target, start, size in zip(
                    targets[begin:end].tolist(), starts.tolist(), sizes.tolist(), strict=True
                ):
                    tokens[target : target + size] = source[start : start + size]
            first += place.documents
        return tokens


class _Place(NamedTuple):
    """Where the documents of one shard lie in a spill, in bytes, and how many there are."""

    spill: Path
    documents: int
    lengths_at: int
    tokens: int
    tokens_at: int


def _find(spill: Path, shard: int, num_shards: int, dtype: np.dtype) -> _Place:
    documents, tokens, next_documents, next_tokens = read_array(spill, 16 * shard, "<i8", 4).tolist()
    all_documents = int(read_array(spill, 16 * num_shards, "<i8", 1)[0])
    lengths_at = 16 * (num_shards + 1)
    return _Place(
        spill=spill,
        documents=next_documents - documents,
        lengths_at=lengths_at + 4 * documents,
        tokens=next_tokens - tokens,
        tokens_at=lengths_at + 4 * all_documents + dtype.itemsize * tokens,
    )
