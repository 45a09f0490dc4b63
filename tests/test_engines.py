"""Every engine plays the same game: against one process, over stops, and one after another in the same run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from engines import deepspeed
from ranks import finish, start_ranks
from safetensors.torch import load_file
from torch import Tensor
from training_runs import assert_close, assert_same, last, run

from ppreid_dist.errors import ConfigError, MissingExtra, RunError
from ppreid_dist.experiment import Config, train
from ppreid_dist.settings import load_settings
from ppreid_dist.training import engine as engine_module
from ppreid_dist.training.zero import name_locks, zero_optimization

pytestmark = pytest.mark.engines
KINDS = ["ddp", *(pytest.param(kind, marks=deepspeed) for kind in ("zero1", "zero2", "zero3"))]
FEW = ["ddp", pytest.param("zero3", marks=deepspeed)]
FEW += [pytest.param(kind, marks=[deepspeed, pytest.mark.slow]) for kind in ("zero1", "zero2")]
# By default DeepSpeed leaves small layers whole in stage 3, and all of the tests' are small.
PARTS = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
COMPILED = 600  # seconds at most; the first run under ZeRO compiles an operation of DeepSpeed's, which takes minutes
SHIPPED = ROOT / "configs" / "accelerate"


def through_launcher(config: Path, folder: Path, *settings: str) -> Path:
    """Train on two processes by a file for `accelerate launch`."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    done = subprocess.run(
        [sys.executable, *launcher, "--num_processes", "2", "--main_process_port", "0",
         "train.py", *settings, f"output={folder}"],
        cwd=ROOT, capture_output=True, text=True, timeout=COMPILED, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def directly(processes: int, folder: Path, *settings: str, **environment: str) -> Path:
    """Train without a launcher, or with the word that one would leave in the environment."""
    ended = finish(start_ranks(processes, *settings, f"output={folder}", environment=environment), COMPILED)
    assert [status for status, _ in ended] == [0] * processes, ended[0][1]
    return folder


def result(folder: Path) -> tuple[object, ...]:
    found = json.loads((folder / "result.json").read_text())
    return found["engine"], found["precision"], found["processes"], found["steps"]


