"""A stopped run goes on exactly, and says in a line from what it can't."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backbone_families import write_backbone
from hypothesis import given
from hypothesis import strategies as st
from make_shards import forget_settings
from torch import Tensor
from training_runs import assert_same, first_part, last, run

from ppreid_dist import distributed, experiment
from ppreid_dist.data.dataset import prepare_shards
from ppreid_dist.errors import RunError
from ppreid_dist.experiment import Config
from ppreid_dist.settings import load_settings
from ppreid_dist.training.checkpoint import CheckpointFolder, flatten, load_tree, unflatten, write_tree
from ppreid_dist.training.tracking import read_metrics


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
    """…and one whose process was killed before it could point to its first checkpoint is nothing to begin anew in.
    Of checkpoints no more are kept than asked for."""
    done, kept = tmp_path / "done", load_settings(Config, None, world).training.keep
    shutil.copytree(whole, done)
    assert [place.name for place in CheckpointFolder(done, kept).steps()] == sorted(
        place.name for place in done.glob("checkpoints/step_*")
    )
    assert len(list(done.glob("checkpoints/step_*"))) == kept
    files = {file: file.stat().st_mtime_ns for file in done.glob("checkpoints/**/*")}
    before = last(done)
    assert_same(before, run(world, done, resume=True))
    assert files == {file: file.stat().st_mtime_ns for file in done.glob("checkpoints/**/*")}
    shutil.copytree(whole, tmp_path / "killed")
    (tmp_path / "killed" / "checkpoints" / "latest").unlink()
    for folder in (whole, tmp_path / "killed"):
        with pytest.raises(RunError, match="holds a run already"):
            run(world, folder)


@pytest.mark.parametrize(
    "change",
    [
        "privacy.weight=3",
        "seed=5",
        "data.pictures_per_identity=4",
        "reversal.lazy.mode=ema",
        "data.stream.placement=webdataset",
    ],
)
def test_a_resume_with_another_configuration_is_refused(
    world: list[str], whole: Path, tmp_path: Path, change: str
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(RunError, match=change.split("=")[0]) as error:
        run(world, tmp_path / "run", change, resume=True)
    assert "\n" not in str(error.value)


def test_a_setting_that_is_newer_than_the_checkpoint_had_its_default(
    world: list[str], whole: Path, tmp_path: Path
) -> None:
    before, copies = last(whole), {}
    for name, key in (("told", "privacy.every"), ("untold", "data.height")):
        shutil.copytree(whole, copies.setdefault(name, tmp_path / name))
        newest = CheckpointFolder(copies[name], 1).latest()
        assert newest is not None
        tree = load_tree(newest)
        del tree["must match"][key]
        shutil.rmtree(newest)
        write_tree(newest, tree)
    assert_same(before, run(world, copies["told"], resume=True))
    with pytest.raises(RunError, match=r"can.t resume, data\.height was 256 and is now"):
        run(world, copies["untold"], resume=True)


def test_no_two_trainings_go_into_a_folder(
    world: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is refused, also before the first has saved anything, and waits a while where it goes on."""
    monkeypatch.setattr(experiment, "ORPHANED", 0.2)
    shutil.copytree(whole, tmp_path / "kept")
    holding = "import sys, time; from ppreid_dist.files import hold; from pathlib import Path; "
    holding += "held = [hold(Path(name), 0) for name in sys.argv[1:]]; print(flush=True); time.sleep(600)"
    (tmp_path / "begun").mkdir()
    locks = [str(tmp_path / name / ".lock") for name in ("kept", "begun")]
    with subprocess.Popen([sys.executable, "-c", holding, *locks], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None and other.stdout.readline()
            for name in ("kept", "begun"):
                with pytest.raises(RunError, match=f"{name}: another training goes on in it"):
                    run(world, tmp_path / name, resume=name == "kept")
        finally:
            other.kill()
    assert not (tmp_path / "begun" / "config.yaml").exists()
    assert_same(last(whole), run(world, tmp_path / "kept", resume=True))


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
    for _ in range(2):  # a launcher may start it again at once: that must not begin anew
        with pytest.raises(RunError, match=r"tensors\.safetensors: not as it was written; no other checkpoint is left"):
            run(world, tmp_path / "run", resume=True)
    for folder in (tmp_path / "run").glob("checkpoints/step_*"):
        shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(RunError, match=r"/step_\d+: is not there any more, and no other checkpoint is left$"):
        run(world, tmp_path / "run", resume=True)


@pytest.mark.faults
def test_a_disk_that_fails_for_a_while_costs_no_checkpoint(
    world: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    with monkeypatch.context() as patch:

        def fail(file: Path) -> str:
            raise OSError(5, "Input/output error")

        patch.setattr("ppreid_dist.training.checkpoint.sha256_of", fail)
        with pytest.raises(RunError, match=r"/step_\d+: can't be read: \[Errno 5\] Input/output error$"):
            run(world, tmp_path / "run", resume=True)
    assert_same(last(whole), run(world, tmp_path / "run", resume=True))


@pytest.mark.faults
def test_a_full_disk_leaves_the_checkpoint_before(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ppreid_dist import files

    honest, calls = files.save_file, []

    def full(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None) -> None:
        calls.append(1)
        honest(tensors, file, metadata)
        if len(calls) == 2:
            file.write_bytes(file.read_bytes()[:50])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(RunError, match=r"/step_00000006/tensors.safetensors: could not be written: No space left"):
        run(world, tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step_00000003"]


_leaves = st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab", max_size=2) | st.floats(0, 1).map(torch.tensor)


_trees = st.recursive(
    _leaves,
    lambda sub: st.lists(sub, max_size=3) | st.dictionaries(st.text("xyz", min_size=1, max_size=3), sub, max_size=3),
)


@given(_trees)
def test_flatten_is_undone(tree: object) -> None:
    tensors, skeleton = flatten(tree)
    assert unflatten(json.loads(json.dumps(skeleton)), tensors) == tree
