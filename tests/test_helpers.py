"""Several processes that make attackers' trainings together: each is made once, and nobody waits for the dead."""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sweep_stand_ins import until

from ppreid_dist.attacks.base import Outcome
from ppreid_dist.attacks.kept import Kept, digest
from ppreid_dist.attacks.work import Training, Work
from ppreid_dist.helpers import helping

KEYS = [digest(number) for number in range(6)]
SHARED = digest("what some of them need")


def work_in(folder: Path, found: Callable[[str], None] = lambda line: None) -> Work:
    return Work(Kept(folder), axes=["pixel"], progress=lambda line: None, found=found)


def outcome(value: float) -> Outcome:
    scores = {"pixel": np.full(3, value)}
    numbers = dict.fromkeys(("l1", "psnr", "kid", "best", "seconds"), value)
    return Outcome(scores=scores, shown=torch.zeros(1, 3, 2, 2, dtype=torch.uint8), **numbers)


def make(folder: Path, number: int) -> Outcome:
    """Takes a while, and leaves a line."""
    with (folder / "made.txt").open("a") as log:
        log.write(f"{number} {os.getpid()}\n")
    time.sleep(0.3)
    return outcome(float(number))


def trainings(folder: Path) -> list[Training]:
    return [
        Training(label=f"{i}", key=key, make=partial(make, folder, i), needs=[SHARED] if i < 3 else [])
        for i, key in enumerate(KEYS)
    ]


def help_with(folder: Path) -> None:
    (folder / "helper").touch()
    work_in(folder).carry_out(trainings(folder))


def fail(folder: Path) -> None:
    (folder / "helper").touch()
    raise ValueError("no such thing")


def made(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "made.txt").read_text().splitlines()]


def test_each_training_is_made_by_one_process_and_known_to_all(tmp_path: Path) -> None:
    said: list[str] = []
    work = work_in(tmp_path, said.append)
    with helping(1, partial(help_with, tmp_path)):
        until((tmp_path / "helper").exists, seconds=60)
        work.carry_out(trainings(tmp_path))
    assert sorted(number for number, _ in made(tmp_path)) == [str(i) for i in range(6)]
    assert len({process for _, process in made(tmp_path)}) == 2
    assert [work.outcome(training).l1 for training in trainings(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert len(said) == 6 and not any("kept" in line for line in said)
    work_in(tmp_path, said.append).carry_out(trainings(tmp_path))
    assert len(made(tmp_path)) == 6 and all("kept from before" in line for line in said[6:])


def holder(folder: Path, key: str) -> subprocess.Popen[bytes]:
    """Another process that makes ``key`` and never ends."""
    script = (
        "import sys, time, pathlib; from ppreid_dist.attacks.kept import Kept\n"
        "with Kept(pathlib.Path(sys.argv[1])).alone(sys.argv[2]) as mine:\n    print(mine, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(folder), key], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"True\n"
    return process


def test_a_lock_outlives_what_else_opened_the_folder(tmp_path: Path) -> None:
    with Kept(tmp_path).alone(KEYS[0]) as mine:
        assert mine
        assert not Kept(tmp_path).made_elsewhere(KEYS[1:])
        gc.collect()
        script = (
            "import sys, pathlib; from ppreid_dist.attacks.kept import Kept\n"
            "with Kept(pathlib.Path(sys.argv[1])).alone(sys.argv[2]) as mine: print(mine)"
        )
        told = subprocess.run([sys.executable, "-c", script, str(tmp_path), KEYS[0]], capture_output=True, text=True)
    assert told.stdout == "False\n"


def test_what_another_makes_is_left_to_it_until_it_dies(tmp_path: Path) -> None:
    kept, another = Kept(tmp_path), holder(tmp_path, KEYS[0])
    with kept.alone(KEYS[0]) as mine, kept.alone(KEYS[1]) as other:
        assert (mine, other) == (False, True)
    assert kept.made_elsewhere([KEYS[1], KEYS[0]]) and not kept.made_elsewhere([KEYS[1]])

    def die(line: str) -> None:  # heard when nothing is left to do but to wait
        assert line == "waiting for trainings that other processes make: 1"
        assert sorted(number for number, _ in made(tmp_path)) == ["1", "2", "3", "4", "5"]
        another.kill()
        another.wait()

    work = work_in(tmp_path)
    work.progress = die
    work.carry_out(trainings(tmp_path))
    assert [number for number, _ in made(tmp_path)][5:] == ["0"]


def test_what_waits_for_something_another_makes_comes_later(tmp_path: Path) -> None:
    another = holder(tmp_path, SHARED)

    def die(line: str) -> None:
        assert sorted(number for number, _ in made(tmp_path)) == ["3", "4", "5"]
        another.kill()
        another.wait()

    work = work_in(tmp_path)
    work.progress = die
    work.carry_out(trainings(tmp_path))
    assert sorted(number for number, _ in made(tmp_path)[3:]) == ["0", "1", "2"]


def test_a_helper_that_fails_says_why_and_its_work_is_done_by_the_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with helping(1, partial(fail, tmp_path)):
        until((tmp_path / "helper").exists, seconds=60)
        work_in(tmp_path).carry_out(trainings(tmp_path))
    assert len(made(tmp_path)) == 6
    assert "helper 1 ended: ValueError: no such thing" in capfd.readouterr().err


def wait_for_ever(folder: Path) -> None:
    (folder / "pid.part").write_text(str(os.getpid()))
    (folder / "pid.part").rename(folder / "pid")
    time.sleep(600)


def test_helpers_end_with_the_first_process_however_that_ends(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib; from functools import partial; from ppreid_dist.helpers import helping\n"
        "from test_helpers import wait_for_ever\n"
        "with helping(1, partial(wait_for_ever, pathlib.Path(sys.argv[1]))):\n    time.sleep(600)"
    )
    first = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parent)
    try:
        until((tmp_path / "pid").exists, seconds=60)
    finally:
        first.kill()
        first.wait()
    helper = Path("/proc") / (tmp_path / "pid").read_text()
    until(lambda: not helper.exists() or "\nState:\tZ" in (helper / "status").read_text())
