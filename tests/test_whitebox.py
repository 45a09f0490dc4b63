"""White-box inversion: it finds the person through the extractor, finds nobody from a stranger's feature, and stands
beside the axes."""

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from attack_world import colour_judge, judged_ap, make_people, person_l1, see_colours

from ppreid_dist.attacks.base import permute_people
from ppreid_dist.attacks.bench import Bench, Opened, Victim
from ppreid_dist.attacks.config import AttackConfig
from ppreid_dist.attacks.informed import whitebox_trainings
from ppreid_dist.attacks.judging import chance_ap
from ppreid_dist.attacks.ridge import RidgeConfig
from ppreid_dist.attacks.suite import SuiteResult, run_suite
from ppreid_dist.attacks.whitebox import Inversion, WhiteBoxConfig, feature_distance, total_variation
from ppreid_dist.data.stream import Pictures
from ppreid_dist.errors import ConfigError

RIDGE = RidgeConfig(widths=[2.0, 0.0], ridges=[1e-4, 1e-2, 1.0])
CONFIG = WhiteBoxConfig(people=12, steps=60, smoothness=[0.03, 0.3, 3.0], trial_people=4, batch=32)


def fitted(seed: int = 0, **changes: object) -> Inversion:
    known, _ = make_people(1000, 24)
    attacker = Inversion(replace(CONFIG, **changes), RIDGE)  # type: ignore[arg-type]
    attacker.see(see_colours)
    attacker.fit(see_colours(known.images_N3HW.float() / 255), known.images_N3HW, known.pids_N, seed=seed)
    return attacker


@pytest.fixture(scope="module")
def met() -> Pictures:
    return make_people(0, 30, shots=2)[0]


@pytest.mark.parametrize("start", ["mean", "ridge", "noise"])
def test_each_start_leads_to_the_person_and_a_strangers_feature_to_nobody(start: str, met: Pictures) -> None:
    attacker, stored = fitted(starts=[start]), see_colours(met.images_N3HW.float() / 255)
    drawn = attacker.reconstruct(stored)
    assert drawn.shape == met.images_N3HW.shape
    assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1
    assert float(feature_distance(see_colours(drawn), stored).mean()) < 0.02
    floor = drawn[permute_people(met.pids_N, 0)]
    chance = float(chance_ap(np.array([1]), np.array([len(met.pids_N) - 1]))[0])
    assert judged_ap(floor, met) < 2 * chance
    assert judged_ap(drawn, met) > 4 * chance
    assert person_l1(drawn, met) < 0.7 * person_l1(floor, met)


def test_the_start_that_comes_nearest_counts(met: Pictures) -> None:
    stored = see_colours(met.images_N3HW.float() / 255)[:6]
    attacker = fitted(steps=3)
    distances = {
        name: feature_distance(
            see_colours(attacker._descend(attacker._start(name, stored), stored, attacker.smoothness, 3)), stored
        )
        for name in attacker.config.starts
    }
    nearest = torch.stack(list(distances.values())).min(0).values
    torch.testing.assert_close(feature_distance(see_colours(attacker.reconstruct(stored)), stored), nearest)


def test_the_same_whatever_else_is_in_the_batch_or_was_drawn_before(met: Pictures) -> None:
    stored = see_colours(met.images_N3HW.float() / 255)[:6]
    torch.manual_seed(1)
    together = fitted().reconstruct(stored)
    torch.manual_seed(2)
    alone = fitted().reconstruct(stored[3:4])
    assert float((together[3:4] - alone).abs().mean()) < 1e-3


def test_smoothness_is_chosen_on_held_out_people() -> None:
    """Four colour fields leave the pixels within them open: without a prior they stay as noisy as they started."""
    said: list[str] = []
    known, _ = make_people(1000, 24)
    attacker = Inversion(replace(CONFIG, starts=["noise"], smoothness=[0.0, 1.0]), RIDGE)
    attacker.see(see_colours)
    stored = see_colours(known.images_N3HW.float() / 255)
    attacker.fit(stored, known.images_N3HW, known.pids_N, seed=0, progress=said.append)
    assert attacker.smoothness == 1.0
    assert said[0].startswith("smoothness 1:")


