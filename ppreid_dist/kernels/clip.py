"""The gradient's norm over all parameters, and its clipping: two calls, since training stops between them if it isn't
finite."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ppreid_dist.kernels import choice, nvidia_apex


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, a scalar; 0 of none."""
    form = choice.of("clip", gradients[0].device).implementation if gradients else "plain"
    if form == "apex":
        return nvidia_apex.total_norm(gradients)
    return nn.utils.get_total_norm(gradients, foreach=form == "foreach")


def clip_(parameters: Sequence[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale the gradients, of norm ``norm``, down to ``limit``; infinity leaves them as they are."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients or math.isinf(limit):
        return
    form = choice.of("clip", gradients[0].device).implementation
    if form == "apex":
        nvidia_apex.scale(gradients, min(1.0, limit / (norm.item() + 1e-6)))
    else:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=form == "foreach")
