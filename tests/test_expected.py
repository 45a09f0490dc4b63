"""What the attackers' ReID model is likely to see behind features, and decoders that begin with it."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attack_world import small_config
from torch import Tensor

from ppreid_dist.attacks.base import to_uint8
from ppreid_dist.attacks.expected import Expected
from ppreid_dist.attacks.plateau import Split
from ppreid_dist.attacks.recogniser import likeness_loss
from ppreid_dist.attacks.regression import decoders
from ppreid_dist.kernels import kernel_ridge
from ppreid_dist.models.generator import Generator

PEOPLE, SHOTS, DIM = 200, 4, 6


class Seer:
    """Sees in a picture what is written into its first pixels."""

    dim = DIM

    def of_pictures(self, images_N3hw: Tensor) -> Tensor:
        return F.normalize(images_N3hw.flatten(1)[:, :DIM].float() - 127.5, dim=1)

    def __call__(self, images_N3hw: Tensor) -> Tensor:
        return self.of_pictures(255 * images_N3hw)

    def inverse(self, width: int) -> Generator:
        torch.manual_seed(width)
        return Generator(DIM, (16, 8), width, 0).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def world() -> Any:
    """Looks of people that repeat, and waves of them, which no line undoes."""
    draw = torch.Generator().manual_seed(1)
    pids = np.repeat(np.arange(PEOPLE), SHOTS)
    near = F.normalize(torch.randn(PEOPLE, DIM, generator=draw), dim=1)[pids]
    pictures = torch.zeros(len(pids), 3, 16, 8, dtype=torch.uint8)
    looks = near + 0.1 * torch.randn(len(pids), DIM, generator=draw)
    pictures.view(len(pids), -1)[:, :DIM] = (127.5 + 100 * looks).round().clamp(0, 255).to(torch.uint8)
    seen = Seer().of_pictures(pictures)
    features = torch.sin(2.5 * seen @ torch.randn(DIM, 16, generator=draw))
    own = pids < 160
    return SimpleNamespace(
        pids=pids[own], pictures=pictures[own], features=features[own], asked=features[~own], truth=seen[~own]
    )


def test_a_kernel_expects_more_than_a_linear_map(world: Any) -> None:
    split = Split.of(world.pids, 0)
    expected = Expected(world.features, world.pictures, split, Seer())
    found = expected(world.asked)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))
    fit = torch.from_numpy(split.fit_F)
    by_lines = max(
        float((F.normalize(linear.predict(world.asked).float(), dim=1) * world.truth).sum(1).mean())
        for ridge in (1e-4, 1e-3, 1e-2, 1e-1)
        for linear in [
            kernel_ridge.fit(
                world.features[fit], Seer().of_pictures(world.pictures[fit]), width=kernel_ridge.LINEAR, ridge=ridge
            )
        ]
    )
    assert (found * world.truth).sum(1).mean() > 1.1 * by_lines  # 0.63 and 0.54 were seen


def test_nothing_is_learnt_from_the_people_held_out_but_the_choice(world: Any) -> None:
    split = Split.of(world.pids, 0)
    others = world.pictures.clone()
    others[torch.from_numpy(split.held_H)] = 0
    one, other = (Expected(world.features, of, split, Seer()) for of in (world.pictures, others))
    assert one.model.width != other.model.width  # where nothing can be told of them, another is chosen
    assert torch.equal(one.model.features_ND, other.model.features_ND)
    assert len(one.model.features_ND) == len(split.fit_F)


def test_a_decoder_begins_as_the_inverse_of_what_is_expected(world: Any) -> None:
    split, seer, config = Split.of(world.pids, 0), Seer(), small_config(0, 0.1).regression
    plain, expecting = (
        decoders(
            2 * world.features, world.pictures, split, noise_dim=0, config=config, recogniser=seer, seed=0,
            prepare=lambda x: 2 * x, for_people=asked,
        )
        for asked in (False, True)
    )  # fmt: skip
    assert len(expecting) == len(plain) + len(config.widths) * len(config.lrs)
    last = expecting[-1]()
    assert "may see them" in last.name
    wanted = seer.inverse(config.widths[-1])(Expected(2 * world.features, world.pictures, split, seer)(2 * world.asked))
    torch.testing.assert_close(last.reconstruct(world.asked), wanted, rtol=1e-4, atol=1e-5)


def test_entrants_for_people_race_by_what_the_recogniser_sees(world: Any) -> None:
    """Not by pixels as well: of what a decoder is trained for, likeness is a tenth."""
    split, seer, config = Split.of(world.pids, 0), Seer(), small_config(0, 0.1).regression
    enter = partial(decoders, world.features, world.pictures, split, noise_dim=0, config=config, seed=0)
    for people, entrant in ((True, enter(recogniser=seer, for_people=True)[0]()), (False, enter(recogniser=seer)[0]())):
        seen = seer.of_pictures(to_uint8(entrant.draw(entrant.held)))
        unlike = float(likeness_loss(seen, seer.of_pictures(entrant.held_pictures)))
        assert (entrant.best == pytest.approx(unlike)) == people
    blind = enter(recogniser=None, for_people=True)
    assert len(blind) == len(enter(recogniser=None)) and np.isinf(blind[0]().best)


@pytest.mark.parametrize("people", [True, False])
def test_a_decoder_for_people_keeps_no_weights_that_draw_others_better(world: Any, people: bool) -> None:
    split, seer, config = Split.of(world.pids, 0), Seer(), small_config(0, 0.1).regression
    enter = decoders(
        world.features, world.pictures, split, noise_dim=0, config=config, recogniser=seer, seed=0, for_people=people
    )
    decoder = enter[0]()
    decoder.look()
    strangers = decoder.held_pictures / 255
    strangers.view(len(strangers), -1)[:, :DIM] = 1 - strangers.view(len(strangers), -1)[:, :DIM]
    decoder.draw = lambda held: strangers  # type: ignore[method-assign]
    assert decoder.look() == (not people)
