"""Linkage of databases: D_sys against its definition, and joins that are known."""

import numpy as np
import pytest
import torch
from attack_world import make_people

from ppreid_dist.attacks.linkage import LinkageConfig, linkage_of, rekeyed
from ppreid_dist.evaluation.unlinkability import d_sys, into_bins, linkage


def of_similarities(mated: np.ndarray, others: np.ndarray) -> float:
    bins = into_bins(np.concatenate([mated, others]))
    return d_sys(bins[: len(mated)], bins[len(mated) :])


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
    assert np.isnan(d_sys(np.zeros(0, int), np.ones(3, int)))


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


def test_chance_stays_under_its_null_and_a_key_is_undone_by_who_enrols_people() -> None:
    aux, aux_features = make_people(0, 60, seed=1)
    query, query_features = make_people(1000, 30, seed=2)
    draw = torch.Generator().manual_seed(5)
    noise = [torch.nn.functional.normalize(torch.randn(f.shape, generator=draw), dim=1) for f in
             (aux_features, query_features)]  # fmt: skip
    plain, blind = (aux_features, query_features), (noise[0], noise[1])
    config = LinkageConfig(draws=60)
    rows = linkage_of(aux, query, {"protected": plain, "control": blind}, config, seed=0)
    assert rows is not None
    by = {(row["other"], row["learnt"]): row for row in rows}
    itself, key = by["the same gallery", False], by["another key", False]
    undone = by["another key", True]
    assert itself["d_sys"] > 0.6 and itself["rank1"] > 0.5
    assert key["d_sys"] < 0.4 * itself["d_sys"] and key["rank1"] < 0.2
    assert undone["d_sys"] == pytest.approx(itself["d_sys"], abs=0.05)
    assert undone["rank1"] == pytest.approx(itself["rank1"], abs=0.1)
    for learnt in (False, True):
        row = by["another extractor (the control)", learnt]
        assert row["d_sys"] < 1.5 * row["null"] and row["rank1"] < 0.15
    torch.testing.assert_close(rekeyed(plain)[1] @ rekeyed(plain)[1].T, plain[1] @ plain[1].T)
    other = (aux_features[:, :9], query_features[:, :9])
    rows = linkage_of(aux, query, {"protected": plain, "control": other}, config, seed=0)
    assert rows is not None and [row["learnt"] for row in rows] == [False, False, True, True]
