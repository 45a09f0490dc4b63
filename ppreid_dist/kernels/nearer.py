"""How many items of a tile are nearer to a query than each of its positives, by ways that agree to the bit.

What is nearer is decided by whole numbers (``evaluation.ranking`` says why). ``exact`` multiplies features that are
whole numbers, held in float64. ``screened`` multiplies them in float32 first, twice as fast on a CPU, and asks for the
exact product only where a float32 one is too near to a positive's to tell.

**How far a float32 product may be off.** A sum of D products errs by about D roundings whatever its order, and of
vectors no longer than 1 a rounding is 2^-24 at most; summed in blocks of :data:`BLOCK` it errs by BLOCK + D / BLOCK of
them. The products of the whole numbers, which decide, are up to √D / 2 of them off those of the features.

Shapes: Q queries, G items of the tile, D feature, M most positives of a query, P pairs.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

BLOCK = 128  # products that are summed in float32 at once
NONE = torch.iinfo(torch.int64).max  # a bar that there isn't
_FURTHEST = torch.iinfo(torch.int64).min
_ROWS = 2**10  # queries' positives whose surroundings are looked at at once
_UNSURE = 2**11  # pairs that take about as long, one by one, as the whole tile


def exact(query_QD: Tensor, gallery_GD: Tensor, junk_QG: Tensor, bar_QM: Tensor, place_QM: Tensor) -> Tensor:
    """(Q,M) int64: the items that are nearer than the positive of similarity ``bar_QM`` and place ``place_QM``.

    Features: whole numbers in float64. ``junk_QG`` items don't count. Bars ascend along M, equal ones by falling place;
    where a query has no more positives they are :data:`NONE`. Places count from the tile's first item, and may be
    before or behind the tile: of two items equally near, the earlier is nearer.
    """
    size, device = len(gallery_GD), query_QD.device
    # A key orders items by similarity, then by place, without ties; a positive's bar is the least key that is nearer
    # than it. One formula serves positives before (0), within and behind (size) the tile.
    key_QG = (query_QD @ gallery_GD.T).long().mul_(size).add_(size - 1 - torch.arange(size, device=device))
    key_QG.masked_fill_(junk_QG, _FURTHEST)
    least_QM = torch.where(bar_QM == NONE, NONE, bar_QM * size + size - place_QM.clamp(0, size))
    passed_QG = torch.searchsorted(least_QM, key_QG, right=True)
    counts = torch.zeros(len(query_QD), bar_QM.shape[1] + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(1, passed_QG, torch.ones((), dtype=torch.int64, device=device).expand_as(passed_QG))
    return counts[:, 1:].flip(1).cumsum(1).flip(1)


def by_triton(query_QD: Tensor, gallery_GD: Tensor, junk_QG: Tensor, bar_QM: Tensor, place_QM: Tensor) -> Tensor:
    """What :func:`exact` counts, by a kernel that stores no similarities."""
    from ppreid_dist.kernels import nearer_triton

    return nearer_triton.count(query_QD, gallery_GD, junk_QG, bar_QM, place_QM, none=NONE)


def screened(
    query_QD: Tensor,
    gallery_GD: Tensor,
    junk_QG: Tensor,
    bar_QM: Tensor,
    place_QM: Tensor,
    *,
    unit: float,
    whole: Callable[[], tuple[Tensor, Tensor]],
    exactly: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """What :func:`exact` counts, from features in float32, of length 1, on a CPU.

    ``unit`` is the similarity that the whole number 1 stands for, ``whole()`` the features that :func:`exact` takes,
    and ``exactly(query_P, item_P)`` the whole similarities (int64) of pairs. Where too many pairs are too near, as in
    random features, the whole tile is counted exactly.
    """
    similarity_QG, error = products(query_QD, gallery_GD)
    similarity_QG.masked_fill_(junk_QG, -torch.inf)
    bar = bar_QM.double() * unit
    over_QM, under_QM = (bar + error).float(), (bar - error).float()
    sorted_QG, size = _sorted(similarity_QG), len(gallery_GD)
    nearer_QM = size - torch.searchsorted(sorted_QG, over_QM, right=True)
    perhaps_QM = size - torch.searchsorted(sorted_QG, under_QM) - nearer_QM
    # A positive of this tile is itself among what its bar can't be told from.
    itself_QM = (place_QM >= 0) & (place_QM < size)
    unsure_QM = (perhaps_QM > itself_QM.long()) & (bar_QM != NONE)
    if int(perhaps_QM[unsure_QM].sum()) > _UNSURE:
        return exact(*whole(), junk_QG, bar_QM, place_QM)
    unsure_A2 = torch.nonzero(unsure_QM)
    for q_A, m_A in (part.unbind(1) for part in unsure_A2.split(_ROWS)):
        near_AG = similarity_QG[q_A]
        near_AG = (near_AG >= under_QM[q_A, m_A, None]) & (near_AG <= over_QM[q_A, m_A, None])
        a_P, g_P = torch.nonzero(near_AG, as_tuple=True)
        found_P, bar_P, place_P = exactly(q_A[a_P], g_P), bar_QM[q_A, m_A][a_P], place_QM[q_A, m_A][a_P]
        nearer_P = (found_P > bar_P) | ((found_P == bar_P) & (g_P < place_P))
        nearer_QM[q_A, m_A] += torch.bincount(a_P[nearer_P], minlength=len(q_A))
    return torch.where(bar_QM == NONE, 0, nearer_QM)


def can_screen(features: Tensor) -> bool:
    """Whether :func:`screened` is right, and the faster, where these are: on a CPU whose float32 products are whole."""
    precision: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return not features.is_cuda and precision in ("none", "ieee")


def products(query_QD: Tensor, gallery_GD: Tensor) -> tuple[Tensor, float]:
    """The float32 products of rows of length 1, and how far each may be from that of the whole numbers."""
    dim = query_QD.shape[1]
    out = torch.zeros(len(query_QD), len(gallery_GD))
    blocks = list(zip(query_QD.split(BLOCK, 1), gallery_GD.split(BLOCK, 1), strict=True))
    for query_QB, gallery_GB in blocks:
        out.addmm_(query_QB, gallery_GB.T)
    # A block's products and sums, the blocks' sum, four of the features' lengths, one of the bar, and its own.
    roundings = min(BLOCK, dim) + len(blocks) + 1 + 4 + 2 + math.sqrt(dim) / 2
    return out, 1.01 * roundings * 2.0**-24


def _sorted(similarity_QG: Tensor) -> Tensor:
    """Each row in ascending order, by as many threads as torch has."""
    rows = similarity_QG.numpy().copy()
    parts = np.array_split(rows, max(1, min(torch.get_num_threads(), len(rows))))
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(lambda part: part.sort(axis=1), parts))
    return torch.from_numpy(rows)
