"""The points of a search space, and the trials that each of them is: one a seed."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppreid_dist.sweep.config import SweepConfig

_NAME = 60  # characters of a point's name that are spent on its settings


@dataclass(frozen=True)
class Trial:
    """One training: a point of the space (run keys with their values) and a seed. ``name`` is its folder's.

    ``method`` is the point's name where it has one.
    """

    settings: Mapping[str, Any]
    seed: int
    method: str = ""

    @property
    def point(self) -> str:
        """The same for the same settings, in whatever sweep and order they come."""
        # 2 is 2.0, which a list of both kinds of numbers may well become.
        items = sorted((key, _text(_number(value))) for key, value in self.settings.items())
        words = "_".join(f"{key.rpartition('.')[2]}_{value}" for key, value in items)
        readable = re.sub(r"[^A-Za-z0-9.+-]+", "_", self.method or words).strip("_")[:_NAME]
        whole = json.dumps(items)
        return f"{readable}-{hashlib.sha256(whole.encode()).hexdigest()[:6]}"

    @property
    def name(self) -> str:
        return f"{self.point}-seed{self.seed}"

    @property
    def overrides(self) -> list[str]:
        """As a command line gives them to train.py."""
        return [*as_overrides(self.settings), f"seed={self.seed}"]


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """``key=value`` for each; what isn't a number or text is YAML's flow style, which JSON is."""
    return [f"{key}={_text(value)}" for key, value in settings.items()]


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def points(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination, the last key changing fastest."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def listed_trials(config: SweepConfig) -> list[Trial]:
    """All trials of a grid or of methods: a whole round over the points with the first seed, then the next seed."""
    if config.methods:
        return [Trial(settings, seed, name) for seed in config.seeds for name, settings in config.methods.items()]
    return [Trial(settings, seed) for seed in config.seeds for settings in points(config.grid)]


def corners(config: SweepConfig) -> list[dict[str, Any]]:
    """Settings that show every value of a grid, or every end and choice of a search, or every method, at least once."""
    if config.methods:
        return list(config.methods.values())
    shown = {
        key: values if isinstance(values, list) else values.get("choices") or [values["low"], values["high"]]
        for key, values in (config.grid or config.search).items()
    }
    longest = max(map(len, shown.values()))
    return [{key: values[min(i, len(values) - 1)] for key, values in shown.items()} for i in range(longest)]
