"""When does a model that thinks between `<think>` and `</think>` have to stop thinking?

When it has spent its budget of tokens it may finish its line: thinking is closed at the next newline, at the latest 500
tokens after the budget. Source: the budget control of Nemotron Nano 2, arXiv 2508.14444.

Token ids only: what a token's text is, is the caller's to know.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

GRACE_TOKENS = 500


@dataclass(frozen=True, kw_only=True)
class ThinkingBudget:
    tokens: int  # thinking may take, >= 0
    opening: tuple[int, ...]  # the tokens of `<think>`
    closing: tuple[int, ...]  # and of `</think>`
    newlines: Set[int]  # tokens whose text holds a newline
    grace_tokens: int = GRACE_TOKENS  # to end the line in


class Thinking:
    """Follows one sequence, token by token."""

    def __init__(self, budget: ThinkingBudget, prompt: Sequence[int] = ()) -> None:
        """Args:
        prompt: what the model goes on from; it may have opened the thinking, which is counted from the prompt's end.
        """
        self._budget = budget
        self._last: list[int] = []
        self._spent: int | None = None  # tokens of thinking; None: not thinking
        for token in prompt:
            self._turn(token)

    def follow(self, token: int) -> tuple[int, ...]:
        """Take note of the sequence's next token.

        Returns:
            the tokens that must come after it: those that close the thinking, or none.
        """
        if self._turn(token) or self._spent is None:
            return ()
        self._spent += 1
        over = self._spent - self._budget.tokens
        if over < self._budget.grace_tokens and (over < 0 or token not in self._budget.newlines):
            return ()
        self._spent = None
        return self._budget.closing

    def _turn(self, token: int) -> bool:
        """Take note of a token; returns whether it opens or closes the thinking."""
        opening, closing = self._budget.opening, self._budget.closing
        self._last = [*self._last, token][-max(len(opening), len(closing)) :]
        opens, closes = (tuple(self._last[-len(tokens) :]) == tokens for tokens in (opening, closing))
        if opens or closes:
            self._spent = 0 if opens else None
        return opens or closes
