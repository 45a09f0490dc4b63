"""Trainings in this process, and what their last checkpoints hold."""

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
