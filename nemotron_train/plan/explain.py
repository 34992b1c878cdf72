"""What does a key do: meaning, unit, range and source, its value in this run, and what another one would change?

Meaning, unit and origin are the schema's own comment, the source of a value is the comment of the recipe that sets it,
and the change is found by planning the run again.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

import yaml  # type: ignore[import-untyped]

from nemotron_train.config.keys import describe_keys, near_miss, plain
from nemotron_train.config.load import RECIPES
from nemotron_train.config.schema import RunConfig
from nemotron_train.errors import ConfigError
from nemotron_train.plan.ranges import RANGES
from nemotron_train.plan.report import Machine, report_json
from nemotron_train.plan.run_plan import RunPlan, plan_run

MISSING_TEXT = "???"
# What a change is told by, with the form of the numbers.
TOLD = {
    "parameters": ",",
    "train_flops": ".4g",
    "flops_per_token": ".4g",
    "data_parallel_size": ",",
    "micro_batches": ",",
    "tokens_per_step": ",",
    "num_steps": ",",
    "pipeline_imbalance": ".3f",
    "memory_gib_per_gpu": ".1f",
    "memory_gib_needed": ".1f",
    "fits": "",
    "step_seconds": ".3f",
    "tokens_per_second_per_gpu": ",.0f",
    "days": ".4g",
    "checkpoint_bytes": ".4g",
}


def explain(key: str, config: RunConfig, world_size: int, machine: Machine, overrides: Sequence[str]) -> str:
    """Return the manual of one key for this run.

    Raises:
        ConfigError: there is no such key, or the run itself cannot be.
    """
    infos = {info.key: info for info in describe_keys()}
    if key not in infos:
        raise ConfigError(f"{key} is not a key of the configuration.{near_miss(key, infos)}")
    info = infos[key]
    allowed = RANGES.get(key)
    rows = [
        (key, info.comment),
        ("type", info.type + (f", {allowed}" if allowed else "")),
        ("default", "none: a value must be given" if info.default == MISSING_TEXT else _text(info.default)),
    ]
    rows += [("set by", text) for text in _set_by(key, overrides)]
    if "[]" not in key:
        rows.append(("here", _text(plain(_value(config, key)))))
        rows += _changes(key, config, world_size, machine)
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in rows)


def neighbours(value: Any) -> Iterator[Any]:
    """Yield values next to this one: the other choices, the other truth, half and double."""
    if isinstance(value, Enum):
        yield from (choice for choice in type(value) if choice is not value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float) and value:
        half = value // 2 if isinstance(value, int) else value / 2
        yield from (other for other in (half, value * 2) if other)
    elif isinstance(value, int) and value == 0:
        yield 1


def _changes(key: str, config: RunConfig, world_size: int, machine: Machine) -> Iterator[tuple[str, str]]:
    before = plan_run(config, world_size)
    for other in neighbours(_value(config, key)):
        name = f"with {_text(plain(other))}"
        try:
            after = plan_run(_with(config, key, other), world_size)
        except ConfigError as error:
            yield name, f"refused: {str(error).splitlines()[-1].removeprefix('- ')}"
            continue
        yield name, "; ".join(_differences(before, after, machine)) or "the same plan: it acts while the run trains"


def _differences(before: RunPlan, after: RunPlan, machine: Machine) -> Iterator[str]:
    old, new = report_json(before, machine), report_json(after, machine)
    for name, form in TOLD.items():
        if old[name] != new[name] and old[name] is not None and new[name] is not None:
            yield f"{name} {old[name]:{form}} -> {new[name]:{form}}"
    if len(old["bf16_gemms"]) != len(new["bf16_gemms"]):
        yield f"products in bf16 {len(old['bf16_gemms'])} -> {len(new['bf16_gemms'])}"
    at = max(_tokens_to_compare(before), key=lambda at: abs(after.learning_rate_at(at) - before.learning_rate_at(at)))
    if after.learning_rate_at(at) != before.learning_rate_at(at):
        rates = f"{before.learning_rate_at(at):.4g} -> {after.learning_rate_at(at):.4g}"
        yield f"learning rate {rates} after {at:,} tokens, where it differs most"


def _tokens_to_compare(plan: RunPlan) -> list[int]:
    """Return tokens at which to compare learning rates: even steps over the run, and where its curve bends."""
    lr, end = plan.config.lr, plan.config.train.train_tokens
    return [lr.warmup_tokens, *(end * part // 200 for part in range(201)), end - (lr.decay_tokens or 0)]


def _value(config: RunConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _with(config: RunConfig, key: str, value: Any) -> RunConfig:
    section, name = key.split(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list) and any(isinstance(element, dict) for element in value):
        return f"{len(value)} entries"
    return "null" if value is None else str(value)


def _set_by(key: str, overrides: Sequence[str]) -> list[str]:
    """Return where the value of this run comes from, the last word first: command line, experiments, groups."""
    given = {name: value for name, _, value in (override.lstrip("+").partition("=") for override in overrides)}
    key = key.partition("[]")[0]
    if any(name == key or name.startswith(f"{key}.") for name in given):  # or an entry of a list, as `key.1.name`
        return ["the command line"]
    section, name = key.split(".")
    experiments = _recipes("experiment", _choice(given.get("experiment", "")))
    # The choice that counts is the command line's, then the nearest experiment's, then that of every run.
    choices = [_choice(given[section])] if section in given else []
    choices += [choice for file in (*experiments, "train") for choice in _group_choices(file, section)]
    files = [*experiments, *_recipes(section, next(iter(choices), None))]
    lines = ((file, _line(file, section, name)) for file in files)
    return [f"recipes/{file}.yaml: {line}" for file, line in lines if line][:1]


def _choice(text: str) -> Any:
    """Return what a group is set to on the command line, where it may be quoted."""
    return yaml.safe_load(text)


def _recipes(group: str, choice: Any) -> list[str]:
    """Return the files of a choice (or of several) and of the ones it starts from, the last word first."""
    files = []
    for name in reversed(choice if isinstance(choice, list) else [choice] if choice else []):
        parents = [entry for entry in _defaults(f"{group}/{name}") if isinstance(entry, str) and entry != "_self_"]
        files += [f"{group}/{name}", *_recipes(group, parents)]
    return files


def _group_choices(file: str, group: str) -> Iterator[Any]:
    """Yield what a recipe's defaults choose for a group."""
    for entry in _defaults(file):
        if isinstance(entry, dict):
            yield from (choice for name, choice in entry.items() if name.removeprefix("override /") == group)


def _defaults(file: str) -> list[Any]:
    tree = yaml.safe_load((RECIPES / f"{file}.yaml").read_text(encoding="utf-8"))
    return tree.get("defaults", [])


def _line(file: str, section: str, name: str) -> str | None:
    """Return the line of a recipe that sets a key, comment included: at the top of a group, in its section of an
    experiment."""
    text = (RECIPES / f"{file}.yaml").read_text(encoding="utf-8")
    if not file.startswith("experiment/"):
        if not file.startswith(f"{section}/"):
            return None
        found = re.search(rf"^{name}:.*$", text, re.MULTILINE)
    else:
        part = re.search(rf"^{section}:\n((?:(?:  .*)?\n)+)", text + "\n", re.MULTILINE)
        found = part and re.search(rf"^  {name}:.*$", part[1], re.MULTILINE)
    return re.sub(r"\s+", " ", found[0]).strip() if found else None
