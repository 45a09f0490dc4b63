"""The utility-reversibility ratio: by hand, its gates, the coverage of its intervals, and that it can't be gamed."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppreid_dist.errors import DataError
from ppreid_dist.evaluation.bootstrap import Bootstrap
from ppreid_dist.evaluation.leak import AttackScores, worst_people
from ppreid_dist.evaluation.urr import NO_ATTACKER, attack_curve, urr


def constant(pids, protected, control, floor):
    return AttackScores(
        protected_Q=np.full(len(pids), protected),
        control_Q=np.full(len(pids), control),
        floor_Q=np.full(len(pids), floor),
    )


PIDS = np.repeat(np.arange(30), 4)
FULL = np.full(120, 0.8)


def noisy(seed, protected, control=0.8, floor=0.2, pids=PIDS, spread=0.1, attacker_noise=0.02):
    """Scores whose identities differ by ``spread``, alike in all three, with a little noise of each picture's own."""
    rng = np.random.default_rng(seed)
    ids = rng.normal(0, spread, int(pids.max()) + 1)[pids]
    return AttackScores(
        **{
            f"{name}_Q": mean + ids + rng.normal(0, attacker_noise, len(pids))
            for name, mean in {"protected": protected, "control": control, "floor": floor}.items()
        }
    )


def test_by_hand():
    pids = np.array([1, 1, 2, 2, 2])
    nan = math.nan
    scores = AttackScores(
        protected_Q=np.array([0.3, 0.5, nan, 0.4, 0.4]),  # 0.4
        control_Q=np.array([0.9, nan, nan, 0.5, 0.7]),  # 0.7
        floor_Q=np.array([0.1, 0.1, 0.3, 0.3, 0.2]),  # 0.2
    )
    weaker = constant(pids, 0.25, 0.7, 0.2)  # r = 0.1
    utility, base = np.array([0.9, 0.7, nan, 0.8, 0.76]), np.array([0.8, 0.8, 0.8, 0.8, 0.8])  # u = 0.79 / 0.8
    result = urr(pids, utility, base, {"weaker": weaker, "stronger": scores})
    assert result.status == "ok"
    assert result.attacker == "stronger"
    assert result.u.value == pytest.approx(0.79 / 0.8)
    assert result.r.value == pytest.approx(0.2 / 0.5)
    assert result.urr.value == pytest.approx(0.79 / 0.8 / 0.4)
    assert result.urr_raw == pytest.approx(0.79 / 0.4)
    assert result.urr_base == pytest.approx(0.79 / 0.8 / (0.4 / 0.7))
    assert result.own.value == pytest.approx(0.4)
    stronger = result.attackers["stronger"]
    assert (stronger.protected, stronger.control, stronger.floor) == pytest.approx((0.4, 0.7, 0.2))
    # Two identities have three resamples: the first twice, the second twice, or both.
    r = [(0.4 - 0.1) / (0.9 - 0.1), (0.4 - 0.8 / 3) / (0.6 - 0.8 / 3), 0.4]
    assert (stronger.r.low, stronger.r.high) == pytest.approx((min(r), max(r)))
    assert result.display.startswith("2.47 [")
    assert result.attackers["weaker"].r.value == pytest.approx(0.1)


def test_unprotected_is_one_and_noiselessly_so():
    scores = noisy(0, 0.8)
    same = AttackScores(protected_Q=scores.control_Q, control_Q=scores.control_Q, floor_Q=scores.floor_Q)
    result = urr(PIDS, FULL, FULL, {"a": same})
    assert (result.urr.value, result.urr.low, result.urr.high) == pytest.approx((1, 1, 1))


def test_a_leak_above_the_baseline_is_shown_as_it_is():
    result = urr(PIDS, FULL, FULL, {"a": constant(PIDS, 0.9, 0.7, 0.2)})
    assert result.r.value == pytest.approx(1.4)
    assert result.urr.value == pytest.approx(1 / 1.4)


