"""Batch-hard mining in Triton: distances live in registers, a tile at a time, and are never stored.

Twin and oracle: ``kernels.batch_hard.hardest_at_once``. Shapes: B anchors, N rows they are compared with, D feature
dim, S spans of rows, each a program's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 512  # as many fill any GPU: where anchors are few, the rows are shared out


@triton.jit
def _mine(
    anchors_ptr,
    others_ptr,
    pids_ptr,
    all_pids_ptr,
    itself_ptr,
    squares_ptr,
    found_ptr,
    anchors,
    others,
    dim,
    span,
    TB: tl.constexpr,
    TN: tl.constexpr,
):
    """The extremes of TB anchors over one span: squared distances (2, S, B), -1 and inf where there is none, and
    (4, S, B): their numbers, and whether there is any positive, any negative."""
    i = tl.program_id(0) * TB + tl.arange(0, TB)
    mine = i < anchors
    pid = tl.load(pids_ptr + i, mask=mine, other=0)
    itself = tl.load(itself_ptr + i, mask=mine, other=0)
    farthest = tl.full((TB,), -1.0, tl.float32)
    nearest = tl.full((TB,), float("inf"), tl.float32)
    positive = tl.zeros((TB,), tl.int32)
    negative = tl.zeros((TB,), tl.int32)
    has_positive = tl.zeros((TB,), tl.int32)
    has_negative = tl.zeros((TB,), tl.int32)
    begin = tl.program_id(1) * span
    for start in range(begin, tl.minimum(begin + span, others), TN):
        j = start + tl.arange(0, TN)
        there = j < others
        square = tl.zeros((TB, TN), tl.float32)
        for d in range(dim):
            a = tl.load(anchors_ptr + d * anchors + i[:, None], mask=mine[:, None], other=0.0)
            b = tl.load(others_ptr + d * others + j[None, :], mask=there[None, :], other=0.0)
            gap = a - b
            square += gap * gap
        other_pid = tl.load(all_pids_ptr + j, mask=there, other=0)
        is_positive = (pid[:, None] == other_pid[None, :]) & (itself[:, None] != j[None, :]) & there[None, :]
        is_negative = (pid[:, None] != other_pid[None, :]) & there[None, :]
        far = tl.where(is_positive, square, -1.0)
        near = tl.where(is_negative, square, float("inf"))
        far_best, near_best = tl.max(far, axis=1), tl.min(near, axis=1)
        positive = tl.where(far_best > farthest, start + tl.argmax(far, axis=1, tie_break_left=True), positive)
        negative = tl.where(near_best < nearest, start + tl.argmin(near, axis=1, tie_break_left=True), negative)
        farthest, nearest = tl.maximum(farthest, far_best), tl.minimum(nearest, near_best)
        has_positive = tl.maximum(has_positive, tl.max(is_positive.to(tl.int32), axis=1))
        has_negative = tl.maximum(has_negative, tl.max(is_negative.to(tl.int32), axis=1))
    at = tl.program_id(1) * anchors + i
    below = tl.num_programs(1) * anchors
    tl.store(squares_ptr + at, farthest, mask=mine)
    tl.store(squares_ptr + below + at, nearest, mask=mine)
    tl.store(found_ptr + at, positive, mask=mine)
    tl.store(found_ptr + below + at, negative, mask=mine)
    tl.store(found_ptr + 2 * below + at, has_positive, mask=mine)
    tl.store(found_ptr + 3 * below + at, has_negative, mask=mine)


def hardest(
    pooled_BD: Tensor,
    all_ND: Tensor,
    pids_B: Tensor,
    all_pids_N: Tensor,
    itself_B: Tensor,
    *,
    tile: tuple[int, int] = (64, 64),
) -> tuple[Tensor, Tensor, Tensor]:
    """``kernels.batch_hard.hardest``, its distances by exact differences in float32; tiles are powers of two.

    Eight warps hold a tile of 64×64; four, by the compiler's account for sm_90, would spill.
    """
    tile_b, tile_n = tile
    anchors, others = len(pooled_BD), len(all_ND)
    rows = triton.cdiv(anchors, tile_b)
    spans = min(triton.cdiv(others, tile_n), max(1, _PROGRAMS // rows))
    span = triton.cdiv(triton.cdiv(others, tile_n), spans) * tile_n
    spans = triton.cdiv(others, span)
    squares_2SB = torch.empty(2, spans, anchors, device=pooled_BD.device)
    found_4SB = torch.empty(4, spans, anchors, dtype=torch.int32, device=pooled_BD.device)
    # Laid out by columns, so that neighbouring threads read neighbouring numbers.
    _mine[(rows, spans)](
        pooled_BD.float().T.contiguous(), all_ND.float().T.contiguous(), pids_B.contiguous(), all_pids_N.contiguous(),
        itself_B.contiguous(), squares_2SB, found_4SB, anchors, others, pooled_BD.shape[1], span,
        TB=tile_b, TN=tile_n, num_warps=8,
    )  # fmt: skip
    positive_B = found_4SB[0].gather(0, squares_2SB[0].argmax(0, keepdim=True))[0]
    negative_B = found_4SB[1].gather(0, squares_2SB[1].argmin(0, keepdim=True))[0]
    valid_B = found_4SB[2].any(0) & found_4SB[3].any(0)
    return positive_B.long(), negative_B.long(), valid_B
