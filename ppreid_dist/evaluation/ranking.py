"""Exact ranking of a gallery without sorting it: a positive's rank is the number of nearer items, plus one.

**Exact.** The same two features must have the same similarity wherever it is computed, or a positive could be
"nearer than itself"; a floating-point GEMM doesn't promise that, its sums depend on the tile's shape and on the
machine. So L2-normalised features are rounded to whole multiples of 2^-25 and held as integers in float64: all
products and partial sums are integers below 2^51, no operation rounds, and any order of summation, any tile, thread
count or device gives the same bits. The rounding moves a cosine by about 1e-8, less than a float32 GEMM does (1e-7).

**Ties.** Of two equally near items the one that comes earlier in the gallery is nearer, as in a stable sort.

**Removed** is a query's junk: gallery items of its person from its own camera. Distractors stay.

**Memory** is that of the queries, their positives and one tile. Counts from disjoint parts of a gallery add up, so
parts may lie on other ranks: find the positives of every part, join them, count in every part, add.

Shapes: Q queries, G gallery items, N either, D feature, P (query, positive) pairs, M most positives of a query.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.errors import DataError
from ppreid_dist.kernels import choice, nearer

ONE = 2**25  # a feature's length in integer units
TILE = 2**12  # gallery items a tile; ONE² · TILE must stay below 2^63
PAIRS = 2**13  # positive pairs whose similarity is computed at once


@dataclass(frozen=True, kw_only=True)
class Entries:
    """Features with their labels: queries, or the part of a gallery that begins at its item ``first``."""

    features_ND: Tensor
    pids_N: np.ndarray
    camids_N: np.ndarray
    first: int = 0

    def __post_init__(self) -> None:
        n = len(self.features_ND)
        if len(self.pids_N) != n or len(self.camids_N) != n:
            raise DataError(f"{n} features with {len(self.pids_N)} pids and {len(self.camids_N)} camids")
        if not bool(torch.isfinite(self.length).all()):
            raise DataError("features hold NaN or infinity: they can't be ranked")

    @cached_property
    def length(self) -> Tensor:
        """(N,1) float64; of a zero feature next to nothing, so that divided by it, it stays zero."""
        # A part at a time: the norm makes a copy in float64.
        norms = [torch.linalg.vector_norm(some, dim=1, dtype=torch.float64) for some in self.features_ND.split(TILE)]
        return torch.cat(norms)[:, None].clamp_min_(1e-12)

    def whole(self, rows: Any) -> Tensor:
        """Features of length ONE, of whole numbers, in float64."""
        # In place, in a copy of its own: a tile of these is the largest thing there is beside the features.
        return self.features_ND[rows].to(torch.float64, copy=True).div_(self.length[rows] / ONE).round_()

    def unit(self, rows: Any) -> Tensor:
        """Features of length 1, in float32."""
        return self.features_ND[rows].float() / self.length[rows].float()


@dataclass(frozen=True, kw_only=True)
class Positives:
    """Pairs of a query and a gallery item of its person from another camera, a query's farthest pair first."""

    query_P: np.ndarray
    item_P: np.ndarray  # its place in the whole gallery
    similarity_P: np.ndarray  # integer, in units of ONE^-2

    @staticmethod
    def join(parts: Sequence["Positives"]) -> "Positives":
        """The positives of a whole gallery from those of its parts."""
        query, item, similarity = (
            np.concatenate([np.empty(0, np.int64), *(getattr(part, name) for part in parts)])
            for name in ("query_P", "item_P", "similarity_P")
        )
        order = np.lexsort((-item, similarity, query))
        return Positives(query_P=query[order], item_P=item[order], similarity_P=similarity[order])


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Per query: average precision (rectangular: the mean over positives of i / rank_i), the first positive's rank,
    and the inverse negative penalty (positives / rank of the last one; Ye et al., TPAMI 2021). float64; NaN where a
    query has no positive."""

    ap_Q: np.ndarray
    first_Q: np.ndarray
    inp_Q: np.ndarray

    def summary(self) -> dict[str, float]:
        """mAP, rank1, rank5, rank10 and mINP as fractions, over the queries that have a positive.

        Raises DataError if none has.
        """
        first = self.first_Q[np.isfinite(self.first_Q)]
        if not first.size:
            raise DataError("ranking: no query has a picture of its person from another camera in the gallery")
        cmc = {f"rank{k}": float((first <= k).mean()) for k in (1, 5, 10)}
        return {"mAP": float(np.nanmean(self.ap_Q)), **cmc, "mINP": float(np.nanmean(self.inp_Q))}


def rank_queries(
    query_QD: Tensor,
    gallery_GD: Tensor,
    *,
    query_pids: np.ndarray,
    gallery_pids: np.ndarray,
    query_camids: np.ndarray,
    gallery_camids: np.ndarray,
    chunk: int = 256,
) -> Ranking:
    """Rank the gallery for every query by the cosine of the features, which need not be normalised.

    ``chunk`` queries × TILE gallery items are compared at a time. Both tensors lie on one device that has float64.
    Raises DataError if labels don't fit the features or a feature isn't finite.
    """
    queries = Entries(features_ND=query_QD, pids_N=query_pids, camids_N=query_camids)
    gallery = Entries(features_ND=gallery_GD, pids_N=gallery_pids, camids_N=gallery_camids)
    return rank_in_parts(queries, [lambda: gallery], chunk=chunk)


def rank_in_parts(queries: Entries, parts: Sequence[Callable[[], Entries]], *, chunk: int = 256) -> Ranking:
    """Rank a gallery of which one part lies in memory at a time: each is opened for its positives and for its counts.

    The parts together are the gallery, in its order, each with its own ``first``. DataError as :func:`rank_queries`.
    """
    positives = Positives.join([find_positives(queries, part()) for part in parts])
    nearer_P = np.zeros(len(positives.query_P), np.int64)
    for part in parts:
        nearer_P += count_nearer(queries, part(), positives, chunk=chunk)
    return ranking(len(queries.pids_N), positives, nearer_P)


def find_positives(queries: Entries, gallery: Entries) -> Positives:
    """The pairs of ``queries`` with items of this (part of a) gallery: same person, another camera."""
    query_N, item_N = (np.argsort(of.pids_N, kind="stable") for of in (queries, gallery))
    asked, known = queries.pids_N[query_N], gallery.pids_N[item_N]
    parts = []
    for pid in np.intersect1d(asked, known):
        rows, items = (
            of[slice(*np.searchsorted(pids, [pid, pid + 1]))] for of, pids in ((query_N, asked), (item_N, known))
        )
        similarity = queries.whole(rows) @ gallery.whole(items).T
        q, g = np.nonzero(queries.camids_N[rows, None] != gallery.camids_N[items])
        found = similarity.long().cpu().numpy()[q, g]
        parts.append(Positives(query_P=rows[q], item_P=items[g] + gallery.first, similarity_P=found))
    return Positives.join(parts)


@torch.no_grad()
def count_nearer(queries: Entries, gallery: Entries, positives: Positives, *, chunk: int = 256) -> np.ndarray:
    """(P,) int64: how many items of this (part of a) gallery are nearer to each pair's query than its positive.

    ``positives`` are those of the whole gallery. Junk isn't counted, other positives are.
    """
    device, size = queries.features_ND.device, len(queries.pids_N)
    way = choice.of("nearer", device).implementation
    screen = way == "screened" and nearer.can_screen(queries.features_ND)
    query_pids, query_camids, gallery_pids, gallery_camids, item_P, similarity_P = (
        torch.as_tensor(a, dtype=torch.int64, device=device)
        for a in (queries.pids_N, queries.camids_N, gallery.pids_N, gallery.camids_N, positives.item_P,
                  positives.similarity_P)
    )  # fmt: skip
    offset = np.searchsorted(positives.query_P, np.arange(size + 1))
    row_P = torch.from_numpy(positives.query_P).to(device)
    column_P = torch.from_numpy(np.arange(len(positives.query_P)) - offset[positives.query_P]).to(device)
    nearer_P = torch.zeros(len(positives.query_P), dtype=torch.int64, device=device)
    for g in range(0, len(gallery.features_ND), TILE):
        items = slice(g, g + TILE)
        gallery_GD = gallery.unit(items) if screen else gallery.whole(items)
        place_P = item_P - gallery.first - g
        for q in range(0, size, chunk):
            rows, stop = slice(q, q + chunk), min(q + chunk, size)
            pairs = slice(int(offset[q]), int(offset[stop]))
            width = int(np.diff(offset[q : stop + 1]).max())  # M
            if not width:
                continue
            junk_QG = query_pids[rows, None] == gallery_pids[items]
            junk_QG &= query_camids[rows, None] == gallery_camids[items]
            where = (row_P[pairs] - q, column_P[pairs])
            bar_QM = torch.full((stop - q, width), nearer.NONE, device=device)
            place_QM = torch.zeros_like(bar_QM)
            bar_QM[where], place_QM[where] = similarity_P[pairs], place_P[pairs]  # ascending along M, as the pairs are
            # Anew for each tile, cheap beside their product: a copy of all queries would be the largest thing here.
            query_QD = queries.unit(rows) if screen else queries.whole(rows)
            tile = (query_QD, gallery_GD, junk_QG, bar_QM, place_QM)
            if screen:
                whole = partial(_tile, queries, gallery, rows, items)
                exactly = partial(_similarity, queries, gallery, q, g)
                counted_QM = nearer.screened(*tile, unit=1 / ONE**2, whole=whole, exactly=exactly)
            elif way == "triton":
                counted_QM = nearer.by_triton(*tile)
            else:
                counted_QM = nearer.exact(*tile)
            nearer_P[pairs] += counted_QM[where]
    return nearer_P.cpu().numpy()


def ranking(queries: int, positives: Positives, nearer_P: np.ndarray) -> Ranking:
    """The measures of ``queries`` queries from the counts of the whole gallery."""
    rank = nearer_P + 1
    order = np.lexsort((rank, positives.query_P))
    query, rank = positives.query_P[order], rank[order]
    count_Q = np.bincount(query, minlength=queries)
    start_Q = np.cumsum(count_Q) - count_Q
    found = np.arange(len(query)) - start_Q[query] + 1
    ap, first, inp = np.full((3, queries), np.nan)
    has = count_Q > 0
    ap[has] = np.bincount(query, found / rank, minlength=queries)[has] / count_Q[has]
    first[has] = rank[start_Q[has]]
    inp[has] = count_Q[has] / rank[(start_Q + count_Q - 1)[has]]
    return Ranking(ap_Q=ap, first_Q=first, inp_Q=inp)


def _tile(queries: Entries, gallery: Entries, rows: slice, items: slice) -> tuple[Tensor, Tensor]:
    return queries.whole(rows), gallery.whole(items)


def _similarity(queries: Entries, gallery: Entries, q: int, g: int, query_P: Tensor, item_P: Tensor) -> Tensor:
    """(P,) int64, of pairs whose places count from ``q`` and ``g``."""
    parts = zip((query_P + q).split(PAIRS), (item_P + g).split(PAIRS), strict=True)
    found = [torch.einsum("pd,pd->p", queries.whole(rows), gallery.whole(items)) for rows, items in parts]
    return torch.cat([query_P[:0], *(some.long() for some in found)])
