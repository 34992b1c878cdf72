"""How does the whole model predict one token after another, reading every token once?

The weights are those of `model/reference/hybrid_model.py`, and so is the mathematics: the logits are those of its
forward pass over the whole text. A Mamba layer keeps a state of constant size, an attention layer a cache of keys and
values, an MLP layer nothing.

Shapes: B sequences of the batch, S tokens of the longest prompt, D hidden, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nemotron_train.generate import attention_cache, mamba_state
from nemotron_train.generate.attention_cache import KeyValueCache
from nemotron_train.generate.mamba_state import MambaState
from nemotron_train.model.reference.attention import CausalSelfAttention
from nemotron_train.model.reference.hybrid_model import HybridModel, ResidualLayer
from nemotron_train.model.reference.mamba2_mixer import Mamba2Mixer


class Decoder:
    """A batch of sequences, each at its own length, and all that the layers keep of them."""

    def __init__(self, model: HybridModel, prompts: Sequence[Sequence[int]], room: int) -> None:
        """Run the prompts through the model; `logits_BV` are then those of each one's next token.

        Args:
            prompts: token ids, at least one each.
            room: tokens that the longest sequence may come to.
        """
        self.model = model
        self.layers: list[ResidualLayer] = list(model.decoder.layers)
        device = model.embedding.word_embeddings.weight.device
        length_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
        tokens_BS = torch.zeros(len(prompts), int(length_B.max()), dtype=torch.long, device=device)
        for row, prompt in zip(tokens_BS, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(list(prompt), device=device)
        self.length_B = length_B  # of the texts so far
        self.states: list[MambaState | KeyValueCache | None] = []
        self.logits_BV = self._start(tokens_BS, length_B, room)

    @torch.no_grad()
    def append(self, tokens_B: Tensor) -> None:
        """Append a token to every sequence."""
        x_BD = self.model.embed(tokens_B, self.length_B)
        self.length_B = self.length_B + 1
        for layer, state in zip(self.layers, self.states, strict=True):
            if isinstance(state, MambaState):
                out_BD = mamba_state.step(layer.inner, x_BD, state)
            elif isinstance(state, KeyValueCache):
                out_BD = attention_cache.step(layer.inner, x_BD, state)
            else:
                out_BD = layer.inner(x_BD)
            x_BD = layer.add_to(x_BD, out_BD)
        self.logits_BV = self._logits(x_BD)

    @torch.no_grad()
    def _start(self, tokens_BS: Tensor, length_B: Tensor, room: int) -> Tensor:
        x_BSD = self.model.embed(tokens_BS, torch.arange(tokens_BS.shape[1], device=tokens_BS.device))
        for layer in self.layers:
            state: MambaState | KeyValueCache | None = None
            inner = layer.inner
            if isinstance(inner, Mamba2Mixer):
                out_BSD, state = mamba_state.start(inner, x_BSD, length_B)
            elif isinstance(inner, CausalSelfAttention):
                out_BSD, state = attention_cache.start(inner, x_BSD, length_B, room)
            else:
                out_BSD = inner(x_BSD)
            x_BSD = layer.add_to(x_BSD, out_BSD)
            self.states.append(state)
        rows = torch.arange(len(length_B), device=length_B.device)
        return self._logits(x_BSD[rows, length_B - 1])

    def _logits(self, x_BD: Tensor) -> Tensor:
        """Return the logits of the next tokens in float32 at least."""
        head = self.model.output_layer
        weight = self.model.embedding.word_embeddings.weight if head is None else head.weight
        logits = functional.linear(self.model.decoder.final_norm(x_BD), weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
