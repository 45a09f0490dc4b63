"""The Slurm door: what slurm/train.sh and sweep.sh ask of Slurm, seen by stand-ins, and stops on a real cluster."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from slurm_stand_ins import Door, make_door
from sweep_stand_ins import until

from ppreid_dist.experiment import Config
from ppreid_dist.settings import load_settings

pytestmark = pytest.mark.slurm
SCRIPTS = sorted(script for script in (ROOT / "slurm").glob("*.sh") if script.name != "site.sh")  # the user's own


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return make_door(tmp_path)


# --- the scripts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_can_read_it(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run(["shellcheck", "--external-sources", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- with stand-ins for Slurm -----------------------------------------------------------------------------------


def test_each_task_is_a_rank_and_gets_every_argument_whole(door: Door) -> None:
    door.run("a run.yaml", "data.root=/with a space", "data.augment={pad: 2}", TASKS="3", STATUS="0,0,0")
    tasks = door.calls("python")
    ranks = [[call["environment"][key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] for call in tasks]
    assert sorted(ranks) == [["0", "3", "0"], ["1", "3", "1"], ["2", "3", "2"]]
    for call in tasks:
        assert call["arguments"] == [
            "train.py", "--config", "a run.yaml", "--resume", "data.root=/with a space", "data.augment={pad: 2}",
        ]  # fmt: skip


def test_the_first_node_is_the_master_and_the_port_the_job_s_own(door: Door) -> None:
    door.run("a run.yaml", STATUS="0", MASTER_ADDR="stale", MASTER_PORT="1")
    door.run("a run.yaml", STATUS="0", SLURM_JOB_ID="70002")
    assert [call["arguments"] for call in door.calls("scontrol")] == [["show", "hostnames", "whole[1-2]"]] * 2
    first, second = (call["environment"] for call in door.calls("python"))
    assert first["MASTER_ADDR"] == "first"
    assert first["MASTER_PORT"] != second["MASTER_PORT"]
    assert all(10_000 < int(seen["MASTER_PORT"]) < 32_768 for seen in (first, second))


# What sbatch --gpus-per-task=1 --cpus-per-gpu=8 leaves, and srun would read: each task would see one GPU only.
ONE_EACH = {
    "SLURM_GPUS_PER_TASK": "1", "SLURM_CPUS_PER_GPU": "8", "SLURM_TRES_PER_TASK": "gres/gpu=1",
    "SLURM_TRES_BIND": "gres/gpu:per_task:1",
}  # fmt: skip


def test_on_gpus_a_task_each_with_its_share_of_the_cpus(door: Door) -> None:
    door.run("a run.yaml", STATUS="0", SLURM_GPUS_ON_NODE="4", SLURM_CPUS_ON_NODE="34", **ONE_EACH)
    srun = door.calls("srun")[0]
    assert {"--ntasks=8", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8"} <= set(srun["arguments"])
    assert door.calls("python")[0]["environment"]["OMP_NUM_THREADS"] == "8"
    assert not ONE_EACH.keys() & srun["environment"].keys()


def test_gpus_without_cpus_are_an_error_that_says_so(door: Door) -> None:
    said = door.run("a run.yaml", SLURM_GPUS_ON_NODE="4", SLURM_CPUS_ON_NODE="1", expect=2)
    assert said == "error: 1 CPUs can't serve 4 GPUs: give --cpus-per-gpu to sbatch\n"


def test_on_cpus_the_job_s_own_tasks(door: Door) -> None:
    door.run("a run.yaml", STATUS="0", SLURM_CPUS_PER_TASK="3")
    asked = door.calls("srun")[0]["arguments"]
    assert {"--cpus-per-task=3", "--kill-on-bad-exit=1", "--mpi=none", "--export=ALL"} <= set(asked)
    assert not any(each.startswith(("--ntasks", "--gpu")) for each in asked)
    assert door.calls("python")[0]["environment"]["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("status", [0, 1, 2, 137])
def test_whatever_is_not_75_ends_the_job_with_that_status(door: Door, status: int) -> None:
    door.run("a run.yaml", TASKS="2", STATUS=f"{status},{status}", expect=status)
    assert door.requeued() == []


@pytest.mark.parametrize("status", [1, 137])
def test_a_crash_after_a_checkpoint_comes_back(door: Door, status: int) -> None:
    saves = {"SAVES": "runs/a run/checkpoints"}
    said = door.run("a run.yaml", STATUS=str(status), **saves)
    assert door.requeued() == ["70001"]
    assert f"crashed by status {status}, after a checkpoint of this start" in said
    door.run("a run.yaml", STATUS=str(status), expect=status)  # the checkpoint is now older than the start
    assert len(door.requeued()) == 1


@pytest.mark.parametrize(
    "arguments",
    [["home.yaml"], ["a run.yaml", "output=~/a run"], ["set.yaml"], ["a run.yaml", "output=${oc.env:HOME}/a run"]],
)
def test_a_checkpoint_in_the_home_folder_is_found(door: Door, arguments: list[str]) -> None:
    """No shell expands a ~ or a variable behind output=, and none one in a file."""
    (door.root / "home.yaml").write_text("output: ~/a run\n")
    (door.root / "set.yaml").write_text("output: ${oc.env:HOME}/a run\n")
    (door.root / "sitecustomize.py").write_text("import sys; print('a warning', file=sys.stderr)\n")
    home = door.root / "home"
    saves = f"{home}/a run/checkpoints"
    door.run(*arguments, STATUS="1", HOME=str(home), OUTPUT="", SAVES=saves, PYTHONPATH=str(door.root))
    assert door.requeued() == ["70001"]


def test_a_mistake_after_a_checkpoint_stays_away(door: Door) -> None:
    door.run("a run.yaml", STATUS="2", SAVES="runs/a run/checkpoints", expect=2)
    assert door.requeued() == []


def test_the_first_failure_is_the_job_s_status(door: Door) -> None:
    """srun alone says 137: the other process was killed because of the first one's failure."""
    door.run("a run.yaml", TASKS="2", STATUS="2,stay", expect=2)


