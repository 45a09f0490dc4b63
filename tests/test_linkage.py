"""Linkage of databases: D_sys against its definition, and joins that are known."""

import numpy as np
import pytest
import torch
from attack_world import make_people

from ppreid_dist.attacks.linkage import LinkageConfig, Stored, linkage_of, rotated
from ppreid_dist.attacks.unfolded import UnfoldedConfig, positions
from ppreid_dist.attacks.waves import WavesConfig
from ppreid_dist.evaluation.unlinkability import BINS, d_sys, into_bins, linkage
from ppreid_dist.models.store import make_store
from ppreid_dist.models.stores.base import StoreConfig


def of_similarities(mated: np.ndarray, others: np.ndarray) -> float:
    bins = into_bins(np.concatenate([mated, others]))
    return d_sys(*(np.bincount(of, minlength=BINS) for of in (bins[: len(mated)], bins[len(mated) :])))


def test_d_sys_of_what_is_known() -> None:
    rng = np.random.default_rng(0)
    assert of_similarities(rng.uniform(2, 3, 5000), rng.uniform(0, 1, 5000)) == pytest.approx(1)
    assert (
        of_similarities(rng.normal(size=200_000), rng.normal(size=200_000)) < 0.006
    )  # what 50 bins of so many make of nothing
    # Normal densities one apart: the sum over a fine grid of p (p - q) / (p + q) where p > q.
    x = np.linspace(-8, 9, 200_001)
    p, q = (np.exp(-((x - mean) ** 2) / 2) / np.sqrt(2 * np.pi) for mean in (1, 0))
    exact = float((p * ((p - q) / (p + q)).clip(0)).sum() * (x[1] - x[0]))
    found = of_similarities(rng.normal(1, 1, 400_000), rng.normal(0, 1, 400_000))
    assert found == pytest.approx(exact, abs=0.005)
    assert np.isnan(d_sys(np.zeros(BINS, int), np.ones(BINS, int)))


def test_linkage_by_hand() -> None:
    """Three people with two entries each; only pairs of different cameras count."""
    pids, cams = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 0, 1, 0, 1])
    similarity = np.where(pids[:, None] == pids[None, :], 1.0, 0.0)
    similarity[4, 1] = 2.0  # the fifth entry takes person 0 for its own
    usable = cams[:, None] != cams[None, :]
    found = linkage(similarity, pids, pids, usable, draws=50, seed=0)
    assert found is not None
    assert (found.rank1, found.chance) == (pytest.approx(5 / 6), pytest.approx(1 / 3))
    assert linkage(similarity, pids, pids + 9, usable, draws=20, seed=0) is None


def test_linkage_is_that_of_all_pairs_one_by_one() -> None:
    """People of different numbers of entries, some in one database only."""
    rng = np.random.default_rng(0)
    pids_A, pids_B = rng.integers(0, 9, 40), rng.integers(2, 12, 50)
    similarity, usable = rng.normal(size=(40, 50)), rng.random((40, 50)) < 0.7
    found = linkage(similarity, pids_A, pids_B, usable, draws=30, seed=4)
    assert found is not None
    bins = into_bins(similarity[usable])
    draw, people, drawn = np.random.default_rng([4, 0x11E]), np.unique(pids_B), []
    for labels in [people] + [draw.permutation(people) for _ in range(30)]:
        same = np.array([a == labels[people == b][0] for a, row in zip(pids_A, usable, strict=True)
                         for b in pids_B[row]])  # fmt: skip
        drawn.append(d_sys(*(np.bincount(bins[of], minlength=BINS) for of in (same, ~same))))
    assert (found.d_sys, found.null) == (pytest.approx(drawn[0]), pytest.approx(np.quantile(drawn[1:], 0.95)))


