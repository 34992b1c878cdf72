"""How is a tokenizer made for a corpus? Byte-level BPE in the `tokenizers` format, with a token for document ends.

    python -m data_tools train-tokenizer --input FILE_OR_DIR ... --vocab-size N --output tokenizer.json

Every byte is in the vocabulary, so any text can be encoded and comes back unchanged. The same input gives the same
file.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_tools.console import plain_console
from data_tools.documents import TEXT_SUFFIXES, find_files, read_documents
from data_tools.shard_writer import write_whole
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


def train_tokenizer(
    files: Sequence[Path], *, vocab_size: int, sample_bytes: float, text_key: str = "text"
) -> Tokenizer:
    """Learn merges from the documents of files, which are read as `tokenize` reads them.

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
    tokenizer.train_from_iterator(_texts(files, sample_bytes, text_key), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"the text yields {tokenizer.get_vocab_size()} vocabulary entries, not the {vocab_size} asked for: "
            "give more --input, a larger --sample-mb or a smaller --vocab-size"
        )
    return tokenizer


def _texts(files: Sequence[Path], sample_bytes: float, text_key: str) -> Iterator[str]:
    for path in files:
        taken = 0
        for document in read_documents(path, text_key, where=()):
            taken += len(document.text.encode())
            yield document.text
            if taken > sample_bytes:
                break


def run(arguments: argparse.Namespace) -> None:
    if not arguments.sample_mb > 0:
        raise ConfigError(f"--sample-mb {arguments.sample_mb} must be above 0; inf takes whole files.")
    tokenizer = train_tokenizer(
        find_files(arguments.input, (*TEXT_SUFFIXES, *arguments.text_suffix)),
        vocab_size=arguments.vocab_size,
        sample_bytes=arguments.sample_mb * 1e6,
        text_key=arguments.text_key,
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.output, lambda file: file.write(tokenizer.to_str(pretty=True).encode()))
    plain_console().print(f"{arguments.output}: {arguments.vocab_size} entries")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, metavar="PATH", help="files or folders of text")
    add("--text-key", default="text", metavar="KEY", help="of JSONL and Parquet documents (default text)")
    add("--text-suffix", action="append", default=[], metavar=".SUFFIX", help="of more plain-text files")
    add("--vocab-size", type=int, required=True, metavar="N", help="all entries, special token included")
    add("--output", type=Path, required=True, metavar="FILE", help="the tokenizer.json to write")
    add("--sample-mb", type=float, default=4.0, metavar="MB", help="of each file to learn from, or inf (default 4)")
