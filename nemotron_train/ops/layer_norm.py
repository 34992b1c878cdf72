"""How does the LayerNorm run in plain torch, whatever the precision of its input and weights?"""

import torch
from torch import Tensor
from torch.nn import functional


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, epsilon: float) -> Tensor:
    """Return weight * (x - mean) / sqrt(variance + epsilon) + bias over the last axis, in x's dtype; computed in
    float32 (float64 for float64 inputs)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = functional.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), epsilon)
    return normed.to(x.dtype)
