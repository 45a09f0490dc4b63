"""What whoever has the extractor too recovers: white-box inversion, beside the axes of the others.

It is slow, so a few query people are asked for, one picture each. The ceiling is the same attack on the control through
the control's own extractor. It learns no pairs that could be permuted: its floor is the control's reconstruction of
somebody else, scored against the person, and on pixels, as everybody's, the mean picture.

Shapes: Q query pictures asked for, D feature dim, B the statistic itself, then each resample.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ppreid_dist.attacks.base import HELD_OUT_PEOPLE, Outcome, to_uint8
from ppreid_dist.attacks.bench import Bench, Opened, Victim
from ppreid_dist.attacks.kept import digest
from ppreid_dist.attacks.whitebox import Inversion
from ppreid_dist.attacks.work import Training
from ppreid_dist.errors import ConfigError
from ppreid_dist.evaluation.bootstrap import Bootstrap, Interval
from ppreid_dist.evaluation.leak import AttackScores, compare, measure_leak
from ppreid_dist.pixels import to_float
from ppreid_dist.settings import to_dict


def whitebox_trainings(bench: Bench, victims: Mapping[str, Victim]) -> dict[str, Training]:
    """White-box inversion of "control" and "protected"; none where the configuration asks for nobody.

    ConfigError naming ``attack.whitebox.starts`` where there are too few auxiliary people for one.
    """
    asked, least = _asked(bench), 3 * HELD_OUT_PEOPLE  # some are held out, and of the others ridge holds some out
    if len(asked) and "ridge" in bench.config.whitebox.starts and (own := len(np.unique(bench.aux.pids_N))) < least:
        raise ConfigError(f"attack.whitebox.starts: ridge needs {least} auxiliary people here, there are {own}")
    return {role: _attack(bench, role, victim, asked) for role, victim in victims.items()} if len(asked) else {}


def _asked(bench: Bench) -> np.ndarray:
    """Of some query people the row of a picture each."""
    people = np.unique(bench.query.pids_N)
    people = np.random.default_rng([bench.config.seed, 0x3B]).permutation(people)[: bench.config.whitebox.people]
    return np.array([np.flatnonzero(bench.query.pids_N == pid)[0] for pid in people], dtype=np.int64)


def whitebox_leak(
    bench: Bench, victims: Mapping[str, Victim], others: Mapping[str, Mapping[str, AttackScores]]
) -> dict[str, Any] | None:
    """White-box inversion of "control" and "protected", JSON-ready; None where the configuration asks for nobody.

    ``others`` are the scores of those who lack the extractor, by axis and attacker. ``axes`` holds scores and own ratio
    as an attacker's, and ``without``, r of the others on the same people, ``matched`` the mean cosine between what is
    stored and what the extractor makes of the reconstruction by it: where it is low that descent failed, and the scores
    say little.
    """
    asked = _asked(bench)
    if not len(asked):
        return None
    people = bench.query.pids_N[asked]
    found = {role: bench.work.outcome(training) for role, training in whitebox_trainings(bench, victims).items()}
    somebody_else = torch.roll(found["control"].shown, 1, dims=0)
    found["floor"] = bench.judged(somebody_else.to(bench.query.images_N3HW.device), asked, seconds=0.0)
    bootstrap = Bootstrap(people, bench.config.resamples, bench.config.seed, 0.95)
    axes = {}
    for axis in bench.axes:
        each = {role: outcome.scores[axis] for role, outcome in found.items()}
        if axis == "pixel":
            each["floor"] = bench.mean_picture_Q[asked]
        means = bootstrap.means(each)
        parts = {f"{role}_B": mean_B for role, mean_B in zip(found, means, strict=True)}
        of_these = {
            name: AttackScores(
                protected_Q=its.protected_Q[asked], control_Q=its.control_Q[asked], floor_Q=its.floor_Q[asked]
            )
            for name, its in others[axis].items()
        }
        leak = measure_leak(bootstrap, of_these)[1]
        without = asdict(Interval() if leak is None else leak.r)
        axes[axis] = {**asdict(compare(bootstrap, **parts)), "without": without}
    return {
        "people": len(people),
        "seconds": round(sum(outcome.seconds for outcome in found.values()), 1),
        "matched": {role: _matched(victim, found[role], asked) for role, victim in victims.items()},
        "axes": axes,
    }


def _attack(bench: Bench, role: str, victim: Victim, asked: np.ndarray) -> Training:
    """By what is stored and, where a key opens it, by what that uncovers: on each axis what finds more. Neither always
    does: fewer numbers are matched sooner, and by more pictures."""
    config, label = bench.config, f"white-box inversion, {role}"
    ways: list[Victim | Opened] = [victim] if victim.opened is None else [victim, victim.opened]

    def train() -> Outcome:
        started, found = time.monotonic(), []
        for met in ways:
            attacker = Inversion(config.whitebox, config.ridge)
            attacker.see(met.see)
            say = partial(bench.say, label if met is victim else f"{label}, opened")
            attacker.fit(met.aux_ND, bench.aux.images_N3HW, bench.aux.pids_N, seed=config.seed, progress=say)
            drawn_Q3hw = to_uint8(attacker.reconstruct(met.query_QD[torch.from_numpy(asked)]))
            found.append(bench.judged(drawn_Q3hw, asked, seconds=0.0))
        scores = {
            axis: max((outcome.scores[axis] for outcome in found), key=lambda score_Q: float(np.nanmean(score_Q)))
            for axis in bench.axes
        }
        return replace(found[0], scores=scores, seconds=time.monotonic() - started)

    # The features stand for the extractor: another one doesn't give the same of all those pictures.
    settings = ["white-box", to_dict(config.whitebox), to_dict(config.ridge), config.seed]
    key = digest(bench.world, settings, victim.aux_ND, victim.query_QD, asked)
    return Training(label=label, key=key, make=train)


@torch.no_grad()
def _matched(victim: Victim, outcome: Outcome, asked: np.ndarray) -> float:
    stored_QD = victim.query_QD[torch.from_numpy(asked)]
    seen_QD = victim.see(to_float(outcome.shown.to(stored_QD.device)))
    return float(torch.nn.functional.cosine_similarity(seen_QD, stored_QD).mean())
