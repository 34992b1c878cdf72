"""What does splitting a layer over two GPUs cost beside half a layer each, and how fast do the two reach each other?"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from nemotron_train.config.schema import PrecisionFormat
from nemotron_train.plan.gpu_table import Gpu
from nemotron_train.plan.layer_times import layer_seconds
from nemotron_train.plan.pattern import LayerKind
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.plan.traffic import tensor_parallel_seconds
from nemotron_train.probe.chunks import Bench, Measurement, layer_ms

LAYERS_OF_MODEL = {LayerKind.mamba: 28, LayerKind.mlp: 28, LayerKind.attention: 6}  # of Nemotron Nano 12B v2


def gather_gb_per_s(bench: Bench) -> float:
    """Return what a GPU receives a second while a hidden state is gathered, as before every layer."""
    size = bench.groups.tp.size()
    model, tokens = bench.config.model, bench.config.train.seq_length
    with torch.no_grad():
        part = bench.random(tokens // size, 1, model.hidden_size).detach()
        whole = part.new_empty(tokens, 1, model.hidden_size)
    spent = bench.median_ms(lambda: dist.all_gather_into_tensor(whole, part, group=bench.groups.tp), calls=10)
    return whole.nbytes * (size - 1) / size / (spent * 1e-3) / 1e9


def split_ms(bench: Bench, gpu: Gpu, format: PrecisionFormat) -> float:
    """Return the time of a layer beyond what the planner makes of the table for it, mean of the layers of the 12B.

    Args:
        gpu: the table as one GPU filled it, with the bandwidth of this pair.
    """
    unsplit = replace(gpu, tensor_parallel_ms={**gpu.tensor_parallel_ms, format: 0.0})
    beyond = 0.0
    for kind, count in LAYERS_OF_MODEL.items():
        config = bench.with_layers(kind.value, format).config
        layout, tokens = plan_run(config, bench.groups.tp.size()).layout, config.train.seq_length
        expected = layer_seconds(kind, format, config, tokens, unsplit).total
        expected += tensor_parallel_seconds(config, layout, tokens, unsplit)
        beyond += count * (layer_ms(bench, kind, format) - 1e3 * expected)
    return max(beyond / sum(LAYERS_OF_MODEL.values()), 0.0)


def measurements(bench: Bench, table: dict[str, Any], read: Callable[[dict[str, Any]], Gpu]) -> list[Measurement]:
    """Return what two ranks tell, in order: the bandwidth goes into what comes after it.

    Args:
        table: filled by one GPU; each result is entered before the next is measured.
        read: turns it into a Gpu.
    """
    formats = [PrecisionFormat(name) for name in table["layer_ms"]["mlp"]]
    split = [
        (f"tensor_parallel_ms.{format.value}", partial(lambda format: split_ms(bench, read(table), format), format))
        for format in formats
    ]
    return [("node_gb_per_s", partial(gather_gb_per_s, bench)), *split]
