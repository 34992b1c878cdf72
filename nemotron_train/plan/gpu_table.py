"""What is known of a kind of GPU, and how it is read from a table: a JSON file, shipped or written by `--probe`.

A table holds what a kind of GPU took for the layers of one model, `model` and `tokens` of the file; the planner scales
from there (`layer_times.py`). Its keys are the fields of `Gpu`, with their units; `device`, `date` and `summary` are
for the report, `versions` and `notes` for people.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from sys import float_info
from typing import Any

from nemotron_train.config.schema import ModelSection, PrecisionFormat
from nemotron_train.config.typed import Reader
from nemotron_train.errors import ConfigError
from nemotron_train.plan.pattern import LayerKind

FORMATS = (PrecisionFormat.bf16, PrecisionFormat.fp8_block, PrecisionFormat.fp8_current)
TEXTS = ("device", "date", "summary")
FOR_PEOPLE = ("versions", "notes")
# What a layer's shape is, of the model's section; how many layers there are and what they start from is not asked.
SHAPE = (
    "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "attention_head_dim",
    "mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim", "mamba_chunk_size", "vocab_size",
)  # fmt: skip

ByFormat = Mapping[PrecisionFormat, float]


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU in nodes of eight. Times are milliseconds forward and backward of one micro-batch of `tokens`
    tokens, one sample, through one layer of `model`."""

    name: str
    source: str  # for the report: which table, and what it rests on
    memory_gib: float
    model: ModelSection
    tokens: int
    layer_ms: Mapping[LayerKind, ByFormat]  # a layer among others of its kind: norm, products, core and residual
    core_ms: Mapping[LayerKind, float]  # of these: convolution, scan and gated norm; or attention
    norm_and_residual_ms: float  # of these, too
    # The CPU's time to start the kernels of a layer, (forward, backward): the same for any tokens and any model.
    launch_ms: Mapping[LayerKind, Mapping[PrecisionFormat, tuple[float, float]]]
    head_ms: float  # embedding, final norm, output layer and loss
    optimizer_ps_per_parameter: float  # AdamW in float32 with the norm of the gradients, unclipped; picoseconds
    first_pass_ps_per_weight: ByFormat  # a step's first micro-batch beyond the others: FP8 weights are quantised
    tensor_parallel_ms: ByFormat  # a layer at tensor-parallel size 2 beyond half a layer and its traffic
    node_gb_per_s: float  # what a GPU reaches in large collectives within a node, one direction
    network_gb_per_s: float  # the same, through its network adapter
    memory_slowdown: float = 1.0  # of kernels bound by memory, on a card that was not itself measured

    def layer_ms_in(self, kind: LayerKind, format: PrecisionFormat) -> float:
        """Return the time of a layer.

        Raises:
            ConfigError: the table has none in this format.
        """
        if format not in self.layer_ms[kind]:
            raise ConfigError(
                f"No times in {format.value} are in {self.source}. Choose another gpu=, or a precision.format that it "
                f"has: {', '.join(known.value for known in self.layer_ms[kind])}."
            )
        return self.layer_ms[kind][format]


def read_gpu(file: Path, label: str) -> Gpu:
    """Read a table.

    Args:
        label: what the report calls it.

    Raises:
        ConfigError: the file is not there or no table, or a key is missing or impossible; names file and key.
    """
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The table {file} cannot be read: {error.strerror}. --probe {file} writes one.") from error
    except ValueError as error:
        raise ConfigError(f"The table {file} is not JSON: {error}.") from error
    return gpu_from(tree, file, label)


def gpu_from(tree: Any, file: Path, label: str) -> Gpu:
    """Check the content of `file` and turn it into a Gpu."""
    table = _Table(tree, file)
    table.refuse_unknown()
    device, date, summary = (table.text(key) for key in TEXTS)
    gpu = Gpu(
        name=device,
        source=f"{label} ({device}, {date}): {summary}",
        memory_gib=table.number("memory_gib"),
        model=table.model(),
        tokens=table.whole_number("tokens"),
        layer_ms={kind: table.by_format(f"layer_ms.{kind.name}") for kind in LayerKind},
        core_ms={
            LayerKind.mamba: table.number("core_ms.mamba"),
            LayerKind.attention: table.number("core_ms.attention"),
            LayerKind.mlp: 0.0,
        },
        norm_and_residual_ms=table.number("norm_and_residual_ms"),
        launch_ms={kind: table.pairs_by_format(f"launch_ms.{kind.name}") for kind in LayerKind},
        head_ms=table.number("head_ms"),
        optimizer_ps_per_parameter=table.number("optimizer_ps_per_parameter"),
        first_pass_ps_per_weight=table.by_format("first_pass_ps_per_weight", least=0.0, needs_bf16=False),
        tensor_parallel_ms=table.by_format("tensor_parallel_ms", least=0.0),
        node_gb_per_s=table.number("node_gb_per_s"),
        network_gb_per_s=table.number("network_gb_per_s"),
    )
    table.check_parts(gpu)
    return gpu


