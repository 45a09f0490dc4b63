"""The classification objective: label-smoothed cross-entropy over the training identities.

Shapes: B batch rows of this process, N those of all processes, D feature, C training identities, c those whose weights
this process holds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ppreid_dist import distributed
from ppreid_dist.kernels import choice, nvidia_apex
from ppreid_dist.settings import Settings, option


@dataclass(kw_only=True)
class IdentityConfig(Settings):
    """How soft the targets are (0.1 in the BoT recipe: Luo et al., CVPR workshops 2019), and who holds the head."""

    smoothing: float = option(
        0.1,
        "share of the target spread evenly over all identities; 0 is plain cross-entropy",
        at_least=0.0,
        at_most=0.9,
    )
    head: str = option(
        "whole",
        "split: each process holds the head's weights, gradients and moments of its share of the identities only, for "
        "100,000 of them and more (under ddp)",
        choices=("whole", "split"),
    )


def identity_loss(logits_BC: Tensor, labels_B: Tensor, config: IdentityConfig) -> Tensor:
    """Mean over local rows of the label-smoothed cross-entropy (Szegedy et al., CVPR 2016), in nats; a scalar.

    ``labels_B`` are int64 class numbers in [0, C), not pids.
    """
    logits_BC = logits_BC.float()
    if choice.of("cross_entropy", logits_BC.device).implementation == "apex":
        return nvidia_apex.cross_entropy(logits_BC, labels_B, config.smoothing).mean()
    return F.cross_entropy(logits_BC, labels_B, label_smoothing=config.smoothing)


def split_identity_loss(
    logits_Nc: Tensor, labels_N: Tensor, first: int, classes: int, config: IdentityConfig
) -> Tensor:
    """:func:`identity_loss` over all processes' rows, the C logits of a row lying on several processes; a scalar.

    This process holds the logits of the identities from ``first`` on. The loss is the same on every process; features
    come through ``distributed.gather`` and weights through ``distributed.own``, so that gradients are the plain head's.
    """
    logits_Nc = logits_Nc.float()
    largest_N = distributed.any_rank(logits_Nc.detach().amax(1))
    total_N = distributed.sum_over_ranks((logits_Nc - largest_N[:, None]).exp().sum(1))
    log_total_N = total_N.log() + largest_N
    local_N = labels_N - first
    held_N = (local_N >= 0) & (local_N < logits_Nc.shape[1])
    picked_N = logits_Nc.gather(1, local_N.clamp(0, logits_Nc.shape[1] - 1)[:, None])[:, 0]
    target_N = distributed.sum_over_ranks(torch.where(held_N, picked_N, 0.0))
    mean_N = distributed.sum_over_ranks(logits_Nc.sum(1)) / classes
    loss_N = log_total_N - (1 - config.smoothing) * target_N - config.smoothing * mean_N
    return loss_N.mean()
