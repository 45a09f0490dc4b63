"""report.json: what is wrong or missing is named before anything is written, and every key is documented."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_examples import good_report

from ppreid_dist.errors import DataError
from ppreid_dist.reporting.page import load_report, write_report
from ppreid_dist.reporting.schema import SHAPE, Maybe, Named, check_report

DOCS = Path(__file__).parents[1] / "docs" / "report.md"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["utility", "ratio", "low"], None, None),
        (["utility", "control", "mAP"], float("nan"), "utility.control.mAP is nan"),
        (["utility", "control", "mAP"], np.float32(0.5), "utility.control.mAP is a float32"),
        (["utility", "control", "mAP"], True, "utility.control.mAP is a bool"),
        (["axes", "pixel", "curve", 0, "n"], 4.5, "axes.pixel.curve[0].n is a float"),
        (["axes", "pixel", "attackers", "gan", "status"], None, "axes.pixel.attackers.gan.status is a NoneType"),
        (["axes", "../up"], good_report()["axes"]["pixel"], "'../up' is not a lower-case word"),
        (["axes", "pixel", "extra"], 1, "axes.pixel.extra is not a key"),
        (["schema"], "ppreid-report/1", "schema is 'ppreid-report/1'"),
        (["notes"], "a note", "notes is not a list"),
        (["machine"], [], "machine holds no keys"),
    ],
)
def test_a_wrong_report_is_refused_before_anything_is_written(
    tmp_path: Path, path: list[Any], value: Any, words: str | None
) -> None:
    report = good_report()
    holder = report
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    if words is None:
        check_report(report, "report.json")
        return
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        write_report(report, tmp_path / "out", panel=None)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "out" / "report.json"))
    assert not (tmp_path / "out").exists()


def all_keys(shape: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The way to every fixed key of the shape; a free name is "*"."""
    if isinstance(shape, Maybe):
        return all_keys(shape.shape, at)
    if isinstance(shape, Named):
        return all_keys(shape.shape, (*at, "*"))
    if isinstance(shape, list):
        return all_keys(shape[0], (*at, "*"))
    if isinstance(shape, dict):
        return [way for key, part in shape.items() for way in [(*at, key), *all_keys(part, (*at, key))]]
    return []


@pytest.mark.parametrize("way", all_keys(SHAPE), ids=".".join)
def test_a_missing_key_is_named_and_every_key_is_documented(tmp_path: Path, way: tuple[str, ...]) -> None:
    report = good_report()
    holder: Any = report
    for key in way[:-1]:
        holder = holder[key] if key != "*" else holder[0] if isinstance(holder, list) else next(iter(holder.values()))
    del holder[way[-1]]
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    with pytest.raises(DataError, match=rf"{re.escape(str(file))}: (.*\.)?{way[-1]} is missing"):
        load_report(file)
    assert re.search(rf"`(\w+\.)?{way[-1]}`", DOCS.read_text(encoding="utf-8")), f"{way[-1]} is not in docs/report.md"


def test_files_that_are_no_report(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_report(tmp_path / "absent.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match=r"list\.json: report holds no keys"):
        load_report(tmp_path / "list.json")
