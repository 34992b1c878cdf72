"""`python -m nemotron_train.plan experiment=NAME world_size=N key=value ... [format=json]`: what a run would be.

Composes, checks and computes as the train command does, on any machine and in a second or two. Loads no torch.
"""

import json
import sys
from collections.abc import Sequence

from nemotron_train.config.load import load_config
from nemotron_train.errors import EXIT_FAILED, ConfigError
from nemotron_train.plan.describe import describe, summarize
from nemotron_train.plan.run_plan import RunPlan, plan_run

FORMATS = ("text", "json")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the plan to standard output, or what is wrong to standard error; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        own, overrides = _split(arguments)
        plan = plan_run(load_config(overrides), _world_size(own.get("world_size", "1")))
        sys.stdout.write(_render(plan, own.get("format", "text")) + "\n")
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    return 0


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Part this command's own keys from those of the configuration."""
    own: dict[str, str] = {}
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("world_size", "format"):
            own[key] = value
        else:
            overrides.append(argument)
    return own, overrides


def _world_size(text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"world_size={text} is not a number of ranks, e.g. world_size=8.")
    return int(text)


def _render(plan: RunPlan, form: str) -> str:
    if form not in FORMATS:
        raise ConfigError(f"format={form} is not one of {', '.join(FORMATS)}.")
    return json.dumps(summarize(plan), indent=2) if form == "json" else describe(plan)


if __name__ == "__main__":
    sys.exit(main())