def cut(whole: Path, step: int, folder: Path) -> Path:
    """``folder``, as ``whole`` would have left it, had it been stopped after ``step``."""
    shutil.copytree(whole, folder)
    for newer in folder.glob("checkpoints/step_*"):
        if int(newer.name.removeprefix("step_")) > step:
            shutil.rmtree(newer)
    (folder / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")
    (folder / "result.json").unlink()
    return folder


# Five times what was measured in fp32: extractor 1.7e-4, average 1.4e-4, lagged 1.7e-4, snapshot and generator 2.3e-6,
# critic 2.4e-6, moments 9.0e-6 and 6.9e-6. All engines alike: it is the order of sums. The largest are those of the
# identity head, whose weights begin near 0. ZeRO 1, 2 and 3 gave the same figures here.
EXACT = {
    "extractor": 8e-4, "ema": 7e-4, "lagged": 8e-4, "snapshot": 1.1e-5, "generator": 1.1e-5, "critic": 1.2e-5,
    "step": 0.0, "exp_avg": 4.5e-5, "exp_avg_sq": 3.5e-5,
}  # fmt: skip
# Five times what was measured under bf16, ZeRO-2: 2.7e-3, 2.2e-3, 2.2e-3, 2.9e-3, 3.1e-3, 4.3e-3, 0.20, 0.10 (DDP has a
# third of it). It is rounding: one process's own bf16 is further from its fp32 (4.0e-3 for the extractor, 0.25 for the
# moments), and DDP with its weights laid out as ZeRO's is equal to ZeRO-2 to the bit. That was while the backward ran
# under autocast, too: since it doesn't, both have a third of it, up to 2.8e-3, and of the moments 0.16 and 0.10.
ROUNDED = {
    "extractor": 1.4e-2, "ema": 1.1e-2, "lagged": 1.1e-2, "snapshot": 1.5e-2, "generator": 1.6e-2, "critic": 2.2e-2,
    "step": 0.0, "exp_avg": 0.8, "exp_avg_sq": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def game(world: list[str]) -> list[str]:
    """The whole game, an average to keep in it, and all of its checkpoints left."""
    return [*world, "training.ema=0.9", "training.keep=9"]


@pytest.fixture(scope="module")
def alone(game: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What one process makes of it, by precision."""
    folder = tmp_path_factory.mktemp("alone")
    return {precision: run(game, folder / precision, f"engine.precision={precision}") for precision in ("no", "bf16")}


@pytest.fixture(scope="module")
def whole(game: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Filled as needed: an uninterrupted run of an engine on two processes, as its shipped file starts it."""
    folder = tmp_path_factory.mktemp("whole")

    class Runs(dict[str, Path]):
        def __missing__(self, kind: str) -> Path:
            self[kind] = through_launcher(SHIPPED / f"{'cpu' if kind == 'ddp' else kind}.yaml", folder / kind, *game)
            return self[kind]

    return Runs()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a launcher that says ZeRO-3 and means every layer."""
    file = tmp_path_factory.mktemp("deepspeed") / "parts.json"
    file.write_text(json.dumps(PARTS))
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}


@pytest.mark.parametrize("kind", FEW)
def test_the_same_game_under_every_engine(
    whole: dict[str, Path], alone: dict[str, dict[str, Tensor]], kind: str
) -> None:
    assert result(whole[kind]) == (kind, "no", 2, 10)
    assert_close(alone["no"], last(whole[kind]), EXACT)


@pytest.mark.parametrize("kind", [*FEW[:2], FEW[-1]])
def test_a_resumed_run_is_the_same_bit_for_bit(
    game: list[str], whole: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Stopped in the game, at a step between two snapshots."""
    directly(2, cut(whole[kind], 6, tmp_path / "run"), *game, "--resume", f"engine.kind={kind}")
    assert_same(last(whole[kind]), last(tmp_path / "run"))
    kept = [load_file(folder / "model" / "extractor.safetensors") for folder in (whole[kind], tmp_path / "run")]
    assert_same(*kept)


@pytest.mark.slow
@deepspeed
def test_a_run_goes_on_under_other_engines(
    game: list[str], whole: dict[str, Path], alone: dict[str, dict[str, Tensor]], parts: dict[str, str], tmp_path: Path
) -> None:
    """ZeRO-2 to step 3, ZeRO-3 to 6 with every layer in parts, and DDP to the end."""
    second = directly(2, cut(whole["zero2"], 3, tmp_path / "2"), *game, "--resume", **parts)
    assert result(second) == ("zero3", "no", 2, 10)
    assert_close(alone["no"], last(second), EXACT)
    third = directly(2, cut(second, 6, tmp_path / "3"), *game, "--resume")
    assert_close(alone["no"], last(third), EXACT)


@deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "one_step"])
def test_a_live_opponent_in_parts(world: list[str], parts: dict[str, str], tmp_path: Path, mode: str) -> None:
    """Without snapshots the extractor's gradient flows through the generator itself, and the probe is shown it."""
    # Adam's first steps are the signs of gradients, of which rounding decides some.
    steady = [f"reversal.{player}_optimiser.eps=1e-4" for player in ("generator", "critic")]
    live = [*world, f"reversal.lazy.mode={mode}", *steady]
    alone = run(live, tmp_path / "alone")
    directly(2, tmp_path / "run", *live, **parts)
    players = ("extractor", "generator", "critic", "step", "exp_avg", "exp_avg_sq")
    assert_close(alone, last(tmp_path / "run"), {part: EXACT[part] for part in players})


@pytest.fixture(scope="module")
def anew(game: list[str]) -> list[str]:
    """The game with a reversal that is renewed in the middle, and learns on."""
    return [*game, "reversal.lazy={period: 1, restart: 3}"]


@pytest.fixture(scope="module")
def anew_alone(anew: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return run(anew, tmp_path_factory.mktemp("anew") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_reversal_that_begins_anew(
    anew: list[str], anew_alone: dict[str, Tensor], parts: dict[str, str], tmp_path: Path, kind: str
) -> None:
    """Its optimiser's moments, too: they are in the checkpoint."""
    said = parts if kind == "zero3" else {}
    folder = directly(2, tmp_path / "run", *anew, f"engine.kind={kind}", **said)
    assert result(folder) == (kind, "no", 2, 10)
    assert_close(anew_alone, last(folder), EXACT)


@pytest.mark.slow
def test_bf16_under_ddp(game: list[str], alone: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    """As configs/accelerate/gpus.yaml says."""
    through_launcher(SHIPPED / "gpus.yaml", tmp_path / "run", *game)
    assert result(tmp_path / "run") == ("ddp", "bf16", 2, 10)
    assert_close(alone["bf16"], last(tmp_path / "run"), ROUNDED, norm=2)


def test_the_lock_of_a_killed_compilation_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch waits there for ever, and says nothing."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    name_locks()
    assert not caplog.messages
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    name_locks()
    assert [message.split(": ")[0] for message in caplog.messages] == [str(lock)]


@pytest.mark.parametrize(
    ("said", "elements", "bucket"),
    [
        ({}, 1000, 1000),
        ({"reduce_bucket_size": "auto"}, 1000, 1000),
        ({"reduce_bucket_size": 50}, 1000, 50),
        ({"stage": 2}, 10**12, 500_000_000),
    ],
)
def test_deepspeed_reserves_no_more_than_a_player_fills(said: dict[str, object], elements: int, bucket: int) -> None:
    assert zero_optimization(said, 3, elements) == {"stage": 3, "reduce_bucket_size": bucket}


@deepspeed
@pytest.mark.slow
def test_bf16_under_zero(game: list[str], alone: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    """As a user's own `accelerate config` may say, without a file for DeepSpeed."""
    own = tmp_path / "own.yaml"
    own.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 1\nmixed_precision: bf16\n"
        "deepspeed_config: {gradient_accumulation_steps: 1, offload_optimizer_device: none, "
        "offload_param_device: none, zero3_init_flag: true, zero_stage: 2}\n"
    )
    through_launcher(own, tmp_path / "run", *game)
    assert result(tmp_path / "run") == ("zero2", "bf16", 2, 10)
    assert_close(alone["bf16"], last(tmp_path / "run"), ROUNDED, norm=2)


def killed(folder: Path, *settings: str) -> Path:
    """A run of two processes under ZeRO-2, killed some time after its first checkpoint."""
    ranks = start_ranks(2, *settings, f"output={folder}", "engine.kind=zero2")
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints" / "latest").exists():
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
        time.sleep(0.02)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    finish(ranks)
    assert not (folder / "result.json").exists()  # else nothing was killed
    return folder


@deepspeed
@pytest.mark.slow
@pytest.mark.faults
def test_killed_on_two_processes_and_resumed_on_one(
    game: list[str], alone: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    assert_close(alone["no"], run(game, killed(tmp_path / "run", *game), resume=True), EXACT)


@deepspeed
@pytest.mark.slow
@pytest.mark.faults
def test_killed_on_two_processes_and_resumed_on_four(
    game: list[str], alone: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    directly(4, killed(tmp_path / "run", *game), *game, "--resume", "engine.kind=zero3")
    assert_close(alone["no"], last(tmp_path / "run"), EXACT)


@deepspeed
@pytest.mark.faults
@pytest.mark.parametrize("stage", ["zero3", *(pytest.param(k, marks=pytest.mark.slow) for k in ("zero1", "zero2"))])
def test_not_a_number_stops_all_processes_before_the_update(
    game: list[str], whole: dict[str, Path], tmp_path: Path, stage: str
) -> None:
    """One process's loss is NaN in the fourth step: all end with one line, their weights those of the third."""
    script, folder = "tests/faulty_train.py", tmp_path / "run"
    ended = finish(start_ranks(2, "nan", "3", *game, f"output={folder}", f"engine.kind={stage}", script=script), 200)
    for status, said in ended:
        assert status == 2 and "Traceback" not in said, said
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "step 3: the gradient of the extractor is not finite; nothing was updated" in line
    kept = load_file(next(folder.glob("not_finite_step_*")) / "tensors.safetensors")
    before = load_file(whole[stage] / "checkpoints" / "step_00000003" / "tensors.safetensors")
    statistics = ("running_mean", "running_var", "num_batches_tracked")  # the forward had moved them by then
    assert_same(
        *({n: t for n, t in seen.items() if n in before and not n.endswith(statistics)} for seen in (before, kept))
    )


# --- contradictions, and what can't be done -----------------------------------------------------------------------


def test_a_contradiction_is_one_line_before_training(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config = load_settings(Config, None, [*world, f"output={tmp_path / 'run'}", "engine.precision=no"])
    with pytest.raises(ConfigError, match=r"engine\.precision"):
        train(config, progress=False)
    assert not (tmp_path / "run" / "checkpoints").exists()


@deepspeed
def test_zero_without_a_launcher_is_refused(world: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"engine\.kind: zero3 shares players over processes, but nothing has launched"
    ):
        run(world, tmp_path / "run", "engine.kind=zero3")


def test_the_extra_is_named(world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"engine\.kind=zero2 needs the extra 'deepspeed'"):
        run(world, tmp_path / "run", "engine.kind=zero2")


def test_a_resume_under_another_precision_is_refused(world: list[str], tmp_path: Path) -> None:
    run(world, tmp_path / "run", "training.images=48", "privacy.weight=0")
    with pytest.raises(RunError, match=r"engine\.precision was 'no' and is now 'bf16'"):
        run(world, tmp_path / "run", "training.images=48", "privacy.weight=0", "engine.precision=bf16", resume=True)


def test_processes_that_would_share_a_gpu_are_refused(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ConfigError, match=r"^LOCAL_WORLD_SIZE: 2 processes on a machine where 1 GPUs are visible; say"):
        run(world, tmp_path / "run", "training.images=32", "privacy.weight=0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of a launcher, whose GPU it is")
    with pytest.raises(ConfigError, match=r"where 1 GPUs are visible; say --num_processes 1$"):
        run(world, tmp_path / "run", "training.images=32", "privacy.weight=0")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # each process's own
    run(world, tmp_path / "run", "training.images=32", "privacy.weight=0")
    with pytest.raises(
        ConfigError, match=r"^engine\.kind: zero2 counts a machine's GPUs, so each process must see all 2"
    ):
        engine_module.check_gpus("zero2")


def test_zero_never_waits_for_the_gpu_by_itself_and_takes_gpus_by_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of DeepSpeed itself: its clock synchronises, and NVML is asked by numbers."""
    pytest.importorskip("deepspeed")
    from deepspeed.accelerator import cuda_accelerator
    from deepspeed.utils.config import get_timers_config

    from ppreid_dist.training.launcher import Launched
    from ppreid_dist.training.zero import ZeroEngine

    monkeypatch.setattr(cuda_accelerator, "pynvml", "present")
    monkeypatch.setenv("LOCAL_RANK", "1")
    engine = ZeroEngine.__new__(ZeroEngine)
    engine.kind, engine.precision, engine.launched = "zero2", "no", Launched()
    for visible, left in (("0,3", "present"), ("GPU-1a,MIG-2b", None)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        settings = engine._options(60)["deepspeed_plugins"][""].deepspeed_config
        assert not get_timers_config(settings).enabled and get_timers_config({}).enabled
        assert cuda_accelerator.pynvml == left


def test_a_taken_port_is_told_from_a_missing_process(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(timeout: float) -> None:
        raise torch.distributed.DistNetworkError("the server socket has failed to listen, code: -98, name: EADDRINUSE")

    monkeypatch.setattr("ppreid_dist.training.engine.meet_again", fail)
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(RunError, match=r"^MASTER_PORT: something else listens at here:29500; choose another port$"):
        run(world, tmp_path / "run", "training.images=32", "privacy.weight=0")
