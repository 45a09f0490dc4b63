"""Stops: asked for, all processes save together and say so; not asked for, the others end soon and say why."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launch
from ranks import Rank, finish, start_ranks
from training_runs import assert_same, last, run

from ppreid_dist.errors import Stopped
from ppreid_dist.training.runner import Runner
from ppreid_dist.training.stopping import StopRequests
from ppreid_dist.training.tracking import read_metrics

pytestmark = pytest.mark.faults
LONG = ["training.images=16000"]  # more than any test waits for
MAX_RESTARTS = ["--max_restarts", "1"]


def wait_for(file: Path, ranks: list[Rank], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks), [r.poll() for r in ranks]
        time.sleep(0.05)


@pytest.fixture
def at_a_terminal() -> Iterator[None]:
    """Who runs the tests in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("at_a_terminal")
def test_ctrl_c_saves_and_twice_ends_at_once(tmp_path: Path) -> None:
    requests = StopRequests(tmp_path, torch.device("cpu"))
    requests.listen()
    os.kill(os.getpid(), signal.SIGINT)
    assert requests.agreed()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    requests.close()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # Of a background job, which ignores it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests.listen()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    requests.close()


@pytest.mark.usefixtures("at_a_terminal")
@pytest.mark.parametrize("how", ["file", "SIGTERM", "SIGUSR2", "SIGINT"])
@pytest.mark.parametrize("step", [2, 7])
def test_a_stopped_run_goes_on_bit_for_bit(world: list[str], tmp_path: Path, how: str, step: int) -> None:
    folder, turn = tmp_path / "run", Runner._round
    before = signal.getsignal(signal.SIGTERM)

    def asked(self: Runner) -> None:
        if self.step == step:
            os.kill(os.getpid(), getattr(signal, how)) if how != "file" else (folder / "stop").touch()
        turn(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match=f"saved at step {step + 1} of 10"):
        patch.setattr(Runner, "_round", asked)
        run(world, folder)
    assert not (folder / "stop").exists() and not (folder / "result.json").exists()
    assert signal.getsignal(signal.SIGTERM) is before
    assert_same(run(world, tmp_path / "whole"), run(world, folder, resume=True))
    rows = [[row["step"] for row in read_metrics(f / "metrics.jsonl")] for f in (folder, tmp_path / "whole")]
    assert rows[0] == rows[1]


def test_asked_in_the_last_step_it_is_done(world: list[str], tmp_path: Path) -> None:
    turn = Runner._round

    def asked(self: Runner) -> None:
        if self.step == self.total - 1:
            (tmp_path / "run" / "stop").touch()
        turn(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "_round", asked)
        run(world, tmp_path / "run")
    assert (tmp_path / "run" / "result.json").is_file() and not (tmp_path / "run" / "stop").exists()


