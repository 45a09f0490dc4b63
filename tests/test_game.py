"""Extractor against adversaries: who plays whom, when, and as of which step."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training_runs import assert_same, first_part, run

from ppreid_dist.data.dataset import prepare_shards
from ppreid_dist.data.stream import open_stream
from ppreid_dist.errors import ConfigError
from ppreid_dist.experiment import Config
from ppreid_dist.settings import load_settings
from ppreid_dist.training.adversary import Metrics
from ppreid_dist.training.player import Player
from ppreid_dist.training.reversal import ReversalAdversary
from ppreid_dist.training.tracking import read_metrics


def test_no_adversary_touches_the_control(world: list[str], tmp_path: Path) -> None:
    """λ = 0 is the same training whatever adversaries are configured, and the warm-up of a protected run is it too."""
    plain = run(world, tmp_path / "a", "privacy.weight=0", "training.images=48")
    other = run(world, tmp_path / "b", "privacy.weight=0", "training.images=48", "privacy.adversaries=[{kind: ridge}]")
    assert_same(plain, other)
    warm = run(world, tmp_path / "c", "training.images=48", "training.warm=1.0")
    keys = [name for name in plain if name.startswith("/modules/extractor")]
    assert keys and all(torch.equal(plain[name], warm[name]) for name in keys)


@pytest.mark.parametrize("mode", ["snapshot", "rare", "ema", "none", "one_step"])
def test_what_the_extractor_plays(world: list[str], tmp_path: Path, mode: str) -> None:
    """How often the module that the extractor plays against changes over the game's six steps, period 3."""
    from ppreid_dist.training.reversal import ReversalAdversary

    seen: list[Tensor] = []
    honest = ReversalAdversary.loss

    def watching(self: ReversalAdversary, shown: object, step: int) -> Tensor:
        opponent = self.opponent
        assert not any(p.requires_grad for p in opponent.parameters())
        seen.append(torch.cat([p.flatten() for p in opponent.state_dict().values()]).clone())
        return honest(self, shown, step)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReversalAdversary, "loss", watching)
        run(world, tmp_path / "run", f"reversal.lazy.mode={mode}", "privacy.adversaries=[{kind: gan}]")
    changes = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    every_period = [False, False, True, False, False]
    assert changes == (every_period if mode in ("snapshot", "rare") else [True] * 5)


def test_one_step_of_both_from_the_same_pictures(world: list[str], tmp_path: Path) -> None:
    """Generator and critic learn from what the extractor has just shown, as they were when it was shown; it resumes."""
    from ppreid_dist.training.reversal import ReversalAdversary

    settings = [*world, "reversal.lazy.mode=one_step", "privacy.adversaries=[{kind: gan}]"]
    shown: list[tuple[Tensor, Tensor, Tensor]] = []
    learnt: list[int] = []
    lose, learn = ReversalAdversary.loss, ReversalAdversary._learn

    def weights(self: ReversalAdversary) -> Tensor:
        return torch.cat([p.flatten().clone() for p in self.generator.module.parameters()])

    def losing(self: ReversalAdversary, exposure: Any, step: int) -> Tensor:
        shown.append((exposure.stored_BD.detach().clone(), exposure.clean_B3hw.clone(), weights(self)))
        return lose(self, exposure, step)

    def learning(self: ReversalAdversary, stored: Tensor, target: Tensor) -> dict[str, Tensor]:
        if shown:  # the game has begun
            learnt.append(len(shown))
            before = shown[-1]
            assert torch.equal(stored, before[0]) and torch.equal(target, before[1])
            assert torch.equal(weights(self), before[2]) and not stored.requires_grad
        return learn(self, stored, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReversalAdversary, "loss", losing)
        patch.setattr(ReversalAdversary, "_learn", learning)
        alone = run(settings, tmp_path / "whole")
    assert learnt == list(range(1, len(shown) + 1)) and len(shown) == 6  # once after each of the extractor's steps
    first_part(settings, tmp_path / "stopped", 7)
    assert_same(alone, run(settings, tmp_path / "stopped", resume=True))


