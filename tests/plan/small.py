"""Configurations for the tests of `plan/`: the quickstart with overrides."""

import copy
import functools
from typing import Any

import yaml

from nemotron_train.config.keys import plain
from nemotron_train.config.load import load_config
from nemotron_train.config.schema import RunConfig
from nemotron_train.config.typed import read_run_config
from nemotron_train.plan.run_plan import RunPlan, plan_run


def plan_of(*overrides: str, world_size: int = 1) -> RunPlan:
    """Plan a run as the command line would, groups included."""
    return plan_run(load_config(["experiment=quickstart", *overrides]), world_size)


def config_with(*changes: str) -> RunConfig:
    """Return the quickstart with `key=value` changes (values in YAML, list elements as `data.phases.0.weights`)."""
    tree = copy.deepcopy(_quickstart())
    for change in changes:
        key, _, value = change.partition("=")
        *path, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
        functools.reduce(lambda node, part: node[part], path, tree)[last] = yaml.safe_load(value)
    return read_run_config(tree)


@functools.cache
def _quickstart() -> Any:
    return plain(load_config(["experiment=quickstart"]))
