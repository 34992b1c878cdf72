"""What an FP8 format means: formats, scales and blocks, for Transformer Engine and for the emulation on the CPU alike.

Sources: fp8_block is the recipe of Nemotron Nano 2 (arXiv 2509.25149, appendix A.1), fp8_current that of Nemotron-H
(arXiv 2504.03624, section 2.3).
"""

from dataclasses import dataclass
from enum import Enum

from nemotron_train.config.schema import Fp8Scales, PrecisionFormat, PrecisionSection


class Scaling(Enum):
    block = "block"  # weights in 128x128 blocks, activations and gradients in 1x128 ones
    current = "current"  # a tensor by its own maximum
    delayed = "delayed"  # a tensor by the maximum of its last uses


@dataclass(frozen=True)
class Fp8Recipe:
    scaling: Scaling
    wide_gradients: bool  # gradients in E5M2 instead of E4M3: more range, less precision
    power_of_two: bool  # scales are powers of two


# Micro-batches of which delayed scaling takes the maximum; Transformer Engine's default.
DELAYED_HISTORY_STEPS = 1024


def fp8_recipe(precision: PrecisionSection) -> Fp8Recipe | None:
    """Return the recipe that was asked for, None without FP8."""
    if not precision.format.is_fp8:
        return None
    scaling = {
        PrecisionFormat.fp8_block: Scaling.block,
        PrecisionFormat.fp8_current: Scaling.current,
        PrecisionFormat.fp8_delayed: Scaling.delayed,
    }[precision.format]
    default = Fp8Scales.power_of_two if scaling is Scaling.block else Fp8Scales.fp32
    return Fp8Recipe(
        scaling=scaling,
        wide_gradients=scaling is not Scaling.block,
        power_of_two=(precision.fp8_scales or default) is Fp8Scales.power_of_two,
    )
