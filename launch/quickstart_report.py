"""What did the quickstart's model learn?

    python launch/quickstart_report.py RUN_DIR

Prints the loss at start and end, the held-out loss beside what counting reaches on the same tokens, where the picture
is, and a few continuations of held-out text.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from data_tools.ngram import NgramLosses, NgramReport, measure_ngrams
from nemotron_train.checkpoint.commit import newest_checkpoint
from nemotron_train.checkpoint.whole_weights import read_reference_model
from nemotron_train.config.load import read_resolved
from nemotron_train.config.schema import RunConfig
from nemotron_train.data.open_sources import expand_prefixes
from nemotron_train.data.shard import Shard
from nemotron_train.errors import CheckpointError, NemotronTrainError
from nemotron_train.generate.continuations import Request, continue_prompts
from nemotron_train.generate.sampling import Sampling
from nemotron_train.observe.jsonl_writer import read_records
from nemotron_train.observe.plot import draw_loss

PROMPT_TOKENS, SAMPLED_TOKENS, TEMPERATURE, SEED = 48, 64, 0.7, 11


def main(arguments: Sequence[str]) -> int:
    console = Console(highlight=False, emoji=False)
    if len(arguments) != 1:
        console.print("usage: python launch/quickstart_report.py RUN_DIR")
        return 2
    try:
        report(Path(arguments[0]), console)
    except NemotronTrainError as error:
        console.print(f"{type(error).__name__}: {error}", markup=False)
        return 1
    return 0


def report(run_dir: Path, console: Console) -> None:
    config = read_resolved(run_dir / "resolved.yaml")
    records = read_records(run_dir / "metrics.jsonl")
    ngrams = measure_yardsticks(config)
    trained = [record for record in records if record.get("loss") is not None]
    evaluated = [record for record in records if record.get("eval_loss") is not None]
    console.print()
    first, last = trained[0], trained[-1]
    console.print(
        f"Training loss: {first['loss']:.3f} nats a token at step {first['step']}, {last['loss']:.3f} at step "
        f"{last['step']}."
    )
    if evaluated:
        console.print(table_of_losses(evaluated[-1], ngrams))
        gain = ngrams.pooled.bigram_loss - evaluated[-1]["eval_loss"]
        if gain > 0:
            console.print(
                f"Its held-out loss is {gain:.3f} nats below a bigram model's: it learned more than counts of words "
                "and pairs explain."
            )
        else:
            console.print(
                f"Its held-out loss is {-gain:.3f} nats above a bigram model's. Train longer: train.train_tokens."
            )
    draw_loss(
        records, config.data.phases, run_dir / "loss.png", config.run.name, {"bigram model": ngrams.pooled.bigram_loss}
    )
    console.print(f"Picture: {run_dir / 'loss.png'}")
    show_continuations(config, run_dir, console)


def measure_yardsticks(config: RunConfig) -> NgramReport:
    """What counting reaches on exactly the tokens that the trainer's evaluation predicts."""
    sources = config.data.sources
    return measure_ngrams(
        [path for source in sources for path in expand_prefixes(config.data, source, source.prefixes, "prefixes")],
        {
            source.name: expand_prefixes(config.data, source, source.eval_prefixes, "eval_prefixes")
            for source in sources
            if source.eval_prefixes
        },
        max_tokens=config.train.eval_tokens,
        seq_length=config.train.seq_length,
    )


def table_of_losses(record: dict, ngrams: NgramReport) -> Table:
    table = Table(title="Held-out loss, nats a token")
    for column in ("", "tokens", "this model", "bigram model", "unigram entropy"):
        table.add_column(column, justify="left" if not column else "right")

    def add(name: str, loss: float, counted: NgramLosses) -> None:
        table.add_row(
            name,
            f"{counted.num_tokens:,}",
            f"{loss:.3f}",
            f"{counted.bigram_loss:.3f}",
            f"{counted.unigram_entropy:.3f}",
        )

    for name, counted in ngrams.sources.items():
        add(name, record.get(f"eval_loss/{name}", math.nan), counted)
    table.add_section()
    add("all", record["eval_loss"], ngrams.pooled)
    return table


def show_continuations(config: RunConfig, run_dir: Path, console: Console) -> None:
    """Sample one continuation of the first held-out document of each source."""
    folder, _ = newest_checkpoint(run_dir / "checkpoints")
    if folder is None:
        raise CheckpointError(f"{run_dir / 'checkpoints'} holds no complete checkpoint to sample from.")
    tokenizer = Tokenizer.from_file(str(Path(config.data.path) / config.data.tokenizer))
    sources = [source for source in config.data.sources if source.eval_prefixes]
    prompts = []
    for source in sources:
        shard = Shard(expand_prefixes(config.data, source, source.eval_prefixes, "eval_prefixes")[0])
        prompts.append(shard.read(0, PROMPT_TOKENS).tolist())
    request = Request(max_new_tokens=SAMPLED_TOKENS, sampling=Sampling(TEMPERATURE, seed=SEED))
    continuations = continue_prompts(read_reference_model(folder, torch.float32), prompts, request)
    console.print(f"\nHeld-out text and how the model of {folder.name} goes on (temperature {TEMPERATURE}):")
    for source, prompt, continuation in zip(sources, prompts, continuations, strict=True):
        console.rule(source.name, align="left")
        console.print(tokenizer.decode(prompt), style="dim", end="", markup=False)
        console.print(tokenizer.decode(continuation.tokens), style="bold", markup=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
