"""The Slurm door: what slurm/train.sh and sweep.sh ask of Slurm, seen by stand-ins, and stops on a real cluster."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from ranks import finish, start_ranks
from slurm_cluster import Cluster, cluster, missing
from slurm_stand_ins import Door, make_door
from sweep_stand_ins import HERE, STEPS
from test_training import assert_same, last

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


def test_on_gpus_a_task_each_with_its_share_of_the_cpus(door: Door) -> None:
    asked = {"SLURM_GPUS_PER_TASK": "1", "SLURM_CPUS_PER_GPU": "8"}
    door.run("a run.yaml", STATUS="0", SLURM_GPUS_ON_NODE="4", SLURM_CPUS_ON_NODE="34", **asked)
    srun = door.calls("srun")[0]
    assert {"--ntasks=8", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8"} <= set(srun["arguments"])
    assert door.calls("python")[0]["environment"]["OMP_NUM_THREADS"] == "8"
    assert not asked.keys() & srun["environment"].keys()  # by the first, each would see one GPU only


def test_gpus_without_cpus_are_an_error_that_says_so(door: Door) -> None:
    said = door.run("a run.yaml", SLURM_GPUS_ON_NODE="4", SLURM_CPUS_ON_NODE="1", expect=2)
    assert said == "error: 1 CPUs can't serve 4 GPUs: give --cpus-per-gpu to sbatch\n"


def test_on_cpus_the_job_s_own_tasks(door: Door) -> None:
    door.run("a run.yaml", STATUS="0", SLURM_CPUS_PER_TASK="3")
    asked = door.calls("srun")[0]["arguments"]
    assert "--cpus-per-task=3" in asked and "--kill-on-bad-exit=1" in asked and "--export=ALL" in asked
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


def test_75_is_not_requeued_without_end(door: Door) -> None:
    said = door.run("a run.yaml", STATUS="75", SLURM_RESTART_COUNT="5", REQUEUES_MAX="5", expect=75)
    assert door.requeued() == []
    assert "it was 5 times already" in said


@pytest.mark.parametrize(("state", "comes_back"), [("COMPLETING None", False), ("COMPLETING TimeLimit", True)])
def test_a_cancelled_job_stays_cancelled_and_a_late_one_comes_back(door: Door, state: str, comes_back: bool) -> None:
    door.run("a run.yaml", STATUS="75", STATE=state, expect=0 if comes_back else 75)
    assert door.requeued() == (["70001"] if comes_back else [])


def test_a_requeue_that_fails_is_said(door: Door) -> None:
    assert "scontrol requeue failed" in door.run("a run.yaml", STATUS="75", SCONTROL="1", expect=75)


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
    while not door.calls("python"):
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR2)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, out + err
    assert len(door.calls("scancel")) == 2
    assert door.requeued() == ["70001"]


ARRAY = {"SLURM_ARRAY_JOB_ID": "70001", "SLURM_ARRAY_TASK_ID": "3"}


def test_an_array_gives_seeds_and_folders_of_their_own(door: Door) -> None:
    door.run("a run.yaml", "seed=9", STATUS="0", **ARRAY)
    door.run("a run.yaml", "output=else where", STATUS="0", **ARRAY)
    first, second = (call["arguments"] for call in door.calls("python"))
    assert first[-3:] == ["seed=9", "seed=3", "output=runs/a run/seed_3"]
    assert second[-2:] == ["seed=3", "output=else where/seed_3"]


@pytest.mark.parametrize("array", [{}, ARRAY])
def test_a_job_without_an_output_is_an_error(door: Door, array: dict[str, str]) -> None:
    (door.root / "none.yaml").write_text("seed: 1\n")
    assert "error: none.yaml: no output in it" in door.run("none.yaml", expect=2, **array)
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


def test_nothing_is_left_in_the_folder_of_temporary_files(door: Door, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    door.run("a run.yaml", STATUS="75")
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {"calls"}


# --- a sweep, with stand-ins ------------------------------------------------------------------------------------


@pytest.fixture
def sweep_door(tmp_path: Path) -> Door:
    return make_door(tmp_path, "sweep.sh")


def test_ray_runs_on_every_node_and_the_driver_on_the_first(sweep_door: Door) -> None:
    sweep_door.run("a run.yaml", "seeds=[0, 1]", TASKS="2", STATUS="0", SLURM_GPUS_ON_NODE="4", SLURM_NTASKS="16")
    asked = sweep_door.calls("srun")[0]
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--gpus-per-node=4"} <= set(asked["arguments"])
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


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_sweep_that_is_told_to_stop_saves_and_comes_back(sweep_door: Door, number: signal.Signals) -> None:
    process = sweep_door.start("a run.yaml", DEAF="1")
    while not sweep_door.calls("python"):
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, out + err
    assert sweep_door.requeued() == ["70001"] and "sweep.sh: saved; requeued, 1 of at most 50 times" in out


def test_an_array_sweeps_without_ray_and_requeues_its_task_alone(sweep_door: Door) -> None:
    sweep_door.run("a run.yaml", "seeds=[0]", STATUS="75", **ARRAY)
    assert sweep_door.calls("srun") == [] and sweep_door.calls("ray") == []
    (driver,) = sweep_door.calls("python")
    assert driver["arguments"][4:] == ["--resume", "--backend", "array", "seeds=[0]"]
    assert sweep_door.requeued() == ["70001_3"]


# --- with a real one --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with cluster() as made:
        yield made


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """What a user submits from: the scripts, a site's file, a configuration."""
    root = tmp_path / "the repository"
    shutil.copytree(ROOT / "slurm", root / "slurm", ignore=shutil.ignore_patterns("site.sh"))
    shutil.copy(ROOT / "train.py", root)
    (root / "run.yaml").write_text("seed: 3\noutput: runs/a run\n")
    (root / "slurm" / "site.sh").write_text(
        f"export PYTHONPATH='{ROOT}' PATH='{Path(sys.executable).parent}':$PATH OMP_NUM_THREADS=1\n"
        "MASTER_ADDR=127.0.0.1\n"  # the nodes' names are only Slurm's
    )
    return root


