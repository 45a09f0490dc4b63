"""The report in plain words: a headline, three to five sentences, and the warnings, all by rule from its numbers.

The rules never say more than was measured: every statement on the leak names how many people the attackers had,
an interval that reaches 1 establishes nothing, neither does a broken attack, and the axes are never averaged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

AXIS_TITLES = {"pixel": "Pixels", "identity": "Identity", "perceptual": "Perception", "attributes": "Attributes"}
LEARNT_FROM = {"other_domain": "people of another domain", "same_people": "of the tested people"}


@dataclass(frozen=True)
class Line:
    label: str
    text: str


@dataclass(frozen=True)
class Verdict:
    tone: Literal["good", "mixed", "bad"]
    headline: str
    lines: tuple[Line, ...]
    warnings: tuple[Line, ...]


def number(value: float | None, digits: int = 2) -> str:
    """``value`` with a true minus sign and no negative zero; a dash for None."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal."""
    return "–" if value is None else f"{number(100 * value, 1)}\u00a0%"


def ends(interval: dict[str, Any], write: Callable[[float | None], str] = number) -> str:
    """``[low, high]``, open above where there is no upper end, nothing where there is no interval."""
    if interval["low"] is None:
        return ""
    return f"[{write(interval['low'])}, {'∞)' if interval['high'] is None else write(interval['high']) + ']'}"


def learnt_from(variant: str) -> str:
    """Whom attackers who know something else learn from."""
    if variant.startswith("extractor"):
        return f"of their own, with the {variant}"
    return LEARNT_FROM.get(variant, variant.replace("_", " "))


def axis_title(name: str) -> str:
    return AXIS_TITLES.get(name, name.replace("_", " ").capitalize())


def write_verdict(report: dict[str, Any]) -> Verdict:
    """The first screen of the page, from a checked report (see :mod:`ppreid_dist.reporting.schema`)."""
    axes, people = report["axes"], f"{report['attack']['people']:,}"
    tone, headline = _headline(report)
    lines = [
        Line("Matching", _cost(report["utility"])),
        *(Line(axis_title(name), _leak(axis, people)) for name, axis in axes.items()),
        Line("Balance", _balance(axes)),
        Line("Limits", _limits(axes, people) + _attributes(report["attributes"]) + _whitebox(report["whitebox"])),
    ]
    return Verdict(tone, f"{headline}, for attackers with {people} auxiliary people", tuple(lines), _warnings(report))


def _headline(report: dict[str, Any]) -> tuple[Literal["good", "mixed", "bad"], str]:
    leaks = {axis_title(name).lower(): axis["leak"] for name, axis in report["axes"].items()}
    if worse := [name for name, leak in leaks.items() if (leak["low"] or 0) > 1]:
        return "bad", f"Leaks more than the unprotected model ({', '.join(worse)})"
    if unmeasured := [name for name, leak in leaks.items() if leak["value"] is None]:
        return "mixed", f"The leak could not be measured ({', '.join(unmeasured)})"
    if broken := [axis_title(name).lower() for name, axis in report["axes"].items() if _attack_broken(axis)]:
        return "mixed", f"The attack is broken, so nothing is established ({', '.join(broken)})"
    if open_ := [name for name, leak in leaks.items() if _reaches_one(leak)]:
        return "mixed", f"No reduction of the leak is established ({', '.join(open_)})"
    if not leaks:
        return "mixed", "The leak was not measured"
    if uneven := [axis_title(name).lower() for name, axis in report["axes"].items() if _hardly_hindered(axis)]:
        return "mixed", f"The best attacker finds less, but not every attacker does ({', '.join(uneven)})"
    if closed := [axis_title(name).lower() for name, axis in report["axes"].items() if axis["urr"]["status"] == "n/a"]:
        return "mixed", f"Leaks less, but the balance is not applicable ({', '.join(closed)})"
    if report["probe"] and report["probe"]["warned"]:
        return "mixed", "Leaks less than the unprotected model, but training shows masking"
    return "good", "Leaks less than the unprotected model"


def _attack_broken(axis: dict[str, Any]) -> bool:
    return bool(axis["urr"]["broken"])


