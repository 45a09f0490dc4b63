"""How long the trainings of an attack may take, before they begin: by some steps of every attacker.

Rough: every training is taken to use up its steps, where most come to their plateau sooner; all are taken to be as
long as those on the control's features, so that the search for the waves behind codes isn't in it.

Shapes: N pictures, L leaked entries, D feature dim.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.attacks.adaptive import Adaptive
from ppreid_dist.attacks.base import ATTACKERS
from ppreid_dist.attacks.config import AttackConfig
from ppreid_dist.attacks.inverse import inverse_steps, train_inverse
from ppreid_dist.attacks.plateau import Learner, PlateauConfig, Split, cut
from ppreid_dist.attacks.recogniser import Recogniser, recogniser_steps, train_recogniser, untrained
from ppreid_dist.attacks.recognisers import asked_widths
from ppreid_dist.settings import Settings

# Of the two short trainings, whose difference leaves out what a training begins with: steps, or pictures for an
# attacker that makes none.
STEPS, PICTURES = (2, 32), (200, 600)
RACED = ("agreement", "views", "widths", "lrs", "starts", "neighbours", "coordinates", "averaged")


def most_steps(config: Settings) -> int:
    """Gradient steps of one training, at most: of the races and of what is trained to its plateau."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    steps = sum(most_steps(value) for value in values.values() if isinstance(value, Settings))
    if isinstance(config, PlateauConfig):
        return config.max_steps
    entrants = prod(len(values[name]) for name in RACED if name in values)
    return steps + (entrants * values["trial_steps"] if "trial_steps" in values and entrants > 1 else 0)


def seconds(
    name: str,
    config: AttackConfig,
    features_ND: Tensor,
    pictures_N3hw: Tensor,
    pids_N: np.ndarray,
    leaked_LD: Tensor | None = None,
) -> float | None:
    """Of one training of this attacker with all of these people, at most; None for one that can't be tried alone."""
    kind, own = ATTACKERS[name], getattr(config, name)
    if name == Adaptive.name:
        return None
    recogniser = None
    if kind(own).asks_recogniser:  # what it has learnt takes no longer
        recogniser = Recogniser(untrained(config.recogniser, 1, config.seed).to(features_ND.device))

    def timed(settings: Any, rows: np.ndarray, leaked_LD: Tensor | None = leaked_LD) -> float:
        started = time.monotonic()
        attacker = kind(settings)
        attacker.leaked_LD, attacker.recogniser = leaked_LD, recogniser
        attacker.fit(features_ND[rows], pictures_N3hw[rows], pids_N[rows], seed=config.seed)
        if features_ND.is_cuda:
            torch.cuda.synchronize()
        return time.monotonic() - started

    people = np.unique(pids_N)
    if issubclass(kind, Learner):
        # Steps are as long with few people, who need no graph of the whole database; that one begins all of them once.
        few, shorts = np.flatnonzero(np.isin(pids_N, people[:8])), [cut(own, steps) for steps in (STEPS[0], *STEPS)]
        points = [(float(most_steps(short)), timed(short, few, None)) for short in shorts][1:]
        begun = timed(shorts[0], np.arange(len(pids_N)))
        return begun + _further(points, most_steps(own)) - points[0][1]
    effort = kind(own).effort
    points = []
    for count in (PICTURES[0], *PICTURES):
        some = people[: max(8, len(people) * count // len(pids_N))]
        rows = np.flatnonzero(np.isin(pids_N, some))
        points.append((effort(len(rows)), timed(own, rows)))
    return _further(points[1:], effort(len(pids_N)))


def recogniser_seconds(config: AttackConfig, pictures_N3hw: Tensor, pids_N: np.ndarray) -> float:
    """Of the training of one, on all of these people."""

    def train(steps: int) -> None:
        train_recogniser(pictures_N3hw, pids_N, config.recogniser, seed=config.seed, steps=steps)

    return _by_few_steps(train, recogniser_steps(len(pids_N), config.recogniser), pictures_N3hw.is_cuda)


def inverse_seconds(config: AttackConfig, pictures_N3hw: Tensor, pids_N: np.ndarray) -> float:
    """Of the training of one by what a recogniser sees in all of these pictures."""
    recogniser = Recogniser(untrained(config.recogniser, 1, config.seed).to(pictures_N3hw.device))
    split = Split.of(pids_N, config.seed)
    width = max(asked_widths(config, config.attackers))

    def train(steps: int) -> None:
        train_inverse(recogniser, pictures_N3hw, split, width, config.inverse, seed=config.seed, steps=steps)

    return _by_few_steps(train, inverse_steps(split, config.inverse), pictures_N3hw.is_cuda)


def _by_few_steps(train: Callable[[int], None], steps: int, on_gpu: bool) -> float:
    """Of so many ``steps`` of a training, by one and by four of them."""
    points = []
    for few in (1, 1, 4):  # the first pays for what is done once
        started = time.monotonic()
        train(few)
        if on_gpu:
            torch.cuda.synchronize()
        points.append((float(few), time.monotonic() - started))
    return _further(points[1:], steps)


def _further(points: Sequence[tuple[float, float]], to: float) -> float:
    """Along the line through two points of effort and seconds, never falling."""
    (little, first), (more, second) = points
    slope = max(0.0, second - first) / (more - little) if more > little else 0.0
    return max(first, second) + slope * (to - more) if to > more else max(first, second)


def estimate(
    trainings: Counter[tuple[str, bool]],
    config: AttackConfig,
    features_ND: Tensor,
    pictures_N3hw: Tensor,
    pids_N: np.ndarray,
    leaked_LD: Tensor | None = None,
    *,
    numbers: int,
    processes: int = 1,
) -> str:
    """A line on so many trainings of each attacker that are still to be made by so many processes, and whether by
    ``config.on_curve()``, of so many ``numbers`` of people; empty where there are none."""
    several: Counter[str] = Counter()
    known: dict[str, float] = {}
    asked = False
    for (attacker, few), times in trainings.items():
        name, its = (f"{attacker} with fewer people", config.on_curve()) if few else (attacker, config)
        several[name] = times
        if (found := seconds(attacker, its, features_ND, pictures_N3hw, pids_N, leaked_LD)) is not None:
            known[name] = found
            asked |= ATTACKERS[attacker](getattr(config, attacker)).asks_recogniser
    if not known:
        return ""
    if asked:
        # One for each number of people, and on more of them it takes longer.
        curve = any(ATTACKERS[name](getattr(config, name)).asks_recogniser for name in config.curve_attackers)
        times = numbers if curve else 1
        several.update(recogniser=times, inverse=times * len(asked_widths(config, config.attackers)))
        known["recogniser"] = recogniser_seconds(config, pictures_N3hw, pids_N)
        known["inverse"] = inverse_seconds(config, pictures_N3hw, pids_N)
    total = sum(found * several[name] for name, found in known.items())
    parts = ", ".join(f"{name} {several[name]} × {_time(found)}" for name, found in known.items())
    left_out = "".join(f"; {name} isn't counted" for name in several if name not in known)
    shared = f" in {processes} processes" if processes > 1 else ""
    return f"{several.total()} trainings, roughly {_time(total / processes)} here{shared}: {parts}{left_out}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