@pytest.mark.parametrize("rotation", [False, True])
def test_chance_reaches_its_null_no_more_often_than_it_may(rotation: bool) -> None:
    """Databases that share nothing, with entries of a person that resemble each other: D_sys is above what 95 % of
    permutations stay below in 5 % of 60 cases; in more than 8 of them by a chance of 0.3 %."""
    above = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        pids, cams = np.repeat(np.arange(80), 4), np.tile(np.arange(4), 80)
        one, other = (rng.normal(size=(80, 6)).repeat(4, 0) + 0.4 * rng.normal(size=(320, 6)) for _ in range(2))
        if rotation:
            other = other @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
        one, other = (of / np.linalg.norm(of, axis=1, keepdims=True) for of in (one, other))
        found = linkage(one @ other.T, pids, pids, cams[:, None] != cams[None, :], draws=60, seed=seed)
        assert found is not None
        above += found.d_sys > found.null
    assert above <= 8


def test_a_rotation_is_undone_by_who_enrols_people() -> None:
    aux, aux_features = make_people(0, 60, seed=1)
    query, query_features = make_people(1000, 30, seed=2)
    draw = torch.Generator().manual_seed(5)
    noise = [torch.nn.functional.normalize(torch.randn(f.shape, generator=draw), dim=1) for f in
             (aux_features, query_features)]  # fmt: skip
    plain, blind = Stored(aux_features, query_features), Stored(noise[0], noise[1])
    config = LinkageConfig(draws=60)
    rows = linkage_of(aux, query, {"protected": plain, "control": blind}, None, config, seed=0)
    assert rows is not None
    by = {(row["other"], row["learnt"]): row for row in rows}
    itself, turned = by["the same gallery", False], by["a rotation of it", False]
    undone = by["a rotation of it", True]
    assert itself["d_sys"] > 0.6 and itself["rank1"] > 0.5
    assert turned["d_sys"] < 0.4 * itself["d_sys"] and turned["rank1"] < 0.2
    assert undone["d_sys"] == pytest.approx(itself["d_sys"], abs=0.05)
    assert undone["rank1"] == pytest.approx(itself["rank1"], abs=0.1)
    for learnt in (False, True):
        row = by["another extractor (the control)", learnt]
        assert row["d_sys"] < 1.5 * row["null"] and row["rank1"] < 0.15
    torch.testing.assert_close(rotated(plain)[1] @ rotated(plain)[1].T, plain[1] @ plain[1].T)
    other = Stored(aux_features[:, :9], query_features[:, :9])
    rows = linkage_of(aux, query, {"protected": plain, "control": other}, None, config, seed=0)
    assert rows is not None and [row["learnt"] for row in rows] == [False, False, True, True]


def test_another_key_is_another_key() -> None:
    """Codes under another key are no rotation of these: who learns a map finds fewer than within one database. Who
    finds out what was coded in both learns a better one."""
    aux, aux_features = make_people(0, 60, seed=1)
    query, query_features = make_people(1000, 30, seed=2)
    store = make_store(StoreConfig(kind="codes", axes=8, dim=512, width=0.45), aux_features.shape[1])
    store.fit(aux_features)
    protected, other = (Stored(of(aux_features), of(query_features)) for of in (store, store.rekeyed()))
    waves = WavesConfig(candidates=1000, bits=256, rounds=2, steps=60)
    scheme = UnfoldedConfig(coordinates=[8], layout_steps=300, waves=waves)

    def coded(its: Stored) -> Stored | None:
        found = positions(its.aux_ND, its.query_QD, scheme, len(its.query_QD), 0)
        return None if found is None else Stored(found(its.aux_ND), found(its.query_QD))

    both = {"protected": protected, "control": protected}
    rows = linkage_of(aux, query, both, other, LinkageConfig(draws=20), seed=0, coded=coded)
    assert rows is not None
    by = {(row["other"], row["learnt"]): row["rank1"] for row in rows}
    assert ("a rotation of it", True) not in by
    assert by["another key", False] < 0.2 < by["another key", True] < 0.8 * by["the same gallery", False]
    assert by["another key, what was coded", True] > 0.9 * by["the same gallery", False]
    for kind in ("noise", "rotation", "signs"):
        one = make_store(StoreConfig(kind=kind, key=3), aux_features.shape[1])
        assert one.rekeyed().config.key == 4 and not torch.equal(one(aux_features), one.rekeyed()(aux_features))
    plain = make_store(StoreConfig(kind="pca", dim=4), 16)
    assert plain.rekeyed() is plain
