"""How do the numbers of a run reach wandb, when asked for?

wandb is optional: it is imported when a run turns it on and not before (the import alone takes a second).
A run keeps one wandb id over all its restarts, so that its curve stays one curve.
"""

import importlib
import json
import secrets
from dataclasses import asdict
from pathlib import Path

from nemotron_train.config.schema import RunConfig
from nemotron_train.errors import ConfigError
from nemotron_train.observe.metrics import Record, check_record


class WandbWriter:
    """Logs every record under its step. After a resume wandb keeps the values it already has for repeated steps."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        mode = config.log.wandb.value
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError(
                f"log.wandb={mode} needs the package wandb, which this Python cannot import ({error}). "
                "Install it with `pip install nemotron-train[wandb]` (or `pip install wandb`), or set log.wandb=off."
            ) from error
        self._run = wandb.init(
            project=config.log.wandb_project,
            name=config.run.name,
            id=_run_id(run_dir),
            dir=str(run_dir),
            mode=mode,
            resume="allow" if mode == "online" else None,  # offline runs with one id are joined when they are synced
            config=json.loads(json.dumps(asdict(config))),  # enums as the words that a user writes
        )

    def write(self, record: Record) -> None:
        self._run.log(dict(record), step=check_record(record))

    def event(self, text: str) -> None:
        """wandb's own log already holds what the console shows."""

    def close(self) -> None:
        self._run.finish()


def _run_id(run_dir: Path) -> str:
    """Return the run's wandb id, drawn once and kept beside the run: deleting the folder starts a new wandb run."""
    path = run_dir / "wandb" / "run_id.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()
