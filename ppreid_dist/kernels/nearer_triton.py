"""Counts of nearer items in Triton: similarities live in registers, a tile at a time, and are never stored or sorted.

Twin and oracle: ``kernels.nearer.exact``; as there, whole numbers in float64 decide, so both agree to the bit.
Shapes: Q queries, G items of the tile, D feature, M most positives of a query.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _count(
    query_ptr,
    gallery_ptr,
    junk_ptr,
    bar_ptr,
    place_ptr,
    counts_ptr,
    queries,
    items,
    dim,
    bars,
    NONE: tl.constexpr,
    TQ: tl.constexpr,
    TG: tl.constexpr,
):
    """What TG items add to the counts (Q, M) of TQ queries."""
    i = tl.program_id(0) * TQ + tl.arange(0, TQ)
    j = tl.program_id(1) * TG + tl.arange(0, TG)
    asked, there = i < queries, j < items
    product = tl.zeros((TQ, TG), tl.float64)
    for d in range(dim):
        a = tl.load(query_ptr + d * queries + i, mask=asked, other=0.0)
        b = tl.load(gallery_ptr + d * items + j, mask=there, other=0.0)
        product += a[:, None] * b[None, :]
    whole = product.to(tl.int64)
    both = asked[:, None] & there[None, :]
    junk = tl.load(junk_ptr + i[:, None] * items + j[None, :], mask=both, other=1)
    counts = both & (junk == 0)
    for m in range(bars):
        bar = tl.load(bar_ptr + i * bars + m, mask=asked, other=NONE)
        place = tl.load(place_ptr + i * bars + m, mask=asked, other=0)
        tied = (whole == bar[:, None]) & (j[None, :] < place[:, None])
        nearer = ((whole > bar[:, None]) | tied) & counts
        tl.atomic_add(counts_ptr + i * bars + m, tl.sum(nearer.to(tl.int64), axis=1), mask=asked & (bar != NONE))


def count(
    query_QD: Tensor,
    gallery_GD: Tensor,
    junk_QG: Tensor,
    bar_QM: Tensor,
    place_QM: Tensor,
    *,
    none: int,
    tile: tuple[int, int] = (32, 64),
) -> Tensor:
    """``kernels.nearer.exact``; ``none`` is the bar that there isn't. Tiles are powers of two."""
    counts_QM = torch.zeros_like(bar_QM)
    queries, items = len(query_QD), len(gallery_GD)
    grid = (triton.cdiv(queries, tile[0]), triton.cdiv(items, tile[1]))
    # Laid out by columns, so that neighbouring threads read neighbouring numbers.
    _count[grid](
        query_QD.T.contiguous(), gallery_GD.T.contiguous(), junk_QG.to(torch.int8).contiguous(), bar_QM.contiguous(),
        place_QM.contiguous(), counts_QM, queries, items, query_QD.shape[1], bar_QM.shape[1],
        NONE=none, TQ=tile[0], TG=tile[1], num_warps=8,
    )  # fmt: skip
    return counts_QM
