"""Sweeps of stand-ins in this process and in others, and what one that ended has left."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from sweep_stand_ins import HERE, STEPS, stand_ins, until

from ppreid_dist.errors import Stopped
from ppreid_dist.settings import load_settings
from ppreid_dist.sweep.claims import Claims
from ppreid_dist.sweep.config import SweepConfig
from ppreid_dist.sweep.driver import sweep_in_array

needs_ray = pytest.mark.skipif(
    not (find_spec("ray") and find_spec("optuna")), reason="the extra 'sweep' is not installed"
)


def change(sweep_file: Path, **keys: Any) -> None:
    sweep_file.write_text(yaml.safe_dump(yaml.safe_load(sweep_file.read_text()) | keys))


def array(
    sweep_file: Path,
    *settings: str,
    task: int = 0,
    tasks: int = 1,
    say: Callable[[str], None] = lambda text: None,
    **how: Any,
) -> dict[str, Any]:
    found = load_settings(SweepConfig, sweep_file, settings)
    return sweep_in_array(found, task, tasks, say=say, programs=stand_ins(), **how)


def trainings(out: Path) -> list[Path]:
    return sorted(
        file.parent for pattern in ("shared/*/steps.txt", "trials/*/run/steps.txt") for file in out.glob(pattern)
    )


def assert_whole(out: Path, controls: int = 2, trials: int = 4) -> dict[str, Any]:
    """Every training of the sweep was done once and to its end, each step once, and the front shows it."""
    runs = trainings(out)
    assert len(runs) == controls + 1 + trials
    for run in runs:
        assert [int(line) for line in (run / "steps.txt").read_text().split()] == list(range(STEPS)), run
    front = json.loads((out / "front.json").read_text(), parse_constant=pytest.fail)
    assert front["complete"] and [row["status"] for row in front["trials"]] == ["done"] * trials
    return front


def _do_array(sweep_file: Path, resume: bool) -> None:
    try:
        array(sweep_file, resume=resume)
    except Stopped:
        sys.exit(75)


class Driver:
    """A sweep in a process of its own. An array's is forked, which spares it the imports."""

    def __init__(self, backend: str, sweep_file: Path, *, resume: bool = False, **environment: str):
        self.log = sweep_file.with_name(f"driver-{time.monotonic_ns()}.log")
        if backend == "array":
            self.process = multiprocessing.get_context("fork").Process(target=_do_array, args=(sweep_file, resume))
            self.process.start()
            return
        words = [HERE, backend, str(sweep_file), *(["--resume"] if resume else [])]
        self.process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=self.log.open("wb"), stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )  # fmt: skip

    def ends(self, status: int, *, told: signal.Signals | None = None, within: float = 150) -> None:
        if told is not None:
            os.kill(self.process.pid, told)
        if isinstance(self.process, subprocess.Popen):
            found = self.process.wait(timeout=within)
        else:
            self.process.join(timeout=within)
            found = self.process.exitcode
        assert found == status, self.log.read_text() if self.log.exists() else found


def kill_half_way_and_resume(backend: str, sweep_file: Path, out: Path, number: signal.Signals) -> None:
    change(sweep_file, seeds=[0], concurrent=1)
    running = Driver(backend, sweep_file, STEP_SECONDS="0.5")  # for Ray takes a second or two to see that it was killed
    until(lambda: len(list(out.glob("trials/*/trial.json"))) == 1, seconds=90)
    until(lambda: any(0 < len(run.joinpath("steps.txt").read_text().split()) < STEPS for run in trainings(out)))
    running.ends(-9 if number == signal.SIGKILL else 75, told=number)
    until(lambda: not Claims(out / "claims").held())  # the guards have ended what ran
    finished = {file: file.stat().st_mtime_ns for file in out.glob("trials/*/trial.json")}
    begun = {run: run.joinpath("steps.txt").read_text() for run in trainings(out)}
    assert len(finished) == 1
    time.sleep(0.3)
    assert begun == {run: run.joinpath("steps.txt").read_text() for run in trainings(out)}, "an orphan trains on"
    Driver(backend, sweep_file, resume=True).ends(0)
    assert_whole(out, controls=1, trials=2)
    assert all(file.stat().st_mtime_ns == when for file, when in finished.items())
