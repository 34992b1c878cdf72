"""Patterns are read letter by letter, and a wrong one is shown with its place."""

import pytest

from nemotron_train.errors import ConfigError
from nemotron_train.plan.pattern import LayerKind, ParsedPattern, parse_pattern

M, A, F = LayerKind.mamba, LayerKind.attention, LayerKind.mlp


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("M-M*-", ParsedPattern((M, F, M, A, F), None)),
        ("M-M|*-", ParsedPattern((M, F, M, A, F), (3,))),
        ("M|-|M*|-", ParsedPattern((M, F, M, A, F), (1, 2, 4))),
    ],
)
def test_letters_become_layers_and_bars_become_cuts(text: str, parsed: ParsedPattern) -> None:
    """Fails if a layer is dropped, or a cut counts the bars before it."""
    assert parse_pattern(text) == parsed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("M-X*-", ["'X'", "position 3", "M-X*-"]),
        ("M-|E", ["'E'", "position 4"]),
        ("m-", ["'m'", "position 1", "M (mamba)"]),
        ("M- M", ["' '", "position 3"]),
        ("", ["no layers"]),
        ("|M-", ["no layer before", "position 1"]),
        ("M||-", ["no layer before", "position 3"]),
        ("M-|", ["no layer after"]),
    ],
)
def test_a_wrong_pattern_is_refused_with_its_place(text: str, expected: list[str]) -> None:
    """Fails if an unknown letter is skipped or an empty stage allowed."""
    with pytest.raises(ConfigError) as caught:
        parse_pattern(text)
    assert [part for part in expected if part not in str(caught.value)] == []
