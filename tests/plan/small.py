"""Configurations for the tests of `plan/`: the quickstart with overrides."""

from nemotron_train.config.load import load_config
from nemotron_train.plan.run_plan import RunPlan, plan_run


def plan_of(*overrides: str, world_size: int = 1) -> RunPlan:
    return plan_run(load_config(["experiment=quickstart", *overrides]), world_size)
