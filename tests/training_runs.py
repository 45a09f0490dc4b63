"""Trainings in this process, and what their last checkpoints hold."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ppreid_dist.experiment import Config, train
from ppreid_dist.settings import load_settings
from ppreid_dist.training.checkpoint import CheckpointFolder
from ppreid_dist.training.runner import Runner
from ppreid_dist.training.tracking import read_metrics


def run(world: list[str], folder: Path, *settings: str, resume: bool = False) -> dict[str, Tensor]:
    """Train in this process; the weights, optimiser moments and snapshots of the last checkpoint."""
    train(load_settings(Config, None, [*world, f"output={folder}", *settings]), resume=resume, progress=False)
    return last(folder)


def last(folder: Path) -> dict[str, Tensor]:
    newest = CheckpointFolder(folder, 1).latest()
    assert newest is not None
    return load_file(newest / "tensors.safetensors")


def identity_losses(folder: Path) -> list[float]:
    return [row["loss/identity"] for row in read_metrics(folder / "metrics.jsonl") if "loss/identity" in row]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        if tolerance == 0:
            assert torch.equal(a[name], b[name]), name
        else:
            scale = max(float(a[name].float().abs().max()), 1e-6)
            assert float((a[name].float() - b[name].float()).abs().max()) <= tolerance * scale, name


def errors(a: dict[str, Tensor], b: dict[str, Tensor], norm: float) -> dict[str, float]:
    """By part of the game: a tensor's difference over its size, the largest; by norm 2, of all tensors at once."""
    assert a.keys() == b.keys()
    found: dict[str, list[tuple[float, float]]] = {}
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        if not a[name].is_floating_point():
            assert torch.equal(a[name], b[name]), name
            continue
        part = name.split("/")[-1 if name.startswith("/optimisers") else 2].split(".")[-1]
        x, y = a[name].double().flatten(), b[name].double().flatten()
        found.setdefault(part, []).append((float((x - y).norm(norm)), max(float(x.norm(norm)), 1e-6)))
    if norm != 2:
        return {part: max(difference / size for difference, size in each) for part, each in found.items()}
    return {
        part: math.hypot(*(d for d, _ in each)) / math.hypot(*(size for _, size in each))
        for part, each in found.items()
    }


def assert_close(
    a: dict[str, Tensor], b: dict[str, Tensor], tolerance: dict[str, float], norm: float = math.inf
) -> None:
    found = errors(a, b, norm)
    print(" ".join(f"{part} {error:.1e}" for part, error in found.items()))  # seen by pytest -s
    assert found.keys() == tolerance.keys()
    assert all(found[part] <= tolerance[part] for part in found), found


def first_part(world: list[str], folder: Path, stop: int) -> None:
    """A run that dies in the step after ``stop``."""
    turn = Runner._round

    def dying(self: Runner) -> None:
        if self.step == stop:
            raise KeyboardInterrupt
        turn(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Runner, "_round", dying)
        run(world, folder)
