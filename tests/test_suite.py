"""The suite of attackers against two victims: what it calls a leak, what it announces, keeps and says beside it."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from attack_world import SIZE, colour_judge, colours, make_people, see_colours, small_config
from torch import Tensor

from ppreid_dist import attack_setup
from ppreid_dist.attacks.base import (
    ATTACKERS,
    SHOWN,
    Progress,
)
from ppreid_dist.attacks.bench import Bench, Victim
from ppreid_dist.attacks.config import AttackConfig
from ppreid_dist.attacks.judging import Look, chance_ap, weak_judges
from ppreid_dist.attacks.kept import Kept
from ppreid_dist.attacks.ridge import RidgeConfig
from ppreid_dist.attacks.suite import SuiteResult, run_suite
from ppreid_dist.attacks.whitebox import WhiteBoxConfig
from ppreid_dist.data.stream import Pictures
from ppreid_dist.errors import ConfigError, DataError, MissingExtra, RunError
from ppreid_dist.evaluation.images import scores
from ppreid_dist.evaluation.tracklets import Enrolment
from ppreid_dist.files import write_json
from ppreid_dist.settings import load_settings


def test_chance_ap_is_that_of_all_orders() -> None:
    for positives, candidates in ((1, 1), (1, 5), (2, 6), (4, 4)):
        rng, total, draws = np.random.default_rng(0), 0.0, 4000
        for _ in range(draws):
            ranks = np.sort(rng.permutation(candidates)[:positives]) + 1
            total += sum((i + 1) / rank for i, rank in enumerate(ranks)) / positives
        exact = chance_ap(np.array([positives]), np.array([candidates]))[0]
        assert total / draws == pytest.approx(exact, abs=0.02)


def suite(
    known: Pictures,
    known_features: Tensor,
    met: Pictures,
    features: Tensor,
    *,
    blind: bool = False,
    kept: Kept | None = None,
    announce: Progress | None = None,
    looks: dict[str, Look] | None = None,
    leaked: Tensor | None = None,
    found: Progress | None = None,
    **changes: object,
) -> SuiteResult:
    """The suite against a second victim whose features are the first's or, if ``blind``, random."""
    first = met.camids_N == 0
    query = met.only(first)
    control = Victim(
        name="unprotected",
        aux_ND=known_features,
        query_QD=features[first],
        utility_ap_Q=np.full(first.sum(), 0.8),
        see=see_colours,
        leaked_LD=leaked,
    )
    rng = torch.Generator().manual_seed(1)
    protected = replace(
        control,
        name="protected",
        aux_ND=torch.randn(control.aux_ND.shape, generator=rng) if blind else control.aux_ND,
        query_QD=torch.randn(control.query_QD.shape, generator=rng) if blind else control.query_QD,
    )
    bench = Bench(
        aux=known,
        query=query,
        gallery_pids=met.pids_N[~first],
        gallery_camids=met.camids_N[~first],
        judges=[colour_judge(met, ~first, look, name) for name, look in (looks or {"colours": colours}).items()],
        config=small_config(**changes),
        progress=lambda line: None,
        found=found,
        kept=kept,
    )
    return run_suite(bench, control, protected, announce=announce)


def test_too_few_people_is_one_line_about_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"^attack\.people: [^\n]*$"):
        suite(*make_people(0, 7), *make_people(0, 10))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("people=[3,0]", "people: 3 are too few: an attacker needs 8"),
        ("curve_attackers=[adaptive]", "curve_attackers: adaptive has no counterpart on the control"),
        ("ridge.widths=[]", "ridge.widths: at least one"),
        ("isomap.coordinates=[]", "isomap.coordinates: at least one"),
    ],
)
def test_what_nobody_could_attack_with_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(message)}[^\n]*$"):
        load_settings(AttackConfig, None, [setting])


def test_more_people_than_there_are_are_not_claimed(
    aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor]
) -> None:
    found = suite(*aux, *strangers, attackers=["ridge"], people=[20, 600, 0])
    assert found.people == [20, 60]
    assert "attack.people: 600: there are only 60 auxiliary people, and that many attacked" in found.notes


def test_without_curve_attackers_nobody_has_fewer_people(
    aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor]
) -> None:
    found = suite(*aux, *strangers, attackers=["ridge"], curve_attackers=[], people=[20, 0])
    assert found.people == [60] and [row["n"] for row in found.axes["identity"]["curve"]] == [60]
    assert found.axes["identity"]["urr"]["status"] == "ok"


