"""Where a step's time goes: some of a training's steps under torch's profiler.

    RUN/trace.json      for Perfetto or chrome://tracing
    RUN/costs.json      the parts of the steps, then the operations that took most, by their own time

The first process is traced, of a GPU what runs on it too. A traced step is slower than others. With a GPU the parts'
times are those in which the host asks it for them, and the operations are its kernels.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ppreid_dist.errors import DataError
from ppreid_dist.files import atomic, write_json
from ppreid_dist.settings import Settings, option

MOST = 5
PART = "part: "  # what the parts' names begin with, in the trace
_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TraceConfig(Settings):
    steps: int = option(0, "extractor steps to trace, into RUN/trace.json and RUN/costs.json; 0 is none", at_least=0)
    start: int = option(0, "the step that begins it; one of the warm-up says nothing of the game", at_least=0)


def part(name: str) -> record_function:
    """Context: what runs within is a part of the step, under this name. Costs next to nothing where nobody traces."""
    return record_function(PART + name)


class Trace:
    """Call :meth:`at` before every step, and :meth:`close` when no more follow."""

    def __init__(self, config: TraceConfig, folder: Path, device: torch.device):
        self._config, self._folder, self._device = config, folder, device
        self._profile: profile | None = None
        self._begun, self._done = 0, False

    def at(self, step: int) -> None:
        """The step of this number is next."""
        if self._profile is not None and step >= self._begun + self._config.steps:
            self.close(step)
        elif self._profile is None and self._config.steps and step >= self._config.start and not self._done:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device.type == "cuda")
            self._profile, self._begun = profile(activities=kinds), step
            self._profile.start()

    def close(self, step: int) -> None:
        """Write what was traced, if anything was; ``step`` is the first that isn't."""
        if self._profile is None:
            if self._config.steps and not self._done:
                _log.warning(
                    "training.trace.start: no step from %d on was trained, so none was traced", self._config.start
                )
            return
        profiled, self._profile, self._done = self._profile, None, True
        profiled.stop()
        try:
            self._write(profiled, step)
        except DataError as error:
            _log.warning("%s", error)

    def _write(self, profiled: profile, step: int) -> None:
        with atomic(self._folder / "trace.json") as file:
            profiled.export_chrome_trace(str(file))
        events, gpu = profiled.key_averages(), self._device.type == "cuda"
        costs = largest(events, gpu=gpu)
        about = {"from": self._begun, "to": step, "device": "gpu" if gpu else "cpu"}
        write_json(self._folder / "costs.json", {**about, **costs})
        said = ", ".join(f"{row['name']} {100 * row['share']:.0f} %" for row in costs["operations"])
        _log.info("%s: steps %d to %d traced; %s", self._folder / "trace.json", self._begun, step, said)


def largest(events: Sequence[Any], *, gpu: bool) -> dict[str, list[dict[str, Any]]]:
    """``parts`` by their whole time on the host, and the ``operations`` with the most time of their own, on a GPU its
    kernels: each is also counted in the operation that asked for it, and what the host calls a part is there too."""
    host = [event for event in events if event.device_type == DeviceType.CPU]
    device = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    parts = [event for event in host if event.key.startswith(PART)]
    operations = device if gpu else [event for event in host if not event.key.startswith(PART)]

    def rows(chosen: Sequence[Any], what: str, all_own: float) -> list[dict[str, Any]]:
        chosen = sorted(chosen, key=lambda event: -getattr(event, what))
        return [
            {
                "name": event.key.removeprefix(PART),
                "calls": event.count,
                "ms": getattr(event, what) / 1e3,
                "share": getattr(event, what) / (all_own or 1.0),
            }
            for event in chosen
        ]

    host_time = sum(event.self_cpu_time_total for event in host)
    own = "self_device_time_total" if gpu else "self_cpu_time_total"
    own_time = sum(event.self_device_time_total for event in device) if gpu else host_time
    return {
        "parts": rows(parts, "cpu_time_total", host_time),
        "operations": rows(operations, own, own_time)[:MOST],
    }
