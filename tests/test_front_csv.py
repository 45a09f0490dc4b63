"""front.csv: a line per trial, and what its cells mean."""

import csv
import io

from report_examples import good_report, interval

from ppreid_dist.reporting.front_page import _table


def test_a_broken_attack_and_an_open_end_are_told() -> None:
    axes = good_report()["axes"]
    axes["pixel"]["leak"] |= interval(0.7, 0.3, None)
    gate = {"display": "n/a", "status": "n/a", "reason": "attack broken: why", "broken": True}
    axes["identity"]["urr"] |= interval(None, None, None) | gate
    axes["identity"]["leak"] |= interval(None, None, None)
    done = {
        "name": "a", "point": "p", "method": None, "seed": 0, "status": "done", "reason": None,
        "settings": {"privacy.weight": 1}, "mAP": 0.5, "control_mAP": 0.6, "utility": interval(0.8, 0.7, None),
        "axes": axes,
    }  # fmt: skip
    failed = {key: done[key] for key in ("name", "point", "method", "seed", "settings")} | {
        "status": "failed", "reason": "crashed",
    }  # fmt: skip
    front = {"trials": [done, failed], "front": {"pixel": [], "identity": []}}
    first, second = csv.DictReader(io.StringIO(_table(front)))
    ends = ("value", "low", "high")
    assert [first[f"pixel_leak_{end}"] for end in ends] == ["0.7", "0.3", "inf"]
    assert [first[f"utility_{end}"] for end in ends] == ["0.8", "0.7", "inf"]
    assert [first[f"identity_leak_{end}"] for end in ends] == ["", "", ""]
    assert (first["pixel_broken"], first["pixel_urr"], first["pixel_urr_reason"]) == ("False", "2.25 [1.93, 2.58]", "")
    assert (first["identity_broken"], first["identity_urr_reason"]) == ("True", "attack broken: why")
    assert (second["status"], second["pixel_broken"], second["pixel_leak_high"]) == ("failed", "", "")
