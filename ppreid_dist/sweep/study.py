"""What a search knows, in Optuna's terms: its space, and every point that was tried, in this session or an earlier one.

It is made anew from the trials' rows at every start; nothing else is kept of a search but how often it proposed a point
again.
"""

from dataclasses import dataclass
from typing import Any

from ppreid_dist.sweep.folder import Folder
from ppreid_dist.sweep.front import mean
from ppreid_dist.sweep.space import Trial


@dataclass(frozen=True)
class Study:
    """``storage`` holds the study ``name``; ``missing`` is the number of proposals that are still to be made."""

    name: str
    space: dict[str, Any]
    storage: Any
    sampler: Any
    missing: int


def open_study(folder: Folder) -> Study:
    """A study of two aims, much mAP and little leak. Points that an earlier session began come first."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    config, name = folder.config, "sweep"
    space = {key: _distribution(folder, key, values) for key, values in config.search.items()}
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name=name, directions=["maximize", "minimize"])
    by_point: dict[str, list[Trial]] = {}
    for trial in folder.known():
        by_point.setdefault(trial.point, []).append(trial)
    finished = 0
    for trials in by_point.values():
        settings = dict(trials[0].settings)
        rows = [row for trial in trials if (row := folder.row(trial)) is not None]
        if len(rows) < len(config.seeds):
            study.enqueue_trial(settings)
            continue
        finished += 1
        if (aims := aims_of(rows, config.axis)) is not None:
            study.add_trial(optuna.trial.create_trial(params=settings, distributions=space, values=list(aims)))
    # Not the draws that an earlier session began with.
    repeats = folder.repeats()
    sampler = optuna.samplers.TPESampler(seed=len(by_point) + repeats)
    return Study(name, space, storage, sampler, config.trials - finished - repeats)


def aims_of(rows: list[dict[str, Any]], axis: str) -> tuple[float, float] | None:
    """A point's mAP and leak from the rows of all its seeds; None where one isn't done, or its leak isn't known: that
    of a broken attack is small for no good reason."""
    if any(row["status"] != "done" or row["axes"][axis]["urr"]["broken"] for row in rows):
        return None
    leak = mean([row["axes"][axis]["leak"] for row in rows])["value"]
    return None if leak is None else (sum(row["mAP"] for row in rows) / len(rows), leak)


def _distribution(folder: Folder, key: str, values: dict[str, Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if "choices" in values:
        return CategoricalDistribution(values["choices"])
    make = IntDistribution if _is_whole(folder, key) else FloatDistribution
    return make(values["low"], values["high"], log=values.get("log", False))


def _is_whole(folder: Folder, key: str) -> bool:
    """Whether a run's key takes whole numbers only."""
    value: Any = folder.run_config([])
    for part in key.split("."):
        value = getattr(value, part)
    return isinstance(value, int)
