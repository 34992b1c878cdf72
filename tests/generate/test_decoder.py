"""Is decoding token by token the forward pass over the whole text, whatever stands beside a sequence in the batch?"""

from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron_train.errors import ConfigError
from nemotron_train.generate.attention_cache import KeyValueCache
from nemotron_train.generate.continuations import Continuation, End, Request, continue_prompts
from nemotron_train.generate.decoder import Decoder
from nemotron_train.generate.mamba_state import MambaState
from nemotron_train.generate.sampling import Sampling
from nemotron_train.model.reference.hybrid_model import HybridModel
from nemotron_train.model.reference.sizes import ReferenceSizes

VOCAB = 96
# One token; shorter than the convolution; just before, at and after the end of the scan's chunk of 32; several chunks.
PROMPTS = [
    [5],
    [7, 8],
    list(range(31)),
    list(range(32)),
    list(range(90, 57, -1)),
    [number * 7 % VOCAB for number in range(80)],
]


def random_model(pattern: str = "M-M*M*-", *, tied: bool = False, **parts: Any) -> HybridModel:
    torch.manual_seed(3)
    sizes = ReferenceSizes(
        layer_pattern=pattern, hidden_size=32, ffn_hidden_size=48, num_attention_heads=6, num_query_groups=2,
        attention_head_dim=8, mamba_num_heads=8, mamba_head_dim=6, mamba_num_groups=4, mamba_state_dim=10,
        vocab_size=VOCAB, tied_embeddings=tied, **parts,
    )  # fmt: skip
    model = HybridModel(sizes)
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.dim() > 1 else 0.5 if name.endswith("dt_bias") else 0.1
        parameter.data = torch.randn_like(parameter) * scale + (parameter.data if parameter.dim() == 1 else 0)
    return model.eval()


@torch.no_grad()
def whole_forward(model: HybridModel, tokens: list[int]) -> Tensor:
    """Return the logits of the token after these, computed from scratch."""
    return model(torch.tensor([tokens]))[0, -1]


