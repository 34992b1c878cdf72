"""What loss does counting reach on the held-out text? Yardsticks beside which a trained model's loss means something.

    python -m data_tools ngram --train PREFIX ... --heldout PREFIX ...

* unigram entropy: of the held-out tokens themselves; no model that ignores context can do better on them.
* unigram loss: with the token frequencies of the training text.
* bigram loss: of a model of the training text that sees one token of context. Witten-Bell interpolation with
  Kneser-Ney's continuation counts below it; of the usual smoothings (absolute discounting, modified Kneser-Ney,
  Dirichlet) this pair had the lowest held-out loss on the quickstart's text, by 0.003 to 0.08 nats.

All in nats per token, over exactly the tokens that the trainer's evaluation predicts.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from data_tools.console import plain_console
from nemotron_train.data.shard import Shard
from nemotron_train.errors import DataError

PSEUDO_COUNT = 0.5  # of every token, so that none has probability 0

SHARD_NUMBER = re.compile(r"_\d{5}$")  # shards of one source are named code_00000, code_00001, ...

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class NgramLosses:
    num_tokens: int  # predicted ones
    unigram_entropy: float
    unigram_loss: float
    bigram_loss: float


@dataclass(frozen=True)
class NgramReport:
    sources: dict[str, NgramLosses]
    pooled: NgramLosses  # over all predicted tokens of all sources


class BigramModel:
    """p(token | context) from the counts of adjacent tokens; for every context the probabilities sum to 1."""

    def __init__(self, streams: Sequence[Tokens], vocab_size: int) -> None:
        """Count the pairs inside each stream; ids are below `vocab_size`."""
        self.vocab_size = vocab_size
        codes = np.concatenate([stream[:-1] * vocab_size + stream[1:] for stream in streams])
        # Sorted pair codes with their counts: a dense table would not fit a vocabulary of 131,072.
        self._pairs, self._counts = np.unique(codes, return_counts=True)
        contexts, tokens = np.divmod(self._pairs, vocab_size)
        self._context_counts = np.bincount(contexts, weights=self._counts, minlength=vocab_size)
        self._followers = np.bincount(contexts, minlength=vocab_size)  # different tokens seen after each context
        # Kneser-Ney: what counts for a token outside its known contexts is in how many different ones it was seen.
        self._continuation = _smoothed(np.bincount(tokens, minlength=vocab_size))

    def probability(self, contexts: Tokens, tokens: Tokens) -> NDArray[np.float64]:
        """Return p(tokens[i] | contexts[i]).

        A context with c occurrences and f different followers keeps c / (c + f) of its mass for counted pairs and
        leaves f / (c + f) to the continuation distribution; one never seen leaves all.
        """
        codes = contexts * self.vocab_size + tokens
        places = np.minimum(np.searchsorted(self._pairs, codes), len(self._pairs) - 1)
        pair_counts = np.where(self._pairs[places] == codes, self._counts[places], 0)
        seen, followers = self._context_counts[contexts], np.maximum(self._followers[contexts], 1)
        return (pair_counts + followers * self._continuation[tokens]) / (seen + followers)


def measure_ngrams(
    train: Sequence[Path],
    heldout: Mapping[str, Sequence[Path]],
    *,
    max_tokens: int | None = None,
    seq_length: int = 1,
) -> NgramReport:
    """Fit on the training shards, measure on each held-out source and on all of them together.

    Args:
        heldout: source name -> prefixes, read as one stream.
        max_tokens: predicted tokens of each source (`train.eval_tokens`); all when None.
        seq_length: predicted tokens come in whole windows of this length, as in the trainer's evaluation.
    Raises:
        DataError: a shard is missing or damaged, or a source has fewer than two tokens.
    """
    train_streams = [_read_stream([prefix]) for prefix in train]
    windows = {
        name: _evaluated_part(name, _read_stream(prefixes), max_tokens, seq_length)
        for name, prefixes in heldout.items()
    }
    vocab_size = 1 + max(int(stream.max(initial=0)) for stream in [*train_streams, *windows.values()])
    model = BigramModel(train_streams, vocab_size)
    unigram = _smoothed(np.bincount(np.concatenate(train_streams), minlength=vocab_size))

    def losses(streams: list[Tokens]) -> NgramLosses:
        contexts = np.concatenate([stream[:-1] for stream in streams])
        tokens = np.concatenate([stream[1:] for stream in streams])
        own = np.bincount(tokens, minlength=vocab_size) / len(tokens)
        return NgramLosses(
            num_tokens=len(tokens),
            unigram_entropy=_mean_loss(own[tokens]),
            unigram_loss=_mean_loss(unigram[tokens]),
            bigram_loss=_mean_loss(model.probability(contexts, tokens)),
        )

    return NgramReport(
        sources={name: losses([stream]) for name, stream in windows.items()}, pooled=losses(list(windows.values()))
    )


def _read_stream(prefixes: Sequence[Path]) -> Tokens:
    shards = [Shard(prefix) for prefix in prefixes]
    return np.concatenate([shard.read(0, shard.num_tokens).astype(np.int64) for shard in shards])


def _evaluated_part(name: str, stream: Tokens, max_tokens: int | None, seq_length: int) -> Tokens:
    """Return the stream's start: one token of context and whole windows of predicted ones, at least one window."""
    available = (len(stream) - 1) // seq_length
    if available < 1:
        raise DataError(
            f"held-out source {name!r} has {len(stream)} tokens; one window of {seq_length} takes {seq_length + 1}"
        )
    num_windows = available if max_tokens is None else max(1, min(max_tokens // seq_length, available))
    return stream[: num_windows * seq_length + 1]


def _smoothed(counts: NDArray) -> NDArray[np.float64]:
    return (counts + PSEUDO_COUNT) / (counts.sum() + PSEUDO_COUNT * len(counts))


def _mean_loss(probabilities: NDArray[np.float64]) -> float:
    return float(-np.log(probabilities).mean())


def _prefix(path: Path) -> Path:
    """Return the prefix of a shard that may be given as one of its files, so that a shell can expand `code_*.bin`."""
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def run(arguments: argparse.Namespace) -> None:
    heldout: dict[str, list[Path]] = {}
    for path in arguments.heldout:
        prefix = _prefix(path)
        heldout.setdefault(SHARD_NUMBER.sub("", prefix.name), []).append(prefix)
    report = measure_ngrams(
        [_prefix(path) for path in arguments.train],
        heldout,
        max_tokens=arguments.max_tokens,
        seq_length=arguments.seq_length,
    )
    if arguments.json:
        sys.stdout.write(json.dumps(asdict(report)) + "\n")
        return
    table = Table("held-out source", "tokens", "unigram entropy", "unigram loss", "bigram loss")
    for name, losses in [*report.sources.items(), ("all", report.pooled)]:
        numbers = (losses.unigram_entropy, losses.unigram_loss, losses.bigram_loss)
        table.add_row(name, f"{losses.num_tokens:,}", *(f"{number:.4f}" for number in numbers))
    plain_console().print(table)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", type=Path, nargs="+", required=True, metavar="PREFIX", help="shards to count")
    parser.add_argument(
        "--heldout", type=Path, nargs="+", required=True, metavar="PREFIX", help="named as their source"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of each source (train.eval_tokens)")
    parser.add_argument("--seq-length", type=int, default=1, metavar="N", help="measure whole windows of N tokens")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
