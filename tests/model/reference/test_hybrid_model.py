"""Is the reference model the published one? The oracle: transformers' `NemotronHForCausalLM` with the same weights."""

import pytest
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from nemotron_train.convert.hf_names import LAYER_TYPES, HfNames
from nemotron_train.errors import CheckpointError
from nemotron_train.model.reference.hybrid_model import HybridModel
from nemotron_train.model.reference.sizes import ReferenceSizes

CASES = {
    "mamba only, one group": ("M", dict(mamba_num_groups=1), 13),
    "all kinds": ("M-M*-", {}, 24),
    "attention first, many query heads a group": ("*M-*", dict(num_query_groups=1), 19),
    "a query group a head": ("*-*", dict(num_query_groups=4), 9),
    "four mamba groups, tied": ("MM-*M", dict(mamba_num_groups=4, tied_embeddings=True), 31),
    "one token": ("M*-", dict(mamba_state_dim=3), 1),
    "conv kernel 2, wide heads": ("MM", dict(mamba_conv_kernel=2, mamba_head_dim=16, mamba_num_heads=2), 17),
}
HF_CHUNK = 8  # most lengths above are no multiple of it


def small_sizes(pattern: str, **changes: object) -> ReferenceSizes:
    sizes = dict(
        layer_pattern=pattern,
        hidden_size=24,
        ffn_hidden_size=40,
        num_attention_heads=4,
        num_query_groups=2,
        attention_head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=8,
        mamba_num_groups=2,
        mamba_state_dim=6,
        vocab_size=50,
    )
    return ReferenceSizes(**{**sizes, **changes})  # type: ignore[arg-type]


def names_of(sizes: ReferenceSizes) -> HfNames:
    return HfNames(
        layer_pattern=sizes.layer_pattern,
        num_query_groups=sizes.num_query_groups,
        attention_head_dim=sizes.attention_head_dim,
        tied_embeddings=sizes.tied_embeddings,
    )


def reference_model(sizes: ReferenceSizes) -> HybridModel:
    """Build a model in which no parameter has a value (such as 1 for a norm) that would hide a mistake."""
    model = HybridModel(sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def hugging_face_model(sizes: ReferenceSizes) -> NemotronHForCausalLM:
    config = NemotronHConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        layers_block_type=[LAYER_TYPES[letter] for letter in sizes.layer_pattern],
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_query_groups,
        head_dim=sizes.attention_head_dim,
        intermediate_size=sizes.ffn_hidden_size,
        mamba_num_heads=sizes.mamba_num_heads,
        mamba_head_dim=sizes.mamba_head_dim,
        n_groups=sizes.mamba_num_groups,
        ssm_state_size=sizes.mamba_state_dim,
        conv_kernel=sizes.mamba_conv_kernel,
        layer_norm_epsilon=sizes.norm_epsilon,
        chunk_size=HF_CHUNK,
        time_step_min=1e-30,  # it clamps dt from below there, which Megatron-Core does not
        attn_implementation="eager",
    )
    model = NemotronHForCausalLM(config)
    if sizes.tied_embeddings:  # by hand: this class does not tie whatever its configuration says
        model.lm_head.weight = model.model.embeddings.weight
    return model.train()


@pytest.mark.parametrize(("pattern", "changes", "seq_length"), CASES.values(), ids=CASES.keys())
def test_logits_and_gradients_equal_those_of_nemotron_h(pattern: str, changes: dict, seq_length: int) -> None:
    """Fails if any layer computes something else, or if a weight goes to the wrong place or in the wrong order."""
    torch.manual_seed(0)
    sizes = small_sizes(pattern, **changes)
    ours, theirs = reference_model(sizes), hugging_face_model(sizes)
    names = names_of(sizes)
    theirs.load_state_dict(names.to_hugging_face(dict(ours.named_parameters())), strict=not sizes.tied_embeddings)
    tokens = torch.randint(sizes.vocab_size, (3, seq_length))

    our_logits, their_logits = ours(tokens), theirs(tokens, use_cache=False).logits
    torch.testing.assert_close(our_logits, their_logits, rtol=0, atol=1e-4)

    cotangent = torch.randn_like(our_logits)
    our_logits.backward(cotangent)
    their_logits.backward(cotangent)
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    our_gradients = names.to_hugging_face({name: p.grad for name, p in ours.named_parameters()})
    assert our_gradients.keys() == their_gradients.keys()
    for name, ours_ in our_gradients.items():
        difference = (ours_ - their_gradients[name]).norm()
        assert difference <= 1e-3 * their_gradients[name].norm() + 1e-9, f"{name}: {difference}"


