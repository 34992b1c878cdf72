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
    is_launched: bool = False  # by a launcher that serves a rendezvous at MASTER_ADDR, MASTER_PORT


def launched_rank() -> LaunchedRank:
    """Read this process's place from the environment; without a launcher the process is a run of one rank.

    Raises:
        ConfigError: only some of RANK, WORLD_SIZE and LOCAL_RANK are set, or one is not a number.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
        return LaunchedRank(rank=0, world_size=1, local_rank=0)
    missing = [name for name in names if name not in found]
    if missing:
        raise ConfigError(
            f"The environment sets {', '.join(found)} but not {', '.join(missing)}. Start with torchrun, or unset them."
        )
    try:
        rank, world_size, local_rank = (int(found[name]) for name in names[:3])
        return LaunchedRank(rank=rank, world_size=world_size, local_rank=local_rank, is_launched=True)
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers, not {found}.") from error
