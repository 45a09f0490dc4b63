"""The privacy card: what goes beside a model when it is handed on, in the manner of a model card.

``card.json`` holds the figures, ``card.md`` the same in words, by the rules of the report's first screen. Both are made
from a checked report and say nothing that isn't in it.
"""

from typing import Any

from ppreid_dist.reporting.verdict import axis_title, ends, learnt_from, no_measure, number, percent, write_verdict

SCHEMA = "ppreid-card/2"


def make_card(report: dict[str, Any]) -> dict[str, Any]:
    """``card.json``; its keys are described in ``docs/report.md``."""
    verdict = write_verdict(report)
    return {
        "schema": SCHEMA,
        "name": report["name"],
        "created": report["created"],
        "method": report["training"]["protected"]["method"],
        "protocol": report["protocol"],
        "headline": verdict.headline,
        "people": report["attack"]["people"],
        "utility": {
            "control": report["utility"]["control"]["mAP"],
            "protected": report["utility"]["protected"]["mAP"],
            "kept": report["utility"]["ratio"],
        },
        "leak": {
            name: {
                **{key: axis["leak"][key] for key in ("value", "low", "high", "attacker")},
                "worst_people": None if axis["worst"] is None else axis["worst"]["r"],
                "urr": axis["urr"]["display"],
                "broken": axis["urr"]["broken"],
            }
            for name, axis in report["axes"].items()
        },
        "attributes": None if report["attributes"] is None else report["attributes"]["mean"]["r"],
        "whitebox": None
        if report["whitebox"] is None
        else {name: row["r"] for name, row in report["whitebox"]["axes"].items()},
        "linkage": report["linkage"],
        "auxiliary": report["auxiliary"],
        "warnings": [f"{line.label}: {line.text}" for line in verdict.warnings],
    }


def as_markdown(card: dict[str, Any], report: dict[str, Any]) -> str:
    """``card.md``."""
    verdict, kept = write_verdict(report), card["utility"]["kept"]
    broken = {name: no_measure(axis) for name, axis in report["axes"].items()}
    rows = [
        ("Method", card["method"]),
        (
            "mAP, unprotected → protected",
            f"{percent(card['utility']['control'])} → {percent(card['utility']['protected'])}, "
            f"{percent(kept['value'])} kept {ends(kept, percent)}",
        ),
    ]
    for name, leak in card["leak"].items():
        title, counts = axis_title(name), "no measure, since the attack is broken: {}" if broken[name] else "{}"
        found = f"{number(leak['value'])} {ends(leak)}, by {leak['attacker'] or 'nobody'}"
        rows.append((f"{title}: leak r", counts.format(found)))
        rows.append((f"{title}: r of the worst 5 % of people", counts.format(number(leak["worst_people"]))))
        rows.append((f"{title}: URR", leak["urr"]))
    if card["attributes"]:
        rows.append(("Attributes: r of a probe", f"{number(card['attributes']['value'])} {ends(card['attributes'])}"))
    for name, r in (card["whitebox"] or {}).items():
        rows.append((f"{axis_title(name)}: r with the extractor in hand", f"{number(r['value'])} {ends(r)}"))
    for row in card["linkage"] or []:
        how = f"Linkage with {row['other']}" + (", a map learnt" if row["learnt"] else "")
        rows.append(
            (how, f"D_sys {number(row['d_sys'])} (chance {number(row['null'])}), rank-1 {percent(row['rank1'])}")
        )
    for found in card["auxiliary"] or []:
        who = f"r for attackers with {found['people']:,} {learnt_from(found['variant'])}"
        for name, axis in found["axes"].items():
            rows.append((f"{axis_title(name)}: {who}", f"{number(axis['r']['value'])} {ends(axis['r'])}"))
    lines = [f"# Privacy card: {_plain(card['name'])}", "", f"**{_plain(card['headline'])}.**"]
    lines += ["", "| | |", "| --- | --- |", *(f"| {_plain(name)} | {_plain(text)} |" for name, text in rows)]
    said = (*verdict.warnings, *verdict.lines)
    lines += ["", *(f"- **{_plain(line.label)}.** {_plain(line.text)}" for line in said)]
    lines += ["", f"{_plain(card['protocol'])}. Made {card['created']}.", ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """On one line, and with nothing that ends a table's cell or begins HTML: names are data."""
    return " ".join(text.splitlines()).strip().replace("|", r"\|").replace("<", "&lt;")
