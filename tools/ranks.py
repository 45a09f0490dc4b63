"""The processes of one training, without a launcher: a script once a rank, as a cluster's scheduler starts it.

For tests and tools that start many tiny trainings. To import torch and transformers takes a process six seconds, so
ranks are forked from a process that has imported them and done nothing else; what they run is the script, to its end.
"""

import contextlib
import faulthandler
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_TICK = 0.005  # seconds between two looks at what has ended


class Rank:
    """A process; what it says goes into a file, its exit status into another one when it has ended."""

    def __init__(self, folder: Path, job: dict[str, Any]):
        self._said, self._status = folder / "said", folder / "status"
        self.pid = _server().start({**job, "said": str(self._said), "status": str(self._status)})

    def poll(self) -> int | None:
        """The exit status, negative for a signal as subprocess has it; None while it runs."""
        text = self._status.read_text() if self._status.exists() else ""
        return int(text) if text else None

    def wait(self, timeout: float) -> int:
        """Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout, output=self.said())
            time.sleep(_TICK)
        return status

    def said(self) -> str:
        """Standard output and errors so far."""
        return self._said.read_text() if self._said.exists() else ""

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_ranks(
    processes: int,
    *arguments: str,
    script: str = "train.py",
    environment: dict[str, str] | None = None,
    first_writes_at_most: int | None = None,
) -> list[Rank]:
    """Start ``script`` of the repository in ``processes`` ranks of one thread each, which meet on this machine.

    ``first_writes_at_most``: the bytes of the largest file that the first may write, as on a full disk.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    several = {**os.environ, "OMP_NUM_THREADS": "1", **common, **(environment or {})}
    return [
        Rank(
            Path(tempfile.mkdtemp(dir=_server().folder)),
            {
                "script": str(ROOT / script),
                "arguments": arguments,
                "environment": {**several, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                "writes_at_most": first_writes_at_most if rank == 0 else None,
            },
        )
        for rank in range(processes)
    ]


def finish(ranks: Sequence[Rank], timeout: float = 120) -> list[tuple[int, str]]:
    """Exit status and output of every rank. Where one doesn't end in time: subprocess.TimeoutExpired, all killed, and
    on standard error what each had said and where it was."""
    deadline = time.monotonic() + timeout
    try:
        return [(rank.wait(deadline - time.monotonic()), rank.said()) for rank in ranks]
    except subprocess.TimeoutExpired:
        for rank in ranks:
            rank.send_signal(signal.SIGABRT)  # faulthandler writes the stacks
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(5)
            print(f"process {rank.pid}:\n{rank.said()}", file=sys.stderr)
        raise
    finally:
        for rank in ranks:
            rank.kill()


class _Server:
    """The process that ranks are forked from. It ends with this one, and so do they."""

    def __init__(self) -> None:
        self.keep = tempfile.TemporaryDirectory(prefix="ranks-")
        self.folder = Path(self.keep.name)
        # Were CUDA begun before the fork, it would be of no use after it.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, job: dict[str, Any]) -> int:
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())  # type: ignore[union-attr]


@cache
def _server() -> _Server:
    return _Server()


def _serve() -> dict[str, Any] | None:
    """Fork for every line of standard input. Returns the job in a forked process; None at the end, in this one."""
    running: dict[int, Path] = {}
    while True:
        if select.select([sys.stdin], [], [], _TICK)[0]:
            if not (line := sys.stdin.readline()):
                for pid in running:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                return None
            job: dict[str, Any] = json.loads(line)
            if (pid := os.fork()) == 0:
                return job
            running[pid] = Path(job["status"])
            print(pid, flush=True)
        for pid, file in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                file.write_text(str(os.waitstatus_to_exitcode(status)))
                del running[pid]


def _become(job: dict[str, Any]) -> None:
    """Run the job's script in this process as if it had been started for it."""
    with open(job["said"], "wb") as said, open(os.devnull, "rb") as nothing:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        os.dup2(nothing.fileno(), 0)
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(job["environment"])
    if (most := job["writes_at_most"]) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    sys.argv = [job["script"], *job["arguments"]]
    sys.path[0] = str(Path(job["script"]).parent)
    runpy.run_path(job["script"], run_name="__main__")


def _import() -> None:
    with contextlib.redirect_stdout(sys.stderr):  # the other one is for answers
        for name in ("ppreid_dist.experiment", "transformers.models.resnet.modeling_resnet"):
            import_module(name)
        if find_spec("deepspeed"):
            import_module("deepspeed")


if __name__ == "__main__":
    _import()
    if (mine := _serve()) is not None:
        _become(mine)