def test_75_requeues_the_job(door: Door) -> None:
    said = door.run("a run.yaml", TASKS="2", STATUS="75,75", SLURM_RESTART_COUNT="3")
    assert door.requeued() == ["70001"]
    assert "saved; requeued, 4 of at most 50 times" in said


def test_the_signal_that_follows_a_requeue_is_not_passed_on(door: Door) -> None:
    """Slurm ends the script that asked for it; a scancel sent after that would stop the job's next start."""
    said = door.run("a run.yaml", STATUS="75")
    time.sleep(1)
    assert door.requeued() == ["70001"] and "saved; requeued" in said
    assert door.calls("scancel") == []


def test_a_killed_script_tells_nobody_any_more(door: Door) -> None:
    """It might be the job's next start."""
    process = door.start("a run.yaml", DEAF="20")
    until(lambda: bool(door.calls("python")))
    process.send_signal(signal.SIGTERM)
    until(lambda: bool(door.calls("scancel")))
    process.kill()
    process.wait()
    time.sleep(3.5)  # it tells every three seconds
    assert len(door.calls("scancel")) == 1
    for call in (*door.calls("srun"), *door.calls("python")):
        os.kill(call["pids"][0], signal.SIGKILL)


def test_75_is_not_requeued_without_end(door: Door) -> None:
    said = door.run("a run.yaml", STATUS="75", SLURM_RESTART_COUNT="5", REQUEUES_MAX="5", expect=75)
    assert door.requeued() == []
    assert "it was 5 times already" in said


@pytest.mark.parametrize(("state", "comes_back"), [("COMPLETING None", False), ("COMPLETING TimeLimit", True)])
def test_a_cancelled_job_stays_cancelled_and_a_late_one_comes_back(door: Door, state: str, comes_back: bool) -> None:
    door.run("a run.yaml", STATUS="75", STATE=state, expect=0 if comes_back else 75)
    assert door.requeued() == (["70001"] if comes_back else [])


def test_a_requeue_that_fails_is_said(door: Door) -> None:
    assert "scontrol requeue failed" in door.run("a run.yaml", STATUS="75", SCONTROL="1", PPREID_PAUSE="0", expect=75)


@pytest.mark.parametrize(("fails", "said"), [(2, "requeued, 1 of at most 50 times"), (9, "Slurm doesn't answer")])
def test_a_slurm_that_is_busy_is_asked_again(door: Door, fails: int, said: str) -> None:
    status = 0 if fails < 4 else 75
    how = {"STATUS": "75", "SQUEUE_FAILS": str(fails), "PPREID_PAUSE": "0"}
    assert said in door.run("a run.yaml", expect=status, **how)
    assert door.requeued() == (["70001"] if status == 0 else []) and len(door.calls("squeue")) == min(fails + 1, 4)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_reaches_all_tasks_which_leave_unhurt(door: Door, number: signal.Signals) -> None:
    process = door.start("a run.yaml", TASKS="2")
    door.until_listening(2)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, out + err
    assert door.calls("scancel")[0]["arguments"] == ["--quiet", "--signal=USR2", "70001"]
    assert door.requeued() == ["70001"]


def test_a_signal_is_repeated_until_python_listens(door: Door) -> None:
    process = door.start("a run.yaml", DEAF="1")
    until(lambda: bool(door.calls("python")))
    process.send_signal(signal.SIGUSR2)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, out + err
    assert len(door.calls("scancel")) == 2
    assert door.requeued() == ["70001"]


