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

from data_tools.documents import Document
from data_tools.encoders import DocumentEncoder
from data_tools.parts import Part
from data_tools.shard_writer import TokenizedDocuments, write_shuffled_shard, write_whole
from data_tools.source_record import TokenizeSettings
from data_tools.spills import gather, shards_of, write_spill
from nemotron_train.data.shard_format import bin_path, idx_path
from nemotron_train.data.shard_meta import ShardMeta, read_meta
from nemotron_train.data.tokenizer_file import tokenizer_hash

BATCH_CHARACTERS = 1 << 22  # text encoded at once
SPILL_TOKENS = 1 << 23


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

    def spills(self) -> Iterator[Path]:
        for part in range(self.num_parts):
            for number in range(json.loads(self._done(part).read_bytes())["spills"]):
                yield self._spill(part, number)

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
        documents, spills, tokens = 0, 0, 0

        def spill() -> None:
            nonlocal documents, spills
            lengths = np.concatenate([batch.lengths for batch in pending])
            together = TokenizedDocuments(np.concatenate([batch.tokens for batch in pending]), lengths)
            shards = shards_of(part.number, documents, len(lengths), self.settings.seed, self.num_shards)
            write_spill(self._spill(part.number, spills), together, shards, self.num_shards)
            documents, spills = documents + len(lengths), spills + 1
            pending.clear()

        held = 0
        for number, batch in enumerate(batches(part.documents(self.settings.text_key, self.settings.where))):
            encoded = encode(batch, key=part.number << 32 | number << 16)
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
        meta = read_meta(self.output / name)
        if meta is not None and idx_path(self.output / name).exists():
            sizes = [path(self.output / name).stat().st_size for path in (bin_path, idx_path)]
            if sizes == [meta.bin_bytes, meta.idx_bytes]:
                return name, meta
        documents = gather(list(self.spills()), shard, np.dtype(self.dtype))
        if not len(documents.lengths):
            return None
        order = np.random.default_rng([self.settings.seed, shard]).permutation(len(documents.lengths))
        tokenizer = tokenizer_hash(self.settings.tokenizer)
        eod_id = encoder_of(self.settings).eod_id
        return name, write_shuffled_shard(self.output / name, documents, order, eod_id, tokenizer)


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
