"""Which rank does a process take itself for, from what a launcher left in its environment?"""

import pytest

from nemotron_train.errors import ConfigError
from nemotron_train.platform.ranks import LaunchedRank, launched_rank

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SRUN = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "11", "SLURM_LOCALID": "3"}
RENDEZVOUS = {"MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, *SRUN):
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_a_process_is_alone() -> None:
    """Fails if `python -m nemotron_train.train` by itself waits for a rendezvous."""
    me = launched_rank()
    assert me == LaunchedRank(rank=0, world_size=1, local_rank=0)
    assert not me.is_launched


def test_a_rendezvous_without_a_rank_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if MASTER_ADDR, which some clusters export everywhere, makes a lone process wait for others."""
    for name, value in RENDEZVOUS.items():
        monkeypatch.setenv(name, value)
    assert not launched_rank().is_launched


def test_a_launcher_says_which_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the three numbers change places: a rank of the second node has another local rank."""
    for name, value in zip(NAMES, ("11", "16", "3", "node-a", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    me = launched_rank()
    assert (me.rank, me.world_size, me.local_rank) == (11, 16, 3)
    assert me.is_launched


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "sets RANK but not WORLD_SIZE, LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "sets RANK, WORLD_SIZE but not LOCAL_RANK"),
        ({"LOCAL_RANK": "1"}, "sets LOCAL_RANK but not RANK, WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "but not MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **RENDEZVOUS}, "whole numbers.*'one'"),
        ({"RANK": "", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **RENDEZVOUS}, "whole numbers"),
    ],
)
def test_half_a_launch_is_refused(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str) -> None:
    """Fails if left-over variables of another job make a process rank 0 of 1 without a word."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        launched_rank()


def test_a_task_of_srun_says_which_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the tasks of an srun each take themselves for a run of one rank, or two of the numbers change places."""
    for name, value in {**SRUN, **RENDEZVOUS}.items():
        monkeypatch.setenv(name, value)
    me = launched_rank()
    assert (me.rank, me.world_size, me.local_rank, me.is_launched) == (11, 16, 3, True)


def test_a_batch_script_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a command inside an allocation of many tasks, but outside srun, waits for ranks that nobody starts."""
    for name, value in {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16", **RENDEZVOUS}.items():
        monkeypatch.setenv(name, value)
    assert not launched_rank().is_launched
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert not launched_rank().is_launched


def test_torchrun_under_srun_is_torchruns_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if srun's numbers, one task a node, stand in for those of the ranks that torchrun starts in it."""
    for name, value in {**SRUN, **dict(zip(NAMES, ("40", "128", "0", "node-a", "29500"), strict=True))}.items():
        monkeypatch.setenv(name, value)
    me = launched_rank()
    assert (me.rank, me.world_size, me.local_rank) == (40, 128, 0)


def test_srun_without_a_rendezvous_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if sixteen tasks train sixteen runs in one folder, or die in torch without a word on what to set."""
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"16 tasks, but MASTER_ADDR, MASTER_PORT.*pretrain\.sbatch"):
        launched_rank()