def submit(slurm: Cluster, repository: Path, *arguments: str, options: tuple[str, ...] = ("--nodes=2",)) -> str:
    """The job's number; two nodes with a process each, unless ``options`` say something else."""
    command = ["sbatch", "--parsable", "--output=job.log", *options, "slurm/train.sh", "run.yaml", *arguments]
    return slurm.run(*command, cwd=repository).strip()


def until(holds: Callable[[], bool], repository: Path, seconds: float = 60) -> None:
    deadline, log = time.monotonic() + seconds, repository / "job.log"
    while not holds():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "not started"
        time.sleep(0.05)


@pytest.mark.faults
@pytest.mark.engines
def test_a_preempted_job_saves_comes_back_and_ends_with_the_same_weights(
    slurm: Cluster, repository: Path, world: list[str], tmp_path: Path
) -> None:
    settings = [*world, "training.images=480"]
    job = submit(slurm, repository, *settings)
    run, in_the_game = repository / "runs" / "a run", "step_00000012"
    until(lambda: any(step.name >= in_the_game for step in run.glob("checkpoints/step_*")), repository)
    slurm.run("scancel", "--signal=USR2", "--batch", job)
    whole = finish(start_ranks(2, *settings, "seed=3", f"output={tmp_path / 'whole'}"))  # meanwhile
    assert [status for status, _ in whole] == [0, 0], whole
    assert slurm.ended(job) == "COMPLETED"
    said = (repository / "job.log").read_text()
    order = ["saved at step", "train.sh: saved; requeued, 1 of at most 50 times", "continued at step", "30 steps"]
    places = [said.index(each) for each in order]
    assert places == sorted(places), said
    assert said.count("train.sh: saved; requeued") == 1, said
    assert json.loads((run / "result.json").read_text())["processes"] == 2
    assert_same(last(tmp_path / "whole"), last(run))