class _Table:
    """The content of a file, read key by key; what does not fit is refused with the file and the key."""

    def __init__(self, tree: Any, file: Path) -> None:
        self.tree, self.file = tree, file
        if not isinstance(tree, dict):
            raise ConfigError(f"The table {file} is not an object with keys such as layer_ms.")

    def refuse_unknown(self) -> None:
        known = {*TEXTS, *FOR_PEOPLE, *Gpu.__dataclass_fields__} - {"name", "source", "memory_slowdown"}
        for key in self.tree:
            if key not in known:
                self.refuse(key, "is not a key of a table")

    def refuse(self, key: str, problem: str) -> None:
        raise ConfigError(f"The table {self.file}: {key} {problem}. Write it anew with --probe, or mend it.")

    def value(self, key: str) -> Any:
        found = self.tree
        for part in key.split("."):
            if not isinstance(found, dict) or part not in found:
                self.refuse(key, "is missing")
            found = found[part]
        return found

    def text(self, key: str) -> str:
        found = self.value(key)
        if not isinstance(found, str):
            self.refuse(key, f"is {json.dumps(found)}, expected text")
        return found

    def number(self, key: str, least: float | None = None) -> float:
        """Return a finite number: above zero, or at least `least`."""
        return self._checked(key, self.value(key), least)

    def whole_number(self, key: str) -> int:
        """Return a whole number above zero."""
        found = self.number(key)
        if not found.is_integer():
            self.refuse(key, f"is {found}, expected a whole number")
        return int(found)

    def _checked(self, key: str, found: Any, least: float | None) -> float:
        if isinstance(found, bool) or not isinstance(found, int | float):
            self.refuse(key, f"is {json.dumps(found)}, expected a number")
        if not abs(found) <= float_info.max:  # neither infinite nor NaN, nor a whole number that no float can hold
            self.refuse(key, f"is {json.dumps(found)}, expected a finite number")
        if found <= 0 if least is None else found < least:
            self.refuse(key, f"is {found}, expected {'more than 0' if least is None else f'{least:g} or more'}")
        return float(found)

    def by_format(
        self, key: str, least: float | None = None, *, needs_bf16: bool = True
    ) -> dict[PrecisionFormat, float]:
        """Read one number a format."""
        return {format: self.number(f"{key}.{format.value}", least) for format in self._formats(key, needs_bf16)}

    def pairs_by_format(self, key: str) -> dict[PrecisionFormat, tuple[float, float]]:
        """Read two numbers a format, none below zero."""
        pairs = {}
        for format in self._formats(key, needs_bf16=True):
            name = f"{key}.{format.value}"
            pair = self.value(name)
            if not isinstance(pair, list) or len(pair) != 2:
                self.refuse(name, f"is {json.dumps(pair)}, expected two numbers, forward and backward")
            forward, backward = pair
            pairs[format] = (
                self._checked(f"{name}, forward,", forward, 0.0),
                self._checked(f"{name}, backward,", backward, 0.0),
            )
        return pairs

    def _formats(self, key: str, needs_bf16: bool) -> list[PrecisionFormat]:
        found = self.value(key)
        if not isinstance(found, dict):
            self.refuse(key, f"is {json.dumps(found)}, expected a value for each format")
        names = {format.value: format for format in FORMATS}
        if needs_bf16:
            self.value(f"{key}.{PrecisionFormat.bf16.value}")
        for name in found:
            if name not in names:
                self.refuse(f"{key}.{name}", f"is none of the formats {', '.join(names)}")
        return [names[name] for name in found]

    def model(self) -> ModelSection:
        reader = Reader()
        shape = {name: self.value(f"model.{name}") for name in SHAPE}
        model = reader.section(ModelSection, {"layer_pattern": "M*-", **shape}, "model")
        if model is None or reader.problems:
            raise ConfigError(f"The table {self.file}: {reader.problems[0]}")
        for name in SHAPE:
            self.number(f"model.{name}")
        return model

    def check_parts(self, gpu: Gpu) -> None:
        """Refuse a layer that takes less than its parts: its products would take no time, or less."""
        for kind, by_format in gpu.layer_ms.items():
            parts = gpu.core_ms[kind] + gpu.norm_and_residual_ms
            for format, whole in by_format.items():
                if whole <= parts:
                    self.refuse(
                        f"layer_ms.{kind.name}.{format.value}",
                        f"is {whole:g}, no more than its parts core_ms and norm_and_residual_ms take ({parts:g})",
                    )
                in_table = {"tensor_parallel_ms": gpu.tensor_parallel_ms, f"launch_ms.{kind.name}": gpu.launch_ms[kind]}
                if format is not PrecisionFormat.bf16:
                    in_table["first_pass_ps_per_weight"] = gpu.first_pass_ps_per_weight
                for key, present in in_table.items():
                    if format not in present:
                        self.refuse(f"{key}.{format.value}", "is missing")
