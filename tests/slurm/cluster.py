"""A little Slurm cluster on this machine: the real slurmctld and two slurmd, in a temporary folder, without root, an
init system or real nodes. Every process it starts is ended by its id."""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from getpass import getuser
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
SYSTEM_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
NODES = ("n1", "n2")
# Seconds a credential is good for; a requeued job waits so long until it may start (Slurm's default is 120).
CREDENTIAL_SECONDS = 5

CONFIGURATION = """
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={credential_seconds}
SlurmctldParameters=enable_configless
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,sched_interval=2
ReturnToService=2
KillWait=30
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=n1,n2 Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 State=UP PriorityTier=9
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]


@dataclass
class Cluster:
    folder: Path
    daemons: list[subprocess.Popen] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """For commands of Slurm, and through sbatch for jobs: nothing that a launcher around the tests may have set."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "MASTER_", "PYTEST_"))}
        return {**kept, "PATH": SYSTEM_PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def command(self, *words: str, **extra: str) -> str:
        """Run a command of Slurm from the repository; `extra` goes into its environment."""
        done = subprocess.run(
            words, env={**self.environment, **extra}, cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def submit(self, *words: str, **extra: str) -> str:
        """Return the number of the job that `sbatch words` makes."""
        return self.command("sbatch", "--parsable", *words, **extra).strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, by key."""
        words = self.command("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def states(self, number: str) -> set[str]:
        """The states of a job, or of all tasks of an array."""
        return set(self.command("squeue", "--noheader", "--states=all", f"--jobs={number}", "--format=%T").split())

    def start(self, name: str, *words: str) -> None:
        program = shutil.which(words[0], path=SYSTEM_PATH)
        assert program is not None
        with (self.folder / f"{name}.log").open("wb") as log:
            self.daemons.append(
                subprocess.Popen(
                    [program, *words[1:]], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            )

    def logs(self) -> str:
        """The end of what each daemon said, for the message of a failed test."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.log")))

    def left_over(self) -> list[int]:
        """Processes of jobs that outlived their daemons: they belong to no group of ours, but have our environment."""
        mark = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def end_jobs(self) -> None:
        """Cancel all jobs and wait for their processes to end."""
        self.command("scancel", f"--user={getuser()}")
        self.command("scancel", "--signal=KILL", "--full", f"--user={getuser()}")
        wait_until(lambda: not self.command("squeue", "--noheader").strip(), 60, lambda: "jobs do not end")

    def stop(self) -> None:
        """End all jobs, the daemons, the last started first, and what they have left."""
        with suppress(AssertionError, subprocess.TimeoutExpired):
            self.end_jobs()
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self.left_over():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@contextmanager
def little_cluster() -> Iterator[Cluster]:
    """Two nodes of two CPUs each, ready for jobs."""
    folder = Path(tempfile.mkdtemp(prefix="slurm_"))  # short: the path of a socket has at most 107 characters
    cluster = Cluster(folder)
    try:
        _configure(folder)
        cluster.start("munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket",
            f"--key-file={folder}/munge.key", f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munge_own.log",
            f"--seed-file={folder}/munge.seed")  # fmt: skip
        wait_until(lambda: (folder / "munge.socket").exists(), 20, cluster.logs)
        cluster.start("slurmctld", "slurmctld", "-D", "-f", f"{folder}/slurm.conf")
        for node in NODES:
            cluster.start(f"slurmd.{node}", "slurmd", "-D", "-N", node, "-f", f"{folder}/slurm.conf")
        wait_until(lambda: _idle_nodes(cluster) == len(NODES), 30, cluster.logs)
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path) -> None:
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    text = CONFIGURATION.format(
        host=socket.gethostname().split(".")[0],
        user=getuser(),
        folder=folder,
        ports=free_ports(3),
        credential_seconds=CREDENTIAL_SECONDS,
    )
    (folder / "slurm.conf").write_text(text)


def _idle_nodes(cluster: Cluster) -> int:
    try:
        lines = cluster.command("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        return len({line for line in lines if line.endswith(" idle")})  # a node stands there once a partition
    except AssertionError:  # slurmctld does not answer yet
        return 0


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def wait_until(is_true: Callable[[], object], seconds: float, explain: Callable[[], str]) -> None:
    """Fail with `explain()` if something does not become true in time."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"not within {seconds} s\n{explain()}"
        time.sleep(0.2)


def read_lines(path: Path) -> Sequence[dict]:
    """The whole lines of a JSONL file that may be being written."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return records
