"""Both victims attacked alike, and one attacker's scores against them.

Shapes: Q query pictures.
"""

from collections.abc import Mapping

import numpy as np

from ppreid_dist.attacks.adaptive import renewed
from ppreid_dist.attacks.bench import Bench, Trained, Victim
from ppreid_dist.evaluation.leak import AttackScores

Roles = Mapping[
    str, Trained
]  # "control": on its features; "floor": on its features and strangers' pictures; "protected"


def attack_victims(bench: Bench, control: Victim, protected: Victim) -> Roles:
    """All trainings. Ceilings and floors depend on the control alone, but for the shape of the generator that the
    protected run was trained against: they serve every protected extractor of the same data."""
    reversal = protected.reversal
    fresh = renewed(reversal, bench.config.seed) if reversal else None
    return {
        "control": bench.train_all("unprotected", control.aux_ND, control.query_QD),
        "floor": bench.train_all("prior only", control.aux_ND, control.query_QD, reversal=fresh, permuted=True),
        "protected": bench.train_all("protected", protected.aux_ND, protected.query_QD, reversal=reversal),
    }


def scores_of(roles: Roles, axis: str, name: str, n: int) -> AttackScores:
    """An attacker's, with so many people; NaN where there is no such training."""
    unscored_Q = np.full_like(next(iter(roles["control"].values())).scores[axis], np.nan)
    found = {role: runs.get((name, n)) for role, runs in roles.items()}
    return AttackScores(**{f"{role}_Q": of.scores[axis] if of else unscored_Q for role, of in found.items()})
