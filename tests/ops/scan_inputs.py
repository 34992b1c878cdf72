"""Random inputs of a scan, and the output and gradients of any function of tensors."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def random_scan_inputs(
    *, seq_length: int, groups: int, heads: int = 4, dtype: torch.dtype, decay: float = 1.0, seed: int = 0
) -> list[Tensor]:
    """Return x, dt, A, B, C, D for a micro-batch of 2, head dim 5 and state dim 3: no size can stand for another."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, seq_length, heads, 5, generator=random, dtype=torch.float64)
    dt = torch.rand(2, seq_length, heads, generator=random, dtype=torch.float64) + 0.01
    A = -decay * (torch.rand(heads, generator=random, dtype=torch.float64) + 0.1)
    B, C = (torch.randn(2, seq_length, groups, 3, generator=random, dtype=torch.float64) for _ in range(2))
    D = torch.randn(heads, generator=random, dtype=torch.float64)
    return [t.to(dtype) for t in (x, dt, A, B, C, D)]


def gradients_of(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the output and the gradient of every input, for a fixed random gradient of the output."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    output = function(*leaves)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(output))]
