"""Which process of the launch this is: the only reader of the environment variables that torchrun and Slurm's srun
set."""

import os
from dataclasses import dataclass

from nemotron_train.errors import ConfigError

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")
# Only the tasks of an srun have the first of these; a batch script has the other two as well, and is no rank.
SLURM_PLACE = {"WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID"}


@dataclass(frozen=True)
class LaunchedRank:
    """This process among all processes of the run; alone it is rank 0 of 1."""

    rank: int
    world_size: int
    local_rank: int  # index of this process, and of its GPU, on its node
    is_launched: bool = False  # by a launcher that names a rendezvous at MASTER_ADDR, MASTER_PORT


def launched_rank() -> LaunchedRank:
    """Read this process's place from the environment: torchrun's variables, else srun's; without a launcher the process
    is a run of one rank.

    Raises:
        ConfigError: only some of RANK, WORLD_SIZE, LOCAL_RANK and the rendezvous are set, one is not a number, or srun
        started several tasks and nothing says where they meet.
    """
    names = (*PLACE, *RENDEZVOUS)
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found.keys() & set(PLACE):
        found |= _srun_place()
    if not found.keys() & set(PLACE):
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


def _srun_place() -> dict[str, str]:
    """Return this task's place as torchrun would name it; nothing outside srun, and for an srun of one task."""
    num_tasks = os.environ.get(SLURM_PLACE["WORLD_SIZE"], "1")
    if num_tasks == "1":
        return {}
    missing = [name for name in RENDEZVOUS if name not in os.environ]
    if missing:
        raise ConfigError(
            f"srun started {num_tasks} tasks, but {', '.join(missing)} does not say where they meet. Start with "
            "launch/slurm/pretrain.sbatch, export both before srun, or unset SLURM_STEP_NUM_TASKS for a run of its own."
        )
    return {name: os.environ[theirs] for name, theirs in SLURM_PLACE.items() if theirs in os.environ}
