"""Methods against each other: a row each, all under the same attackers, control and training budget.

``table.json`` and ``table.md``, described in ``docs/sweep.md``. Figures are means over the seeds that are done.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppreid_dist.evaluation.bootstrap import in_words
from ppreid_dist.files import write_json, write_text
from ppreid_dist.sweep.front import SAID, mean

SCHEMA = "ppreid-table/2"
_WHOLE = {"value": 1.0, "low": 1.0, "high": 1.0, "least": 1.0, "most": 1.0}


def table_of(front: Mapping[str, Any]) -> dict[str, Any]:
    """``table.json`` of a sweep's front: the unprotected control by definition, then every method."""
    axes = list(front["front"])
    rows = [_unprotected(front, axes)] if front["points"] else []
    points = {point["method"]: point for point in front["points"]}
    for method in dict.fromkeys(trial["method"] for trial in front["trials"]):
        trials = [trial for trial in front["trials"] if trial["method"] == method]
        reasons = [trial["reason"] for trial in trials if trial["status"] != "done"]
        if method not in points:
            rows.append({"method": method, "seeds": [], "failed": reasons})
            continue
        point, done = points[method], [trial for trial in trials if trial["status"] == "done"]
        rows.append(
            {
                "method": method,
                "seeds": point["seeds"],
                "failed": reasons,
                "mAP": point["mAP"],
                "u": point["utility"],
                **{f"r_{axis}": point["axes"][axis]["leak"] for axis in axes},
                "attackers": {axis: _each(done, axis) for axis in axes},
                "curve": {axis: _curve(done, axis) for axis in axes},
                "urr": {axis: point["axes"][axis]["urr"] for axis in axes},
                "on_front": [axis for axis in axes if point["name"] in front["front"][axis]],
                "masking": point["masking"],
                "minutes": {
                    what: sum(trial["seconds"][what] for trial in done) / len(done) / 60
                    for what in ("training", "attack")
                },
            }
        )
    return {
        "schema": SCHEMA,
        "name": front["name"],
        "created": front["created"],
        "complete": front["complete"],
        "people": front["people"],
        "axes": axes,
        "remarks": [line for said in SAID for line in said(front["trials"])],
        "rows": rows,
    }


def _unprotected(front: Mapping[str, Any], axes: Sequence[str]) -> dict[str, Any]:
    """What everything is measured by."""
    mAPs = list(front["controls"].values())
    ratio = {**_WHOLE, "status": "ok", "display": "1", "reason": None, "broken": False}
    return {
        "method": "unprotected",
        "seeds": sorted({seed for point in front["points"] for seed in point["seeds"]}),
        "failed": [],
        "mAP": mean([{"value": mAP, "low": None, "high": None} for mAP in mAPs]),
        "u": _WHOLE,
        **{f"r_{axis}": _WHOLE for axis in axes},
        "attackers": {axis: {} for axis in axes},
        "curve": {axis: [] for axis in axes},
        "urr": {axis: ratio for axis in axes},
        "on_front": [],
        "masking": False,
        "minutes": None,
    }


def _each(done: Sequence[Mapping[str, Any]], axis: str) -> dict[str, Any]:
    """Every attacker's own ratio, where all seeds have it."""
    names = dict.fromkeys(name for trial in done for name in trial["axes"][axis]["attackers"])
    empty = {"value": None, "low": None, "high": None}
    return {name: mean([trial["axes"][axis]["attackers"].get(name, empty) for trial in done]) for name in names}


def _curve(done: Sequence[Mapping[str, Any]], axis: str) -> list[dict[str, Any]]:
    """r of the curve's attackers with each number of people, where all seeds have it, the fewest first."""
    seeds = [{point["n"]: point["r"] for point in trial["axes"][axis]["curve"]} for trial in done]
    return [{"n": n, **mean([seed[n] for seed in seeds])} for n in sorted(set.intersection(*map(set, seeds)))]


def write_table(table: Mapping[str, Any], folder: Path) -> None:
    """``table.json`` and ``table.md``."""
    write_json(folder / "table.json", dict(table))
    write_text(folder / "table.md", as_markdown(table))


def as_markdown(table: Mapping[str, Any]) -> str:
    """A line per method: figures with their intervals, in parentheses the seeds where there are several."""
    axes = table["axes"]
    found = [row["attackers"] for row in table["rows"] if row["seeds"]]
    names = {axis: list(dict.fromkeys(name for each in found for name in each[axis])) for axis in axes}
    heads = ["method", "mAP", "u", *(f"r {axis}" for axis in axes), *(f"URR {axis}" for axis in axes)]
    heads += [f"{name}, {axis}" for axis in axes for name in names[axis]]
    curves = [curve for row in table["rows"] if row["seeds"] for curve in row["curve"].values()]
    fewer = sorted({point["n"] for curve in curves for point in curve} - {table["people"]})
    heads += [f"r {axis} @{n}" for axis in axes for n in fewer] + ["minutes"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for row in table["rows"]:
        if not row["seeds"]:
            cells = [row["method"], f"failed: {'; '.join(dict.fromkeys(row['failed']))}"]
            cells += [""] * (len(heads) - len(cells))
        elif row["minutes"] is None:
            cells = [row["method"], _figure(row["mAP"], 3), "1", *("1" for _ in axes), *("1" for _ in axes)]
            cells += ["1"] * (len(heads) - len(cells) - 1) + [""]
        else:
            cells = [row["method"], _figure(row["mAP"], 3), _figure(row["u"])]
            broken = {axis: " (attack broken)" if row["urr"][axis]["broken"] else "" for axis in axes}
            cells += [_figure(row[f"r_{axis}"]) + broken[axis] for axis in axes]
            cells += [row["urr"][axis]["display"] for axis in axes]
            for axis in axes:
                own = row["attackers"][axis]
                cells += [_figure(own[name]) if name in own else "none" for name in names[axis]]
            for axis in axes:
                by_n = {point["n"]: point for point in row["curve"][axis]}
                cells += [_figure(by_n[n]) if n in by_n else "none" for n in fewer]
            cells.append(f"{row['minutes']['training']:.1f} + {row['minutes']['attack']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    said = [
        f"{table['people']} auxiliary people. r: what the best attacker finds over what the best one found without "
        "protection; an attacker's column is its own ratio; @n: of the curve's attackers, with n people. In brackets "
        "identity-bootstrap intervals, means over seeds; in parentheses the seeds' spread. Minutes: training + "
        "attackers, a seed."
    ]
    said += table["remarks"]
    if not table["complete"]:
        said.append("Not complete.")
    return "\n".join([*lines, "", *said]) + "\n"


def _figure(interval: Mapping[str, Any], digits: int = 2) -> str:
    text = in_words(interval, digits)
    if interval["least"] is not None and interval["least"] != interval["most"]:
        text += f" ({interval['least']:.{digits}f} to {interval['most']:.{digits}f})"
    return text