def test_a_pool_of_snapshots(world: list[str], tmp_path: Path) -> None:
    """The newest beside the ones before it, oldest replaced first; who errs least is played; all of it resumes."""
    from ppreid_dist.training.reversal import ReversalAdversary

    settings = [*world, "reversal.lazy={period: 2, pool: 2}", "privacy.adversaries=[{kind: gan}]", "training.warm=0.2"]
    seen: list[tuple[int, list[bool], int]] = []
    choose = ReversalAdversary._strongest

    def watching(self: ReversalAdversary, shown: object, noise: Tensor | None) -> torch.nn.Module:
        chosen = choose(self, shown, noise)  # type: ignore[arg-type]
        known = [self.opponent, *self.pool]
        with torch.no_grad():
            drawn = [each(shown.stored_BD, noise) for each in known[: self.snapshots]]  # type: ignore[attr-defined]
            errors = [float(self._distance(d, shown.clean_B3hw).mean()) for d in drawn]  # type: ignore[attr-defined]
        assert chosen is known[int(np.argmin(errors))]
        flat = [torch.cat([p.flatten() for p in each.state_dict().values()]) for each in known]
        seen.append((self.snapshots, [torch.equal(flat[0], other) for other in flat[1:]], len(errors)))
        return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReversalAdversary, "_strongest", watching)
        alone = run(settings, tmp_path / "whole")
    assert [count for count, *_ in seen] == sorted(count for count, *_ in seen) and seen[-1][0] > 3
    assert [known for *_, known in seen] == [1, 1, 2, 2, 3, 3, 3, 3]  # none is taken twice as the game begins
    assert not any(any(same[: count - 1]) for count, same, _ in seen)
    first_part(settings, tmp_path / "stopped", 7)
    assert_same(alone, run(settings, tmp_path / "stopped", resume=True))


