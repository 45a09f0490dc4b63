"""The leak is what the best attacker finds over what the best one found: a useless attacker can't move it, a strong
one can't be left out."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ppreid_dist.attacks.notes import tie_notes
from ppreid_dist.evaluation.bootstrap import Bootstrap
from ppreid_dist.evaluation.leak import SOUND, AttackScores, measure_leak, over

PEOPLE = 60
PIDS = np.repeat(np.arange(PEOPLE), 3)
FLOOR = 0.1


def attacker(excess: float, gain: float, noise: float = 0.0, seed: int = 0) -> AttackScores:
    """Finds so much beyond its floor in protected and in unprotected features, with so much noise of each identity."""
    rng = np.random.default_rng([seed, 3])
    means = {"protected": FLOOR + excess, "control": FLOOR + gain, "floor": FLOOR}
    return AttackScores(**{f"{part}_Q": mean + rng.normal(0, noise, PEOPLE)[PIDS] for part, mean in means.items()})


def measure(**attackers: AttackScores):
    return measure_leak(Bootstrap(PIDS, 200, 0, 0.95), attackers)


def test_by_hand() -> None:
    results, leak = measure(
        a=attacker(0.1, 0.5), b=attacker(0.2, 0.3), weak=attacker(0.15, 0.16), broken=attacker(0, 0)
    )
    assert (leak.attacker, leak.against, leak.own_attacker) == ("b", "a", "b")
    assert leak.r.value == pytest.approx(0.2 / 0.5)
    assert leak.own.value == pytest.approx(0.2 / 0.3)
    assert {name: result.status for name, result in results.items()} == {
        "a": "ok", "b": "ok", "weak": "weak", "broken": "broken",
    }  # fmt: skip
    assert [result.reason is None for result in results.values()] == [True, True, False, False]
    assert "0.32 of what the strongest does" in results["weak"].reason
    assert results["weak"].r.value == pytest.approx(0.15 / 0.16)
    assert measure(blind=attacker(0.3, 0.0))[1] is None


def test_a_resample_without_a_score_has_no_ratio() -> None:
    ratios = over(np.array([0.2, 0.2, np.nan, 0.2]), np.array([0.4, 0.0, np.nan, -0.1]))
    np.testing.assert_array_equal(ratios, [0.5, np.inf, np.nan, np.inf])


AMOUNT = st.floats(0.01, 1)


@given(st.lists(st.tuples(st.floats(-0.5, 1), AMOUNT), min_size=1, max_size=5))
def test_never_less_than_what_any_attacker_finds(pairs: list[tuple[float, float]]) -> None:
    results, leak = measure(**{f"a{i}": attacker(*pair) for i, pair in enumerate(pairs)})
    most = max(gain for _, gain in pairs)
    assume(all(abs(gain - SOUND * most) > 1e-9 for _, gain in pairs))
    assert leak.r.value == pytest.approx(max(excess for excess, _ in pairs) / most, abs=1e-6)
    assert leak.r.value >= results[leak.against].r.value - 1e-9
    sound = [excess / gain for excess, gain in pairs if gain >= SOUND * most]
    assert leak.own.value == pytest.approx(max(sound), abs=1e-6)
    if leak.r.value > 0:
        assert leak.own.value <= leak.r.value / SOUND + 1e-6


def test_a_useless_attacker_does_not_move_it() -> None:
    strong = attacker(0.2, 0.5, noise=0.02)
    alone = measure(strong=strong)[1]
    for seed in range(40):
        results, leak = measure(strong=strong, useless=attacker(0, 0, noise=0.3, seed=seed))
        assert leak.r.value == alone.r.value
        assert leak.own.value == alone.own.value
        assert results["useless"].status != "ok"


def test_weak_attackers_of_the_same_kind_do_not_raise_it() -> None:
    """All keep 0.4 of what they found; the largest own ratio of all is far above that, by noise alone."""
    largest, leaks = [], []
    for seed in range(40):
        weak = {f"weak{i}": attacker(0.04, 0.1, noise=0.15, seed=100 * seed + i) for i in range(4)}
        results, leak = measure(strong=attacker(0.2, 0.5, noise=0.02, seed=seed), **weak)
        largest.append(max(result.r.value for result in results.values() if result.r.value is not None))
        leaks.append(leak.r.value)
    assert np.mean(leaks) == pytest.approx(0.4, abs=0.02)
    assert np.mean(largest) > 0.55


@pytest.mark.parametrize("gain", [0.0, 0.03, 0.2])
def test_strong_on_protected_features_alone_counts_in_full(gain: float) -> None:
    before = measure(strong=attacker(0.2, 0.5, noise=0.02))[1]
    results, leak = measure(strong=attacker(0.2, 0.5, noise=0.02), odd=attacker(0.4, gain, noise=0.02, seed=1))
    assert leak.attacker == "odd"
    assert leak.r.value == pytest.approx(0.8, abs=0.03)
    assert leak.r.low > before.r.high
    assert results["odd"].status == ("weak" if gain else "protected only")
    assert results["odd"].reason


def test_a_weaker_attacker_is_never_worth_leaving_out() -> None:
    """Whoever isn't the strongest on the control can only raise the leak, so dropping one flatters nobody."""
    attackers = {f"a{i}": attacker(0.1 * i, 0.5 - 0.1 * i, noise=0.02, seed=i) for i in range(4)}
    whole = measure(**attackers)[1]
    assert whole.against == "a0"
    for name in ("a1", "a2", "a3"):
        assert measure(**{n: a for n, a in attackers.items() if n != name})[1].r.value <= whole.r.value


def test_attackers_that_noise_can_not_tell_apart_on_the_control_are_tied() -> None:
    strong, close, behind = attacker(0.2, 0.5, 0.1), attacker(0.1, 0.49, 0.1, seed=1), attacker(0.2, 0.3, 0.1, seed=2)
    tied = measure(strong=strong, close=close, behind=behind)[1]
    assert {tied.against, *tied.tied} == {"strong", "close"}
    assert measure(strong=strong, behind=behind)[1].tied == ()
    assert measure(strong=strong, same=strong)[1].tied == ()  # who always finds as much raises no maximum


def test_ties_are_noted_in_a_line() -> None:
    bootstrap = Bootstrap(PIDS, 200, 0, 0.95)
    equal = {f"a{i}": attacker(0.5 if i else 0.1, 0.5, 0.1, seed=i) for i in range(3)}
    (line,) = tie_notes(bootstrap, equal)
    names, _, said = line.partition(" are ")
    assert sorted(names.split(" and ")) == ["a0", "a1", "a2"] and said.startswith("equally strong on unprotected")
    assert "upper end of its interval" in line and "\n" not in line
    assert tie_notes(bootstrap, {"a0": equal["a0"], "weak": attacker(0.1, 0.2, 0.1)}) == []
    assert tie_notes(bootstrap, {"blind": attacker(0.0, 0.0)}) == []
