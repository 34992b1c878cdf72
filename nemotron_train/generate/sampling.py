"""Which token comes next, given the logits? The likeliest, or one drawn by temperature and top-p.

Shapes: B sequences of the batch, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_train.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0  # logits are divided by it; 0 = the likeliest token
    top_p: float = 1.0  # draw from the likeliest tokens that together have at least this probability
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature={self.temperature:g}: choose 0 (the likeliest token) or more.")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"--top-p={self.top_p:g}: choose a probability above 0, up to 1.")
        if self.temperature == 0.0 and (self.top_p < 1.0 or self.seed != 0):
            raise ConfigError(
                f"--top-p={self.top_p:g} and --seed={self.seed} are for draws, and --temperature=0 draws nothing: the "
                "likeliest token comes. Give a temperature above 0, or leave both out."
            )


class Sampler:
    """Draws tokens; what one sequence of the batch draws depends on the seed and its place in the batch only."""

    def __init__(self, sampling: Sampling, batch: int) -> None:
        self.sampling = sampling
        # Numbers of neighbouring seeds must not go together: each row's generator starts at a number drawn from one.
        seeds = torch.randint(2**62, (batch,), generator=torch.Generator().manual_seed(sampling.seed))
        self._generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def choose(self, logits_BV: Tensor) -> Tensor:
        """Return the next token of every sequence (B), on the logits' device."""
        if self.sampling.temperature == 0.0:
            return logits_BV.argmax(-1)
        drawn = [torch.rand((), generator=generator, dtype=torch.float64) for generator in self._generators]
        return pick(logits_BV, torch.stack(drawn).to(logits_BV.device), self.sampling)


def pick(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> Tensor:
    """Return the token at a place in the cumulative distribution.

    Tokens are lined up from the likeliest on, as far as `top_p` asks; each takes a length in proportion to its
    probability, and the one at `uniform` of the whole length is picked.

    Args:
        uniform_B: in [0, 1).
    """
    all_BV = (logits_BV.double() / sampling.temperature).softmax(-1)
    probabilities, tokens_BV = all_BV.sort(descending=True, stable=True)
    upto_BV = probabilities.cumsum(-1)
    kept = (upto_BV - probabilities < sampling.top_p).sum(-1, keepdim=True)  # the likeliest one always is
    place_B1 = uniform_B[:, None] * upto_BV.gather(-1, kept - 1)
    picked = torch.searchsorted(upto_BV, place_B1, right=True).minimum(kept - 1)
    return tokens_BV.gather(-1, picked).squeeze(-1)
