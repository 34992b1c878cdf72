"""How fast is a whole training step on one CPU rank beside transformers' NemotronH of the same size?

    python -m benchmarks.cpu_step [EXPERIMENT] [key=value ...]

Both sides take the same micro-batches forward and backward in float32, clip and update with AdamW; transformers runs
its plain path, the only one it has on a CPU. The chunk size of the scan changes speed, not results: each side runs at
the one of a few that it is fastest with, or both at model.mamba_chunk_size where that is given. Each side lives in a
process of its own with one thread, steps alternate between the two, and the ratio of the medians counts, so that a busy
machine slows both alike. Read the ratio; tokens/s differ from machine to machine. `benchmarks/README.md` has figures.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nemotron_train.config.load import load_config
from nemotron_train.config.schema import PrecisionFormat, RunConfig
from nemotron_train.data.batch import Batch, build_batch
from nemotron_train.plan.run_plan import plan_run

STEPS, WARMUP = 15, 2
CHUNK_SIZES = (16, 32, 64, 128)


def load(overrides: list[str]) -> RunConfig:
    if overrides and "=" not in overrides[0]:
        overrides = [f"experiment={overrides[0]}", *overrides[1:]]
    config = load_config(overrides or ["experiment=quickstart"])
    return replace(
        config,
        precision=replace(config.precision, format=PrecisionFormat.fp32),
        run=replace(config.run, dir=tempfile.mkdtemp()),
    )


def random_batches(config: RunConfig) -> list[Batch]:
    """One step's micro-batches of random tokens, the same on both sides."""
    train = config.train
    generator = torch.Generator().manual_seed(3)
    count = train.global_batch_size // train.micro_batch_size
    shape = (count, train.micro_batch_size, train.seq_length + 1)
    windows = torch.randint(0, config.model.vocab_size, shape, generator=generator).numpy()
    return [
        build_batch(list(rows), [0] * train.micro_batch_size, train.micro_batch_size, train.seq_length)
        for rows in windows
    ]


@contextmanager
def our_step(config: RunConfig) -> Iterator[Callable[[], float]]:
    from nemotron_train.engine.groups import process_groups  # the CPU adaptor must not reach transformers' process
    from nemotron_train.platform.device import choose_platform
    from nemotron_train.platform.ranks import launched_rank
    from nemotron_train.step import train_step
    from nemotron_train.trainer import build_runtime

    me, plan = launched_rank(), plan_run(config, 1)
    device = choose_platform(me)
    with process_groups(plan.layout, device, me, timeout_seconds=60, seed=1) as groups:
        run, batches = build_runtime(plan, device, groups), random_batches(config)
        yield lambda: train_step(run, batches, config.lr.warmup_tokens).loss.loss


@contextmanager
def their_step(config: RunConfig) -> Iterator[Callable[[], float]]:
    from transformers import NemotronHConfig, NemotronHForCausalLM

    from nemotron_train.convert.hf_names import LAYER_TYPES

    sizes, optim = config.model, config.optim
    model = NemotronHForCausalLM(
        NemotronHConfig(
            layers_block_type=[LAYER_TYPES[letter] for letter in sizes.layer_pattern.replace("|", "")],
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.ffn_hidden_size,
            num_attention_heads=sizes.num_attention_heads,
            num_key_value_heads=sizes.num_query_groups,
            head_dim=sizes.attention_head_dim,
            mamba_num_heads=sizes.mamba_num_heads,
            mamba_head_dim=sizes.mamba_head_dim,
            n_groups=sizes.mamba_num_groups,
            ssm_state_size=sizes.mamba_state_dim,
            conv_kernel=sizes.mamba_conv_kernel,
            chunk_size=sizes.mamba_chunk_size,
            use_cache=False,
            attn_implementation="sdpa",
        )
    ).train()
    adamw = torch.optim.AdamW(
        model.parameters(),
        lr=config.lr.peak,
        betas=(optim.adam_beta1, optim.adam_beta2),
        weight_decay=optim.weight_decay,
    )
    batches = random_batches(config)

    def step() -> float:
        adamw.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches:
            logits = model(input_ids=batch.tokens_BS).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels_BS.flatten()) / len(batches)
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad_norm)
        adamw.step()
        return total

    yield step


def serve(side: str, overrides: list[str]) -> None:
    """Take one step for every line on standard input and answer with its seconds and loss."""
    torch.set_num_threads(1)
    with {"ours": our_step, "transformers": their_step}[side](load(overrides)) as step:
        for _ in sys.stdin:
            start = time.perf_counter()
            loss = step()
            print(time.perf_counter() - start, loss, flush=True)  # the protocol with the parent process


class Side:
    def __init__(self, name: str, overrides: list[str], chunk_size: int) -> None:
        self.chunk_size = chunk_size
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONWARNINGS": "ignore",
        }
        chunk = f"model.mamba_chunk_size={chunk_size}"
        command = [sys.executable, "-m", "benchmarks.cpu_step", "--side", name, *overrides, chunk]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def step(self) -> float:
        """Take a step and return its seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline().split()[0])

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def fastest_side(name: str, overrides: list[str], chunk_sizes: Sequence[int]) -> Side:
    """Try the chunk sizes one after the other and return the fastest, still running."""
    best, best_seconds = None, float("inf")
    for chunk_size in chunk_sizes:
        side = Side(name, overrides, chunk_size)
        seconds = min([side.step() for _ in range(WARMUP + 3)][WARMUP:])
        slower = side if seconds >= best_seconds else best
        if seconds < best_seconds:
            best, best_seconds = side, seconds
        if slower is not None:
            slower.stop()
    assert best is not None
    return best


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--side"]:
        serve(arguments[1], arguments[2:])
        return
    console = Console(highlight=False, width=120)
    if arguments and "=" not in arguments[0]:
        arguments = [f"experiment={arguments[0]}", *arguments[1:]]
    arguments = arguments or ["experiment=quickstart"]
    config = load(arguments)
    is_given = any(argument.startswith("model.mamba_chunk_size=") for argument in arguments)
    chunk_sizes = (config.model.mamba_chunk_size,) if is_given else CHUNK_SIZES
    plan = plan_run(config, 1)
    tokens = plan.tokens_per_step
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    console.print(f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, 1 thread; {versions}")
    console.print(
        f"{config.run.name}: {plan.sizes.parameters:,} parameters, {tokens:,} tokens a step, median of {STEPS} steps, "
        f"each side at the fastest chunk size of {', '.join(map(str, chunk_sizes))}"
    )
    sides = {name: fastest_side(name, arguments, chunk_sizes) for name in ("ours", "transformers")}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in track(range(WARMUP + STEPS), description="steps", console=console, transient=True):
        for name, side in sides.items():
            taken = side.step()
            if number >= WARMUP:
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    table = Table("training step", "chunk size", "seconds", "tokens/s", "of transformers")
    for name, value in medians.items():
        ratio = f"{medians['transformers'] / value:.2f} x"
        table.add_row(name, str(sides[name].chunk_size), f"{value:.3f}", f"{tokens / value:,.0f}", ratio)
    console.print(table)
    for side in sides.values():
        side.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
