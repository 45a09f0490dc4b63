"""Stand-ins for Slurm's commands and for Python, which write down how they were called, and a door to try with them."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import ROOT

# Stands for srun, scontrol, scancel, squeue, ray and python, by its name: writes down how it was called and acts its
# part.
STAND_IN = """#!{python} -S
import json, os, signal, subprocess, sys, time

name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "python" and arguments[0] == "-c":
    if "load_settings" in arguments[1] and os.environ["OUTPUT"]:
        sys.exit(print(os.environ["OUTPUT"]))  # which spares it seconds of imports
    os.execv("{python}", ["{python}", *arguments])
seen = {{key: value for key, value in os.environ.items() if not key.startswith("BASH")}}
call = {{"name": name, "arguments": arguments, "environment": seen, "pids": [os.getpid(), os.getppid()]}}
log = os.open(os.environ["CALLS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(log, json.dumps(call).encode() + b"\\n")


def srun():
    command, count = arguments[arguments.index("bash"):], int(os.environ.get("TASKS", "1"))
    tasks = []
    for i in range(count):
        place = {{"SLURM_PROCID": str(i), "SLURM_NTASKS": str(count), "SLURM_LOCALID": str(i)}}
        tasks.append(subprocess.Popen(command, start_new_session=True, env={{**os.environ, **place}}))
    signal.signal(signal.SIGTERM, lambda *_: [os.killpg(task.pid, signal.SIGTERM) for task in tasks])
    while any(task.poll() is None for task in tasks):
        if "--kill-on-bad-exit=1" in arguments and any(task.poll() for task in tasks):
            for task in tasks:
                if task.poll() is None:
                    os.killpg(task.pid, signal.SIGKILL)
        time.sleep(0.01)
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def calls_of(name):
    lines = [line for line in open(os.environ["CALLS"]) if line.endswith("\\n")]  # the last may be half written
    return [call for call in map(json.loads, lines) if call["name"] == name]


def python():
    while "--nodes" in arguments and len(calls_of("ray")) < int(os.environ.get("TASKS", "1")):
        time.sleep(0.01)  # a sweep's driver waits for its nodes
    rank = int(os.environ.get("RANK", "0"))
    status = os.environ.get("STATUS", "stay," * (rank + 1)).split(",")[rank]
    if os.environ.get("SAVES"):
        os.makedirs(os.environ["SAVES"])
        with open(os.environ["SAVES"] + "/latest", "w") as latest:
            latest.write("step_00000003")
    if os.environ.get("FRONT"):
        open(os.environ["FRONT"], "w").close()
    if status != "stay":
        return int(status)
    heard = []
    time.sleep(float(os.environ.get("DEAF", "0")))
    signal.signal(signal.SIGUSR2, lambda *_: heard.append(True))
    open(os.environ["CALLS"] + f".listens{{rank}}", "w").close()
    deadline = time.monotonic() + 20
    while not heard:
        if time.monotonic() > deadline:
            return 99
        time.sleep(0.01)
    time.sleep(0.3 * rank)  # the last to leave isn't killed
    return 75


def scancel():
    for call in calls_of("python"):
        for pid in call["pids"]:  # Slurm signals the task's shell as well
            try:
                os.kill(pid, signal.SIGUSR2)
            except ProcessLookupError:
                pass
    return 0


def ray():
    time.sleep(20)
    return 98


def squeue():
    if len(calls_of("squeue")) <= int(os.environ.get("SQUEUE_FAILS", "0")):
        print("slurm_load_jobs error: Socket timed out on send/recv operation", file=sys.stderr)
        return 1
    print(os.environ.get("STATE", "RUNNING None"))
    return 0


def scontrol():
    if arguments[:2] == ["show", "hostnames"]:
        os.write(1, b"first\\nsecond\\n")  # at once: the reader leaves after the first line
    if arguments[0] == "requeue":
        os.kill(os.getppid(), signal.SIGTERM)  # Slurm ends the job's script, which is still waiting for this answer
        return int(os.environ.get("SCONTROL", "0"))
    return 0


sys.exit(globals()[name]())
"""


@dataclass
class Door:
    """A repository of nothing but the Slurm door, in a folder with a space in its name, and stand-ins for Slurm."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    script: str = "train.sh"

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", f"slurm/{self.script}", *arguments], cwd=self.root, env={**self.environment, **environment},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: str, expect: int = 0, **environment: str) -> str:
        """What it says."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=30)
        assert process.returncode == expect, out + err
        return out + err

    def calls(self, name: str) -> list[dict[str, Any]]:
        log = Path(self.environment["CALLS"])
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # the last may be half written
        return [call for call in map(json.loads, whole) if call["name"] == name]

    def requeued(self) -> list[str]:
        """The jobs that were asked to be requeued."""
        return [call["arguments"][1] for call in self.calls("scontrol") if call["arguments"][0] == "requeue"]

    def until_listening(self, ranks: int) -> None:
        deadline = time.monotonic() + 20
        while not all(Path(f"{self.environment['CALLS']}.listens{rank}").exists() for rank in range(ranks)):
            assert time.monotonic() < deadline, "the tasks did not start"
            time.sleep(0.01)


def make_door(folder: Path, script: str = "train.sh") -> Door:
    """A job on two nodes, as the script finds itself in it."""
    root, programs = folder / "the repository", folder / "stand ins"
    root.mkdir()
    shutil.copytree(ROOT / "slurm", root / "slurm", ignore=shutil.ignore_patterns("site.sh"))
    (root / "train.py").touch()
    (root / "a run.yaml").write_text("output: runs/a run\n")
    programs.mkdir()
    for name in ("srun", "scontrol", "scancel", "squeue", "python", "ray"):
        (programs / name).write_text(STAND_IN.format(python=sys.executable))
        (programs / name).chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "OMP_NUM", "MASTER"))}
    job = {
        "SLURM_JOB_ID": "70001",
        "SLURM_JOB_NODELIST": "whole[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "8",
    }
    # Where they take the output to be; empty, they ask the package.
    asked = {"OUTPUT": "runs/a run"}
    calls = {"CALLS": str(folder / "calls"), "TMPDIR": str(folder), "PATH": f"{programs}:{kept['PATH']}"}
    return Door(root, {**kept, **job, **asked, **calls}, script)
