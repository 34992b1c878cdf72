"""Live objects for tests, inside a rank of the pool: groups, runtimes, batches, and weights and gradients as plain
arrays."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nemotron_train.config.schema import LrSchedule, ModelSection, RunConfig
from nemotron_train.data.batch import Batch
from nemotron_train.engine.groups import Groups, process_groups
from nemotron_train.engine.user_buffers import user_buffers
from nemotron_train.model.reference.hybrid_model import HybridModel
from nemotron_train.model.reference.sizes import ReferenceSizes
from nemotron_train.plan.run_plan import plan_run
from nemotron_train.platform.device import Platform, choose_platform
from nemotron_train.platform.ranks import launched_rank
from nemotron_train.runtime import Runtime
from nemotron_train.trainer import build_runtime

Arrays = dict[str, NDArray[Any]]

CONSTANT_RATE: dict[str, Any] = dict(
    schedule=LrSchedule.constant, min=None, warmup_tokens=0, decay_tokens=None, decay_shape=None
)


@contextmanager
def live_groups(config: RunConfig) -> Iterator[tuple[Platform, Groups]]:
    """The process groups of a configuration's layout; several runtimes may be built on them."""
    me = launched_rank()
    platform = choose_platform(me)
    plan = plan_run(config, me.world_size)
    held = process_groups(plan.layout, platform, me, timeout_seconds=60, seed=config.run.seed)
    with held as groups, user_buffers(plan):
        yield platform, groups


@contextmanager
def live_run(config: RunConfig) -> Iterator[Runtime]:
    with live_groups(config) as (platform, groups):
        run = build_runtime(plan_run(config, launched_rank().world_size), platform, groups)
        yield run
        run.close()


def random_samples(seed: int, samples: int, config: RunConfig, *, real_tokens: Sequence[int] | None = None) -> Batch:
    """The same samples on every call; the k-th has loss on its first `real_tokens[k]` tokens only, and comes from
    source k % 2."""
    random = torch.Generator().manual_seed(seed)
    seq_length = config.train.seq_length
    rows = torch.randint(config.model.vocab_size, (samples, seq_length + 1), generator=random)
    lengths = torch.tensor(real_tokens if real_tokens is not None else [seq_length] * samples)
    return Batch(
        tokens_BS=rows[:, :-1].contiguous(),
        labels_BS=rows[:, 1:].contiguous(),
        loss_mask_BS=(torch.arange(seq_length) < lengths[:, None]).float(),
        source_B=torch.arange(samples) % 2,
    )


def micro_batches(samples: Batch, size: int, dp_rank: int = 0, dp_size: int = 1) -> list[Batch]:
    """A data-parallel rank's contiguous share of the samples, cut into micro-batches."""
    each = len(samples.source_B) // dp_size
    return [
        Batch(*(field if field is None else field[start : start + size] for field in vars(samples).values()))
        for start in range(dp_rank * each, (dp_rank + 1) * each, size)
    ]


def weights_of(run: Runtime) -> Arrays:
    """This rank's parameters by their name in the model."""
    return {name: to_array(parameter) for name, parameter in named_parameters(run)}


def gradients_of(run: Runtime) -> Arrays:
    """This rank's accumulated gradients; whole only where there is no data parallelism."""
    return {name: to_array(parameter.main_grad) for name, parameter in named_parameters(run)}


def named_parameters(run: Runtime) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for chunk in run.chunks:
        yield from chunk.module.named_parameters()


def to_array(tensor: torch.Tensor) -> NDArray[Any]:
    return np.array(tensor.detach().float().cpu().numpy())


def reference_sizes(model: ModelSection) -> ReferenceSizes:
    names = ReferenceSizes.__dataclass_fields__
    return ReferenceSizes(
        **{**{name: getattr(model, name) for name in names}, "layer_pattern": model.layer_pattern.replace("|", "")}
    )


def reference_with(weights: Arrays, model: ModelSection) -> HybridModel:
    """The plain-torch definition with whole weights from elsewhere."""
    reference = HybridModel(reference_sizes(model))
    reference.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return reference


def reference_loss(reference: HybridModel, samples: Batch) -> torch.Tensor:
    """Nats per token with loss 1, over all samples at once."""
    nats_BS = reference_nats(reference, samples)
    return (nats_BS * samples.loss_mask_BS).sum() / samples.loss_mask_BS.sum()


def reference_nats(reference: HybridModel, samples: Batch) -> torch.Tensor:
    logits_BSV = reference(samples.tokens_BS, samples.document_BS)
    return torch.nn.functional.cross_entropy(logits_BSV.transpose(1, 2), samples.labels_BS, reduction="none")
