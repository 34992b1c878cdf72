"""What does the Mamba-2 layer compute, from the residual stream to what it adds to it?

    z, x, B, C, dt = in_proj(norm(h))          one projection, rows in this order
    x, B, C = silu(conv(x, B, C))              each channel over its last few tokens
    dt = softplus(dt + dt_bias), A = -exp(A_log)
    y = ssd(x, dt, A, B, C) + D x
    out = out_proj(norm(y * silu(z)))          the norm taken in each group of channels

Source: Mamba-2, arXiv 2405.21060, section 7; the norm after the gate as in Nemotron-H, arXiv 2504.03624.

Shapes: B micro-batch, S sequence, D hidden, H heads, P head dim, G groups, N state dim.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from nemotron_train.model.reference.norm import NormedLinear, rms_norm
from nemotron_train.model.reference.sizes import ReferenceSizes
from nemotron_train.model.reference.ssd import ssd_recurrence


class GatedGroupNorm(nn.Module):
    """RMSNorm of y * silu(z), with a mean square for each group of channels."""

    def __init__(self, size: int, groups: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups, self.epsilon = groups, epsilon

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        by_group = (self.groups, -1)
        gated = (y * functional.silu(z)).unflatten(-1, by_group)
        return rms_norm(gated, self.weight.unflatten(0, by_group), self.epsilon).flatten(-2)


class Mamba2Mixer(nn.Module):
    def __init__(self, sizes: ReferenceSizes) -> None:
        super().__init__()
        self.sizes = sizes
        inner, conv, kernel = sizes.mamba_inner_size, sizes.mamba_conv_size, sizes.mamba_conv_kernel
        self.in_proj = NormedLinear(sizes.mamba_projection_size, sizes)
        self.conv1d = nn.Conv1d(conv, conv, kernel, groups=conv, padding=kernel - 1)
        self.dt_bias = nn.Parameter(torch.full((sizes.mamba_num_heads,), -4.0))  # softplus(-4) = 0.018
        self.A_log = nn.Parameter(torch.linspace(1, 16, sizes.mamba_num_heads).log())
        self.D = nn.Parameter(torch.ones(sizes.mamba_num_heads))
        self.norm = GatedGroupNorm(inner, sizes.mamba_num_groups, sizes.norm_epsilon)
        self.out_proj = nn.Linear(inner, sizes.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        sizes = self.sizes
        inner, heads, groups = sizes.mamba_inner_size, sizes.mamba_num_heads, sizes.mamba_num_groups
        z, xBC, dt = self.in_proj(x_BSD).split([inner, sizes.mamba_conv_size, heads], dim=-1)
        # Padded on both sides; what the padding at the end gives is cut off, so that no token sees a later one.
        xBC = functional.silu(self.conv1d(xBC.mT)[..., : x_BSD.shape[1]].mT)
        x, B, C = xBC.split([inner, *[groups * sizes.mamba_state_dim] * 2], dim=-1)
        y_BSHP = ssd_recurrence(
            x.unflatten(-1, (heads, -1)),
            functional.softplus(dt + self.dt_bias),
            -torch.exp(self.A_log),
            B.unflatten(-1, (groups, -1)),
            C.unflatten(-1, (groups, -1)),
            self.D,
        )
        return self.out_proj(self.norm(y_BSHP.flatten(2), z))
