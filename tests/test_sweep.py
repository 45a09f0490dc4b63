"""A sweep by tasks of an array: shared out, stopped, failed, begun again."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from sweep_stand_ins import until
from sweeps import Driver, array, assert_whole, change, kill_half_way_and_resume, needs_ray, trainings

from ppreid_dist.cli import _sweep, _task
from ppreid_dist.data.dataset import DataConfig, prepare_shards
from ppreid_dist.errors import ConfigError, DataError, PPReIDError, RunError, Stopped
from ppreid_dist.experiment import Config
from ppreid_dist.files import read_json, write_json
from ppreid_dist.settings import load_settings
from ppreid_dist.sweep import driver, progress
from ppreid_dist.sweep.array import run_task
from ppreid_dist.sweep.claims import Claims
from ppreid_dist.sweep.config import SweepConfig
from ppreid_dist.sweep.driver import write_again
from ppreid_dist.sweep.folder import open_folder
from ppreid_dist.sweep.programs import Programs, TrialFailed
from ppreid_dist.sweep.space import Trial
from ppreid_dist.sweep.trial import Worker
from ppreid_dist.training.launcher import Launched


def test_an_array_does_a_whole_sweep_with_one_control_a_seed_and_one_judge(sweep_file: Path, tmp_path: Path) -> None:
    array(sweep_file)
    out = tmp_path / "out"
    front = assert_whole(out)
    assert sorted(front["controls"].values()) == [0.6, 0.6] and len(front["points"]) == 2
    assert front["recommended"] == next(p["name"] for p in front["points"] if p["weight"] == 3)
    assert front["hypervolume"]["identity"] == pytest.approx(0.57 * 0.75 + 0.02 * 0.5)
    settings = [json.loads((run / "settings.json").read_text()) for run in trainings(out)]
    assert sorted(float(each["privacy.weight"]) for each in settings) == [0, 0, 0, 1, 1, 3, 3]
    assert {each["seed"] for each in settings if float(each["privacy.weight"]) == 0} == {"0", "1", "2"}
    seen = json.loads((trainings(out)[-1] / "environment.json").read_text())
    assert (seen["OMP_NUM_THREADS"], seen["WANDB_RUN_GROUP"]) == ("1", "out")
    rows = list(csv.DictReader((out / "front.csv").open()))
    assert [float(each["mAP"]) for each in rows] == [row["mAP"] for row in front["trials"]]
    page = (out / "front.html").read_text()
    assert front["recommended"] in page and "data:image/png" in page and "://" not in page
    assert sorted(file.stem for file in (out / "front").glob("*.png")) == [
        "cost_identity", "cost_pixel", "urr_identity", "urr_pixel",
    ]  # fmt: skip
    before = {file: file.stat().st_mtime_ns for file in out.rglob("trial.json")}
    array(sweep_file, resume=True)
    assert before == {file: file.stat().st_mtime_ns for file in out.rglob("trial.json")}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("gpus", "seen"), [(0, ""), (1, "5")])
def test_a_trial_without_gpus_sees_none(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, seen: str
) -> None:
    """Ray leaves all of them to a trial that asks for none, and its own to one that asks."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.setattr(driver, "check_machine", lambda resources: None)
    change(sweep_file, grid={"privacy.weight": [1]}, seeds=[0], resources={"gpus": gpus})
    array(sweep_file)
    environments = [read_json(run / "environment.json") for run in trainings(tmp_path / "out")]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments] == [seen] * 3


def test_a_signal_whose_exception_was_lost_is_heard_all_the_same(sweep_file: Path, tmp_path: Path) -> None:
    """Python drops what is raised in a finaliser."""
    change(sweep_file, seeds=[0])
    worker = Worker(open_folder(load_settings(SweepConfig, sweep_file), resume=False), stopped=lambda: True)
    with pytest.raises(Stopped, match="asked to stop"):
        run_task(worker, 0, 1, lambda text: None)
    assert not trainings(tmp_path / "out")


