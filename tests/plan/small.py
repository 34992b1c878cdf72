"""Configurations for the tests of `plan/`: the quickstart with numbers of its own, so that tuning it breaks no test."""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import yaml

from nemotron_train.config.keys import plain
from nemotron_train.config.load import load_config
from nemotron_train.config.schema import RunConfig
from nemotron_train.config.typed import read_run_config
from nemotron_train.plan.run_plan import RunPlan, plan_run

FIXED = (
    "experiment=quickstart",
    "model.hidden_size=160",
    "model.ffn_hidden_size=480",
    "model.attention_head_dim=40",
    "model.mamba_num_heads=10",
    "model.mamba_chunk_size=64",
    "lr.peak=3e-3",
    "lr.min=3e-5",
    "lr.decay_tokens=491_520",
    "train.train_tokens=2_457_600",
)


def plan_of(*overrides: str, world_size: int = 1) -> RunPlan:
    """Plan a run as the command line would, groups included."""
    return plan_run(load_config(["experiment=quickstart", *overrides]), world_size)


def config_with(*changes: str) -> RunConfig:
    """Return that run with `key=value` changes (values in YAML, list elements as `data.phases.0.weights`)."""
    return _changed(_small_run(), changes)


def experiment_with(experiment: str, *changes: str) -> RunConfig:
    """Return an experiment with such changes; Hydra composes each experiment once, which takes most of the time."""
    return _changed(_experiment(experiment), changes)


def _changed(run: Any, changes: Sequence[str]) -> RunConfig:
    tree = copy.deepcopy(run)
    for change in changes:
        key, _, value = change.partition("=")
        *path, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
        functools.reduce(lambda node, part: node[part], path, tree)[last] = yaml.safe_load(value)
    return read_run_config(tree)


@functools.cache
def _small_run() -> Any:
    return plain(load_config(list(FIXED)))


@functools.cache
def _experiment(name: str) -> Any:
    return plain(load_config([f"experiment={name}"]))
