"""How the command line and `recipes/` become one RunConfig, and how a RunConfig is written down and read again.

Hydra only composes (defaults lists, groups, overrides, interpolation); types are checked in `typed.py`. `hydra.main`
is not used, so there is no output folder, no log configuration and no change of working directory to switch off.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import recipes
from nemotron_train.config.keys import default_tree, near_miss, plain
from nemotron_train.config.schema import RunConfig
from nemotron_train.config.typed import raise_if, read_run_config, unknown_key
from nemotron_train.errors import ConfigError

RECIPES = Path(recipes.__file__).resolve().parent


def load_config(overrides: Sequence[str]) -> RunConfig:
    """Compose the recipes with `key=value` arguments and return the typed result.

    Raises:
        ConfigError: unknown keys, groups and experiments, wrong types, missing values; all at once where possible.
    """
    return read_run_config(_resolved_tree(_compose(_hydra_overrides(overrides))))


def list_choices(group: str) -> list[str]:
    """Return the names of a group's files: what may stand behind `group=`."""
    return sorted(file.stem for file in (RECIPES / group).glob("*.yaml"))


def list_groups() -> list[str]:
    """Return the groups: the folders of `recipes/`."""
    return sorted(folder.name for folder in RECIPES.iterdir() if folder.is_dir() and list_choices(folder.name))


def fingerprint(config: RunConfig) -> str:
    """Return a hash that is equal exactly where every value is: ranks compare it before they start."""
    text = json.dumps(plain(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_resolved(config: RunConfig, path: str | Path) -> None:
    """Write every value as YAML; a reader sees the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(yaml.safe_dump(plain(config), sort_keys=False, width=200), encoding="utf-8")
    os.replace(temporary, path)


def read_resolved(path: str | Path) -> RunConfig:
    """Read what `write_resolved` wrote; it is checked as strictly as a command line."""
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
        return read_run_config(tree)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist.") from error
    except (yaml.YAMLError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _hydra_overrides(arguments: Sequence[str]) -> list[str]:
    """Check the arguments' keys and hand the rest to Hydra.

    Values are all passed as `++key=value` (set or add): whether a key exists is decided by the schema, not by what the
    chosen YAML files happen to mention.
    """
    problems, passed, groups = [], [], list_groups()
    chosen: dict[str, Any] = {}
    for argument in arguments:
        override = _parse(argument)
        key = override.key_or_group.split("@")[0]
        text = argument.lstrip("+")
        if override.is_delete():
            passed.append(argument)
        elif override.is_sweep_override():
            problems.append(f"{argument}: one run takes one value of {key}. Quote a value that holds commas.")
        elif key in groups:
            chosen[key] = override.value()
            problems += _unknown_choice(key, override.value())
            passed.append(text)
        elif "." not in key or key.startswith("hydra"):
            problems.append(_unknown_group(key, groups))
        else:
            passed.append("++" + text)
    if chosen.get("experiment") is None:
        experiments = ", ".join(list_choices("experiment"))
        problems.insert(0, f"No experiment chosen. Add experiment=NAME, one of: {experiments}.")
    raise_if(problems)
    return passed


def _parse(argument: str) -> Override:
    if argument.startswith("-"):
        raise ConfigError(f"{argument} is not an option. Arguments have the form key=value.")
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"Cannot read {argument!r} as key=value: {first_line}") from error


def _unknown_choice(group: str, choice: Any) -> list[str]:
    choices = list_choices(group)
    if choice in choices or isinstance(choice, list):
        return []
    if isinstance(choice, dict):
        return [f"{group}={choice}: set the keys one by one, as {group}.KEY=VALUE."]
    return [
        f"{group}={choice} does not exist in recipes/{group}. Choose one of: {', '.join(choices)}."
        + near_miss(str(choice), choices)
    ]


def _unknown_group(key: str, groups: list[str]) -> str:
    if key.startswith("hydra"):
        return f"{key}: Hydra's own settings have no effect here."
    hint = near_miss(key, groups)
    return unknown_key(key) if not hint else f"{key} is not a key of the configuration.{hint}"


def _compose(overrides: list[str]) -> DictConfig:
    try:
        with initialize_config_dir(str(RECIPES), version_base="1.3"):
            return compose("train", overrides=overrides)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"Cannot compose the recipes: {error}") from error


def _resolved_tree(composed: DictConfig) -> Any:
    """Fill in the schema's defaults and follow every `${...}`."""
    tree = OmegaConf.merge(OmegaConf.create(default_tree(RunConfig)), OmegaConf.to_container(composed))
    try:
        return OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        unresolved = OmegaConf.to_container(tree)
        read_run_config(unresolved)  # a missing value behind a `${...}` is best reported as missing
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