def test_a_front_of_nothing_is_one_line(sweep_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"out: holds no sweep$"):
        write_again(load_settings(SweepConfig, sweep_file))
    assert not (tmp_path / "out").exists()


def test_points_are_named_by_what_they_are() -> None:
    """Not by the order of their keys, nor by how a number is written."""
    one, other = {"optimiser.lr": 0.001, "privacy.weight": 2.0}, {"privacy.weight": 2, "optimiser.lr": 1e-3}
    assert Trial(one, 0).name == Trial(other, 0).name != Trial(other, 1).name
    assert Trial(one | {"privacy.weight": 2.5}, 0).name != Trial(one, 0).name
    assert Trial(one, 0).overrides == ["optimiser.lr=0.001", "privacy.weight=2.0", "seed=0"]


@pytest.mark.parametrize("number", ["0", "1", "5"])
def test_tasks_of_an_array_may_have_any_numbers(monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    """As after `--array=0,1,5`, of what failed."""
    for key, value in {"ID": number, "MIN": "0", "COUNT": "3", "STEP": "1"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", value)
    task, tasks = _task(None, None)
    assert tasks == 3 and 0 <= task < 3


@pytest.mark.usefixtures("undrawn")
def test_a_failed_trial_is_a_row_and_can_be_tried_again(sweep_file: Path, tmp_path: Path) -> None:
    change(sweep_file, grid={"training.ema": [0.25, 0.5]}, seeds=[0])
    front = array(sweep_file)
    failed, done = front["trials"]
    assert (failed["status"], failed["reason"]) == ("failed", "training: step 3: the gradient is not finite")
    assert done["status"] == "done" and front["complete"]
    array(sweep_file, resume=True, retry=True)
    again = read_json(tmp_path / "out" / "front.json")["trials"]
    assert again[0]["began"] >= failed["ended"] and again[1] == done


@pytest.mark.usefixtures("undrawn")
def test_a_failed_training_that_another_trial_saw_to_can_be_tried_again(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strong = {"privacy.weight": 3}
    methods = {"strong": strong, "rounded": strong | {"model.store.quantise": "int8"}}

    def fail(command: list[str], done: Path, *, what: str, **how: Any) -> None:
        done.parents[1].mkdir(parents=True, exist_ok=True)
        raise TrialFailed(f"{what}: the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("ppreid_dist.sweep.trial.carry_out", fail)
        change(sweep_file, grid={}, methods={"strong": strong}, seeds=[0])
        array(sweep_file)
        change(sweep_file, methods=methods)
        array(sweep_file, resume=True)
    assert len(list(tmp_path.glob("out/trials/*/run.json"))) == 1
    assert [row["status"] for row in array(sweep_file, resume=True, retry=True)["trials"]] == ["done", "done"]


def test_a_training_gets_its_folder_whatever_that_is_called(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []

    def read(command: list[str], *rest: Any, **how: Any) -> None:
        given.extend(command[command.index("--resume") + 1 :])
        raise TrialFailed("seen")

    monkeypatch.setattr("ppreid_dist.sweep.trial.carry_out", read)
    out = tmp_path / "a sweep #2: größer, 'with' \"quotes\""
    change(sweep_file, output=str(out), grid={"privacy.weight": [1]}, seeds=[0])
    front = array(sweep_file)
    assert [row["reason"] for row in front["trials"]] == ["seen"]
    assert load_settings(Config, None, given).output == f"{out}/trials/{front['trials'][0]['name']}/run"


@pytest.mark.parametrize(
    ("found", "complete", "status"),
    [(["failed"], False, 0), (["failed"], True, 1), (["failed", "done"], True, 0), ([], False, 0)],
)
def test_a_sweep_fails_where_all_its_trials_did(
    sweep_file: Path, monkeypatch: pytest.MonkeyPatch, found: list[str], complete: bool, status: int
) -> None:
    """Not where a task of an array leaves the rest to others, which may not fail."""
    front = {"trials": [{"status": each} for each in found], "expected": 2, "recommended": None, "complete": complete}
    monkeypatch.setattr(driver, "sweep_in_array", lambda *arguments, **how: front)
    assert _sweep(["--config", str(sweep_file), "--backend", "array"]) == status


def test_shards_that_must_be_written_first_are_told_of(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def write(data: DataConfig, **how: Any) -> None:
        said.append("written")
        prepare_shards(data, **how)

    monkeypatch.setattr("ppreid_dist.sweep.trial.prepare_shards", write)
    change(sweep_file, settings=[f"data.shards={tmp_path / 'shards'}"])
    worker = Worker(open_folder(load_settings(SweepConfig, sweep_file), resume=False))
    worker.see_to_shards(said.append)
    worker.see_to_shards(said.append)
    assert said == [f"out: first the shards have to be written, {tmp_path / 'shards'}", "written"]


def test_a_folder_that_holds_something_is_not_touched(sweep_file: Path, tmp_path: Path) -> None:
    def refused(kind: type[PPReIDError], message: str, *settings: str, **how: Any) -> None:
        def held() -> dict[Path, int]:
            return {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}

        before = held()
        with pytest.raises(kind, match=message):
            array(sweep_file, *settings, **how)
        assert held() == before

    open_folder(load_settings(SweepConfig, sweep_file), resume=False)
    asked = read_json(tmp_path / "out" / "sweep.json")
    del asked["base"]["data"]["remote"], asked["sweep"]["trials"]  # begun when there were no such keys
    write_json(tmp_path / "out" / "sweep.json", asked)
    open_folder(load_settings(SweepConfig, sweep_file), resume=True)
    refused(RunError, "out: holds a sweep already; continue it by --resume")
    refused(ConfigError, r"^seeds: is \[3\] but .*sweep.json was begun with \[0, 1\]", "seeds=[3]", resume=True)
    refused(ConfigError, "^optimiser.lrr:", "grid.optimiser.lrr=[1]", f"output={tmp_path / 'other'}")
    refused(ConfigError, "^judge: its seed 1 is one of seeds", 'judge=["seed=1"]', f"output={tmp_path / 'other'}")
    refused(ConfigError, r"^model\.bakbone: ", 'judge=["model.bakbone=x"]', f"output={tmp_path / 'other'}")
    refused(ConfigError, r"^judges: none\.onnx: no such file", "judges=[none.onnx]", f"output={tmp_path / 'other'}")
    change(sweep_file, settings=["data.synthetic.train=25"])
    with pytest.raises(DataError, match=r"written with data\.synthetic\.train=24, not with 25"):
        array(sweep_file, f"output={tmp_path / 'of others'}")
    change(sweep_file, settings=[])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a file").touch()
    refused(RunError, "full: holds something that isn't a sweep", f"output={tmp_path / 'full'}")
    (tmp_path / "a file").touch()
    refused(DataError, "a file/out", f"output={tmp_path / 'a file' / 'out'}")
    change(sweep_file, grid={}, search={"optimiser.weight_decay": {"low": 0.1, "high": 1}})
    refused(ConfigError, "^search: needs --backend ray; an array can do a grid or methods$")


def test_tasks_that_open_a_new_sweep_together_do_not_refuse_each_other(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one comes while this one looks into the folder."""
    config, look = load_settings(SweepConfig, sweep_file), Path.iterdir
    (tmp_path / "out").mkdir()

    def look_late(folder: Path) -> Any:
        monkeypatch.setattr(Path, "iterdir", look)
        open_folder(config, resume=True)
        return look(folder)

    monkeypatch.setattr(Path, "iterdir", look_late)
    open_folder(config, resume=True)
    assert Path.iterdir is look


@pytest.mark.faults
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_an_array_that_is_killed_goes_on(sweep_file: Path, tmp_path: Path, number: signal.Signals) -> None:
    kill_half_way_and_resume("array", sweep_file, tmp_path / "out", number)


@pytest.mark.usefixtures("undrawn")
def test_an_array_says_what_it_does_while_it_does_it(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOOK", 0.01)
    monkeypatch.setattr(progress, "EVERY", 0.01)
    change(sweep_file, seeds=[0])
    said: list[str] = []
    assert array(sweep_file, say=said.append)["complete"]
    assert "0 of 2 done, 1 running" in said[0] and "running  " in said[0]
    assert any("attack" in text for text in said)  # a stage, seen while the trial goes on
    assert 1 <= sum("waiting  " in text for text in said) <= 2 < len(said)  # not again and again what only waits
    assert "2 of 2 done, 0 running" in said[-1]


@pytest.mark.usefixtures("undrawn")
def test_tasks_of_an_array_share_the_trials(sweep_file: Path, tmp_path: Path) -> None:
    change(sweep_file, seeds=[0])
    for task in [Driver("array", sweep_file, resume=True), Driver("array", sweep_file, resume=True)]:
        task.ends(0)
    assert_whole(tmp_path / "out", controls=1, trials=2)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_launch_is_not_by_the_user_s_own_file(tmp_path: Path, processes: int) -> None:
    """Which would give it other GPUs than Ray did, and another engine."""
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 2}\n"
        "gpu_ids: 0,1,2,3\nnum_machines: 1\nnum_processes: 4\nmixed_precision: bf16\ndynamo_backend: INDUCTOR\n"
    )
    (tmp_path / "train.py").write_text(
        "import json, os, sys\njson.dump(dict(os.environ), open(sys.argv[1] + os.environ.get('RANK', '0'), 'w'))\n"
    )
    command = Programs().train(processes, ["seen"])
    environment = {**os.environ, "HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "4,5"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert len(list(tmp_path.glob("seen*"))) == processes
    seen = read_json(tmp_path / "seen0")
    assert seen["CUDA_VISIBLE_DEVICES"] == "4,5" and seen["ACCELERATE_MIXED_PRECISION"] == "no"
    assert Launched.read(seen) == Launched() and seen["ACCELERATE_DYNAMO_BACKEND"] == "NO"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["array", pytest.param("ray", marks=needs_ray)])
def test_real_trainings_are_killed_and_the_sweep_ends(sweep_file: Path, tmp_path: Path, backend: str) -> None:
    """Killed while the first one trains; what comes out is what `ppreid report` and `ppreid evaluate` take."""
    attack = [
        "training.images=1920",
        "attack.people=[0]",
        "attack.resamples=50",
        "attack.attackers=[ridge]",
        "attack.curve_attackers=[ridge]",
    ]
    change(sweep_file, settings=attack, seeds=[0])
    command = [sys.executable, "-m", "ppreid_dist.sweep", "--config", str(sweep_file), "--backend", backend]
    out, environment = tmp_path / "out", {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, cwd=ROOT, env=environment)
    until(lambda: any(out.glob("trials/*/run/checkpoints/latest")), seconds=120)
    running.kill()
    running.wait()
    until(lambda: not Claims(out / "claims").held(), seconds=60)
    done = subprocess.run(
        [*command, "--resume"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    front = read_json(out / "front.json")
    assert [row["status"] for row in front["trials"]] == ["done", "done"], front["trials"]
    assert len(list(out.glob("shared/*/model"))) == 2
    resumed = [read_json(result)["resumed_at"] for result in out.glob("trials/*/run/result.json")]
    assert max(resumed) > 0
    assert all(0 < row["mAP"] < 1 and math.isfinite(row["axes"]["pixel"]["leak"]["value"]) for row in front["trials"])
    assert write_again(load_settings(SweepConfig, sweep_file))["points"] == front["points"]
