"""The utility-reversibility ratio: how much accuracy is kept for each part of the leak that is left, on one axis.

``u = U / U_b``, the utility of the protected model over the unprotected baseline's. For an attacker
``r = (R − F) / (C − F)``: its mean score on the protected features (R), above the floor that the same attacker reaches
when it is retrained on permuted pairs (F), over the same of the unprotected features, its control (C). 0 is no leak,
1 the unprotected leak. The strongest sound attacker counts, ``URR = u / max r``; the unprotected model has 1.
The definition is ours: the paper's own isn't public.

**Intervals** come from a paired bootstrap over identities: all series share each resample, and the maximum over
attackers is taken inside it. There an attacker whose control is not above its floor counts as an unbounded leak, and
a leak that isn't positive as an unbounded ratio; an end of an interval that is unbounded is None.

**Gates.** An attacker whose control isn't above its floor beyond noise sees nothing even without protection: it is
"broken" and left out. ``n/a`` where no attacker is sound, or where too little utility is left for a ratio to mean
anything. Where r is within noise of 0 (its interval reaches it) the ratio has no value, only a bound:
``≥ u_low / max(r_high, s)``, s the half-width of the interval of C − F as a share of C − F, the widest of the sound
attackers': no bound is finer than what the test can resolve, however lucky the draw. r > 1 is shown as it is.

Shapes: Q query pictures, B the statistic itself, then each resample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ppreid_dist.evaluation.bootstrap import Bootstrap, Interval, finite


@dataclass(frozen=True, kw_only=True)
class AttackScores:
    """One attacker's scores on one axis, a query picture each; higher leaks more (so give −L1). NaN is no score."""

    protected_Q: np.ndarray
    control_Q: np.ndarray
    floor_Q: np.ndarray


@dataclass(frozen=True, kw_only=True)
class AttackerResult:
    """Mean scores and the leak of one attacker; ``status`` is "ok" or, with a ``reason``, "broken"."""

    protected: float | None
    control: float | None
    floor: float | None
    r: Interval
    status: str
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class AxisResult:
    """The ratio on one axis. ``status`` is "ok", "bound" or "n/a", the latter two with a ``reason``.

    ``r`` is the leak to ``attacker``, the strongest; ``urr_raw`` = U/R and ``urr_base`` = (U/U_b)/(R/R_b) are its
    ratios without a floor, for comparison. "bound" has only ``urr.low``.
    """

    u: Interval
    r: Interval
    attacker: str | None
    urr: Interval
    urr_raw: float | None
    urr_base: float | None
    display: str
    status: str
    reason: str | None
    attackers: dict[str, AttackerResult]

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of finite numbers, strings and None, ready for strict JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """The leak to attackers who had ``n`` people to learn from; ``r`` is empty if none of them is sound."""

    n: int
    r: Interval
    attacker: str | None


