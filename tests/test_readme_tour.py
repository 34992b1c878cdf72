"""What README shows exists and works: every link, every command's arguments."""

import re
import shlex
from pathlib import Path

import pytest

from data_tools.__main__ import main as data_tools
from nemotron_train.config.load import load_config
from nemotron_train.convert.__main__ import main as convert
from nemotron_train.generate.__main__ import main as generate
from nemotron_train.plan.__main__ import main as plan_command
from nemotron_train.plan.run_plan import plan_run

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for line in README.splitlines()
    if re.match(r"    (bash|python|torchrun|RANKS=\d+) ", line)
]


def test_every_link_leads_somewhere() -> None:
    """Fails if a file that README or the design links to was moved."""
    for page in (REPOSITORY / "README.md", REPOSITORY / "docs" / "design.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def trained(command: str) -> tuple[list[str], int] | None:
    """The overrides and the number of ranks of a command that trains; None for other commands."""
    words = shlex.split(command)
    overrides = [word for word in words if "=" in word and not word.startswith("RANKS=")]
    if "quickstart.sh" in command:
        ranks = int(words[0].removeprefix("RANKS=")) if words[0].startswith("RANKS=") else 2
        micro_batch = [f"train.micro_batch_size={16 // ranks}"] if ranks > 2 else []
        return ["experiment=quickstart", *micro_batch, *overrides], ranks
    if "nemotron_train.train" in command:
        counts = re.findall(r"--nproc-per-node (\d+)", command)
        return overrides, int(counts[0]) if counts else 1
    return None


@pytest.mark.parametrize("command", [command for command in COMMANDS if trained(command)])
def test_every_run_that_readme_shows_can_be_planned(command: str) -> None:
    """Fails if an override is misspelled, or does not fit the number of ranks shown beside it."""
    run = trained(command)
    assert run is not None
    overrides, world_size = run
    assert plan_run(load_config(overrides), world_size).num_steps > 0


@pytest.mark.parametrize("command", [c for c in COMMANDS if "nemotron_train.plan" in c and "--probe" not in c])
def test_every_plan_that_readme_shows_is_printed(command: str, tmp_path: Path) -> None:
    """Fails if an argument of the planner was renamed, or an experiment no longer fits the ranks shown beside it."""
    table = Path(__file__).parents[1] / "nemotron_train/plan/tables/h200.json"  # stands for a probed one
    words = [f"gpu={table}" if word == "gpu=gpu.json" else word for word in shlex.split(command)]
    assert plan_command([str(tmp_path / word) if word.endswith(".png") else word for word in words[3:]]) == 0


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(r"nemotron_train\.(convert|generate)", c)])
def test_every_conversion_that_readme_shows_takes_its_arguments(command: str, tmp_path: Path) -> None:
    """Fails if a command or one of its options was renamed (its input does not exist here, which is another error)."""
    words = shlex.split(command)
    arguments = [str(tmp_path / word) if "/" in word or word == "exported" else word for word in words[3:]]
    assert (generate if "generate" in command else convert)(arguments) == 1


@pytest.mark.parametrize("command", [command for command in COMMANDS if "data_tools" in command])
def test_every_data_tool_that_readme_shows_takes_its_arguments(command: str, tmp_path: Path) -> None:
    """Fails if a tool or one of its options was renamed (its input does not exist here, which is another error)."""
    words = shlex.split(command)
    arguments = [str(tmp_path / word) if "/" in word or word.endswith(".jsonl") else word for word in words[3:]]
    assert data_tools(arguments) == 1


def test_the_quickstart_divides_among_every_number_of_ranks_it_chooses() -> None:
    """Fails if quickstart.sh picks a number of GPUs that its step does not divide among."""
    for ranks in (1, 2, 4, 8):
        micro_batch = [f"train.micro_batch_size={16 // ranks}"] if ranks > 2 else []
        plan_run(load_config(["experiment=quickstart", *micro_batch]), ranks)
