"""How does an attention layer go on from where it stopped? It keeps the keys and values of all tokens so far.

Sequences of a batch have different lengths: each keeps its keys at its own places, and looks at no others.

Shapes: B sequences of the batch, S tokens of the prompt, T tokens that the cache has room for, D hidden, G query
groups, Q query heads of a group, P head dim.
"""

import torch
from torch import Tensor
from torch.nn import functional

from nemotron_train.model.reference.attention import CausalSelfAttention


class KeyValueCache:
    """Keys and values of one layer; its memory is taken once, for the longest text asked for."""

    def __init__(self, keys_BSGP: Tensor, values_BSGP: Tensor, length_B: Tensor, room: int) -> None:
        batch, _, groups, head_dim = keys_BSGP.shape
        self.keys_BGTP, self.values_BGTP = (keys_BSGP.new_zeros(batch, groups, room, head_dim) for _ in range(2))
        self.keys_BGTP[:, :, : keys_BSGP.shape[1]] = keys_BSGP.transpose(1, 2)
        self.values_BGTP[:, :, : keys_BSGP.shape[1]] = values_BSGP.transpose(1, 2)
        self.length_B = length_B.clone()

    def append(self, key_BGP: Tensor, value_BGP: Tensor) -> None:
        """Put the next token's behind each sequence's last one."""
        rows = torch.arange(len(key_BGP), device=key_BGP.device)
        self.keys_BGTP[rows, :, self.length_B] = key_BGP
        self.values_BGTP[rows, :, self.length_B] = value_BGP
        self.length_B += 1

    def num_bytes(self) -> int:
        return self.keys_BGTP.nbytes + self.values_BGTP.nbytes


def start(attention: CausalSelfAttention, x_BSD: Tensor, length_B: Tensor, room: int) -> tuple[Tensor, KeyValueCache]:
    """Run the layer over prompts; arguments and result as of `mamba_state.start`.

    Args:
        room: tokens that a sequence may come to.
    """
    places_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
    q_BSGQP, k_BSGP, v_BSGP = attention.project(x_BSD, places_S)
    # What fills up a prompt stands behind it, where no token of the prompt looks.
    if attention.cap is None:
        q, k, v = (t.transpose(1, 2) for t in (q_BSGQP.flatten(2, 3), k_BSGP, v_BSGP))
        mixed = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=attention.scale, enable_gqa=True
        ).transpose(1, 2)
    else:
        mixed = attention.attend(q_BSGQP, k_BSGP, v_BSGP, places_S <= places_S[:, None]).flatten(2, 3)
    cache = KeyValueCache(k_BSGP, v_BSGP, length_B, room)
    return attention.linear_proj(mixed.flatten(2)), cache


def step(attention: CausalSelfAttention, x_BD: Tensor, cache: KeyValueCache) -> Tensor:
    """Run the layer on the next token of every sequence; returns what it adds to the residual stream (B D)."""
    q_BGQP, k_BGP, v_BGP = attention.project(x_BD, cache.length_B)
    cache.append(k_BGP, v_BGP)
    longest = int(cache.length_B.max())
    keys, values = cache.keys_BGTP[:, :, :longest], cache.values_BGTP[:, :, :longest]
    seen_B11T = (torch.arange(longest, device=x_BD.device) < cache.length_B[:, None])[:, None, None]
    if attention.cap is None:
        mixed_BGQP = functional.scaled_dot_product_attention(
            q_BGQP, keys, values, attn_mask=seen_B11T, scale=attention.scale
        )
    else:
        k_BTGP, v_BTGP = keys.transpose(1, 2), values.transpose(1, 2)
        mixed_BGQP = attention.attend(q_BGQP[:, None], k_BTGP, v_BTGP, seen_B11T[:, :, None])
    return attention.linear_proj(mixed_BGQP.flatten(1))