def process_on_second_node(repository: Path) -> psutil.Process:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            here = process.name().startswith("python") and process.cwd() == str(repository)
            if here and process.environ().get("RANK") == "1":
                return process
    raise AssertionError("no such process")


@pytest.mark.faults
def test_a_killed_process_brings_the_job_back(slurm: Cluster, repository: Path, world: list[str]) -> None:
    """Of two nodes one loses its process after a checkpoint: the other one leaves, and both go on from it."""
    job = submit(slurm, repository, *world, "training.images=800", "privacy.weight=0")
    run = repository / "runs" / "a run"
    until(lambda: (run / "checkpoints" / "latest").exists(), repository)
    process_on_second_node(repository).kill()
    assert slurm.ended(job) == "COMPLETED", (repository / "job.log").read_text()
    said = (repository / "job.log").read_text()
    assert "after a checkpoint of this start" in said and "continued at step" in said
    # Slurm's own count is more where it had to launch the job again, as on a busy machine.
    assert said.count("train.sh: saved; requeued") == 1, said


@pytest.mark.parametrize(
    "options",
    [
        ("--gpus-per-node=2", "--cpus-per-gpu=1"),
        ("--ntasks-per-node=2", "--gpus-per-task=1"),
        ("--gpus=4", "--ntasks-per-gpu=1"),
        ("--gres=gpu:2", "--cpus-per-task=2", "--export=NONE"),
    ],
    ids=lambda options: options[0],
)
def test_however_gpus_are_asked_for_each_has_a_process_that_sees_all_of_its_node(
    slurm: Cluster, repository: Path, options: tuple[str, ...]
) -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "SLURMD_NODENAME"]
    (repository / "train.py").write_text(
        f"import os, pathlib; seen = ' '.join(os.environ[name] for name in {names})\n"
        "pathlib.Path('rank' + os.environ['RANK']).write_text(seen)\n"
    )
    job = submit(slurm, repository, options=("--nodes=2", *options))
    assert slurm.ended(job) == "COMPLETED", (repository / "job.log").read_text()
    seen = [(repository / f"rank{rank}").read_text() for rank in range(4)]
    assert seen == ["0 4 0 0,1 node1", "1 4 1 0,1 node1", "2 4 0 0,1 node2", "3 4 1 0,1 node2"]


# The processes of a training as far as Slurm sees them: they say that they listen, and save when they are told to.
LISTENER = """
import os, pathlib, signal, sys, time
if sys.argv[-1] == "a mistake" and os.environ["RANK"] == "0":
    sys.exit(2)
told = []
signal.signal(signal.SIGUSR2, lambda *_: told.append(True))
signal.signal(signal.SIGTERM, lambda *_: told.append(True))
pathlib.Path(f"listens{os.environ['RANK']}-" + os.environ.get("SLURM_ARRAY_TASK_ID", "")).touch()
while not told:
    time.sleep(0.05)
time.sleep(int(os.environ["RANK"]))
sys.exit(75)
"""


@pytest.fixture
def listener(repository: Path) -> Path:
    (repository / "train.py").write_text(LISTENER)
    return repository


def test_a_mistake_on_one_node_ends_the_job_by_2(slurm: Cluster, listener: Path) -> None:
    job = submit(slurm, listener, "a mistake")
    assert slurm.ended(job) == "FAILED"
    assert (slurm.field(job, "ExitCode"), slurm.field(job, "Restarts")) == ("2:0", "0")


def test_a_cancelled_job_saves_and_stays_away(slurm: Cluster, listener: Path) -> None:
    job = submit(slurm, listener)
    until(lambda: len(list(listener.glob("listens*"))) == 2, listener)
    slurm.run("scancel", job)
    assert slurm.ended(job) == "CANCELLED"
    assert "train.sh: saved; not requeued, since Slurm is ending the job" in (listener / "job.log").read_text()
    assert slurm.field(job, "Restarts") == "0"