ARRAY = {"SLURM_ARRAY_JOB_ID": "70001", "SLURM_ARRAY_TASK_ID": "3"}


def test_an_array_gives_seeds_and_folders_of_their_own(door: Door) -> None:
    door.run("a run.yaml", "seed=9", STATUS="0", **ARRAY)
    (call,) = door.calls("python")
    assert call["arguments"][-3:] == ["seed=9", "seed=3", 'output="runs/a run/seed_3"']


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        (["model.backbone=B"], "runs/B"),  # as the configuration makes it of the command line's settings
        (["output=else where"], "else where"),
        (["output='runs: größer #2'"], "runs: größer #2"),
        ([], f"runs/{Config().model.backbone}"),  # and of the defaults
    ],
)
def test_an_array_s_folders_are_where_the_run_itself_would_be(door: Door, settings: list[str], folder: str) -> None:
    (door.root / "run.yaml").write_text("output: runs/${model.backbone}\n")
    door.run("run.yaml", *settings, STATUS="0", OUTPUT="", **ARRAY)
    (call,) = door.calls("python")
    given = call["arguments"][4:]
    assert given[:-2] == settings and given[-2] == "seed=3"
    assert load_settings(Config, door.root / "run.yaml", given).output == f"{folder}/seed_3"


def test_an_output_that_can_t_be_read_is_told_of(door: Door) -> None:
    (door.root / "unset.yaml").write_text("output: ${oc.env:NO_SUCH_VARIABLE}/run\n")
    for arguments, said in (
        (["unset.yaml"], r"error: output: .*NO_SUCH_VARIABLE.*"),
        (["a run.yaml", "output=2024: "], r"error: output: .+"),
    ):
        assert re.fullmatch(said, door.run(*arguments, expect=2, OUTPUT="").strip())
    assert door.calls("srun") == []


def test_only_the_array_s_own_task_is_requeued(door: Door) -> None:
    """The last task of an array bears the array's number, by which all its tasks would be requeued."""
    door.run("a run.yaml", STATUS="75", **ARRAY)
    assert door.requeued() == ["70001_3"]
    assert f"--jobs={door.requeued()[0]}" in door.calls("squeue")[0]["arguments"]


def test_the_site_s_file_is_sourced_however_careless(door: Door) -> None:
    (door.root / "slurm" / "site.sh").write_text(
        'false; echo "$NO_SUCH_VARIABLE"; export NCCL_SOCKET_IFNAME=ib0; MASTER_ADDR=first-ib\n'
    )
    door.run("a run.yaml", STATUS="0")
    seen = door.calls("python")[0]["environment"]
    assert (seen["NCCL_SOCKET_IFNAME"], seen["MASTER_ADDR"]) == ("ib0", "first-ib")


def test_mistakes_at_the_start_are_one_line(door: Door) -> None:
    assert door.run(expect=2).startswith("error: no configuration")
    (door.root / "train.py").unlink()
    assert door.run("a run.yaml", expect=2).startswith("error: submit it from the repository's root")
    del door.environment["SLURM_JOB_ID"]
    assert door.run("a run.yaml", expect=2).startswith("error: start it by: sbatch")


@pytest.mark.parametrize("script", ["train.sh", "sweep.sh"])
def test_what_is_missing_is_named_before_anything_starts(tmp_path: Path, script: str) -> None:
    door = make_door(tmp_path, script)
    assert door.run("nowhere.yaml", expect=2) == "error: nowhere.yaml: no such configuration file\n"
    python, bare = tmp_path / "stand ins" / "python", tmp_path / "bare"
    python.write_text("#!/bin/sh\nexit 1\n")  # of the system, without our packages
    bare.mkdir()
    (bare / "bash").symlink_to(shutil.which("bash") or "")
    for where in ({}, {"PATH": str(bare)}):
        said = door.run("a run.yaml", expect=2, **where)
        assert re.fullmatch(r"error: no Python with ppreid_dist: activate .*\n", said)
    assert door.calls("srun") == []


