"""Who does what in a sweep, among processes that share a folder and may be killed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from sweep_stand_ins import until

from ppreid_dist.files import atomic
from ppreid_dist.sweep import claims as claims_module
from ppreid_dist.sweep import guard as guard_module
from ppreid_dist.sweep.claims import Claim, Claims
from ppreid_dist.sweep.guard import MARK, guarded, marked

# --- who does what ----------------------------------------------------------------------------------------------


def _take(folder: str, start: Any, taken: Any) -> None:
    start.wait()
    if Claims(Path(folder)).take("a name") is not None:
        with taken.get_lock():
            taken.value += 1


def test_of_many_processes_one_gets_the_claim(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, taken = context.Event(), context.Value("i", 0)
    tasks = [context.Process(target=_take, args=(str(tmp_path), start, taken)) for _ in range(12)]
    for task in tasks:
        task.start()
    start.set()
    for task in tasks:
        task.join()
    assert taken.value == 1
    assert list(Claims(tmp_path).held()) == ["a name"]


def test_a_claim_is_free_when_given_back_or_silent_and_its_old_owner_learns_it(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    first = claims.take("x")
    assert first is not None and claims.take("x") is None and first.beat()
    silent = time.time() - claims_module.STALE - 1
    os.utime(first.file, (silent, silent))
    second = claims.take("x")
    assert second is not None and first.outdone() and not first.beat()
    second.give_back()
    second.beat()  # a guard's, come too late
    assert claims.held() == {}
    assert claims.take("x") is not None


def test_a_guard_beats_and_ends_what_runs_when_the_claim_is_another_s(tmp_path: Path) -> None:
    """Not when its owner leaves: while it works."""
    claim = Claims(tmp_path).take("x")
    assert claim is not None
    long_ago = time.time() - 2 * claims_module.STALE
    with guarded(claim) as environment:
        os.utime(claim.file, (long_ago, long_ago))
        until(lambda: time.time() - claim.file.stat().st_mtime < claims_module.STALE, 60)
        with subprocess.Popen(["sleep", "300"], env=environment) as child:

            def taken() -> bool:
                os.utime(claim.file, (long_ago, long_ago))  # again, where it beat just then
                return Claims(tmp_path).take("x") is not None

            until(taken, 60)
            assert child.wait(timeout=120) == -signal.SIGTERM


def test_a_passing_failure_of_the_file_system_does_not_end_a_guard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = Claims(tmp_path).take("x")
    assert claim is not None
    beats: list[OSError | None] = [OSError(5, "Input/output error"), OSError(116, "Stale file handle"), None]
    monkeypatch.setattr(guard_module, "BEAT", 0.0)
    monkeypatch.setattr(guard_module.time, "sleep", lambda seconds: None)
    ended: list[str] = []
    monkeypatch.setattr(guard_module, "end", ended.append)

    def beat(self: Claim) -> bool:
        failure = beats.pop(0) if beats else None
        if failure is not None:
            raise failure
        return bool(beats)  # at last it is another's

    monkeypatch.setattr(Claim, "beat", beat)
    guard_module.main(claim, os.getpid(), guard_module._started(os.getpid()))
    assert not beats and ended == [str(claim.file)] and claim.given_back()


OWNER = """
import subprocess, sys, time
from pathlib import Path
from ppreid_dist.sweep.claims import Claims
from ppreid_dist.sweep.guard import guarded
folder = Path(sys.argv[1])
with guarded(Claims(folder).take("x")) as environment:
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
    child += " start_new_session=True); time.sleep(60)"
    subprocess.Popen([sys.executable, "-c", child], env=environment, start_new_session=True)
    (folder / "ready").touch()
    time.sleep(60)
"""


def test_what_a_killed_owner_started_ends_and_its_claim_is_free(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], cwd=ROOT)
    claims = Claims(tmp_path)
    until(lambda: (tmp_path / "ready").exists())
    mark = str(tmp_path / "x.0001")
    until(lambda: len(marked(mark)) == 2)
    owner.kill()
    owner.wait()
    assert claims.take("x") is None or not marked(mark)
    until(lambda: not claims.held())
    assert not marked(mark)


def test_a_claim_that_ends_well_leaves_nothing(tmp_path: Path) -> None:
    claim = Claims(tmp_path).take("x")
    assert claim is not None
    with guarded(claim) as environment:
        child = subprocess.Popen(["sleep", "60"], env=environment)
        until(lambda: marked(environment[MARK]) == {child.pid})
    assert child.wait(timeout=5) == -signal.SIGTERM
    assert Claims(tmp_path).held() == {}


def test_processes_of_one_number_on_two_machines_write_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers that share a folder often have the same process numbers."""
    monkeypatch.setattr("socket.gethostname", lambda: "one")
    with atomic(tmp_path / "a.json") as mine:
        monkeypatch.setattr("socket.gethostname", lambda: "two")
        with atomic(tmp_path / "a.json") as other:
            mine.write_text("mine")
            other.write_text("other")
        assert (tmp_path / "a.json").read_text() == "other"
    assert (tmp_path / "a.json").read_text() == "mine"
