"""The game: exact over processes, exact over stops, honest about what it can't go on from."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from backbone_families import write_backbone
from conftest import launch
from hypothesis import given
from hypothesis import strategies as st
from make_shards import forget_settings
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel

from ppreid_dist import distributed
from ppreid_dist.data.dataset import prepare_shards
from ppreid_dist.data.stream import load_pictures, open_stream
from ppreid_dist.errors import ConfigError, DataError, RunError
from ppreid_dist.experiment import Config, _check_world, _probe, train
from ppreid_dist.settings import load_settings
from ppreid_dist.training.adversary import Metrics
from ppreid_dist.training.checkpoint import CheckpointFolder, flatten, unflatten
from ppreid_dist.training.engine import _Whole
from ppreid_dist.training.optimiser import OptimiserConfig, learning_rate
from ppreid_dist.training.player import Player
from ppreid_dist.training.reversal import ReversalAdversary
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


@pytest.fixture(scope="module")
def whole(world: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the whole game (GAN and ridge), one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(world, folder)
    return folder


def test_a_resumed_run_is_the_same_bit_for_bit(world: list[str], whole: Path, tmp_path: Path) -> None:
    """Stopped after the checkpoint of every third step, in the warm-up and in the game."""
    for stop in (3, 6, 9):
        folder = tmp_path / f"run{stop}"
        first_part(world, folder, stop)
        left = folder / "checkpoints" / ".step_00000009.1.tmp"  # by a process that was killed while it wrote
        left.mkdir()
        (left / "tensors.safetensors").touch()
        assert_same(last(whole), run(world, folder, resume=True))
        assert not left.exists()
        assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [
            row["step"] for row in read_metrics(whole / "metrics.jsonl")
        ]


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


def test_stochastic_depth_resumes_too(world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a Swin drops is drawn from torch's global generators: of each step and process anew."""
    settings = [*world, f"model.backbone={write_backbone(tmp_path, 'swin', drop_path_rate=0.5)}"]
    alone = run(settings, tmp_path / "whole")
    first_part(settings, tmp_path / "stopped", 7)
    torch.rand(5)  # what else the process does in between is of no consequence
    assert_same(alone, run(settings, tmp_path / "stopped", resume=True))
    another = SimpleNamespace(**{**vars(distributed), "rank": lambda: 1})
    monkeypatch.setattr("ppreid_dist.training.runner.distributed", another)
    other = run(settings, tmp_path / "other")
    assert any(not torch.equal(alone[name], other[name]) for name in alone)


def test_a_finished_run_is_left_alone(world: list[str], whole: Path, tmp_path: Path) -> None:
    """…and one whose process was killed before it could point to its first checkpoint is nothing to begin anew in."""
    before = last(whole)
    assert_same(before, run(world, whole, resume=True))
    shutil.copytree(whole, tmp_path / "killed")
    (tmp_path / "killed" / "checkpoints" / "latest").unlink()
    for folder in (whole, tmp_path / "killed"):
        with pytest.raises(RunError, match="holds a run already"):
            run(world, folder)


