"""Shared by the tests: a tiny set of synthetic people, a tiny backbone, a configuration that trains in seconds."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import yaml
from attack_world import make_people
from make_shards import make_catalog
from torch import Tensor
from training_runs import run

from ppreid_dist.data.catalog import Catalog
from ppreid_dist.data.dataset import prepare_shards
from ppreid_dist.data.shard_writer import write_shards
from ppreid_dist.data.stream import Pictures
from ppreid_dist.experiment import Config
from ppreid_dist.files import write_json
from ppreid_dist.kernels import choice
from ppreid_dist.settings import load_settings, save_settings
from ppreid_dist.sweep.programs import launch_options

ROOT = Path(__file__).resolve().parents[1]
hypothesis.settings.register_profile("here", deadline=None)  # a busy machine is not a fault
hypothesis.settings.load_profile("here")
torch.set_num_threads(1)  # tiny tensors, and the tests must not depend on how sums are split over threads

# Files that take more than half a minute, the longest first: with these begun, the short ones fill what is left.
LONG = (
    "stopping", "engines", "commands", "game", "kernels", "training", "sweep", "slurm_jobs", "sweep_ray", "slurm",
    "accumulate", "resume", "recogniser", "split_head",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """What isn't marked `gpu` is of CPUs, to the bit often: no GPU is seen unless those are asked for."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture
def fresh_kernels() -> Iterator[None]:
    """No choice of a kernel is remembered, before or after."""
    choice._choose.cache_clear()
    yield
    choice._choose.cache_clear()


@pytest.fixture(scope="module")
def aux() -> tuple[Pictures, Tensor]:
    """The attackers' own people (``attack_world``), and their features."""
    return make_people(1000, 60)


@pytest.fixture(scope="module")
def strangers() -> tuple[Pictures, Tensor]:
    """Those who are attacked."""
    return make_people(0, 40)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """Of 30 small pictures with masks, half of them train, half query."""
    return make_catalog(tmp_path / "raw")


@pytest.fixture
def shards(catalog: Catalog, tmp_path: Path) -> Path:
    """The folder in which that catalogue was written."""
    write_shards(catalog, tmp_path / "shards", images_per_shard=6, progress=False)
    return tmp_path / "shards"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run on a tiny world, shards written; give them to ``load_settings(Config, None, …)``."""
    folder = tmp_path_factory.mktemp("world")
    backbone = {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
        "downsample_in_first_stage": False, "architectures": ["ResNetModel"],
    }  # fmt: skip
    (folder / "backbone").mkdir()
    (folder / "backbone" / "config.json").write_text(json.dumps(backbone))
    people = "{train: 24, unlabelled: 32, aux: 24, test: 10, cameras: 2, shots: 2, height: 32, width: 16}"
    settings = [
        f"data.root={folder / 'pictures'}", f"data.shards={folder / 'shards'}", f"data.synthetic={people}",
        "data.height=32", "data.width=16", "data.identities_per_batch=8", "data.pictures_per_identity=2",
        "data.strangers_split=unlabelled", "data.augment.pad=2", "data.stream.backend=pillow",
        f"model.backbone={folder / 'backbone'}", "reversal.size=[16,8]", "reversal.batch=8", "reversal.warm_steps=6",
        "reversal.generator={width: 8, noise_dim: 4}", "reversal.critic.width=8",
        "reversal.lazy={period: 3, catch_up: 4, window: 2}", "privacy.ridge={strangers: 16, target_size: [8, 4]}",
        "privacy.adversaries=[{kind: gan}, {kind: ridge}]", "training.images=160", "training.warm=0.4",
        "training.log_every=2", "training.checkpoint_every=3", "probe.every=3", "optimiser.lr=0.002",
    ]  # fmt: skip
    prepare_shards(load_settings(Config, None, settings).data, progress=False)
    return settings


@pytest.fixture(scope="session")
def whole(world: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the whole game (GAN and ridge), one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(world, folder)
    return folder


@pytest.fixture
def sweep_file(world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep's configuration: two weights, two seeds."""
    monkeypatch.chdir(ROOT)
    save_settings(load_settings(Config, None, world), tmp_path / "base.yaml")
    file = tmp_path / "sweep.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "output": str(tmp_path / "out"),
                "base": str(tmp_path / "base.yaml"),
                "grid": {"privacy.weight": [1, 3]},
                "seeds": [0, 1],
            }
        )
    )
    return file


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The front without its page, which takes seconds to draw."""

    def write_front(front: dict[str, Any], folder: Path) -> None:
        write_json(folder / "front.json", front)

    monkeypatch.setattr("ppreid_dist.sweep.driver.write_front", write_front)


def launch(
    processes: int,
    *arguments: str,
    expect: int = 0,
    script: str = "train.py",
    options: Sequence[str] = (),
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run train.py on so many processes, as the README does it, and check its exit status."""
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch_options(processes), *options, script, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == expect or (expect < 0 and done.returncode), done.stdout + done.stderr
    assert "FutureWarning" not in done.stderr, done.stderr
    return done
