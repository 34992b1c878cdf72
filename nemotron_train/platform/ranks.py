"""Which process of the launch this is: the only reader of the environment variables that torchrun and Slurm's launcher
set."""

import os
from dataclasses import dataclass

from nemotron_train.errors import ConfigError


@dataclass(frozen=True)
class LaunchedRank:
    """This process among all processes of the run; alone it is rank 0 of 1."""

    rank: int
    world_size: int
    local_rank: int  # index of this process, and of its GPU, on its node

    @property
    def is_launched(self) -> bool:
        """Whether a launcher started this process and serves a rendezvous (MASTER_ADDR and MASTER_PORT)."""
        return "MASTER_ADDR" in os.environ


def launched_rank() -> LaunchedRank:
    """Read this process's place from the environment; without a launcher the process is a run of one rank.

    Raises:
        ConfigError: only some of RANK, WORLD_SIZE and LOCAL_RANK are set, or one is not a number.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found:
        return LaunchedRank(rank=0, world_size=1, local_rank=0)
    missing = [name for name in names if name not in found]
    if missing:
        raise ConfigError(
            f"The environment sets {', '.join(found)} but not {', '.join(missing)}. Start with torchrun, or unset them."
        )
    try:
        return LaunchedRank(
            rank=int(found["RANK"]), world_size=int(found["WORLD_SIZE"]), local_rank=int(found["LOCAL_RANK"])
        )
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers, not {found}.") from error
