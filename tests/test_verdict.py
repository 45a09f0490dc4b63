"""The words of a report, by rule: what it may say of a leak, of masking, of a gate, of utility."""

import copy
from typing import Any

import pytest
from report_examples import attacker, good_report, interval, ugly_report

from ppreid_dist.reporting.schema import check_report
from ppreid_dist.reporting.verdict import write_verdict

MORE = "leaked MORE than the unprotected model"


def test_the_verdict_never_claims_more_than_was_measured() -> None:
    report = good_report()
    verdict = write_verdict(report)
    text = " ".join(line.text for line in verdict.lines)
    assert verdict.tone == "good"
    assert verdict.warnings == ()
    assert 3 <= len(verdict.lines) <= 5
    for line in verdict.lines[1:3]:
        assert "attackers with 1,120 auxiliary people" in line.text
        assert "strongest attacker: ridge" in line.text
    assert "attackers with 1,120 auxiliary people" in verdict.headline
    assert "not a proof against attackers with more" in text
    assert "from 0.21 at 40 to 0.44 at 1,120" in text
    assert "a cost of 1.2 points" in text
    assert "a probe keeps 38\u00a0% of what it can tell of people's attributes" in text
    assert (
        "by white-box inversion of 27 people: identity r\u00a0=\u00a00.91, between 0.78 and 1.02 (without the" in text
    )

    falling = copy.deepcopy(report)
    for axis in falling["axes"].values():
        axis["curve"].reverse()
        axis["curve"][0]["n"], axis["curve"][1]["n"] = 40, 1120
    assert "who alone were trained with fewer people too, grew with" in verdict.lines[-1].text
    for point in (point for axis in report["axes"].values() for point in axis["curve"]):
        whose = next(iter(point["attackers"].values()))
        point["attackers"] = dict.fromkeys(("ridge", "regression", "averaged"), whose)
    assert "The leak to ridge, regression and averaged, who alone" in write_verdict(report).lines[-1].text
    assert "grew with" not in write_verdict(falling).lines[-1].text
    for axis in falling["axes"].values():
        for point, r in zip(axis["curve"], (0.911, 0.914), strict=True):
            point["r"]["value"] = r
    assert "grew with" not in write_verdict(falling).lines[-1].text


def test_masking_is_told_by_its_widest_gap() -> None:
    report = ugly_report()
    report["probe"]["history"][0] |= {"apparent": 0.21, "fresh": 0.15}
    [masking] = [line.text for line in write_verdict(report).warnings if line.label == "Masking"]
    assert "after 96,032 pictures training's own opponent erred by 0.210, a fresh attacker by only 0.150" in masking
    for row in report["probe"]["history"]:
        row["apparent"] = None
    [masking] = [line.text for line in write_verdict(report).warnings if line.label == "Masking"]
    assert masking.startswith("What training took for protection is partly a stale opponent")


@pytest.mark.parametrize(
    ("r", "tone", "words"),
    [
        ((1.2, 1.1, 1.3), "bad", MORE),
        ((1.1, 0.9, 1.3), "mixed", "no less leaks than from the unprotected model"),
        ((0.7, 0.3, 1.2), "mixed", "no reduction is established"),
        ((0.7, 0.3, None), "mixed", "no reduction is established"),
        ((0.7, None, None), "mixed", "no reduction is established"),
        ((None, None, None), "mixed", "could not be measured"),
        ((0.05, -0.02, 0.12), "good", "could not be told from none"),
        ((0.4, 0.3, 0.5), "good", "40\u00a0% of the unprotected model's leak remains"),
    ],
)
def test_the_words_for_a_leak(r: tuple[Any, Any, Any], tone: str, words: str) -> None:
    report = good_report()
    report["axes"]["identity"]["leak"].update(interval(*r))
    report["axes"]["identity"]["attackers"] = {"ridge": attacker((0.1, 0.2, 0.3), r)}
    check_report(report, "report.json")
    verdict = write_verdict(report)
    assert verdict.tone == tone
    assert words in verdict.lines[2].text
    assert (MORE in " ".join(line.text for line in verdict.warnings)) == ((r[1] or 0) > 1)


@pytest.mark.parametrize(
    ("change", "headline"),
    [
        ({"status": "n/a", "reason": "why", "display": "n/a", "value": None}, "not applicable (pixels)"),
        (
            {"status": "n/a", "reason": "why", "broken": True, "display": "n/a", "value": None},
            "nothing is established (pixels)",
        ),
        ({"status": "bound", "reason": "r is within noise", "display": "≥ 2.10", "value": None}, "Leaks less than"),
    ],
)
def test_the_words_for_a_gate(change: dict[str, Any], headline: str) -> None:
    report = good_report()
    report["axes"]["pixel"]["urr"].update(change)
    verdict = write_verdict(report)
    assert headline in verdict.headline
    assert change["display"] in verdict.lines[3].text
    assert bool(verdict.warnings) == (change["status"] == "n/a")


def test_r_of_a_broken_attack_is_no_finding() -> None:
    report = good_report()
    gate = {"status": "n/a", "reason": "attack broken: why", "broken": True, "display": "n/a", "value": None}
    pixel = report["axes"]["pixel"]
    pixel["urr"].update(gate)
    pixel["leak"]["own"] = {**interval(0.93, 0.81, 1.04), "attacker": "gan"}
    verdict = write_verdict(report)
    pixels, identity, limits = verdict.lines[1].text, verdict.lines[2].text, verdict.lines[4].text
    assert "r is no measure of the leak, since the attack is broken" in pixels and "remains" not in pixels
    assert "of the unprotected model's leak remains" in identity
    assert "grew with their number (identity from" in limits and "pixels from" not in limits
    assert [line.label for line in verdict.warnings] == ["URR n/a, pixels"]
    pixel["leak"] |= interval(1.2, 1.1, 1.3)
    assert MORE in write_verdict(report).lines[1].text


def test_an_attacker_that_loses_nothing_is_named_though_the_leak_fell() -> None:
    report = good_report()
    identity = report["axes"]["identity"]
    identity["leak"]["own"] = {**interval(0.93, 0.81, 1.04), "attacker": "gan"}
    verdict = write_verdict(report)
    assert (verdict.tone, verdict.warnings[0].label) == ("mixed", "Uneven protection, identity")
    assert "not every attacker does (identity)" in verdict.headline
    assert "gan keeps 0.93 of what it found, between 0.81 and 1.04" in verdict.warnings[0].text
    identity["leak"]["own"]["high"] = 0.99
    assert (write_verdict(report).tone, write_verdict(report).warnings) == ("good", ())
    identity["attackers"]["weak"] = attacker((0.1, 0.12, 0.12), (0.9, 0.61, 1.2)) | {"status": "weak", "reason": "why"}
    assert "weak keeps 0.90" in write_verdict(report).warnings[0].text  # r ends at 0.607
    identity["attackers"]["weak"]["r"]["low"] = 0.55
    assert write_verdict(report).warnings == ()


def test_the_words_for_utility() -> None:
    report = good_report()
    report["utility"]["protected"]["mAP"] = 0.6349
    report["utility"]["ratio"] = interval(1.016, 0.99, 1.04)
    text = write_verdict(report).lines[0].text
    assert "a gain of 1.0 points" in text
    assert "the two may be equal" in text
