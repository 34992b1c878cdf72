"""What are the norms, and the projection that carries the norm in front of it?"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from nemotron_train.model.reference.sizes import ReferenceSizes


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return weight * x / sqrt(mean of x squared over the last axis + epsilon); the mean is float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    return (weight * normed).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Return weight * (x - mean) / sqrt(variance + epsilon) + bias; mean and variance are float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(dim=-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + epsilon)
    return (weight * normed + bias).to(x.dtype)


class Norm(nn.Module):
    """RMSNorm or LayerNorm, as the model has it."""

    def __init__(self, size: int, sizes: ReferenceSizes) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if sizes.norm == "layer" else None
        self.epsilon = sizes.norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return rms_norm(x, self.weight, self.epsilon)
        return layer_norm(x, self.weight, self.bias, self.epsilon)


class NormedLinear(nn.Module):
    """A layer's first projection; as in Transformer Engine it owns the weights of the layer's norm."""

    def __init__(self, out_size: int, sizes: ReferenceSizes, *, bias: bool = False) -> None:
        super().__init__()
        in_size = sizes.hidden_size
        self.layer_norm_weight = nn.Parameter(torch.ones(in_size))
        self.layer_norm_bias = nn.Parameter(torch.zeros(in_size)) if sizes.norm == "layer" else None
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.bias = nn.Parameter(torch.zeros(out_size)) if bias else None
        self.epsilon = sizes.norm_epsilon
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if self.layer_norm_bias is None:
            normed = rms_norm(x, self.layer_norm_weight, self.epsilon)
        else:
            normed = layer_norm(x, self.layer_norm_weight, self.layer_norm_bias, self.epsilon)
        return functional.linear(normed, self.weight, self.bias)
