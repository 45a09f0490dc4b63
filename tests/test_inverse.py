"""The decoder of what the attackers' ReID model sees: where their decoders begin."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from attack_world import small_config
from test_recogniser import config, wanderers  # noqa: F401  (config is a fixture)
from torch import Tensor

from ppreid_dist.attacks.base import ATTACKERS, permute_people, to_uint8
from ppreid_dist.attacks.inverse import train_inverse
from ppreid_dist.attacks.plateau import Split
from ppreid_dist.attacks.recogniser import Recogniser, RecogniserConfig, train_recogniser
from ppreid_dist.evaluation.ranking import rank_queries
from ppreid_dist.models.generator import Generator

SHORT = replace(small_config(likeness=0.1).inverse, epochs=8)


@pytest.fixture(scope="module")
def minds(config: RecogniserConfig) -> tuple[Recogniser, Recogniser]:  # noqa: F811
    """The attackers' own, with its inverse, and the judge's."""
    (images, _, pids), (others, _, other_pids) = wanderers(1000, 60), wanderers(2000, 60)
    own = train_recogniser(images, pids, config, seed=0)
    split = Split.of(pids, 0)
    own.inverse = cache(lambda width: train_inverse(own, images, split, width, SHORT, seed=0))
    return own, train_recogniser(others, other_pids, config, seed=9)


@pytest.mark.parametrize("noise", [(0, 0), (0, 3), (3, 3)])
def test_a_generator_draws_as_another_through_a_linear_map(noise: tuple[int, int]) -> None:
    torch.manual_seed(0)
    other, made = Generator(5, (16, 8), 8, noise[0]), Generator(7, (16, 8), 8, noise[1])
    matrix_DE, origin_E = torch.randn(7, 5), torch.randn(5)
    made.draw_as(other, matrix_DE, origin_E)
    f_BD, z_BZ = torch.randn(4, 7), torch.randn(4, 3)
    expected = other(f_BD @ matrix_DE + origin_E, z_BZ if noise[0] else None)
    torch.testing.assert_close(made(f_BD, z_BZ if noise[1] else None), expected, rtol=1e-4, atol=1e-5)


def test_it_draws_people_from_what_the_recogniser_sees(minds: tuple[Recogniser, Recogniser]) -> None:
    own, judge = minds
    assert own.inverse is not None
    real, _, people = wanderers(0, 40)
    inverse = own.inverse(16)
    assert not any(parameter.requires_grad for parameter in inverse.parameters())
    drawn = inverse(own.of_pictures(real))
    assert found(judge, drawn, real, people) > 0.2  # seeds 0, 1, 2 of the recogniser: 0.36, 0.38, 0.41; chance is 0.075


def found(judge: Recogniser, drawn: Tensor, real: Tensor, people: np.ndarray) -> float:
    camids = np.tile(np.arange(4), len(people) // 4)
    of = {"query_pids": people, "gallery_pids": people, "query_camids": camids, "gallery_camids": camids}
    return float(rank_queries(judge.of_pictures(to_uint8(drawn)), judge.of_pictures(real), **of).summary()["mAP"])


def test_the_same_seed_gives_the_same(minds: tuple[Recogniser, Recogniser]) -> None:
    images, _, pids = wanderers(1000, 20)
    split, made = Split.of(pids, 0), []
    for disturb in (1, 2):
        torch.manual_seed(disturb)
        made.append(train_inverse(minds[0], images, split, 8, SHORT, seed=4, steps=3).state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def attack(name: str, steps: int, recogniser: Recogniser, *, permuted: bool = False) -> Callable[[Tensor], Tensor]:
    """An attacker's reconstructions."""
    images, features, pids = wanderers(1000, 60)
    pairs = permute_people(pids, 0) if permuted else np.arange(len(pids))
    attacker = ATTACKERS[name](getattr(small_config(steps, 0.1), name))
    attacker.recogniser = recogniser
    attacker.fit(features, images[pairs], pids, seed=0)
    return attacker.reconstruct


@pytest.mark.parametrize("name", ["regression", "averaged", "isomap", "unfolded", "gan"])
def test_decoders_that_begin_with_it_find_more_in_as_many_steps(
    name: str, minds: tuple[Recogniser, Recogniser]
) -> None:
    own, judge = minds
    real, queries, people = wanderers(0, 40)

    def reached(recogniser: Recogniser, *, permuted: bool = False) -> float:
        return found(judge, attack(name, 4, recogniser, permuted=permuted)(queries), real, people)

    # By seeds 0, 1, 2 of the recogniser: 0.28 to 0.37 by all five, and without 0.07 to 0.12.
    assert reached(own) > 2 * reached(Recogniser(own.network))
    # The floor's pairs of strangers teach it nothing that would find anybody: chance is 0.075.
    assert reached(own, permuted=True) < 0.12


def test_learning_never_makes_it_worse_than_it_began(minds: tuple[Recogniser, Recogniser]) -> None:
    """By the error on the people held out; the learning rate is absurd."""
    images, features, pids = wanderers(1000, 60)
    own = small_config(20, 0.1).regression
    errors = []
    for lr in (10.0, 1e-9):
        attacker = ATTACKERS["regression"](type(own)(**{**vars(own), "lrs": [lr], "views": ["raw"]}))
        attacker.recogniser = minds[0]
        attacker.fit(features, images, pids, seed=0)
        errors.append(attacker.held_out)
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
