"""How do prompts become continuations: who stops when, and what comes next?"""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum

import torch

from nemotron_train.errors import ConfigError
from nemotron_train.generate.decoder import Decoder
from nemotron_train.generate.sampling import Sampler, Sampling
from nemotron_train.generate.thinking import Thinking, ThinkingBudget
from nemotron_train.model.reference.hybrid_model import HybridModel


class End(str, Enum):
    """Why a continuation ends."""

    stop_token = "stop_token"
    length = "length"


@dataclass(frozen=True, kw_only=True)
class Request:
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: Set[int] = frozenset()  # a continuation ends before the first of them
    thinking: ThinkingBudget | None = None


@dataclass(frozen=True)
class Continuation:
    tokens: list[int]  # without the prompt, and without the token that stopped it
    end: End


def continue_prompts(
    model: HybridModel,
    prompts: Sequence[Sequence[int]],
    request: Request,
    after_token: Callable[[int], object] = lambda sequences: None,
) -> list[Continuation]:
    """Continue every prompt until a stop token or `max_new_tokens`, all prompts at once.

    Args:
        prompts: token ids.
        after_token: called with the number of sequences that are still going on.

    Raises:
        ConfigError: there is nothing to continue, or a token is none of the model's.
    """
    check_prompts(prompts, len(model.embedding.word_embeddings.weight), request)
    check_lengths(prompts, model.num_places, request)
    decoder = Decoder(model, prompts, max(map(len, prompts)) + request.max_new_tokens)
    sampler = Sampler(request.sampling, len(prompts))
    sequences = [_Sequence(prompt, request) for prompt in prompts]
    for number in range(request.max_new_tokens):
        chosen = sampler.choose(decoder.logits_BV).tolist()
        tokens = [sequence.take(token) for sequence, token in zip(sequences, chosen, strict=True)]
        going_on = sum(sequence.end is None for sequence in sequences)
        after_token(going_on)
        if not going_on:
            break
        if number + 1 < request.max_new_tokens:
            decoder.append(torch.tensor(tokens, device=decoder.logits_BV.device))
    return [Continuation(sequence.tokens, sequence.end or End.length) for sequence in sequences]


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, request: Request) -> None:
    """Raise ConfigError where there is nothing to start from, or a token is none of the model's."""
    if not prompts or request.max_new_tokens < 1:
        raise ConfigError(f"Nothing to do: {len(prompts)} prompts, --max-new-tokens={request.max_new_tokens}.")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise ConfigError(f"Prompt {number} of {len(prompts)} has no tokens. Give it at least one.")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ConfigError(
                f"Prompt {number} has tokens from {min(prompt)} to {max(prompt)}; the model's go from 0 to "
                f"{vocab_size - 1}. Use the tokenizer it was trained with."
            )


def check_lengths(prompts: Sequence[Sequence[int]], num_places: int | None, request: Request) -> None:
    """Raise ConfigError where a text would run over the model's learned positions (None: it has none)."""
    longest = max(map(len, prompts))
    if num_places is not None and longest + request.max_new_tokens > num_places + 1:  # the last token is not read
        raise ConfigError(
            f"The longest prompt has {longest} tokens, and --max-new-tokens={request.max_new_tokens} more run over "
            f"model.max_position_embeddings={num_places} of the checkpoint. Ask for less."
        )


class _Sequence:
    """One continuation while it grows."""

    def __init__(self, prompt: Sequence[int], request: Request) -> None:
        self.tokens: list[int] = []
        self.end: End | None = None
        self._request = request
        self._forced: list[int] = []
        self._thinking = Thinking(request.thinking, prompt) if request.thinking else None

    def take(self, chosen: int) -> int:
        """Take the chosen token, or the one that has to come instead of it; returns what the model reads next."""
        if self.end is not None:
            return chosen  # it is read beside the others, and nobody looks at what comes of it
        token = self._forced.pop(0) if self._forced else chosen
        if token in self._request.stop_tokens:
            self.end = End.stop_token
            return token
        self.tokens.append(token)
        if self._thinking is not None:
            self._forced += self._thinking.follow(token)
        return token
