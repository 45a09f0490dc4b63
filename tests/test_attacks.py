"""Attackers find what features give away, find nothing where there is nothing, and don't fool themselves."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attack_world import NAMES, judged_ap, make, make_people, person_l1, small_config
from sklearn.manifold import Isomap
from torch import Tensor

from ppreid_dist.attacks.averaged import Average
from ppreid_dist.attacks.base import (
    VIEWS,
    Attacker,
    fit_view,
    held_out_error,
    permute_people,
    split_people,
)
from ppreid_dist.attacks.isomap import Manifold
from ppreid_dist.attacks.judging import chance_ap
from ppreid_dist.attacks.layout import Layout
from ppreid_dist.attacks.plateau import LOOKED_AT, PlateauConfig, Split
from ppreid_dist.attacks.regression import Decoder
from ppreid_dist.attacks.ridge import Ridge, RidgeConfig
from ppreid_dist.attacks.unfolded import UnfoldedRegression
from ppreid_dist.data.stream import Pictures
from ppreid_dist.errors import ConfigError, DataError

TRAINED = [pytest.param(name, marks=[pytest.mark.slow] * (name == "diffusion")) for name in NAMES]


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
        Split.of(known.pids_N, 0),
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


def test_who_knows_what_was_coded_draws_by_that(
    aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor]
) -> None:
    """Bits that tell nothing by themselves: only ``positions`` knows whose they are."""
    (known, features), (met, asked) = aux, strangers
    bits = torch.randn(len(features) + len(asked), 64, generator=torch.Generator().manual_seed(0)).sign()
    truth = torch.cat([features, asked])

    def positions(some: Tensor) -> Tensor:
        return truth[(some @ bits.T).argmax(1)]

    errors = []
    for found in (None, positions):
        attacker = make("regression")
        attacker.positions = found
        attacker.fit(bits[: len(features)], known.images_N3HW, known.pids_N, seed=0)
        errors.append(held_out_error(attacker.reconstruct(bits[len(features) :]), met.images_N3HW))
    assert attacker.decoder.name.startswith("what was coded")
    assert errors[1] < 0.9 * errors[0]


def test_a_step_that_spoils_everything_costs_the_attacker_no_more_than_a_fall(aux: tuple[Pictures, Tensor]) -> None:
    known, features = aux
    decoder = Decoder(
        features, known.images_N3HW, Split.of(known.pids_N, 0),
        view="raw", width=16, lr=0.003, noise_dim=0, config=small_config().regression, seed=0,
    )  # fmt: skip
    descend, steps = decoder.descend, []

    def spoil_one(loss: Tensor) -> None:
        steps.append(loss.isfinite().item())
        descend(loss * float("nan") if len(steps) == 12 else loss)

    decoder.descend = spoil_one  # type: ignore[method-assign]
    decoder.train_to_plateau(PlateauConfig(evaluate_every=10, patience=1, falls=2), 60, lambda line: None)
    before = decoder.looks[0][1]
    assert steps.count(False) == 8 and len(steps) == 60  # what was left until the next look
    assert decoder.best < before


def test_of_many_held_out_pictures_all_trainings_look_at_the_same_some() -> None:
    fit, held = np.arange(8), np.arange(8, 508)
    features, pictures = torch.arange(508.0)[:, None], torch.zeros(508, 3, 16, 8, dtype=torch.uint8)
    known = [
        Decoder(
            features, pictures, Split(fit, rows, seed, np.arange(508)),
            view="stored", width=4, lr=0.1, noise_dim=0, config=small_config().regression, seed=draw,
        ).held.flatten().tolist()
        for rows, seed, draw in ((held, 3, 0), (held, 3, 1), (held, 4, 0), (held[:40], 3, 0))
    ]  # fmt: skip
    assert known[0] == known[1] != known[2] and known[3] == held[:40].tolist()
    for some in known[:3]:
        assert len(some) == LOOKED_AT == len(set(some)) and set(some) < set(held)


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
    with pytest.raises(ConfigError, match=r"^curve_attackers: gan "):
        small_config(attackers=["ridge"], curve_attackers=["gan"])


def test_ridge_solves_no_more_equations_than_it_may(aux: tuple[Pictures, Tensor]) -> None:
    """Of a whole gallery, as with pictures of the same people, they would not fit into memory."""
    known, features = aux
    asked = RidgeConfig(widths=[1.0], ridges=[0.01], search_pictures=60)
    some, every = Ridge(replace(asked, pictures=100)), Ridge(asked)
    for ridge in (some, every):
        ridge.fit(features, known.images_N3HW, known.pids_N, seed=0)
    assert [len(ridge.model.features_ND) for ridge in (some, every)] == [100, len(features)]
    assert some.effort(10**6) == some.effort(100) < every.effort(10**6)
    drawn, whole = some.reconstruct(features), every.reconstruct(features)
    assert float((drawn - whole).abs().mean()) < 0.05


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


@pytest.mark.parametrize("name", VIEWS)
def test_few_features_of_many_numbers_are_seen_in_their_span(name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(40, 300, generator=rng)
    few = features[:6]
    view = fit_view(name, few)
    assert view.dim <= 6
    beyond = torch.linalg.svd(few - few.mean(0))[2][6:]  # directions in which the six are all the same
    torch.testing.assert_close(view(features + beyond.sum(0)), view(features), atol=1e-4, rtol=1e-3)
    if name == "raw":  # their distances are kept, but for one scale
        ratio = torch.pdist(view(few)) / torch.pdist(few)
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), atol=0.0, rtol=1e-4)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("rows", [5, 40])
def test_features_that_are_all_the_same_say_nothing_and_stop_nobody(name: str, rows: int) -> None:
    view = fit_view(name, torch.full((rows, 16), 0.25))
    assert view.dim >= 1
    assert torch.equal(view(torch.full((3, 16), 0.25)), torch.zeros(3, view.dim))


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


def test_a_stolen_database_unrolls_what_few_pictures_cannot() -> None:
    """A spiral again, along which a picture goes from dark to bright: the few known points are further from each other
    than from the next turn, and all that lies between them comes from the database."""
    angle = torch.linspace(2, 20, 600)
    features = torch.stack([angle * angle.cos(), angle * angle.sin()], dim=1)
    bright = torch.cat([torch.zeros(1), features.diff(dim=0).norm(dim=1).cumsum(0)])
    pictures = (bright / bright[-1] * 255).round().to(torch.uint8)[:, None, None, None].expand(-1, 3, 16, 8)
    own = torch.randperm(600, generator=torch.Generator().manual_seed(0))[:24]
    errors = []
    for leaked in (None, features):
        attacker = make("isomap", 100)
        attacker.leaked_LD = leaked
        attacker.fit(features[own], pictures[own], np.arange(24), seed=0)
        errors.append(float((attacker.reconstruct(features) - pictures / 255).abs().mean()))
    assert errors[1] < 0.6 * errors[0]


def test_noise_that_a_gallery_adds_averages_away_over_its_entries() -> None:
    random = torch.Generator().manual_seed(0)
    person = F.normalize(torch.randn(60, 1, 32, generator=random), dim=2).expand(-1, 8, -1)
    noisy = (person + 0.1 * torch.randn(60, 8, 32, generator=random)).flatten(0, 1)

    def from_clean(features: torch.Tensor) -> float:
        return float(1 - torch.cosine_similarity(features, person.flatten(0, 1)).mean())

    assert from_clean(Average(F.normalize(noisy), 7, alpha=3.0)(noisy)) < 0.35 * from_clean(noisy)


def test_averages_are_those_of_a_loop() -> None:
    pool = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    strangers = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    found = Average(F.normalize(pool), 3, alpha=2.0)(torch.cat([pool[:5], strangers]))
    for row, feature in zip(found, torch.cat([pool[:5], strangers]), strict=True):
        cosines = [float(torch.cosine_similarity(feature, other, dim=0)) for other in pool]
        nearest = sorted((c, i) for i, c in enumerate(cosines) if not torch.equal(pool[i], feature))[-3:]
        whole = feature / feature.norm() + sum(max(c, 0) ** 2 * pool[i] / pool[i].norm() for c, i in nearest)
        torch.testing.assert_close(row, whole / whole.norm())


def test_positions_are_read_off_codes_without_their_key() -> None:
    """Signs of secret waves, half of a period long where points are usually apart: their cosines say next to nothing
    of far distances, and all together nearly everything, up to a turn and a scale."""
    random = torch.Generator().manual_seed(0)
    points = F.normalize(torch.randn(400, 8, generator=random), dim=1)
    waves, phases = torch.randn(8, 2048, generator=random) / 0.5, 6.3 * torch.rand(2048, generator=random)
    codes = F.normalize((points @ waves + phases).cos().sign())

    def explained(places: torch.Tensor) -> float:
        known = torch.cat([places, torch.ones(len(places), 1)], 1)
        rest = points - known @ torch.linalg.lstsq(known, points).solution
        return float(1 - rest.square().sum() / (points - points.mean(0)).square().sum())

    start = Manifold(codes, 15, 8)(codes)
    layout = Layout(codes, start, steps=400, lr=0.05)
    assert 1 - explained(layout.places_LK) < 0.3 * (1 - explained(start)) and explained(start) < 0.98
    assert layout.residual < 1.5 / 2048**0.5
    torch.testing.assert_close(layout(codes[:7]), layout.places_LK[:7])
    other = F.normalize((F.normalize(points[:7] + 0.02) @ waves + phases).cos().sign())
    assert (layout(other) - layout.places_LK[:7]).norm(dim=1).max() < 0.5 * layout.places_LK.norm(dim=1).mean()


def test_all_features_are_laid_out_whatever_the_graph_holds(
    aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor]
) -> None:
    pictures, features = aux
    config = replace(small_config(2).unfolded, coordinates=[6], averaged=[0], smoothed=[0], pictures=40, entries=10)
    attacker = UnfoldedRegression(config)
    attacker.leaked_LD = strangers[1]
    [enter] = attacker.entrants(features, pictures.images_N3HW, Split.of(pictures.pids_N, 0), 0)
    layout = enter().prepare.args[1]
    assert len(layout.places_LK) == len(features) + len(strangers[1])


@pytest.mark.parametrize("rows", [60, 300])
def test_coordinates_are_isomap_s_and_the_same_again(rows: int) -> None:
    """By the dense eigenvectors of all distances, up to a sign that each coordinate may have."""
    features = torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows))
    drawn = np.random.get_state()[1].copy()
    first, again = (Manifold(features, 5, 8)(features) for _ in range(2))
    assert torch.equal(first, again) and np.array_equal(drawn, np.random.get_state()[1])
    places = Isomap(n_neighbors=5, n_components=8, eigen_solver="dense").fit(features.double()).transform(features)
    dense = torch.from_numpy(places).float()
    torch.testing.assert_close(first * (first * dense).sum(0).sign(), dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [3, 24, 100])
def test_few_features_have_fewer_coordinates_than_are_asked_for(rows: int) -> None:
    features = torch.randn(rows, 40, generator=torch.Generator().manual_seed(rows))
    places = Manifold(features, 10, 64)(features)
    assert 1 <= places.shape[1] < 64 and torch.isfinite(places).all()


def test_features_that_are_all_one_have_one_place() -> None:
    assert torch.equal(Manifold(torch.ones(40, 6), 5, 3)(torch.ones(2, 6)), torch.zeros(2, 3))


def test_a_graph_in_pieces_is_joined() -> None:
    near, far = torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(0))
    features = torch.cat([near, far + 100])
    assert torch.isfinite(Manifold(features, 4, 3)(features)).all()


def test_held_out_error_is_zero_for_the_picture_itself(strangers: tuple[Pictures, Tensor]) -> None:
    pictures = strangers[0].images_N3HW
    assert held_out_error(pictures.float() / 255, pictures) == pytest.approx(0, abs=1e-5)
    assert held_out_error(pictures.flip(0).float() / 255, pictures) > 0.1


def test_pictures_that_are_all_the_same_are_one_line() -> None:
    known, features = make_people(0, 20)
    same = torch.full_like(known.images_N3HW, 90)
    with pytest.raises(DataError, match=r"^ridge: no width and ridge draws the people held out; are all pictures"):
        Ridge(RidgeConfig()).fit(features, same, known.pids_N, seed=0)
