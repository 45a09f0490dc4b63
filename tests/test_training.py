"""One training: every variant of it, from wherever its pictures come, and what it refuses."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import launch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from training_runs import assert_same, identity_losses, last, run
from transformers import AutoConfig, AutoModel

from ppreid_dist import distributed
from ppreid_dist.data.dataset import prepare_shards
from ppreid_dist.data.stream import load_pictures
from ppreid_dist.errors import ConfigError, DataError, LostError, RunError
from ppreid_dist.experiment import Config, _check_cameras, _check_world, _probe
from ppreid_dist.models.extractor import Extractor
from ppreid_dist.settings import load_settings
from ppreid_dist.training.held import Whole
from ppreid_dist.training.optimiser import OptimiserConfig, learning_rate
from ppreid_dist.training.runner import Runner
from ppreid_dist.training.tracking import read_metrics


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


@pytest.mark.parametrize("compiled", ["no", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_what_stays_fp32_under_bf16_has_gradients_in_fp32(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: str
) -> None:
    """The identity head's, which a backward under autocast would round."""
    seen: list[Tensor] = []
    norm = Whole._norm

    def watching(self: Whole) -> Tensor:
        if self.name == "extractor":
            seen.append(self.module.classifier.weight.grad.clone())
        return norm(self)

    monkeypatch.setattr(Whole, "_norm", watching)
    kinds: set[torch.dtype] = set()
    pool = Extractor._pool

    def pooling(self: Extractor, found: Any) -> Tensor:
        kinds.add(found.map_BChw.dtype)
        return pool(self, found)

    if compiled == "no":  # traced, it would be seen once
        monkeypatch.setattr(Extractor, "_pool", pooling)
    run(world, tmp_path / "run", "engine.precision=bf16", f"engine.compile={compiled}", "training.images=96")
    assert compiled != "no" or torch.bfloat16 in kinds  # what is to be rounded is
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


def test_a_full_gpu_is_one_line_that_says_what_needs_less(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Runner) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Runner, "_round", fail)
    with pytest.raises(RunError, match=r"run: step 0: the GPU's memory is full; engine.gradient_checkpointing=true"):
        run(world, tmp_path / "run")


def test_a_failed_run_leaves_the_process_as_it_was(world: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        run(world, tmp_path / "bad", "engine.precision=bf16", "data.identities_per_batch=1000")
    run(world, tmp_path / "good", "training.images=32", "privacy.weight=0")


def test_a_process_that_was_lost_before_or_after_the_loop_is_one_line(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[gloo] Connection closed\nby peer")

    monkeypatch.setattr("ppreid_dist.experiment._play", fail)
    with pytest.raises(RuntimeError, match="gloo"):  # of one process nobody can be lost
        run(world, tmp_path / "run")
    monkeypatch.setattr("ppreid_dist.distributed.world_size", lambda: 2)
    monkeypatch.setattr("ppreid_dist.experiment.stopped_before", lambda folder: False)
    monkeypatch.setattr(
        "ppreid_dist.experiment.open_engine",
        lambda *_, **__: SimpleNamespace(forget=lambda: None, device=torch.device("cpu"), kind="ddp", is_main=True),
    )
    monkeypatch.setattr("ppreid_dist.distributed.chosen_by_main", lambda value: value)
    with pytest.raises(LostError, match=r"run: another process died, .*: \[gloo\] Connection closed by peer$"):
        run(world, tmp_path / "run")


@pytest.mark.parametrize(
    ("word", "last", "said"),
    [
        ("ncclInvalidUsage", "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000", "NCCL failed"),
        ("ncclUnhandledCudaError", "Cuda failure 2 'out of memory'", "NCCL failed"),
        ("ncclRemoteError", "socketProgress: Connection closed by remote peer", "another process died, hangs or can't"),
    ],
)
def test_nccl_s_reason_is_told(word: str, last: str, said: str) -> None:
    """It stands last, behind versions and codes."""
    error = RuntimeError(
        "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:268, unhandled cuda error (run with NCCL_DEBUG="
        f"INFO for details), NCCL version 2.27.5\n{word}: {'an explanation that nobody asked for ' * 5}\n"
        f"Last error:\n{last}\n"
    )
    assert distributed.reason(error).startswith(said) and distributed.reason(error).endswith(last)


def test_a_probe_of_too_few_people_is_refused_before_it_trains(world: list[str], tmp_path: Path) -> None:
    few = [*world, f"data.root={tmp_path / 'p'}", f"data.shards={tmp_path / 's'}", "data.synthetic.aux=10"]
    prepare_shards(load_settings(Config, None, few).data, progress=False)
    with pytest.raises(ConfigError, match=r"^probe\.every: 10 auxiliary people are too few for a probe, it needs 12$"):
        run(few, tmp_path / "run", "probe.every=1")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_best_response_that_would_be_off_is_refused(world: list[str], tmp_path: Path) -> None:
    """Each picture by a camera of its own: less its camera's mean picture it is nothing."""
    numbered = SimpleNamespace(camids=np.arange(50))
    config = load_settings(Config, None, world)
    with pytest.raises(ConfigError, match=r"^privacy\.ridge\.centre: camera takes off .*50 cameras and 32 pictures"):
        _check_cameras(config, numbered, 32)  # type: ignore[arg-type]
    _check_cameras(config, numbered, 51)  # type: ignore[arg-type]
    config.privacy.ridge.centre = "batch"
    _check_cameras(config, numbered, 32)  # type: ignore[arg-type]
