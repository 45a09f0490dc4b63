"""From trials to points, and from points to the front: what privacy costs.

A point is a setting, its figures the means over its seeds that are done. Point A dominates B, on one axis of the leak,
if it has as much mAP and as little leak, and is better in one; the front is what nothing dominates. Axes are never
averaged: each has its front and its hypervolume, and one of them, ``axis``, chooses what is recommended.

``front.json``, written by :func:`front_of`, is described in ``docs/sweep.md``.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from ppreid_dist.evaluation.bootstrap import in_words
from ppreid_dist.sweep.folder import Folder

SCHEMA = "ppreid-front/2"
REFERENCE = {"mAP": 0.0, "leak": 1.0}  # the corner that the hypervolume is measured from: useless, and unprotected
Pair = tuple[float, float]  # mAP, leak


def pareto(pairs: Mapping[str, Pair]) -> list[str]:
    """The names that nothing dominates, the least leak first."""

    def dominated(of: Pair) -> bool:
        return any(mAP >= of[0] and leak <= of[1] and (mAP, leak) != of for mAP, leak in pairs.values())

    return sorted((name for name, pair in pairs.items() if not dominated(pair)), key=lambda name: pairs[name][1])


def hypervolume(pairs: Sequence[Pair]) -> float:
    """The share of the square mAP 0…1, leak 0…1 that some point dominates; a leak below 0 is noise and counts as 0."""
    area, best = 0.0, REFERENCE["mAP"]
    inside = sorted((max(leak, 0.0), mAP) for mAP, leak in pairs if leak < REFERENCE["leak"])
    for leak, mAP in inside:  # each adds, at its leak and above, what it has more of than those with less leak
        area += max(mAP - best, 0.0) * (REFERENCE["leak"] - leak)
        best = max(best, mAP)
    return area


def make_points(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The points of these trials that have a seed that is done, in the order of their weight λ."""
    by_point: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == "done":
            by_point.setdefault(row["point"], []).append(row)
    found = [_point(name, done) for name, done in by_point.items()]
    return sorted(found, key=lambda point: point["weight"])