def test_an_attack_says_first_how_long_it_may_take(
    tmp_path: Path, aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor]
) -> None:
    """What is kept from before isn't counted, and nothing is said where all is."""
    said: list[str] = []
    asked = {"people": [20, 0], "kept": Kept(tmp_path), "announce": said.append}
    suite(*aux, *strangers, attackers=["ridge"], **asked)
    suite(*aux, *strangers, attackers=["ridge", "gan"], **asked)
    suite(*aux, *strangers, attackers=["ridge", "gan"], **asked)
    first, second = said
    assert re.fullmatch(r"6 trainings, roughly \d+ s here: ridge 6 × \d+ s", first)
    assert re.fullmatch(r"3 trainings, roughly \d+ s here: gan 3 × \d+ s", second)
    suite(*aux, *strangers, attackers=["ridge"], announce=said.append, whitebox=WhiteBoxConfig(people=2, steps=1))
    assert said[2].endswith("; not counted: white-box inversion")


def test_attackers_with_fewer_people_than_there_are(
    aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor]
) -> None:
    """20 of 60: what they learn from is what the curve's learn from who have as many."""
    asked = ["retrieval", "ridge", "regression"]
    few = suite(*aux, *strangers, people=[20], attackers=asked)
    curve = suite(*aux, *strangers, people=[20, 0], attackers=asked, curve_attackers=asked)
    assert few.people == [20] and curve.people == [20, 60]
    for axis in ("pixel", "identity"):
        found = few.axes[axis]["attackers"]
        assert [found[name]["status"] for name in asked] == ["ok"] * 3
        assert few.axes[axis]["leak"]["value"] == curve.axes[axis]["curve"][0]["r"]["value"] == pytest.approx(1)
    assert few.axes["identity"]["attackers"]["ridge"]["control"] > 0.9


def test_a_single_person_s_pictures_are_no_test(
    aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor]
) -> None:
    met, features = strangers
    alone = met.pids_N == met.pids_N[0]
    with pytest.raises(DataError, match=r"^query: 1 person; an interval over people needs at least 2$"):
        suite(*aux, met.only(alone), features[alone])


def test_the_same_features_leak_all(
    tmp_path: Path, aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor]
) -> None:
    result = suite(*aux, *strangers, people=[20, 900, 0], attackers=["retrieval", "ridge"])
    assert result.people == [20, 60]
    assert any("900" in note for note in result.notes)
    for axis in ("pixel", "identity"):
        found = result.axes[axis]
        assert found["leak"]["value"] == pytest.approx(1)
        assert found["urr"]["value"] == pytest.approx(1)
        assert found["urr"]["status"] == "ok"
        assert set(found["attackers"]) == {"retrieval", "ridge"}
        assert [point["n"] for point in found["curve"]] == [20, 60]
        assert found["curve"][0]["attackers"]["ridge"]["value"] == pytest.approx(1)
    assert result.judges["identity"]["mAP"] > 0.5
    assert result.shown.shape == (SHOWN,)
    assert set(result.reconstructions) == {(v, a) for v in ("unprotected", "protected") for a in ("retrieval", "ridge")}
    assert result.reconstructions["protected", "ridge"].dtype == torch.uint8
    assert result.reconstructions["protected", "ridge"].shape == (SHOWN, 3, *SIZE)
    assert set(result.strongest) == {"unprotected", "protected"}
    assert result.per_query["identity", "ridge", "floor"].shape == (40,)
    assert all(seconds > 0 for seconds in result.seconds.values())
    write_json(tmp_path / "axes.json", result.axes)  # strict: NaN or a numpy number would raise


def test_on_pixels_the_mean_picture_is_everybody_s_floor(
    aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor]
) -> None:
    result = suite(*aux, *strangers, attackers=["retrieval", "ridge"])
    mean = (aux[0].images_N3HW.double() / 255).mean(0).mul(255).round().to(torch.uint8)
    met = strangers[0].only(strangers[0].camids_N == 0)
    drawn = mean.expand(len(met.pids_N), -1, -1, -1)
    by_hand = np.nanmean(scores(drawn, met.images_N3HW, met.masks_N1HW)["ssim"])
    for found in result.axes["pixel"]["attackers"].values():
        assert found["floor"] == pytest.approx(by_hand, abs=1e-4)
    own = [result.axes["identity"]["attackers"][name]["floor"] for name in ("retrieval", "ridge")]
    assert own[0] != own[1]