def test_gate_on_utility():
    result = urr(PIDS, FULL * 0.94, FULL, {"a": noisy(0, 0.5)})
    assert (result.status, result.display, result.urr.value, result.urr.low) == ("n/a", "n/a", None, None)
    assert "0.940" in result.reason and not result.broken
    assert result.r.value is not None
    assert urr(PIDS, FULL * 0.94, FULL, {"a": noisy(0, 0.5)}, min_utility=0.9).status == "ok"
    assert urr(PIDS, FULL, FULL * 0, {"a": noisy(0, 0.5)}).status == "n/a"


def test_gate_on_broken_attackers():
    blind = noisy(1, 0.2, control=0.2, attacker_noise=0.1)
    silent = constant(PIDS, math.nan, 0.7, 0.2)
    result = urr(PIDS, FULL, FULL, {"blind": blind, "silent": silent})
    assert (result.status, result.reason) == ("n/a", f"attack broken: {NO_ATTACKER}")
    assert result.broken and result.r.value is None and result.attacker is None
    assert {a.status for a in result.attackers.values()} == {"broken"}
    assert "floor" in result.attackers["blind"].reason
    assert "no score" in result.attackers["silent"].reason
    assert urr(PIDS, FULL, FULL, {}).broken


def test_no_leak_gives_a_bound_not_a_value():
    result = urr(PIDS, FULL, FULL, {"a": noisy(2, 0.2015)})
    assert (result.status, result.urr.value, result.urr.high) == ("bound", None, None)
    assert result.r.low <= 0 < result.r.high
    assert result.urr.low == pytest.approx(1 / result.r.high)
    assert result.display == f"≥ {result.urr.low:.2f}"
    # Far below the floor, "no leak at all" is still only claimed as finely as the control is known.
    fooled = urr(PIDS, FULL, FULL, {"a": noisy(2, 0.1, attacker_noise=0.1)})
    assert fooled.r.high < 0
    assert fooled.status == "bound"
    assert 1 < fooled.urr.low < 1000


@pytest.mark.parametrize("protected", [0.2, 0.5, 0.8])
def test_results_are_strict_json(protected):
    attackers = {
        "a": noisy(3, protected),
        "broken": noisy(4, 0.2, control=0.2),
        "silent": constant(PIDS, math.nan, 1, 0),
    }
    for result in (urr(PIDS, FULL, FULL, attackers), attack_curve(PIDS, {10: attackers, 20: {}})):
        assert json.loads(json.dumps(asdict(result), allow_nan=False)) == asdict(result)


def coverage(simulations, resamples=300, people=40, pictures=6):
    """Shares of simulations whose 95 % interval of r holds the truth: over identities, and over pictures."""
    pids, hits = np.repeat(np.arange(people), pictures), np.zeros(2)
    means = {"protected": 0.5, "control": 0.9, "floor": 0.2}
    truth = 0.3 / 0.7
    for simulation in range(simulations):
        rng = np.random.default_rng([7, simulation])
        common = rng.normal(0, 0.2, people)  # some people are easy whatever the features
        scores = AttackScores(
            **{
                f"{name}_Q": (mean + common + rng.normal(0, 0.2, people))[pids] + rng.normal(0, 0.15, len(pids))
                for name, mean in means.items()
            }
        )
        utility = np.ones(len(pids))
        for i, group in enumerate((pids, np.arange(len(pids)))):
            r = urr(group, utility, utility, {"a": scores}, resamples=resamples, seed=simulation).r
            hits[i] += r.low <= truth <= r.high
    return hits / simulations


def test_intervals_over_identities_cover_and_over_pictures_do_not():
    identities, pictures = coverage(220)
    assert 0.91 <= identities <= 0.98
    assert pictures < 0.75


