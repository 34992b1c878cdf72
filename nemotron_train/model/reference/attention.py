"""What does the attention layer compute? Causal grouped-query attention.

There is no position embedding: the Mamba layers give the order.

Shapes: B micro-batch, S sequence, D hidden, G query groups (key/value heads), Q query heads of a group, P head dim; s
the token that looks, t the token looked at.
"""

import math

import torch
from torch import Tensor, nn

from nemotron_train.model.reference.norm import NormedLinear
from nemotron_train.model.reference.sizes import ReferenceSizes


class CausalSelfAttention(nn.Module):
    """The rows of `linear_qkv` stand group after group: the group's query heads, its key head, its value head."""

    def __init__(self, sizes: ReferenceSizes) -> None:
        super().__init__()
        self.groups = sizes.num_query_groups
        self.heads_per_group = sizes.num_attention_heads // sizes.num_query_groups
        self.head_dim = sizes.attention_head_dim
        qkv_size = self.groups * (self.heads_per_group + 2) * self.head_dim
        self.linear_qkv = NormedLinear(sizes.hidden_size, qkv_size, sizes.norm_epsilon)
        self.linear_proj = nn.Linear(sizes.num_attention_heads * self.head_dim, sizes.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        qkv = self.linear_qkv(x_BSD).unflatten(-1, (self.groups, self.heads_per_group + 2, self.head_dim))
        q_BSGQP, k_BSG1P, v_BSG1P = qkv.split([self.heads_per_group, 1, 1], dim=3)
        scores = torch.einsum("bsgqp,btgp->bgqst", q_BSGQP, k_BSG1P.squeeze(3)) / math.sqrt(self.head_dim)
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
        return self.linear_proj(torch.einsum("bgqst,btgp->bsgqp", weights, v_BSG1P.squeeze(3)).flatten(2))
