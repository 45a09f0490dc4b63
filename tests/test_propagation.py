"""What is known of some features, handed on along near ones; and layouts that start from it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ppreid_dist.attacks.isomap import Manifold, drawn
from ppreid_dist.attacks.layout import Layout, misfit
from ppreid_dist.attacks.propagation import HELD, propagated
from ppreid_dist.attacks.recogniser import by_pixels
from ppreid_dist.attacks.unfolded import UnfoldedConfig
from ppreid_dist.errors import ConfigError
from ppreid_dist.models.store import make_store
from ppreid_dist.models.stores.base import StoreConfig


def test_everybody_is_the_mean_of_their_neighbours() -> None:
    """By the whole system of equations, solved at once."""
    random = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(40, 3, generator=random), dim=1)
    known, values = np.array([1, 5, 8, 30]), torch.randn(4, 2, generator=random)
    cosine = (x @ x.T).fill_diagonal_(-2)
    nearest = cosine.topk(4).indices
    joined = torch.zeros(40, 40, dtype=torch.double)
    for row in range(40):
        for other in nearest[row].tolist():
            joined[row, other] = joined[other, row] = cosine[row, other].clamp_min(1e-6).double()
    pull = joined.sum(1)
    system, right = torch.diag(pull) - joined, torch.zeros(40, 2, dtype=torch.double)
    for row, value in zip(known, (values - values.mean(0)).double(), strict=True):
        system[row, row] += HELD * pull[row]
        right[row] = HELD * pull[row] * value
    found = propagated(x, known, values, 4)
    torch.testing.assert_close(found.double(), torch.linalg.solve(system, right), rtol=1e-3, atol=1e-3)


def test_who_is_joined_with_nobody_known_is_the_mean() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.eye(8)[:4].repeat_interleave(3, 0) + 0.01 * torch.rand(12, 8, generator=random)
    found = propagated(x, np.array([0, 1, 3]), torch.tensor([[1.0], [1.0], [4.0]]), 2)
    torch.testing.assert_close(found.flatten()[:6], torch.tensor([-1.0] * 3 + [2.0] * 3), rtol=0.02, atol=0.02)
    assert found[6:].abs().max() < 0.01


def test_the_gradients_of_a_layout_are_autograd_s() -> None:
    random = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(30, 9, generator=random, dtype=torch.double), dim=1)
    alike = x @ x.T
    places, *law = (torch.randn(*shape, generator=random, dtype=torch.double) for shape in ((30, 5), (3,), (3,)))
    inputs = [of.requires_grad_() for of in (places, *law, torch.tensor(0.1, dtype=torch.double))]

    def slowly(places: Tensor, heights: Tensor, rates: Tensor, rest: Tensor) -> Tensor:
        total = places.new_zeros(())
        for one in range(30):
            for other in set(range(30)) - {one}:
                apart = (places[one] - places[other]).square().sum()
                said = rest + (heights.exp() * torch.exp(-rates.exp() * apart)).sum()
                total = total + (said - alike[one, other]) ** 2
        return total / (30 * 29)

    expected = slowly(*inputs)
    expected.backward()
    with torch.no_grad():
        found, *gradients = misfit(inputs[0], alike, *inputs[1:])
    torch.testing.assert_close(found, expected.detach())
    for gradient, of in zip(gradients, inputs, strict=True):
        torch.testing.assert_close(gradient, of.grad)


def explained(places: Tensor, points: Tensor) -> float:
    """The share of the points by a linear map of the places."""
    known = torch.cat([places, torch.ones(len(places), 1)], 1)
    rest = points - known @ torch.linalg.lstsq(known, points).solution
    return float(1 - rest.square().sum() / (points - points.mean(0)).square().sum())


def test_narrow_codes_open_further_to_who_knows_some_of_the_people() -> None:
    """Five pictures each of 120 people, coded by waves so narrow that hardly anybody else is near; 40 are known. How
    much of the numbers behind the codes do positions explain, up to a linear map?"""
    random = torch.Generator().manual_seed(0)
    people = F.normalize(torch.randn(120, 8, generator=random), dim=1).repeat_interleave(5, 0)
    points = F.normalize(people + 0.07 * torch.randn(600, 8, generator=random), dim=1)
    waves, phases = torch.randn(8, 4096, generator=random) / 0.3, 6.3 * torch.rand(4096, generator=random)
    codes = F.normalize((points @ waves + phases).cos().sign(), dim=1)

    # Seeds 0, 1, 2: 0.38, 0.34, 0.33 from Isomap, 0.68, 0.61, 0.61 from anchors.
    alone, anchored = Manifold(codes, 20, 8)(codes), propagated(codes, np.arange(200), points[:200], 20)
    shares = [explained(Layout(codes, of, steps=400, lr=0.05).places_LK, points) for of in (alone, anchored)]
    assert shares[1] > 1.5 * shares[0], shares


def test_smoothed_layouts_get_further_in_as_many_steps() -> None:
    """Eight entries each of 200 people as bits of cells, so narrow that hardly anybody else is near; 75 are roughly
    known."""
    gained = []
    for seed in range(2):
        random = torch.Generator().manual_seed(seed)
        people = F.normalize(torch.randn(200, 8, generator=random), dim=1).repeat_interleave(8, 0)
        points = F.normalize(people + 0.1 * torch.randn(1600, 8, generator=random), dim=1)
        cells = F.normalize(make_store(StoreConfig(kind="cells", dim=1000, width=0.7, key=seed), 8)(points), dim=1)
        start = propagated(cells, np.arange(600), points[:600] + 0.2 * torch.randn(600, 8, generator=random), 20)
        plain, smoothed = (
            explained(Layout(cells, start, steps=steps, lr=0.05, smoothed=near).places_LK, points)
            for steps, near in ((50, 0), (40, 24))
        )
        gained.append(smoothed - plain)
    assert sum(gained) > 0, gained


def test_who_is_to_be_reconstructed_has_a_place_of_his_own_in_a_large_database() -> None:
    draw = np.random.default_rng(0)
    few = drawn(torch.arange(100), 40, draw, 30).tolist()
    assert set(range(30)) < set(few) and len(set(few)) == 40
    assert sorted(drawn(torch.arange(20), 25, draw, 30).tolist()) == list(range(20))
    assert drawn(torch.arange(100), 10, draw, 30).max() < 30


def test_anchors_alone_need_somebody_who_sees() -> None:
    for starts in (["anchors"], ["flips"], ["anchors", "flips"]):
        with pytest.raises(ConfigError, match=r"^starts: without isomap they need likeness more than 0$"):
            UnfoldedConfig(starts=starts, likeness=0.0)
    assert by_pixels(UnfoldedConfig(starts=["anchors"])).starts == ["isomap"]
