"""Checkpoints: everything the game depends on, in safetensors and JSON, whole or absent.

    RUN/checkpoints/
        step_00001200/
            tensors.safetensors     every player's weights and optimiser moments, every snapshot
            state.json              counters, configuration, data fingerprint, the optimisers' numbers
            SHA256SUMS              of both, as `sha256sum -c` reads them
        damaged_step_00000900/      what could not be read and was set aside
        latest                      the name of the newest whole one

A checkpoint is staged, synced and renamed, then the pointer moves, and only then are old ones pruned: whenever the
process dies, the pointer names a whole checkpoint.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ppreid_dist.errors import DataError, RunError
from ppreid_dist.files import atomic, read_json, read_tensors, sha256_of, write_json, write_tensors, write_text

_FILES, _SUMS = ("tensors.safetensors", "state.json"), "SHA256SUMS"
_log = logging.getLogger(__name__)


def flatten(tree: Any, path: str = "") -> tuple[dict[str, Tensor], Any]:
    """Split nested dicts and lists into tensors by path, and JSON with ``{"tensor": path}`` in their place."""
    if isinstance(tree, Tensor):
        return {path: tree.detach()}, {"tensor": path}
    if isinstance(tree, Mapping):
        parts = {str(key): flatten(value, f"{path}/{key}") for key, value in tree.items()}
        return {name: t for tensors, _ in parts.values() for name, t in tensors.items()}, {
            key: skeleton for key, (_, skeleton) in parts.items()
        }
    if isinstance(tree, (list, tuple)):
        listed = [flatten(value, f"{path}/{i}") for i, value in enumerate(tree)]
        return {name: t for tensors, _ in listed for name, t in tensors.items()}, [skeleton for _, skeleton in listed]
    return {}, tree


def unflatten(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`flatten`; keys come back as strings, tuples as lists."""
    if isinstance(skeleton, dict):
        if set(skeleton) == {"tensor"}:
            return tensors[skeleton["tensor"]]
        return {key: unflatten(value, tensors) for key, value in skeleton.items()}
    return [unflatten(value, tensors) for value in skeleton] if isinstance(skeleton, list) else skeleton


def write_tree(folder: Path, tree: Any) -> None:
    """Write ``tree`` as a new ``folder`` of tensors.safetensors and state.json, whole or not at all."""
    tensors, skeleton = flatten(tree)
    with atomic(folder) as staged:
        try:
            write_tensors(staged / "tensors.safetensors", tensors)
            write_json(staged / "state.json", skeleton)
            write_text(staged / _SUMS, "".join(f"{sha256_of(staged / name)}  {name}\n" for name in _FILES))
        except DataError as error:  # name the place that the user knows
            raise DataError(str(error).replace(str(staged), str(folder))) from error


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, in one line; None if they are as they were written. RunError where
    that can't be told, as while a disk or a server fails."""
    try:
        lines = [line.split("  ", 1) for line in (folder / _SUMS).read_text(encoding="utf-8").splitlines()]
        if [name for _, name in lines] != list(_FILES):
            return f"{folder / _SUMS}: not as it was written"
        changed = next((name for digest, name in lines if sha256_of(folder / name) != digest), None)
        return changed and f"{folder / changed}: not as it was written"
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        return f"{folder}: can't be read: {error}"
    except OSError as error:
        raise RunError(f"{folder}: can't be read: {error}") from error


def load_tree(folder: Path) -> Any:
    """Read what :func:`write_tree` wrote. RunError naming the file if it is missing or damaged."""
    file = folder / "tensors.safetensors"
    try:
        return unflatten(read_json(folder / "state.json"), read_tensors(file))
    except DataError as error:
        raise RunError(str(error)) from None
    except KeyError as error:
        raise RunError(f"{file}: not a whole checkpoint: {error} is missing") from None


def load_weights(load: Callable[[dict[str, Any]], object], state: dict[str, Any], file: Path) -> None:
    """Give a module's weights to what loads them; RunError naming ``file`` if they are another model's."""
    try:
        load(state)
    except (RuntimeError, KeyError) as error:
        raise RunError(f"{file}: holds another model: {' '.join(str(error).split())[:200]}") from None


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, run_folder: Path, keep: int):
        self.folder, self._keep = run_folder / "checkpoints", keep

    def latest(self) -> Path | None:
        """What the pointer names, or None."""
        pointer = self.folder / "latest"
        return self.folder / pointer.read_text().strip() if pointer.is_file() else None

    def steps(self) -> list[Path]:
        """All checkpoints, the oldest first, whole or damaged. The pointer may lag behind: a kill came between."""
        return sorted(self.folder.glob("step_*"))

    def newest_whole(self) -> Path | None:
        """The newest checkpoint whose files are as they were written; newer ones are set aside, which is said.

        None where there never was one; RunError where none is whole, and then all stay where they are, or the next
        start would begin anew. Call on one process only.
        """
        wrong: dict[Path, str] = {}
        found = None
        for folder in reversed(self.steps()):
            if (problem := damage(folder)) is None:
                found = folder
                break
            wrong[folder] = problem
        if wrong and found is None:
            raise RunError(f"{next(iter(wrong.values()))}; no other checkpoint is left")
        if found is None and (named := self.latest()) is not None:
            raise RunError(f"{named}: is not there any more, and no other checkpoint is left")
        for folder, problem in wrong.items():
            aside = folder.with_name(f"damaged_{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            _log.warning("%s; set aside as %s", problem, aside.name)
        if found is not None and wrong:
            _log.warning("going back to %s", found)
            write_text(self.folder / "latest", found.name + "\n")
        return found

    def save(self, step: int, tree: Any) -> Path:
        """Write the checkpoint of ``step``, point to it, prune. Call on one process only."""
        target = self.folder / f"step_{step:08d}"
        if not target.exists():
            try:
                write_tree(target, tree)
            except DataError as error:
                raise RunError(str(error)) from error
        write_text(self.folder / "latest", target.name + "\n")
        killed = self.folder.glob(".step_*.tmp")  # what a process left that was killed while it wrote
        for old in [*self.steps()[: -self._keep], *killed]:
            if old != target:
                shutil.rmtree(old, ignore_errors=True)
        return target
