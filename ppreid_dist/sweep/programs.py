"""The programs that a trial starts, under its claim: train.py by `accelerate launch`, and those of `ppreid`."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ppreid_dist.errors import Stopped
from ppreid_dist.sweep.claims import Claim

# Else the launcher believes the user's own default file: its GPUs, whatever CUDA_VISIBLE_DEVICES says, and its engine.
PLAIN = Path(__file__).with_name("plain.yaml")
TRIES = 2  # a process that was killed, or a node's hiccup, must not cost a trial


def launch_options(processes: int, file: str = str(PLAIN)) -> list[str]:
    """Of `accelerate launch`, for so many processes on this machine, at a port that is free."""
    several = ["--multi_gpu"] if processes > 1 else []
    return ["--config_file", file, *several, "--num_processes", str(processes), "--main_process_port", "0"]


class TrialFailed(Exception):
    """A trial can't be finished; the message is its row's reason."""


@dataclass(frozen=True)
class Programs:
    """What is started, before the arguments. Tests put stand-ins in their place."""

    launch: tuple[str, ...] = (sys.executable, "-m", "accelerate.commands.launch")
    ppreid: tuple[str, ...] = (sys.executable, "-c", "from ppreid_dist.cli import main; main()")

    def train(self, processes: int, arguments: list[str]) -> list[str]:
        return [*self.launch, *launch_options(processes), "train.py", *arguments]

    def store(self, arguments: list[str]) -> list[str]:
        return [*self.ppreid, "store", *arguments]

    def attack(self, arguments: list[str]) -> list[str]:
        return [*self.ppreid, "attack", *arguments]


def carry_out(
    command: list[str],
    done: Path,
    *,
    what: str,
    claim: Claim,
    environment: Mapping[str, str],
    log: Path,
    look: Callable[[], None] = lambda: None,
) -> None:
    """Run ``command`` until the file ``done`` is there, and again where it fails before; call ``look`` meanwhile.

    TrialFailed with what it said last. Stopped if the claim was lost.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(TRIES):
        with log.open("ab") as out:
            began = out.tell()
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the sweep, which tells it to save
            )  # fmt: skip
            while process.poll() is None:
                look()
                time.sleep(0.2)
        if process.returncode == 0 and done.exists():
            return
        if claim.outdone():
            raise Stopped(f"{what}: another process took it over")
    raise TrialFailed(f"{what}: {last_words(log, began) or f'ended by status {process.returncode}'}")


def last_words(log: Path, began: int) -> str:
    """The last line of error since ``began``, or else the last line."""
    with log.open("rb") as file:
        file.seek(began)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1][:300]
