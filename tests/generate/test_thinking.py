"""Is thinking closed where the budget says? Scripted tokens, no model."""

import pytest

from nemotron_train.generate.continuations import Request, _Sequence
from nemotron_train.generate.thinking import Thinking, ThinkingBudget

WORD, NEWLINE, END = 1, 2, 3
OPEN, CLOSE = (10, 11), (20, 21, 22)


def budget(tokens: int) -> ThinkingBudget:
    return ThinkingBudget(tokens=tokens, opening=OPEN, closing=CLOSE, newlines={NEWLINE, 4})


def written(prompt: list[int], wishes: list[int], tokens: int) -> list[int]:
    """What is written when the model wishes for these tokens, one at each place."""
    sequence = _Sequence(prompt, Request(max_new_tokens=len(wishes), thinking=budget(tokens)))
    return [sequence.take(wish) for wish in wishes]


@pytest.mark.parametrize(("newline_at", "closed_after"), [(3, 501), (4, 5), (5, 6), (9, 10), (400, 401)])
def test_it_is_closed_at_the_first_newline_after_the_budget(newline_at: int, closed_after: int) -> None:
    """Fails if the budget is off by one, a newline within the budget closes, or closing waits for another one."""
    thoughts = [WORD] * 600
    thoughts[newline_at] = thoughts[500] = NEWLINE  # the budget of 5 is spent with the thought of index 4
    found = written([], [*OPEN, *thoughts], 5)
    start = len(OPEN) + closed_after
    assert found[:start] == [*OPEN, *thoughts[:closed_after]]
    assert found[start : start + 3] == list(CLOSE)
    assert found[start + 3 :] == thoughts[closed_after + 3 : len(found) - len(OPEN)], "and once only"


def test_it_is_closed_500_tokens_after_the_budget_at_the_latest() -> None:
    """Fails if a line without an end is thought for ever."""
    found = written([], [*OPEN, *[WORD] * 600], 7)
    assert found[: 2 + 507] == [*OPEN, *[WORD] * 507]
    assert found[509:] == [*CLOSE, *[WORD] * 90]


def test_thinking_that_ends_by_itself_is_left_alone() -> None:
    """Fails if tokens after `</think>`, or of a second thought, are counted with the first."""
    wishes = [*OPEN, WORD, NEWLINE, *CLOSE, *[WORD, NEWLINE] * 9, *OPEN, WORD, NEWLINE, WORD, NEWLINE, WORD]
    assert written([], wishes[:-1], 4) == wishes[:-1]
    assert written([], wishes, 3)[-1] == CLOSE[0]


def test_text_without_thinking_is_left_alone() -> None:
    """Fails if a lone half of the opening tag, or a newline, starts the count."""
    wishes = [OPEN[0], WORD, OPEN[1], *[NEWLINE, WORD] * 20]
    assert written([], wishes, 0) == wishes


def test_a_prompt_may_open_the_thinking() -> None:
    """Fails if `<think>` of the prompt, half of it too, is not seen, or the prompt's own tokens are counted."""
    assert written([WORD, *OPEN, *[NEWLINE] * 9], [WORD, WORD, NEWLINE, WORD], 2) == [WORD, WORD, NEWLINE, CLOSE[0]]
    assert written([*OPEN[:1]], [OPEN[1], NEWLINE, WORD], 1) == [OPEN[1], NEWLINE, CLOSE[0]]
    assert written([*OPEN, WORD, *CLOSE], [NEWLINE] * 4, 0) == [NEWLINE] * 4


def test_a_token_that_holds_a_newline_among_others_counts_as_one() -> None:
    """Fails if only one token is taken for a newline."""
    assert Thinking(budget(0), OPEN).follow(4) == CLOSE
    assert Thinking(budget(0), OPEN).follow(WORD) == ()
