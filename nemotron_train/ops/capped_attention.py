"""How does attention run whose scores are capped? With all scores in memory: no fused kernel here has a cap.

    weights = softmax(cap * tanh(scale * q k / cap))

Source: "Methods of improving LLM training stability", arXiv 2410.16682 (soft_cap).

Shapes: B micro-batch, h heads, g query groups, s the tokens that look, t the tokens looked at, P head dim.
"""

import torch
from torch import Tensor


def capped_attention(
    q_BhsP: Tensor, k_BgtP: Tensor, v_BgtP: Tensor, *, scale: float, cap: float, seen: Tensor | None = None
) -> Tensor:
    """Return (B h s P). Scores and their softmax are float32 (float64 for float64 inputs).

    Args:
        seen: which tokens each one sees, (... s t) with axes that broadcast to (B h); None: itself and earlier ones.
    """
    heads_per_group = q_BhsP.shape[1] // k_BgtP.shape[1]
    k, v = (t.repeat_interleave(heads_per_group, dim=1) for t in (k_BgtP, v_BgtP))
    wide = torch.promote_types(q_BhsP.dtype, torch.float32)
    scores_Bhst = cap * torch.tanh((q_BhsP @ k.mT).to(wide) * (scale / cap))
    if seen is None:
        seen = torch.ones(scores_Bhst.shape[-2:], dtype=torch.bool, device=scores_Bhst.device).tril()
    weights_Bhst = scores_Bhst.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return weights_Bhst.to(v.dtype) @ v
