"""How is the MLP's activation, relu(x) squared, computed in plain torch with one tensor kept for the backward pass?

Source: Primer, arXiv 2109.08668; used by Nemotron-H, arXiv 2504.03624.
"""

from typing import Any

import torch
from torch import Tensor


def squared_relu(x: Tensor) -> Tensor:
    """Return max(x, 0) squared, in x's dtype."""
    return _SquaredRelu.apply(x)


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.addcmul(dy.new_zeros(()), dy, positive, value=2)
