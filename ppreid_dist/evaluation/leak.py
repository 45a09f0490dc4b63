"""The leak r of one axis: how much of what the best attacker finds in unprotected features is still found.

For an attacker, R is its mean score on protected features, C on unprotected ones (its control), F its floor: what is
reached without looking at features. Its excess is what it finds beyond the prior. Then

    r = (largest R − F of the attackers) / (largest C − F of the attackers)

which is what an adversary who may choose the attacker is left with, over what the same adversary had. 0 is no leak, 1
the unprotected leak. The definition is ours.

**Why not the largest of the attackers' own ratios (R − F) / (C − F).** That is often the ratio of a weak attacker,
whose small and badly known C − F is divided by, and whom nobody would choose. Here an attacker counts by what it finds
in protected features, whatever it found in the others: no attacker is left out for being weak, one that is strong on
protected features alone counts in full, and one that finds nothing anywhere can't move r. r is never below the own
ratio of the attacker that is strongest on the control. What r hides is a protection against one kind of attacker: if
the strongest on the control is fooled, the next one may lose nothing. So ``own``, the largest own ratio of the *sound*
attackers, those with at least half of the largest excess on the control, stands beside it. It is at most 2 r.

**Who counts.** "ok": beats its floor on the control beyond noise. "weak": it does, but isn't sound. "protected only":
it doesn't, or there is no such attacker on the control, but it beats its floor on protected features beyond noise; its
excess there counts, its C − F doesn't.
"broken": neither; it says nothing, and nothing is said by it.

**Floors.** On pixels everybody's is the mean picture, drawn whatever the feature. Attackers retrained on permuted pairs
end at different pictures, most of them worse than that: by such floors some of what counts as found would be no more
than the mean picture, and an attacker that falls back on it where it knows nothing would be the loser for that. On
a perceptual axis everybody's is the highest of those retrained on permuted pairs, for the same reason. On identity,
where the mean picture shows nobody, an attacker's floor is its own on permuted pairs, which is chance unless something
leaks.

**Intervals** come from a paired bootstrap over identities: all series share each resample, and both maxima are taken
inside it. There a leak over a control that isn't above the floor is unbounded, and such an end of an interval is None.
The larger of two noisy excesses is on average above either: where attackers are ``tied`` on the control, r and the
upper end of its interval come out too low (how often: ``docs/report.md``).

Shapes: Q query pictures, B the statistic itself, then each resample.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ppreid_dist.evaluation.bootstrap import Bootstrap, Interval, finite

SOUND = 0.5  # of the largest excess on the control
_ABSENT = "there is no such attacker on the control"
_BLIND = "even without protection it doesn't beat its floor beyond noise"


@dataclass(frozen=True, kw_only=True)
class AttackScores:
    """One attacker's scores on one axis, a query picture each; higher leaks more (so give −L1). NaN is no score."""

    protected_Q: np.ndarray
    control_Q: np.ndarray
    floor_Q: np.ndarray


@dataclass(frozen=True, kw_only=True)
class AttackerResult:
    """Mean scores of one attacker and its own ratio ``r``; ``status`` is "ok", "weak", "protected only" or "broken",
    all but the first with a ``reason``."""

    protected: float | None
    control: float | None
    floor: float | None
    r: Interval
    status: str
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Leak:
    """r in every resample and its interval; ``attacker`` finds most in protected features, ``against`` in unprotected
    ones, where those ``tied`` with it can't be told from it. ``own`` is the largest own ratio of the sound attackers,
    ``own_attacker``'s. ``resolution`` is the half-width of the interval of the largest C − F as a share of it: the test
    sees no finer."""

    r_B: np.ndarray
    r: Interval
    low: float
    high: float
    attacker: str
    against: str
    tied: tuple[str, ...]
    own: Interval
    own_attacker: str
    resolution: float


