"""What are the RMSNorm, and the projection that carries the norm in front of it?"""

import torch
from torch import Tensor, nn
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return weight * x / sqrt(mean of x squared over the last axis + epsilon); the mean is float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    return (weight * normed).to(x.dtype)


class RmsNorm(nn.Module):
    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)


class NormedLinear(nn.Module):
    """A layer's first projection; as in Transformer Engine it owns the weight of the layer's norm."""

    def __init__(self, in_size: int, out_size: int, epsilon: float) -> None:
        super().__init__()
        self.layer_norm_weight = nn.Parameter(torch.ones(in_size))
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.epsilon = epsilon
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(rms_norm(x, self.layer_norm_weight, self.epsilon), self.weight)
