"""Attention of the plain layers under context parallelism: this rank's queries over the keys and values of all ranks.

The simple way: keys and values, few heads with grouped queries, are gathered whole, and a mask says which of them each
query sees. Transformer Engine's attention, which GPUs run, passes them on from rank to rank instead.
"""

from typing import Any

import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, arange, cat, nn

from nemotron_train.engine.sequence_exchange import gather_sequence, own_places
from nemotron_train.ops.capped_attention import capped_attention
from nemotron_train.ops.documents import Documents

# Shapes: S sequence, s this rank's part of it, B micro-batch, h heads, g query groups, P head dim.


class GatheredAttention(nn.Module):
    """softmax(Q K^T / sqrt(P)) V over earlier tokens of the whole sequence, grouped queries."""

    def __init__(
        self,
        cap: float | None,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.group, self.scale, self.cap = pg_collection.cp, softmax_scale, cap

    def forward(
        self,
        query_sBhP: Tensor,
        key_sBgP: Tensor,
        value_sBgP: Tensor,
        *args: Any,
        packed_seq_params: Documents | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Returns the heads side by side, [s, B, h * P]; with documents, of each by itself."""
        q = query_sBhP.permute(1, 2, 0, 3)
        keys_and_values = gather_sequence(cat((key_sBgP, value_sBgP), dim=-1), self.group)
        k, v = keys_and_values.permute(1, 2, 0, 3).chunk(2, dim=-1)
        places_s = own_places(k.shape[2], self.group, q.device)
        seen_1sS = (arange(k.shape[2], device=q.device) <= places_s[:, None])[None]
        if packed_seq_params is not None:
            number_BS = packed_seq_params.number_BS
            seen_1sS = seen_1sS & (number_BS[:, places_s, None] == number_BS[:, None])
        if self.cap is None:
            out_BhsP = F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen_1sS[:, None], scale=self.scale, enable_gqa=True
            )
        else:
            scale = self.scale or q.shape[-1] ** -0.5
            out_BhsP = capped_attention(q, k, v, scale=scale, cap=self.cap, seen=seen_1sS[:, None])
        return out_BhsP.permute(2, 0, 1, 3).flatten(2)