def test_total_variation_by_hand() -> None:
    x = torch.zeros(2, 3, 4, 4)
    x[1, :, 2:] = 1.0  # one edge among three rows of neighbours
    torch.testing.assert_close(total_variation(x), torch.tensor([0.0, 1 / 3]))


@pytest.mark.parametrize("wrong", [{"people": 1}, {"starts": []}, {"smoothness": []}])
def test_wrong_settings_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"^{next(iter(wrong))}: [^\n]*$"):
        WhiteBoxConfig(**wrong)  # type: ignore[arg-type]


def suite(people: int, *, locked: bool = False) -> SuiteResult:
    """The control stores what it sees, the protected one what is left of a picture that lost nearly all contrast;
    ``locked``, noise that opens to what is seen."""
    known, met = make_people(1000, 24)[0], make_people(0, 20)[0]
    first = met.camids_N == 0
    query = replace(met.only(first), masks_N1HW=None)
    victims = {}
    for name, see in (("control", see_colours), ("protected", lambda x: see_colours(0.02 * x + 0.49))):
        features = {part: see(of.images_N3HW.float() / 255) for part, of in (("aux", known), ("query", query))}
        victims[name] = Victim(
            name=name, aux_ND=features["aux"], query_QD=features["query"], utility_ap_Q=np.full(20, 0.8), see=see
        )
    if locked:
        own = victims["control"]
        noise = {key: torch.randn_like(getattr(own, key)) for key in ("aux_ND", "query_QD")}
        opened = Opened(aux_ND=own.aux_ND, query_QD=own.query_QD, see=see_colours)
        victims["protected"] = replace(own, name="protected", **noise, see=own.see, opened=opened)
    bench = Bench(
        aux=known,
        query=query,
        gallery_pids=met.pids_N[~first],
        gallery_camids=met.camids_N[~first],
        judges=[colour_judge(met, ~first)],
        config=AttackConfig(
            attackers=["ridge"],
            curve_attackers=["ridge"],
            people=[0],
            resamples=100,
            ridge=RIDGE,
            whitebox=replace(CONFIG, people=people),
        ),
        progress=lambda line: None,
    )
    return run_suite(bench, **victims)


def test_it_stands_beside_the_axes_and_never_enters_them() -> None:
    without, result = suite(0), suite(12)
    assert without.whitebox is None
    assert result.axes == without.axes
    found = result.whitebox
    assert found is not None and found["people"] == 12
    assert found["matched"]["control"] > 0.95
    for axis in ("pixel", "identity"):
        row = found["axes"][axis]
        assert row["status"] == "ok"
        assert row["control"] > row["floor"]
        assert row["r"]["low"] <= row["r"]["value"] <= row["r"]["high"]
        if axis == "identity":  # of twelve of the twenty people that ridge is scored on
            assert row["without"]["value"] == pytest.approx(result.axes[axis]["leak"]["value"], abs=0.25)
            assert row["without"] != result.axes[axis]["leak"]


def test_what_a_key_opens_counts_where_it_finds_more() -> None:
    found = suite(12, locked=True).whitebox
    assert found is not None
    for axis in ("pixel", "identity"):
        assert found["axes"][axis]["r"]["value"] == pytest.approx(1)


def test_too_few_people_for_a_start_are_told_before_anybody_trains() -> None:
    aux, query = make_people(1000, 11)[0], make_people(0, 4)[0]
    bench = SimpleNamespace(aux=aux, query=query, config=AttackConfig(whitebox=replace(CONFIG, people=2)))
    with pytest.raises(
        ConfigError, match=r"^attack\.whitebox\.starts: ridge needs 12 auxiliary people here, there are 11"
    ):
        whitebox_trainings(cast(Bench, bench), {})
    bench.config = AttackConfig(whitebox=replace(CONFIG, people=2, starts=["mean"]))
    assert whitebox_trainings(cast(Bench, bench), {}) == {}