def _point(name: str, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    # A trial's mAP has the interval of its ratio to the control's, in units of the control's.
    mAPs = [
        {"value": row["mAP"], **{end: _times(row["utility"][end], row["control_mAP"]) for end in ("low", "high")}}
        for row in rows
    ]
    return {
        "name": name,
        "method": rows[0]["method"],
        "settings": rows[0]["settings"],
        "weight": rows[0]["weight"],
        "seeds": [row["seed"] for row in rows],
        "mAP": mean(mAPs),
        "utility": mean([row["utility"] for row in rows]),
        "masking": None if (seen := {row["masking"] for row in rows}) == {None} else True in seen,
        "axes": {
            axis: {
                "leak": mean([row["axes"][axis]["leak"] for row in rows]),
                "urr": _urr([row["axes"][axis]["urr"] for row in rows]),
            }
            for axis in shared_axes(rows)
        },
    }


def shared_axes(of: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those that all of these rows or points have."""
    return [axis for axis in of[0]["axes"] if all(axis in each["axes"] for each in of)]


def mean(intervals: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Over seeds: the mean value, its spread (``least``, ``most``), and the mean of each end of the intervals.

    All seeds are tested on the same people, whose choice is what the intervals are about: more seeds don't narrow them.
    None where a seed has none.
    """
    values = [interval["value"] for interval in intervals]
    known = None not in values
    return {
        "value": _mean(values),
        "low": _mean([interval["low"] for interval in intervals]),
        "high": _mean([interval["high"] for interval in intervals]),
        "least": min(values) if known else None,
        "most": max(values) if known else None,
    }


def _urr(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean where every seed has a value; the bounds' mean where all are bounds; else n/a."""
    statuses = {urr["status"] for urr in seeds}
    whole = mean(seeds)
    if statuses == {"ok"}:
        return {**whole, "status": "ok", "display": in_words(whole), "reason": None, "broken": False}
    empty = dict.fromkeys(whole) | {"broken": any(urr["broken"] for urr in seeds)}
    reasons = "; ".join(dict.fromkeys(urr["reason"] for urr in seeds if urr["reason"]))
    if statuses == {"bound"}:
        bound = {**empty, "low": whole["low"]}
        return {**bound, "status": "bound", "display": f"≥ {whole['low'] or 0:.2f}", "reason": reasons}
    display = "n/a" if statuses == {"n/a"} else ", ".join(urr["display"] for urr in seeds)
    return {**empty, "status": "n/a", "display": display, "reason": reasons}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def pairs_of(points: Sequence[Mapping[str, Any]], axis: str) -> dict[str, Pair]:
    """mAP and leak of the points whose leak a sound attack measured: a broken one's says nothing."""
    sound = [point for point in points if not point["axes"][axis]["urr"]["broken"]]
    leaks = {point["name"]: point["axes"][axis]["leak"]["value"] for point in sound}
    return {
        point["name"]: (point["mAP"]["value"], leak) for point in sound if (leak := leaks[point["name"]]) is not None
    }


def recommend(points: Sequence[Mapping[str, Any]], axis: str, min_utility: float) -> str | None:
    """Of the front, the one with the least leak of those that keep enough utility; None if none does."""
    pairs = pairs_of(points, axis)
    useful = {point["name"] for point in points if (point["utility"]["value"] or 0.0) >= min_utility}
    return next((name for name in pareto(pairs) if name in useful), None)


def remarks(points: Sequence[Mapping[str, Any]], recommended: str | None, axis: str, min_utility: float) -> list[str]:
    """What a reader must know of the recommendation before believing it."""
    if recommended is None:
        return [f"No point keeps {min_utility:.0%} of the control's mAP with a leak that a sound attack measured."]
    point = next(point for point in points if point["name"] == recommended)
    leak, said = point["axes"][axis]["leak"], []
    if leak["value"] >= 1:
        said.append(f"The recommended point leaks no less than the control (r {leak['value']:.2f}).")
    elif leak["high"] is None or leak["high"] >= 1:
        said.append("The interval of its leak reaches 1: no reduction is established.")
    if point["masking"]:
        said.append("Its training shows masking: its own adversary erred more than a fresh one.")
    if len(point["seeds"]) == 1:
        said.append("It rests on one seed: how far another would differ wasn't measured.")
    return said


def of_several_controls(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line where a seed has several controls, as where the backbone varies: what share of a larger leak is left may
    be more than a larger share of a smaller one."""
    controls: dict[int, set[str]] = {}
    for row in rows:
        if row["status"] == "done":
            controls.setdefault(row["seed"], set()).add(row["control"])
    if all(len(names) < 2 for names in controls.values()):
        return []
    return [
        "Points were measured against different controls: r and URR are shares of what each control leaks, and can't "
        "be compared between them."
    ]


def of_several_sources(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line where trials were attacked by different attackers, as after an update."""
    versions = {row.get("attackers_source") for row in rows if row["status"] == "done"}
    if len(versions) < 2:
        return []
    return [
        f"Trials were attacked by {len(versions)} versions of the attackers and can't be compared: --resume --reattack "
        "attacks the older ones again."
    ]


def of_other_axes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line where some trials lack axes that others have, as where a judge has come or gone."""
    done = [row for row in rows if row["status"] == "done"]
    every = dict.fromkeys(axis for row in done for axis in row["axes"])
    missing = [axis for axis in every if any(axis not in row["axes"] for row in done)]
    if not missing:
        return []
    return [f"Left out, since not all trials have it: {', '.join(missing)}. --resume --reattack gives it to all."]


def of_reranking(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line where mAP isn't that of the features' own distances."""
    done = [row for row in rows if row["status"] == "done"]
    reranked = [row["name"] for row in done if row.get("matching") == "re-ranked"]
    if not reranked:
        return []
    if len(reranked) == len(done):
        return ["mAP and u are after k-reciprocal re-ranking (attack.rerank), the control's too."]
    return [
        "mAP and u are after k-reciprocal re-ranking (attack.rerank) in some trials only, which can't be compared with "
        f"the others: {', '.join(reranked)}."
    ]


SAID = (of_several_sources, of_several_controls, of_other_axes, of_reranking)  # of trials, before comparing points


def front_of(folder: Folder) -> dict[str, Any]:
    """``front.json`` of what is done so far."""
    config, known = folder.config, folder.known()
    rows = [row for trial in known if (row := folder.row(trial)) is not None]
    points = make_points(rows)
    expected = folder.expected()
    recommended = recommend(points, config.axis, config.min_utility)
    axes = shared_axes(points) if points else [config.axis]
    controls = {row["control"]: row["control_mAP"] for row in rows if row["status"] == "done"}
    return {
        "schema": SCHEMA,
        "name": folder.path.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "complete": len(rows) >= expected,
        "expected": expected,
        "trials": rows,
        "points": points,
        "controls": controls,
        "front": {axis: pareto(pairs_of(points, axis)) for axis in axes},
        "hypervolume": {axis: hypervolume(list(pairs_of(points, axis).values())) for axis in axes},
        "reference": REFERENCE,
        "axis": config.axis,
        "recommended": recommended,
        "rule": f"the least {config.axis} leak on the front among points that keep at least "
        f"{config.min_utility:.0%} of the control's mAP, means over seeds; chosen among {len(points)}, by the people "
        "who are tested, which no interval counts",
        "remarks": [
            *(remarks(points, recommended, config.axis, config.min_utility) if points else []),
            *(line for said in SAID for line in said(rows)),
        ],
        "people": max((row["people"] for row in rows if row["status"] == "done"), default=None),
        "trials_per_hour": trials_per_hour(rows),
    }


def trials_per_hour(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Done trials over the hours in which at least one of them ran: pauses of the sweep don't count."""
    spans = sorted(
        (datetime.fromisoformat(row["began"]), datetime.fromisoformat(row["ended"]))
        for row in rows
        if row["status"] == "done"
    )
    seconds, reached = 0.0, None
    for began, ended in spans:
        start = began if reached is None else max(began, reached)
        seconds += max((ended - start).total_seconds(), 0.0)
        reached = ended if reached is None else max(reached, ended)
    return round(3600 * len(spans) / seconds, 2) if seconds else None
