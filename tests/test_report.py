"""The report: every number on the page, the words by rule, and a page that needs and runs nothing."""

import copy
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from report_examples import attacker, good_report, interval, ugly_report

from ppreid_dist.errors import DataError
from ppreid_dist.files import write_json, write_tensors
from ppreid_dist.reporting.figures import ranked
from ppreid_dist.reporting.page import Panel, load_report, write_report
from ppreid_dist.reporting.report import report as write
from ppreid_dist.reporting.schema import SHAPE, Maybe, Named, check_report
from ppreid_dist.reporting.verdict import write_verdict

DOCS = Path(__file__).parents[1] / "docs" / "report.md"
MORE = "leaked MORE than the unprotected model"


def panel(kind: str = "array") -> Panel:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 4, 3, 16, 8), dtype=np.uint8)
    real, control, protected = pictures if kind == "array" else torch.from_numpy(pictures)
    return Panel(real_K3hw=real, control_K3hw=control, protected_K3hw=protected, attacker="ridge", note="By pid.")


def html_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "report"
    write_report(good_report(), folder, panel=panel())
    return folder


@pytest.fixture(scope="module")
def ugly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ugly") / "report"
    write_report(ugly_report(), folder, panel=None)
    return folder


class Page(HTMLParser):
    """Checks that tags are balanced and keeps what is shown, what is fetched, and which tags there are."""

    VOID = frozenset({"meta", "img", "source", "br", "link"})
    FETCHING = frozenset({"src", "srcset", "href", "action", "data", "poster"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.fetched: list[str] = []
        self.shown = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not [name for name, _ in attributes if name.startswith("on")]
        self.fetched += [value or "" for name, value in attributes if name in self.FETCHING]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if "style" not in self.open:
            self.shown += " " + text


def numbers_in(value: Any, key: str = "") -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [found for name, part in value.items() for found in numbers_in(part, f"{key}.{name}")]
    if isinstance(value, list):
        return [found for i, part in enumerate(value) for found in numbers_in(part, f"{key}[{i}]")]
    return [(key, value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def written(key: str, value: float) -> str:
    """How a person would expect the number of this key to be printed."""
    last = key.rsplit(".", 1)[-1]
    if isinstance(value, int):
        return f"{value:,}"
    if key.startswith((".utility", ".judge")) or last in ("data_wait", "gap", "rank1", "chance"):
        return f"{100 * value:.1f}\u00a0%"
    if last in ("seconds", "images_per_second") or ".psnr." in key:
        return f"{value:,.1f}"
    if last in ("floor", "control", "protected", "apparent", "fresh", "d_sys", "null"):
        return f"{value:.3f}"
    return f"{value:.2f}"


def test_every_number_and_text_of_the_json_is_on_the_page(good: Path) -> None:
    report, shown = load_report(good / "report.json"), Page(html_of(good)).shown
    numbers = numbers_in(report)
    assert len(numbers) > 100
    for key, value in numbers:
        assert re.search(rf"(?<![\d.,]){re.escape(written(key, value))}(?!\d)", shown), (key, value)
    for text in ("a CPU", "2.13.0", "2026-03-02", "Trained on other people.", "a width was chosen", "dropped 12 junk"):
        assert text in shown


def test_the_protocol_stands_beside_every_figure_and_the_first_screen(good: Path) -> None:
    html = html_of(good)
    figures = re.findall(r"<figure.*?</figure>", html, flags=re.DOTALL)
    assert len(figures) >= 8
    protocol = good_report()["protocol"]
    assert all(protocol in figure for figure in figures)
    assert protocol in html.split("<figure", 1)[0]


@pytest.mark.parametrize("which", ["good", "ugly"])
def test_the_page_is_whole_and_asks_for_nothing(which: str, request: pytest.FixtureRequest) -> None:
    html = html_of(request.getfixturevalue(which))
    page = Page(html)
    assert not page.tags & {"script", "iframe", "object", "link", "form", "base"}
    assert page.fetched
    assert all(value.startswith("data:image/png;base64,") for value in page.fetched)
    for request_of in ("http", "//", "url(", "@import"):
        assert request_of not in re.sub(r'"data:[^"]*"', "", html)


def test_a_second_judge_is_an_axis_like_any_other(tmp_path: Path) -> None:
    report = good_report()
    report["axes"]["identity_2"] = copy.deepcopy(report["axes"]["identity"]) | {"metric": "mAP of the judge other.onnx"}
    report["axes"]["identity_2"]["leak"] |= interval(1.07, 1.02, 1.13)
    report["judges"]["identity_2"] = {"name": "other.onnx", "mAP": 0.5713, "rank1": 0.7419, "note": "Of a friend."}
    write_report(report, tmp_path, panel=None)
    shown = " ".join(Page(html_of(tmp_path)).shown.split())
    for words in ("Judge, identity 2 other.onnx", "mAP 57.1 % and rank 1 74.2 %", "Of a friend.", "r > 1, identity 2"):
        assert words in shown
    assert write_verdict(report).headline.startswith("Leaks more than the unprotected model (identity 2)")
    assert (tmp_path / "figures" / "scores_identity_2.png").is_file()
    assert "Identity 2: leak r | 1.07" in (tmp_path / "card.md").read_text()


def test_warnings_appear_where_they_must_and_nowhere_else(good: Path, ugly: Path) -> None:
    calm, alarmed = (" ".join(Page(html_of(folder)).shown.split()).replace(" :", ":") for folder in (good, ugly))
    broken, gate = "Attack broken, pixels: gan (it doesn't beat its floor)", "URR n/a, pixels: utility is 0.914."
    for sign in (MORE, "r > 1, pixels:", "Masking:", broken, gate):
        assert sign in alarmed
        assert sign not in calm
    assert '<span class="tag">broken</span>' in html_of(ugly)
    assert 'class="tag"' not in html_of(good)


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
    assert "by white-box inversion: identity r\u00a0=\u00a00.91, between 0.78 and 1.02" in text

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


def test_pictures_only_with_a_panel_and_old_ones_are_removed(tmp_path: Path, good: Path) -> None:
    assert "keep it as you keep the pictures" in html_of(good)
    with Image.open(good / "figures" / "panel_protected.png") as strip:
        pixels = np.asarray(strip.convert("RGBA"))
    scale, expected = 12, panel().protected_K3hw  # 192 over 16 rows; a gap of one pixel between people of 8
    second = pixels[::scale, 9 * scale : 17 * scale : scale, :3]
    np.testing.assert_array_equal(second, expected[1].transpose(1, 2, 0))

    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "panel_real.png").write_bytes((good / "figures" / "panel_real.png").read_bytes())
    report = good_report()
    report["axes"] = {}
    for absent in ("probe", "attributes", "whitebox", "linkage", "auxiliary"):
        report[absent] = None
    write_report(report, tmp_path, panel=None)
    html = html_of(tmp_path)
    assert "report.pictures=always" in html
    assert "<img" not in html
    assert "No probe ran" in html
    assert "no attributes that enough people share" in html
    assert "White-box inversion was not run" in html
    assert "Linkage was not measured" in html
    assert "No other pictures were tried" in html
    assert "Masking" not in html
    assert list((tmp_path / "figures").glob("*")) == []


@pytest.mark.parametrize(
    ("synthetic", "settings", "asked", "shown"),
    [
        (True, "synthetic", None, True), (False, "synthetic", None, False), (False, "always", None, True),
        (False, "synthetic", "always", True), (True, "never", None, False), (True, "synthetic", "never", False),
    ],
)  # fmt: skip
def test_pictures_of_real_people_stay_out_unless_somebody_asks(
    tmp_path: Path, synthetic: bool, settings: str, asked: str | None, shown: bool
) -> None:
    pictures = torch.randint(0, 256, (3, 4, 3, 16, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names = ("real", "control/ridge", "protected/ridge")
    write_tensors(tmp_path / "pictures.safetensors", dict(zip(names, pictures, strict=True)))
    chosen = {"settings": {"pictures": settings, "people": 2}, "strongest": {"protected": "ridge"}}
    write_json(tmp_path / "attack.json", {"report": good_report(), "synthetic": synthetic, **chosen})
    write(tmp_path, pictures=asked)
    assert len(list(tmp_path.glob("figures/panel_*.png"))) == 3 * shown
    assert ("all synthetic" in html_of(tmp_path)) == (shown and synthetic)


def test_figures_are_files_that_name_their_protocol(good: Path) -> None:
    names = {file.stem for file in (good / "figures").iterdir()}
    kinds = {f"{kind}_{axis}" for kind in ("scores", "leak", "curve") for axis in ("pixel", "identity")}
    assert names == kinds | {"probe", "panel_real", "panel_control", "panel_protected"}
    with Image.open(good / "figures" / "leak_pixel.png") as figure:
        assert good_report()["protocol"] in figure.info["Description"]


def test_the_same_report_is_the_same_bytes(tmp_path: Path, good: Path) -> None:
    write_report(good_report(), tmp_path, panel=panel("tensor"))
    files = sorted(file.relative_to(good) for file in good.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file())
    for file in files:
        assert (tmp_path / file).read_bytes() == (good / file).read_bytes(), file


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("$x^")</script>'
    report = good_report()
    pixel = report["axes"]["pixel"]
    report["name"] = report["protocol"] = report["notes"][0] = pixel["metric"] = pixel["leak"]["attacker"] = evil
    pixel["attackers"][evil] = pixel["attackers"].pop("ridge")
    report["axes"], report["probe"] = {"pixel": pixel | {"curve": []}}, None
    write_report(report, tmp_path, panel=None)
    page = Page(html_of(tmp_path))
    assert "script" not in page.tags
    assert evil in page.shown


def test_nulls_everywhere_still_make_a_page(tmp_path: Path) -> None:
    report = good_report()
    pixel = report["axes"]["pixel"]
    nobody = {**interval(None, None, None), "attacker": None}
    pixel["leak"] = {**nobody, "against": None, "own": nobody}
    unscored = dict.fromkeys(("floor", "control", "protected"))
    pixel["attackers"] = {"gan": attacker((0, 0, 0), (None, None, None), "a series has no score") | unscored}
    pixel["curve"] = [{"n": 5, "r": {**interval(None, None, None), "attacker": None}, "attackers": {}}]
    pixel["n50"] = {"value": 5.0, "text": "a guess"}
    report["whitebox"]["axes"]["identity"] = attacker((0, 0, 0), (None, None, None), "why") | unscored
    report["attributes"]["mean"] = attacker((0, 0, 0), (None, None, None), "why") | unscored
    report["axes"]["identity"]["curve"] = []
    report["axes"]["identity"]["leak"]["high"] = None
    report["probe"]["apparent"] = report["probe"]["gap"] = None
    report["probe"]["history"] = [{"step": 1, "images": 64, "apparent": None, "fresh": 0.2}]
    write_report(report, tmp_path, panel=None)
    shown = Page(html_of(tmp_path)).shown
    assert "The curve was not measured." in shown
    assert "[0.38, ∞)" in shown
    assert "no opponent to compare with" in shown
    assert "No masking was found" not in shown
    assert "None" not in shown
    assert "nan" not in shown


def test_json_is_strict_and_comes_back_equal(good: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert json.loads((good / "report.json").read_text(), parse_constant=refuse) == good_report()
    assert load_report(good / "report.json") == good_report()


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


@pytest.mark.parametrize("wrong", [(4, 3, 16, 9), (5, 3, 16, 8), (4, 1, 16, 8), (0, 3, 16, 8), (3, 16, 8)])
def test_a_panel_of_wrong_shape_or_type_is_refused(wrong: tuple[int, ...]) -> None:
    fine = np.zeros((4, 3, 16, 8), dtype=np.uint8)
    for bad in (np.zeros(wrong, dtype=np.uint8), fine.astype(np.float32)):
        with pytest.raises(DataError, match=r"panel\.protected"):
            Panel(real_K3hw=fine, control_K3hw=fine, protected_K3hw=bad, attacker="a", note="")


def test_the_strongest_attacker_comes_first_and_the_broken_last() -> None:
    attackers = {
        "broken": attacker((0, 0, 0), (None, None, None), "why"),
        "weak": attacker((0, 0, 0), (0.1, 0, 1)),
        "below": attacker((0, 0, 0), (-0.1, -1, 1)),
        "strong": attacker((0, 0, 0), (0.9, 0, 1)),
    }
    assert [name for name, _ in ranked(attackers)] == ["strong", "weak", "below", "broken"]


@pytest.mark.parametrize("make", [good_report, ugly_report])
def test_the_card_says_what_the_report_says(tmp_path: Path, make: Callable[[], dict[str, Any]]) -> None:
    report = make()
    write_report(report, tmp_path, panel=None)
    card, words = json.loads((tmp_path / "card.json").read_text()), (tmp_path / "card.md").read_text()
    verdict = write_verdict(report)
    assert card["headline"] == verdict.headline and verdict.headline in words
    for name, axis in report["axes"].items():
        assert card["leak"][name]["value"] == axis["leak"]["value"]
        assert card["leak"][name]["urr"] == axis["urr"]["display"] and axis["urr"]["display"] in words
    assert len(card["warnings"]) == len(verdict.warnings)
    assert all(line.text in words for line in (*verdict.warnings, *verdict.lines))
    assert report["protocol"] in words and "None" not in words and "nan" not in words
    table = [line for line in words.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {3}


def test_a_card_without_the_parts_that_were_not_measured(tmp_path: Path) -> None:
    report = good_report()
    report["attributes"] = report["whitebox"] = report["linkage"] = None
    write_report(report, tmp_path, panel=None)
    words = (tmp_path / "card.md").read_text()
    assert "Linkage" not in words and "Attributes" not in words
