"""The seam to Megatron-Core. What every part chose (layers, operations, optimizer) is logged at start, so its warnings
on the way are left out."""

import warnings

warnings.filterwarnings(
    "ignore", module=r"megatron\."
)  # each missing fused package, at import; deprecations inside Megatron-Core
warnings.filterwarnings(
    "ignore", category=FutureWarning, module=r"torch\.distributed\."
)  # it calls collectives by their older names
warnings.filterwarnings(
    "ignore", message="The .grad attribute of a Tensor that is not a leaf"
)  # its copy of parameter attributes
