"""The ranker against plain Python sorting, with ties, junk, distractors, and a gallery in parts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppreid_dist.errors import ConfigError, DataError
from ppreid_dist.evaluation import ranking
from ppreid_dist.evaluation.ranking import Entries, Positives, count_nearer, find_positives, rank_queries
from ppreid_dist.evaluation.reranking import Reranking, rerank
from ppreid_dist.kernels import nearer


def sorted_ranking(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids):
    """AP, first positive's rank and INP of each query by sorting in Python; the similarities are Python integers."""

    def whole(rows):
        unit = [[x / math.sqrt(sum(y * y for y in row)) if any(row) else 0.0 for x in row] for row in rows]
        return [[round(x * 2**25) for x in row] for row in unit]

    query, gallery = whole(query.tolist()), whole(gallery.tolist())
    rows = []
    for q, pid, camid in zip(query, query_pids, query_camids, strict=True):
        kept = [i for i in range(len(gallery)) if not (gallery_pids[i] == pid and gallery_camids[i] == camid)]
        kept.sort(key=lambda i: -sum(a * b for a, b in zip(q, gallery[i], strict=True)))  # stable
        ranks = [rank for rank, i in enumerate(kept, 1) if gallery_pids[i] == pid]
        if ranks:
            ap = sum(i / rank for i, rank in enumerate(ranks, 1)) / len(ranks)
            rows.append((ap, ranks[0], len(ranks) / ranks[-1]))
        else:
            rows.append((math.nan,) * 3)
    return np.array(rows).reshape(-1, 3).T


def measures(result):
    return np.stack([result.ap_Q, result.first_Q, result.inp_Q])


@st.composite
def problems(draw):
    """Few distinct small-integer features, people and cameras, so that ties, junk and lonely queries abound."""
    q, g, d = draw(st.integers(1, 6)), draw(st.integers(1, 30)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    features = [torch.from_numpy(rng.integers(-1, 3, (n, d)).astype(np.float32)) for n in (q, g)]
    pids = rng.integers(1, 5, q), rng.integers(0, 5, g)  # 0: distractors
    return *features, *pids, rng.integers(0, 3, q), rng.integers(0, 3, g)


def rank(problem, **options):
    names = ("query_pids", "gallery_pids", "query_camids", "gallery_camids")
    return rank_queries(problem[0], problem[1], **dict(zip(names, problem[2:], strict=True)), **options)


@settings(max_examples=150, deadline=None)
@given(problem=problems(), chunk=st.integers(1, 7), tile=st.sampled_from([1, 2, 5, 4096]))
def test_equals_a_stable_sort_whatever_the_tiles(problem, chunk, tile):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "TILE", tile)
        patch.setattr(ranking, "PAIRS", 3)
        result = rank(problem, chunk=chunk)
    np.testing.assert_allclose(measures(result), sorted_ranking(*problem), rtol=1e-14)


@settings(max_examples=60, deadline=None)
@given(problem=problems(), cut=st.integers(0, 30))
def test_counts_of_gallery_parts_add_up(problem, cut):
    query, gallery, query_pids, gallery_pids, query_camids, gallery_camids = problem
    queries = Entries(features_ND=query, pids_N=query_pids, camids_N=query_camids)
    cut = min(cut, len(gallery))
    parts = [
        Entries(features_ND=gallery[s], pids_N=gallery_pids[s], camids_N=gallery_camids[s], first=s.start)
        for s in (slice(0, cut), slice(cut, len(gallery)))
    ]
    positives = Positives.join([find_positives(queries, part) for part in parts])
    nearer = sum(count_nearer(queries, part, positives) for part in parts)
    np.testing.assert_array_equal(measures(ranking.ranking(len(query), positives, nearer)), measures(rank(problem)))


def real_valued(q=40, g=700, d=64, people=20, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(people, d))
    pids = rng.integers(1, people, q), rng.integers(0, people, g)
    features = [torch.from_numpy(centres[p] + 1.5 * rng.normal(size=(len(p), d))).float() for p in pids]
    return *features, *pids, rng.integers(0, 4, q), rng.integers(0, 4, g)


