"""What does the attention layer compute? Causal grouped-query attention.

    q, k, v = qkv(norm(h))                     norm(q), norm(k), norm(v) where the model has them
    q, k = rotate(q), rotate(k)                with rope; else nothing here tells places apart
    out = proj(softmax(cap(scale * q k / sqrt(P))) v)

Sources: RoFormer, arXiv 2104.09864, for the rotation; norms of queries, keys and values, the scale and the cap: arXiv
2410.16682.

Shapes: B micro-batch, S sequence, D hidden, G query groups (key/value heads), Q query heads of a group, P head dim; s
the token that looks, t the token looked at.
"""

import math

import torch
from torch import Tensor, nn

from nemotron_train.config.schema import ROPE_BASE
from nemotron_train.model.reference.norm import Norm, NormedLinear
from nemotron_train.model.reference.sizes import ReferenceSizes


class CausalSelfAttention(nn.Module):
    """The rows of `linear_qkv` stand group after group: the group's query heads, its key head, its value head."""

    def __init__(self, sizes: ReferenceSizes) -> None:
        super().__init__()
        self.groups = sizes.num_query_groups
        self.heads_per_group = sizes.num_attention_heads // sizes.num_query_groups
        self.head_dim = sizes.attention_head_dim
        self.rope_base = (sizes.rope_base or ROPE_BASE) if sizes.position_embedding == "rope" else None
        self.scale, self.cap = sizes.attention_logit_scale / math.sqrt(self.head_dim), sizes.attention_logit_cap
        qkv_size = self.groups * (self.heads_per_group + 2) * self.head_dim
        if sizes.qkv_norm == "qkv":  # in place of the norm before the layer
            self.linear_qkv: nn.Module = nn.Linear(sizes.hidden_size, qkv_size, bias=sizes.linear_bias)
        else:
            self.linear_qkv = NormedLinear(qkv_size, sizes, bias=sizes.linear_bias)
        self.q_layernorm, self.k_layernorm = (
            None if sizes.qkv_norm == "none" else Norm(self.head_dim, sizes) for _ in range(2)
        )
        self.v_layernorm = Norm(self.head_dim, sizes) if sizes.qkv_norm == "qkv" else None
        queries = sizes.num_attention_heads * self.head_dim
        self.linear_proj = nn.Linear(queries, sizes.hidden_size, bias=sizes.linear_bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        seq_length = x_BSD.shape[1]
        places_S = torch.arange(seq_length, device=x_BSD.device)
        q_BSGQP, k_BSGP, v_BSGP = self.project(x_BSD, places_S)
        seen_SS = places_S <= places_S[:, None]
        return self.linear_proj(self.attend(q_BSGQP, k_BSGP, v_BSGP, seen_SS).flatten(2))

    def project(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (... G Q P), keys and values (... G P) of tokens (... D).

        Args:
            places: of the tokens in their text, with axes that broadcast to (...).
        """
        rows = (self.groups, self.heads_per_group + 2, self.head_dim)
        q, k, v = self.linear_qkv(x).unflatten(-1, rows).split([self.heads_per_group, 1, 1], dim=-2)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        if self.v_layernorm is not None:
            v = self.v_layernorm(v)
        if self.rope_base is not None:
            q, k = (rotate(t, places[..., None, None], self.rope_base) for t in (q, k))
        return q, k.squeeze(-2), v.squeeze(-2)

    def attend(self, q_BsGQP: Tensor, k_BtGP: Tensor, v_BtGP: Tensor, seen: Tensor) -> Tensor:
        """Return (B s G Q P).

        Args:
            seen: which tokens each one sees, (s t) or (B 1 1 s t).
        """
        scores_BGQst = self.scale * torch.einsum("bsgqp,btgp->bgqst", q_BsGQP, k_BtGP)
        if self.cap is not None:
            scores_BGQst = self.cap * torch.tanh(scores_BGQst / self.cap)
        weights_BGQst = scores_BGQst.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        return torch.einsum("bgqst,btgp->bsgqp", weights_BGQst, v_BtGP)


def rotate(x: Tensor, places: Tensor, base: float) -> Tensor:
    """Rotate each pair of channels (i, i + P/2) of x (... P) by place / base^(2i/P).

    Args:
        places: with axes that broadcast to (...).
    """
    half = x.shape[-1] // 2
    turns = base ** -(torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angles = places[..., None] * turns
    a, b = x[..., :half], x[..., half:]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