def test_random_features_leak_nothing(aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor]) -> None:
    result = suite(*aux, *strangers, blind=True, attackers=["retrieval", "ridge"])
    for axis in ("pixel", "identity"):
        found = result.axes[axis]
        assert {a["status"] for a in found["attackers"].values()} == {"ok"}
        assert found["leak"]["low"] <= 0.1
        assert found["leak"]["value"] < 0.1
        assert found["n50"]["value"] is None
    assert result.notes == []


def test_every_judge_has_its_axis_and_one_that_sees_nothing_is_called_weak(
    aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor]
) -> None:
    noise = torch.Generator().manual_seed(0)
    looks = {
        "colours": colours,
        "blind": lambda x: torch.randn(len(x), 4, generator=noise),
        "above": lambda x: colours(x)[:, :3],
    }
    alone = suite(*aux, *strangers, attackers=["ridge"])
    result = suite(*aux, *strangers, attackers=["ridge"], looks=looks)
    assert list(result.axes) == ["pixel", "identity", "identity_2", "identity_3"]
    assert list(result.judges) == ["identity", "identity_2", "identity_3"]
    assert result.axes["identity_3"]["metric"] == "mAP of the judge above"
    note, broken = result.notes
    assert broken.startswith("identity_2: attack broken"), broken
    assert note.startswith("the judge blind is weak: mAP 0.") and note.endswith("the axis identity_2 says little")
    # The others neither hinder nor help: half of the colours tell less than all, and the first judge is as alone.
    assert result.axes["identity"] == alone.axes["identity"]
    seen = [result.axes[axis]["attackers"]["ridge"]["control"] for axis in ("identity", "identity_3")]
    assert seen[0] > seen[1] > 2 * result.judges["identity_3"]["chance"]
    assert result.axes["identity_2"]["attackers"]["ridge"]["status"] == "broken"


def test_a_judge_that_knows_fewer_people_than_the_control_is_named(strangers: tuple[Pictures, Tensor]) -> None:
    judges = {"identity": colour_judge(strangers[0], np.arange(8))}
    quality = {"identity": {"mAP": 0.5, "rank1": 0.6, "chance": 0.02}}
    assert weak_judges(judges, quality, control_mAP=0.4) == []
    (line,) = weak_judges(judges, quality, control_mAP=0.7)
    assert line.startswith(
        "the judge colours is weaker than the control: mAP 0.500 on real pictures, 0.700 the control"
    )


def test_an_attacker_without_its_library_is_one_line_before_anybody_trains(
    monkeypatch: pytest.MonkeyPatch, aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(ATTACKERS["ridge"], "fit", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(MissingExtra, match=r"^the attacker diffusion needs the extra 'diffusion': pip [^\n]*$"):
        suite(*aux, *strangers, attackers=["ridge", "diffusion"])


def test_the_mean_of_guesses_counts_and_the_best_is_noted(
    monkeypatch: pytest.MonkeyPatch, aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor]
) -> None:
    class Unsure(ATTACKERS["ridge"]):  # type: ignore[misc]
        def guesses(self, features_MD: Tensor) -> Tensor:
            drawn = self.reconstruct(features_MD)
            return torch.stack([drawn, 0.5 * drawn + 0.5])

    sure = suite(*aux, *strangers, attackers=["ridge"])
    monkeypatch.setitem(ATTACKERS, "ridge", Unsure)
    unsure = suite(*aux, *strangers, attackers=["ridge"])
    (note,) = unsure.notes
    mean, best = (float(x) for x in re.findall(r"(\S+) and (\S+) \(protected\)", note)[0])
    assert mean == pytest.approx(unsure.axes["pixel"]["attackers"]["ridge"]["protected"], abs=1e-3)
    assert mean < sure.axes["pixel"]["attackers"]["ridge"]["protected"] - 0.01
    assert best > sure.axes["pixel"]["attackers"]["ridge"]["protected"] - 1e-3
    assert sure.notes == []


def test_attackers_have_the_whole_stolen_database(
    monkeypatch: pytest.MonkeyPatch, aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor]
) -> None:
    """Of the victim that they attack: the queries' features first, then those of the other entries."""
    met: list[Tensor | None] = []

    class Thief(ATTACKERS["ridge"]):  # type: ignore[misc]
        def fit(self, *data: object, **more: object) -> None:
            met.append(self.leaked_LD)
            super().fit(*data, **more)

    monkeypatch.setitem(ATTACKERS, "ridge", Thief)
    features, first = strangers[1], strangers[0].camids_N == 0
    result = suite(*aux, *strangers, leaked=features[~first], attackers=["ridge"], blind=True)
    ceiling, floor, protected = (of for of in met if of is not None)
    assert all(torch.equal(of, torch.cat([features[first], features[~first]])) for of in (ceiling, floor))
    assert len(protected) == len(features) and torch.equal(protected[first.sum() :], features[~first])
    assert result.leaked == len(features)
    suite(*aux, *strangers, attackers=["ridge"])
    assert met[-1] is not None and torch.equal(met[-1], features[first])


