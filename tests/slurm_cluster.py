"""A Slurm cluster of one's own on this machine: daemons on loopback, as root, without systemd, gone when it is closed.

``python tests/slurm_cluster.py [COMMAND …]`` runs a command in one, or else a shell.
"""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("node1", "node2")

_CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
# A requeued job waits for the life of a credential: two minutes, were it not said here. Less than 5 is not taken.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=0
MailProg=/bin/true
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=10
MinJobAge=300
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    lacking = [name for name in (*DAEMONS, "sbatch") if _find(name) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (Debian: slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "Slurm's daemons are started as root"


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Cluster:
    """Commands on a running cluster."""

    def __init__(self, folder: Path):
        self.folder = folder
        here = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        self.environment = {**here, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """What a client command prints; it must succeed."""
        done = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def field(self, job: str, name: str) -> str:
        """One field of ``scontrol show job``."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def ended(self, job: str, within: float = 60) -> str:
        """Wait for a job's end; its state."""
        deadline = time.monotonic() + within
        while (state := self.field(job, "JobState")) in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"):
            assert time.monotonic() < deadline, f"job {job} is still {state}\n{self.logs()}"
            time.sleep(0.2)
        return state

    def logs(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in sorted(self.folder.glob("*.log")))


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster of two nodes, all of it this machine, with two CPUs and two pretended GPUs each."""
    # Not pytest's folder: munged's socket needs a short path, and one that only root may write to.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/var/tmp"))
    processes: list[subprocess.Popen[bytes]] = []
    here = Cluster(folder)

    def start(name: str, *arguments: str) -> None:
        program = _find(name)
        assert program is not None
        processes.append(
            subprocess.Popen(
                [program, *arguments], env=here.environment, start_new_session=True,
                stdout=(folder / f"{name}-out.log").open("ab"), stderr=subprocess.STDOUT,
            )
        )  # fmt: skip

    try:
        folder.chmod(0o755)  # munged refuses a socket that others can't reach
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        ports = _free_ports(1 + len(NODES))
        lines = [
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2 Gres=gpu:2 State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        for gpu in range(2):  # Slurm hands out device files by their numbers; these are /dev/null
            os.mknod(folder / f"gpu{gpu}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        (folder / "slurm.conf").write_text(_CONF.format(folder=folder, ports=ports, nodes="\n".join(lines)))
        start(
            "munged", "--foreground", f"--key-file={key}", f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed",
        )  # fmt: skip
        _until(lambda: (folder / "munge.socket").exists(), here, "munged")
        start("slurmctld", "-D", "-i")
        for node in NODES:
            start("slurmd", "-D", "-N", node)
        _until(lambda: _idle(here) == len(NODES), here, "the nodes")
        yield here
    finally:
        _stop(processes, folder)
        shutil.rmtree(folder, ignore_errors=True)


def _idle(here: Cluster) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--partition=main", "--states=idle", "--format=%N"],
        env=here.environment, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    return len(done.stdout.split())


def _until(holds: Callable[[], bool], here: Cluster, what: str) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come up\n{here.logs()}"
        time.sleep(0.1)


def _stop(processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Kill the daemons and whatever they started: its environment names our folder."""
    for process in processes:
        process.kill()
    marker = f"SLURM_CONF={folder}/slurm.conf".encode()
    for each in Path("/proc").glob("[0-9]*"):
        try:
            if marker in (each / "environ").read_bytes().split(b"\0") and int(each.name) != os.getpid():
                os.kill(int(each.name), signal.SIGKILL)
        except OSError:
            continue  # it has ended meanwhile
    for process in processes:
        process.wait()


if __name__ == "__main__":
    with cluster() as made:
        sys.exit(subprocess.call(sys.argv[1:] or ["bash"], env=made.environment))
