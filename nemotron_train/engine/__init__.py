"""The seam to Megatron-Core. What every part chose (layers, operations, optimizer) is logged at start, so its warnings
on the way are left out."""

import sys
import warnings

import torch

warnings.filterwarnings(
    "ignore", module=r"megatron\."
)  # each missing fused package, at import; deprecations inside Megatron-Core
warnings.filterwarnings(
    "ignore", category=FutureWarning, module=r"torch\.distributed\."
)  # it calls collectives by their older names
warnings.filterwarnings(
    "ignore", message="The .grad attribute of a Tensor that is not a leaf"
)  # its copy of parameter attributes

if not torch.cuda.is_available():
    # Megatron-Core takes its optimizer and its sums over many tensors from Transformer Engine or apex where they are
    # installed. Their kernels are CUDA's: without a GPU, or with all of them hidden, it must not find them.
    for package in ("transformer_engine", "apex", "amp_C"):
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # makes importing it an ImportError
