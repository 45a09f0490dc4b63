"""A database read without its key, by an extractor and few people enrolled under it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ppreid_dist.attacks import enrolled
from ppreid_dist.attacks.enrolled import laid_onto, read, transport
from ppreid_dist.attacks.unfolded import UnfoldedConfig
from ppreid_dist.attacks.waves import WavesConfig
from ppreid_dist.models.store import make_store
from ppreid_dist.models.stores.base import StoreConfig

CONFIG = UnfoldedConfig(
    neighbours=[12], layout_steps=300, waves=WavesConfig(candidates=1000, bits=300, rounds=1, steps=100)
)
DIMS = 6


def looks(count: int, seed: int) -> Tensor:
    """(count, 6) at unit norm: what people of one kind look like, more varied in some directions than in others."""
    spread = torch.tensor([1.0, 0.8, 0.7, 0.5, 0.4, 0.3])
    x = torch.randn(count, DIMS, generator=torch.Generator().manual_seed(seed)) * spread
    return F.normalize(x.abs() * torch.tensor([1.0, 1, 1, -1, 1, -1]) + 0.3 * x, dim=1)


def turned(seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(DIMS, DIMS, generator=torch.Generator().manual_seed(seed)).double())[0]


def off(found: Tensor, truth: Tensor) -> float:
    """The mean squared distance, over that to the mean."""
    return float((found - truth).square().sum() / (truth - truth.mean(0)).square().sum())


def test_a_transport_moves_all_and_little_blurred_moves_each_to_its_own() -> None:
    x = looks(40, 1).double()
    cost = torch.cdist(x, x.flip(0)).square()
    for blur in (0.3, 0.01):
        plan = transport(cost, blur)
        torch.testing.assert_close(plan.sum(0), torch.full((40,), 1 / 40).double(), rtol=1e-6, atol=0)
        assert float(plan.sum()) == pytest.approx(1)
    assert torch.equal(plan.argmax(1), torch.arange(40).flip(0))
    assert float((plan * cost).sum()) < 0.01 * float(cost.mean())


def test_one_cloud_is_laid_onto_another_by_few_and_then_by_all() -> None:
    """Of other people, shrunk, shifted and turned; three are known, with errors."""
    own, other = looks(600, 1).double(), looks(500, 2).double()
    turn = turned(3)
    places, errors = 0.3 * other @ turn + 2, torch.randn(3, DIMS, generator=torch.Generator().manual_seed(4))
    known = 0.3 * own[:3] @ turn + 2 + 0.02 * errors.double()
    found, _ = laid_onto(places, own, known, own[:3], seed=0)
    assert off(found, other) < 0.05
    # Three points alone leave directions open.
    left, _, right = torch.linalg.svd((known - places.mean(0)).mT @ (own[:3] - own.mean(0)))
    alone = (places - places.mean(0)) / 0.3 @ (left @ right) + own.mean(0)
    assert off(alone, other) > 0.2
    again, _ = laid_onto(places, own, known, own[:3], seed=0)
    assert torch.equal(found, again)


def test_who_is_enrolled_tells_how_the_cloud_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without drawn starts, which find as few directions as these by themselves."""
    monkeypatch.setattr(enrolled, "STARTS", 1)
    own, other = looks(600, 1).double(), looks(500, 2).double()
    turn, rows = turned(3), torch.arange(8)
    places, known = other @ turn, own[rows] @ turn
    right, wrong = (laid_onto(places, own, known, own[rows + more], seed=0) for more in (0, 300))
    assert off(right[0], other) < 0.05
    assert off(wrong[0], other) > 0.3 and wrong[1] > right[1]


def test_places_of_fewer_directions_than_the_cloud_are_laid_onto_it_too() -> None:
    flat = looks(300, 2).double()
    flat[:, 4:] = 0
    found, _ = laid_onto((flat @ turned(3))[:, :4], flat, (flat[:6] @ turned(3))[:, :4], flat[:6], seed=0)
    assert found.shape == (300, DIMS) and bool(torch.isfinite(found).all())


@pytest.mark.parametrize(
    ("store", "most"),
    [
        (StoreConfig(kind="rotation", key=9), 0.02),
        (StoreConfig(kind="codes", dim=700, width=0.3, key=9), 0.1),
        (StoreConfig(kind="signs", dim=700, key=9), 0.15),
    ],
    ids=lambda of: getattr(of, "kind", ""),
)
def test_few_enrolled_open_a_database_whose_key_is_secret(store: StoreConfig, most: float) -> None:
    own, stolen = looks(300, 1), looks(300, 2)
    keep = make_store(store, DIMS)
    rows = np.arange(0, 300, 60)
    settings = {"directions": DIMS, "config": CONFIG, "seed": 0}
    terms, found = read(keep(stolen), keep(own[rows]), own, rows, **settings)
    assert terms.shape == (300, DIMS) and found.shape == (300, DIMS) and found.dtype == torch.float32
    # His own terms are his own features, turned: what turns one turns the truth, too.
    turn = torch.linalg.lstsq(own, terms).solution
    assert off(terms, own @ turn) < 1e-6
    assert off(found, stolen @ turn) < most


def test_no_more_is_enrolled_than_there_is() -> None:
    """Features of few people, all of them enrolled, in fewer directions than are asked for."""
    own = F.pad(looks(12, 1), (0, 4))
    keep = make_store(StoreConfig(kind="rotation", key=9), 10)
    terms, found = read(keep(own), keep(own), own, np.arange(12), directions=16, config=CONFIG, seed=0)
    assert terms.shape == (12, 10) and off(found, terms) < 0.05


def test_many_enrolled_say_where_a_layout_of_far_people_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept as cells so narrow that no way leads from one person to the next."""
    people = looks(60, 1).repeat_interleave(10, 0)
    people = F.normalize(people + 0.03 * torch.randn(600, DIMS, generator=torch.Generator().manual_seed(2)), dim=1)
    own, stolen = people[:300], people[300:]
    keep = make_store(StoreConfig(kind="cells", dim=1500, width=0.4, key=9), DIMS)
    config = UnfoldedConfig(neighbours=[8], smoothed=[0], layout_steps=100, waves=WavesConfig(candidates=0))
    errors = []
    for enough in (enrolled.ENOUGH, 1000):
        monkeypatch.setattr(enrolled, "ENOUGH", enough)
        terms, found = read(keep(stolen), keep(own), own, np.arange(300), directions=DIMS, config=config, seed=0)
        errors.append(off(found, stolen @ torch.linalg.lstsq(own, terms).solution))
    assert errors[0] < 0.75 * errors[1], errors  # 0.88 and 1.68 were seen
