"""The report: every number on the page, and a page that needs and runs nothing."""

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
from ppreid_dist.reporting.verdict import write_verdict

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
    report["whitebox"]["axes"]["identity"] = {
        **attacker((0, 0, 0), (None, None, None), "why"),
        **unscored,
        "without": interval(None, None, None),
    }
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


def test_a_broken_attack_s_r_is_no_figure_of_the_first_screen_and_the_card(tmp_path: Path, good: Path) -> None:
    report = good_report()
    report["axes"]["pixel"]["urr"] |= {"status": "n/a", "reason": "attack broken: why", "broken": True}
    write_report(report, tmp_path, panel=None)
    first = [html_of(folder).split("What protection costs")[0] for folder in (good, tmp_path)]
    assert [text.count("attack broken</p>") for text in first] == [0, 1]
    assert [text.count('class="gauge"') for text in first] == [2, 1]
    card, words = json.loads((tmp_path / "card.json").read_text()), (tmp_path / "card.md").read_text()
    assert [leak["broken"] for leak in card["leak"].values()] == [True, False]
    assert "| Pixels: leak r | no measure, since the attack is broken: 0.44 [0.38, 0.61], by ridge |" in words
    assert "| Pixels: r of the worst 5 % of people | no measure, since" in words
    assert "| Identity: leak r | 0.47 [0.38, 0.61], by ridge |" in words


def test_names_on_the_card_are_no_markup(tmp_path: Path) -> None:
    report, name = good_report(), "x|y <img src=x onerror=alert(1)>\n# z"
    report["name"] = report["protocol"] = report["training"]["protected"]["method"] = name
    report["linkage"][0]["other"] = name
    write_report(report, tmp_path, panel=None)
    words = (tmp_path / "card.md").read_text()
    plain = "x\\|y &lt;img src=x onerror=alert(1)> # z"
    assert words.count(plain) == 4 and "<" not in words.replace(plain, "")
    assert json.loads((tmp_path / "card.json").read_text())["name"] == name
