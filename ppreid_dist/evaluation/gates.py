"""Whether the attack on an axis works at all: signs by which a broken measurement shows, whatever it says of a leak.

- **Above the floor.** Somebody finds more in unprotected features than the prior gives (``evaluation.leak``).
- **More data is not worse.** The strongest attacker with the most people may not stand below the strongest with fewer,
  neither on unprotected features nor on protected ones, some of which only a search opens. It fails where the interval
  of the loss, paired by identity, lies above 0 and the loss is more than ``LOSS`` of the axis' reach: that interval
  doesn't cover the chance of two trainings. A single attacker that does worse with more people, while another is
  stronger, is only worth a note: r is the strongest's.
- **The floor is at chance**, where an axis ranks and chance is known. A floor learns from pictures of strangers, so it
  can name nobody. It fails where the interval of (floor − chance) lies above 0 and that is more than ``LIFT`` of the
  reach (ceiling − chance). Cameras and light lift a judge's ranking a little without anybody being shown: by at most
  0.03 of the reach in the runs it was measured on, synthetic and real. With few people in the gallery and little reach
  a judge that ranks a person's pictures together lifts it further: then a sound attack may be called broken. A lift of
  ``LIFT`` lowers r by that at most:
  (P − c)/(C − c) − (P − F)/(C − F) ≤ (F − c)/(C − c) for a chance c ≤ floor F ≤ protected P ≤ ceiling C.

The reach is what the strongest attacker with the most people has on unprotected features, beyond its floor or beyond
chance. Below the margins a fault is too small to matter, within noise it can't be told from none.

Shapes: Q query pictures.
"""

from collections.abc import Mapping

import numpy as np

from ppreid_dist.evaluation.bootstrap import Bootstrap
from ppreid_dist.evaluation.leak import AttackScores

LOSS = 0.05  # of the reach
LIFT = 0.1  # of the reach

KINDS = {"control_Q": "unprotected", "protected_Q": "protected"}  # scores of attackers, by the features they had

ByPeople = Mapping[int, Mapping[str, AttackScores]]  # attackers by number of people and name


def broken_gates(
    bootstrap: Bootstrap, attackers: Mapping[str, AttackScores], by_n: ByPeople, chance_Q: np.ndarray | None = None
) -> list[str]:
    """What speaks against the attack on one axis, a line each; none where nothing does.

    ``attackers`` had the most people; ``by_n`` those of the curve. ``chance_Q`` is what a random ranking reaches at
    each query, NaN where it has no positive; None where the axis ranks nothing. Whether somebody beats its floor is
    ``measure_leak``'s to say.
    """
    broken = [line for kind in KINDS for line in _falling(bootstrap, attackers, by_n, kind)]
    return broken if chance_Q is None else broken + _lifted(bootstrap, attackers, chance_Q)


def ruined_attackers(bootstrap: Bootstrap, attackers: Mapping[str, AttackScores], by_n: ByPeople) -> list[str]:
    """A line for every attacker that finds less with the most people than with fewer."""
    *fewer, most = sorted(by_n)
    return [
        f"on {KINDS[kind]} features {name} reaches {after:.3f} with {most} people, less than the {before:.3f} with {n}"
        for kind in KINDS
        for name, last in by_n[most].items()
        for n in fewer
        for before, after in _losses(bootstrap, attackers, getattr(by_n[n][name], kind), getattr(last, kind))
    ]


def _falling(bootstrap: Bootstrap, attackers: Mapping[str, AttackScores], by_n: ByPeople, kind: str) -> list[str]:
    *fewer, most = sorted(by_n)
    strongest = _strongest(attackers, kind)
    best = {n: _strongest(by_n[n], kind) for n in fewer}
    if strongest is None:
        return []
    last_Q = getattr(attackers[strongest], kind)
    return [
        f"on {KINDS[kind]} features the strongest attacker, {strongest}, reaches {after:.3f} with {most} people, less "
        f"than the {before:.3f} of {name} with {n}"
        for n, name in best.items()
        if name is not None
        for before, after in _losses(bootstrap, attackers, getattr(by_n[n][name], kind), last_Q)
    ]


def _losses(
    bootstrap: Bootstrap, attackers: Mapping[str, AttackScores], first_Q: np.ndarray, last_Q: np.ndarray
) -> list[tuple[float, float]]:
    """What was reached first and last, where last is less, beyond noise and by enough to matter; else nothing."""
    reach = max(_excess(bootstrap, of.control_Q, of.floor_Q) for of in attackers.values())
    before_B, after_B = bootstrap.means({"first": first_Q, "last": last_Q})
    loss_B = before_B - after_B
    matters = loss_B[0] > LOSS * max(reach, 0) and bootstrap.ends(loss_B)[0] > 0
    return [(float(before_B[0]), float(after_B[0]))] if matters else []


def _strongest(attackers: Mapping[str, AttackScores], kind: str) -> str | None:
    """Who finds most in such features; None where nobody has a score."""
    known = {name: getattr(of, kind) for name, of in attackers.items() if np.isfinite(getattr(of, kind)).any()}
    return max(known, key=lambda name: float(np.nanmean(known[name])), default=None)


def _lifted(bootstrap: Bootstrap, attackers: Mapping[str, AttackScores], chance_Q: np.ndarray) -> list[str]:
    reach = max(_excess(bootstrap, of.control_Q, chance_Q) for of in attackers.values())
    lines = []
    for name, scores in attackers.items():
        floor_B, chance_B = bootstrap.means({"floor": scores.floor_Q, "chance": chance_Q})
        lift_B = floor_B - chance_B
        if lift_B[0] > LIFT * max(reach, 0) and bootstrap.ends(lift_B)[0] > 0:
            lines.append(f"the floor of {name} is {floor_B[0]:.3f}, above chance, {chance_B[0]:.3f}")
    return lines


def _excess(bootstrap: Bootstrap, control_Q: np.ndarray, least_Q: np.ndarray) -> float:
    control_B, least_B = bootstrap.means({"control": control_Q, "least": least_Q})
    return float(control_B[0] - least_B[0]) if np.isfinite(control_B[0] - least_B[0]) else 0.0
