"""Attackers find what features give away, find nothing where there is nothing, and don't fool themselves."""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from attack_world import SIZE, colour_judge, colours, judged_ap, make_people, person_l1, see_colours
from torch import Tensor

from ppreid_dist.attacks.base import (
    ATTACKERS,
    VIEWS,
    Attacker,
    Progress,
    fit_view,
    held_out_error,
    permute_people,
    split_people,
)
from ppreid_dist.attacks.bench import Victim
from ppreid_dist.attacks.config import AttackConfig
from ppreid_dist.attacks.diffusion import DiffusionConfig
from ppreid_dist.attacks.estimate import cut, most_steps, seconds
from ppreid_dist.attacks.gan import GanConfig
from ppreid_dist.attacks.isomap import IsomapConfig, Manifold
from ppreid_dist.attacks.judging import Look, chance_ap
from ppreid_dist.attacks.kept import Kept
from ppreid_dist.attacks.plateau import Learner, PlateauConfig, Split
from ppreid_dist.attacks.regression import Decoder, RegressionConfig
from ppreid_dist.attacks.ridge import RidgeConfig
from ppreid_dist.attacks.suite import SuiteResult, run_suite
from ppreid_dist.data.stream import Pictures
from ppreid_dist.errors import ConfigError, MissingExtra
from ppreid_dist.storage import write_json

NAMES = ["retrieval", "ridge", "regression", "isomap", "gan"]
if find_spec("diffusers"):
    NAMES.append("diffusion")
TRAINED = [pytest.param(name, marks=[pytest.mark.slow] * (name == "diffusion")) for name in NAMES]


