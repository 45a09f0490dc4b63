"""All attackers against two sets of stored features: what the protected ones leak of what unprotected ones do.

Every attacker is trained three times for each number of people: on the control's features (its ceiling), on the
protected ones, and on the control's features with the pictures of other people (its floor: what it makes of the prior
alone). Each is tested on people it has never seen, on two axes: pixels of the person, and identity, by whether an
independent ReID model finds the person from the reconstruction.

Shapes: N auxiliary pictures, Q query pictures, G gallery pictures, D feature dim, h w pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from ppreid_dist.attacks.attribute import attribute_leak
from ppreid_dist.attacks.auxiliary import Auxiliary
from ppreid_dist.attacks.base import Outcome, Progress
from ppreid_dist.attacks.bench import Bench, Victim
from ppreid_dist.attacks.informed import whitebox_leak, whitebox_trainings
from ppreid_dist.attacks.judging import judge_quality, weak_judges
from ppreid_dist.attacks.linkage import Stored, linkage_of
from ppreid_dist.attacks.notes import tie_notes, training_notes
from ppreid_dist.attacks.variants import auxiliary_leak, variant_bench, variant_trainings
from ppreid_dist.attacks.victims import Roles, attack_victims, expected, leaked_by, scores_of, trainings_of
from ppreid_dist.attacks.work import Training
from ppreid_dist.evaluation.bootstrap import Bootstrap, finite
from ppreid_dist.evaluation.gates import broken_gates, ruined_attackers
from ppreid_dist.evaluation.leak import AttackScores, worst_people
from ppreid_dist.evaluation.urr import attack_curve, urr


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """``axes`` is JSON-ready: metric, leak, urr, attackers, curve and n50 of every axis; so are ``attributes``, what
    the attribute probe found (``attacks.attribute``), ``whitebox``, who knows the extractor (``attacks.informed``),
    ``linkage``, who has another database of the same people (``attacks.linkage``), and ``auxiliary``, who learns on
    other pictures (``attacks.variants``). ``judges`` says by axis what its judge reaches on real pictures: mAP, rank1
    and chance.

    ``reconstructions`` holds uint8 pictures by (victim's name, attacker), of the query rows ``shown``;
    ``strongest`` the attacker that found most people, by victim's name. ``per_query`` holds the scores behind the
    axes, by (axis, attacker, "control" | "protected" | "floor"), ``pixels`` the mean "l1" and "psnr" by
    attacker and role, ``kid`` kernel distances by attacker and role (None where there is none), all at the largest
    number of people. ``seconds`` is the training time of each attacker, over all trainings, and of what they share
    (``attacks.recognisers``), ``leaked`` the number of
    the stolen database's entries.
    """

    axes: dict[str, dict[str, Any]]
    attributes: dict[str, Any] | None
    whitebox: dict[str, Any] | None
    linkage: list[dict[str, Any]] | None
    auxiliary: list[dict[str, Any]] | None
    judges: dict[str, dict[str, float]]
    notes: list[str]
    people: list[int]
    leaked: int
    seconds: dict[str, float]
    shown: np.ndarray
    reconstructions: dict[tuple[str, str], Tensor]
    strongest: dict[str, str]
    per_query: dict[tuple[str, str, str], np.ndarray]
    pixels: dict[str, dict[str, dict[str, float | None]]]
    kid: dict[str, dict[str, float | None]]


def run_suite(
    bench: Bench,
    control: Victim,
    protected: Victim,
    *,
    auxiliaries: Sequence[Auxiliary] = (),
    processes: int = 1,
    announce: Progress | None = None,
) -> SuiteResult:
    """Attack both victims and put the leak in figures.

    Features and pictures lie on one device. ``auxiliaries`` is what else attackers learn on. ``announce`` is told which
    judges are weak, how long the trainings may take by so many ``processes`` (others of which call :func:`help_suite`),
    for which some steps of each are tried, and what that leaves out.

    Raises ConfigError naming the variant where there are too few auxiliary people.
    """
    # Before the trainings: a test in which nobody can be found, and a judge who finds nobody, are known at once.
    quality = {
        axis: judge_quality(judge, bench.query, bench.gallery, bench.chance_Q) for axis, judge in bench.judges.items()
    }
    by_cosine_Q = control.utility_ap_Q if control.cosine_ap_Q is None else control.cosine_ap_Q  # as judges are measured
    weak = weak_judges(bench.judges, quality, float(np.nanmean(by_cosine_Q)))
    variants = [(auxiliary, variant_bench(bench, auxiliary)) for auxiliary in auxiliaries]
    if announce is not None:
        for line in weak:
            announce(line)
    if announce is not None and (line := expected(bench, control, protected, processes)):
        parts = {"white-box inversion": bench.config.whitebox.people, "attack.auxiliary": variants}
        left_out = [name for name, there in parts.items() if there]
        announce(line + (f"; not counted: {', '.join(left_out)}" if left_out else ""))
    victims = {"control": control, "protected": protected}
    bench.work.carry_out(_trainings(bench, victims, variants))
    return _summarise(bench, victims, variants, quality, weak)


def help_suite(bench: Bench, control: Victim, protected: Victim, auxiliaries: Sequence[Auxiliary] = ()) -> None:
    """Make trainings of :func:`run_suite` in another process, until all are made."""
    variants = [(auxiliary, variant_bench(bench, auxiliary)) for auxiliary in auxiliaries]
    bench.work.carry_out(_trainings(bench, {"control": control, "protected": protected}, variants))


def _trainings(
    bench: Bench, victims: Mapping[str, Victim], variants: Sequence[tuple[Auxiliary, Bench]]
) -> list[Training]:
    return [
        *trainings_of(bench, **victims),
        *variant_trainings(variants, victims),
        *whitebox_trainings(bench, victims).values(),
    ]


def _summarise(
    bench: Bench,
    victims: Mapping[str, Victim],
    variants: Sequence[tuple[Auxiliary, Bench]],
    quality: dict[str, dict[str, float]],
    notes: list[str],
) -> SuiteResult:
    """Ratios and curves of "control" and "protected", and ``notes`` with what else is to be said."""
    config, largest = bench.config, bench.people[-1]
    roles = attack_victims(bench, **victims)
    bootstrap = Bootstrap(bench.query.pids_N, config.resamples, config.seed, 0.95)
    scores = {axis: _scores(axis, bench, roles) for axis in bench.axes}
    axes = {axis: _axis(axis, bench, victims, scores[axis]) for axis in bench.axes}
    notes = notes + training_notes(bench, roles)
    for axis, found in axes.items():
        if found["urr"]["broken"]:
            notes.append(f"{axis}: {found['urr']['reason']}")
        else:
            notes += [f"{axis}: {line}" for line in tie_notes(bootstrap, scores[axis][0])]
        notes += [f"{axis}: {line}" for line in ruined_attackers(bootstrap, *scores[axis])]
    final = {role: {name: of for (name, n), of in runs.items() if n == largest} for role, runs in roles.items()}
    shown = {victims[role].name: final[role] for role in victims}
    stored = {role: Stored(victim.aux_ND, victim.query_QD, leaked_by(victim)) for role, victim in victims.items()}

    def coded(its: Stored) -> Stored | None:
        leaked_LD = its.query_QD if its.leaked_LD is None else its.leaked_LD
        found = bench.positions(its.aux_ND, leaked_LD, len(its.query_QD))
        return None if found is None else Stored(found(its.aux_ND), found(its.query_QD))

    def by_role(name: str, figure: str) -> dict[str, float | None]:
        return {role: finite(getattr(runs[name], figure)) if name in runs else None for role, runs in final.items()}

    def found_people(runs: Mapping[str, Outcome], name: str) -> float:
        return float(np.nanmean(runs[name].scores["identity"]))

    return SuiteResult(
        axes=axes,
        attributes=attribute_leak(
            bench.aux,
            bench.query,
            {role: (its.aux_ND, its.query_QD) for role, its in stored.items()},
            config.attribute,
            bootstrap,
            seed=config.seed,
            progress=bench.progress,
            positions={
                role: bench.positions(its.aux_ND, leaked_by(victims[role]), len(its.query_QD))
                for role, its in stored.items()
            },
        ),
        whitebox=whitebox_leak(bench, victims, {axis: of for axis, (of, _) in scores.items()}),
        linkage=linkage_of(
            bench.aux,
            bench.query,
            stored,
            victims["protected"].rekeyed,
            config.linkage,
            seed=config.seed,
            coded=coded,
        ),
        auxiliary=auxiliary_leak(variants, victims),
        judges=quality,
        notes=notes,
        people=bench.people,
        leaked=len(leaked_by(victims["protected"])),
        seconds={
            name: sum(of.seconds for runs in roles.values() for (who, _), of in runs.items() if who == name)
            for name in config.attackers
        }
        | bench.took(),
        shown=bench.shown,
        reconstructions={(victim, name): of.shown for victim, runs in shown.items() for name, of in runs.items()},
        # Of those on both victims, so that their pictures can be shown side by side.
        strongest={victim: max(final["control"], key=partial(found_people, runs)) for victim, runs in shown.items()},
        per_query={
            (axis, name, role): of.scores[axis]
            for axis in bench.axes
            for role, runs in final.items()
            for name, of in runs.items()
        },
        pixels={name: {"l1": by_role(name, "l1"), "psnr": by_role(name, "psnr")} for name in final["protected"]},
        kid={name: by_role(name, "kid") for name in final["protected"]},
    )


Scores = tuple[dict[str, AttackScores], dict[int, dict[str, AttackScores]]]


def _scores(axis: str, bench: Bench, roles: Roles) -> Scores:
    """By attacker with the most people, and of the curve's attackers by number of people."""
    config, largest = bench.config, bench.people[-1]
    attackers = {
        name: scores_of(bench, roles, axis, name, largest)
        for name in config.attackers
        if (name, largest) in roles["protected"]
    }
    # The same attackers at every number of people, or the curve would jump where others join.
    return attackers, {
        n: {name: scores_of(bench, roles, axis, name, n) for name in config.curve_attackers} for n in bench.people
    }


def _axis(axis: str, bench: Bench, victims: Mapping[str, Victim], scores: Scores) -> dict[str, Any]:
    config, pids_Q = bench.config, bench.query.pids_N
    chance_Q = bench.chance_Q if axis in bench.judges else None
    bootstrap: dict[str, Any] = {"resamples": config.resamples, "seed": config.seed}
    attackers, by_n = scores
    broken = broken_gates(Bootstrap(pids_Q, **bootstrap, level=0.95), attackers, by_n, chance_Q)
    whole = urr(
        pids_Q,
        victims["protected"].utility_ap_Q,
        victims["control"].utility_ap_Q,
        attackers,
        broken=broken,
        min_utility=config.min_utility,
        **bootstrap,
    )
    curve = attack_curve(pids_Q, by_n, whole, **bootstrap)
    alone = {
        name: attack_curve(pids_Q, {n: {name: by_n[n][name]} for n in by_n}, **bootstrap).points
        for name in config.curve_attackers
    }
    works = {name: of for name, of in attackers.items() if whole.attackers[name].status != "broken"}
    worst = worst_people(works, pids_Q) if whole.attacker else None
    return {
        "metric": bench.axes[axis],
        "leak": {
            **asdict(whole.r),
            "attacker": whole.attacker,
            "against": whole.against,
            "own": {**asdict(whole.own), "attacker": whole.own_attacker},
        },
        "worst": asdict(worst) if worst else None,
        "urr": {
            **asdict(whole.urr),
            "display": whole.display,
            "status": whole.status,
            "reason": whole.reason,
            "broken": whole.broken,
            "raw": whole.urr_raw,
            "base": whole.urr_base,
        },
        "attackers": {name: asdict(result) for name, result in whole.attackers.items()},
        "curve": [
            {
                "n": point.n,
                "r": {**asdict(point.r), "attacker": point.attacker},
                "attackers": {name: asdict(points[i].r) for name, points in alone.items()},
            }
            for i, point in enumerate(curve.points)
        ],
        "n50": {
            "value": curve.n50,
            "text": f"{curve.n50:.0f}" if curve.n50 is not None else curve.n50_reason,
        },
    }
