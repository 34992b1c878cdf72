"""How does text become shards to train on?

    python -m data_tools tokenize --input FILE_OR_DIR ... --tokenizer tokenizer.json --output DIR --source NAME

The input is cut into parts. Each is tokenized on its own, its documents dealt out to shards by a hash of their place;
then each shard is put together from all parts, its documents shuffled. So neighbours on disk are unrelated, the shards
follow from text, tokenizer and settings alone, and any number of processes can share the work, at once or one after
the other: DIR/.NAME.work holds what is half done, DIR/NAME.manifest.json appears when all is there.
"""

import argparse
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data_tools.console import plain_console
from data_tools.documents import COMPRESSED_SUFFIXES, TEXT_SUFFIXES, find_files
from data_tools.encoders import ENGINES, special_token_id, tokenizer_file
from data_tools.executors import EXECUTORS, run_all
from data_tools.parts import Part, plan_parts
from data_tools.source_record import DEFAULT_SHARD_TOKENS, SourceRecord, TokenizedSource, TokenizeSettings
from data_tools.tokenize_work import Job, encoder_of
from nemotron_train.data.shard_format import token_dtype
from nemotron_train.data.tokenizer_file import tokenizer_size
from nemotron_train.errors import ConfigError, DataError

BYTES_A_TOKEN = 4  # of English text and code, about; decides the number of shards and nothing else
COMPRESSION = 4  # of JSONL, about

OnProgress = Callable[[str, int, int, int], None]


def tokenize(
    inputs: Sequence[Path],
    output: Path,
    settings: TokenizeSettings,
    num_workers: int,
    *,
    executor: str = "local",
    task: tuple[int, int] = (0, 1),
    on_progress: OnProgress = lambda what, done, total, tokens: None,
) -> TokenizedSource | None:
    """Write the shards of one source, or find that they are there.

    Args:
        task: (i, n): tokenize every n-th part, from the i-th on; the task that finds all parts done writes the shards.
        on_progress: called with what is being done, how much of it is done and in all, and tokens so far.

    Returns:
        None if other tasks still have parts to do, or write the shards.

    Raises:
        ConfigError: the tokenizer lacks the end-of-document token, or a setting is out of range.
        DataError: an input cannot be read, there is no text, or `output` has other shards of this name.
    """
    _check(settings, num_workers, task)
    files = find_files(inputs, settings.text_suffixes)
    special_token_id(settings.tokenizer, settings.eod_token, "--eod-token")  # found before anything is written
    for token in settings.fim_tokens:
        special_token_id(settings.tokenizer, token, "--fim-tokens")
    record = SourceRecord(output, settings, files)
    finished = record.find_finished()
    if finished is not None:
        return finished
    parts = plan_parts(files)
    job = Job(
        settings=settings,
        output=output,
        work=record.work,
        num_parts=len(parts),
        num_shards=settings.num_shards or count_shards(parts, settings.shard_tokens),
        dtype=token_dtype(tokenizer_size(settings.tokenizer)).str,
    )
    record.write_begun()
    run = partial(run_all, executor=executor, num_workers=num_workers)
    task_lock = record.work / f"task_{task[0]}.lock"
    with lock(task_lock) as is_ours:
        if not is_ours:
            raise DataError(
                f"{task_lock} is locked: another process is at the same work. Wait for it, or choose another --output."
            )
        total, read, tokens = sum(part.num_bytes for part in parts), 0, 0
        for num_bytes, num_tokens in run(job.tokenize_part, parts[task[0] :: task[1]]):
            read, tokens = read + num_bytes, tokens + num_tokens
            on_progress("tokenize", read, total, tokens)
        if not all(job.is_done(part.number) for part in parts):
            return None
        # Tasks that finish together all come here: one writes the shards, the others find them, or go on if it died.
        with lock(record.work / "shards.lock", wait=True):
            finished = record.find_finished()
            if finished is not None:
                return finished
            job.list_spills()
            shards = []
            for shard in run(job.write_shard, range(job.num_shards)):
                shards += [shard] if shard is not None else []
                on_progress("write", len(shards), job.num_shards, tokens)
            if not shards:
                raise DataError(f"No text in the {len(files)} input files (--input, --where).")
            result = record.write_manifest(sorted(shards))
    shutil.rmtree(record.work, ignore_errors=True)
    return result