def test_a_seed_of_an_array_is_preempted_alone(slurm: Cluster, listener: Path) -> None:
    array = submit(slurm, listener, options=("--array=0-1", "--ntasks=1"))
    until(lambda: len(list(listener.glob("listens*"))) == 2, listener)
    ids = {seed: slurm.field(f"{array}_{seed}", "JobId") for seed in (0, 1)}
    risky = next(seed for seed, number in ids.items() if number == array)  # its number is the array's
    slurm.run("scancel", "--signal=USR2", "--batch", f"{array}_{risky}")
    until(lambda: slurm.field(f"{array}_{risky}", "Restarts") != "0", listener)
    assert slurm.field(f"{array}_{1 - risky}", "JobState") == "RUNNING"
    assert slurm.field(f"{array}_{1 - risky}", "Restarts") == "0"
    slurm.run("scancel", array)


# --- a sweep on a real one --------------------------------------------------------------------------------------


def submit_sweep(slurm: Cluster, repository: Path, world: list[str], tmp_path: Path, *options: str) -> str:
    """A sweep of two weights, whose trainings and attacks are stand-ins'."""
    (repository / "base.yaml").write_text("seed: 0\n")
    asked = {"output": str(tmp_path / "out"), "base": "base.yaml", "settings": world}
    (repository / "sweep.yaml").write_text(json.dumps({**asked, "grid": {"privacy.weight": [1, 3]}}))
    package = tmp_path / "with stand-ins" / "ppreid_dist" / "sweep"
    shutil.copytree(ROOT / "ppreid_dist", package.parent, ignore=shutil.ignore_patterns("__pycache__"))
    programs = package / "programs.py"
    text = programs.read_text()
    for name, words in (("launch", '"-m", "accelerate.commands.launch"'), ("ppreid", None)):
        line = next(line for line in text.splitlines() if line.startswith(f"    {name}: tuple"))
        assert words is None or words in line
        text = text.replace(line, f"    {name}: tuple[str, ...] = (sys.executable, {HERE!r}, {name!r})")
    programs.write_text(text)
    site = repository / "slurm" / "site.sh"
    site.write_text(site.read_text() + f"export PYTHONPATH='{package.parents[1]}'\n")
    command = ["sbatch", "--parsable", "--output=job-%a.log", *options, "slurm/sweep.sh", "sweep.yaml"]
    return slurm.run(*command, cwd=repository).strip()


def assert_swept(repository: Path, out: Path) -> None:
    said = "".join(log.read_text() for log in repository.glob("job-*.log"))
    assert (out / "front.json").is_file(), said
    front = json.loads((out / "front.json").read_text())
    assert front["complete"] and [row["status"] for row in front["trials"]] == ["done", "done"], said
    runs = [*out.glob("shared/*/steps.txt"), *out.glob("trials/*/run/steps.txt")]
    assert len(runs) == 4
    assert all([int(line) for line in run.read_text().split()] == list(range(STEPS)) for run in runs), said


@pytest.mark.slow
def test_an_array_of_two_nodes_sweeps(slurm: Cluster, repository: Path, world: list[str], tmp_path: Path) -> None:
    job = submit_sweep(slurm, repository, world, tmp_path, "--array=0-1", "--ntasks=1")
    for task in range(2):
        assert slurm.ended(f"{job}_{task}", within=120) == "COMPLETED"
    assert_swept(repository, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="the extra 'sweep' is not installed")
def test_ray_over_two_nodes_sweeps_is_preempted_and_comes_back(
    slurm: Cluster, repository: Path, world: list[str], tmp_path: Path
) -> None:
    job = submit_sweep(slurm, repository, world, tmp_path, "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2")
    out = tmp_path / "out"
    until(lambda: any(out.glob("trials/*/run/steps.txt")), repository, 180)
    slurm.run("scancel", "--signal=USR2", "--batch", job)
    until(lambda: slurm.field(job, "Restarts") != "0", repository, 120)
    assert slurm.ended(job, within=180) == "COMPLETED", slurm.logs()
    assert_swept(repository, out)
