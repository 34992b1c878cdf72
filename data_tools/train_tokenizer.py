"""How is a tokenizer made for a corpus? Byte-level BPE in the `tokenizers` format, with a token for document ends.

    python -m data_tools train-tokenizer --input FILES --vocab-size N --output tokenizer.json

Every byte is in the vocabulary, so any text can be encoded and comes back unchanged. The same input gives the same
file.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nemotron_train.errors import ConfigError, DataError

END_OF_DOCUMENT = "<|endoftext|>"
NUM_BYTES = 256

# Merges stay inside one of these, tried in order (after the pattern that GPT-4's tokenizer made usual): a word with the
# space or sign before it, at most three digits, signs with the line end after them, line ends with the blank before
# them, indentation without its last space, which goes to the word.
PIECE_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def train_tokenizer(files: Sequence[Path], *, vocab_size: int, sample_bytes: int) -> Tokenizer:
    """Learn merges from JSONL files (key "text") or plain text files.

    Args:
        vocab_size: bytes, merges and the special token together; the result has exactly this many entries.
        sample_bytes: of each file to learn from; documents are taken from its beginning.
    Raises:
        ConfigError: the vocabulary cannot hold the bytes and the special token.
        DataError: a file cannot be read, or the text has too few different pieces for this many entries.
    """
    if vocab_size <= NUM_BYTES + 1:
        raise ConfigError(f"--vocab-size {vocab_size} has no room for merges: more than {NUM_BYTES + 1} are needed")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(files, sample_bytes), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"the text yields {tokenizer.get_vocab_size()} vocabulary entries, not the {vocab_size} asked for: "
            "give more --input, a larger --sample-mb or a smaller --vocab-size"
        )
    return tokenizer


def _texts(files: Sequence[Path], sample_bytes: int) -> Iterator[str]:
    for path in files:
        taken = 0
        for text in _documents(path):
            taken += len(text.encode())
            yield text
            if taken > sample_bytes:
                break


def _documents(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as file:
            if path.suffix != ".jsonl":
                yield file.read()
                return
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line)["text"]
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f'{path}, line {number}: not a JSON object with a "text" ({error})') from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} as text: {error}") from error


def run(arguments: argparse.Namespace) -> None:
    sample_bytes = int(arguments.sample_mb * 1e6)
    tokenizer = train_tokenizer(arguments.input, vocab_size=arguments.vocab_size, sample_bytes=sample_bytes)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.output.with_name(arguments.output.name + ".partial")
    tokenizer.save(str(partial))
    partial.replace(arguments.output)
    Console(soft_wrap=True, highlight=False).print(f"{arguments.output}: {arguments.vocab_size} entries")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help=".jsonl or plain text")
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="all entries, special token included"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the tokenizer.json to write")
    parser.add_argument(
        "--sample-mb", type=float, default=4.0, metavar="MB", help="of each file to learn from (default 4)"
    )
