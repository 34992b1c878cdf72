"""The counting models are what they claim to be: against dictionaries, closed forms and sums to 1."""

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_tools.ngram import PSEUDO_COUNT, BigramModel, measure_ngrams
from nemotron_train.data.shard_format import bin_path, idx_path, write_index
from nemotron_train.errors import DataError

VOCAB_SIZE = 23


def random_stream(seed: int, length: int) -> np.ndarray:
    """A stream in which the next token depends on the last one; token 22 never occurs."""
    rng = np.random.default_rng(seed)
    skewed = rng.zipf(1.5, size=length) % (VOCAB_SIZE - 1)
    return np.where(rng.random(length) < 0.5, (np.roll(skewed, 1) * 3 + 1) % (VOCAB_SIZE - 1), skewed).astype(np.int64)


def dictionary_probability(streams: list[list[int]], context: int, token: int) -> float:
    """Witten-Bell over continuation counts, written down from the definition."""
    pairs = Counter(pair for stream in streams for pair in pairwise(stream))
    continuation = len([pair for pair in pairs if pair[1] == token])
    lower = (continuation + PSEUDO_COUNT) / (len(pairs) + PSEUDO_COUNT * VOCAB_SIZE)
    count = sum(n for pair, n in pairs.items() if pair[0] == context)
    followers = len([pair for pair in pairs if pair[0] == context])
    if not count:
        return lower
    kept = count / (count + followers)
    return kept * pairs[(context, token)] / count + (1 - kept) * lower


def write_shard(prefix: Path, tokens: np.ndarray) -> Path:
    tokens.astype(np.uint16).tofile(bin_path(prefix))
    with open(idx_path(prefix), "wb") as file:
        write_index(file, np.dtype("<u2"), [len(tokens) // 2, len(tokens) - len(tokens) // 2])
    return prefix


def test_the_bigram_model_equals_one_made_of_dictionaries() -> None:
    """Fails if pairs are miscounted, cross from one stream to the next, or the smoothing is another."""
    streams = [random_stream(1, 300), random_stream(2, 50)]
    model = BigramModel(streams, VOCAB_SIZE)
    contexts, tokens = (grid.ravel() for grid in np.mgrid[0:VOCAB_SIZE, 0:VOCAB_SIZE])
    expected = [
        dictionary_probability([list(map(int, stream)) for stream in streams], int(context), int(token))
        for context, token in zip(contexts, tokens, strict=True)
    ]
    np.testing.assert_allclose(model.probability(contexts, tokens), expected, rtol=1e-12)


def test_probabilities_sum_to_one_after_every_context() -> None:
    """Fails if mass is lost or invented; then the loss would be no yardstick."""
    model = BigramModel([random_stream(3, 2000)], VOCAB_SIZE)
    for context in range(VOCAB_SIZE):  # the last one never occurs
        tokens = np.arange(VOCAB_SIZE)
        assert model.probability(np.full(VOCAB_SIZE, context), tokens).sum() == pytest.approx(1.0, abs=1e-12)


def test_losses_equal_sums_over_tokens(tmp_path: Path) -> None:
    """Fails if a loss is over other tokens than the predicted ones, or pooling weighs sources instead of tokens."""
    train, held = random_stream(4, 3000), {"a": random_stream(5, 400), "b": random_stream(6, 101)}
    report = measure_ngrams(
        [write_shard(tmp_path / "train", train)],
        {name: [write_shard(tmp_path / name, stream)] for name, stream in held.items()},
    )
    counts = Counter(train.tolist())
    vocab_size = 1 + int(max(train.max(), *(stream.max() for stream in held.values())))
    total = len(train) + PSEUDO_COUNT * vocab_size
    for name, stream in held.items():
        predicted = stream[1:].tolist()
        own = Counter(predicted)
        losses = report.sources[name]
        assert losses.num_tokens == len(predicted)
        entropy = -sum(n / len(predicted) * math.log(n / len(predicted)) for n in own.values())
        assert losses.unigram_entropy == pytest.approx(entropy)
        cross = -sum(math.log((counts[token] + PSEUDO_COUNT) / total) for token in predicted) / len(predicted)
        assert losses.unigram_loss == pytest.approx(cross)
    weights = [losses.num_tokens for losses in report.sources.values()]
    assert weights == [399, 100]
    for field in ("unigram_loss", "bigram_loss"):
        values = [getattr(losses, field) for losses in report.sources.values()]
        assert getattr(report.pooled, field) == pytest.approx(np.average(values, weights=weights))


def test_context_helps_where_the_next_token_follows_from_it(tmp_path: Path) -> None:
    """Fails if the bigram model does not use its context: a cycle of tokens has no surprise but a flat histogram."""
    cycle = np.arange(20_000) % 16
    prefix = write_shard(tmp_path / "cycle", cycle)
    pooled = measure_ngrams([prefix], {"cycle": [prefix]}).pooled
    assert pooled.unigram_entropy == pytest.approx(math.log(16), abs=1e-3)
    assert pooled.bigram_loss < 0.01


@pytest.mark.parametrize(
    ("max_tokens", "seq_length", "predicted"),
    [(None, 1, 400), (None, 64, 384), (200, 64, 192), (10, 64, 64), (10, 1, 10)],
)
def test_the_window_is_that_of_the_trainers_evaluation(
    tmp_path: Path, max_tokens: int | None, seq_length: int, predicted: int
) -> None:
    """Fails if the measured tokens are not the first whole windows, at least one, of the two shards read as one."""
    stream = random_stream(7, 401)
    prefixes = [write_shard(tmp_path / "h_00000", stream[:150]), write_shard(tmp_path / "h_00001", stream[150:])]
    report = measure_ngrams(prefixes, {"h": prefixes}, max_tokens=max_tokens, seq_length=seq_length)
    whole = write_shard(tmp_path / "whole", stream[: predicted + 1])
    assert report.pooled.num_tokens == predicted
    assert report.pooled == measure_ngrams(prefixes, {"h": [whole]}).pooled


def test_a_source_too_short_for_a_window_is_explained(tmp_path: Path) -> None:
    """Fails if an empty mean turns into NaN."""
    prefix = write_shard(tmp_path / "tiny", np.arange(10))
    with pytest.raises(DataError, match="'tiny' has 10 tokens"):
        measure_ngrams([prefix], {"tiny": [prefix]}, seq_length=10)
