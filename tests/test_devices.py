"""Everything from training to attack runs on a device that isn't the host; a pretended one, where there is no GPU."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

ATTACKERS = ["retrieval", "ridge", "regression", "averaged", "isomap", "unfolded", "adaptive", "gan"]
if find_spec("diffusers"):
    ATTACKERS.append("diffusion")
SHORT = "batch: 8, plateau: {max_steps: 2, evaluate_every: 1}"
DECODER = f"widths: [8], lrs: [0.005], trial_steps: 1, {SHORT}"
ATTACK = [
    f"attack.attackers=[{','.join(ATTACKERS)}]", "attack.curve_attackers=[ridge]", "attack.people=[0]",
    "attack.resamples=50", "attack.ridge={widths: [1, 0], ridges: [0.01, 1]}",
    "attack.inverse={lr: 0.005, batch: 32, epochs: 1}", f"attack.regression={{{DECODER}}}",
    f"attack.averaged={{{DECODER}, agreement: [1]}}", f"attack.isomap={{{DECODER}, neighbours: [5], coordinates: [4]}}",
    f"attack.unfolded={{{DECODER}, agreement: [1], neighbours: [5], coordinates: [4], layout_steps: 3}}",
    f"attack.adaptive={{lrs: [0.005], {SHORT}}}",
    f"attack.gan={{critic: {{width: 8}}, plateau: {{max_steps: 2, evaluate_every: 1}}, start: {{{DECODER}}}}}",
    f"attack.diffusion={{{DECODER}, looks: 1, samples: 2, sampling_steps: 2}}",
    "attack.whitebox={people: 2, starts: [mean, ridge], steps: 2}",
]  # fmt: skip


def on_the_device(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tests/pretended_gpu.py", str(folder), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_nothing_mixes_the_host_s_tensors_with_the_device_s(world: list[str], tmp_path: Path) -> None:
    backbone = next(word for word in world if word.startswith("model.backbone=")).split("=")[1]
    recogniser = f"attack.recogniser={{backbone: {backbone}, epochs: 1}}"
    done = on_the_device(tmp_path, *world, "training.images=96", "probe.every=5", recogniser, *ATTACK)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.fullmatch(r"(\d+) operations", done.stdout.strip().splitlines()[-1])
    assert found and int(found[1]) > 20_000
    for name in ATTACKERS:
        assert f"{name}, 24 people, protected:" in done.stderr + done.stdout


def test_what_mixes_them_fails(world: list[str], tmp_path: Path) -> None:
    done = on_the_device(tmp_path, "--mixed", *world, "training.images=32", "probe.every=0", "reversal.warm_steps=1")
    assert done.returncode != 0 and "the host's tensors beside the device's" in done.stderr