def small_config(steps: int = 60, **changes: object) -> AttackConfig:
    start = RegressionConfig(
        widths=[16],
        lrs=[1e-2],
        trial_steps=max(1, steps // 3),
        batch=16,
        ema=0.9,
        plateau=PlateauConfig(max_steps=steps, evaluate_every=20, patience=2, falls=1),
    )
    config = AttackConfig(
        people=[0],
        curve_attackers=["ridge"],
        resamples=200,
        ridge=RidgeConfig(widths=[1.0, 2.0, 0.0], ridges=[1e-4, 1e-2, 1.0, 100.0]),
        regression=start,
        isomap=IsomapConfig(
            neighbours=[8, 20],
            coordinates=[6, 12],
            widths=start.widths,
            lrs=start.lrs,
            batch=start.batch,
            ema=start.ema,
            plateau=start.plateau,
        ),
        diffusion=DiffusionConfig(
            views=["raw"],
            widths=[16],
            lrs=[4e-3],
            batch=32,
            ema=0.95,
            looks=4,
            samples=2,
            sampling_steps=6,
            plateau=PlateauConfig(max_steps=10 * steps // 3, evaluate_every=50, patience=2, falls=1),
        ),
        gan=GanConfig(start=start, noise_dim=4, plateau=PlateauConfig(max_steps=steps // 2, evaluate_every=15)),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def make(name: str, steps: int = 60) -> Attacker:
    return ATTACKERS[name](getattr(small_config(steps), name))


@pytest.fixture(scope="module")
def aux() -> tuple[Pictures, Tensor]:
    return make_people(1000, 60)


@pytest.fixture(scope="module")
def strangers() -> tuple[Pictures, Tensor]:
    return make_people(0, 40)


@pytest.fixture(scope="module")
def fitted(aux: tuple[Pictures, Tensor]) -> Callable[[str], Attacker]:
    known, features = aux

    @cache
    def fit(name: str) -> Attacker:
        attacker = make(name)
        attacker.fit(features, known.images_N3HW, known.pids_N, seed=0)
        return attacker

    return fit


@pytest.mark.parametrize("name", TRAINED)
def test_attackers_find_what_is_there_and_nothing_where_nothing_is(
    name: str, fitted: Callable[[str], Attacker], aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor]
) -> None:
    (known, features), (people, queries) = aux, strangers
    drawn = fitted(name).reconstruct(queries)
    assert drawn.shape == people.images_N3HW.shape
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) <= 1

    floor = make(name)
    floor.fit(features, known.images_N3HW[permute_people(known.pids_N, 0)], known.pids_N, seed=0)
    prior = floor.reconstruct(queries)
    mean = (known.images_N3HW.float().mean(0, keepdim=True) / 255).expand_as(prior)
    # The mean picture is the best that one can draw without a clue; its ranking is a random one.
    assert person_l1(prior, people) > 0.93 * person_l1(mean, people)
    chance = float(chance_ap(np.array([3]), np.array([len(people.pids_N) - 1]))[0])
    assert judged_ap(prior, people) < 2 * chance
    assert person_l1(drawn, people) < 0.7 * person_l1(prior, people)
    assert judged_ap(drawn, people) > 4 * chance


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_attacker(name: str, strangers: tuple[Pictures, Tensor]) -> None:
    known, features = make_people(1000, 8)
    drawn = []
    for disturb in (1, 2):
        torch.manual_seed(disturb)  # nothing may come from the global state
        before = torch.get_rng_state()
        attacker = make(name, steps=3)
        attacker.fit(features, known.images_N3HW, known.pids_N, seed=5)
        drawn.append(attacker.reconstruct(strangers[1][:8]))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", TRAINED)
def test_a_reconstruction_does_not_depend_on_the_others_of_its_batch(
    name: str, fitted: Callable[[str], Attacker], strangers: tuple[Pictures, Tensor]
) -> None:
    together = fitted(name).reconstruct(strangers[1][:6])
    torch.testing.assert_close(fitted(name).reconstruct(strangers[1][3:4]), together[3:4], atol=1e-4, rtol=0)


def test_a_decoder_ends_with_the_best_weights_it_met(
    aux: tuple[Pictures, Tensor],
) -> None:
    known, features = aux
    config = small_config().regression
    decoder = Decoder(
        features,
        known.images_N3HW,
        Split(*split_people(known.pids_N, 0), 0),
        view="raw",
        width=16,
        lr=1.0,  # so high that the looks go up and down
        noise_dim=0,
        config=config,
        seed=0,
    )
    seen: list[float] = []
    original = decoder.error
    decoder.error = lambda: seen.append(original()) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    decoder.train_to_plateau(PlateauConfig(evaluate_every=1, patience=50, falls=0), 15, lambda line: None)
    assert seen[-1] != min(seen)
    assert original() == pytest.approx(min(seen), abs=1e-6)


def test_how_much_the_error_still_fell_at_the_end(aux: tuple[Pictures, Tensor]) -> None:
    attacker = make("regression")
    attacker.fit(aux[1], aux[0].images_N3HW, aux[0].pids_N, seed=0)
    decoder = attacker.decoder
    assert attacker.still_falling == decoder.still_falling and decoder.looks[-1] == (decoder.steps, decoder.best)
    decoder.looks, decoder.best, decoder.steps = [(10, 1.0), (20, 0.9), (30, 0.8), (36, 0.7), (40, 0.6)], 0.6, 40
    assert decoder.still_falling == pytest.approx(0.25)
    decoder.looks = decoder.looks[-1:]
    assert decoder.still_falling == 1.0


def test_more_people_are_not_worse(aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor]) -> None:
    known, features = aux
    errors = []
    for count in (8, 60):
        rows = np.flatnonzero(known.pids_N < 1000 + count)
        attacker = make("ridge")
        attacker.fit(features[rows], known.images_N3HW[rows], known.pids_N[rows], seed=0)
        errors.append(person_l1(attacker.reconstruct(strangers[1]), strangers[0]))
    assert errors[1] < errors[0]


@pytest.mark.parametrize(("people", "held"), [(8, 4), (15, 4), (20, 4), (50, 10), (501, 100)])
def test_held_out_people_are_never_fitted(people: int, held: int) -> None:
    pids = np.random.default_rng(people).permutation(np.repeat(np.arange(people) * 7, 3))
    fit, chosen = split_people(pids, seed=3)
    assert not set(pids[fit]) & set(pids[chosen])
    assert sorted([*fit, *chosen]) == list(range(len(pids)))
    assert len(set(pids[chosen])) == held
    assert not np.array_equal(chosen, split_people(pids, seed=4)[1])


def test_too_few_people_is_one_line_about_the_setting() -> None:
    few, features = make_people(0, 7)
    for name in NAMES:
        with pytest.raises(ConfigError, match=r"^attack\.people: 7 people are too few[^\n]*$"):
            make(name).fit(features, few.images_N3HW, few.pids_N, seed=0)
    with pytest.raises(ConfigError, match=r"^attack\.people: [^\n]*$"):
        suite(few, features, *make_people(0, 10))
    with pytest.raises(ConfigError, match=r"^attack\.people: 3 is [^\n]*$"):
        suite(*make_people(0, 20), *make_people(50, 10), people=[3, 0])
    with pytest.raises(ConfigError, match=r"^curve_attackers: gan "):
        small_config(attackers=["ridge"], curve_attackers=["gan"])


def test_permuted_pairs_show_other_people_one_for_one() -> None:
    pids = np.array([5, 5, 5, 9, 2, 2, 7, 7, 7, 7])
    pairs = permute_people(pids, seed=1)
    shown = {pid: set(pids[pairs[pids == pid]]) for pid in set(pids)}
    assert all(len(others) == 1 and pid not in others for pid, others in shown.items())
    assert set.union(*shown.values()) == set(pids)


def test_whitening_evens_out_the_axes_and_stays_within_what_was_seen() -> None:
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(200, 10, generator=rng) * torch.logspace(0, -2, 10) + 3
    features[:, 4] = 1.0  # says nothing
    for name, spread in zip(VIEWS, (50, 2), strict=True):
        view = fit_view(name, features, shrinkage=0.0)
        seen = view(features)
        assert float(seen.square().sum(1).mean()) == pytest.approx(1, rel=1e-3)
        deviations = seen.std(0)[seen.std(0) > 1e-6]
        assert (float(deviations.max() / deviations.min()) < spread) == (name == "whitened")
    assert view.dim == 9
    few = fit_view("whitened", features[:5])
    assert few.dim <= 5
    assert torch.isfinite(few(features)).all()


def test_a_rolled_sheet_is_unrolled() -> None:
    """A spiral: its only coordinate is the length along it, for points that were not in the graph, too."""
    angle = torch.linspace(2, 14, 400)
    features = torch.stack([angle * angle.cos(), angle * angle.sin(), torch.zeros(400)], dim=1)
    length = torch.cat([torch.zeros(1), features.diff(dim=0).norm(dim=1).cumsum(0)])

    def told(place_N: Tensor, true_N: Tensor) -> float:
        return abs(float(torch.corrcoef(torch.stack([place_N, true_N]))[0, 1]))

    unrolled = Manifold(features[::2], 6, 1)(features)
    assert unrolled.shape == (400, 1) and told(unrolled[1::2, 0], length[1::2]) > 0.999
    assert max(told(features[:, axis], length) for axis in (0, 1)) < 0.5
    torch.testing.assert_close(Manifold(features[::2], 6, 1)(features[7:8]), unrolled[7:8], atol=1e-3, rtol=0)


def test_a_graph_in_pieces_is_joined() -> None:
    near, far = torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(0))
    features = torch.cat([near, far + 100])
    assert torch.isfinite(Manifold(features, 4, 3)(features)).all()


def test_held_out_error_is_zero_for_the_picture_itself(strangers: tuple[Pictures, Tensor]) -> None:
    pictures = strangers[0].images_N3HW
    assert held_out_error(pictures.float() / 255, pictures) == pytest.approx(0, abs=1e-5)
    assert held_out_error(pictures.flip(0).float() / 255, pictures) > 0.1


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
    )
    rng = torch.Generator().manual_seed(1)
    protected = replace(
        control,
        name="protected",
        aux_ND=torch.randn(control.aux_ND.shape, generator=rng) if blind else control.aux_ND,
        query_QD=torch.randn(control.query_QD.shape, generator=rng) if blind else control.query_QD,
    )
    return run_suite(
        aux=known,
        query=query,
        gallery_pids=met.pids_N[~first],
        gallery_camids=met.camids_N[~first],
        control=control,
        protected=protected,
        judges=[colour_judge(met, ~first, look, name) for name, look in (looks or {"colours": colours}).items()],
        config=small_config(**changes),
        progress=lambda line: None,
        kept=kept,
        announce=announce,
    )


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
    assert re.fullmatch(r"6 trainings, at most about \d+ s here: ridge 6 of \d+ s", first)
    assert re.fullmatch(r"3 trainings, at most about \d+ s here: gan 3 of \d+ s", second)


