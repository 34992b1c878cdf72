"""What is the whole hybrid model? Embedding, a pre-norm residual layer for each letter of its pattern, norm, head.

Parameter names and shapes are those of Megatron-Core 0.16's hybrid model with Transformer Engine layers on one rank.

Shapes: B micro-batch, S sequence, D hidden, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from nemotron_train.model.reference.attention import CausalSelfAttention
from nemotron_train.model.reference.mamba2_mixer import Mamba2Mixer
from nemotron_train.model.reference.mlp import SquaredReluMlp
from nemotron_train.model.reference.norm import Norm
from nemotron_train.model.reference.sizes import ReferenceSizes

# Letter of the pattern -> the name the layer has in parameter names, and what it is.
_LAYERS: dict[str, tuple[str, type[nn.Module]]] = {
    "M": ("mixer", Mamba2Mixer),
    "*": ("self_attention", CausalSelfAttention),
    "-": ("mlp", SquaredReluMlp),
}


class HybridModel(nn.Module):
    def __init__(self, sizes: ReferenceSizes) -> None:
        super().__init__()
        self.embedding = nn.Module()
        self.embedding.word_embeddings = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        # None: a text may be of any length.
        self.num_places = sizes.max_position_embeddings if sizes.position_embedding == "learned" else None
        if self.num_places is not None:
            self.embedding.position_embeddings = nn.Embedding(self.num_places, sizes.hidden_size)
        self.decoder = HybridStack(sizes)
        self.output_layer = None
        if not sizes.tied_embeddings:
            self.output_layer = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)

    def forward(self, tokens_BS: Tensor, document_BS: Tensor | None = None) -> Tensor:
        """Return the logits of the next token, (B S V).

        Args:
            document_BS: number of each token's document within its sample, rising along S; with it the model runs on
                every document as on a sample of its own.
        """
        if document_BS is not None:
            rows = [self._each_document(*row) for row in zip(tokens_BS, document_BS, strict=True)]
            return torch.stack(rows)
        embeddings: Tensor = self.embedding.word_embeddings.weight
        x_BSD = self.decoder(self.embed(tokens_BS, torch.arange(tokens_BS.shape[1], device=tokens_BS.device)))
        return functional.linear(x_BSD, embeddings if self.output_layer is None else self.output_layer.weight)

    def embed(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Return what the first layer reads, (... D), of tokens (...) at these places in their text."""
        x = functional.embedding(tokens, self.embedding.word_embeddings.weight)
        if self.num_places is None:
            return x
        return x + functional.embedding(places, self.embedding.position_embeddings.weight)

    def _each_document(self, tokens_S: Tensor, document_S: Tensor) -> Tensor:
        documents = [tokens_S[document_S == number] for number in document_S.unique()]
        return torch.cat([self(tokens[None])[0] for tokens in documents])

    def loss(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Return the mean cross-entropy over all tokens, in nats."""
        return functional.cross_entropy(self(tokens_BS).flatten(0, 1), labels_BS.flatten())


class ResidualLayer(nn.Module):
    """One layer: its inside, which begins with a norm, and how its output is added to the residual stream."""

    def __init__(self, letter: str, sizes: ReferenceSizes) -> None:
        super().__init__()
        self.name, build = _LAYERS[letter]
        self.add_module(self.name, build(sizes))
        self.output_norm = Norm(sizes.hidden_size, sizes) if sizes.output_norm else None
        self.layer_scale = None
        if sizes.layer_scale is not None:
            self.layer_scale = nn.Parameter(torch.full((sizes.hidden_size,), sizes.layer_scale))

    @property
    def inner(self) -> nn.Module:
        return self.get_submodule(self.name)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.add_to(x_BSD, self.inner(x_BSD))

    def add_to(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the residual stream (... D) after the layer, whose inside gave `out`."""
        if self.output_norm is not None:
            out = self.output_norm(out)
        if self.layer_scale is not None:
            out = self.layer_scale * out
        return x + out


class HybridStack(nn.Module):
    def __init__(self, sizes: ReferenceSizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ResidualLayer(letter, sizes) for letter in sizes.layer_pattern)
        self.final_norm = Norm(sizes.hidden_size, sizes)

    def forward(self, x_BSD: Tensor) -> Tensor:
        for layer in self.layers:
            x_BSD = layer(x_BSD)
        return self.final_norm(x_BSD)
