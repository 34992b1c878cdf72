"""How does text become shards to train on?

    python -m data_tools tokenize --input FILE_OR_DIR ... --tokenizer tokenizer.json --output DIR --source NAME

writes DIR/NAME_00000.bin/.idx, DIR/NAME_00001... and DIR/NAME.json, which says what they were made from and, once
all shards are there, how much they hold. The shards follow from text, tokenizer and settings, not from the number
of workers: documents are read in order by one process, encoded in batches by the workers, and collected in order by
the first.
"""

import argparse
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from data_tools.documents import TEXT_SUFFIXES, DocumentStream, find_files
from data_tools.shard_writer import ShardWriter, TokenizedDocuments
from data_tools.source_record import DEFAULT_SHARD_TOKENS, SourceRecord, TokenizedSource, TokenizeSettings
from nemotron_train.data.shard_format import token_dtype
from nemotron_train.data.tokenizer_file import tokenizer_size
from nemotron_train.errors import ConfigError, DataError

BATCH_CHARACTERS = 1 << 20  # text handed to a worker at once
BATCHES_PER_WORKER = 3  # handed out before the oldest comes back: bounds memory, keeps workers busy


class DocumentEncoder:
    """Turns texts into token ids, each document ended by the end-of-document token."""

    def __init__(self, settings: TokenizeSettings) -> None:
        self._tokenizer = load_tokenizer(settings.tokenizer)
        eod = self._tokenizer.token_to_id(settings.eod_token)
        if eod is None:
            special = ", ".join(token.content for token in self._tokenizer.get_added_tokens_decoder().values())
            raise ConfigError(
                f"{settings.tokenizer} has no token {settings.eod_token!r} to end documents with; "
                f"its special tokens are: {special or 'none'} (--eod-token)."
            )
        self._eod = eod
        self._tokenizer.encode_special_tokens = not settings.parse_special_tokens

    def __call__(self, texts: Sequence[str]) -> TokenizedDocuments:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        documents = [[*ids, self._eod] for ids in (encoding.ids for encoding in encodings) if ids]
        flat = np.array(list(chain.from_iterable(documents)), dtype=np.int32)
        return TokenizedDocuments(flat, np.array([len(document) for document in documents], dtype=np.int64))


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizer.json` without the truncation and padding it may carry, which would cut or fill documents."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{path} is no readable tokenizer.json (--tokenizer): {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenize(
    inputs: Sequence[Path],
    output: Path,
    settings: TokenizeSettings,
    num_workers: int,
    on_progress: Callable[[int, int, int], None] = lambda read_bytes, total_bytes, tokens: None,
) -> TokenizedSource:
    """Write the shards of one source, or find that they are there.

    Args:
        on_progress: called now and then with input bytes read, input bytes in all, and tokens so far.

    Raises:
        ConfigError: the tokenizer lacks the end-of-document token, or a setting is out of range.
        DataError: an input cannot be read, there is no text, or `output` has other shards of this name.
    """
    if num_workers < 1 or settings.shard_tokens < 1:
        raise ConfigError(f"--workers {num_workers} and --shard-tokens {settings.shard_tokens} must be at least 1.")
    files = find_files(inputs, settings.text_suffixes)
    DocumentEncoder(settings)  # a wrong tokenizer is found before anything is written
    record = SourceRecord(output, settings, files)
    finished = record.find_finished()
    if finished is not None:
        return finished
    output.mkdir(parents=True, exist_ok=True)
    record.write_begun()
    dtype = token_dtype(tokenizer_size(settings.tokenizer))
    writer = ShardWriter(output, settings.source, dtype, settings.shard_tokens, settings.seed)
    stream = DocumentStream(files, settings.text_key)
    tokens = 0
    for batch in encode_in_order(_batches(stream), settings, num_workers):
        writer.add(batch)
        tokens += len(batch.tokens)
        on_progress(stream.bytes_read, stream.total_bytes, tokens)
    writer.finish()
    if not writer.shard_names:
        raise DataError(f"No text in the {len(files)} input files (--input).")
    result = TokenizedSource(writer.shard_names, writer.num_documents, writer.num_tokens, reused=False)
    record.write_finished(result)
    return result


def encode_in_order(
    batches: Iterable[list[str]], settings: TokenizeSettings, num_workers: int
) -> Iterator[TokenizedDocuments]:
    """Encode batches of texts, several at a time, and yield the results in the order of the batches."""
    if num_workers == 1:
        yield from map(DocumentEncoder(settings), batches)
        return
    waiting: deque[Future[TokenizedDocuments]] = deque()
    # Spawned, because forking a process whose tokenizer library has started threads can hang.
    pool = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=_use_one_thread)
    try:
        for batch in batches:
            waiting.append(pool.submit(_encode, settings, batch))
            if len(waiting) >= num_workers * BATCHES_PER_WORKER:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("A tokenizing process was killed, perhaps for lack of memory. Lower --workers.") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _use_one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


@lru_cache(maxsize=1)
def _worker_encoder(settings: TokenizeSettings) -> DocumentEncoder:
    return DocumentEncoder(settings)


def _encode(settings: TokenizeSettings, texts: list[str]) -> TokenizedDocuments:
    return _worker_encoder(settings)(texts)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def run(arguments: argparse.Namespace) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    settings = TokenizeSettings(
        source=arguments.source,
        tokenizer=arguments.tokenizer,
        text_key=arguments.text_key,
        eod_token=arguments.eod_token,
        parse_special_tokens=arguments.parse_special_tokens,
        shard_tokens=arguments.shard_tokens,
        seed=arguments.seed,
        text_suffixes=(*TEXT_SUFFIXES, *arguments.text_suffix),
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[tokens]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"tokenize {settings.source}", total=None, tokens="")

        def show(read_bytes: int, total_bytes: int, tokens: int) -> None:
            progress.update(task, completed=read_bytes, total=total_bytes, tokens=f"{tokens / 1e6:.1f}M tokens")

        result = tokenize(arguments.input, arguments.output, settings, arguments.workers, show)
    console.print(
        f"{arguments.output / settings.source}: {len(result.shards)} shards, {result.documents} documents, "
        f"{result.tokens} tokens{' (were there already)' if result.reused else ''}"
    )


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("tokenize", help="turn text into .bin/.idx shards")
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="PATH", help="files or folders of text")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="a tokenizer.json")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets the shards")
    parser.add_argument("--source", required=True, metavar="NAME", help="shards are called NAME_00000, NAME_00001, ...")
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="of JSONL and Parquet documents (default text)"
    )
    parser.add_argument(
        "--text-suffix",
        action="append",
        default=[],
        metavar=".SUFFIX",
        help="of more plain-text files; may be repeated",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="encoding processes")
    parser.add_argument("--eod-token", default="<|endoftext|>", metavar="TOKEN", help="ends every document")
    parser.add_argument(
        "--parse-special-tokens",
        action="store_true",
        help="special tokens spelled out in the text become their ids; without it they are ordinary text",
    )
    parser.add_argument("--shard-tokens", type=int, default=DEFAULT_SHARD_TOKENS, metavar="N", help="of a full shard")
    parser.add_argument("--seed", type=int, default=0, help="of the order of documents within a shard")
    parser.set_defaults(run=run)
