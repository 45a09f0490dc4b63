"""Neighbourhood components: a person's stored features nearer to each other than to anybody else's, within a width.

After Goldberger et al., "Neighbourhood Components Analysis" (NIPS 2004), with the stored features of a batch in place
of a learnt metric. Codes (``models.store``) tell features apart within a few of their widths only. What this draws
together still matches under narrower ones, which leave an attacker fewer neighbours to unroll.

Shapes: B rows of this process, N rows of all processes, D feature dim.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ppreid_dist.distributed import gather, rank
from ppreid_dist.settings import Settings, option


@dataclass(kw_only=True)
class NeighbourhoodConfig(Settings):
    """How near is near, and how much it counts beside the identity and triplet losses."""

    weight: float = option(0.0, "of the neighbourhood loss; 0 leaves it out", at_least=0)
    width: float = option(
        0.45, "stored features at distance d are as similar as exp(-d^2 / (2 width^2)) says", more_than=0
    )
    chance: float = option(
        0.02, "the similarity that strangers have by chance: 1 / sqrt(bits) for codes of so many bits", more_than=0
    )


def neighbourhood_loss(stored_BD: Tensor, pids_B: Tensor, config: NeighbourhoodConfig) -> Tensor:
    """Mean over this process's rows of -log(p / (p + q + chance)); a scalar.

    p is a row's mean similarity to the others of its person, q the sum of those to all other people, among the rows of
    all processes, which need equal B. Rows that are alone of their person contribute nothing; 0 if all are.
    """
    with torch.autocast(stored_BD.device.type, enabled=False):  # products in bf16 would take near features for equal
        stored_BD = stored_BD.float()
        all_ND, all_pids_N = gather(stored_BD), gather(pids_B)
        squares_BN = stored_BD.square().sum(1)[:, None] + all_ND.square().sum(1) - 2 * stored_BD @ all_ND.mT
    log_BN = squares_BN / (-2 * config.width**2)
    itself_B = torch.arange(len(pids_B), device=pids_B.device) + rank() * len(pids_B)
    same_BN = pids_B[:, None] == all_pids_N
    other_BN = same_BN & (torch.arange(len(all_ND), device=pids_B.device) != itself_B[:, None])
    valid_B, count_B = other_BN.any(1), other_BN.sum(1).clamp_min(1)
    # Where there is nobody, least stands for log 0: minus infinity would give the gradient NaN.
    least = torch.finfo(log_BN.dtype).min
    near_B = log_BN.masked_fill(~other_BN, least).logsumexp(1) - count_B.log()
    far_BX = torch.cat([log_BN.masked_fill(same_BN, least), torch.full_like(log_BN[:, :1], math.log(config.chance))], 1)
    loss_B = F.softplus(far_BX.logsumexp(1) - near_B)
    return torch.where(valid_B, loss_B, 0.0).sum() / valid_B.sum().clamp_min(1)
