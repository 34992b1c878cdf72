"""How does a Mamba-2 layer go on from where it stopped, with memory that does not grow with the text?

All that a layer keeps of a sequence is a matrix per head (the state of the recurrence) and the last K-1 inputs of its
convolution. A prompt runs through the fast scan of `ops/ssd.py`, which leaves that state behind; each token after it is
one step of the recurrence of `model/reference/ssd.py`. Between the two projections all is float32 at least, as in
training.

Shapes: B sequences of the batch, S tokens of the prompt, D hidden, C channels of the convolution, K its weights, H
heads, P head dim, G groups, R = H/G heads of a group, N state dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nemotron_train.model.reference.mamba2_mixer import Mamba2Mixer
from nemotron_train.ops.causal_conv import convolve
from nemotron_train.ops.ssd import scan
from nemotron_train.ops.ssd_chunks import ScanTensors

_SCAN_CHUNK = 32  # tokens


@dataclass
class MambaState:
    """What a layer keeps of every sequence."""

    conv_BCK: Tensor  # inputs of the convolution: the last K-1 tokens', and room for the next one's
    ssm_BGRPN: Tensor

    def num_bytes(self) -> int:
        return self.conv_BCK.nbytes + self.ssm_BGRPN.nbytes


def start(mixer: Mamba2Mixer, x_BSD: Tensor, length_B: Tensor) -> tuple[Tensor, MambaState]:
    """Run the layer over prompts.

    Args:
        x_BSD: prompts that are shorter than S are filled up behind with anything.
        length_B: tokens of each prompt, >= 1.

    Returns:
        what the layer adds to the residual stream (B S D), meaningless behind a prompt; and the state after each
        prompt's last token.
    """
    sizes = mixer.sizes
    z, xBC, dt = _projected(mixer, x_BSD)
    convolved_SBC, _ = convolve(xBC.transpose(0, 1), mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias)
    # A token with dt = 0 leaves the recurrence's state as it is. So it passes what fills up the prompts, and one more
    # chunk of such tokens, whose state before it, the last that the scan keeps, is the state after the prompts.
    is_prompt_BS = torch.arange(x_BSD.shape[1], device=x_BSD.device) < length_B[:, None]
    dt_SBH = (functional.softplus(dt + mixer.dt_bias) * is_prompt_BS[..., None]).transpose(0, 1)
    padding = -x_BSD.shape[1] % _SCAN_CHUNK + _SCAN_CHUNK
    x, B, C = _parts(mixer, convolved_SBC)
    x, dt_SBH, B, C = (functional.pad(t, [0, 0] * (t.dim() - 1) + [0, padding]) for t in (x, dt_SBH, B, C))
    A_H, D_H = -torch.exp(mixer.A_log.to(x.dtype)), mixer.D.to(x.dtype)
    y_SBHP, kept = scan(ScanTensors(x, dt_SBH, A_H, B, C, D_H), _SCAN_CHUNK)
    y = y_SBHP[: x_BSD.shape[1]].flatten(2).transpose(0, 1)
    of_state = (x_BSD.shape[0], sizes.mamba_num_groups, -1, sizes.mamba_head_dim, sizes.mamba_state_dim)
    ssm_BGRPN = kept.states_KXQN[-1].reshape(of_state).clone()  # the rest is let go
    state = MambaState(_last_inputs(xBC, length_B, sizes.mamba_conv_kernel), ssm_BGRPN)
    return _out(mixer, y, z), state


def step(mixer: Mamba2Mixer, x_BD: Tensor, state: MambaState) -> Tensor:
    """Run the layer on the next token of every sequence and bring its state up to date.

    Returns:
        what the layer adds to the residual stream (B D).
    """
    z, xBC, dt = _projected(mixer, x_BD)
    window_BCK = state.conv_BCK
    window_BCK[..., :-1] = window_BCK[..., 1:].clone()
    window_BCK[..., -1] = xBC
    weight_CK, bias = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
    x, B, C = _parts(mixer, functional.silu((window_BCK * weight_CK).sum(-1) + bias))
    by_group = (mixer.sizes.mamba_num_groups, -1)
    x_BGRP = x.unflatten(1, by_group)
    dt_BGR = functional.softplus(dt + mixer.dt_bias).unflatten(1, by_group)
    A_GR, D_GR = -torch.exp(mixer.A_log.to(x.dtype)).view(by_group), mixer.D.to(x.dtype).view(by_group)
    h = state.ssm_BGRPN
    h.mul_(torch.exp(dt_BGR * A_GR)[..., None, None])
    h.addcmul_((dt_BGR[..., None] * x_BGRP)[..., None], B[:, :, None, None])
    y_BGRP = torch.einsum("bgrpn,bgn->bgrp", h, C) + D_GR[..., None] * x_BGRP
    return _out(mixer, y_BGRP.flatten(1), z)


def _projected(mixer: Mamba2Mixer, x: Tensor) -> tuple[Tensor, ...]:
    """Return z, xBC and dt before its bias, float32 at least."""
    sizes = mixer.sizes
    projected = mixer.in_proj(x)
    wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
    return wide.split([sizes.mamba_inner_size, sizes.mamba_conv_size, sizes.mamba_num_heads], dim=-1)


def _parts(mixer: Mamba2Mixer, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (... H P), B and C (... G N)."""
    sizes = mixer.sizes
    of_groups = sizes.mamba_num_groups * sizes.mamba_state_dim
    x, B, C = convolved.split([sizes.mamba_inner_size, of_groups, of_groups], dim=-1)
    x = x.unflatten(-1, (sizes.mamba_num_heads, sizes.mamba_head_dim))
    return x, *(t.unflatten(-1, (sizes.mamba_num_groups, sizes.mamba_state_dim)) for t in (B, C))


def _out(mixer: Mamba2Mixer, y: Tensor, z: Tensor) -> Tensor:
    return mixer.out_proj(mixer.norm(y, z).to(mixer.out_proj.weight.dtype))


def _last_inputs(xBC_BSC: Tensor, length_B: Tensor, kernel: int) -> Tensor:
    """Return each prompt's last K inputs of the convolution, the newest last, zeros before the prompt's start."""
    padded_BSC = functional.pad(xBC_BSC, (0, 0, kernel, 0))
    places_BK = length_B[:, None] + torch.arange(kernel, device=length_B.device)
    return (
        padded_BSC[torch.arange(len(length_B), device=length_B.device)[:, None], places_BK].transpose(1, 2).contiguous()
    )
