"""Pictures as tensors: bytes as floats, and at another size.

Shapes: N or B pictures, C channels, H W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def to_float(pictures_N3HW: Tensor) -> Tensor:
    """uint8 as float32 in [0, 1], alike on all devices; floats, which are taken to be in [0, 1], as float32."""
    if pictures_N3HW.dtype != torch.uint8:
        return pictures_N3HW.float()
    # Divided by a number, CUDA multiplies by its reciprocal, which rounds half of the 256 levels otherwise.
    return pictures_N3HW.float() / torch.full((), 255.0, device=pictures_N3HW.device)


def resize(x_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Floats at ``size`` = (height, width), antialiased bilinear; the same tensor where it has that size already."""
    if tuple(x_BCHW.shape[-2:]) == tuple(size):
        return x_BCHW
    return F.interpolate(x_BCHW, size=size, mode="bilinear", antialias=True, align_corners=False)
