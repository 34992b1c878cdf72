"""What does one process do for `tokenize`? Turn a part of the input into spills, or the spills of all into a shard.

Both leave their result under its final name only when it is whole, and do nothing if it is there already: a job that
was killed is started again and goes on.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.documents import Document
from data_tools.encoders import DocumentEncoder
from data_tools.parts import Part
from data_tools.shard_writer import ShardOrigin, TokenizedDocuments, write_shuffled_shard, write_whole
from data_tools.source_record import TokenizeSettings
from data_tools.spills import SpilledShard, shards_of, write_spill
from nemotron_train.data.shard_format import bin_path, idx_path
from nemotron_train.data.shard_meta import ShardMeta, read_meta
from nemotron_train.data.tokenizer_file import tokenizer_hash

# A process holds one batch and one spill while it tokenizes, one block while it writes.
BATCH_CHARACTERS = 1 << 22  # text encoded at once
SPILL_TOKENS = 1 << 24  # about those of a part: fewer spills are fewer places to gather a shard from
BLOCK_TOKENS = 1 << 26


@dataclass(frozen=True)
class Job:
    """All that the processes of a job know of each other."""

    settings: TokenizeSettings
    output: Path
    work: Path
    num_parts: int
    num_shards: int
    dtype: str

    def shard_name(self, shard: int) -> str:
        return f"{self.settings.source}_{shard:0{max(5, len(str(self.num_shards - 1)))}d}"

    def is_done(self, part: int) -> bool:
        return self._done(part).exists()

    def list_spills(self) -> None:
        """Write down the spills of all parts, which are done, for those who write shards."""
        names = [
            self._spill(part, number).name
            for part in range(self.num_parts)
            for number in range(json.loads(self._done(part).read_bytes())["spills"])
        ]
        write_whole(self._spills, lambda file: file.write("\n".join(names).encode()))

    @property
    def _spills(self) -> Path:
        return self.work / "spills.txt"

    def _done(self, part: int) -> Path:
        return self.work / f"part_{part:07d}.done"

    def _spill(self, part: int, number: int) -> Path:
        return self.work / f"part_{part:07d}_{number:04d}.spill"

    def tokenize_part(self, part: Part) -> tuple[int, int]:
        """Write the spills of a part.

        Returns:
            its bytes and its tokens.
        """
        done = self._done(part.number)
        if done.exists():
            return part.num_bytes, json.loads(done.read_bytes())["tokens"]
        encode = encoder_of(self.settings)
        pending: list[TokenizedDocuments] = []
        read, documents, spills, tokens = 0, 0, 0, 0

        def spill() -> None:
            nonlocal documents, spills
            lengths = np.concatenate([batch.lengths for batch in pending])
            together = TokenizedDocuments(np.concatenate([batch.tokens for batch in pending]), lengths)
            shards = shards_of(part.number, documents, len(lengths), self.settings.seed, self.num_shards)
            write_spill(self._spill(part.number, spills), together, shards, self.num_shards)
            documents, spills = documents + len(lengths), spills + 1
            pending.clear()

        held = 0
        for batch in batches(part.documents(self.settings.text_key, self.settings.where)):
            encoded = encode(batch, key=part.number << 40 | read)  # of its first document; no two of a job are the same
            read += len(batch)
            if not len(encoded.lengths):
                continue
            pending.append(TokenizedDocuments(encoded.tokens.astype(self.dtype, copy=False), encoded.lengths))
            tokens += len(encoded.tokens)
            held += len(encoded.tokens)
            if held >= SPILL_TOKENS:
                spill()
                held = 0
        if pending:
            spill()
        facts = json.dumps({"spills": spills, "documents": documents, "tokens": tokens}).encode()
        write_whole(done, lambda file: file.write(facts))
        return part.num_bytes, tokens

    def write_shard(self, shard: int) -> tuple[str, ShardMeta] | None:
        """Write a shard from the spills of all parts; None if no document falls to it."""
        name = self.shard_name(shard)
        prefix, dtype = self.output / name, np.dtype(self.dtype)
        meta = read_meta(prefix)
        if meta is not None and all(path(prefix).exists() for path in (bin_path, idx_path)):
            sizes = [path(prefix).stat().st_size for path in (bin_path, idx_path)]
            if sizes == [meta.bin_bytes, meta.idx_bytes]:
                return name, meta
        spills = [self.work / spill for spill in self._spills.read_text().splitlines()]
        spilled = SpilledShard(spills, shard, self.num_shards, dtype)
        if not len(spilled.lengths):
            return None
        order = np.random.default_rng([self.settings.seed, shard]).permutation(len(spilled.lengths))
        lengths = spilled.lengths[order]
        blocks = (spilled.tokens_of(order[first:end]) for first, end in _blocks(lengths))
        origin = ShardOrigin(encoder_of(self.settings).eod_id, tokenizer_hash(self.settings.tokenizer), self.work)
        return name, write_shuffled_shard(prefix, lengths, blocks, dtype, origin)


def _blocks(lengths: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield first and end of successive documents that have about BLOCK_TOKENS tokens together."""
    ends, first = np.cumsum(lengths), 0
    while first < len(lengths):
        before = int(ends[first - 1]) if first else 0
        end = max(first + 1, int(np.searchsorted(ends, before + BLOCK_TOKENS, side="right")))
        yield first, end
        first = end


@lru_cache(maxsize=1)
def encoder_of(settings: TokenizeSettings) -> DocumentEncoder:
    """Return this process's encoder."""
    return DocumentEncoder(settings)


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