@pytest.mark.parametrize(
    "change", ["privacy.weight=3", "seed=5", "data.pictures_per_identity=4", "reversal.lazy.mode=ema"]
)
def test_a_resume_with_another_configuration_is_refused(
    world: list[str], whole: Path, tmp_path: Path, change: str
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(RunError, match=change.split("=")[0]) as error:
        run(world, tmp_path / "run", change, resume=True)
    assert "\n" not in str(error.value)


def test_a_resume_with_other_data_is_refused(world: list[str], whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(RunError, match="the training pictures"):
        other = [setting for setting in world if not setting.startswith(("data.shards", "data.root"))]
        other += [f"data.root={tmp_path / 'p'}", f"data.shards={tmp_path / 's'}"]
        people = next(s for s in world if s.startswith("data.synthetic=")).replace("}", ", seed: 9}")
        prepare_shards(load_settings(Config, None, [*other, people]).data, progress=False)
        forget_settings(tmp_path / "s")
        run(other, tmp_path / "run", resume=True)


@pytest.mark.faults
@pytest.mark.parametrize("how", ["cut", "flipped", "missing", "state"])
def test_a_damaged_checkpoint_is_set_aside(
    world: list[str], whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    newest = CheckpointFolder(tmp_path / "run", 1).latest()
    assert newest is not None
    file = newest / ("state.json" if how == "state" else "tensors.safetensors")
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data[:-100] if how == "cut" else data)
    if how == "missing":
        file.unlink()
    resumed = run(world, tmp_path / "run", resume=True)
    assert_same(last(whole), resumed)
    assert f"{file}: not as it was written" in caplog.text or (how == "missing" and newest.name in caplog.text)
    assert "going back to" in caplog.text
    assert (newest.parent / f"damaged_{newest.name}").is_dir()


def test_no_whole_checkpoint_is_one_line(world: list[str], whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for file in (tmp_path / "run").glob("checkpoints/step_*/tensors.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"tensors\.safetensors: not as it was written; no other checkpoint is left"):
        run(world, tmp_path / "run", resume=True)


@pytest.mark.faults
def test_a_full_disk_leaves_the_checkpoint_before(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ppreid_dist import files

    honest, calls = files.save_file, []

    def full(tensors: dict[str, Tensor], file: Path) -> None:
        calls.append(1)
        honest(tensors, file)
        if len(calls) == 2:
            file.write_bytes(file.read_bytes()[:50])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(RunError, match=r"/step_00000006/tensors.safetensors: could not be written: No space left"):
        run(world, tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step_00000003"]


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


@pytest.mark.parametrize(
    "settings",
    [
        ["reversal.adversarial={kind: hinge, regulariser: spectral_norm}"],
        ["training.ema=0.5"],
        ["neighbourhood.weight=0.5"],
        ["privacy.bounded=false", "privacy.ridge.centre=batch"],
        ["reversal.reconstruction.perceptual=0.5", "reversal.reconstruction.perceptual_backbone={weights}"],
    ],
)
def test_every_variant_trains(world: list[str], whole: Path, tmp_path: Path, settings: list[str]) -> None:
    """…and each makes a difference to the extractor."""
    backbone = Path(next(s for s in world if s.startswith("model.backbone=")).split("=")[1])
    weights = tmp_path / "weights"
    AutoModel.from_config(AutoConfig.from_pretrained(backbone)).save_pretrained(weights)
    run(
        world,
        tmp_path / "run",
        *(setting.format(weights=weights) if "{weights}" in setting else setting for setting in settings),
    )
    ours, theirs = (load_file(f / "model" / "extractor.safetensors") for f in (tmp_path / "run", whole))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_best_response_can_be_unbounded(world: list[str], tmp_path: Path) -> None:
    """Below 0 where anything is hidden, which the bounded one never is."""
    settings = ["privacy.adversaries=[{kind: ridge}]", "training.images=96"]
    for bounded in (True, False):
        run(world, tmp_path / str(bounded), f"privacy.bounded={bounded}", *settings)
        rows = read_metrics(tmp_path / str(bounded) / "metrics.jsonl")
        losses = [row["loss/ridge"] for row in rows if "loss/ridge" in row]
        assert losses and all((loss > 0) is bounded for loss in losses)


def test_reading_as_planned_gives_the_resident_run_bit_for_bit(world: list[str], whole: Path, tmp_path: Path) -> None:
    assert_same(last(whole), run(world, tmp_path / "run", "data.stream.placement=indexed"))


def test_streaming_promises_less_but_trains(world: list[str], tmp_path: Path) -> None:
    run(world, tmp_path / "run", "data.stream.placement=webdataset", "training.images=640", "privacy.weight=0")
    losses = identity_losses(tmp_path / "run")
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.01


@pytest.mark.parametrize("form", ["{}", "file:{}/"])
def test_streaming_from_elsewhere(world: list[str], tmp_path: Path, form: str) -> None:
    """Here lie the index, and what is decoded whole; an attacker's own people, say."""
    here, far = tmp_path / "here", tmp_path / "far"
    shutil.copytree(load_settings(Config, None, world).data.shards, here)
    far.mkdir()
    for shard in [*here.glob("train-*.tar"), *here.glob("unlabelled-*.tar")]:
        shard.rename(far / shard.name)
    settings = [*world, f"data.shards={here}", "data.stream.placement=webdataset", "training.images=96"]
    settings += ["privacy.adversaries=[{kind: ridge}]", "training.warm=0.2"]
    with pytest.raises(DataError, match=r"here/train-000000\.tar: missing"):
        run(settings, tmp_path / "run")
    run(settings, tmp_path / "run", f"data.remote={form.format(far)}")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert any("loss/ridge" in row for row in rows) and any("probe/fresh" in row for row in rows)


def test_bf16_trains_in_fp32_weights(world: list[str], tmp_path: Path) -> None:
    got = run(world, tmp_path / "run", "engine.precision=bf16")
    assert {t.dtype for n, t in got.items() if n.startswith("/modules") and t.is_floating_point()} == {torch.float32}
    losses = identity_losses(tmp_path / "run")
    assert losses and np.isfinite(losses).all()


@pytest.mark.parametrize("compiled", ["no", "aot_eager"])
def test_what_stays_fp32_under_bf16_has_gradients_in_fp32(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: str
) -> None:
    """The identity head's, which a backward under autocast would round."""
    seen: list[Tensor] = []
    norm = _Whole._norm

    def watching(self: _Whole) -> Tensor:
        if self.name == "extractor":
            seen.append(self.module.classifier.weight.grad.clone())
        return norm(self)

    monkeypatch.setattr(_Whole, "_norm", watching)
    run(world, tmp_path / "run", "engine.precision=bf16", f"engine.compile={compiled}", "training.images=96")
    assert len(seen) == 6
    assert all(float((g == g.bfloat16().float()).float().mean()) < 0.1 for g in seen)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.identities_per_batch=25", "data.identities_per_batch: 25"),
        ("privacy.ridge.strangers=33", "privacy.ridge.strangers: 33"),
        ("reversal.batch=25", "reversal.batch: 25"),
        ("reversal.size=[20,10]", "reversal.size: 20x10"),
        ("privacy={bounded: false, adversaries: [{kind: distance_correlation}]}", "privacy.bounded: false means"),
        ("reversal.lazy={mode: ema, pool: 2}", "reversal.lazy.pool: is for the mode snapshot, which ema isn't"),
        ("reversal.lazy={mode: rare, restart: 1}", "reversal.lazy.restart: is for the mode snapshot, which rare isn't"),
        ("reversal.generator_optimiser.decay=cosine", "reversal.generator_optimiser: warmup and decay aren't for"),
        ("reversal.critic_optimiser.warmup=0.1", "reversal.critic_optimiser: warmup and decay aren't for"),
        ("model.backbone=/nowhere", "model.backbone: /nowhere"),
        ("data.remote=https://there/", "data.remote: shards elsewhere are streamed: it needs"),
        ("data.shards=/nowhere", "/nowhere: no shards there"),
    ],
)
def test_bad_input_is_one_line(world: list[str], tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises((ConfigError, DataError)) as error:
        run(world, tmp_path / "run", setting)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_uneven_world_is_refused_before_training(world: list[str], tmp_path: Path) -> None:
    done = launch(2, *world, f"output={tmp_path / 'run'}", "data.identities_per_batch=9", expect=-1)
    line = "error: data.identities_per_batch: 9 can't be shared evenly by 2 processes"
    assert done.stderr.count(line) == 1  # of two processes


def test_only_the_main_process_decodes_the_probe_s_people(world: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config, decoded = load_settings(Config, None, world), []

    def counted(*of: Any, **more: Any) -> Any:
        decoded.append(1)
        return load_pictures(*of, **more)

    monkeypatch.setattr("ppreid_dist.experiment.load_pictures", counted)
    for is_main in (True, False):
        engine: Any = SimpleNamespace(is_main=is_main, device=torch.device("cpu"))
        assert (_probe(config, engine) is not None) is is_main
    assert len(decoded) == 2
    config.data.shards = "/nowhere"
    with pytest.raises(DataError, match="/nowhere"):
        _probe(config, engine)


def test_only_what_is_used_must_be_shared_evenly(world: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppreid_dist.distributed.world_size", lambda: 3)
    common = [*world, "data.identities_per_batch=12", "privacy.ridge.strangers=10", "reversal.batch=10"]

    def refused(*settings: str) -> str:
        try:
            _check_world(load_settings(Config, None, [*common, *settings]))
        except ConfigError as error:
            return str(error).partition(":")[0]
        return ""

    assert refused("privacy.weight=0") == refused("privacy.adversaries=[{kind: distance_correlation}]") == ""
    assert refused("privacy.adversaries=[{kind: ridge}]") == "privacy.ridge.strangers"
    assert refused("privacy.adversaries=[{kind: ridge}]", "privacy.ridge.strangers=9") == ""
    assert refused("privacy.adversaries=[{kind: gan}]") == "reversal.batch"


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


@given(st.floats(0, 1), st.floats(0.01, 0.5), st.sampled_from(["none", "steps", "cosine"]))
def test_learning_rate(progress: float, warmup: float, decay: str) -> None:
    lr = learning_rate(OptimiserConfig(lr=1.0, warmup=warmup, decay=decay, decay_at=[0.6, 0.8]), progress)
    if progress < warmup:
        assert 0.01 <= lr <= 1
    elif decay == "steps":
        assert lr == pytest.approx(1.0 if progress < 0.6 else 0.1 if progress < 0.8 else 0.01)
    elif decay == "none":
        assert lr == 1
    else:
        assert lr == pytest.approx(0.5 * (1 + np.cos(np.pi * (progress - warmup) / (1 - warmup))), abs=1e-6)


_leaves = st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab", max_size=2) | st.floats(0, 1).map(torch.tensor)
_trees = st.recursive(
    _leaves,
    lambda sub: st.lists(sub, max_size=3) | st.dictionaries(st.text("xyz", min_size=1, max_size=3), sub, max_size=3),
)


@given(_trees)
def test_flatten_is_undone(tree: object) -> None:
    tensors, skeleton = flatten(tree)
    assert unflatten(json.loads(json.dumps(skeleton)), tensors) == tree


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


def test_a_failed_run_leaves_the_process_as_it_was(world: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        run(world, tmp_path / "bad", "engine.precision=bf16", "data.identities_per_batch=1000")
    run(world, tmp_path / "good", "training.images=32", "privacy.weight=0")
