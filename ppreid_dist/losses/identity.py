"""The classification objective: label-smoothed cross-entropy over the training identities.

Shapes: B batch rows of this process, C training identities.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ppreid_dist.settings import Settings, option


@dataclass(kw_only=True)
class IdentityConfig(Settings):
    """How soft the targets are; 0.1 is the value of the BoT recipe (Luo et al., CVPR workshops 2019)."""

    smoothing: float = option(
        0.1,
        "share of the target spread evenly over all identities; 0 is plain cross-entropy",
        at_least=0.0,
        at_most=0.9,
    )


def identity_loss(logits_BC: Tensor, labels_B: Tensor, config: IdentityConfig) -> Tensor:
    """Mean over local rows of the label-smoothed cross-entropy (Szegedy et al., CVPR 2016), in nats; a scalar.

    ``labels_B`` are int64 class numbers in [0, C), not pids.
    """
    return F.cross_entropy(logits_BC.float(), labels_B, label_smoothing=config.smoothing)
