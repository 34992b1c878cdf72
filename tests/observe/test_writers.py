"""All places a run writes to get the same records, and wandb is needed only where it is asked for."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from nemotron_train.config.schema import LogSection, RunConfig, RunSection, WandbMode
from nemotron_train.errors import ConfigError
from nemotron_train.observe.writers import build_writers


def config_of(run_dir: Path, mode: WandbMode = WandbMode.off) -> RunConfig:
    return replace(RunConfig(), run=RunSection(name="small", dir=str(run_dir)), log=LogSection(wandb=mode))


def test_one_record_reaches_every_writer(tmp_path: Path) -> None:
    """Fails if a writer is left out."""
    output = io.StringIO()
    writers = build_writers(config_of(tmp_path), num_steps=2, resume_step=0, console=Console(file=output))
    writers.event("resumed from step 0")
    writers.write({"step": 1, "loss": 2.5})
    writers.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.5}
    assert output.getvalue().splitlines() == ["resumed from step 0", "step 1/2 | loss 2.5000"]


def test_an_unknown_name_reaches_no_writer(tmp_path: Path) -> None:
    """Fails if a part of the writers has taken a record that the table does not explain."""
    output = io.StringIO()
    writers = build_writers(config_of(tmp_path), num_steps=2, resume_step=0, console=Console(file=output))
    with pytest.raises(ValueError, match="'lss' is not a metric"):
        writers.write({"step": 1, "lss": 2.5})
    writers.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert output.getvalue() == ""


def test_wandb_is_not_imported_unless_asked_for() -> None:
    """Fails if a run without wandb needs the package or pays for its import."""
    code = "import sys, nemotron_train.observe.writers; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_wandb_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a user without wandb gets a traceback, or is not told what to install and which key turns it off."""
    monkeypatch.setitem(sys.modules, "wandb", None)  # what an import of a missing package does
    with pytest.raises(ConfigError, match=r"log\.wandb=offline needs .*pip install .*log\.wandb=off"):
        build_writers(config_of(tmp_path, WandbMode.offline), num_steps=1, resume_step=0)


LOG_TWICE = """
import io, sys
from rich.console import Console
from pathlib import Path
from nemotron_train.observe.writers import build_writers
from nemotron_train.config.schema import WandbMode
from tests.observe.test_writers import config_of
for attempt in range(2):
    config = config_of(Path(sys.argv[1]), WandbMode.offline)
    writers = build_writers(config, num_steps=2, resume_step=attempt, console=Console(file=io.StringIO()))
    writers.write({"step": attempt + 1, "learning_rate": 2.5})
    writers.close()
"""


def test_an_offline_run_is_one_wandb_run_over_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if offline logging needs a network or an account, or a restart gets another wandb id."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # In a process of its own: wandb's service writes the file until the process that started it ends.
    subprocess.run([sys.executable, "-c", LOG_TWICE, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
    run_id = (tmp_path / "wandb" / "run_id.txt").read_text().strip()
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{run_id}.wandb"}
    assert all(b"learning_rate" in file.read_bytes() for file in files)