def over(excess_B: np.ndarray, gain_B: np.ndarray) -> np.ndarray:
    """The ratio in every resample; infinite where there is no gain to compare with, NaN where no gain is known."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((gain_B > 0) | np.isnan(gain_B), excess_B / gain_B, np.inf)


def compare(
    bootstrap: Bootstrap, protected_B: np.ndarray, control_B: np.ndarray, floor_B: np.ndarray
) -> AttackerResult:
    """One attacker by itself, from its mean scores in every resample."""
    excess_B, gain_B = protected_B - floor_B, control_B - floor_B
    status, reason = "ok", None
    if not np.isfinite([protected_B[0], floor_B[0]]).all():
        status, reason = "broken", "a series has no score"
    elif not np.isfinite(control_B[0]) or bootstrap.ends(gain_B)[0] <= 0:
        blind = _BLIND if np.isfinite(control_B[0]) else _ABSENT
        found = bool(bootstrap.ends(excess_B)[0] > 0)
        status = "protected only" if found else "broken"
        reason = f"{blind}; on protected features it {'beats' if found else 'does not beat'} its floor beyond noise"
    return AttackerResult(
        protected=finite(protected_B[0]),
        control=finite(control_B[0]),
        floor=finite(floor_B[0]),
        r=bootstrap.interval(over(excess_B, gain_B)) if status == "ok" else Interval(),
        status=status,
        reason=reason,
    )


def measure_leak(
    bootstrap: Bootstrap, attackers: Mapping[str, AttackScores]
) -> tuple[dict[str, AttackerResult], Leak | None]:
    """Every attacker by itself, and the leak to all of them: None where none beats its floor on the control.

    Raises DataError naming the attacker whose series has another length than the pids or holds an infinity.
    """
    results: dict[str, AttackerResult] = {}
    excess: dict[str, np.ndarray] = {}
    gain: dict[str, np.ndarray] = {}
    for name, scores in attackers.items():
        series = {f"{name}, {part}": getattr(scores, f"{part}_Q") for part in ("protected", "control", "floor")}
        protected_B, control_B, floor_B = bootstrap.means(series)
        results[name] = compare(bootstrap, protected_B, control_B, floor_B)
        if results[name].status != "broken":
            excess[name] = protected_B - floor_B
        if results[name].status == "ok":
            gain[name] = control_B - floor_B
    if not gain:
        return results, None
    most_B = np.fmax.reduce(list(gain.values()))
    own = {}
    for name, gain_B in gain.items():
        if gain_B[0] >= SOUND * most_B[0]:
            own[name] = over(excess[name], gain_B)
        else:
            share = gain_B[0] / most_B[0]
            reason = f"without protection it finds {share:.2f} of what the strongest does, less than {SOUND:g}"
            results[name] = replace(results[name], status="weak", reason=reason)
    r_B = over(np.fmax.reduce(list(excess.values())), most_B)
    low, high = bootstrap.ends(r_B)
    most_low, most_high = bootstrap.ends(most_B)
    against = _first(gain)
    return results, Leak(
        r_B=r_B,
        r=bootstrap.interval(r_B),
        low=low,
        high=high,
        attacker=_first(excess),
        against=against,
        tied=tuple(name for name, gain_B in gain.items() if _tied(bootstrap, gain[against] - gain_B)),
        own=bootstrap.interval(np.fmax.reduce(list(own.values()))),
        own_attacker=_first(own),
        resolution=(most_high - most_low) / 2 / most_B[0],
    )


@dataclass(frozen=True, kw_only=True)
class Worst:
    """Mean scores of the ``people`` whom the ``attacker`` finds best, chosen by each series itself, so that the
    choice's luck is in all three. As with all people, ``attacker`` finds most in protected features, and ``r`` is its
    protected − floor over the largest control − floor, which is that of ``against``."""

    attacker: str
    against: str | None
    people: int
    protected: float | None
    control: float | None
    floor: float | None
    r: float | None


def worst_people(attackers: Mapping[str, AttackScores], pids_Q: np.ndarray, share: float = 0.05) -> Worst | None:
    """Of the ``share`` of people who leak most, at least one: an average can hide them. None without an attacker."""
    places_Q = np.unique(pids_Q, return_inverse=True)[1]
    count = max(1, math.ceil(share * (places_Q.max() + 1)))

    def most(score_Q: np.ndarray) -> float:
        known_Q = ~np.isnan(score_Q)
        if not known_Q.any():
            return float("nan")
        sums_K = np.bincount(places_Q[known_Q], score_Q[known_Q])
        counts_K = np.bincount(places_Q[known_Q])
        return float(np.sort(sums_K[counts_K > 0] / counts_K[counts_K > 0])[-count:].mean())

    means = {name: (most(of.protected_Q), most(of.control_Q), most(of.floor_Q)) for name, of in attackers.items()}
    excess = {name: protected - floor for name, (protected, _, floor) in means.items() if protected == protected}
    gain = {name: control - floor for name, (_, control, floor) in means.items() if control > floor}
    if not excess:
        return None
    name, against = max(excess, key=excess.__getitem__), max(gain, key=gain.__getitem__, default=None)
    protected, control, floor = means[name]
    return Worst(
        attacker=name,
        against=against,
        people=count,
        protected=finite(protected),
        control=finite(control),
        floor=finite(floor),
        r=None if against is None else finite(excess[name] / gain[against]),
    )


def _tied(bootstrap: Bootstrap, lead_B: np.ndarray) -> bool:
    """Whether a lead is within noise of 0; where there is none in any resample, the two are the same."""
    low, high = bootstrap.ends(lead_B)
    return low <= 0 < high


def _first(by_name: Mapping[str, np.ndarray]) -> str:
    """Whose statistic is the largest."""
    return max(by_name, key=lambda name: float(by_name[name][0]))