def count_shards(parts: Sequence[Part], shard_tokens: int) -> int:
    """Return into how many shards the input goes, by its size."""
    size = sum(
        part.num_bytes * (COMPRESSION if part.files[0].name.endswith(COMPRESSED_SUFFIXES) else 1) for part in parts
    )
    return max(1, -(-size // (BYTES_A_TOKEN * shard_tokens)))


def _check(settings: TokenizeSettings, num_workers: int, task: tuple[int, int]) -> None:
    if Path(settings.source).name != settings.source or settings.source in ("", ".."):
        raise ConfigError(
            f"--source {settings.source!r} must be the name of a file: not empty, '.' or '..', and without a slash."
        )
    if settings.seed < 0:
        raise ConfigError(f"--seed {settings.seed} must be 0 or more.")
    if num_workers < 1 or settings.shard_tokens < 1 or (settings.num_shards or 1) < 1:
        raise ConfigError(
            f"--workers {num_workers}, --shard-tokens {settings.shard_tokens} and --shards {settings.num_shards} must "
            "be at least 1."
        )
    if bool(settings.fim_rate) is not (len(set(settings.fim_tokens)) == 3) or not 0 <= settings.fim_rate <= 1:
        tokens = " ".join(settings.fim_tokens) or "(none)"
        raise ConfigError(
            f"--fim-rate {settings.fim_rate} and --fim-tokens {tokens}: a rate above 0, at most 1, goes with three "
            "tokens, before prefix, suffix and middle."
        )
    if not 0 <= settings.fim_spm_rate <= 1:
        raise ConfigError(f"--fim-spm-rate {settings.fim_spm_rate} must be from 0 to 1.")
    if not 0 <= task[0] < task[1]:
        raise ConfigError(f"--task {task[0]}/{task[1]}: tasks of N are 0/N to N-1/N.")


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock, gone when its process is, however that ends. Without `wait`, yield False if another process has it;
    with `wait`, only if the work is finished and its folder gone."""
    try:
        file = path.open("w")
    except FileNotFoundError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def run(arguments: argparse.Namespace) -> None:
    console = plain_console(stderr=True)
    settings = TokenizeSettings(
        source=arguments.source,
        tokenizer=tokenizer_file(arguments.tokenizer),
        text_key=arguments.text_key,
        eod_token=arguments.eod_token,
        parse_special_tokens=arguments.parse_special_tokens,
        shard_tokens=arguments.shard_tokens,
        num_shards=arguments.shards,
        seed=arguments.seed,
        text_suffixes=(*TEXT_SUFFIXES, *arguments.text_suffix),
        fim_rate=arguments.fim_rate,
        fim_spm_rate=arguments.fim_spm_rate,
        fim_tokens=tuple(arguments.fim_tokens),
        where=tuple(_condition(text) for text in arguments.where),
        engine=arguments.engine,
    )
    console.print(f"engine: {encoder_of(settings).engine_text}")
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[tokens]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bars = {"tokenize": progress.add_task(f"tokenize {settings.source}", total=None, tokens="")}

        def show(what: str, done: int, total: int, tokens: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(f"{what} {settings.source}", total=None, tokens="")
            progress.update(bars[what], completed=done, total=total, tokens=f"{tokens / 1e6:.1f}M tokens")

        result = tokenize(
            arguments.input,
            arguments.output,
            settings,
            arguments.workers,
            executor=arguments.executor,
            task=_task(arguments.task),
            on_progress=show,
        )
    if result is None:
        console.print(f"task {arguments.task} is done; the last of the other tasks writes the shards")
        return
    console.print(
        f"{arguments.output / settings.source}: {len(result.shards)} shards, {result.documents} documents, "
        f"{result.tokens} tokens{' (were there already)' if result.reused else ''}"
    )


def _condition(text: str) -> tuple[str, str, bool]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--where {text}: write KEY=VALUE or KEY!=VALUE.")
    return (key.removesuffix("!"), value, not key.endswith("!"))


def _task(text: str) -> tuple[int, int]:
    try:
        number, _, count = text.partition("/")
        return int(number), int(count)
    except ValueError as error:
        raise ConfigError(f"--task {text}: write I/N, such as 0/8.") from error


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, metavar="PATH", help="files or folders of text")
    add("--tokenizer", type=Path, required=True, metavar="PATH", help="a tokenizer.json, or a folder that holds one")
    add("--output", type=Path, required=True, metavar="DIR", help="gets the shards")
    add("--source", required=True, metavar="NAME", help="shards are called NAME_00000, NAME_00001, ...")
    add("--text-key", default="text", metavar="KEY", help="of JSONL and Parquet documents (default text)")
    add("--where", action="append", default=[], metavar="KEY=VALUE", help="keep only such documents (or KEY!=VALUE)")
    add("--text-suffix", action="append", default=[], metavar=".SUFFIX", help="of more plain-text files")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes on this machine")
    add("--executor", choices=EXECUTORS, default="local", help="ray: on a Ray cluster, or one it starts here")
    add("--task", default="0/1", metavar="I/N", help="one of N jobs that share --output, e.g. of a Slurm array")
    add("--engine", choices=ENGINES, default="auto", help="auto: gigatoken where it gives the same ids")
    add("--eod-token", default="<|endoftext|>", metavar="TOKEN", help="ends every document")
    add(
        "--parse-special-tokens",
        action="store_true",
        help="special tokens spelled out in the text become their ids; without it they are ordinary text",
    )
    add("--fim-rate", type=float, default=0.0, metavar="R", help="of documents cut for fill-in-the-middle")
    add("--fim-spm-rate", type=float, default=0.5, metavar="R", help="of these, suffix first (default 0.5)")
    add("--fim-tokens", nargs=3, default=[], metavar="TOKEN", help="before prefix, suffix and middle")
    add("--shard-tokens", type=int, default=DEFAULT_SHARD_TOKENS, metavar="N", help="of a shard, about")
    add("--shards", type=int, metavar="N", help="how many, instead of --shard-tokens")
    add("--seed", type=int, default=0, help="of the order of documents")