def test_resamples_are_paired():
    """What identities share cancels: a leak known to a hair though people differ widely."""
    scores = noisy(5, 0.5, spread=1.0, attacker_noise=1e-3)
    r = urr(PIDS, FULL, FULL, {"a": scores}).r
    assert r.high - r.low < 0.01
    spread = np.random.default_rng(0).normal(0, 0.2, 30)[PIDS]
    u = urr(PIDS, FULL + spread, FULL + spread, {"a": scores}).u
    assert (u.low, u.high) == pytest.approx((1, 1))


def test_bootstrap_weights_draw_identities_with_all_their_pictures():
    bootstrap = Bootstrap(np.array([5, 5, 9]), 200, 0, 0.95)
    means = bootstrap.means({"x": np.array([1.0, 3.0, 8.0])})[0]
    assert means[0] == 4.0
    assert set(means[1:]) == {2.0, 4.0, 8.0}
    assert 0.15 < (means[1:] == 2.0).mean() < 0.35


def test_seed_decides_everything():
    args = (PIDS, FULL, FULL, {"a": noisy(6, 0.5)})
    assert urr(*args, seed=1) == urr(*args, seed=1)
    assert urr(*args, seed=1).r.low != urr(*args, seed=2).r.low
    assert urr(*args, seed=1).urr.value == urr(*args, seed=2).urr.value
    narrow, wide = urr(*args, level=0.5).r, urr(*args, level=0.99).r
    assert wide.low < narrow.low < narrow.high < wide.high


LEVELS = st.floats(0.0, 1.1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), a=LEVELS, b=LEVELS, more=st.floats(0, 0.5), one_picture=st.booleans())
def test_a_leakier_model_never_has_a_higher_ratio(seed, a, b, more, one_picture):
    attackers = {"a": noisy(seed, a), "b": noisy(seed + 1, b)}
    step = np.zeros(120)
    step[: 1 if one_picture else 120] = more
    worse = AttackScores(
        protected_Q=attackers["a"].protected_Q + step,
        control_Q=attackers["a"].control_Q,
        floor_Q=attackers["a"].floor_Q,
    )
    before = urr(PIDS, FULL, FULL, attackers, resamples=200)
    after = urr(PIDS, FULL, FULL, {**attackers, "a": worse}, resamples=200)
    order = ["bound", "ok"]
    assert order.index(after.status) >= order.index(before.status)
    if before.status == after.status:
        for end in ("value", "low", "high"):
            old, new = getattr(before.urr, end), getattr(after.urr, end)
            assert old is None or new <= old * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), a=LEVELS, other=st.sampled_from(["at floor", "blind", "silent", "misled"]))
def test_another_attacker_that_is_not_the_strongest_on_the_control_never_raises_the_ratio(seed, a, other):
    attackers = {"a": noisy(seed, a)}
    added = {
        "at floor": noisy(seed + 1, 0.2, control=0.7),
        "blind": noisy(seed + 1, a, control=0.2, attacker_noise=0.1),
        "silent": constant(PIDS, math.nan, 1.0, 0.0),
        "misled": noisy(seed + 1, -0.5, control=0.7),
    }[other]
    before = urr(PIDS, FULL, FULL, attackers, resamples=200)
    after = urr(PIDS, FULL, FULL, {**attackers, "b": added}, resamples=200)
    assert before.status == after.status or (before.status, after.status) == ("bound", "ok")
    if before.status == after.status:
        for end in ("value", "low", "high"):
            old, new = getattr(before.urr, end), getattr(after.urr, end)
            assert old is None or new <= old * (1 + 1e-12)


def test_attack_curve_interpolates_in_the_logarithm():
    by_n = {n: {"a": constant(PIDS, 0.2 + 0.6 * r, 0.8, 0.2)} for n, r in [(400, 0.7), (100, 0.3), (50, 0.2)]}
    curve = attack_curve(PIDS, by_n)
    assert [p.n for p in curve.points] == [50, 100, 400]
    assert [p.r.value for p in curve.points] == pytest.approx([0.2, 0.3, 0.7])
    assert curve.n50 == pytest.approx(200)  # half-way between 100 and 400 on the logarithm's scale
    assert curve.n50_reason is None


