"""The waves behind codes, sought without their key from positions that are roughly right."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ppreid_dist.attacks.averaged import ITSELF
from ppreid_dist.attacks.layout import Flipped, Layout, Sharpened
from ppreid_dist.attacks.plateau import Split
from ppreid_dist.attacks.unfolded import Own, UnfoldedConfig, UnfoldedRegression, positions
from ppreid_dist.attacks.waves import FlippedWaves, Waves, WavesConfig, are_bits
from ppreid_dist.models.store import make_store
from ppreid_dist.models.stores.base import StoreConfig, quantise_int8

CONFIG = WavesConfig(candidates=2000, bits=512, rounds=2, steps=150)


def unit(rows: int, seed: int, dims: int = 6) -> Tensor:
    return F.normalize(torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed)), dim=1)


def explained(found: Tensor, truth: Tensor, told: int) -> float:
    """The share of the truth in the other rows, by a linear map of the first ``told``."""
    known = torch.cat([found, torch.ones(len(found), 1)], 1)
    rest = (truth - known @ torch.linalg.lstsq(known[:told], truth[:told]).solution)[told:]
    return float(1 - rest.square().sum() / (truth[told:] - truth[told:].mean(0)).square().sum())


def coded(places: Tensor, spectrum: str = "gaussian") -> Tensor:
    return make_store(StoreConfig(kind="codes", dim=700, width=0.3, spectrum=spectrum, key=5), places.shape[1])(places)


@pytest.mark.parametrize("spectrum", ["gaussian", "shell"])
def test_rough_positions_and_codes_make_each_other_sharp(spectrum: str) -> None:
    """Each number of 500 positions is off by half of its deviation, and the whole lies mirrored, shifted and larger."""
    truth, later = unit(500, 1), unit(40, 2)
    rough = truth + 0.2 * torch.randn(500, 6, generator=torch.Generator().manual_seed(3))
    bits = coded(truth, spectrum).sign()
    waves = Waves(bits, 3 - 2 * rough.flip(1), rate=1 / 2 / 0.3**2 / 4, config=CONFIG, seed=0)
    assert explained(rough, truth, 250) < 0.85
    assert explained(waves.places_LK, truth, 250) > 0.99
    assert waves.agreement > 0.6
    again = Waves(bits, 3 - 2 * rough.flip(1), rate=1 / 2 / 0.3**2 / 4, config=CONFIG, seed=0)
    assert torch.equal(waves.places_LK, again.places_LK)
    # Who isn't in the database is placed by the same waves, from anywhere.
    found = waves(coded(later, spectrum).sign(), waves.places_LK[:40])
    assert explained(torch.cat([waves.places_LK, found]), torch.cat([truth, later]), 500) > 0.9


def test_what_was_coded_is_found_from_a_database_alone() -> None:
    """Of their own people and of those who are asked for, of whom no picture is known; of other features nothing."""
    truth, config = unit(400, 1), UnfoldedConfig(coordinates=[6], layout_steps=200, waves=CONFIG)
    codes = make_store(StoreConfig(kind="codes", dim=512, width=0.5, key=5), 6)(truth)
    found = positions(codes[:300], codes[300:], config, 40, 0)
    assert found is not None
    assert explained(torch.cat([found(codes[:300]), found(codes[300:340])]), truth[:340], 150) > 0.98
    assert positions(truth[:300], truth[300:], config, 40, 0) is None
    assert positions(codes[:300], codes[300:], replace(config, waves=WavesConfig(candidates=0)), 40, 0) is None


def test_what_has_no_waves_is_not_said_to_have() -> None:
    bits = torch.randn(500, 700, generator=torch.Generator().manual_seed(0)).sign()
    assert Waves(bits, unit(500, 1), rate=5.0, config=replace(CONFIG, rounds=1), seed=0).agreement < 0.4


def test_a_sharpened_layout_keeps_who_is_in_it_and_places_others() -> None:
    truth = unit(400, 1)
    rough = truth + 0.1 * torch.randn(400, 6, generator=torch.Generator().manual_seed(3))
    codes = coded(truth)
    sharp = Sharpened(Layout(codes[:360], rough[:360], steps=300, lr=0.05), CONFIG, 0)
    torch.testing.assert_close(sharp(codes[:9]), sharp.places_LK[:9])
    assert (codes[360:] @ codes[:360].T).max() < ITSELF
    assert explained(sharp(codes), truth, 360) > 0.9


def test_bits_are_told_from_other_features() -> None:
    x = unit(30, 1, 16)
    assert are_bits(coded(x)) and are_bits(quantise_int8(coded(x), 1.0))
    assert not are_bits(x) and not are_bits(quantise_int8(x, 1.0))


def far_people(kind: str, width: float) -> tuple[Tensor, Tensor, Tensor]:
    """60 people with ten features each, so far apart that no two of different ones are alike: the truth, bits of it,
    and how half of the people are roughly known, in other terms."""
    people, draw = unit(60, 1), torch.Generator().manual_seed(4)
    truth = F.normalize(people.repeat_interleave(10, 0) + 0.12 * torch.randn(600, 6, generator=draw), dim=1)
    bits = make_store(StoreConfig(kind=kind, dim=700, width=width, key=5), 6)(truth).sign()
    return truth, bits, 2 - 3 * (truth[:300] + 0.1 * torch.randn(300, 6, generator=draw)).flip(1)


@pytest.mark.parametrize(("kind", "found"), [("codes", True), ("cells", False)])
def test_waves_follow_from_bits_that_differ_between_near_features(kind: str, found: bool) -> None:
    """Cells have no waves, and tell nothing of the rest."""
    truth, bits, seen = far_people(kind, {"codes": 0.3, "cells": 0.6}[kind])
    waves = FlippedWaves(bits, torch.arange(300), seen, config=CONFIG, seed=0)
    share = explained(waves.places_LK, truth, 300)
    assert (share > 0.9 and waves.agreement > 0.5) if found else share < 0.5
    again = FlippedWaves(bits, torch.arange(300), seen, config=CONFIG, seed=0)
    assert torch.equal(waves.places_LK, again.places_LK)


class Seer:
    """A ReID model to whom pictures are rows of what it sees."""

    def __init__(self, seen: Tensor):
        self.seen = seen

    def of_pictures(self, rows: Tensor) -> Tensor:
        return self.seen[rows]


def known_half(seen: Tensor) -> Own:
    return Own(Seer(seen), torch.arange(300), Split.of(np.arange(300) // 10, 0))  # type: ignore[arg-type]


READING = UnfoldedConfig(
    neighbours=[10], coordinates=[6], smoothed=[0], pictures=300, entries=300, layout_steps=50, waves=CONFIG
)


def test_whoever_reads_positions_knows_their_own_pictures_too() -> None:
    truth, bits, seen = far_people("codes", 0.3)
    own, shares = known_half(seen), []
    for known, starts in ((own, ["isomap", "flips"]), (own, ["anchors"]), (None, READING.starts), (own, ["isomap"])):
        found = positions(bits[:300], bits[300:], replace(READING, starts=starts), 300, 0, known)
        assert found is not None
        shares.append(explained(found(F.normalize(bits, dim=1)), truth, 300))
    assert min(shares[:2]) > 0.9 and max(shares[2:]) < 0.5, shares


def test_who_reads_cells_has_a_layout_where_no_waves_are_found() -> None:
    truth, bits, seen = far_people("cells", 0.6)
    shares = {}
    for starts in (["isomap", "anchors"], ["flips"]):
        found = positions(bits[:300], bits[300:], replace(READING, starts=starts), 300, 0, known_half(seen))
        assert found is not None
        shares[type(found)] = explained(found(F.normalize(bits, dim=1)), truth, 300)
    assert shares[Layout] > 0.5 > shares[Flipped] + 0.3, shares
    # Of several it is the one that tells most of people held out: averaged with all others, all begin alike.
    residuals = []
    for smoothed in ([0], [0, 599], [599, 0]):
        asked = replace(READING, starts=["anchors"], smoothed=smoothed)
        found = positions(bits[:300], bits[300:], asked, 300, 0, known_half(seen))
        assert found is not None
        residuals.append(found.residual)
    assert residuals == [residuals[0]] * 3


def test_another_training_draws_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same split of people: by layouts, and not by decoders alone, several trainings differ."""
    drawn: list[int] = []

    def note(pool_LD: Tensor, start_LK: Tensor, smoothed: int, config: UnfoldedConfig, seed: int) -> Layout:
        drawn.append(seed)
        return Layout(pool_LD, start_LK, steps=2, lr=0.05, smoothed=smoothed, seed=seed)

    monkeypatch.setattr("ppreid_dist.attacks.unfolded.laid_out", note)
    attacker = UnfoldedRegression(replace(READING, starts=["isomap"]))
    features, pictures = unit(60, 2), torch.zeros(60, 3, 16, 8, dtype=torch.uint8)
    for seed in (3, 4):
        attacker.entrants(features, pictures, Split.of(np.arange(60) // 3, 0), seed)
    assert set(drawn) == {3, 4}
