"""Both victims attacked alike, and one attacker's scores against them.

Shapes: Q query pictures, L leaked entries, D feature dim.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.attacks.adaptive import renewed
from ppreid_dist.attacks.bench import Bench, Role, Trained, Victim
from ppreid_dist.attacks.estimate import estimate
from ppreid_dist.attacks.work import Training
from ppreid_dist.evaluation.leak import AttackScores

Roles = Mapping[
    str, Trained
]  # "control": on its features; "floor": on its features and strangers' pictures; "protected"


def roles_of(bench: Bench, control: Victim, protected: Victim) -> dict[str, Role]:
    """What attackers are trained on, by the names of :data:`Roles`.

    Ceilings and floors depend on the control alone, but for the shape of the generator that the protected run was
    trained against: they serve every protected extractor of the same data.
    """
    reversal = protected.reversal
    bare = _role("unprotected", control)
    fresh = renewed(reversal, bench.config.seed) if reversal else None
    return {
        "control": bare,
        "floor": replace(bare, name="prior only", reversal=fresh, permuted=True),
        "protected": replace(_role(protected.name, protected), reversal=reversal),
    }


def leaked_by(victim: Victim) -> Tensor:
    """All features of the stolen database, (L, D), the queries' first."""
    others = [] if victim.leaked_LD is None else [victim.leaked_LD]
    return torch.cat([victim.query_QD, *others])


def _role(name: str, victim: Victim) -> Role:
    return Role(name=name, aux_ND=victim.aux_ND, query_QD=victim.query_QD, leaked_LD=leaked_by(victim))


def trainings_of(bench: Bench, control: Victim, protected: Victim) -> list[Training]:
    """All that :func:`attack_victims` asks for."""
    return [training for role in roles_of(bench, control, protected).values() for training in bench.trainings(role)]


def attack_victims(bench: Bench, control: Victim, protected: Victim) -> Roles:
    """What all trainings gave."""
    return {name: bench.train_all(role) for name, role in roles_of(bench, control, protected).items()}


def expected(bench: Bench, control: Victim, protected: Victim, processes: int) -> str:
    """A line on how long those that aren't kept from before may take by so many processes; empty where there are
    none."""
    missing = bench.missing(list(roles_of(bench, control, protected).values()))
    of = control.aux_ND, bench.aux.images_N3HW, bench.aux.pids_N, leaked_by(control)
    return estimate(missing, bench.config, *of, numbers=len(bench.people), processes=processes)


def scores_of(bench: Bench, roles: Roles, axis: str, name: str, n: int) -> AttackScores:
    """An attacker's, with so many people; NaN where there is no such training. On pixels everybody's floor is the mean
    picture (``Bench.mean_picture_Q``), on a perceptual axis the highest of all with as many people."""
    unscored_Q = np.full_like(next(iter(roles["control"].values())).scores[axis], np.nan)
    found = {role: runs.get((name, n)) for role, runs in roles.items()}
    scores = {f"{role}_Q": of.scores[axis] if of else unscored_Q for role, of in found.items()}
    if axis == "pixel":
        scores["floor_Q"] = bench.mean_picture_Q
    elif axis in bench.perception.axes:
        floors = [of.scores[axis] for (_, m), of in roles["floor"].items() if m == n]
        scores["floor_Q"] = max(floors, key=lambda of_Q: float(np.nanmean(of_Q)), default=unscored_Q)
    return AttackScores(**scores)
