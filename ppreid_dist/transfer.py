"""A process's device, and the way there from the host's memory without a wait for it."""

import torch
from torch import Tensor


def exact_products() -> None:
    """Products of float32 matrices are of float32, also where an environment (as of some containers,
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE) rounds them to TF32's three digits: by the fifth attackers tell a feature itself
    from its neighbours."""
    torch.set_float32_matmul_precision("highest")


def default_device() -> torch.device:
    """This process's GPU where there is one, set to :func:`exact_products`."""
    exact_products()
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """``x``, which nobody changes any more if it is the host's, on ``device``.

    A plain copy to a GPU ends when the GPU has done all that it was asked for before. From pinned memory it needn't be
    waited for: each copy has its own, which torch gives to nobody else before the copy has run.
    """
    pinned = x.is_cpu and torch.device(device).type == "cuda"
    return (x.pin_memory() if pinned else x).to(device, non_blocking=True)
