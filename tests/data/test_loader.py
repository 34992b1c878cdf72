"""Oracle: the samples of the plan, read one by one from the arrays the shards were written from."""

import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from nemotron_train.data.batch import Batch, RankShare
from nemotron_train.data.blend import BlendPlan, Phase
from nemotron_train.data.heldout import heldout_batches
from nemotron_train.data.loader import DataLoader, SampleReader
from nemotron_train.data.shard import Shard
from nemotron_train.data.source import Source
from nemotron_train.errors import ConfigError, DataError

S = 8
VOCAB = 50_000
WriteShard = Callable[..., Path]


@pytest.fixture
def reader(write_tokens: WriteShard) -> SampleReader:
    """Two sources, one of three shards (one of them empty), under two phases; every token says where it is."""
    web = [range(0, 700), [], range(700, 1003)]
    web_shards = [Shard(write_tokens(f"web_{number}", [tokens], "<u2")) for number, tokens in enumerate(web)]
    code_shards = [Shard(write_tokens("code_0", [range(10_000, 10_517)], "<u2"))]
    sources = [Source("web", web_shards, VOCAB), Source("code", code_shards, VOCAB)]
    return make_reader(sources)


def make_reader(sources: list[Source], *later: Phase) -> SampleReader:
    phases = [Phase(0, S, {"web": 0.7, "code": 0.3}), Phase(1500, S, {"web": 0.2, "code": 0.8}), *later]
    return SampleReader(BlendPlan(phases, {source.name: source.num_tokens for source in sources}, seed=5), sources)


def steps_of(
    reader: SampleReader, share: RankShare, batch_size: Callable[[int], int], consumed: int, num_steps: int
) -> list[list[Batch]]:
    """Return the micro-batches of some steps, and check what the loader says it has handed out."""
    steps: list[list[Batch]] = []
    with DataLoader(reader, share, batch_size, consumed) as loader:
        for _ in range(num_steps):
            each = batch_size(consumed) // (share.dp_size * share.micro_batch_size)
            steps.append([])
            for _ in range(each):
                assert loader.consumed_tokens == consumed  # a step counts when its last micro-batch was handed out
                steps[-1].append(next(loader))
            consumed += batch_size(consumed) * S
            assert loader.consumed_tokens == consumed
    return steps


