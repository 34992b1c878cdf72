"""Do the scripts say what the code says, and is what their pages name there?"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from nemotron_train.errors import EXIT_REQUEUE

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("slurm/*")])
PAGES = [LAUNCH / "README.md", REPOSITORY / "docker" / "README.md"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_can_be_read_by_bash(script: Path) -> None:
    """Fails if a quote is missing in a branch that no test takes."""
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", ["ranks.sh", "slurm/requeue.sh"])
def test_the_code_that_asks_to_go_on_is_the_trainers(script: str) -> None:
    """Fails if a script takes another exit code for "stopped, go on" than the trainer leaves."""
    (code,) = re.findall(r"^go_on=(\d+)", (LAUNCH / script).read_text(), re.MULTILINE)
    assert int(code) == EXIT_REQUEUE


def test_what_a_user_exported_wins_over_env_sh() -> None:
    """Fails if env.sh overrules somebody's choice, or sets a variable without a reason above it."""
    text = (LAUNCH / "env.sh").read_text()
    names = re.findall(r"^export (\w+)=", text, re.MULTILINE)
    assert len(names) >= 5
    mine = {**os.environ, **{name: f"my own {name}" for name in names}}
    show = f"source {LAUNCH / 'env.sh'}; " + "; ".join(f'echo "${name}"' for name in names)
    printed = subprocess.run(["bash", "-c", show], env=mine, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [f"my own {name}" for name in names]
    for block in text.split("\n\n"):
        if "export" in block:
            assert block.startswith("#"), block


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.parent.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    """Fails if a file that the page links to, or a script in one of its commands, was moved."""
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for path in re.findall(r"\b((?:launch|docker|tests)/[\w/.]+\w)", text):
        assert (REPOSITORY / path).exists(), path
