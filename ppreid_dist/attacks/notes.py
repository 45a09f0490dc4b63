"""What a reader of the leak has to know of how it was found: lines that stand beside the figures."""

from collections.abc import Mapping

import numpy as np

from ppreid_dist.attacks.bench import Bench
from ppreid_dist.attacks.plateau import StepsConfig
from ppreid_dist.attacks.victims import Roles
from ppreid_dist.evaluation.bootstrap import Bootstrap
from ppreid_dist.evaluation.leak import AttackScores, measure_leak
from ppreid_dist.settings import Settings

PLATEAU = 0.01  # a training is over where its error fell by no more over the last quarter


def training_notes(bench: Bench, roles: Roles) -> list[str]:
    """Which attackers were left out, with fewer people or steps than asked for, or chosen between."""
    config, largest, lines = bench.config, bench.people[-1], []
    if dropped := sorted(n for n in config.people if n > largest):
        more = ", ".join(map(str, dropped))
        lines.append(f"attack.people: {more}: there are only {largest} auxiliary people, and that many attacked")
    if config.seeds > 1:
        lines.append(
            f"attack.seeds: every attacker that is drawn at random was trained {config.seeds} times; the training that "
            "does best on its own held-out people counts"
        )
    if config.curve_steps is not None and len(bench.people) > 1:
        lines.append(
            f"attack.curve_steps: with fewer than {largest} people attackers were trained by at most "
            f"{config.curve_steps} gradient steps: they may find more"
        )
    untrained = [name for name in config.attackers if _as_it_begins(getattr(config, name))]
    if untrained:
        lines.append(
            f"{', '.join(untrained)}: as they begin, without a gradient step (plateau.max_steps is 0); trained, they "
            "may find more"
        )
    lines += _cut_short(bench, roles)
    lines += _best_guesses(bench, roles)
    if left_out := [name for name in config.attackers if (name, largest) not in roles["protected"]]:
        lines.append(
            f"{', '.join(left_out)}: left out, the protected run was trained against no generator of this size"
        )
    return lines


def tie_notes(bootstrap: Bootstrap, attackers: Mapping[str, AttackScores]) -> list[str]:
    """A line where others are as strong on the control as the strongest there."""
    leak = measure_leak(bootstrap, attackers)[1]
    if leak is None or not leak.tied:
        return []
    return [
        f"{' and '.join((leak.against, *leak.tied))} are equally strong on unprotected features, within noise, so that "
        "r and the upper end of its interval are somewhat too low on this axis"
    ]


def _as_it_begins(config: Settings) -> bool:
    return isinstance(config, StepsConfig) and config.plateau.max_steps == 0


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
