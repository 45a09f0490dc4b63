"""A gradient that isn't finite: nothing moves, whether it is found at once or, as on a GPU, with the next gradient."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_runs import assert_same, run

from ppreid_dist.errors import RunError
from ppreid_dist.training import engine as engine_module
from ppreid_dist.training import step as step_module
from ppreid_dist.training.finite import FiniteWatch
from ppreid_dist.training.player import Player
from ppreid_dist.training.tracking import read_metrics

STEPS = 10  # of the tests' training


@pytest.mark.parametrize("failing", [1, 4, "last"])
def test_not_a_number_stops_before_the_update(
    failing: int | str, world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the warm-up, in the game, in the last step; found at once, or, as on a GPU, with the next gradient."""
    honest = step_module.triplet_loss
    step = STEPS - 1 if failing == "last" else int(failing)
    kept = []
    for late in (False, True):
        calls: list[int] = []

        def poisoned(*arguments: object, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return honest(*arguments) * (float("nan") if len(calls) == step + 1 else 1)  # type: ignore[arg-type]

        monkeypatch.setattr(step_module, "triplet_loss", poisoned)
        monkeypatch.setattr(engine_module, "FiniteWatch", partial(FiniteWatch, late=late))
        with pytest.raises(RunError, match=rf"step {step}: the gradient of the extractor is not finite") as error:
            run(world, tmp_path / f"late_{late}", "training.log_every=4")
        assert len(calls) == step + (2 if late and failing == 1 else 1)  # in the game the generator's is the next
        kept.append(load_file(Path(str(error.value).split("look at ")[1]) / "tensors.safetensors"))
        assert torch.isnan(kept[-1]["/terms/triplet"]) and torch.isfinite(kept[-1]["/terms/identity"])
        assert kept[-1]["/batch"].shape == (16, 3, 32, 16)
        assert ("/strangers" in kept[-1]) is (step >= 4)
        assert all(torch.isfinite(t).all() for n, t in kept[-1].items() if n.startswith("/modules"))
    # The statistics of batch norm have seen another batch. No weight, no moment has moved.
    moved = ("running_mean", "running_var", "num_batches_tracked")
    at_once, later = (
        {n: t for n, t in some.items() if n.startswith(("/modules", "/optimisers")) and not n.endswith(moved)}
        for some in kept
    )
    assert any("exp_avg" in name for name in later)
    assert_same(at_once, later)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("player", ["extractor", "critic", "generator"])
def test_the_batch_that_is_kept_is_the_one_that_failed(
    late: bool, player: str, world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stream that would give other pictures if it were asked again, and of whoever failed."""
    honest, calls, fed = Player.step, [], []

    def poisoned(self: Player, loss: Tensor, *rest: Any, **named: Any) -> Tensor:
        calls.append(self.name)
        if calls.count(player) == 4 and self.name == player and not fed:
            fed.append(self.held._watch.fed["batch"].clone())  # type: ignore[attr-defined]
            loss = loss * float("nan")
        return honest(self, loss, *rest, **named)

    monkeypatch.setattr(Player, "step", poisoned)
    monkeypatch.setattr(engine_module, "FiniteWatch", partial(FiniteWatch, late=late))
    settings = ["data.stream.placement=webdataset", "privacy.adversaries=[{kind: gan}]"]
    with pytest.raises(RunError, match=rf"the gradient of the {player} is not finite") as error:
        run(world, tmp_path / "run", *settings)
    whose = "extractor" if player == "extractor" else "gan"
    assert f"for the batch of the {whose} and all weights look at" in str(error.value)
    kept = load_file(Path(str(error.value).split("look at ")[1]) / "tensors.safetensors")
    assert torch.equal(kept["/batch"], fed[0])
    assert ("/labels" in kept) is (player == "extractor")


@pytest.mark.parametrize("late", [False, True])
def test_features_that_are_not_numbers_reach_no_log_and_no_probe(
    late: bool, world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the step that fails a row of the log, a probe and a checkpoint are due."""
    honest = step_module.ExtractorStep.__call__

    def poisoned(self: Any, labelled: Any, *rest: Any, step: int, **named: Any) -> Any:
        wrong = replace(labelled, x_B3HW=labelled.x_B3HW * (float("nan") if step == 5 else 1))
        return honest(self, wrong, *rest, step=step, **named)

    monkeypatch.setattr(step_module.ExtractorStep, "__call__", poisoned)
    monkeypatch.setattr(engine_module, "FiniteWatch", partial(FiniteWatch, late=late))
    due = [
        "training.log_every=6",
        "training.checkpoint_every=6",
        "training.warm=0",
        "probe.every=6",
        "training.ema=0.9",
    ]
    with pytest.raises(RunError, match=r"step 5: the gradient of the extractor is not finite"):
        run(world, tmp_path / "run", *due)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == []
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))