def test_parameter_names_and_shapes_are_those_of_megatron_core() -> None:
    """Fails if a parameter is renamed or reshaped: checkpoints of Megatron-Core would no longer fit."""
    model = HybridModel(small_sizes("M*-"))
    conv, projection = 32 + 2 * 2 * 6, 32 + 32 + 2 * 2 * 6 + 4
    layers = {
        "0.mixer.in_proj.layer_norm_weight": (24,),
        "0.mixer.in_proj.weight": (projection, 24),
        "0.mixer.conv1d.weight": (conv, 1, 4),
        "0.mixer.conv1d.bias": (conv,),
        "0.mixer.dt_bias": (4,),
        "0.mixer.A_log": (4,),
        "0.mixer.D": (4,),
        "0.mixer.norm.weight": (32,),
        "0.mixer.out_proj.weight": (24, 32),
        "1.self_attention.linear_qkv.layer_norm_weight": (24,),
        "1.self_attention.linear_qkv.weight": ((4 + 2 + 2) * 8, 24),
        "1.self_attention.linear_proj.weight": (24, 4 * 8),
        "2.mlp.linear_fc1.layer_norm_weight": (24,),
        "2.mlp.linear_fc1.weight": (40, 24),
        "2.mlp.linear_fc2.weight": (24, 40),
    }
    expected = {f"decoder.layers.{name}": shape for name, shape in layers.items()}
    expected |= {
        "embedding.word_embeddings.weight": (50, 24),
        "decoder.final_norm.weight": (24,),
        "output_layer.weight": (50, 24),
    }
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected


def test_queries_keys_and_values_are_the_same_after_there_and_back() -> None:
    """Fails if the two directions differ in any row."""
    sizes = small_sizes("M*-*", num_query_groups=2)
    names = names_of(sizes)
    qkv = dict(reference_model(sizes).named_parameters())["decoder.layers.1.self_attention.linear_qkv.weight"]
    assert torch.equal(names.join_qkv(*names.split_qkv(qkv)), qkv)


def test_a_tensor_without_a_place_is_an_error() -> None:
    """Fails if a model with another pattern is converted without a word."""
    ours = dict(HybridModel(small_sizes("M*-")).named_parameters())
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.2\.mlp"):
        names_of(small_sizes("M*")).to_hugging_face(ours)


def test_loss_of_equal_logits_is_that_of_a_uniform_guess() -> None:
    """Fails if the loss is not the mean over tokens in nats."""
    model = HybridModel(small_sizes("M-"))
    torch.nn.init.zeros_(model.output_layer.weight)
    tokens = torch.randint(50, (2, 7))
    assert model.loss(tokens, tokens).item() == pytest.approx(torch.tensor(50.0).log().item())


def test_no_logit_depends_on_a_later_token() -> None:
    """Fails if attention, convolution or scan look ahead."""
    torch.manual_seed(0)
    model = reference_model(small_sizes("M*-M"))
    tokens = torch.randint(50, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (tokens[0, 7] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_documents_are_samples_of_their_own() -> None:
    """Fails if the definition mixes documents, or puts their logits in another place."""
    torch.manual_seed(0)
    sizes = small_sizes("M-*")
    model, tokens_BS = reference_model(sizes), torch.randint(sizes.vocab_size, (2, 9))
    number_BS = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2, 2], [0] * 9])
    logits = model(tokens_BS, number_BS)
    for row, start, end in ((0, 0, 4), (0, 4, 5), (0, 5, 9), (1, 0, 9)):
        torch.testing.assert_close(logits[row, start:end], model(tokens_BS[row : row + 1, start:end])[0])
    assert (logits - model(tokens_BS)).abs().max() > 1e-3
