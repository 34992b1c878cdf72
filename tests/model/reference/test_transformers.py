"""Do the definition's LayerNorm, biases and positions equal the models of `transformers` that have them? GPT-2 with
learned positions, and Nemotron-4, whose MLP is also a squared ReLU, with rotary ones."""

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, NemotronConfig, NemotronForCausalLM

from nemotron_train.model.reference.hybrid_model import HybridModel
from nemotron_train.model.reference.sizes import ReferenceSizes

HIDDEN, FFN, HEADS, HEAD_DIM, VOCAB, PLACES = 32, 48, 4, 8, 50, 40


def definition(**changes: object) -> HybridModel:
    """Two blocks in which no parameter has a value (such as 0 for a bias) that would hide a mistake."""
    torch.manual_seed(4)
    model = HybridModel(
        ReferenceSizes(
            layer_pattern="*-*-", hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM, mamba_num_heads=8, mamba_head_dim=8, mamba_num_groups=1, mamba_state_dim=8,
            vocab_size=VOCAB, norm="layer", linear_bias=True, **changes,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def split_rows(qkv: Tensor, groups: int) -> list[Tensor]:
    """All queries, all keys, all values, from rows that stand group after group."""
    parts = qkv.unflatten(0, (groups, -1, HEAD_DIM)).split([HEADS // groups, 1, 1], dim=1)
    return [part.flatten(0, 2) for part in parts]


def check_logits(ours: HybridModel, theirs: torch.nn.Module) -> None:
    tokens_BS = torch.randint(VOCAB, (2, 37), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens_BS), theirs(tokens_BS).logits, rtol=1e-4, atol=1e-4)


def test_learned_positions_biases_and_layer_norms_are_those_of_gpt_2() -> None:
    """Fails if a norm, a bias or a position acts in another place or way."""
    ours = definition(num_query_groups=HEADS, position_embedding="learned", max_position_embeddings=PLACES)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_positions=PLACES, n_embd=HIDDEN, n_layer=2, n_head=HEADS, n_inner=FFN,
            activation_function="relu2", tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip
    state = ours.state_dict()
    copied = {
        "transformer.wte.weight": state["embedding.word_embeddings.weight"],
        "transformer.wpe.weight": state["embedding.position_embeddings.weight"],
        "transformer.ln_f.weight": state["decoder.final_norm.weight"],
        "transformer.ln_f.bias": state["decoder.final_norm.bias"],
        "lm_head.weight": state["output_layer.weight"],
    }
    for block in range(2):
        attention, mlp = f"decoder.layers.{2 * block}.self_attention.", f"decoder.layers.{2 * block + 1}.mlp."
        there = f"transformer.h.{block}."
        for kind in ("weight", "bias"):
            copied[f"{there}ln_1.{kind}"] = state[f"{attention}linear_qkv.layer_norm_{kind}"]
            copied[f"{there}ln_2.{kind}"] = state[f"{mlp}linear_fc1.layer_norm_{kind}"]
            rows = torch.cat(split_rows(state[f"{attention}linear_qkv.{kind}"], HEADS))
            copied[f"{there}attn.c_attn.{kind}"] = rows.t()  # GPT-2 keeps its matrices the other way round
            copied[f"{there}attn.c_proj.{kind}"] = state[f"{attention}linear_proj.{kind}"].t()
            copied[f"{there}mlp.c_fc.{kind}"] = state[f"{mlp}linear_fc1.{kind}"].t()
            copied[f"{there}mlp.c_proj.{kind}"] = state[f"{mlp}linear_fc2.{kind}"].t()
    theirs.load_state_dict(copied)
    check_logits(ours, theirs)


def test_rotary_positions_are_those_of_nemotron_4() -> None:
    """Fails if other channels turn together, in another direction or at another speed, or if the heads of a group are
    rotated otherwise than its key."""
    ours = definition(num_query_groups=2, position_embedding="rope", rope_base=100.0)
    theirs = NemotronForCausalLM(
        NemotronConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=2, num_attention_heads=HEADS,
            num_key_value_heads=2, head_dim=HEAD_DIM, hidden_act="relu2", attention_bias=True, mlp_bias=True,
            max_position_embeddings=PLACES, norm_eps=1e-5, partial_rotary_factor=1.0, rope_theta=100.0,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0},
        )
    ).eval()  # fmt: skip
    state = ours.state_dict()
    copied = {
        "model.embed_tokens.weight": state["embedding.word_embeddings.weight"],
        "model.norm.weight": state["decoder.final_norm.weight"] - 1,  # theirs is added to 1
        "model.norm.bias": state["decoder.final_norm.bias"],
        "lm_head.weight": state["output_layer.weight"],
    }
    for block in range(2):
        attention, mlp = f"decoder.layers.{2 * block}.self_attention.", f"decoder.layers.{2 * block + 1}.mlp."
        there = f"model.layers.{block}."
        for kind in ("weight", "bias"):
            shift = 1 if kind == "weight" else 0
            copied[f"{there}input_layernorm.{kind}"] = state[f"{attention}linear_qkv.layer_norm_{kind}"] - shift
            copied[f"{there}post_attention_layernorm.{kind}"] = state[f"{mlp}linear_fc1.layer_norm_{kind}"] - shift
            for letter, rows in zip("qkv", split_rows(state[f"{attention}linear_qkv.{kind}"], 2), strict=True):
                copied[f"{there}self_attn.{letter}_proj.{kind}"] = rows
            copied[f"{there}self_attn.o_proj.{kind}"] = state[f"{attention}linear_proj.{kind}"]
            copied[f"{there}mlp.up_proj.{kind}"] = state[f"{mlp}linear_fc1.{kind}"]
            copied[f"{there}mlp.down_proj.{kind}"] = state[f"{mlp}linear_fc2.{kind}"]
    theirs.load_state_dict(copied)
    check_logits(ours, theirs)
