"""The utility-reversibility ratio: how much accuracy is kept for each part of the leak that is left, on one axis.

``u = U / U_b``, the utility of the protected model over the unprotected baseline's; ``r``, the leak to the attackers
(:mod:`ppreid_dist.evaluation.leak`); ``URR = u / r``, and the unprotected model has 1. The definition is ours: the
paper's own isn't public.

**Intervals** come from a paired bootstrap over identities. There a leak that isn't positive counts as an unbounded
ratio; an end of an interval that is unbounded is None.

**Gates.** ``n/a`` where the attack is broken (no attacker beats its floor on the control beyond noise, or what
:mod:`ppreid_dist.evaluation.gates` says), or where too little utility is left for a ratio to mean anything. Where r is
within noise of 0 (its interval reaches it) the ratio has no value, only a bound: ``≥ u_low / max(r_high, s)``, s the
half-width of the interval of the largest C − F as a share of it: no bound is finer than what the test can resolve,
however lucky the draw. r > 1 is shown as it is.

Shapes: Q query pictures, B the statistic itself, then each resample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ppreid_dist.evaluation.bootstrap import Bootstrap, Interval, finite
from ppreid_dist.evaluation.leak import AttackerResult, AttackScores, measure_leak

NO_ATTACKER = "no attacker beats its floor without protection"


@dataclass(frozen=True, kw_only=True)
class AxisResult:
    """The ratio on one axis. ``status`` is "ok", "bound" or "n/a", the latter two with a ``reason``; ``broken`` where
    that is the attack itself.

    ``r``, ``attacker``, ``against``, ``own`` and ``own_attacker`` are those of ``evaluation.leak.Leak``. Without a
    floor, for comparison: ``urr_raw`` = U/R and ``urr_base`` = (U/U_b)/(R/R_b), R the score of ``attacker`` and R_b
    that of ``against``. "bound" has only ``urr.low``.
    """

    u: Interval
    r: Interval
    attacker: str | None
    against: str | None
    own: Interval
    own_attacker: str | None
    urr: Interval
    urr_raw: float | None
    urr_base: float | None
    display: str
    status: str
    reason: str | None
    broken: bool
    attackers: dict[str, AttackerResult]


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """The leak to attackers who had ``n`` people to learn from; ``r`` is empty if it can't be measured."""

    n: int
    r: Interval
    attacker: str | None


@dataclass(frozen=True, kw_only=True)
class AttackCurve:
    """Leaks over the attackers' number of people; ``n50`` is the number at which r reaches 0.5, or None with why."""

    points: list[CurvePoint]
    n50: float | None
    n50_reason: str | None


def urr(
    pids_Q: np.ndarray,
    utility_Q: np.ndarray,
    utility_base_Q: np.ndarray,
    attackers: Mapping[str, AttackScores],
    *,
    broken: Sequence[str] = (),
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    min_utility: float = 0.95,
) -> AxisResult:
    """The ratio on one axis from the protected and the baseline model's utility and the attackers' scores.

    The utilities are those of each query (average precision). A NaN is left out of the mean of its own series. What
    is ``broken`` in the attack, a line each, leaves no ratio.
    Raises DataError if a series has another length than the pids, holds an infinity, or there are fewer than two
    identities.
    """
    bootstrap = Bootstrap(pids_Q, resamples, seed, level)
    utility, base = bootstrap.means({"utility": utility_Q, "baseline utility": utility_base_Q})
    with np.errstate(divide="ignore", invalid="ignore"):
        u_B = np.where(base > 0, utility / base, np.nan)
    u = bootstrap.interval(u_B)
    results, leak = measure_leak(bootstrap, attackers)

    ratio, urr_raw, urr_base, status = Interval(), None, None, "n/a"
    why_broken = [NO_ATTACKER] if leak is None else list(broken)
    if leak is not None:
        found, before = results[leak.attacker].protected, results[leak.against].control
        urr_raw, urr_base = _ratio(utility[0], found), _ratio(u.value, _ratio(found, before))
    if u.value is None:
        reason = "a utility has no score, or the baseline's is not above 0"
    elif leak is None or broken:
        reason = "attack broken: " + "; ".join(why_broken)
    elif u.value < min_utility:
        reason = f"utility is {u.value:.3f} of the baseline's, below {min_utility:g}"
    elif min(leak.low, leak.r_B[0]) <= 0:
        status, reason = "bound", "the leak is within noise of 0"
        ratio = Interval(low=_ratio(u.low, max(leak.high, leak.resolution)))
    else:
        status, reason = "ok", None
        with np.errstate(divide="ignore"):
            ratio = bootstrap.interval(np.where(leak.r_B > 0, u_B / leak.r_B, np.inf))
    display = {"n/a": "n/a", "ok": str(ratio), "bound": f"≥ {ratio.low or 0:.2f}"}[status]
    return AxisResult(
        u=u,
        r=leak.r if leak else Interval(),
        attacker=leak.attacker if leak else None,
        against=leak.against if leak else None,
        own=leak.own if leak else Interval(),
        own_attacker=leak.own_attacker if leak else None,
        urr=ratio,
        urr_raw=urr_raw,
        urr_base=urr_base,
        display=display,
        status=status,
        reason=reason,
        broken=bool(why_broken),
        attackers=results,
    )


def attack_curve(
    pids_Q: np.ndarray,
    attackers_by_n: Mapping[int, Mapping[str, AttackScores]],
    whole: AxisResult | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> AttackCurve:
    """The leak for each number of people the attackers had, and where it first reaches 0.5.

    Between two numbers the leak is taken to be linear in the number's logarithm. Where ``whole``, which is of all
    attackers with the most people, says more than this curve's end, beyond noise, nobody knows where it would have
    reached 0.5. Raises DataError as ``urr`` does.
    """
    bootstrap = Bootstrap(pids_Q, resamples, seed, level)
    points = []
    for n in sorted(attackers_by_n):
        leak = measure_leak(bootstrap, attackers_by_n[n])[1]
        r, attacker = (leak.r, leak.attacker) if leak else (Interval(), None)
        points.append(CurvePoint(n=int(n), r=r, attacker=attacker))
    n50, reason = _crossing([(p.n, p.r.value) for p in points if p.r.value is not None], 0.5)
    end = points[-1].r.high if points else None
    if whole is not None and whole.r.low is not None and end is not None and end < whole.r.low:
        n50, reason = None, f"not known: {whole.attacker}, who finds more, was trained with the most people only"
    return AttackCurve(points=points, n50=n50, n50_reason=reason)


def _crossing(curve: Sequence[tuple[int, float]], target: float) -> tuple[float | None, str | None]:
    if not curve:
        return None, NO_ATTACKER
    if curve[0][1] >= target:
        return None, f"already at {curve[0][0]}"
    for (n, r), (next_n, next_r) in pairwise(curve):
        if next_r >= target:
            return n * (next_n / n) ** ((target - r) / (next_r - r)), None
    return None, f"not reached by {curve[-1][0]}"


def _ratio(a: float | None, b: float | None) -> float | None:
    """a / b where that is a comparison of two amounts, that is, where b is positive."""
    return None if a is None or b is None or not b > 0 else finite(a / b)
