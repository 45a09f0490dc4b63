"""Who does what, among processes that share only a folder: a claim is a file, and a newer one outdoes it.

    CLAIMS/NAME.0001        JSON of who took it; its time of change is its heartbeat; read-only once it is given back

The owner's guard (:mod:`ppreid_dist.sweep.guard`) beats. A claim is free when it was given back or hasn't beaten for
``STALE`` seconds, by the file system's clock, so that the nodes' own needn't agree. Then one process, and only one,
succeeds in creating the next number. A file is never removed: an owner that was thought dead finds the newer number and
stops.

Standard library only: the guard must start at once.
"""

import json
import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path

BEAT, STALE = 5.0, 120.0  # seconds


@dataclass(frozen=True)
class Claim:
    file: Path

    def beat(self) -> bool:
        """Say that the owner lives; False if somebody else has it by now."""
        if self.outdone():
            return False
        os.utime(self.file)
        return True

    def outdone(self) -> bool:
        """Whether somebody else took it after it looked dead."""
        return _numbered(self.file, 1).exists()

    def give_back(self) -> None:
        """Anybody may take it now; no heartbeat that comes late changes that."""
        self.file.chmod(0o444)

    def given_back(self) -> bool:
        return not self.file.stat().st_mode & 0o200


class Claims:
    """The claims of one folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def take(self, name: str) -> Claim | None:
        """The claim on ``name``, or None while another holds it. It must be guarded within ``STALE`` seconds."""
        newest = self._newest().get(name)
        if newest is not None and not self._free(newest, self._now()):
            return None
        wanted = _numbered(newest, 1) if newest else self.folder / f"{name}.0001"
        mine = self.folder / f".{socket.gethostname()}.{os.getpid()}.{name}"
        mine.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
        try:
            os.link(mine, wanted)  # with its content, or not at all
        except FileExistsError:
            return None
        finally:
            mine.unlink()
        return Claim(wanted)

    def held(self) -> dict[str, float]:
        """The names that are held, each with its last heartbeat."""
        now = self._now()
        return {name: file.stat().st_mtime for name, file in self._newest().items() if not self._free(file, now)}

    def _newest(self) -> dict[str, Path]:
        """By name, the claim with the largest number."""
        files = sorted(self.folder.glob("[!.]*.[0-9][0-9][0-9][0-9]"))
        return {file.name.rpartition(".")[0]: file for file in files}

    def _free(self, file: Path, now: float) -> bool:
        return Claim(file).given_back() or now - file.stat().st_mtime > STALE

    def _now(self) -> float:
        clock = self.folder / f".{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.clock"
        clock.touch()
        now = clock.stat().st_mtime
        clock.unlink()
        return now


def _numbered(file: Path, more: int) -> Path:
    name, _, number = file.name.rpartition(".")
    return file.with_name(f"{name}.{int(number) + more:04d}")
