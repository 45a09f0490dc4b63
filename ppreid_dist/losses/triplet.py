"""The batch-hard triplet objective on pooled features, its candidates gathered over all processes.

Shapes: B rows of this process, N rows of all processes, D feature dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ppreid_dist.distributed import gather, rank
from ppreid_dist.kernels.batch_hard import hardest
from ppreid_dist.settings import Settings, option


@dataclass(kw_only=True)
class TripletConfig(Settings):
    """The margin between an anchor's hardest positive and hardest negative."""

    margin: float | None = option(0.3, "hard margin in feature units; null is the soft margin", at_least=0.0)


def triplet_loss(pooled_BD: Tensor, pids_B: Tensor, config: TripletConfig) -> Tensor:
    """Batch-hard triplet loss (Hermans et al., arXiv 1703.07737) with Euclidean distances; a scalar.

    Anchors are this process's rows; their hardest positive (another row of the pid) and hardest negative are sought
    among the rows of all processes, which need equal B. Anchors that lack either contribute nothing: the result is
    the mean over the local anchors that have both, 0 if there are none. The mean of it over processes is the global
    mean only where every process has as many such anchors; in a PK batch with P, K >= 2 all of them are.
    """
    pooled_BD = pooled_BD.float()
    all_ND, all_pids_N = gather(pooled_BD), gather(pids_B)
    itself_B = torch.arange(len(pids_B), device=pids_B.device) + rank() * len(pids_B)
    hardest_positive_B, hardest_negative_B, valid_B = hardest(pooled_BD, all_ND, pids_B, all_pids_N, itself_B)
    gap_B = _distance(pooled_BD, all_ND[hardest_positive_B]) - _distance(pooled_BD, all_ND[hardest_negative_B])
    loss_B = F.softplus(gap_B) if config.margin is None else F.relu(gap_B + config.margin)
    return (loss_B * valid_B).sum() / valid_B.sum().clamp_min(1)


def _distance(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    # The constant gives equal rows the gradient 0 where the bare square root's would be NaN.
    return ((a_BD - b_BD).square().sum(1) + 1e-12).sqrt()
