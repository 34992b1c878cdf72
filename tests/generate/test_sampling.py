"""Are tokens drawn with the probabilities that temperature and top-p ask for?"""

import pytest
import torch

from nemotron_train.errors import ConfigError
from nemotron_train.generate.sampling import Sampler, Sampling, pick

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])


def frequencies(sampling: Sampling, draws: int = 10_000) -> torch.Tensor:
    """Share of each token over evenly spread draws: exact to one draw."""
    logits_BV = PROBABILITIES.log().expand(draws, -1)
    uniform_B = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    return torch.bincount(pick(logits_BV, uniform_B, sampling), minlength=5) / draws


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1.0, [0, 1, 2, 3, 4]), (0.9, [1, 3, 4, 0]), (0.8, [1, 3, 4]), (0.41, [1, 3]), (0.39, [1]), (1e-9, [1])],
)
def test_tokens_of_the_nucleus_keep_their_proportions(top_p: float, kept: list[int]) -> None:
    """Fails if a token outside the smallest set of probability top-p is drawn, or one inside too often."""
    expected = torch.zeros(5)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    torch.testing.assert_close(frequencies(Sampling(temperature=1.0, top_p=top_p)), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    """Fails if it is not used, used inversely, or after top-p."""
    expected = PROBABILITIES ** (1 / temperature)
    found = frequencies(Sampling(temperature=temperature))
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=2e-4)


def test_temperature_zero_takes_the_likeliest_token() -> None:
    """Fails if it divides by zero, or draws."""
    assert Sampler(Sampling(), 3).choose(PROBABILITIES.log().expand(3, -1)).tolist() == [1, 1, 1]


def test_draws_follow_the_seed_and_differ_between_rows() -> None:
    """Fails if a run cannot be repeated, or rows draw the same numbers."""
    logits_BV = torch.zeros(4, 1000)
    first, again, other = (Sampler(Sampling(temperature=1.0, seed=seed), 4).choose(logits_BV) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert len(set(first.tolist())) == 4
    assert not set(first.tolist()) & set(other.tolist())


@pytest.mark.parametrize(
    ("values", "said"),
    [({"temperature": -0.1}, "-0.1"), ({"temperature": float("nan")}, "nan"), ({"top_p": 0.0}, "--top-p=0"),
     ({"top_p": 1.1}, "1.1"), ({"top_p": 0.9}, "--temperature=0 draws nothing"), ({"seed": 3}, "--seed=3")],
)  # fmt: skip
def test_values_out_of_range_are_refused(values: dict, said: str) -> None:
    """Fails if a value that means nothing is taken."""
    with pytest.raises(ConfigError, match=said):
        Sampling(**values)