def test_the_full_gradient_hears_the_critic_too(world: list[str], tmp_path: Path) -> None:
    """The extractor's loss by hand; the critic is as old as the opponent; it resumes; without one it is refused."""
    settings = [*world, "reversal={gradient: full_gan, lazy: {period: 2}}", "privacy.adversaries=[{kind: gan}]"]
    judges, gave = [], ReversalAdversary.loss

    def by_hand(self: ReversalAdversary, shown: Any) -> float:
        stored, pids = shown.stored_BD.detach(), shown.labels_B.tolist()
        noise = self._noise((33, self._step), len(stored), stored.device)  # type: ignore[attr-defined]
        drawn, weight = self.opponent(stored, noise), self.config.adversarial.weight

        def leak(row: int, of: int) -> float:
            score = self.judge(drawn[row][None], stored[of][None])  # type: ignore[misc]
            seen = float(self._distance(drawn[row][None], shown.clean_B3hw[of][None]))
            return seen + weight * float(torch.log1p(torch.exp(-score)))

        rows = range(len(pids))
        others = [next(j for k in rows if pids[j := (i + len(pids) // 2 + k) % len(pids)] != pids[i]) for i in rows]
        floor = float(np.mean([leak(i, j) for i, j in zip(rows, others, strict=True)]))
        return float(np.mean([max(0.0, floor - leak(i, i)) for i in rows])) / floor

    def watching(self: ReversalAdversary, shown: Any, step: int) -> Tensor:
        self._step = step  # type: ignore[attr-defined]
        lost = gave(self, shown, step)
        with torch.no_grad():
            assert float(lost) == pytest.approx(by_hand(self, shown), rel=1e-4)
        judge, critic = (
            torch.cat([p.flatten().clone() for p in of.parameters()])
            for of in (self.judge, self.critic.module)  # type: ignore[union-attr]
        )
        judges.append((self.snapshots, judge, torch.equal(judge, critic)))
        return lost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReversalAdversary, "loss", watching)
        alone = run(settings, tmp_path / "whole")
    for (before, judge, _), (now, after, as_it_is) in itertools.pairwise(judges):
        assert torch.equal(judge, after) == (before == now) and as_it_is == (before != now)
    assert judges[-1][0] > judges[0][0]
    first_part(settings, tmp_path / "stopped", 7)
    assert_same(alone, run(settings, tmp_path / "stopped", resume=True))
    plain = run([*settings, "reversal.gradient=rec"], tmp_path / "rec")
    assert not all(torch.equal(alone[key], plain[key]) for key in plain if key.startswith("/modules/extractor"))
    for wrong, words in (
        ("privacy.adversaries=[{kind: ridge}]", "^reversal.gradient: full_gan is of the adversary gan"),
        ("reversal.adversarial.kind=hinge", "^reversal.gradient: full_gan needs adversarial.kind=non_saturating"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_settings(Config, None, [*settings, wrong])


def test_a_reversal_that_begins_anew(world: list[str], tmp_path: Path) -> None:
    """At every second snapshot generator and critic are new, their moments too, and it resumes."""
    from ppreid_dist.training.player import Player

    settings = [*world, "reversal.lazy={period: 1, restart: 2}", "privacy.adversaries=[{kind: gan}]",
                "training.warm=0.2"]  # fmt: skip
    renewed: list[tuple[str, Tensor]] = []
    renew = Player.renew

    def watching(self: Player, module: torch.nn.Module) -> None:
        assert any(t.any() for known in self.held.moments().values() for t in known.values())
        renew(self, module)
        assert not any(t.any() for known in self.held.moments().values() for t in known.values())
        flat = [torch.cat([t.flatten() for t in of.values()]) for of in (self.held.weights(), module.state_dict())]
        assert torch.equal(*flat)
        renewed.append((self.name, flat[0].clone()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Player, "renew", watching)
        alone = run(settings, tmp_path / "whole")
    names = [name for name, _ in renewed]
    assert names == ["generator", "critic"] * (len(names) // 2) and len(names) >= 4
    assert not torch.equal(renewed[0][1], renewed[2][1])  # others each time
    first_part(settings, tmp_path / "stopped", 7)
    assert_same(alone, run(settings, tmp_path / "stopped", resume=True))


def test_a_game_in_one_of_two_steps(world: list[str], tmp_path: Path) -> None:
    settings = [*world, "privacy.every=2", "privacy.ramp=0", "privacy.weight=3", "training.log_every=1"]
    alone = run(settings, tmp_path / "whole")
    rows = [row for row in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "privacy/strength" in row]
    game = [row["privacy/strength"] for row in rows[next(i for i, row in enumerate(rows) if "loss/ridge" in row) :]]
    assert len(game) > 3 and set(game[::2]) == {6.0} and set(game[1::2]) == {0.0}
    assert all(("loss/ridge" in row) == (row["privacy/strength"] > 0) for row in rows)
    first_part(settings, tmp_path / "stopped", 6)
    assert_same(alone, run(settings, tmp_path / "stopped", resume=True))


def test_two_generators_read_their_pictures_once_each(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each goes through the plan by turns of its own: of one stream between them, each would undo the other's place."""
    opened = []

    def counted(*of: Any, **more: Any) -> Any:
        opened.append(1)
        return open_stream(*of, **more)

    monkeypatch.setattr("ppreid_dist.experiment.open_stream", counted)
    run(world, tmp_path / "run", "privacy.adversaries=[{kind: gan}, {kind: regression}]", "training.images=96")
    assert len(opened) == 3  # the labelled pictures', and each generator's


@pytest.mark.parametrize("adversary", ["regression", "distance_correlation"])
def test_every_adversary_plays(world: list[str], tmp_path: Path, adversary: str) -> None:
    run(world, tmp_path / "run", f"privacy.adversaries=[{{kind: {adversary}}}]", "training.images=96")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert any(0 < row.get(f"loss/{adversary}", 0) < 1.5 for row in rows)


def test_the_best_response_can_be_unbounded(world: list[str], tmp_path: Path) -> None:
    """Below 0 where anything is hidden, which the bounded one never is."""
    settings = ["privacy.adversaries=[{kind: ridge}]", "training.images=96"]
    for bounded in (True, False):
        run(world, tmp_path / str(bounded), f"privacy.bounded={bounded}", *settings)
        rows = read_metrics(tmp_path / str(bounded) / "metrics.jsonl")
        losses = [row["loss/ridge"] for row in rows if "loss/ridge" in row]
        assert losses and all((loss > 0) is bounded for loss in losses)


@pytest.mark.parametrize("kind", ["gan", "regression"])
def test_a_moving_average_begins_with_what_was_learnt(world: list[str], tmp_path: Path, kind: str) -> None:
    """Not with the generator as it was drawn, which would be the opponent for a hundred steps."""
    opponents = []
    prepare = ReversalAdversary.prepare

    def looked_at(self: ReversalAdversary, extractor: Player) -> Metrics:
        metrics = prepare(self, extractor)
        assert self.ema is not None
        average, live = self.ema.module.state_dict(), self.generator.held.weights()
        opponents.append(all(torch.equal(average[name], live[name]) for name in live))
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReversalAdversary, "prepare", looked_at)
        game = [f"privacy.adversaries=[{{kind: {kind}}}]", "reversal.lazy.mode=ema", "reversal.warm_steps=3"]
        run(world, tmp_path / "run", *game)
    assert opponents == [True]


@pytest.mark.slow
def test_canary_a_rarely_updated_reversal_is_masked_and_the_probe_warns(tmp_path: Path) -> None:
    """The extractor outruns a reversal module that learns every 50 steps: that module's error rises, a fresh
    attacker's doesn't. With next to no privacy pressure the two agree, and the probe is silent."""
    (tmp_path / "backbone").mkdir()
    backbone = {
        "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1],
        "layer_type": "basic", "downsample_in_first_stage": False, "architectures": ["ResNetModel"],
    }  # fmt: skip
    (tmp_path / "backbone" / "config.json").write_text(json.dumps(backbone))
    people = "{train: 200, unlabelled: 0, aux: 60, test: 4, cameras: 2, shots: 2, height: 32, width: 16}"
    settings = [
        f"data.root={tmp_path / 'p'}", f"data.shards={tmp_path / 's'}", f"data.synthetic={people}", "data.height=32",
        "data.width=16", "data.augment.pad=2", "data.stream.backend=pillow", f"model.backbone={tmp_path / 'backbone'}",
        "reversal.size=[16,8]", "reversal.batch=64", "reversal.warm_steps=400", "reversal.critic.width=8",
        "reversal.generator={width: 16, noise_dim: 4}", "reversal.lazy={mode: rare, period: 50}",
        "privacy.adversaries=[{kind: gan}]", "privacy.ramp=0", "optimiser.lr=0.002", "training.images=16000",
        "training.warm=0.6", "probe.every=50",
    ]  # fmt: skip
    prepare_shards(load_settings(Config, None, settings).data, progress=False)
    probes = {}
    for name, weight in (("masked", 20), ("quiet", 1e-6)):
        run(settings, tmp_path / name, f"privacy.weight={weight}")
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        probes[name] = [row for row in rows if "probe/gap" in row][-1]
    masked, quiet = probes["masked"], probes["quiet"]
    assert masked["probe/gap"] > 0.25 and masked["probe/warned"] == 1
    assert masked["probe/fresh"] < 1.15 * quiet["probe/fresh"], "it was not masking but protection"
    assert abs(quiet["probe/gap"]) < 0.1 and quiet["probe/warned"] == 0
