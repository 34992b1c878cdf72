"""Which held-out text is a run evaluated on? The first windows of each source's held-out shards, in order, each token
once.

Which windows these are depends on nothing but the shards, seq_length and eval_tokens; data-parallel ranks only
share them out, and context-parallel ranks take their part of each.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from nemotron_train.data.batch import Batch, RankShare, build_batch, take_part
from nemotron_train.data.sequence_part import WHOLE
from nemotron_train.data.source import Source


def count_heldout_windows(source: Source, eval_tokens: int, seq_length: int) -> int:
    """Return how many windows are evaluated: those that fit into eval_tokens and the shards, at least one."""
    return max(1, min(eval_tokens // seq_length, (source.num_tokens - 1) // seq_length))


def heldout_batches(
    sources: Sequence[Source | None], eval_tokens: int, seq_length: int, share: RankShare, eod_id: int | None = None
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of held-out windows.

    All ranks get the same number of micro-batches; rows for which there is no window left have loss mask 0.

    Args:
        sources: held-out shards in the order of data.sources, None where a source has none.
        eval_tokens: of each source.
        eod_id: ends documents, where the model is to tell them apart.
    """
    windows = [
        (number, source, index * seq_length)
        for number, source in enumerate(sources)
        if source is not None
        for index in range(count_heldout_windows(source, eval_tokens, seq_length))
    ]
    size, part = share.micro_batch_size, share.part
    read_part = part if eod_id is None else WHOLE  # see loader.py
    runs = read_part.runs(seq_length)
    for start in range(0, len(windows), size * share.dp_size):
        first = start + share.dp_rank * size
        mine = windows[first : first + size]
        rows = [np.concatenate([source.read(at + run.start, len(run) + 1) for run in runs]) for _, source, at in mine]
        numbers = [number for number, _, _ in mine]
        batch = build_batch(rows, numbers, size, sum(map(len, runs)), eod_id, read_part.num_runs)
        yield batch if read_part == part else take_part(batch, part)
