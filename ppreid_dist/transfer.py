"""From the host's memory to the device's, without a wait for the device."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """``x``, which nobody changes any more if it is the host's, on ``device``.

    A plain copy to a GPU ends when the GPU has done all that it was asked for before. From pinned memory it needn't be
    waited for: each copy has its own, which torch gives to nobody else before the copy has run.
    """
    pinned = x.is_cpu and torch.device(device).type == "cuda"
    return (x.pin_memory() if pinned else x).to(device, non_blocking=True)
