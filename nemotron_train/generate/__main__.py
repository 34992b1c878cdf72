"""`python -m nemotron_train.generate`: texts go on as one of our checkpoints continues them.

python -m nemotron_train.generate --checkpoint RUN_DIR/checkpoints/step_... --prompt "def main(" --temperature 0.7
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment, Segments
from rich.style import Style
from tokenizers import Tokenizer

from nemotron_train.checkpoint.commit import read_commit
from nemotron_train.checkpoint.whole_weights import read_reference_model
from nemotron_train.config.load import read_resolved
from nemotron_train.data.open_tokenizer import open_tokenizer
from nemotron_train.data.tokenizer_file import token_id
from nemotron_train.errors import EXIT_FAILED, ConfigError, NemotronTrainError
from nemotron_train.generate.continuations import Continuation, Request, check_lengths, check_prompts, continue_prompts
from nemotron_train.generate.sampling import Sampling
from nemotron_train.generate.thinking import ThinkingBudget

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_STOP = "<|endoftext|>"


def main(argv: Sequence[str] | None = None) -> int:
    """Continue the prompts; errors the user can mend are shown without a traceback."""
    arguments = build_parser().parse_args(argv)
    messages = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)
    try:
        generate(arguments, messages)
    except NemotronTrainError as error:
        messages.print(f"{type(error).__name__}: {error}")
        return EXIT_FAILED
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nemotron-generate", description="Continue texts with a checkpoint.")
    option = parser.add_argument
    option("--checkpoint", type=Path, required=True, metavar="DIR", help="RUN_DIR/checkpoints/step_..., of any layout")
    option("--prompt", action="append", default=[], metavar="TEXT", help="what to continue; may be given several times")
    option("--prompts", type=Path, metavar="FILE", help="more of them, one JSON string a line")
    option("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json (default: that of the checkpoint's run)")
    option("--max-new-tokens", type=int, default=128, metavar="N", help="(default: %(default)s)")
    option("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: %(default)s)")
    option("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this probability (default: 1)")
    option("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    stop = f"a token that ends a text; may be given several times (default: {DEFAULT_STOP} if the tokenizer has it)"
    option("--stop", action="append", metavar="TOKEN", help=stop)
    thinking = "close <think> at the first newline after N tokens of it, at the latest 500 tokens later"
    option("--thinking-budget", type=int, metavar="N", help=thinking)
    option("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    option("--precision", choices=sorted(DTYPES), help="of the weights (default: bf16 on a GPU, fp32 on a CPU)")
    option("--json", action="store_true", help="print a JSON object for each prompt")
    return parser


def generate(arguments: argparse.Namespace, messages: Console) -> None:
    """Read everything small first, so that a mistake shows before the weights are read."""
    sampling = Sampling(arguments.temperature, arguments.top_p, arguments.seed)
    facts = read_commit(arguments.checkpoint).model
    vocab_size, places = int(str(facts["vocab_size"])), facts.get("max_position_embeddings")
    path = arguments.tokenizer or tokenizer_of_run(arguments.checkpoint)
    tokenizer = open_tokenizer(path, vocab_size)
    texts = [*arguments.prompt, *(read_prompts(arguments.prompts) if arguments.prompts else ())]
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    request = Request(
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens(path, arguments.stop, tokenizer),
        thinking=thinking_budget(tokenizer, arguments.thinking_budget),
    )
    check_prompts(prompts, vocab_size, request)
    check_lengths(prompts, None if places is None else int(str(places)), request)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = arguments.precision or ("fp32" if device.type == "cpu" else "bf16")
    model = read_reference_model(arguments.checkpoint, DTYPES[precision], device)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=messages, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("tokens", total=request.max_new_tokens)
        show: Callable[[int], object] = lambda left: progress.update(task, advance=1, description=f"{left} texts go on")  # noqa: E731
        started = time.perf_counter()
        continuations = continue_prompts(model, prompts, request, show)
    seconds = time.perf_counter() - started
    write(texts, continuations, tokenizer, as_json=arguments.json)
    count = sum(len(continuation.tokens) for continuation in continuations)
    messages.print(f"{count} tokens in {seconds:.2f} s ({precision} on {device}).")


def write(texts: Sequence[str], continuations: Sequence[Continuation], tokenizer: Tokenizer, *, as_json: bool) -> None:
    """Write to standard output, every character as it is: rich would widen tabs in text, and make 💯 of `x[:100:2]`."""
    console = Console(soft_wrap=True)
    for text, continuation in zip(texts, continuations, strict=True):
        new = tokenizer.decode(continuation.tokens, skip_special_tokens=False)
        pieces = [Segment(text, Style(dim=True)), Segment(new, Style(bold=True))]
        if as_json:
            facts = {"prompt": text, "text": new, "tokens": continuation.tokens, "end": continuation.end.value}
            pieces = [Segment(json.dumps(facts, ensure_ascii=False))]
        console.print(Segments([*pieces, Segment.line()]))


def tokenizer_of_run(checkpoint: Path) -> Path:
    """Return the tokenizer beside an imported model, or the one that the run was configured with.

    Raises:
        ConfigError: neither is there.
    """
    run_dir = checkpoint.resolve().parent.parent
    if (run_dir / "tokenizer.json").is_file():
        return run_dir / "tokenizer.json"
    if not (run_dir / "resolved.yaml").is_file():
        raise ConfigError(f"{run_dir} has neither tokenizer.json nor resolved.yaml. Give --tokenizer FILE.")
    data = read_resolved(run_dir / "resolved.yaml").data
    return Path(data.path) / data.tokenizer


def read_prompts(path: Path) -> list[str]:
    """Read one JSON string a line.

    Raises:
        ConfigError: the file cannot be read, or a line is something else; says which.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror} (--prompts).") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompt = json.loads(line)
        except ValueError:
            prompt = None
        if not isinstance(prompt, str):
            raise ConfigError(f'{path}:{number} is no JSON string such as "a text\\n": {line[:60]}')
        prompts.append(prompt)
    return prompts


def stop_tokens(path: Path, asked: Sequence[str] | None, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids; raises ConfigError if the tokenizer has not one of those asked for."""
    if asked is None:
        default = tokenizer.token_to_id(DEFAULT_STOP)
        return frozenset() if default is None else frozenset({default})
    return frozenset(token_id(path, token, "--stop") for token in asked)


def thinking_budget(tokenizer: Tokenizer, tokens: int | None) -> ThinkingBudget | None:
    """Return the budget in the tokenizer's ids.

    Raises:
        ConfigError: it is negative.
    """
    if tokens is None:
        return None
    if tokens < 0:
        raise ConfigError(f"--thinking-budget={tokens}: choose a number of tokens, 0 or more.")
    opening, closing = (tokenizer.encode(tag, add_special_tokens=False).ids for tag in ("<think>", "</think>"))
    ids = range(tokenizer.get_vocab_size(with_added_tokens=True))
    newlines = frozenset(id for id in ids if "\n" in tokenizer.decode([id], skip_special_tokens=False))
    return ThinkingBudget(tokens=tokens, opening=tuple(opening), closing=tuple(closing), newlines=newlines)


if __name__ == "__main__":
    sys.exit(main())
