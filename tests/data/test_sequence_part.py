"""Does a context-parallel rank get its part of every sample, and read no more than that? Oracles: Megatron-Core's order
of a sequence, and the batches of a rank that has whole samples."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.ssm.mamba_context_parallel import _redo_attention_load_balancing
from numpy.typing import NDArray

from nemotron_train.data.batch import Batch, RankShare, take_part
from nemotron_train.data.blend import BlendPlan, Phase
from nemotron_train.data.fim import FillInTheMiddle
from nemotron_train.data.heldout import heldout_batches
from nemotron_train.data.loader import DataLoader, SampleReader
from nemotron_train.data.sequence_part import WHOLE, SequencePart
from nemotron_train.data.shard import OpenFiles, Shard
from nemotron_train.data.source import Source

S, EOD, VOCAB = 48, 1, 50_000
SIZES = (1, 2, 3, 4, 8)
WriteShard = Callable[..., Path]


def parts(size: int) -> list[SequencePart]:
    return [SequencePart(rank, size) for rank in range(size)]


@pytest.mark.parametrize("size", SIZES)
def test_parts_are_those_of_megatron_core(size: int) -> None:
    """Fails if a rank holds tokens that the exchange around a Mamba scan takes for others."""
    rows_BS = torch.arange(2 * S).view(2, S)
    by_rank = _redo_attention_load_balancing(rows_BS.t(), size).chunk(size) if size > 1 else [rows_BS.t()]
    for part, expected_SB in zip(parts(size), by_rank, strict=True):
        assert part.cut_rows(rows_BS).tolist() == expected_SB.t().tolist()


@pytest.mark.parametrize("size", SIZES)
def test_parts_tile_a_sample_and_cost_attention_the_same(size: int) -> None:
    """Fails if a token is on no rank or on two, or one rank's queries see more tokens than another's."""
    places = [[place for run in part.runs(S) for place in run] for part in parts(size)]
    assert sorted(place for own in places for place in own) == list(range(S))
    assert len({sum(own) for own in places}) == 1


def tokens_of(seed: int, count: int) -> NDArray[np.int64]:
    """Random tokens with an end of a document about every 14."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(10, VOCAB, count)
    tokens[rng.random(count) < 0.07] = EOD
    return tokens


@pytest.fixture
def sources(write_tokens: WriteShard) -> list[Source]:
    """One source of three shards whose ends are within windows, and one that is short: it comes to its end often."""
    web = [Shard(write_tokens(f"web_{n}", [tokens_of(n, size)], "<u2")) for n, size in enumerate((1000, 333, 709))]
    return [Source("web", web, VOCAB), Source("code", [Shard(write_tokens("code", [tokens_of(9, 517)], "<u2"))], VOCAB)]


def reader_of(sources: list[Source], fim_rate: float = 0.0) -> SampleReader:
    rates = {"code": fim_rate}
    phases = [Phase(0, S, {"web": 0.6, "code": 0.4}, rates), Phase(30 * S, 2 * S, {"web": 0.5, "code": 0.5}, rates)]
    plan = BlendPlan(phases, {source.name: source.num_tokens for source in sources}, seed=5)
    return SampleReader(plan, sources, FillInTheMiddle(EOD, 2, 3, 4, spm_rate=0.5, seed=3))


def batches_of(reader: SampleReader, part: SequencePart, eod_id: int | None) -> list[Batch]:
    """60 samples in micro-batches of 3, over the change of length at sample 30."""
    with DataLoader(reader, RankShare(0, 1, 3, part), lambda consumed: 6, 0, eod_id) as loader:
        return list(islice(loader, 20))


def assert_same(found: Batch, expected: Batch) -> None:
    for name, tensor in vars(expected).items():
        other = getattr(found, name)
        assert (other is None) == (tensor is None), name
        assert tensor is None or (torch.equal(other, tensor) and other.dtype == tensor.dtype), name


