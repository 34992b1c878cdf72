"""Which parameters decay, and how the optimizer groups them."""

from collections.abc import Callable
from dataclasses import dataclass

from nemotron_train.model.names import rule_for


@dataclass(frozen=True)
class ParameterGroup:
    name: str
    holds: Callable[[str], bool]  # by parameter name
    decay_factor: float  # times optim.weight_decay


def _is_vector(name: str) -> bool:
    return not rule_for(name).decays and not rule_for(name).float32


def _is_float32_vector(name: str) -> bool:
    return not rule_for(name).decays and rule_for(name).float32


# Matrices, the default group, decay. Norms, biases, A_log, D and dt_bias do not: they scale or shift, and zero is no
# neutral value for them. Those that stay in float32 form a group of their own, because Megatron-Core's distributed
# optimizer (0.16) mixes up a group's master weights in a checkpoint when it holds two dtypes.
VECTOR_GROUPS = (
    ParameterGroup("vectors", _is_vector, decay_factor=0.0),
    ParameterGroup("float32_vectors", _is_float32_vector, decay_factor=0.0),
)
