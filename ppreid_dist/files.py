"""Files that are either whole or absent: written beside their place, synced, then renamed into it."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppreid_dist.errors import DataError, TakenError


def check_writable(folder: Path) -> None:
    """DataError naming it where it couldn't be made, or nothing be written into it; leaves nothing behind."""
    try:
        # A link to nothing, or a name too long, is in the way, too.
        there = next(path for path in (folder, *folder.absolute().parents) if path.is_symlink() or path.exists())
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise DataError(f"{folder}: can't be written to: {error.strerror}") from None


def hold(file: Path, wait: float) -> IO[bytes]:
    """``file``, open and locked: until it is closed, or this process ends in whatever way, nobody else can hold it.
    Where somebody does for ``wait`` seconds, TakenError; on a file system without locks nothing is held."""
    opened, until = file.open("ab"), time.monotonic() + wait
    while True:
        try:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return opened
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return opened
        if time.monotonic() >= until:
            opened.close()
            raise TakenError(f"{file}: another process holds it")
        time.sleep(min(1.0, wait))


@contextmanager
def atomic(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on success it becomes ``target``, on any error it is removed.

    The caller creates a file or a folder at the yielded path. An existing file is replaced; an existing folder
    must not be in the way. A full disk or another OSError ends in a DataError that names ``target``, TakenError where a
    folder is in the way after all.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for item in [*sorted(temporary.rglob("*")), temporary] if temporary.is_dir() else [temporary]:
            _sync(item)
        os.replace(temporary, target)
        _sync(target.parent)
    except OSError as error:
        kind = TakenError if error.errno in (errno.EEXIST, errno.ENOTEMPTY) and target.is_dir() else DataError
        raise kind(f"{target}: could not be written: {error.strerror or error}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(target: str | Path, tensors: Mapping[str, Tensor], *, about: Mapping[str, str] | None = None) -> None:
    """Write tensors (of any device) as safetensors, atomically; ``about`` as JSON into its metadata of that name.

    Under one name, since safetensors writes several in any order. CPU tensors are copied only where they have to be.
    Who may read it the umask says; safetensors itself would leave it to its owner alone.
    """
    metadata = None if about is None else {"about": json.dumps(about, ensure_ascii=False)}
    with atomic(target) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(_apart(tensors), temporary, metadata)
            temporary.chmod(mode)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, none in storage of another (as a snapshot just taken, a tied weight), which safetensors refuses."""
    taken: set[int] = set()
    apart = {}
    for name, t in tensors.items():
        t = t.detach().cpu().contiguous()
        storage = t.untyped_storage().data_ptr()
        apart[name] = t.clone() if storage in taken else t
        taken.add(storage)
    return apart


def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """Read safetensors onto the CPU; DataError naming the file if it is missing or damaged."""
    try:
        return load_file(file)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: not whole: {' '.join(str(error).split())}") from None


def write_text(target: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) atomically."""
    with atomic(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: str | Path, value: Any) -> None:
    """Write ``value`` as strict JSON (no NaN), indented, atomically."""
    write_text(target, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's bytes, as hex."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_json(file: str | Path) -> Any:
    """Read a JSON file; DataError naming it if it is missing or damaged."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not readable as JSON: {error}") from None
