"""What text is this? A document of a shard, a window of an experiment, or all that an optimizer step reads."""

import argparse
from pathlib import Path

from tokenizers import Tokenizer

from data_tools.console import plain_console
from data_tools.encoders import load_tokenizer, tokenizer_file
from data_tools.experiment import load_experiment
from nemotron_train.config.schema import RunConfig
from nemotron_train.data.blend import BlendPlan
from nemotron_train.data.ledger import NAME as LEDGER
from nemotron_train.data.ledger import samples_of_step
from nemotron_train.data.run_data import RunData, open_run_data
from nemotron_train.data.shard import Shard
from nemotron_train.errors import ConfigError, DataError
from nemotron_train.plan.batching import plan_batches


def document_text(prefix: Path, number: int, tokenizer: Tokenizer) -> str:
    """Return a document of a shard with where it lies.

    Raises:
        ConfigError: the shard has fewer documents.
    """
    shard = Shard(prefix)
    ends = shard.document_ends()
    if not 0 <= number < len(ends):
        raise ConfigError(f"{prefix} has documents 0 to {len(ends) - 1}, not {number} (--document).")
    start = int(ends[number - 1]) if number else 0
    tokens = shard.read(start, int(ends[number]) - start)
    item = shard.dtype.itemsize
    end = int(ends[number])
    place = f"{shard.path}: document {number}, tokens {start} to {end}, bytes {start * item} to {end * item}"
    return f"{place}\n{tokenizer.decode(tokens.tolist(), skip_special_tokens=False)}"


def window_text(data: RunData, sample: int, tokenizer: Tokenizer) -> str:
    """Return the text of a window with where its tokens lie, as training reads it."""
    location = data.blend.locate(sample)
    source = data.reader.sources[location.source]
    lines = [f"window {sample}: source {source.name}, phase {location.phase}, epoch {location.epoch}"]
    for span in location.spans:
        for shard, at, length in source.locate(span.start, span.count):
            item = shard.dtype.itemsize
            lines.append(f"  {shard.path}: tokens {at} to {at + length}, bytes {at * item} to {(at + length) * item}")
    _, tokens = data.reader.read(sample)
    return "\n".join([*lines, tokenizer.decode(tokens.tolist(), skip_special_tokens=False)])


def windows_of_step(config: RunConfig, blend: BlendPlan, step: int) -> tuple[range, str]:
    """Return the windows of an optimizer step, and where that is known from: the run's ledger if it has the step (its
    batch size may have changed on the way), else the plan.

    Raises:
        ConfigError: the plan has no such step.
        DataError: the step was taken with other data, or another plan of it.
    """
    taken = samples_of_step(Path(config.run.dir), step)
    if taken is not None:
        windows, tokens, past = taken
        if blend.past_hash(tokens) != past:
            raise DataError(
                f"{Path(config.run.dir) / LEDGER}: step {step} read other samples (plan hash {past[:12]}) than these "
                f"keys give ({blend.past_hash(tokens)[:12]}). Give the run's own keys: see resolved.yaml beside it."
            )
        return windows, f"as {Path(config.run.dir) / LEDGER} says"
    batches = plan_batches(config.train, config.data.phases, 1)
    if not 1 <= step <= batches.num_steps:
        raise ConfigError(f"The run has steps 1 to {batches.num_steps}, not {step} (--step).")
    before, after = (batches.consumed_tokens_at(at) for at in (step - 1, step))
    return range(blend.sample_at(before), blend.sample_at(after)), f"tokens {before} to {after} of the plan"


def run(arguments: argparse.Namespace) -> None:
    console = plain_console()
    if arguments.shard is not None:
        if arguments.document is None or arguments.tokenizer is None:
            raise ConfigError("--shard needs --document I and --tokenizer PATH.")
        console.print(
            document_text(arguments.shard, arguments.document, load_tokenizer(tokenizer_file(arguments.tokenizer)))
        )
        return
    if (arguments.window is None) is (arguments.step is None):
        raise ConfigError("Ask for one of --shard PREFIX, --window G experiment=NAME, --step N experiment=NAME.")
    config = load_experiment(arguments.overrides)
    data = open_run_data(config)
    tokenizer = load_tokenizer(Path(config.data.path) / config.data.tokenizer)
    if arguments.window is not None:
        if arguments.window < 0:
            raise ConfigError(f"Windows are numbered from 0, not {arguments.window} (--window).")
        windows = range(arguments.window, arguments.window + 1)
    else:
        windows, where = windows_of_step(config, data.blend, arguments.step)
        console.print(f"step {arguments.step}, {where}: windows {windows.start} to {windows.stop - 1}")
    for window in windows:
        console.print(window_text(data, window, tokenizer))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shard", type=Path, metavar="PREFIX", help="a shard")
    parser.add_argument("--document", type=int, metavar="I", help="of the shard, from 0")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="of the shard")
    parser.add_argument("--window", type=int, metavar="G", help="of an experiment, from 0")
    parser.add_argument("--step", type=int, metavar="N", help="of an experiment, from 1: all its windows")
    parser.add_argument("overrides", nargs="*", help="experiment=NAME key=value ...")
