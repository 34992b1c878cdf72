"""Which run do the arguments of a tool mean? The same as `nemotron_train.plan` and training would take them for."""

from collections.abc import Sequence

from nemotron_train.config.load import load_config
from nemotron_train.config.schema import RunConfig
from nemotron_train.plan.layout import ranks_per_replica
from nemotron_train.plan.rules import check_rules


def load_experiment(overrides: Sequence[str]) -> RunConfig:
    """Load `experiment=NAME key=value ...`.

    Raises:
        ConfigError: a key is unknown or its value out of range, or keys do not go together on any number of ranks.
    """
    config = load_config(overrides)
    check_rules(config, max(1, ranks_per_replica(config.parallel)))  # sizes below 1 are named by the rules
    return config
