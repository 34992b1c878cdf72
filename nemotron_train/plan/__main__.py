"""`python -m nemotron_train.plan experiment=NAME world_size=N key=value ...`: what a run would be.

Composes, checks and computes as the train command does, on any machine and in a second or two. Loads no torch. Own
arguments, as `name=value`, `--name=value` or `--name value`:

    world_size=N            ranks; not given: as many as hold the model once
    format=text|json
    gpu=h200|h100|FILE.json what memory and times are for; a file is a table of --probe
    price_per_gpu_hour=X    adds what the run costs
    --png FILE              learning rate, batch and blend over the tokens of the run, as a picture
    --search                layouts that fit, fastest first, and why the others do not
    --explain KEY           what a key does, and what a neighbouring value would change in this run
    --probe [FILE]          measures this machine's GPUs instead, in a minute or two, and writes a table for gpu=FILE
                            (gpu.json); starts `python -m nemotron_train.probe`, which needs torch and a GPU
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nemotron_train.config.load import load_config
from nemotron_train.config.schema import RunConfig
from nemotron_train.errors import EXIT_FAILED, ConfigError
from nemotron_train.plan.explain import explain
from nemotron_train.plan.layout import ranks_per_replica
from nemotron_train.plan.measured import choose_gpu
from nemotron_train.plan.report import Machine, report, report_json
from nemotron_train.plan.run_plan import RunPlan, plan_run
from nemotron_train.plan.search import describe_search, search_json, search_layouts

FORMATS = ("text", "json")
VALUES = ("world_size", "format", "gpu", "price_per_gpu_hour", "png", "explain")
FLAGS = ("search",)
WITHOUT_EFFECT = {  # what another answer than the plan's takes no notice of
    "explain": ("search", "png", "format"),
    "search": ("png", "price_per_gpu_hour"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the answer to standard output, or what is wrong to standard error; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if any(argument.partition("=")[0] == "--probe" for argument in arguments):
            return _probe(arguments)
        own, overrides = _split(arguments)
        sys.stdout.write(_answer(own, overrides) + "\n")
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    return 0


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Part this command's own arguments from those of the configuration."""
    own: dict[str, str] = {}
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        if key in FLAGS and not equals:
            own[key] = "true"
        elif key in VALUES and equals:
            own[key] = value
        elif key in VALUES and argument.startswith("--"):
            if not rest:
                raise ConfigError(f"{argument} needs a value.")
            own[key] = rest.pop(0)
        else:
            overrides.append(argument)
    return own, overrides


def _answer(own: dict[str, str], overrides: list[str]) -> str:
    for asked, others in WITHOUT_EFFECT.items():
        ignored = [other for other in others if other in own]
        if asked in own and ignored:
            raise ConfigError(f"{' and '.join(ignored)} would have no effect on {asked}'s answer. Ask for one of them.")
    as_json = _choice(own, "format", FORMATS) == "json"
    config = load_config(overrides)
    machine, world_size = _machine(own), _world_size(own, config)
    if "explain" in own:
        return explain(own["explain"], config, world_size, machine, overrides)
    if "search" in own:
        found = search_layouts(config, world_size, machine.gpu)
        return json.dumps(search_json(found), indent=2) if as_json else describe_search(found)
    plan = plan_run(config, world_size)
    if "png" in own:
        _draw(plan, own["png"])
    return json.dumps(report_json(plan, machine), indent=2) if as_json else report(plan, machine)


def _probe(arguments: Sequence[str]) -> int:
    """Measure in another process: what does it stands above the planner, which does without torch."""
    first, *rest = arguments
    file = first.partition("=")[2] or (rest.pop(0) if rest else "gpu.json")
    if not first.startswith("--probe") or rest or not file.endswith(".json"):
        raise ConfigError(
            "--probe [FILE.json] stands alone: it measures the GPU on the layers of Nemotron Nano 12B v2, whatever run "
            "is planned afterwards with gpu=FILE.json."
        )
    return subprocess.run([sys.executable, "-m", "nemotron_train.probe", file], check=False).returncode


def _draw(plan: RunPlan, file: str) -> None:
    from nemotron_train.plan import picture  # loads matplotlib, which takes longer than all the rest

    try:
        picture.draw_plan(plan, Path(file))
    except OSError as error:
        raise ConfigError(f"png={file} cannot be written: {error}") from error


def _choice(own: dict[str, str], key: str, choices: Sequence[str]) -> str:
    chosen = own.get(key, choices[0])
    if chosen not in choices:
        raise ConfigError(f"{key}={chosen} is not one of {', '.join(choices)}.")
    return chosen


def _world_size(own: dict[str, str], config: RunConfig) -> int:
    if "world_size" not in own:
        return max(1, ranks_per_replica(config.parallel))  # sizes below 1 are named by the rules
    text = own["world_size"]
    if not text.isdecimal():
        raise ConfigError(f"world_size={text} is not a number of ranks, e.g. world_size=8.")
    return int(text)


def _machine(own: dict[str, str]) -> Machine:
    gpu, text = choose_gpu(own.get("gpu", "h200")), own.get("price_per_gpu_hour")
    try:
        price = None if text is None else float(text)
    except ValueError:
        raise ConfigError(f"price_per_gpu_hour={text} is not a number, e.g. price_per_gpu_hour=2.5.") from None
    if price is not None and not 0.0 <= price < float("inf"):
        raise ConfigError(f"price_per_gpu_hour={text}: choose 0 or more, e.g. price_per_gpu_hour=2.5.")
    return Machine(gpu, price)


if __name__ == "__main__":
    sys.exit(main())
