"""A sweep under Ray: killed and gone on with, searched by Optuna, cut short by ASHA."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from sweep_stand_ins import STEPS, until
from sweeps import Driver, assert_whole, change, kill_half_way_and_resume, needs_ray, trainings

from ppreid_dist.errors import Stopped
from ppreid_dist.files import read_json
from ppreid_dist.losses.neighbourhood import NeighbourhoodConfig
from ppreid_dist.settings import load_settings
from ppreid_dist.sweep.asha import Losses
from ppreid_dist.sweep.config import SweepConfig
from ppreid_dist.sweep.folder import open_folder
from ppreid_dist.sweep.front import front_of
from ppreid_dist.sweep.ray_tune import run_on_ray
from ppreid_dist.sweep.space import Trial
from ppreid_dist.sweep.study import open_study
from ppreid_dist.sweep.trial import Worker
from ppreid_dist.training.adversary import AdversaryConfig
from ppreid_dist.training.step import PrivacyConfig


@needs_ray
def test_a_sweep_goes_through_ray(sweep_file: Path, tmp_path: Path) -> None:
    change(sweep_file, grid={"privacy.weight": [2]}, seeds=[0])
    Driver("ray", sweep_file).ends(0)
    assert_whole(tmp_path / "out", controls=1, trials=1)


@needs_ray
def test_a_wish_to_stop_while_ray_is_waited_for_is_no_mistake(sweep_file: Path) -> None:
    said: list[str] = []
    worker = Worker(open_folder(load_settings(SweepConfig, sweep_file), resume=False))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    how: dict[str, Any] = {"nodes": 2, "say": said.append, "listen": lambda: None, "stopped": lambda: True}
    with pytest.raises(Stopped, match="asked to stop"):
        run_on_ray(worker, address=f"127.0.0.1:{port}", **how)
    assert said == [f"out: waits for Ray at 127.0.0.1:{port}, 2 nodes"]


@needs_ray
@pytest.mark.parametrize("address", [None, "of a cluster"])
def test_a_wish_to_stop_goes_before_what_a_cluster_lacks(
    sweep_file: Path, monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    import ray

    heard: list[str] = []
    for name, found in (("init", None), ("shutdown", None), ("nodes", [])):
        monkeypatch.setattr(ray, name, lambda found=found, **how: found)
    worker = Worker(open_folder(load_settings(SweepConfig, sweep_file), resume=False))
    # It is heard as soon as anybody listens, and then nodes are waited for.
    how: dict[str, Any] = {"listen": lambda: heard.append("a signal"), "stopped": lambda: bool(heard)}
    run_on_ray(worker, address=address, nodes=2, say=lambda text: None, **how)
    assert heard


@needs_ray
def test_a_cluster_whose_token_is_lacking_is_one_line(tmp_path: Path) -> None:
    """Ray reads RAY_AUTH_MODE where it is loaded, and then looks for a token before it connects."""
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        code = f"from ppreid_dist.sweep.ray_tune import _connect; _connect({address!r}, lambda: False)"
        without = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
            env={**without, "RAY_AUTH_MODE": "token", "HOME": str(tmp_path)},
        )  # fmt: skip
    assert f"RunError: --address {address}: " in done.stderr and "token" in done.stderr.splitlines()[-1]


@needs_ray
@pytest.mark.slow
@pytest.mark.faults
def test_a_sweep_under_ray_that_is_killed_goes_on(sweep_file: Path, tmp_path: Path) -> None:
    kill_half_way_and_resume("ray", sweep_file, tmp_path / "out", signal.SIGKILL)


@needs_ray
@pytest.mark.slow
@pytest.mark.faults
def test_a_sweep_under_ray_that_is_asked_to_stop_goes_on(sweep_file: Path, tmp_path: Path) -> None:
    kill_half_way_and_resume("ray", sweep_file, tmp_path / "out", signal.SIGTERM)


@needs_ray
@pytest.mark.slow
@pytest.mark.faults
def test_a_trial_whose_ray_worker_is_killed_is_done_by_another(sweep_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    change(sweep_file, seeds=[0], concurrent=1)
    running = Driver("ray", sweep_file, STEP_SECONDS="0.5")
    until(lambda: any(len(run.joinpath("steps.txt").read_text().split()) > 2 for run in trainings(out)), seconds=90)
    (claim,) = (out / "claims").glob("weight_*.0001")
    os.kill(read_json(claim)["pid"], signal.SIGKILL)
    running.ends(0)
    assert_whole(out, controls=1, trials=2)
    assert claim.with_suffix(".0002").exists()


@needs_ray
@pytest.mark.slow
def test_a_search_learns_from_what_an_earlier_session_found(sweep_file: Path, tmp_path: Path) -> None:
    change(sweep_file, grid={}, search={"privacy.weight": {"low": 0.5, "high": 20, "log": True}}, trials=3, seeds=[0])
    running = Driver("ray", sweep_file)
    until(lambda: len(list((tmp_path / "out").glob("trials/*/trial.json"))) >= 1, seconds=90)
    running.ends(75, told=signal.SIGTERM)
    begun = {folder.name for folder in (tmp_path / "out" / "trials").iterdir()}
    Driver("ray", sweep_file, resume=True).ends(0)
    front = assert_whole(tmp_path / "out", controls=1, trials=3)
    assert begun <= {row["name"] for row in front["trials"]}
    assert len({row["weight"] for row in front["trials"]}) == 3


@needs_ray
@pytest.mark.slow
def test_a_search_of_few_points_ends(sweep_file: Path, tmp_path: Path) -> None:
    """Two points, one of which three proposals must repeat."""
    change(sweep_file, grid={}, search={"privacy.every": {"low": 2, "high": 3}}, trials=3, seeds=[0])
    Driver("ray", sweep_file).ends(0, within=250)
    front = json.loads((tmp_path / "out" / "front.json").read_text())
    points = {row["settings"]["privacy.every"] for row in front["trials"]}
    assert points <= {2, 3} and front["complete"] and front["expected"] == len(points) == len(front["trials"])
    assert len(list((tmp_path / "out" / "repeats").iterdir())) == 3 - len(points)


@needs_ray
def test_what_a_search_proposed_again_is_not_missing(sweep_file: Path) -> None:
    change(sweep_file, grid={}, search={"privacy.every": {"low": 2, "high": 4}}, trials=8, seeds=[0, 1])
    folder = open_folder(load_settings(SweepConfig, sweep_file), resume=False)
    row = {"status": "failed", "reason": "a reason"}
    for trial in [Trial({"privacy.every": every}, seed) for every in (2, 3, 4) for seed in (0, 1)]:
        folder.begin(trial)
        Worker(folder).note(trial, row, time.time())
    assert open_study(folder).missing == 5 and front_of(folder)["expected"] == 16 and not front_of(folder)["complete"]
    for proposal in ("a", "b", "c", "c", "d", "e"):
        folder.repeat(proposal)
    assert open_study(folder).missing == 0 and front_of(folder)["expected"] == 6 and front_of(folder)["complete"]


def test_asha_compares_the_whole_objective_of_trainings_that_are_not_nearly_done(tmp_path: Path) -> None:
    privacy = PrivacyConfig(adversaries=[AdversaryConfig(kind="ridge", weight=2.0)])
    losses = Losses(privacy, NeighbourhoodConfig(weight=3.0), images=9600)
    row = {"loss/identity": 1.0, "loss/triplet": 0.5, "loss/neighbourhood": 0.25, "loss/ridge": 0.1}
    assert losses.loss({**row, "privacy/strength": 4.0}) == pytest.approx(1.5 + 3 * 0.25 + 4 * 2 * 0.1)
    del row["loss/neighbourhood"]
    assert losses.loss({**row, "privacy/strength": 4.0}) == pytest.approx(1.5 + 4 * 2 * 0.1)
    # Whether the last row is reported would hang on how long the training's process lives after it.
    rows = [{**row, "privacy/strength": 0.0, "step": step, "images": 2400 * (step + 1)} for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert [each["images"] for each in losses.new(tmp_path)] == [2400, 4800, 7200]


@needs_ray
@pytest.mark.slow
def test_asha_ends_a_trial_early_and_says_so(sweep_file: Path, tmp_path: Path) -> None:
    settings = [f"training.images={STEPS}"]
    grid = {"training.ema": [0.1, 0.2, 0.3, 0.4]}
    change(sweep_file, settings=settings, grid=grid, seeds=[0], asha=True, concurrent=1)
    Driver("ray", sweep_file, STEP_SECONDS="0.5").ends(0)
    rows = read_json(tmp_path / "out" / "front.json")["trials"]
    assert {row["status"] for row in rows} == {"done", "stopped"}, rows
    assert all(row["reason"].startswith("asha:") for row in rows if row["status"] == "stopped")