def test_the_steps_that_a_training_may_take() -> None:
    plateau, short = PlateauConfig(max_steps=1000), PlateauConfig(max_steps=50)
    start = RegressionConfig(views=["raw", "whitened"], widths=[16], lrs=[1e-2, 1e-3], trial_steps=70, plateau=plateau)
    assert most_steps(start) == 4 * 70 + 1000
    assert most_steps(replace(start, views=["raw"], lrs=[1e-2])) == 1000  # nothing to race
    gan = GanConfig(start=start, plateau=short)
    assert most_steps(gan) == 1280 + 50
    assert most_steps(cut(gan, 3)) == 4 * 3 + 3 + 3 and cut(gan, 3).start.lrs == start.lrs

    class Slow(Learner):
        """A tenth of a second to begin with, and a hundredth a step."""

        def learn(self, features_ND: Tensor, pictures_N3hw: Tensor, split: Split, **_: object) -> Decoder:
            time.sleep(0.1 + 0.01 * most_steps(self.config))
            return cast(Decoder, SimpleNamespace(best=0.0, still_falling=0.0))

        def reconstruct(self, features_MD: Tensor) -> Tensor:
            raise NotImplementedError

    config, (known, features) = small_config(regression=start), make_people(0, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ATTACKERS, "regression", Slow)
        found = seconds("regression", config, features, known.images_N3HW, known.pids_N)
    assert found == pytest.approx(0.1 + 0.01 * 1280, rel=0.2)


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
    assert result.shown.shape == (12,)
    assert set(result.reconstructions) == {(v, a) for v in ("unprotected", "protected") for a in ("retrieval", "ridge")}
    assert result.reconstructions["protected", "ridge"].dtype == torch.uint8
    assert result.reconstructions["protected", "ridge"].shape == (12, 3, *SIZE)
    assert set(result.strongest) == {"unprotected", "protected"}
    assert result.per_query["identity", "ridge", "floor"].shape == (40,)
    assert all(seconds > 0 for seconds in result.seconds.values())
    write_json(tmp_path / "axes.json", result.axes)  # strict: NaN or a numpy number would raise


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