def test_agrees_with_a_float64_argsort_of_cosines():
    query, gallery, query_pids, gallery_pids, query_camids, gallery_camids = problem = real_valued()
    a, b = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (query, gallery))
    order = (-(a @ b.T)).argsort(dim=1, stable=True).numpy()
    aps = []
    for q in range(len(query)):
        junk = (gallery_pids[order[q]] == query_pids[q]) & (gallery_camids[order[q]] == query_camids[q])
        match = (gallery_pids[order[q]] == query_pids[q])[~junk]
        aps.append((np.cumsum(match) / np.arange(1, len(match) + 1))[match].mean())
    result = rank(problem)
    np.testing.assert_allclose(result.ap_Q, aps, rtol=1e-12)
    assert 0.3 < result.summary()["mAP"] < 0.95  # neither trivial nor chance


def test_copies_of_a_picture_are_ties_in_any_tile():
    """With a floating-point GEMM the copies' similarities can differ in the last bit from tile to tile."""
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(1, 500, generator=generator)
    gallery = feature.repeat(5000, 1) * 2.0 ** torch.arange(5000)[:, None].remainder(9)
    pids = np.zeros(5000, np.int64)
    pids[[0, 4095, 4096, 4999]] = 7
    result = rank((torch.randn(1, 500, generator=generator), gallery, np.array([7]), pids, np.array([1]), pids * 0))
    assert result.first_Q[0] == 1
    assert result.inp_Q[0] == 4 / 5000
    assert result.ap_Q[0] == pytest.approx((1 + 2 / 4096 + 3 / 4097 + 4 / 5000) / 4, rel=1e-15)


def test_summary_by_hand_leaves_out_queries_without_positive():
    # Query 0: junk is nearest, then a distractor, its positive, another person, its positive. Query 1 has only junk.
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    angle = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])
    gallery = torch.stack([angle.cos(), angle.sin()], 1)
    summary = rank(
        (query, gallery, np.array([1, 2]), np.array([1, 0, 1, 2, 1]), np.array([1, 1]), np.array([1, 1, 2, 1, 2]))
    ).summary()
    ap = (1 / 2 + 2 / 4) / 2
    assert summary == pytest.approx({"mAP": ap, "rank1": 0.0, "rank5": 1.0, "rank10": 1.0, "mINP": 2 / 4})


