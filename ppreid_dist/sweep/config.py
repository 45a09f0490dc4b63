"""What a sweep is asked: the run it varies, what is varied and how, the seeds, what each trial gets."""

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ppreid_dist.attack_setup import METHOD
from ppreid_dist.errors import ConfigError
from ppreid_dist.settings import Settings, option

WEIGHT = "privacy.weight"
# The yardstick is the same for all trials, and the sweep itself gives each its place and its seed.
NOT_SWEPT = ("output", "seed", "attack.", "report.", "probe.", "engine.", "reversal.size", "data.kind", "data.root",
             "data.shards", "data.aux_identities", "data.split_seed", "data.train_splits",
             "data.synthetic.")  # fmt: skip
_RANGE = {"low", "high", "log", "choices"}


@dataclass(kw_only=True)
class ResourcesConfig(Settings):
    processes: int = option(1, "processes that train a run together", at_least=1)
    cpus: int = option(1, "CPU cores of a trial, over all its processes", at_least=1)
    gpus: int = option(0, "GPUs of a trial; as many as processes, or 0: it sees none", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus not in (0, self.processes):
            raise ConfigError(f"gpus: {self.processes} processes take {self.processes} GPUs or none, not {self.gpus}")


@dataclass(kw_only=True)
class SweepConfig(Settings):
    output: str = option("runs/sweep", "the sweep's folder")
    base: str = option("", "the configuration file of the run that is varied")
    settings: list[str] = option([], "key=value over it, for every trial, the control and the judge")
    grid: dict[str, Any] = option({}, "run keys and the values of each: every combination is a point")
    search: dict[str, Any] = option(
        {},
        "instead of a grid, run keys and the range of each, {low: …, high: …, log: true} or {choices: […]}: Optuna "
        "looks for points of much mAP and little leak",
    )
    methods: dict[str, Any] = option(
        {},
        "instead of both, methods by name, each with the run keys that make it and their values; one that only sets "
        "model.store keys is put on the control",
    )
    trials: int = option(
        20, "points that a search proposes; one that it proposes again counts, and isn't trained again", at_least=1
    )
    asha: bool = option(
        False,
        "end trials early whose training loss is in the worse half; only where λ and the whole objective are fixed",
    )
    seeds: list[int] = option([0], "every point is trained with each of these", at_least=0, at_most=2**63 - 1)
    judge: list[str] = option([], "key=value of the judge over base and settings; its seed is one of its own")
    judges: list[str] = option([], "further judges of every trial, each with its axis: .onnx files and runs' folders")
    axis: str = option(
        "identity", "whose leak the search lowers and the recommendation counts", choices=("identity", "pixel")
    )
    min_utility: float = option(
        0.95, "the least share of the control's mAP that a recommended point keeps", at_least=0, at_most=1
    )
    concurrent: int = option(0, "trials at a time under Ray; 0 is as many as there is room for", at_least=0)
    resources: ResourcesConfig = option(ResourcesConfig(), "")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.output, self.base = os.path.expanduser(self.output), os.path.expanduser(self.base)
        if not self.base:
            raise ConfigError("base: name the configuration file of the run to vary")
        if twice := [seed for seed, count in Counter(self.seeds).items() if count > 1]:
            raise ConfigError(f"seeds: {twice[0]} is listed twice")
        self.grid, self.search = dict(_flat(self.grid)), dict(_flat(self.search))
        spaces = [name for name in ("grid", "search", "methods") if getattr(self, name)]
        if len(spaces) != 1:
            raise ConfigError(
                f"{', '.join(spaces)}: give one of them, not both" if spaces else "grid: the search space is empty"
            )
        self.methods = {name: _method(name, settings) for name, settings in self.methods.items()}
        given = {setting.partition("=")[0] for setting in self.settings}
        checks = {"grid": _check_values, "search": _check_range}
        methods = {f"methods.{name}": settings for name, settings in self.methods.items()}
        for kind, space in {"grid": self.grid, "search": self.search, **methods}.items():
            for key, values in space.items():
                if key.startswith(NOT_SWEPT):
                    raise ConfigError(f"{kind}.{key}: can't be varied: it must be the same for all trials")
                if key in given:
                    raise ConfigError(f"{kind}.{key}: contradicts settings, which fix {key}")
                if key == WEIGHT and values == 0 and kind.startswith("methods.") and _trains_else(space):
                    continue
                checks.get(kind, _check_weight)(f"{kind}.{key}", key, values)
        objective = (*METHOD, "identity.", "triplet.")
        varying = [key for space in (self.grid, self.search, *self.methods.values()) for key in space]
        if self.asha and (varied := [key for key in varying if key.startswith(objective)]):
            raise ConfigError(f"asha: {varied[0]} is varied, and with it what a training loss means: it must be fixed")


def _flat(space: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``privacy: {weight: …}``, as a dotted key of the command line comes, is ``privacy.weight: …``."""
    for key, value in space.items():
        if isinstance(value, dict) and not (set(value) <= _RANGE and value):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _method(name: str, settings: Any) -> dict[str, Any]:
    if not isinstance(settings, dict) or not settings:
        raise ConfigError(f"methods.{name}: {settings!r} is not run keys with their values")
    return dict(_flat(settings))


def _trains_else(method: dict[str, Any]) -> bool:
    """Whether it is not the control at λ 0 either."""
    return any(key.startswith("neighbourhood.") for key in method)


def _check_values(where: str, key: str, values: Any) -> None:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}: {values!r} is not a list of values")
    seen: list[Any] = []
    for value in values:
        if value in seen:
            raise ConfigError(f"{where}: {value!r} is listed twice")
        seen.append(value)
        _check_weight(where, key, value)


def _check_range(where: str, key: str, values: Any) -> None:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {values!r} is not a range, {{low: …, high: …}} or {{choices: […]}}")
    if "choices" in values:
        if set(values) != {"choices"}:
            raise ConfigError(f"{where}: choices and {min(set(values) - {'choices'})} contradict each other")
        return _check_values(where, key, values["choices"])
    low, high, log = values.get("low"), values.get("high"), values.get("log", False)
    numbers = [end for end in (low, high) if isinstance(end, (int, float)) and not isinstance(end, bool)]
    if len(numbers) < 2 or not isinstance(log, bool) or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"{where}: a range has the numbers low and high, and log: true or false")
    if not numbers[0] < numbers[1]:
        raise ConfigError(f"{where}: empty: low {low} is not less than high {high}")
    if log and numbers[0] <= 0:
        raise ConfigError(f"{where}: low {low} must be more than 0 on a logarithmic scale")
    return _check_weight(where, key, low)


def _check_weight(where: str, key: str, value: Any) -> None:
    if key == WEIGHT and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ConfigError(f"{where}: {value!r} is not a number")
    if key == WEIGHT and value <= 0:
        what = "is negative" if value < 0 else "is the control, which the sweep trains by itself"
        raise ConfigError(f"{where}: λ {value} {what}; give more than 0")
