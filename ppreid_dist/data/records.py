"""One picture of a dataset, and what every reader of a list of pictures needs.

Pids are the dataset's own numbers, unique over all splits (relabelling for a classifier comes later). Pid -1 is
junk and dropped; pid 0 in the gallery is a distractor, not a person. Camera ``c12`` is camera 12.
"""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ppreid_dist.errors import DataError

DISTRACTOR = 0  # the pid, in a gallery, of pictures that are of nobody who is asked for

SPLITS = ("train", "unlabelled", "aux", "query", "gallery")  # aux: the attackers' own people


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One picture: its file, person, camera and split; optionally a mask of the person and named attributes."""

    path: Path
    pid: int
    camid: int
    split: str
    mask: Path | None = None
    attributes: tuple[tuple[str, str], ...] = ()


Read = tuple[list[Record], list[str]]  # what a reader returns: records and notes


def inside(folder: Path, name: str, where: str) -> Path:
    """The file ``name`` of ``folder``; DataError starting with ``where`` unless it lies inside and exists.

    A list may come from anyone: it must not be able to pull in files from elsewhere on the machine.
    """
    relative = PurePosixPath(name)
    if not name or relative.is_absolute() or ".." in relative.parts:
        raise DataError(f"{where}: {name!r} must be a path below {folder}")
    try:
        real = Path(os.path.realpath(folder / relative, strict=True))
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {name!r}: {getattr(error, 'strerror', None) or error}") from None
    if not real.is_relative_to(os.path.realpath(folder)):
        raise DataError(f"{where}: {name!r} is a link that leaves {folder}")
    if not real.is_file():
        raise DataError(f"{where}: {name!r} is not a file")
    return folder / relative