def test_bad_input_is_named():
    query, gallery, *labels = real_valued(q=3, g=5)
    with pytest.raises(DataError, match="3 features with 2 pids"):
        rank((query, gallery, labels[0][:2], *labels[1:]))
    with pytest.raises(DataError, match="NaN"):
        rank((query, gallery * math.nan, *labels))
    with pytest.raises(DataError, match="no query has"):
        rank((query, gallery, labels[0] + 100, *labels[1:])).summary()


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), dim=st.sampled_from([1, 3, 130, 300]), apart=st.sampled_from([0.0, 1e-7, 1e-5, 1.0]))
def test_the_screened_count_is_the_exact_one(seed, dim, apart):
    """Items that lie nearer to each other than float32 can tell, and a screen that errs by half of what it may."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(1, dim))
    features = [torch.from_numpy(centre + apart * rng.normal(size=(n, dim))) for n in (4, 40)]
    labels = [rng.integers(0, 3, n) for n in (4, 40, 4, 40)]
    products = nearer.products

    def off(query_QD, gallery_GD):
        found, error = products(query_QD, gallery_GD)
        return found + 0.5 * error * torch.from_numpy(rng.choice([-1.0, 1.0], found.shape)).float(), error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearer, "can_screen", lambda features: False)
        exact = measures(rank((*features, *labels)))
        patch.setattr(nearer, "can_screen", lambda features: True)
        np.testing.assert_array_equal(measures(rank((*features, *labels))), exact)
        patch.setattr(nearer, "products", off)
        np.testing.assert_array_equal(measures(rank((*features, *labels))), exact)


@pytest.mark.parametrize("dim", [64, 300, 2048])
def test_a_float32_product_is_no_further_off_than_is_said(dim):
    draw = torch.Generator().manual_seed(dim)
    entries = [
        Entries(features_ND=torch.rand(n, dim, generator=draw) ** 4, pids_N=np.zeros(n), camids_N=np.zeros(n))
        for n in (50, 60)
    ]
    found, error = nearer.products(*(of.unit(slice(None)) for of in entries))
    true = (entries[0].whole(slice(None)) @ entries[1].whole(slice(None)).T) / ranking.ONE**2
    assert 0 < float((found.double() - true).abs().max()) < error < 2e-5


# --- k-reciprocal re-ranking ------------------------------------------------------------------------------------


def plainly_reranked(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, k1, k2, weight):
    """AP of each query, by sets and a whole matrix, as the paper's equations say it."""
    x = torch.nn.functional.normalize(torch.cat([query, gallery]).double(), dim=1)
    distance = ((x[:, None] - x[None]) ** 2).sum(-1)
    distance = (distance / distance.max(1, keepdim=True).values).numpy()
    n = len(x)
    near = [sorted(range(n), key=lambda j: (j != i, distance[i, j])) for i in range(n)]

    def mutual(i, k):
        return {j for j in near[i][: k + 1] if i in near[j][: k + 1]}

    codes = np.zeros((n, n))
    for i in range(n):
        mine = mutual(i, k1)
        whole = set(mine)
        for j in mine:
            others = mutual(j, int(k1 / 2 + 0.5))
            if len(others & mine) > 2 / 3 * len(others):
                whole |= others
        for j in whole:
            codes[i, j] = math.exp(-distance[i, j])
        codes[i] /= codes[i].sum()
    codes = np.array([codes[near[i][:k2]].mean(0) for i in range(n)])
    found = []
    for q in range(len(query)):
        kept = [
            g for g in range(len(gallery))
            if not (gallery_pids[g] == query_pids[q] and gallery_camids[g] == query_camids[q])
        ]  # fmt: skip
        jaccard = [
            1 - np.minimum(codes[q], codes[len(query) + g]).sum() / np.maximum(codes[q], codes[len(query) + g]).sum()
            for g in kept
        ]
        mixed = [weight * distance[q, len(query) + g] + (1 - weight) * d for g, d in zip(kept, jaccard, strict=True)]
        order = [kept[i] for i in np.argsort(mixed, kind="stable")]
        ranks = [rank for rank, g in enumerate(order, 1) if gallery_pids[g] == query_pids[q]]
        found.append(sum(i / rank for i, rank in enumerate(ranks, 1)) / len(ranks) if ranks else math.nan)
    return np.array(found)


def entries(problem):
    query, gallery, query_pids, gallery_pids, query_camids, gallery_camids = problem
    return (
        Entries(features_ND=query, pids_N=query_pids, camids_N=query_camids),
        Entries(features_ND=gallery, pids_N=gallery_pids, camids_N=gallery_camids),
    )


@pytest.mark.parametrize(("k1", "k2", "weight"), [(20, 6, 0.3), (7, 3, 0.5), (4, 1, 0.0), (200, 6, 0.3)])
def test_reranking_is_what_the_paper_says(k1, k2, weight):
    problem = real_valued(q=12, g=110, d=16, people=9)
    found = rerank(*entries(problem), Reranking(k1=k1, k2=k2, lambda_value=weight), chunk=5)
    np.testing.assert_allclose(found.ap_Q, plainly_reranked(*problem, k1, k2, weight), rtol=1e-6)


def test_reranking_by_the_features_alone_changes_nothing_and_with_neighbours_finds_more():
    problem = real_valued(q=60, g=400, d=32, people=25, seed=1)
    plain, alone, mixed = (
        rank(problem),
        rerank(*entries(problem), Reranking(lambda_value=1.0)),
        rerank(*entries(problem)),
    )
    np.testing.assert_allclose(measures(alone), measures(plain))
    assert mixed.summary()["mAP"] > plain.summary()["mAP"] + 0.03


def test_reranking_refuses_what_makes_no_sense():
    for wrong in ({"k1": 0}, {"k2": 0}, {"lambda_value": 1.5}):
        with pytest.raises(ConfigError, match=r"^rerank: [^\n]*$"):
            Reranking(**wrong)
