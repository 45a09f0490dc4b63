"""What a trace of some steps says of their time, counted anew from its events."""

import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from training_runs import assert_same, run

from ppreid_dist.experiment import Config
from ppreid_dist.settings import load_settings
from ppreid_dist.training.trace import Trace, TraceConfig, largest


def test_a_trace_says_where_the_time_goes_and_changes_nothing(world: list[str], tmp_path: Path) -> None:
    """Two steps of the game, whose parts are all there; and as many calls as steps."""
    whole = tmp_path / "whole"
    untraced = run(world, whole)
    config = load_settings(Config, whole / "config.yaml")
    first = json.loads((whole / "result.json").read_text())["steps"] - 3
    assert first / (first + 3) > config.training.warm
    traced = run(world, tmp_path / "run", f"training.trace={{start: {first}, steps: 2}}")
    assert_same(traced, untraced)
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert {"part: extractor step", "part: ridge loss", "part: gan loss"} <= {event["name"] for event in events}
    costs = json.loads((tmp_path / "run" / "costs.json").read_text())
    parts = {row["name"]: row for row in costs["parts"]}
    assert (costs["from"], costs["to"]) == (first, first + 2)
    assert parts["extractor step"]["calls"] == parts["extractor forward"]["calls"] == 2
    assert parts["extractor step"]["ms"] > parts["extractor forward"]["ms"] + parts["gan loss"]["ms"] > 0
    own = own_times(events)
    largest = sorted((name for name in own if not name.startswith("part: ")), key=lambda name: -own[name])[:5]
    assert [row["name"] for row in costs["operations"]] == largest
    for row in costs["operations"]:
        assert row["ms"] == pytest.approx(own[row["name"]] / 1e3, rel=0.01)
        assert row["share"] == pytest.approx(own[row["name"]] / sum(own.values()), rel=0.01)
    assert not (whole / "trace.json").exists()


def test_a_trace_of_a_run_that_goes_on_begins_where_that_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trace = Trace(TraceConfig(steps=2), tmp_path, torch.device("cpu"))
    for step in range(500, 506):
        trace.at(step)
    trace.close(506)
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert (costs["from"], costs["to"]) == (500, 502)
    assert "training.trace.start" not in caplog.text
    Trace(TraceConfig(steps=2, start=600), tmp_path, torch.device("cpu")).close(506)
    assert "training.trace.start: no step from 600 on was trained" in caplog.text


def test_a_trace_that_can_t_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "trace.json").mkdir()
    trace = Trace(TraceConfig(steps=2), tmp_path, torch.device("cpu"))
    trace.at(0)
    trace.close(1)
    assert "trace.json: could not be written" in caplog.text


def test_a_kernel_of_a_gpu_counts_once() -> None:
    """Not with the operation that asked for it, nor with the part that the trace draws above it, too."""

    def event(key: str, device: DeviceType, host: float, own: float, kernels: float, annotation: bool = False) -> Any:
        return SimpleNamespace(
            key=key, device_type=device, is_user_annotation=annotation, count=1, cpu_time_total=host,
            self_cpu_time_total=own, device_time_total=kernels, self_device_time_total=kernels,
        )  # fmt: skip

    cpu, gpu = DeviceType.CPU, DeviceType.CUDA
    events = [
        event("part: step", cpu, 4000, 1000, 0, annotation=True), event("aten::mm", cpu, 3000, 3000, 6000),
        event("part: step", gpu, 0, 0, 8000, annotation=True), event("gemm", gpu, 0, 0, 6000),
        event("copy", gpu, 0, 0, 2000),
    ]  # fmt: skip
    found = largest(events, gpu=True)
    assert found["parts"] == [{"name": "step", "calls": 1, "ms": 4.0, "share": 1.0}]
    assert [(row["name"], row["ms"], row["share"]) for row in found["operations"]] == [
        ("gemm", 6.0, 0.75), ("copy", 2.0, 0.25),
    ]  # fmt: skip


def own_times(events: list[dict[str, Any]]) -> Counter[str]:
    """Microseconds of each name less those of the events right inside its own, on the same thread."""
    own: Counter[str] = Counter()
    timed = [event for event in events if event.get("cat") in ("cpu_op", "user_annotation")]
    for _, thread in itertools.groupby(sorted(timed, key=lambda event: str(event["tid"])), lambda event: event["tid"]):
        within: list[dict[str, Any]] = []
        for event in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
            while within and event["ts"] >= within[-1]["ts"] + within[-1]["dur"]:
                within.pop()
            if within:
                own[within[-1]["name"]] -= event["dur"]
            own[event["name"]] += event["dur"]
            within.append(event)
    return own
