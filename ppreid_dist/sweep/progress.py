"""A table of a sweep while it runs, made from its folder alone."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from ppreid_dist.sweep.folder import Folder
from ppreid_dist.sweep.front import make_points, recommend
from ppreid_dist.sweep.space import Trial
from ppreid_dist.training.tracking import read_metrics

EVERY = 60.0  # seconds between tables while nothing begins or ends
LOOK = 5.0  # seconds between looks at the folder


class Progress:
    """Says the table when a trial has begun or ended, and now and then its head and what runs."""

    def __init__(self, folder: Folder, say: Callable[[str], None]):
        self.folder, self.say = folder, say
        self._seen: list[str] = []
        self._said = 0.0

    def look(self) -> None:
        rows = [(trial, self.folder.row(trial)) for trial in self.folder.known()]
        held = self.folder.claims.held()
        states = [row["status"] if row else "running" if trial.name in held else "waiting" for trial, row in rows]
        changed = states != self._seen
        if changed or time.monotonic() - self._said > EVERY:
            self._seen, self._said = states, time.monotonic()
            trials = [(trial, row, state) for (trial, row), state in zip(rows, states, strict=True)]
            self.say(table(self.folder, trials, whole=changed))

    @contextmanager
    def kept_up(self) -> Iterator[None]:
        """Look now, and on while this process does something else."""
        self.look()
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(LOOK):
                self.look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def table(folder: Folder, trials: list[tuple[Trial, dict[str, Any] | None, str]], whole: bool) -> str:
    """A line on the whole, then a line for each trial, or, unless ``whole``, for each that runs."""
    rows = [row for _, row, _ in trials if row is not None]
    count = Counter(state for *_, state in trials)
    expected = folder.expected()
    parts = [f"{count['done']} of {expected} done", f"{count['running']} running"]
    parts += [f"{count[state]} {state}" for state in ("failed", "stopped") if count[state]]
    points = make_points(rows)
    if best := recommend(points, folder.config.axis, folder.config.min_utility):
        parts.append(f"best so far {best}")
    if left := time_left(rows, expected - len(rows), count["running"]):
        parts.append(f"about {left} left")
    width = max(len(trial.name) for trial, *_ in trials) if trials else 0
    shown = trials if whole else [entry for entry in trials if entry[2] == "running"]
    lines = [f"  {state:8} {trial.name:{width}}  {_detail(folder, trial, row, state)}" for trial, row, state in shown]
    return "\n".join([f"{folder.path.name}: {', '.join(parts)}", *(line.rstrip() for line in lines)])


def time_left(rows: list[dict[str, Any]], missing: int, running: int) -> str | None:
    """Trials that are missing, at the mean time of those that are done, as many at a time as run now."""
    spans = [_seconds(row) for row in rows if row["status"] == "done"]
    if not spans or not missing:
        return None
    seconds = sum(spans) / len(spans) * missing / max(1, running)
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _seconds(row: dict[str, Any]) -> float:
    return (datetime.fromisoformat(row["ended"]) - datetime.fromisoformat(row["began"])).total_seconds()


def _detail(folder: Folder, trial: Trial, row: dict[str, Any] | None, state: str) -> str:
    if row is None:
        return _stage(folder, trial) if state == "running" else ""
    if row["status"] != "done":
        return str(row["reason"])
    leaks = ", ".join(f"{axis} r {_number(figures['leak']['value'])}" for axis, figures in row["axes"].items())
    return f"mAP {row['mAP']:.3f} of {row['control_mAP']:.3f}, {leaks}, {_seconds(row) / 60:.1f} min"


def _stage(folder: Folder, trial: Trial) -> str:
    run = folder.of(trial) / "run"
    if (run / "model" / "extractor.json").is_file():
        return "attack"
    metrics = read_metrics(run / "metrics.jsonl")
    return f"training, {metrics[-1]['images']:,} pictures" if metrics else "training"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"