@pytest.mark.parametrize("fim_rate", [0.0, 0.8])
@pytest.mark.parametrize("eod_id", [None, EOD])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_get_their_parts_of_the_batches_of_one_rank(
    sources: list[Source], size: int, eod_id: int | None, fim_rate: float
) -> None:
    """Fails if a part is read from the wrong place (at ends of shards, epochs and phases too), a run's last label is
    not the next token, or documents are rearranged, numbered or masked as if a part were a sample."""
    reader = reader_of(sources, fim_rate)
    expected = batches_of(reader, WHOLE, eod_id)
    for part in parts(size):
        for found, whole in zip(batches_of(reader, part, eod_id), expected, strict=True):
            assert found.tokens_BS.shape[1] == whole.tokens_BS.shape[1] // size
            assert_same(found, take_part(whole, part))


@contextmanager
def counted_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The bytes of every read from a file."""
    counts: list[int] = []
    read = OpenFiles.read

    def counting(self: OpenFiles, path: Path, offset: int, count_bytes: int) -> bytes:
        counts.append(count_bytes)
        return read(self, path, offset, count_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(OpenFiles, "read", counting)
        yield counts


def test_a_rank_reads_its_part_and_the_whole_only_where_it_must(
    write_tokens: WriteShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a rank reads samples that other ranks hold, or in more pieces than its runs: 16 ranks of a long-context
    run would read everything 16 times."""
    item = 2
    source = Source("code", [Shard(write_tokens("one", [tokens_of(1, 400 * S + 1)], "<u2"))], VOCAB)
    for rate, size, run_bytes in (
        (0.0, 1, [item * (S + 1)]),
        (0.0, 2, [item * (S // 4 + 1)] * 2),
        (0.0, 8, [item * (S // 16 + 1)] * 2),
        (1.0, 8, [item * (S + 1)]),
    ):
        plan = BlendPlan([Phase(0, S, {"code": 1.0}, {"code": rate})], {"code": source.num_tokens}, seed=5)
        reader = SampleReader(plan, [source], FillInTheMiddle(EOD, 2, 3, 4, spm_rate=0.5, seed=3))
        ends = [plan.locate(sample).spans[-1] for sample in range(50)]
        in_one_piece = [n for n, span in enumerate(ends) if span.start + S + 1 <= source.num_tokens and span.count > S]
        assert len(in_one_piece) > 45
        for part in parts(size):
            with counted_reads(monkeypatch) as counts:
                for sample in in_one_piece:
                    reader.read(sample, part)
            assert counts == run_bytes * len(in_one_piece)


def test_the_loader_reads_parts_unless_documents_are_told_apart(
    sources: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the thread that reads ahead takes whole samples without need."""
    read = []
    for eod_id in (None, EOD):
        with counted_reads(monkeypatch) as counts:
            share = RankShare(0, 1, 3, SequencePart(1, 4))
            with DataLoader(reader_of(sources), share, lambda _: 6, 0, eod_id, prefetch_micro_batches=1) as loader:
                next(loader)
        read.append(set(counts))
    assert max(read[0]) == 2 * (S // 8 + 1)
    assert max(read[1]) == 2 * (S + 1)


@pytest.mark.parametrize("eod_id", [None, EOD])
def test_held_out_windows_are_split_alike(
    sources: list[Source], eod_id: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if evaluation reads other tokens under context parallelism, or reads whole windows without need."""
    whole = list(heldout_batches([*sources, None], 20 * S, S, RankShare(0, 1, 3), eod_id))
    for part in parts(4):
        with counted_reads(monkeypatch) as counts:
            found = list(heldout_batches([*sources, None], 20 * S, S, RankShare(0, 1, 3, part), eod_id))
        for ours, expected in zip(found, whole, strict=True):
            assert_same(ours, take_part(expected, part))
        windows = 20 + 10  # the short source has ten
        assert sum(counts) == 2 * windows * (S + 1 if eod_id else S // 4 + 2)
