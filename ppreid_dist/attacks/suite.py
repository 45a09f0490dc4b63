"""All attackers against two sets of stored features: what the protected ones leak of what unprotected ones do.

Every attacker is trained three times for each number of people: on the control's features (its ceiling), on the
protected ones, and on the control's features with the pictures of other people (its floor: what it makes of the prior
alone). Each is tested on people it has never seen, on two axes: pixels of the person, and identity, by whether an
independent ReID model finds the person from the reconstruction.

Shapes: N auxiliary pictures, Q query pictures, G gallery pictures, D feature dim, h w pixels.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ppreid_dist.attacks.attribute import attribute_leak
from ppreid_dist.attacks.auxiliary import Auxiliary
from ppreid_dist.attacks.base import Progress
from ppreid_dist.attacks.bench import Bench, Training, Victim
from ppreid_dist.attacks.informed import whitebox_leak, whitebox_trainings
from ppreid_dist.attacks.judging import chance_of, judge_quality, weak_judges
from ppreid_dist.attacks.linkage import linkage_of
from ppreid_dist.attacks.variants import auxiliary_leak, variant_bench, variant_trainings
from ppreid_dist.attacks.victims import Roles, attack_victims, expected, leaked_by, scores_of, trainings_of
from ppreid_dist.evaluation.bootstrap import Bootstrap, finite
from ppreid_dist.evaluation.gates import broken_gates, ruined_attackers
from ppreid_dist.evaluation.leak import AttackScores, worst_people
from ppreid_dist.evaluation.urr import attack_curve, urr

PLATEAU = 0.01  # a training is over where its error fell by no more over the last quarter


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
    chance_Q = chance_of(bench.query, *bench.gallery)
    # Before the trainings: a test in which nobody can be found, and a judge who finds nobody, are known at once.
    quality = {axis: judge_quality(judge, bench.query, bench.gallery, chance_Q) for axis, judge in bench.judges.items()}
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
    bench.carry_out(_trainings(bench, control, protected, variants))
    roles = attack_victims(bench, control, protected)
    return _summarise(bench, control, protected, roles, variants, chance_Q, quality, weak)


def help_suite(bench: Bench, control: Victim, protected: Victim, auxiliaries: Sequence[Auxiliary] = ()) -> None:
    """Make trainings of :func:`run_suite` in another process, until all are made."""
    variants = [(auxiliary, variant_bench(bench, auxiliary)) for auxiliary in auxiliaries]
    bench.carry_out(_trainings(bench, control, protected, variants))


def _trainings(
    bench: Bench, control: Victim, protected: Victim, variants: Sequence[tuple[Auxiliary, Bench]]
) -> list[Training]:
    both = {"control": control, "protected": protected}
    return [
        *trainings_of(bench, control, protected),
        *variant_trainings(variants, both),
        *whitebox_trainings(bench, both).values(),
    ]


def _summarise(
    bench: Bench,
    control: Victim,
    protected: Victim,
    roles: Roles,
    variants: Sequence[tuple[Auxiliary, Bench]],
    chance_Q: np.ndarray,
    quality: dict[str, dict[str, float]],
    notes: list[str],
) -> SuiteResult:
    """Ratios, curves and notes of what was trained."""
    config, largest = bench.config, bench.people[-1]
    if dropped := sorted(n for n in config.people if n > largest):
        more = ", ".join(map(str, dropped))
        notes.append(f"attack.people: {more}: there are only {largest} auxiliary people, and that many attacked")
    if config.seeds > 1:
        notes.append(
            f"attack.seeds: every attacker that is drawn at random was trained {config.seeds} times; the training that "
            "does best on its own held-out people counts"
        )
    if config.curve_steps is not None and len(bench.people) > 1:
        notes.append(
            f"attack.curve_steps: with fewer than {largest} people attackers were trained by at most "
            f"{config.curve_steps} gradient steps: they may find more"
        )
    notes += _cut_short(bench, roles)
    notes += _best_guesses(bench, roles)
    if left_out := [name for name in config.attackers if (name, largest) not in roles["protected"]]:
        notes.append(
            f"{', '.join(left_out)}: left out, the protected run was trained against no generator of this size"
        )
    all_scores = {axis: _scores(axis, bench, roles) for axis in bench.axes}
    axes = {
        axis: _axis(axis, bench, control, protected, scores, chance_Q if axis in bench.judges else None)
        for axis, scores in all_scores.items()
    }
    bootstrap = Bootstrap(bench.query.pids_N, config.resamples, config.seed, 0.95)
    for axis, found_there in axes.items():
        if found_there["urr"]["broken"]:
            notes.append(f"{axis}: {found_there['urr']['reason']}")
        notes += [f"{axis}: {line}" for line in ruined_attackers(bootstrap, *all_scores[axis])]
    victims = {control.name: roles["control"], protected.name: roles["protected"]}
    final = {(role, name): runs[name, largest] for role, runs in roles.items() for name, n in runs if n == largest}
    both = {"control": control, "protected": protected}
    met = [name for name in config.attackers if (name, largest) in roles["protected"]]

    def by_role(name: str, figure: str) -> dict[str, float | None]:
        return {role: finite(getattr(final[role, name], figure)) if (role, name) in final else None for role in roles}

    found = {
        # Of those on both victims, so that their pictures can be shown side by side.
        victim: {
            n: float(np.nanmean(runs[n, largest].scores["identity"]))
            for n, people in roles["control"]
            if people == largest
        }
        for victim, runs in victims.items()
    }
    return SuiteResult(
        axes=axes,
        attributes=attribute_leak(
            bench.aux,
            bench.query,
            {role: (of.aux_ND, of.query_QD) for role, of in both.items()},
            config.attribute,
            bootstrap,
            seed=config.seed,
            progress=bench.progress,
        ),
        whitebox=whitebox_leak(bench, both),
        linkage=linkage_of(
            bench.aux,
            bench.query,
            {role: (of.aux_ND, of.query_QD) for role, of in both.items()},
            protected.rekeyed,
            config.linkage,
            seed=config.seed,
        ),
        auxiliary=auxiliary_leak(variants, both),
        judges=quality,
        notes=notes,
        people=bench.people,
        leaked=len(leaked_by(protected)),
        seconds={
            name: sum(o.seconds for runs in roles.values() for (who, _), o in runs.items() if who == name)
            for name in config.attackers
        }
        | bench.took(),
        shown=bench.shown,
        reconstructions={
            (victim, name): outcome.shown
            for victim, runs in victims.items()
            for (name, n), outcome in runs.items()
            if n == largest
        },
        strongest={victim: max(by_name, key=by_name.__getitem__) for victim, by_name in found.items()},
        per_query={
            (axis, name, role): outcome.scores[axis] for axis in bench.axes for (role, name), outcome in final.items()
        },
        pixels={name: {"l1": by_role(name, "l1"), "psnr": by_role(name, "psnr")} for name in met},
        kid={name: by_role(name, "kid") for name in met},
    )


def _cut_short(bench: Bench, roles: Roles) -> list[str]:
    """A line for every attacker whose training was ended before its plateau."""
    lines = []
    meant = bench.people if bench.config.curve_steps is None else bench.people[-1:]
    for name in bench.config.attackers:
        found = [
            (outcome.still_falling, f"{role}, {n} people")
            for role, runs in roles.items()
            for (who, n), outcome in runs.items()
            if who == name and role != "floor" and outcome.still_falling > PLATEAU and n in meant
        ]
        if found:
            most, where = max(found)
            lines.append(
                f"{name}: not trained to its plateau: over the last quarter of its training its own error still fell "
                f"by {100 * most:.1f} % ({where}); it may find more, give attack.{name} more steps"
            )
    return lines


def _best_guesses(bench: Bench, roles: Roles) -> list[str]:
    """A line for every attacker that guesses: how far the best of its guesses is from what counts, their mean."""
    lines = []
    for name in bench.config.attackers:
        final = {role: runs[name, bench.people[-1]] for role, runs in roles.items() if (name, bench.people[-1]) in runs}
        each = [f"{np.nanmean(o.scores['pixel']):.3f} and {o.best:.3f} ({role})" for role, o in final.items()]
        if final and np.isfinite([outcome.best for outcome in final.values()]).all():
            lines.append(
                f"{name}: SSIM of the mean of its guesses, which counts, and of the guess that the picture itself "
                f"would choose: {', '.join(each)}"
            )
    return lines


Scores = tuple[dict[str, AttackScores], dict[int, dict[str, AttackScores]]]


def _scores(axis: str, bench: Bench, roles: Roles) -> Scores:
    """By attacker with the most people, and of the curve's attackers by number of people."""
    config, largest = bench.config, bench.people[-1]
    attackers = {
        name: scores_of(roles, axis, name, largest)
        for name in config.attackers
        if (name, largest) in roles["protected"]
    }
    # The same attackers at every number of people, or the curve would jump where others join.
    return attackers, {
        n: {name: scores_of(roles, axis, name, n) for name in config.curve_attackers} for n in bench.people
    }


def _axis(
    axis: str, bench: Bench, control: Victim, protected: Victim, scores: Scores, chance_Q: np.ndarray | None
) -> dict[str, Any]:
    config, pids_Q = bench.config, bench.query.pids_N
    bootstrap: dict[str, Any] = {"resamples": config.resamples, "seed": config.seed}
    attackers, by_n = scores
    broken = broken_gates(Bootstrap(pids_Q, **bootstrap, level=0.95), attackers, by_n, chance_Q)
    whole = urr(
        pids_Q,
        protected.utility_ap_Q,
        control.utility_ap_Q,
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
