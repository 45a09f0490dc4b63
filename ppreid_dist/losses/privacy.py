"""What the extractor is asked to give away less of: reconstructions no better than a wrong person's feature allows.

Shapes: B rows of this process, N rows of all processes, h and w the reversal's picture size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ppreid_dist.distributed import gather, mean_over_ranks, rank

TINY = 1e-12  # a floor of 0 means that there is nothing to hide: the bounded loss is then 0, not 0/0


def bounded(distance_B: Tensor, floor: Tensor | float) -> Tensor:
    """mean(max(0, floor - distance)) / mean(floor): 0 is fully protected, 1 means that nothing is hidden; a scalar.

    ``floor`` is one number or one a row, and is not differentiated. Clamped row by row: with one clamp on the mean,
    rows that are reconstructed far worse than the floor would pay for rows that are reconstructed well, and the
    extractor would gain by confusing this very adversary further, which is masking and not protection.
    """
    floor = _constant(floor, distance_B)
    return (floor - distance_B).relu().mean() / floor.mean().clamp_min(TINY)


def unbounded(distance_B: Tensor, floor: Tensor | float) -> Tensor:
    """-mean(distance) / mean(floor), for the ablation only: it rewards confusing the adversary without end."""
    return -distance_B.mean() / _constant(floor, distance_B).mean().clamp_min(TINY)


def _constant(floor: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(floor, dtype=like.dtype, device=like.device).detach()


@torch.no_grad()
def wrong_person_floor(
    recon_B3hw: Tensor,
    target_B: Tensor,
    pids_B: Tensor,
    distance: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """What a wrong person's feature gives: the mean distance of row i's reconstruction to another person's target.

    Targets are pictures (B,3,h,w), or whatever ``distance`` compares reconstructions with; it maps both to (B,), e.g.
    ``reconstruction_distance``. The other target is sought from half the global batch further on, so equal identity
    blocks are paired one to one. Rows without another person are left out; the floor is 0 if all are. Averaged over
    processes (which need equal B), the same for any number of them.
    """
    all_N, all_pids_N = gather(target_B), gather(pids_B)
    batch, total = len(pids_B), len(all_pids_N)
    columns_N = torch.arange(total, device=pids_B.device)
    rows_B = columns_N[:batch] + rank() * batch
    ahead_BN = (columns_N[None, :] - rows_B[:, None] - total // 2) % total
    other_BN = pids_B[:, None] != all_pids_N[None, :]
    partner_B = ahead_BN.masked_fill(~other_BN, total).argmin(1)
    usable_B = other_BN.any(1).float()
    total_distance = mean_over_ranks((distance(recon_B3hw, all_N[partner_B]) * usable_B).sum())
    return total_distance / mean_over_ranks(usable_B.sum()).clamp_min(TINY)
