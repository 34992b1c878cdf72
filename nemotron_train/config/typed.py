"""Does this tree of plain values fit the schema: turns it into frozen dataclasses, or lists everything that is wrong.

OmegaConf's own structured configs are not used for this: they turn the text "3072" into a number without a word, stop
at the first problem, and make frozen dataclasses read-only to Hydra.
"""

import dataclasses
import json
import re
from enum import Enum
from typing import Any, TypeVar, get_type_hints

from omegaconf import MISSING

from nemotron_train.config.keys import (
    describe_keys,
    field_default,
    list_element,
    near_miss,
    optional_kind,
    plain,
    type_text,
)
from nemotron_train.config.schema import RunConfig
from nemotron_train.errors import ConfigError

Section = TypeVar("Section")


class Reader:
    """Reads plain values into dataclasses; `problems` collects what does not fit, each with its full key."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def section(self, section: type[Section], values: Any, key: str) -> Section | None:
        """Build one dataclass, or None where a value is missing or wrong."""
        if not isinstance(values, dict):
            self._refuse(key, values, "a section with keys")
            return None
        hints = get_type_hints(section)
        for name, value in values.items():
            if name not in hints:
                self.problems += map(unknown_key, _leaves(_join(key, str(name)), value))
        built: dict[str, Any] = {}
        missing = []
        for field in dataclasses.fields(section):  # type: ignore[arg-type]
            value = values.get(field.name, plain(field_default(field)))
            if value == MISSING:
                missing.append(field.name)
            else:
                built[field.name] = self.value(hints[field.name], value, _join(key, field.name))
        if missing:
            self._report_missing(key, missing)
            return None
        return section(**built)

    def value(self, kind: Any, value: Any, key: str) -> Any:
        """Return the value in the field's type; a value of another type is refused, never converted silently."""
        if optional := optional_kind(kind):
            return None if value is None else self.value(optional, value, key)
        if dataclasses.is_dataclass(kind):
            return self.section(kind, value, key)  # type: ignore[arg-type]
        if element := list_element(kind):
            if not isinstance(value, list):
                self._refuse(key, value, type_text(kind))
                return None
            return [self.value(element, item, f"{key}[{index}]") for index, item in enumerate(value)]
        if issubclass(kind, Enum):
            return self._choice(kind, value, key)
        return self._scalar(kind, value, key)

    def _choice(self, kind: type[Enum], value: Any, key: str) -> Enum | None:
        choices = [choice.value for choice in kind]
        if value is False and "off" in choices:  # YAML reads a bare `off` as false
            value = "off"
        if value in choices and isinstance(value, str):
            return kind(value)
        self.problems.append(
            f"{key}={_show(value)} is not one of {', '.join(choices)}.{near_miss(str(value), choices)}"
        )
        return None

    def _scalar(self, kind: type, value: Any, key: str) -> Any:
        if type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
        if kind is str and type(value) is int:  # run.name=7
            return str(value)
        hint = ""
        if kind is int and isinstance(value, float) and value.is_integer():
            hint = f" Write {int(value)}."
        elif kind in (int, float, bool) and isinstance(value, str) and _is_number(value):
            hint = " Remove the quotes."
        self._refuse(key, value, type_text(kind), hint)
        return None

    def _refuse(self, key: str, value: Any, expected: str, hint: str = "") -> None:
        found = {str: "text", bool: "true or false", type(None): "null", list: "a list", dict: "a section"}.get(
            type(value), "a number"
        )
        self.problems.append(f"{key}={_show(value)} is {found}, expected {expected}.{hint}")

    def _report_missing(self, key: str, names: list[str]) -> None:
        names_text = ", ".join(_join(key, name) for name in names)
        in_list = "[" in key
        choose = "" if in_list or key in ("run", "") else f", or choose a group with {key}=NAME"
        self.problems.append(f"{names_text}: no value. Set {'it' if len(names) == 1 else 'them'}{choose}.")


def read_run_config(tree: Any) -> RunConfig:
    """Return the typed configuration, or raise one ConfigError that lists every problem."""
    reader = Reader()
    config = reader.section(RunConfig, tree, "")
    raise_if(reader.problems)
    assert config is not None
    return config


def unknown_key(key: str) -> str:
    """Say that a key does not exist, with the closest one that does."""
    known = [info.key for info in describe_keys()]
    hint = near_miss(re.sub(r"\[\d+\]", "[]", key), known)
    same_name = [candidate for candidate in known if candidate.split(".")[-1] == key.split(".")[-1]]
    same_name.sort(key=lambda candidate: ("[" in candidate) != ("[" in key))
    if same_name:  # right name, wrong section: train.peak for lr.peak
        hint = f" Did you mean {same_name[0]}?"
    return f"{key} is not a key of the configuration.{hint}"


def raise_if(problems: list[str]) -> None:
    """Raise one ConfigError with all problems, if there are any."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(f"{len(problems)} problems in the configuration:\n" + "\n".join(f"- {p}" for p in problems))


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _leaves(key: str, value: Any) -> list[str]:
    """Return the keys that were set below a key: a typo in a section's name is best shown with the key it kept away."""
    if not isinstance(value, dict) or not value:
        return [key]
    return [leaf for name, inner in value.items() for leaf in _leaves(_join(key, str(name)), inner)]


def _show(value: Any) -> str:
    """Write a value so that text is told from a number, as YAML does."""
    if isinstance(value, str):
        return f'"{value}"'
    return str(value) if type(value) in (list, dict) else json.dumps(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text in ("true", "false")
    return True