def test_attack_curve_says_why_there_is_no_n50():
    by_n = {n: {"a": constant(PIDS, 0.2 + 0.6 * r, 0.8, 0.2)} for n, r in [(80, 0.2), (160, 0.45), (320, 0.9)]}
    assert attack_curve(PIDS, {n: by_n[n] for n in (80, 160)}).n50_reason == "not reached by 160"
    assert attack_curve(PIDS, {320: by_n[320]}).n50_reason == "already at 320"
    broken = attack_curve(PIDS, {80: {"a": constant(PIDS, 0.5, 0.2, 0.2)}})
    assert (broken.n50, broken.n50_reason) == (None, NO_ATTACKER)
    assert broken.points[0].r.value is None
    assert attack_curve(PIDS, {40: {}, **by_n}).n50 == pytest.approx(160 * 2 ** (0.05 / 0.45))


def test_attack_curve_of_weaker_attackers_says_nothing_of_the_whole():
    by_n = {n: {"a": noisy(n, 0.2 + 0.6 * r)} for n, r in [(80, 0.2), (160, 0.45)]}
    for stronger, known in (("b", False), ("a", True)):
        whole = urr(PIDS, FULL, FULL, {"a": by_n[160]["a"], stronger: noisy(160, 0.47 if known else 0.7)})
        text = "not reached by 160" if known else "not known: b, who finds more, was trained with the most people only"
        assert attack_curve(PIDS, by_n, whole).n50_reason == text


def test_bad_input_is_named():
    good = noisy(0, 0.5)
    with pytest.raises(DataError, match="baseline utility has shape"):
        urr(PIDS, FULL, FULL[:3], {"a": good})
    short = AttackScores(protected_Q=good.protected_Q, control_Q=good.control_Q[:7], floor_Q=good.floor_Q)
    with pytest.raises(DataError, match="ridge, control has shape"):
        urr(PIDS, FULL, FULL, {"ridge": short})
    with pytest.raises(DataError, match="ridge, protected holds an infinity"):
        urr(PIDS, FULL, FULL, {"ridge": constant(PIDS, math.inf, 0.8, 0.2)})
    with pytest.raises(DataError, match="at least 2"):
        urr(PIDS * 0, FULL, FULL, {"a": good})


def test_the_worst_people_by_hand() -> None:
    """Of 30 people two are the worst; each series chooses its own, and a picture without a score doesn't count."""
    pids = np.repeat(np.arange(30), 2)
    protected, control, floor = np.full(60, 0.2), np.full(60, 0.5), np.full(60, 0.1)
    protected[[8, 9]], protected[[20, 21]] = [0.8, np.nan], [0.6, 0.4]
    control[[0, 1]], floor[[58, 59]] = [1.0, 0.9], [0.3, 0.1]
    ridge = AttackScores(protected_Q=protected, control_Q=control, floor_Q=floor)
    found = worst_people({"ridge": ridge}, pids)
    assert found is not None and (found.people, found.attacker, found.against) == (2, "ridge", "ridge")
    expected = ((0.8 + 0.5) / 2, (0.95 + 0.5) / 2, (0.2 + 0.1) / 2)
    assert (found.protected, found.control, found.floor) == pytest.approx(expected)
    assert found.r == pytest.approx((0.65 - 0.15) / (0.725 - 0.15))
    # Who finds most without protection is not asked to speak for who finds most with it.
    fooled = AttackScores(protected_Q=np.full(60, 0.3), control_Q=np.full(60, 0.9), floor_Q=np.full(60, 0.2))
    found = worst_people({"fooled": fooled, "ridge": ridge}, pids)
    assert found is not None and (found.attacker, found.against) == ("ridge", "fooled")
    assert found.r == pytest.approx((0.65 - 0.15) / (0.9 - 0.2))
    blind = worst_people(
        {"gan": AttackScores(protected_Q=protected, control_Q=np.full(60, np.nan), floor_Q=floor)}, pids
    )
    assert blind is not None and blind.control is None and blind.r is None
