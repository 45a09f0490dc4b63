"""Trainings that are done, kept in a folder: a stopped attack goes on, and what the same data gave is not made twice.

A training is found again by a digest of all it was made of: features, pictures, people, settings, seed, judge, and the
source of this package but for what only shows figures or starts runs, and the libraries' versions, so that an attacker
that was changed never answers with an old figure.

Any number of processes may share the folder: who makes a training locks it (a byte of the file ``locks``, so that the
lock ends with the process, however that ends).
"""

import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

import ppreid_dist
from ppreid_dist.attacks.base import Outcome
from ppreid_dist.errors import DataError
from ppreid_dist.files import read_tensors, write_tensors

_NUMBERS = ("l1", "psnr", "kid", "best", "seconds", "held_out", "still_falling")
_SCORES = "scores/"
_SECONDS = "kept/seconds"  # no weight's name has a slash
_ELSEWHERE = ("reporting/", "sweep/", "attacks/estimate.py", "cli.py", "doctor.py", "findings.py", "helpers.py",
              "progress.py")  # fmt: skip
_LIBRARIES = ("torch", "transformers", "numpy", "scipy", "scikit-learn", "diffusers")


def digest(*parts: Any) -> str:
    """SHA-256, as hex, of tensors, arrays and whatever JSON can write, each with its shape and type."""
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous().numpy()
        if isinstance(part, np.ndarray):
            whole.update(f"{part.dtype} {part.shape}\n".encode())
            whole.update(np.ascontiguousarray(part).data)
        else:
            whole.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return whole.hexdigest()


@cache
def source_digest() -> str:
    """Digest of the source files that can change an attacker's figures, and of the libraries' versions."""
    root = Path(ppreid_dist.__file__).parent
    files = {str(file.relative_to(root)): file for file in sorted(root.rglob("*.py"))}
    ours = [[name, file.read_text()] for name, file in files.items() if not name.startswith(_ELSEWHERE)]
    return digest(*ours, *[[name, _version(name)] for name in _LIBRARIES])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def _opened(file: Path) -> IO[bytes]:
    """Never closed while the process lives: closing it anywhere would give up all of the process's locks."""
    return file.open("ab")


class Kept:
    """Outcomes and weights by digest, a safetensors file each."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def _locks(self) -> IO[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True)
        return _opened(self.folder.resolve() / "locks")

    @contextmanager
    def alone(self, key: str, *, wait: bool = False) -> Iterator[bool]:
        """Whether no other process makes what is kept under ``key``; while this lasts none can begin to. With ``wait``
        it begins when that is so.

        Where the file system has no locks, several processes may make the same at once, and the last one's stays.
        """
        byte = int(key[:15], 16)
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except BlockingIOError:
            yield False
            return
        except OSError:
            yield True
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, byte)

    def made_elsewhere(self, keys: Iterable[str]) -> bool:
        """Whether another process is making one of these."""
        for key in keys:
            if not self.has(key):
                with self.alone(key) as free:
                    if not free:
                        return True
        return False

    def has(self, key: str) -> bool:
        """Whether something is kept under ``key``, damaged or not."""
        return (self.folder / f"{key}.safetensors").is_file()

    def get(self, key: str) -> Outcome | None:
        """What was kept under ``key``; None where nothing was, or it is damaged (and will be made again)."""
        file = self.folder / f"{key}.safetensors"
        if not file.is_file():
            return None
        try:
            found = read_tensors(file)
            numbers = dict(zip(_NUMBERS, found["numbers"].tolist(), strict=True))
            of_axes = {key.removeprefix(_SCORES): of.numpy() for key, of in found.items() if key.startswith(_SCORES)}
            return Outcome(scores=of_axes, shown=found["shown"], **numbers)
        except (DataError, KeyError, ValueError):
            return None

    def put(self, key: str, outcome: Outcome) -> None:
        """Keep ``outcome``; DataError naming the file if it can't be written."""
        arrays = {_SCORES + axis: torch.from_numpy(of_Q) for axis, of_Q in outcome.scores.items()}
        numbers = torch.tensor([getattr(outcome, name) for name in _NUMBERS], dtype=torch.float64)
        write_tensors(self.folder / f"{key}.safetensors", {**arrays, "numbers": numbers, "shown": outcome.shown})

    def weights(self, key: str) -> tuple[dict[str, Tensor], float] | None:
        """The weights that were kept under ``key``, and the seconds that they took; None where none were, or they are
        damaged."""
        file = self.folder / f"{key}.safetensors"
        try:
            found = read_tensors(file) if file.is_file() else {}
        except DataError:
            return None
        seconds = found.pop(_SECONDS, None)
        return None if seconds is None else (found, float(seconds))

    def put_weights(self, key: str, weights: dict[str, Tensor], seconds: float) -> None:
        """Keep them; DataError naming the file if it can't be written."""
        beside = {_SECONDS: torch.tensor(seconds, dtype=torch.float64)}
        write_tensors(self.folder / f"{key}.safetensors", {**weights, **beside})
