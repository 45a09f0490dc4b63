"""Batch-hard mining: every anchor's farthest row of its person and nearest row of another.

Shapes: B anchors, N rows they are compared with, D feature dim, T rows of a tile, S tiles.
"""

import torch
from torch import Tensor

from ppreid_dist.kernels import choice

Mined = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def hardest(pooled_BD: Tensor, all_ND: Tensor, pids_B: Tensor, all_pids_N: Tensor, itself_B: Tensor) -> Mined:
    """The numbers, int64 (B,), of the hardest positive and the hardest negative in ``all_ND`` by Euclidean distance,
    and a mask, bool (B,), of anchors that have both; without one its number is 0.

    ``itself_B`` is each anchor's own number, which is no positive. Of equal distances the first one is taken.
    """
    form = choice.of("batch_hard", pooled_BD.device, distances=len(pooled_BD) * len(all_ND)).implementation
    if form == "triton":
        from ppreid_dist.kernels import batch_hard_triton

        return batch_hard_triton.hardest(pooled_BD, all_ND, pids_B, all_pids_N, itself_B)
    if form == "tiled":
        tile = max(1, choice.TILED_FROM // max(1, len(pooled_BD)))
        return hardest_by_tiles(pooled_BD, all_ND, pids_B, all_pids_N, itself_B, tile=tile)
    return hardest_at_once(pooled_BD, all_ND, pids_B, all_pids_N, itself_B)


def hardest_at_once(pooled_BD: Tensor, all_ND: Tensor, pids_B: Tensor, all_pids_N: Tensor, itself_B: Tensor) -> Mined:
    """:func:`hardest` by the whole matrix of distances, (B, N)."""
    return hardest_by_tiles(pooled_BD, all_ND, pids_B, all_pids_N, itself_B, tile=len(all_ND))


def hardest_by_tiles(
    pooled_BD: Tensor, all_ND: Tensor, pids_B: Tensor, all_pids_N: Tensor, itself_B: Tensor, *, tile: int
) -> Mined:
    """:func:`hardest_at_once` to the bit, with distances to ``tile`` rows at a time."""
    parts = [
        _extremes(pooled_BD, all_ND[start:][:tile], pids_B, all_pids_N[start:][:tile], itself_B - start, start)
        for start in range(0, len(all_ND), tile)
    ]
    far_SB, near_SB, positives_SB, negatives_SB, valid_positive_SB, valid_negative_SB = map(
        torch.stack, zip(*parts, strict=True)
    )
    positive_B = positives_SB.gather(0, far_SB.argmax(0, keepdim=True))[0]
    negative_B = negatives_SB.gather(0, near_SB.argmin(0, keepdim=True))[0]
    return positive_B, negative_B, valid_positive_SB.any(0) & valid_negative_SB.any(0)


def _extremes(
    pooled_BD: Tensor, all_TD: Tensor, pids_B: Tensor, all_pids_T: Tensor, itself_B: Tensor, start: int
) -> tuple[Tensor, ...]:
    """Largest distance to a positive, smallest to a negative, their numbers, and whether there is any; all (B,)."""
    # Without matrix products: their cancellation orders near neighbours wrongly in float32 (and more so in TF32).
    d_BT = torch.cdist(pooled_BD, all_TD, compute_mode="donot_use_mm_for_euclid_dist")
    same_BT = pids_B[:, None] == all_pids_T[None, :]
    positive_BT = same_BT & (torch.arange(len(all_TD), device=d_BT.device) != itself_B[:, None])
    far_B, positive_B = d_BT.masked_fill(~positive_BT, -torch.inf).max(1)
    near_B, negative_B = d_BT.masked_fill(same_BT, torch.inf).min(1)
    return far_B, near_B, positive_B + start, negative_B + start, positive_BT.any(1), (~same_BT).any(1)