def stream_bytes(
    reader: SampleReader, dp_size: int, micro_batch_size: int, batch_size: Callable[[int], int], consumed: int, end: int
) -> bytes:
    """Return the tokens of samples consumed / S ... end / S - 1 in order, put together from all ranks' steps."""
    num_steps, at = 0, consumed
    while at < end:
        at += batch_size(at) * S
        num_steps += 1
    shares = [RankShare(rank, dp_size, micro_batch_size) for rank in range(dp_size)]
    ranks = [steps_of(reader, share, batch_size, consumed, num_steps) for share in shares]
    rows = []
    for step in range(num_steps):
        for batches in ranks:
            for batch in batches[step]:
                assert batch.tokens_BS.shape == (micro_batch_size, S)
                rows.append(torch.cat((batch.tokens_BS, batch.labels_BS[:, -1:], batch.source_B[:, None]), dim=1))
    return torch.cat(rows)[: (end - consumed) // S].numpy().tobytes()


@pytest.mark.parametrize("consumed", [0, 24 * S, 31 * S, 187 * S, 400 * S])
@pytest.mark.parametrize(
    ("dp_size", "micro_batch_size", "batch_size"),
    [(1, 1, 24), (2, 1, 24), (3, 4, 24), (4, 2, 16), (8, 1, 8), (1, 5, 15)],
)
def test_the_stream_of_samples_does_not_depend_on_ranks_batches_or_where_it_was_resumed(
    reader: SampleReader, consumed: int, dp_size: int, micro_batch_size: int, batch_size: int
) -> None:
    """Fails if a sample is lost, doubled or out of order after a change of ranks or batch size, or on resume."""
    expected = []
    for sample in range(consumed // S, consumed // S + 120):
        number, tokens = reader.read(sample)
        expected.append([*tokens, number])
    got = stream_bytes(reader, dp_size, micro_batch_size, lambda _: batch_size, consumed, consumed + 120 * S)
    assert got == np.array(expected, dtype=np.int64).tobytes()


def test_a_batch_that_grows_on_the_way_keeps_the_stream(reader: SampleReader) -> None:
    """Fails if a batch-size schedule is read at other token counts than those of the steps."""
    growing = stream_bytes(reader, 2, 2, lambda tokens: 4 if tokens < 40 * S else 20, 0, 300 * S)
    assert growing == stream_bytes(reader, 1, 1, lambda _: 1, 0, 300 * S)


def test_future_phases_do_not_change_past_bytes(reader: SampleReader) -> None:
    """Fails if adding a phase, which is what a longer run does, changes tokens before it."""
    longer = make_reader(list(reader.sources), Phase(2400, S, {"code": 1.0}))
    short, long = (stream_bytes(which, 1, 4, lambda _: 4, 0, 400 * S) for which in (reader, longer))
    row = (S + 2) * 8
    assert short[: 300 * row] == long[: 300 * row]
    assert short[300 * row :] != long[300 * row :]


def test_samples_are_windows_of_the_written_tokens(reader: SampleReader) -> None:
    """Fails if a window is read from the wrong place, e.g. across the end of a shard or of the source."""
    sizes, firsts = (1003, 517), (0, 10_000)
    for sample in range(600):
        number, tokens = reader.read(sample)
        positions = [
            (span.start + i) % sizes[number] for span in reader.plan.locate(sample).spans for i in range(span.count)
        ]
        assert tokens.tolist() == [firsts[number] + position for position in positions]


def test_batches_hold_tokens_their_successors_and_their_source(reader: SampleReader) -> None:
    """Fails if labels are not the next tokens, a row carries no loss, or the source is another one."""
    [[batch]] = steps_of(reader, RankShare(0, 1, 6), lambda _: 6, 0, 1)
    for row in range(6):
        number, tokens = reader.read(row)
        assert batch.tokens_BS[row].tolist() == tokens[:-1].tolist()
        assert batch.labels_BS[row].tolist() == tokens[1:].tolist()
        assert batch.source_B[row] == number
    assert batch.loss_mask_BS.tolist() == [[1.0] * S] * 6
    assert [getattr(batch, name).dtype for name in ("tokens_BS", "labels_BS", "source_B")] == [torch.int64] * 3


@pytest.mark.parametrize(("dtype", "wrong"), [("<i4", 50_000), ("<i4", -1), ("<u2", 50_000), ("<i8", 2**40)])
def test_a_token_outside_the_vocabulary_is_refused_where_it_is_read(
    write_tokens: WriteShard, dtype: str, wrong: int
) -> None:
    """Fails if such a token reaches the embedding, or source, shard and place are not named."""
    good = write_tokens("good", [[VOCAB - 1] * 40], dtype)
    bad = write_tokens("bad", [[1] * 13 + [wrong] + [2] * 30], dtype)
    source = Source("web", [Shard(good), Shard(bad)], VOCAB)
    item = np.dtype(dtype).itemsize
    assert source.read(30, 23).tolist() == [VOCAB - 1] * 10 + [1] * 13
    with pytest.raises(DataError, match=rf"'web': .*bad\.bin has token {wrong} at token 13 \(byte {13 * item}\)"):
        source.read(30, 24)


def test_an_error_of_the_reading_thread_reaches_the_consumer_in_its_place(
    write_tokens: WriteShard, reader: SampleReader
) -> None:
    """Fails if the consumer waits forever, or gets the error before the good batches, or only once."""
    bad = Shard(write_tokens("bad", [[*range(300), 60_000, *range(300)]], "<u2"))
    sources = [Source("web", [bad], VOCAB), reader.sources[1]]
    failing = make_reader(sources)
    good = next(sample for sample in range(99) if not _readable(failing, sample))
    with DataLoader(failing, RankShare(0, 1, 1), lambda _: 1, 0) as loader:
        assert len(list(islice(loader, good))) == good
        for _ in range(2):
            with pytest.raises(DataError, match=r"bad\.bin has token 60000"):
                next(loader)


def _readable(reader: SampleReader, sample: int) -> bool:
    try:
        reader.read(sample)
    except DataError:
        return False
    return True


def test_close_ends_the_thread_and_the_iteration(reader: SampleReader) -> None:
    """Fails if a thread that waits for room in its queue survives the loader, or next() then waits forever."""
    loader = DataLoader(reader, RankShare(0, 1, 1), lambda _: 4, 0, prefetch_micro_batches=2)
    next(loader)
    loader.close()
    loader.close()
    assert "data-loader" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(StopIteration):
        next(loader)


def test_a_batch_that_does_not_split_is_refused(reader: SampleReader) -> None:
    """Fails if samples of a step are silently left out."""
    with (
        DataLoader(reader, RankShare(0, 2, 3), lambda _: 16, 0) as loader,
        pytest.raises(ConfigError, match="16 samples does not split into micro-batches of 3 on 2 data-parallel ranks"),
    ):
        next(loader)


def test_a_change_of_length_within_a_micro_batch_is_refused(reader: SampleReader) -> None:
    """Fails if rows of two lengths end in an obscure error of the stacking."""
    longer = make_reader(list(reader.sources), Phase(1600, 2 * S, {"web": 1.0}))
    with (
        DataLoader(longer, RankShare(0, 1, 3), lambda _: 3, 198 * S) as loader,
        pytest.raises(ConfigError, match=r"Samples 198 \.\.\. 200 have different lengths"),
    ):
        next(loader)


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 1), (1, 4), (2, 3), (3, 2), (8, 1)])
def test_held_out_windows_are_the_same_whoever_reads_them(
    reader: SampleReader, dp_size: int, micro_batch_size: int
) -> None:
    """Fails if a window is lost, doubled or taken for padding, or ranks differ in their number of micro-batches."""
    web, code = reader.sources
    shares = [RankShare(rank, dp_size, micro_batch_size) for rank in range(dp_size)]
    ranks = [list(heldout_batches([web, None, code], 10 * S + 3, S, share)) for share in shares]
    assert len({len(batches) for batches in ranks}) == 1
    seen = []
    for batches in ranks:
        for batch in batches:
            assert batch.tokens_BS.shape == batch.loss_mask_BS.shape == (micro_batch_size, S)
            for row in range(micro_batch_size):
                mask = batch.loss_mask_BS[row].tolist()
                assert mask in ([0.0] * S, [1.0] * S)
                if mask[0]:
                    assert (batch.labels_BS[row] - batch.tokens_BS[row]).tolist() == [1] * S
                    seen.append((int(batch.source_B[row]), int(batch.tokens_BS[row, 0])))
    expected = [(0, S * i) for i in range(10)] + [(2, 10_000 + S * i) for i in range(10)]
    assert sorted(seen) == expected


def test_held_out_shards_shorter_than_asked_for_are_used_whole_but_never_wrapped(write_tokens: WriteShard) -> None:
    """Fails if the last window would take its label from the beginning of the stream."""
    for size, windows in ((3 * S, 2), (3 * S + 1, 3), (3 * S + 2, 3), (S + 1, 1)):
        source = Source("web", [Shard(write_tokens(f"held_{size}", [range(size)], "<u2"))], VOCAB)
        [batches] = [list(heldout_batches([source], 10**6, S, RankShare(0, 1, 1)))]
        assert [batch.tokens_BS[0, 0].item() for batch in batches] == [S * i for i in range(windows)]
        assert all(batch.labels_BS[0, -1] == batch.tokens_BS[0, -1] + 1 for batch in batches)