def no_measure(axis: dict[str, Any]) -> bool:
    """Whether r says nothing, since the attack is broken. One above 1 beyond noise is told all the same."""
    return _attack_broken(axis) and not (axis["leak"]["low"] or 0) > 1


def _reaches_one(leak: dict[str, Any]) -> bool:
    return leak["high"] is None or leak["high"] >= 1


def _hardly_hindered(axis: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The own ratios, by attacker, that r hides where it is below 1: a sound attacker's for whom no reduction is
    established, and anybody's that is above r beyond noise."""
    leak = axis["leak"]
    if leak["value"] is None or _attack_broken(axis) or _reaches_one(leak):
        return {}
    found = {leak["own"]["attacker"]: leak["own"]} if _reaches_one(leak["own"]) else {}
    for name, row in axis["attackers"].items():
        if row["r"]["low"] is not None and row["r"]["low"] > leak["high"]:
            found[name] = row["r"]
    return found


def _between(interval: dict[str, Any], write: Callable[[float | None], str] = number) -> str:
    low, high = (None if interval[end] is None else write(interval[end]) for end in ("low", "high"))
    if low and high:
        return f"between {low} and {high}"
    return f"at least {low}, with no upper end" if low else "no interval"


def _cost(utility: dict[str, Any]) -> str:
    control, protected, ratio = utility["control"]["mAP"], utility["protected"]["mAP"], utility["ratio"]
    points = 100 * (control - protected)
    price = f"a cost of {number(points, 1)} points" if points > 0 else f"a gain of {number(-points, 1)} points"
    maybe_equal = None not in (ratio["low"], ratio["high"]) and ratio["low"] <= 1 <= ratio["high"]
    doubt = ", so the two may be equal" if maybe_equal else ""
    how = " after re-ranking" if utility["matching"] == "re-ranked" else ""
    return (
        f"The protected model finds people with an mAP of {percent(protected)}{how}, the unprotected one with "
        f"{percent(control)}: {price}. "
        f"It keeps {percent(ratio['value'])} of the mAP ({_between(ratio, percent)}{doubt})."
    )


def _leak(axis: dict[str, Any], people: str) -> str:
    who, leak = f"For attackers with {people} auxiliary people, ", axis["leak"]
    value, low = leak["value"], leak["low"]
    if value is None:
        return who + "the leak could not be measured: no attacker worked on the unprotected features."
    if no_measure(axis):
        return who + "r is no measure of the leak, since the attack is broken: no reduction is established."
    figures = f"r\u00a0=\u00a0{number(value)}, {_between(leak)}; strongest attacker: {leak['attacker']}"
    if value > 1:
        if low is not None and low > 1:
            return who + f"the protection leaked MORE than the unprotected model ({figures})."
        return who + f"no less leaks than from the unprotected model ({figures}): no reduction is established."
    share = f"{number(100 * max(value, 0), 0)}\u00a0%"
    if _reaches_one(leak):
        return who + (
            f"{share} of the unprotected model's leak remains as measured ({figures}), but the interval does not "
            "exclude 1: no reduction is established."
        )
    if low is None or low <= 0:
        return who + f"the leak that remains could not be told from none ({figures})."
    return who + f"{share} of the unprotected model's leak remains ({figures})."


def _balance(axes: dict[str, Any]) -> str:
    parts = []
    for name, axis in axes.items():
        urr = axis["urr"]
        why = f" ({urr['reason']})" if urr["reason"] and urr["status"] != "n/a" else ""  # n/a has its warning
        parts.append(f"{axis_title(name).lower()} {urr['display']}{why}")
    meaning = "the share of utility kept over the share of leak kept (unprotected: 1; more is better)"
    return f"URR, {meaning}: {_list(parts)}."


def _list(parts: list[str]) -> str:
    return "; ".join(parts) or "not measured"


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _limits(axes: dict[str, Any], people: str) -> str:
    whose = dict.fromkeys(name for axis in axes.values() for point in axis["curve"] for name in point["attackers"])
    grown = []
    for name, axis in axes.items():
        known = [point for point in axis["curve"] if point["r"]["value"] is not None]
        few, most = (known[i]["r"]["value"] for i in (0, -1)) if known else (None, None)
        if few is not None and not no_measure(axis) and most > few and number(most) != number(few):
            steps = " to ".join(f"{number(p['r']['value'])} at {p['n']:,}" for p in (known[0], known[-1]))
            grown.append(f"{axis_title(name).lower()} from {steps}")
    text = (
        f"This holds for the attackers tried here and is not a proof against attackers with more than {people} people."
    )
    if not grown:
        return text
    return (
        f"{text} The leak to {_and(list(whose))}, who alone were trained with fewer people too, grew with their "
        f"number ({_list(grown)}): expect more from more people."
    )


def _attributes(found: dict[str, Any] | None) -> str:
    if found is None or found["mean"]["r"]["value"] is None:
        return ""
    r = found["mean"]["r"]
    return (
        f" Without a picture, a probe keeps {number(100 * max(r['value'], 0), 0)}\u00a0% of what it can tell of "
        f"people's attributes (r\u00a0=\u00a0{number(r['value'])}, {_between(r)})."
    )


def _whitebox(found: dict[str, Any] | None) -> str:
    known = {} if found is None else {n: row for n, row in found["axes"].items() if row["r"]["value"] is not None}
    if found is None or not known:
        return ""
    each = [
        f"{axis_title(name).lower()} r\u00a0=\u00a0{number(row['r']['value'])}, {_between(row['r'])} (without the "
        f"extractor {number(row['without']['value'])})"
        for name, row in known.items()
    ]
    who = f"white-box inversion of {found['people']} people"
    return f" Whoever has the extractor as well recovers by {who}: {_list(each)}."


def _warnings(report: dict[str, Any]) -> tuple[Line, ...]:
    found, axes, probe = [], report["axes"], report["probe"]
    for name, axis in axes.items():
        if (axis["leak"]["low"] or 0) > 1:
            r = f"r\u00a0=\u00a0{number(axis['leak']['value'])}"
            text = f"on this axis the protection leaked MORE than the unprotected model ({r})."
            found.append(Line(f"r > 1, {axis_title(name).lower()}", text))
    if probe and probe["warned"]:  # at any time, so the widest gap is told
        text = "What training took for protection is partly a stale opponent; only what fresh attackers reach counts."
        known = [row for row in probe["history"] if row["apparent"] and row["fresh"]]
        for row in sorted(known, key=lambda row: row["apparent"] / row["fresh"])[-1:]:
            text = (
                f"after {row['images']:,} pictures training's own opponent erred by {number(row['apparent'], 3)}, a "
                f"fresh attacker by only {number(row['fresh'], 3)} ({probe['unit']}). {text}"
            )
        found.append(Line("Masking", text))
    for name, axis in axes.items():
        if hardly_hindered := _hardly_hindered(axis):
            each = [
                f"{attacker} keeps {number(r['value'])} of what it found, {_between(r)}"
                for attacker, r in hardly_hindered.items()
            ]
            text = f"the best attacker finds less than before, but {_list(each)}: the protection is one against others."
            found.append(Line(f"Uneven protection, {axis_title(name).lower()}", text))
    for name, axis in axes.items():
        broken = [(row["reason"], attacker) for attacker, row in axis["attackers"].items() if row["status"] == "broken"]
        for reason, names in _grouped(broken):
            text = (
                f"{', '.join(names)}{f' ({reason})' if reason else ''}. An attack that fails without protection proves "
                "nothing by failing with it: left out of r."
            )
            found.append(Line(f"Attack broken, {axis_title(name).lower()}", text))
    gated = [(name, axis["urr"]) for name, axis in axes.items() if axis["urr"]["status"] == "n/a"]
    for reason, names in _grouped([(urr["reason"], axis_title(name).lower()) for name, urr in gated]):
        found.append(Line(f"URR n/a, {' and '.join(names)}", f"{(reason or 'no reason was given').rstrip('.')}."))
    return tuple(found)


def _grouped(pairs: list[tuple[str | None, str]]) -> list[tuple[str | None, list[str]]]:
    """``(reason, name)`` as ``(reason, its names)``, in order of first sight."""
    groups: dict[str | None, list[str]] = {}
    for reason, name in pairs:
        groups.setdefault(reason, []).append(name)
    return list(groups.items())
