"""Each gate fires where the attack is broken, and not where it is sound, within noise, or too little off to matter."""

import numpy as np
import pytest

from ppreid_dist.evaluation.bootstrap import Bootstrap
from ppreid_dist.evaluation.gates import LIFT, LOSS, broken_gates, ruined_attackers
from ppreid_dist.evaluation.leak import AttackScores
from ppreid_dist.evaluation.urr import urr

PEOPLE, CHANCE, FLOOR, REACH = 60, 0.02, 0.02, 0.5
PIDS = np.repeat(np.arange(PEOPLE), 3)


def series(mean: float, noise: float, seed: int) -> np.ndarray:
    return mean + np.random.default_rng([seed, 5]).normal(0, noise, PEOPLE)[PIDS]


def attacker(
    control: float = REACH, floor: float = FLOOR, *, protected: float = 0.2, noise: float = 0.0, seed: int = 0
) -> AttackScores:
    parts = {"protected": protected, "control": control, "floor": floor}
    return AttackScores(
        **{f"{part}_Q": series(mean, noise, 7 * seed + i) for i, (part, mean) in enumerate(parts.items())}
    )


def gates(
    attackers: dict[str, AttackScores],
    by_n: dict[int, dict[str, AttackScores]] | None = None,
    chance_Q: np.ndarray | None = None,
) -> list[str]:
    return broken_gates(Bootstrap(PIDS, 200, 0, 0.95), attackers, by_n or {100: attackers}, chance_Q)


@pytest.mark.parametrize(
    ("fewer", "noise", "fires"),
    [
        (REACH + 0.1, 0.02, True),
        (REACH + 0.1, 1.0, False),  # within noise
        (REACH + 0.8 * LOSS * (REACH - FLOOR), 0.0, False),  # beyond noise, by too little
        (REACH + 1.2 * LOSS * (REACH - FLOOR), 0.0, True),
        (REACH - 0.1, 0.02, False),
    ],
)
def test_more_data_must_not_be_worse(fewer: float, noise: float, fires: bool) -> None:
    strong = {"ridge": attacker(noise=noise)}
    lines = gates(strong, {20: {"ridge": attacker(fewer, noise=noise, seed=1)}, 100: strong})
    assert bool(lines) == fires
    assert not fires or ("ridge" in lines[0] and "with 100 people" in lines[0] and "with 20" in lines[0])


def test_a_search_that_fails_in_protected_features_only_breaks_the_attack() -> None:
    """As a search for the waves behind codes may, which unprotected features never ask for."""
    fewer, most = {"unfolded": attacker(protected=0.4)}, {"unfolded": attacker(protected=0.1), "ridge": attacker(0.3)}
    curve = {20: fewer, 100: {"unfolded": most["unfolded"]}}
    (line,) = gates(most, curve)
    assert line.startswith("on protected features the strongest attacker, ridge, reaches 0.200 with 100 people")
    (line,) = ruined_attackers(Bootstrap(PIDS, 200, 0, 0.95), most, curve)
    assert line == "on protected features unfolded reaches 0.100 with 100 people, less than the 0.400 with 20"
    assert gates({**most, "regression": attacker(0.3, protected=0.39)}, curve) == []


def test_an_attacker_that_more_data_ruined_is_noted_and_breaks_nothing_while_another_is_stronger() -> None:
    last = {"ridge": attacker(), "regression": attacker(0.05)}
    first = {"ridge": attacker(0.3), "regression": attacker(0.4)}
    assert gates(last, {20: first, 100: last}) == []
    (line,) = ruined_attackers(Bootstrap(PIDS, 200, 0, 0.95), last, {20: first, 100: last})
    assert line == "on unprotected features regression reaches 0.050 with 100 people, less than the 0.400 with 20"
    first["regression"] = attacker(REACH + 0.1)
    (line,) = gates(last, {20: first, 100: last})
    assert "the strongest attacker, ridge, reaches 0.500" in line and "the 0.600 of regression with 20" in line


def test_whoever_joins_at_the_end_counts_as_the_strongest() -> None:
    ridge = {20: {"ridge": attacker(0.4)}, 100: {"ridge": attacker(0.3)}}
    assert len(gates(ridge[100], ridge)) == 1
    assert gates({**ridge[100], "gan": attacker(REACH)}, ridge) == []


@pytest.mark.parametrize(
    ("floor", "noise", "fires"),
    [
        (CHANCE, 0.02, False),
        (CHANCE + 0.2, 0.02, True),
        (CHANCE + 0.2, 2.0, False),  # within noise
        (CHANCE + 0.8 * LIFT * (REACH - CHANCE), 0.0, False),  # as cameras and light lift it
        (CHANCE + 1.2 * LIFT * (REACH - CHANCE), 0.0, True),
    ],
)
def test_a_floor_must_be_at_chance_where_chance_is_known(floor: float, noise: float, fires: bool) -> None:
    chance_Q = np.where(PIDS == 7, np.nan, CHANCE)  # one person isn't in the gallery
    known = attacker(floor=floor, noise=noise)
    known.floor_Q[PIDS == 7] = np.nan
    lines = gates({"ridge": known}, chance_Q=chance_Q)
    assert bool(lines) == fires
    assert not fires or lines[0].startswith("the floor of ridge is 0.")
    assert gates({"ridge": known}) == []  # an axis that ranks nothing


def test_who_has_no_counterpart_on_the_control_breaks_nothing() -> None:
    absent = AttackScores(
        protected_Q=series(0.3, 0, 0), control_Q=np.full(len(PIDS), np.nan), floor_Q=series(CHANCE, 0, 0)
    )
    both = {"ridge": attacker(), "adaptive": absent}
    assert gates(both, {20: both, 100: both}, np.full(len(PIDS), CHANCE)) == []
    assert gates(both, {20: {"adaptive": absent}, 100: both}) == gates(both, {20: {}, 100: {}}) == []
    assert gates({"adaptive": absent}, {20: {"adaptive": absent}, 100: {"adaptive": absent}}) == []


def test_a_broken_attack_has_no_urr_and_says_why() -> None:
    utility = np.full(len(PIDS), 0.8)
    sound = urr(PIDS, utility, utility, {"ridge": attacker()}, resamples=100)
    broken = urr(PIDS, utility, utility, {"ridge": attacker()}, broken=["a floor flies", "more is less"], resamples=100)
    assert (sound.status, broken.status, broken.display) == ("ok", "n/a", "n/a")
    assert broken.broken and not sound.broken
    assert broken.reason == "attack broken: a floor flies; more is less"
    assert broken.urr.value is None and broken.r == sound.r
    blind = urr(PIDS, utility, utility, {"ridge": attacker(FLOOR)}, resamples=100)
    assert blind.status == "n/a" and blind.reason and blind.reason.startswith("attack broken: no attacker")
