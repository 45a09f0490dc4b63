"""tools/bench.py: what it says of each part, in JSON and in Markdown. How fast anything is is not tested."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import bench_network
import energy
import pytest
import torch
from bench_rank import Gallery, compiled, counting, sorting

from ppreid_dist.experiment import Config
from ppreid_dist.models.extractor import Extractor
from ppreid_dist.settings import load_settings

TOOL = Path(__file__).resolve().parents[1] / "tools" / "bench.py"
PARTS = {
    "rank": ["--size", "small", "--dim", "16", "--twin-queries", "50"],
    "kernels": ["--only", "nearer"],
    "step": ["privacy.ridge.strangers=16", "privacy.every=2", "--steps", "8", "--count", "--only", "plain", "ridge"],
    "shards": ["--people", "20", "--stored", "32", "16", "--planned", "2000"],
    "scaling": ["--processes", "1", "2", "--steps", "6", "--only", "plain"],
    "input": ["--height", "32", "--width", "16", "--stored", "32", "16"],
}


@pytest.mark.parametrize(
    "part", [name if name == "rank" else pytest.param(name, marks=pytest.mark.slow) for name in PARTS]
)
def test_every_part_gives_seconds_memory_and_ratios(part: str, tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, TOOL, part, *PARTS[part], "--repeats", "1", "--threads", "1", "--json", tmp_path / "out.json"],
        capture_output=True, text=True, timeout=200, cwd=TOOL.parents[1],
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["part"] == part and found["machine"]["torch"] == torch.__version__
    ran = [row for row in found["rows"] if "chosen" not in row or "seconds" in row]  # others can't run here
    assert all(row["chosen"] for row in found["rows"] if row not in ran)  # and say why
    assert len(ran) >= 2 and all(row["seconds"] > 0 and row["peak_mb"] >= 0 for row in ran)
    if part == "step":
        plain, game = found["rows"]
        assert 0 < plain["gflop"] < game["gflop"] and 0 < plain["share"] < 1.5
        assert plain["counted_overhead"] == 1 and game["counted_overhead"] == game["gflop"] / plain["gflop"]
    compared = [row for row in found["rows"] if "ratio" in row]
    twin = next(row for row in compared if row["ratio"] == 1)
    for row in compared:
        assert row["ratio"] == pytest.approx(twin["seconds"] / row["seconds"])
    lines = [line for line in said.stdout.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(found["rows"]) and len({line.count("|") for line in lines}) == 1


def test_energy_of_the_packages_where_it_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert energy.joules() is None and energy.spent(None, 3) == {}
    # Two packages; a core's share of the first is in it already, and the platform's holds both.
    levels = {"0": ("package-0", 5), "1": ("package-1", 7), "0:0": ("core", 1), "2": ("psys", 30)}
    for number, (name, level) in levels.items():
        zone = tmp_path / f"intel-rapl:{number}"
        zone.mkdir()
        (zone / "name").write_text(f"{name}\n")
        (zone / "energy_uj").write_text(f"{level * 1_000_000}\n")
    assert energy.joules() == 12
    assert energy.spent(3.0, 3) == {"joules": 3.0}
    assert energy.spent(20.0, 3) == {}  # begun anew


def test_what_passes_between_many_gpus_by_hand() -> None:
    """Bytes by the ring, latency by the tree; alone, nothing passes; the game adds its players."""
    parser = argparse.ArgumentParser()
    bench_network.arguments(parser)
    plain = ["privacy.weight=0", "--config", "configs/demo.yaml", "--gpus", "1", "8", "64"]
    alone, node, nodes = bench_network.measure(parser.parse_args(plain))
    config = load_settings(Config, "configs/demo.yaml", [])
    numbers = sum(p.numel() for p in Extractor(config.model, 1000).parameters() if p.requires_grad)
    assert alone["efficiency"] == 1 and alone["gradients_ms"] == 0
    assert node["gradients_ms"] == pytest.approx(1e3 * (2 * 7 / 8 * 4 * numbers / 350e9 + 20e-6))
    assert nodes["gradients_ms"] == pytest.approx(1e3 * (2 * 63 / 64 * 4 * numbers / 45e9 + 20e-6 + 2 * 3 * 5e-6))
    gan = ["privacy.adversaries=[{kind: gan}]", "--config", "configs/demo.yaml", "--gpus", "64"]
    (game,) = bench_network.measure(parser.parse_args(gan))
    assert game["reversal_ms"] > 0 and game["efficiency"] < nodes["efficiency"] < node["efficiency"] < 1


def test_all_ways_of_ranking_find_the_same_and_neither_all_nor_nothing(tmp_path: Path) -> None:
    size = (40, 4000, 1500, 200, 4)
    ours, usual = counting(size, 16, 40)(), sorting(size, 16, 40)()
    torch.testing.assert_close(torch.tensor(usual), torch.from_numpy(ours.ap_Q), rtol=1e-5, atol=1e-6, equal_nan=True)
    assert 0.3 < ours.summary()["mAP"] < 0.999
    toolbox = tmp_path / "rank_cy.py"
    toolbox.write_text(f"def evaluate_cy(distance, *labels): return 0, {[float(ap) for ap in usual if ap == ap]}, 0")
    compiled(str(toolbox), size, 16)()
    toolbox.write_text("def evaluate_cy(distance, *labels): return 0, [0.1], 0")
    with pytest.raises(SystemExit, match=r"rank_cy\.py: its mAP is 0\.10000, ours 0\."):
        compiled(str(toolbox), size, 16)()
    parts = Gallery(size, 16).parts()
    assert len(parts) == 1 and len(parts[0]().pids_N) == 4000
