"""What keys are there: a walk over the schema's dataclasses, for messages, for listings and for tests.

The comments of `schema.py` are the manual, so they are read from its source rather than written twice.
"""

import dataclasses
import difflib
import inspect
import re
import types
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from nemotron_train.config.schema import RunConfig

COMMENTED_FIELD = re.compile(r"^ {4}(\w+): .*?(?:  # (.*))?$")
COMMENTED_CHOICE = re.compile(r"^ {4}(\w+) = .*?  # (.*)$")
PLAIN_TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class KeyInfo:
    """One key of the recipes. Keys inside a list's elements are written `data.sources[].name`."""

    key: str
    type: str
    default: Any  # plain value; MISSING ("???") where one must be given
    comment: str


def describe_keys(section: Any = RunConfig, prefix: str = "") -> list[KeyInfo]:
    """List every key a user may set, in the order of the schema."""
    comments = _field_comments(section)
    found: list[KeyInfo] = []
    for field in dataclasses.fields(section):
        key, kind = prefix + field.name, get_type_hints(section)[field.name]
        if dataclasses.is_dataclass(kind):
            found += describe_keys(kind, key + ".")
            continue
        comment = ". ".join(text for text in (comments.get(field.name), _kind_comment(kind)) if text)
        found.append(KeyInfo(key, type_text(kind), plain(field_default(field)), comment))
        if element := list_element(kind):
            found += describe_keys(element, key + "[].") if dataclasses.is_dataclass(element) else []
    return found


def type_text(kind: Any) -> str:
    """Say in words what values a field takes: `whole number`, `linear | cosine`, `number or null`."""
    if optional := optional_kind(kind):
        return f"{type_text(optional)} or null"
    if element := list_element(kind):
        return "list" if dataclasses.is_dataclass(element) else f"list of {type_text(element)}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " | ".join(choice.value for choice in kind)
    return PLAIN_TYPES.get(kind, "section")


def near_miss(name: str, candidates: Iterable[str]) -> str:
    """Return ` Did you mean X?` for the closest candidate, or nothing."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def default_tree(section: type) -> dict[str, Any]:
    """Return a section's defaults as plain nested values, `???` where there is none."""
    hints = get_type_hints(section)
    return {
        field.name: default_tree(hints[field.name])
        if dataclasses.is_dataclass(hints[field.name])
        else plain(field_default(field))
        for field in dataclasses.fields(section)
    }


def plain(value: Any) -> Any:
    """Turn dataclasses and enums into the dicts and strings that YAML and JSON know."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [plain(element) for element in value]
    return value


def field_default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING if field.default is dataclasses.MISSING else field.default


def list_element(kind: Any) -> Any:
    """Return T for `list[T]`, else None."""
    return get_args(kind)[0] if get_origin(kind) is list else None


def optional_kind(kind: Any) -> Any:
    """Return T for `T | None`, else None."""
    if not isinstance(kind, types.UnionType):
        return None
    return next(argument for argument in get_args(kind) if argument is not type(None))


@cache  # reading source is slow, and a search of layouts lists the keys hundreds of times
def _kind_comment(kind: Any) -> str:
    """Return what choices, or the elements of a list, say of themselves."""
    documented = optional_kind(kind) or list_element(kind) or kind
    if not getattr(documented, "__module__", "").startswith("nemotron_train."):
        return ""
    text = vars(documented).get("__doc__") or ""
    parts = [] if text.startswith(documented.__name__ + "(") else [" ".join(text.split())]
    lines = map(COMMENTED_CHOICE.match, inspect.getsource(documented).splitlines())
    choices = [f"{match[1]}: {match[2]}" for match in lines if match] if issubclass(documented, Enum) else []
    return " ".join(part for part in (*parts, "; ".join(choices)) if part)


@cache
def _field_comments(section: type) -> dict[str, str]:
    lines = map(COMMENTED_FIELD.match, inspect.getsource(section).splitlines())
    return {match[1]: match[2] or "" for match in lines if match}