def test_what_is_kept_is_not_trained_again_unless_something_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor]
) -> None:
    fitted: list[str] = []

    class Counted(ATTACKERS["ridge"]):  # type: ignore[misc]
        def fit(self, features_ND: Tensor, *others: object, **more: object) -> None:
            fitted.append(self.name)
            super().fit(features_ND, *others, **more)

    monkeypatch.setitem(ATTACKERS, "ridge", Counted)
    kept = Kept(tmp_path / "trained")

    def attack(**changes: object) -> SuiteResult:
        fitted.clear()
        return suite(*aux, *strangers, blind=True, kept=kept, attackers=["ridge"], **changes)

    first = attack()
    assert len(fitted) == 3  # ceiling, floor, protected
    again = attack()
    assert fitted == []
    assert again.axes == first.axes and again.pixels == first.pixels and again.seconds == first.seconds
    for key, shown in first.reconstructions.items():
        assert torch.equal(again.reconstructions[key], shown)
    attack(ridge=RidgeConfig(widths=[1.0], ridges=[1.0]))
    assert len(fitted) == 3
    for file in (tmp_path / "trained").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert attack().axes == first.axes
    assert len(fitted) == 3  # what is damaged is made again
    monkeypatch.setattr("ppreid_dist.attacks.bench.source_digest", lambda: "an attacker was changed")
    attack()
    assert len(fitted) == 3


def test_features_that_are_no_numbers_are_refused_before_anybody_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {"query": torch.ones(2, 3), "aux": torch.tensor([[1.0, float("nan"), 0.0]])}
    monkeypatch.setattr("ppreid_dist.evaluation.tracklets.stored_features", lambda extractor, images: stored[images])
    pictures: Any = {split: SimpleNamespace(images_N3HW=split) for split in stored}
    with pytest.raises(RunError, match=r"^protected: what it stores of aux holds numbers that aren't finite$"):
        attack_setup._victim(
            "protected", cast("Any", SimpleNamespace(extractor=None)), pictures, small_config(), Enrolment()
        )


@pytest.mark.parametrize("starts", [["isomap", "flips"], ["isomap", "anchors"], ["isomap"]])
def test_who_reads_codes_is_told_the_pictures_that_an_attacker_is_told(
    monkeypatch: pytest.MonkeyPatch, starts: list[str], aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor]
) -> None:
    """At the floor those of somebody else; and none where nobody asks for them."""
    (known, features), (met, _) = aux, strangers
    config = small_config()
    bench = Bench(
        aux=known,
        query=met,
        gallery_pids=met.pids_N,
        gallery_camids=met.camids_N,
        judges=[colour_judge(met, np.arange(len(met.pids_N)))],
        config=replace(config, unfolded=replace(config.unfolded, starts=starts, likeness=0.1)),
        progress=lambda line: None,
    )
    told: list[Any] = []
    monkeypatch.setattr(bench, "recogniser", lambda rows: SimpleNamespace(rows=rows))
    monkeypatch.setattr("ppreid_dist.attacks.bench.positions", lambda *given: told.append(given[-1]))
    rows, bits = np.arange(len(known.pids_N)), features.sign() + 0.0
    bits[bits == 0] = 1
    bench.positions(bits, bits, 4, rows, rows[::-1].copy())
    bench.positions(bits, bits, 4)
    if starts == ["isomap"]:
        assert told == [None, None]
        return
    assert torch.equal(told[0].pictures_N3hw, known.images_N3HW.flip(0))
    assert torch.equal(told[1].pictures_N3hw, known.images_N3HW)
    assert np.array_equal(told[0].recogniser.rows, rows) and len(told[0].split.fit_F) < len(rows)
