"""The commands in this process, what `make demo` runs on the tiny world, and an attack that is short."""

import importlib.util
import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

from ppreid_dist.cli import main

ATTACK = [
    "attack.people=[12,0]", "attack.resamples=50", "attack.attackers=[ridge,regression,adaptive]",
    "attack.adaptive={lrs: [0.001], batch: 8, plateau: {max_steps: 4, evaluate_every: 2}}",
    "attack.curve_attackers=[ridge]", "attack.whitebox={people: 6, starts: [mean], steps: 4}",
    "attack.ridge={widths: [1, 0], ridges: [0.01, 1, 100]}",
    "attack.regression={views: [raw], widths: [8], lrs: [0.005], trial_steps: 4, batch: 8,"
    " plateau: {max_steps: 8, evaluate_every: 4}}",
    "attack.inverse={lr: 0.005, batch: 32, epochs: 1}",
]  # fmt: skip


@dataclass
class Done:
    stdout: str
    stderr: str


def ppreid(*arguments: str, expect: int = 0) -> Done:
    """A command, in this process: a new one would import for three seconds. `demo` starts the real ones."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["ppreid", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    assert (ended.value.code or 0) == expect, out.getvalue() + err.getvalue()
    return Done(out.getvalue(), err.getvalue())


def demo(world: list[str], out: Path) -> str:
    """What `make demo` runs, on the tiny world, in this process; of each command that would start several, one."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tools" / "demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    said: list[str] = []

    def call(title: str, *command: str) -> None:
        own = ["train", *command[command.index("train.py") + 1 :]] if command[0] == "accelerate" else command[1:]
        said.append(ppreid(*own).stdout)

    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(shown):
        patch.chdir(ROOT)
        patch.setattr(module, "call", call)
        patch.setattr(sys, "argv", ["demo.py", "--out", str(out), *world, *ATTACK])
        module.main()
    return "".join(said) + shown.getvalue()


def started_demo(world: list[str], out: Path) -> str:
    """The same as a user starts it."""
    done = subprocess.run(
        [sys.executable, "tools/demo.py", "--out", str(out), *world, *ATTACK],
        cwd=ROOT, capture_output=True, text=True, timeout=560,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
