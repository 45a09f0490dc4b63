"""Processes that must not outlive their owner, however it ends; SIGKILL leaves it no time to say so.

Everything that an owner starts under a claim has the claim's file in its environment, and a guard, a small process that
is nobody's child, keeps the claim's heart beating. When the owner has gone, it tells those processes to stop (a
training saves its state at the end of its step), waits, kills what is left, and gives the claim back. So whoever takes
the claim next never meets a process of the one before.

    python -m ppreid_dist.sweep.guard CLAIM_FILE OWNER_PID OWNER_START

Standard library only, as in :mod:`ppreid_dist.sweep.claims`.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ppreid_dist.sweep.claims import BEAT, Claim

MARK = "PPREID_CLAIM"
GRACE = 60.0  # seconds that a training has to end its step and save
_LAUNCHER = b"accelerate.commands.launch"  # told to stop, it would kill its processes while they save


@contextmanager
def guarded(claim: Claim) -> Iterator[dict[str, str]]:
    """Hold ``claim``; yields the environment for what is started under it. At the end all of that ends, and the claim
    is given back."""
    pid = os.getpid()
    guard = [sys.executable, "-m", "ppreid_dist.sweep.guard", str(claim.file), str(pid), _started(pid)]
    nowhere = subprocess.DEVNULL
    subprocess.run(guard, check=True, stdin=nowhere, stdout=nowhere, stderr=nowhere)
    try:
        yield {**os.environ, MARK: str(claim.file)}
    finally:
        end(str(claim.file))
        claim.give_back()


def end(mark: str, grace: float = GRACE) -> None:
    """Tell all processes with this mark to stop, wait, and kill those that are left after ``grace`` seconds."""
    told: set[int] = set()
    deadline = time.monotonic() + grace
    while pids := marked(mark) or _born(mark):
        late = time.monotonic() > deadline
        for pid in pids if late else pids - told:
            if late or not _is_launcher(pid):
                _signal(pid, signal.SIGKILL if late else signal.SIGTERM)
        told |= pids
        time.sleep(0.1)


def marked(mark: str) -> set[int]:
    """The live processes of this machine that were started with this mark."""
    wanted = f"{MARK}={mark}".encode()
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
        except OSError:
            continue  # it has ended, or is another user's
    return found - {os.getpid()}


def _born(mark: str) -> set[int]:
    """A second look: a process that is just being started has no environment for a moment."""
    time.sleep(0.05)
    return marked(mark)


def _is_launcher(pid: int) -> bool:
    try:
        return _LAUNCHER in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks: a number is used again, this isn't. Empty if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def main(claim: Claim, owner: int, started: str) -> None:
    """Beat until the owner has gone or gave the claim back."""
    beaten = 0.0
    try:
        while _started(owner) == started:
            try:
                if claim.given_back():
                    return
                if time.monotonic() - beaten > BEAT:
                    if not claim.beat():
                        break
                    beaten = time.monotonic()
            except FileNotFoundError:
                raise
            except OSError:
                pass  # of a network's file system it passes, and without its guard the claim would soon be another's
            time.sleep(0.5)
        end(str(claim.file))
        claim.give_back()
    except FileNotFoundError:  # somebody removed the sweep
        end(str(claim.file))


if __name__ == "__main__":
    if os.fork():
        os._exit(0)  # nobody's child: whoever ends the owner's children doesn't end it
    os.setsid()
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(stop, signal.SIG_IGN)  # sent to a whole job; it ends with its owner
    main(Claim(Path(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