@pytest.mark.engines
def test_one_process_is_signalled_and_all_stop_together(world: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = start_ranks(2, *world, *LONG, f"output={folder}")
    wait_for(folder / "checkpoints" / "latest", ranks)
    ranks[1].send_signal(signal.SIGUSR2)
    ended = finish(ranks, 60)
    assert [status for status, _ in ended] == [75, 75], ended
    assert "asked to stop, saved at step" in ended[0][1] and "--resume" in ended[0][1]
    step = int(ended[0][1].split("saved at step ")[1].split()[0])
    assert (folder / "checkpoints" / f"step_{step:08d}").is_dir()
    assert "/modules/extractor/backbone" in " ".join(last(folder))


@pytest.mark.engines
@pytest.mark.parametrize("how", ["done", "stopped"])
def test_what_is_left_of_the_interpreter_keeps_nobody_waiting(world: list[str], tmp_path: Path, how: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    if how == "stopped":
        (folder / "stop").touch()
    ranks = start_ranks(2, "linger", "0", *world, f"output={folder}", script="tests/faulty_train.py")
    ended = finish(ranks, 60)
    assert [status for status, _ in ended] == [0 if how == "done" else 75] * 2, ended
    assert (folder / "result.json").is_file() == (how == "done")
    assert ("asked to stop, saved at step 1" in ended[0][1]) == (how == "stopped")


@pytest.mark.engines
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others_with_one_line(world: list[str], tmp_path: Path, victim: int) -> None:
    folder = tmp_path / "run"
    ranks = start_ranks(2, "linger", "0", *world, *LONG, f"output={folder}", script="tests/faulty_train.py")
    wait_for(folder / "checkpoints" / "latest", ranks)
    ranks[victim].kill()
    killed = time.monotonic()
    status, said = finish(ranks, 60)[1 - victim]
    assert status == 1 and time.monotonic() - killed < 30
    line = next(line for line in said.splitlines() if line.startswith("error: "))
    assert "another process died, hangs or can't be reached" in line and str(folder) in line
    assert "Traceback" not in said


@pytest.mark.engines
def test_a_process_that_hangs_is_given_up(world: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = start_ranks(2, *world, *LONG, f"output={folder}", "engine.timeout=8")
    wait_for(folder / "checkpoints" / "latest", ranks)
    ranks[1].send_signal(signal.SIGSTOP)
    try:
        status = ranks[0].wait(60)
    finally:
        ranks[1].send_signal(signal.SIGCONT)
        finish(ranks[1:], 60)
    assert status == 1 and "another process died, hangs or can't be reached" in ranks[0].said()


@pytest.mark.slow
@pytest.mark.engines
def test_killed_runs_go_on_bit_for_bit(tmp_path: Path) -> None:
    """One kill of each kind but the last; `tools/kills.py --kills 50` is the long form."""
    done = subprocess.run(
        [sys.executable, "tools/kills.py", "--kills", "3", "--out", str(tmp_path), "--seed", "1"],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"\| (\w+) \| 1 \| 1 \| 0 \|", done.stdout) == ["step", "writing", "pruning"]


@pytest.mark.slow
@pytest.mark.engines
def test_a_launcher_s_restart_goes_on_bit_for_bit(world: list[str], tmp_path: Path) -> None:
    """A process is killed in the eighth step, after the checkpoint of the sixth; --resume isn't said."""
    whole = start_ranks(2, *world, f"output={tmp_path / 'whole'}")
    launch(2, "die", "7", *world, f"output={tmp_path / 'run'}", script="tests/faulty_train.py", options=MAX_RESTARTS)
    assert [status for status, _ in finish(whole)] == [0, 0]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["resumed_at"] == 6
    assert_same(last(tmp_path / "whole"), last(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.engines
def test_a_launcher_s_restart_keeps_to_a_stop(world: list[str], tmp_path: Path) -> None:
    """To the launcher status 75 is a crash. What a later one starts goes on."""
    folder, restarts = tmp_path / "run", ["--max_restarts", "2"]
    folder.mkdir()
    (folder / "stop").touch()
    said = launch(2, *world, f"output={folder}", options=restarts, expect=1).stderr
    assert said.count("asked to stop, saved at step 1 of 10") == 1
    assert said.count("was asked to stop, so the launcher's restart doesn't train; continue it by --resume") == 2
    assert not (folder / "result.json").exists() and not (folder / "stop").exists()
    launch(2, *world, f"output={folder}", "--resume", options=restarts)
    assert json.loads((folder / "result.json").read_text())["resumed_at"] == 1
    assert not (folder / "stopped").exists()


@pytest.mark.engines
@pytest.mark.parametrize("missing", [0, 1])
def test_a_process_that_never_comes_is_one_line(world: list[str], tmp_path: Path, missing: int) -> None:
    """The first keeps the address where all meet; any other is waited for there."""
    ranks = start_ranks(2, *world, f"output={tmp_path / 'run'}", "engine.timeout=5")
    ranks.pop(missing).kill()
    ((status, said),) = finish(ranks, 90)
    assert status == 2 and "Traceback" not in said, said
    line = next(line for line in said.splitlines() if line.startswith("error: "))
    assert "the 2 processes didn't meet at 127.0.0.1:" in line and " within 5 s (engine.timeout): " in line