def test_nothing_is_left_in_the_folder_of_temporary_files(door: Door, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    door.run("a run.yaml", STATUS="75")
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {"calls"}


# --- a sweep, with stand-ins ------------------------------------------------------------------------------------


@pytest.fixture
def sweep_door(tmp_path: Path) -> Door:
    return make_door(tmp_path, "sweep.sh")


def test_ray_runs_on_every_node_and_the_driver_on_the_first(sweep_door: Door) -> None:
    job = {"SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS": "16", **ONE_EACH}
    sweep_door.run("a run.yaml", "seeds=[0, 1]", TASKS="2", STATUS="0", **job)
    asked = sweep_door.calls("srun")[0]
    assert not ONE_EACH.keys() & asked["environment"].keys()
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--gpus-per-node=4"} <= set(asked["arguments"])
    assert {"--mpi=none", "--kill-on-bad-exit=0", "--no-kill"} <= set(asked["arguments"])
    assert "SLURM_NTASKS" not in asked["environment"] or asked["environment"]["SLURM_NTASKS"] == "2"
    (driver,) = sweep_door.calls("python")
    assert driver["arguments"][:6] == ["-m", "ppreid_dist.sweep", "--config", "a run.yaml", "--resume", "--address"]
    address = driver["arguments"][6]
    assert address.startswith("first:") and driver["arguments"][7:] == ["--nodes", "2", "seeds=[0, 1]"]
    nodes = sweep_door.calls("ray")
    head, other = sorted((call["arguments"] for call in nodes), key=lambda words: "--head" not in words)
    assert f"--port={address.partition(':')[2]}" in head and f"--address={address}" in other
    assert 20_000 <= int(address.partition(":")[2]) < 32_768  # Ray's workers have 10,002 to 19,999
    assert all({"--num-cpus=8", "--num-gpus=4", "--block"} <= set(words) for words in (head, other))
    (token,) = {call["environment"]["RAY_AUTH_TOKEN"] for call in (driver, *nodes)}
    assert len(token) == 64


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_driver_s_status_is_the_job_s_and_ray_is_taken_down(sweep_door: Door, status: int) -> None:
    began = time.monotonic()
    sweep_door.run("a run.yaml", TASKS="2", STATUS=str(status), expect=status)
    assert sweep_door.requeued() == [] and time.monotonic() - began < 15
    for call in sweep_door.calls("ray"):
        assert not Path(f"/proc/{call['pids'][0]}").exists()


@pytest.mark.parametrize("saves", ["trials/a/run/checkpoints", "elsewhere"])
def test_a_sweep_that_crashes_comes_back_if_something_was_done(sweep_door: Door, saves: str) -> None:
    done = saves.startswith("trials")
    where = f"runs/a run/{saves}" if done else saves
    said = sweep_door.run("a run.yaml", TASKS="2", STATUS="134", SAVES=where, expect=0 if done else 134)
    assert sweep_door.requeued() == (["70001"] if done else [])
    assert ("crashed by status 134, after something was done" in said) == done


def test_a_sweep_whose_trials_all_failed_stays_away(sweep_door: Door) -> None:
    """It is no crash, and what failed would only fail again; the front that it wrote tells it from one."""
    done = {"SAVES": "runs/a run/trials/a/run/checkpoints", "FRONT": "runs/a run/front.json"}
    said = sweep_door.run("a run.yaml", TASKS="2", STATUS="1", expect=1, **done)
    assert sweep_door.requeued() == [] and "crashed" not in said


def test_a_sweep_s_progress_is_looked_for_where_the_sweep_itself_is(sweep_door: Door) -> None:
    (sweep_door.root / "sweep.yaml").write_text(
        "base: base.yaml\ngrid: {privacy.weight: [1]}\noutput: ${oc.env:CALLS}-${axis}\n"
    )
    where = f"{sweep_door.environment['CALLS']}-pixel/trials/a/run/checkpoints"
    sweep_door.run("sweep.yaml", "--retry", "axis=pixel", STATUS="134", OUTPUT="", SAVES=where, **ARRAY)
    assert sweep_door.requeued() == ["70001_3"]


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_sweep_that_is_told_to_stop_saves_and_comes_back(sweep_door: Door, number: signal.Signals) -> None:
    process = sweep_door.start("a run.yaml", DEAF="1")
    until(lambda: bool(sweep_door.calls("python")))
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, out + err
    assert sweep_door.requeued() == ["70001"] and "sweep.sh: saved; requeued, 1 of at most 50 times" in out


@pytest.mark.parametrize("script", ["sweep.sh", "train.sh"])
def test_a_signal_that_comes_before_anybody_can_hear_it_is_not_lost(tmp_path: Path, script: str) -> None:
    door = make_door(tmp_path, script)
    loading = tmp_path / "modules are loaded"
    (door.root / "slurm" / "site.sh").write_text(f"touch '{loading}'; sleep 1\n")
    process = door.start("a run.yaml")
    until(loading.exists)
    process.send_signal(signal.SIGUSR2)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, out + err
    assert door.requeued() == ["70001"]


def test_an_array_sweeps_without_ray_and_requeues_its_task_alone(sweep_door: Door) -> None:
    sweep_door.run("a run.yaml", "seeds=[0]", STATUS="75", **ARRAY)
    assert sweep_door.calls("srun") == [] and sweep_door.calls("ray") == []
    (driver,) = sweep_door.calls("python")
    assert driver["arguments"][4:] == ["--resume", "--backend", "array", "seeds=[0]"]
    assert sweep_door.requeued() == ["70001_3"]