@dataclass(frozen=True, kw_only=True)
class AttackCurve:
    """Leaks over the attackers' number of people; ``n50`` is the number at which r reaches 0.5, or None with why."""

    points: list[CurvePoint]
    n50: float | None
    n50_reason: str | None

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of finite numbers, strings and None, ready for strict JSON."""
        return asdict(self)


def urr(
    pids_Q: np.ndarray,
    utility_Q: np.ndarray,
    utility_base_Q: np.ndarray,
    attackers: Mapping[str, AttackScores],
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    min_utility: float = 0.95,
) -> AxisResult:
    """The ratio on one axis from the protected and the baseline model's utility and the attackers' scores.

    The utilities are those of each query (average precision). A NaN is left out of the mean of its own series.
    Raises DataError if a series has another length than the pids, holds an infinity, or there are fewer than two
    identities.
    """
    bootstrap = Bootstrap(pids_Q, resamples, seed, level)
    utility, base = bootstrap.means({"utility": utility_Q, "baseline utility": utility_base_Q})
    with np.errstate(divide="ignore", invalid="ignore"):
        u_B = np.where(base > 0, utility / base, np.nan)
    u = bootstrap.interval(u_B)
    results, leak = _leaks(bootstrap, attackers)

    ratio, urr_raw, urr_base, status = Interval(), None, None, "n/a"
    if leak is not None:
        best = results[leak.attacker]
        urr_raw, urr_base = _ratio(utility[0], best.protected), _ratio(u.value, _ratio(best.protected, best.control))
    if u.value is None:
        reason = "a utility has no score, or the baseline's is not above 0"
    elif u.value < min_utility:
        reason = f"utility is {u.value:.3f} of the baseline's, below {min_utility:g}"
    elif leak is None:
        reason = "no attacker is sound"
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
        r=bootstrap.interval(leak.r_B) if leak else Interval(),
        attacker=leak.attacker if leak else None,
        urr=ratio,
        urr_raw=urr_raw,
        urr_base=urr_base,
        display=display,
        status=status,
        reason=reason,
        attackers=results,
    )


def attack_curve(
    pids_Q: np.ndarray,
    attackers_by_n: Mapping[int, Mapping[str, AttackScores]],
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> AttackCurve:
    """The leak for each number of people the attackers had, and where it first reaches 0.5.

    Between two numbers the leak is taken to be linear in the number's logarithm. Raises DataError as ``urr`` does.
    """
    bootstrap = Bootstrap(pids_Q, resamples, seed, level)
    points = []
    for n in sorted(attackers_by_n):
        leak = _leaks(bootstrap, attackers_by_n[n])[1]
        r = bootstrap.interval(leak.r_B) if leak else Interval()
        points.append(CurvePoint(n=int(n), r=r, attacker=leak.attacker if leak else None))
    n50, reason = _crossing([(p.n, p.r.value) for p in points if p.r.value is not None], 0.5)
    return AttackCurve(points=points, n50=n50, n50_reason=reason)


def _crossing(curve: Sequence[tuple[int, float]], target: float) -> tuple[float | None, str | None]:
    if not curve:
        return None, "no attacker is sound"
    if curve[0][1] >= target:
        return None, f"already at {curve[0][0]}"
    for (n, r), (next_n, next_r) in pairwise(curve):
        if next_r >= target:
            return n * (next_n / n) ** ((target - r) / (next_r - r)), None
    return None, f"not reached by {curve[-1][0]}"


@dataclass(frozen=True, kw_only=True)
class _Leak:
    """The strongest leak in every resample, the attacker that attains the statistic, and what the test can resolve."""

    r_B: np.ndarray
    low: float
    high: float
    attacker: str
    resolution: float


def _leaks(
    bootstrap: Bootstrap, attackers: Mapping[str, AttackScores]
) -> tuple[dict[str, AttackerResult], _Leak | None]:
    results, sound, resolution = {}, {}, 0.0
    for name, scores in attackers.items():
        series = {f"{name}, {part}": getattr(scores, f"{part}_Q") for part in ("protected", "control", "floor")}
        protected, control, floor = bootstrap.means(series)
        gain = control - floor
        gain_low, gain_high = bootstrap.ends(gain)
        with np.errstate(divide="ignore", invalid="ignore"):
            r_B = np.where(gain > 0, (protected - floor) / gain, np.inf)
        reason = None
        if not np.isfinite([protected[0], control[0], floor[0]]).all():
            reason = "a series has no score"
        elif gain_low <= 0:
            reason = "even without protection it doesn't beat its floor beyond noise"
        else:
            sound[name] = r_B
            resolution = max(resolution, (gain_high - gain_low) / 2 / gain[0])
        results[name] = AttackerResult(
            protected=finite(protected[0]),
            control=finite(control[0]),
            floor=finite(floor[0]),
            r=bootstrap.interval(r_B) if reason is None else Interval(),
            status="ok" if reason is None else "broken",
            reason=reason,
        )
    if not sound:
        return results, None
    r_B = np.fmax.reduce(list(sound.values()))
    low, high = bootstrap.ends(r_B)
    best = max(sound, key=lambda name: float(sound[name][0]))
    return results, _Leak(r_B=r_B, low=low, high=high, attacker=best, resolution=resolution)


def _ratio(a: float | None, b: float | None) -> float | None:
    """a / b where that is a comparison of two amounts, that is, where b is positive."""
    return None if a is None or b is None or not b > 0 else finite(a / b)
