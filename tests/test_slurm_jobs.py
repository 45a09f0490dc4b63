"""Jobs and sweeps on a real Slurm of two nodes: preempted, killed, cancelled, and back with the same weights."""

import contextlib
import json
import shutil
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
from sweep_stand_ins import HERE, STEPS
from training_runs import assert_same, last

from ppreid_dist.attacks.kept import source_digest

pytestmark = pytest.mark.slurm


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


@pytest.mark.slow
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
pathlib.Path(f"starts{os.environ['RANK']}").touch()
time.sleep(float(os.environ.get("DEAF", "0")))
if sys.argv[-1] == f"a mistake on {os.environ['RANK']}":
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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_on_one_node_ends_the_job_by_2(slurm: Cluster, listener: Path, rank: int) -> None:
    """The other, told to end by srun, saves; and of the nodes only the first has the batch script's /tmp."""
    task = listener / "slurm" / "task.sh"
    own = "[[ $SLURM_NODEID == 0 ]] || PPREID_STATUS=/nowhere/status\nexport RANK="
    task.write_text(task.read_text().replace("export RANK=", own, 1))
    job = submit(slurm, listener, f"a mistake on {rank}")
    assert slurm.ended(job) == "FAILED"
    assert (slurm.field(job, "ExitCode"), slurm.field(job, "Restarts")) == ("2:0", "0")


def test_a_cancelled_job_saves_and_stays_away(slurm: Cluster, listener: Path) -> None:
    job = submit(slurm, listener)
    until(lambda: len(list(listener.glob("listens*"))) == 2, listener)
    slurm.run("scancel", job)
    assert slurm.ended(job) == "CANCELLED"
    assert "train.sh: saved; not requeued, since Slurm is ending the job" in (listener / "job.log").read_text()
    assert slurm.field(job, "Restarts") == "0"


def test_a_job_that_is_preempted_while_it_starts_comes_back(slurm: Cluster, listener: Path) -> None:
    """Slurm gives it a minute, and sends TERM at once."""
    site = listener / "slurm" / "site.sh"
    site.write_text(site.read_text() + "export DEAF=3\n")
    job = submit(slurm, listener)
    until(lambda: len(list(listener.glob("starts*"))) == 2, listener)
    urgent = slurm.run(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    ).strip()
    until(lambda: slurm.field(job, "Restarts") != "0", listener)
    assert slurm.ended(urgent) == "COMPLETED"
    slurm.run("scancel", job)
    assert "train.sh: saved; " in (listener / "job.log").read_text()


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


# --- sweeps --------------------------------------------------------------------------------------


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
        source = f", {source_digest()!r}" if name == "ppreid" else ""
        text = text.replace(line, f"    {name}: tuple[str, ...] = (sys.executable, {HERE!r}, {name!r}{source})")
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


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.skipif(find_spec("ray") is None, reason="the extra 'sweep' is not installed")
def test_a_node_of_ray_s_dies_and_the_sweep_goes_on_without_it(
    slurm: Cluster, repository: Path, world: list[str], tmp_path: Path
) -> None:
    site = repository / "slurm" / "site.sh"
    site.write_text(site.read_text() + "export STEP_SECONDS=1.5\n")
    job = submit_sweep(slurm, repository, world, tmp_path, "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2")
    out = tmp_path / "out"
    until(lambda: any(out.glob("trials/*/run/steps.txt")), repository, 180)
    raylet_of_second_node(slurm).kill()
    assert slurm.ended(job, within=240) == "COMPLETED", slurm.logs()
    assert_swept(repository, out)


def raylet_of_second_node(slurm: Cluster) -> psutil.Process:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            its = process.environ() if process.name() == "raylet" else {}
            if (its.get("SLURM_CONF"), its.get("SLURM_PROCID")) == (str(slurm.folder / "slurm.conf"), "1"):
                return process
    raise AssertionError("no such process")
