"""Attackers who know something else than what is stored of the domain's other people (:mod:`.auxiliary`).

For every variant, with the fewest and the most people of ``attack.people``, as far as there are so many (with all where
the stolen database was read by the pictures of all): ceiling, protected and floor by the same trainings as the main
attack's, and the leak by the same measure. None of it enters the axes. Attackers who know n of the tested people are
tested on those n.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from ppreid_dist.attacks.auxiliary import Auxiliary
from ppreid_dist.attacks.bench import Bench, Victim
from ppreid_dist.attacks.victims import Roles, attack_victims, scores_of, trainings_of
from ppreid_dist.attacks.work import Training
from ppreid_dist.evaluation.bootstrap import Bootstrap
from ppreid_dist.evaluation.leak import AttackScores, measure_leak
from ppreid_dist.evaluation.urr import NO_ATTACKER


def variant_bench(bench: Bench, auxiliary: Auxiliary) -> Bench:
    """The bench for those who learn on ``auxiliary``. ConfigError naming the variant where it has too few people."""
    config, wanted = bench.config, bench.config.people
    names, most = config.auxiliary.attackers, len(np.unique(auxiliary.pictures.pids_N))
    ends = {min(wanted, key=lambda n: n or most), max(wanted, key=lambda n: n or most)}
    if auxiliary.stolen_LD:
        ends = {0}
    return bench.learning_on(
        auxiliary.pictures,
        replace(config, attackers=names, curve_attackers=names, people=sorted(ends)),
        where=f"attack.auxiliary.variants: {auxiliary.variant}",
        by_picture=auxiliary.variant == "same_people",
    )


def _learnt(auxiliary: Auxiliary, victims: Mapping[str, Victim]) -> dict[str, Victim]:
    return {role: _met(auxiliary, role, victim) for role, victim in victims.items()}


def _met(auxiliary: Auxiliary, role: str, victim: Victim) -> Victim:
    name = f"{victim.name}, {auxiliary.variant}"
    met = replace(victim, name=name, aux_ND=auxiliary.features_ND[role], reversal=None)
    if (stolen_LD := auxiliary.stolen_LD.get(role)) is None:
        return met
    asked = len(victim.query_QD)
    return replace(met, query_QD=stolen_LD[:asked], leaked_LD=stolen_LD[asked:])


def variant_trainings(variants: Sequence[tuple[Auxiliary, Bench]], victims: Mapping[str, Victim]) -> list[Training]:
    """All that :func:`auxiliary_leak` asks for."""
    return [
        training for auxiliary, bench in variants for training in trainings_of(bench, **_learnt(auxiliary, victims))
    ]


def auxiliary_leak(
    variants: Sequence[tuple[Auxiliary, Bench]], victims: Mapping[str, Victim]
) -> list[dict[str, Any]] | None:
    """A row for each variant and number of people, JSON-ready; None where the configuration names no variant."""
    rows = []
    for auxiliary, bench in variants:
        roles = attack_victims(bench, **_learnt(auxiliary, victims))
        for n in bench.people:
            known_Q = np.full(len(bench.query.pids_N), True)
            if auxiliary.variant == "same_people":
                known_Q = np.isin(bench.query.pids_N, bench.order[:n])
            axes = {axis: _leak(bench, roles, axis, n, known_Q) for axis in bench.axes}
            rows.append({"variant": auxiliary.variant, "people": n, "axes": axes})
    return rows or None


def _leak(bench: Bench, roles: Roles, axis: str, n: int, known_Q: np.ndarray) -> dict[str, Any]:
    config = bench.config
    bootstrap = Bootstrap(bench.query.pids_N[known_Q], config.resamples, config.seed, 0.95)

    def series(name: str) -> AttackScores:
        whole = scores_of(bench, roles, axis, name, n)
        return AttackScores(**{key: of_Q[known_Q] for key, of_Q in vars(whole).items()})

    results, leak = measure_leak(bootstrap, {name: series(name) for name in config.attackers})
    # Without a leak the scores still say how far the attack came.
    name = leak.attacker if leak else max(results, key=lambda name: results[name].control or 0.0)
    return {
        "attacker": name,
        **{role: getattr(results[name], role) for role in ("protected", "control", "floor")},
        "r": asdict(leak.r) if leak else dict.fromkeys(("value", "low", "high")),
        "reason": None if leak else NO_ATTACKER,
    }