LEARNED: dict[str, Any] = dict(position_embedding="learned", max_position_embeddings=100)
ROPE: dict[str, Any] = dict(position_embedding="rope", rope_base=50.0)
MODELS: dict[str, dict[str, Any]] = {
    "hybrid": dict(pattern="M-M*M*-"),
    "transformer": dict(pattern="*-*"),
    "tied": dict(pattern="MM", tied=True),
    "gpt": dict(pattern="*-*-", norm="layer", linear_bias=True, **LEARNED),
    "norms of values and outputs": dict(pattern="*-*", qkv_norm="qkv", output_norm=True, layer_scale=0.5, **LEARNED),
    "rope": dict(pattern="*-*-", **ROPE),
    "capped": dict(pattern="M*-*", qkv_norm="qk", attention_logit_scale=2.0, attention_logit_cap=1.0, **ROPE),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_tokens_logits_are_those_of_the_whole_forward_pass(name: str) -> None:
    """Fails if a state is not that of its own prompt's end, is not kept up, or another sequence's gets into it, or if a
    token gets another place than its own."""
    model = random_model(**MODELS[name])
    texts = [list(prompt) for prompt in PROMPTS]
    decoder = Decoder(model, texts, room=100)
    for number in range(6):
        expected = torch.stack([whole_forward(model, text) for text in texts])
        torch.testing.assert_close(decoder.logits_BV, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
        next_tokens = torch.tensor([(13 * number + 5 * row) % VOCAB for row in range(len(texts))])
        texts = [[*text, token] for text, token in zip(texts, next_tokens.tolist(), strict=True)]
        decoder.append(next_tokens)


def test_texts_do_not_run_over_the_learned_positions() -> None:
    """Fails if a text goes on where no position was learned, or is refused a token too early (the last is not
    read)."""
    model = random_model("*-", position_embedding="learned", max_position_embeddings=12)
    assert len(continue_prompts(model, [list(range(5))], Request(max_new_tokens=8))[0].tokens) == 8
    with pytest.raises(ConfigError, match=r"5 tokens.*--max-new-tokens=9.*model\.max_position_embeddings=12"):
        continue_prompts(model, [list(range(5))], Request(max_new_tokens=9))


def test_greedy_continuations_are_those_of_the_whole_forward_pass() -> None:
    """Fails if a token is taken from another place's logits, or read twice."""
    model = random_model()
    continuations = continue_prompts(model, PROMPTS, Request(max_new_tokens=8))
    for prompt, continuation in zip(PROMPTS, continuations, strict=True):
        text = list(prompt)
        for _ in range(8):
            text.append(int(whole_forward(model, text).argmax()))
        assert continuation == Continuation(text[len(prompt) :], End.length)


def test_what_a_mamba_layer_keeps_does_not_grow() -> None:
    """Fails if its state holds on to tokens, or to the prompt's intermediates; a cache has its size from the start."""
    decoder = Decoder(random_model(), [[1], list(range(70))], room=90)
    mamba = [state for state in decoder.states if isinstance(state, MambaState)]
    caches = [state for state in decoder.states if isinstance(state, KeyValueCache)]
    assert (len(mamba), len(caches)) == (3, 2)
    held = [tensor.untyped_storage().nbytes() for state in mamba for tensor in vars(state).values()]
    inner, groups_states = 8 * 6, 2 * 4 * 10
    expected = [
        2 * 4 * (inner + groups_states) * 4,
        2 * 4 * inner * 10,
    ]  # 2 texts, float32; 4 tokens, 10 numbers a state
    assert held == expected * 3
    for token in range(15):
        decoder.append(torch.tensor([token, token]))
    assert [tensor.untyped_storage().nbytes() for state in mamba for tensor in vars(state).values()] == held
    assert all(cache.num_bytes() == 2 * 2 * 90 * 2 * 8 * 4 for cache in caches)  # keys and values, 2 texts, 90 tokens


def test_a_sequence_draws_the_same_whatever_stands_beside_it() -> None:
    """Fails if a sequence's random numbers, or its end, depend on the others of the batch."""
    model = random_model()
    request = Request(max_new_tokens=20, sampling=Sampling(temperature=1.0, top_p=0.95, seed=4))
    alone = continue_prompts(model, [PROMPTS[3]], request)
    together = continue_prompts(model, [PROMPTS[3], PROMPTS[0], PROMPTS[3]], request)
    assert together[0] == alone[0]
    assert together[2] != alone[0], "the same prompt twice gives two samples"
    other_seed = Request(max_new_tokens=20, sampling=Sampling(temperature=1.0, top_p=0.95, seed=5))
    assert continue_prompts(model, [PROMPTS[3]], other_seed) != alone


def test_a_continuation_ends_before_its_first_stop_token() -> None:
    """Fails if a stop token is passed over, is part of the text, or ends the other sequences too."""
    model = random_model()
    free = continue_prompts(model, PROMPTS[:3], Request(max_new_tokens=10))
    stop = free[1].tokens[4]
    calls: list[int] = []
    stopped = continue_prompts(model, PROMPTS[:3], Request(max_new_tokens=10, stop_tokens={stop}), calls.append)
    for before, after in zip(free, stopped, strict=True):
        kept = before.tokens.index(stop) if stop in before.tokens else 10
        assert after == Continuation(before.tokens[:kept], End.stop_token if kept < 10 else End.length)
    assert stopped[1].end is End.stop_token
    assert calls[0] == 3


def test_bf16_weights_stay_close() -> None:
    """Fails if decoding in bf16 computes states or step sizes in bf16: errors would pile up over the text."""
    model = random_model()
    text = PROMPTS[5]
    expected = whole_forward(model, text)
    for name, parameter in model.named_parameters():
        if not name.endswith(("dt_bias", "A_log", "D")):
            parameter.data = parameter.data.bfloat16()
    decoder = Decoder(model, [text[:1]], room=100)
    for token in text[1:]:
        decoder.append(torch.tensor([token]))
    error = (decoder.logits_BV[0] - expected).norm() / expected.norm()
    assert error < 0.05
    assert next(state for state in decoder.states if isinstance(state, MambaState)).ssm_BGRPN.dtype == torch.float32
