"""NVIDIA Apex's fused optimiser, clipping and cross-entropy, where ``kernels.choice`` takes them: its only door.

Its amp, data parallelism and layers are not used. Call only where Apex is installed, with tensors on a CUDA device.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def fused_adam(parameters: Iterable[Tensor], *, decoupled: bool, **settings: Any) -> torch.optim.Optimizer:
    """FusedAdam: torch's AdamW where ``decoupled``, else its Adam, whose decay is part of the gradient.

    It counts its steps once a parameter group, in ``group["step"]``, not a parameter.
    """
    from apex.optimizers import FusedAdam

    return FusedAdam(parameters, adam_w_mode=decoupled, **settings)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together, a scalar."""
    import amp_C

    return _apply(amp_C.multi_tensor_l2norm, [gradients], False)[0][0]


def scale(gradients: Sequence[Tensor], factor: float) -> None:
    """Multiply all gradients in place."""
    import amp_C

    _apply(amp_C.multi_tensor_scale, [gradients, gradients], factor)


def _apply(kernel: Any, lists: list[Sequence[Tensor]], argument: Any) -> Any:
    from apex.multi_tensor_apply import multi_tensor_applier

    overflow = torch.zeros(1, dtype=torch.int32, device=lists[0][0].device)
    return multi_tensor_applier(kernel, overflow, lists, argument)


def cross_entropy(logits_BC: Tensor, labels_B: Tensor, smoothing: float) -> Tensor:
    """Label-smoothed cross-entropy of every row, (B,)."""
    from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

    # Its default padding_idx is 0, which would drop the rows of the first class.
    return SoftmaxCrossEntropyLoss.apply(logits_BC, labels_B, smoothing, -1, False)
