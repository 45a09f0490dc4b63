"""Compiled forwards train the same game; a player that no gradient reaches is noticed at its first step."""

from pathlib import Path

import pytest
import torch
from ranks import finish, start_ranks
from torch._dynamo.utils import counters
from training_runs import assert_same, last, run

from ppreid_dist.errors import ConfigError, RunError
from ppreid_dist.models.extractor import Extractor

pytestmark = pytest.mark.engines


def without_moments(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in tensors.items() if not name.startswith("/optimisers")}


SLOW = [pytest.param(backend, marks=pytest.mark.slow) for backend in ("inductor", "reduce-overhead")]


@pytest.mark.parametrize("backend", ["aot_eager", *SLOW])
def test_a_compiled_game_is_the_plain_one(world: list[str], tmp_path: Path, backend: str) -> None:
    plain = run(world, tmp_path / "plain")
    torch._dynamo.reset()
    counters.clear()
    compiled = run([*world, f"engine.compile={backend}"], tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] >= 3  # extractor, with and without strangers, and generator
    assert_same(without_moments(plain), without_moments(compiled), tolerance=2e-4)


@pytest.mark.slow
def test_a_compiled_game_on_two_processes(world: list[str], tmp_path: Path) -> None:
    plain = run(world, tmp_path / "plain")
    ended = finish(start_ranks(2, *world, "engine.compile=aot_eager", f"output={tmp_path / 'two'}"))
    assert [status for status, _ in ended] == [0, 0], ended
    assert_same(without_moments(plain), without_moments(last(tmp_path / "two")), tolerance=2e-4)


def test_a_player_that_is_not_trained_is_noticed(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Extractor._pool
    monkeypatch.setattr(Extractor, "_pool", lambda self, features: stored(self, features).detach())
    with pytest.raises(RunError, match=r"the extractor is not trained: backbone.* more have no gradient"):
        run([*world, "privacy.weight=0"], tmp_path / "run")


def test_cuda_graphs_are_for_one_process(world: list[str], tmp_path: Path) -> None:
    ended = finish(start_ranks(2, *world, "engine.compile=reduce-overhead", f"output={tmp_path / 'two'}"))
    assert [status for status, _ in ended] == [2, 2], ended
    line = "engine.compile: reduce-overhead is for one process, not for 2; use inductor"
    assert all(line in said for _, said in ended)


def test_zero_is_not_compiled(world: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.compile: inductor is for engine\.kind=ddp, not for zero2"):
        run([*world, "engine.kind=zero2", "engine.compile=inductor"], tmp_path / "run")
