"""Which tensor of Hugging Face's NemotronH is which of ours, and how does one become the other?

The map is a table from the pattern and the sizes: each of our names stands beside one Hugging Face name, except
`linear_qkv`, whose rows Hugging Face keeps as three tensors. Both directions read the same table, and a name that is
missing or left over is an error. What the configuration must say for the two to compute the same is in `hf_config.py`.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_train.errors import CheckpointError

# Letter of the pattern -> (our name, Hugging Face name) inside a layer; the attention's q, k, v are apart.
_MIXER_SAME = (
    "in_proj.weight",
    "conv1d.weight",
    "conv1d.bias",
    "dt_bias",
    "A_log",
    "D",
    "norm.weight",
    "out_proj.weight",
)
_INSIDE_LAYER: dict[str, tuple[tuple[str, str], ...]] = {
    "M": (
        ("mixer.in_proj.layer_norm_weight", "norm.weight"),
        *((f"mixer.{name}", f"mixer.{name}") for name in _MIXER_SAME),
    ),
    "*": (
        ("self_attention.linear_qkv.layer_norm_weight", "norm.weight"),
        ("self_attention.linear_proj.weight", "mixer.o_proj.weight"),
    ),
    "-": (
        ("mlp.linear_fc1.layer_norm_weight", "norm.weight"),
        ("mlp.linear_fc1.weight", "mixer.up_proj.weight"),
        ("mlp.linear_fc2.weight", "mixer.down_proj.weight"),
    ),
}
_QKV = "self_attention.linear_qkv.weight"
_QKV_PARTS = ("mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.v_proj.weight")

# Letter of the pattern -> entry of Hugging Face's `layers_block_type`.
LAYER_TYPES = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}


@dataclass(frozen=True, kw_only=True)
class HfNames:
    """The name map of one model."""

    layer_pattern: str  # without pipeline cuts
    num_query_groups: int
    attention_head_dim: int
    tied_embeddings: bool

    def renamed(self) -> dict[str, str]:
        """Return our name -> Hugging Face name of all tensors that are the same in both."""
        names = {
            "embedding.word_embeddings.weight": "model.embeddings.weight",
            "decoder.final_norm.weight": "model.norm_f.weight",
        }
        if not self.tied_embeddings:
            names["output_layer.weight"] = "lm_head.weight"
        for index, letter in enumerate(self.layer_pattern):
            for ours, theirs in _INSIDE_LAYER[letter]:
                names[f"decoder.layers.{index}.{ours}"] = f"model.layers.{index}.{theirs}"
        return names

    def split(self) -> dict[str, list[str]]:
        """Return our `linear_qkv` names -> the names of Hugging Face's q, k and v."""
        return {
            f"decoder.layers.{index}.{_QKV}": [f"model.layers.{index}.{part}" for part in _QKV_PARTS]
            for index, letter in enumerate(self.layer_pattern)
            if letter == "*"
        }

    def to_hugging_face(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors under Hugging Face's names.

        Raises:
            CheckpointError: a tensor is missing or not known.
        """
        renamed, split = self.renamed(), self.split()
        _check_names(ours.keys(), renamed.keys() | split.keys())
        theirs = {their_name: ours[our_name] for our_name, their_name in renamed.items()}
        for our_name, their_names in split.items():
            theirs.update(zip(their_names, self.split_qkv(ours[our_name]), strict=True))
        return theirs

    def split_qkv(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut rows that stand group after group (q heads, k, v) into all q, all k, all v."""
        by_group = qkv.view(self.num_query_groups, -1, self.attention_head_dim, *qkv.shape[1:])
        q, k, v = by_group.split([by_group.shape[1] - 2, 1, 1], dim=1)
        return q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)

    def join_qkv(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Put all q, all k and all v back into rows that stand group after group."""
        shape = (self.num_query_groups, -1, self.attention_head_dim)
        return torch.cat([t.unflatten(0, shape) for t in (q, k, v)], dim=1).flatten(0, 2)


def _check_names(given: Set[str], known: Set[str]) -> None:
    missing, unknown = sorted(known - given), sorted(given - known)
    if missing or unknown:
        raise CheckpointError(
            f"the tensors do not fit the layer pattern: this model lacks {missing[:3]} ({len(missing)} in all) "
            f"and has {unknown[:3]} ({len(unknown)} in all) that have no place. Check model.layer_pattern and "
            "model.tied_embeddings."
        )
