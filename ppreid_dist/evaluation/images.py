"""How close a reconstruction comes to the picture, pixel by pixel.

Shapes: N pictures, H height, W width.
"""

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.errors import DataError
from ppreid_dist.kernels.ssim import ssim_map
from ppreid_dist.pixels import to_float

CLEANEST = 1e-10  # the squared error that counts as none: PSNR ends at 100 dB instead of infinity


@torch.no_grad()
def scores(
    recon_N3HW: Tensor, real_N3HW: Tensor, masks_N1HW: Tensor | None = None, *, chunk: int = 256
) -> dict[str, np.ndarray]:
    """SSIM, PSNR (dB) and L1 of each picture, over the person's pixels where there are masks, else over all.

    Pictures are floats in [0, 1] or uint8; masks are 0/1 (anything above 0 is person). Works ``chunk`` pictures at
    a time on the reconstructions' device. Returns float64 arrays (N,) for "ssim", "psnr" and "l1"; NaN marks a
    picture whose mask is empty. SSIM is its map's mean over the person, so its window sees a little background.
    Raises DataError if the shapes differ.
    """
    if recon_N3HW.shape != real_N3HW.shape:
        raise DataError(f"reconstructions {tuple(recon_N3HW.shape)} and pictures {tuple(real_N3HW.shape)} differ")
    n, _, height, width = recon_N3HW.shape
    if masks_N1HW is not None and masks_N1HW.shape != (n, 1, height, width):
        raise DataError(f"masks {tuple(masks_N1HW.shape)} don't fit pictures {tuple(recon_N3HW.shape)}")
    device, parts = recon_N3HW.device, []
    for start in range(0, n, chunk):
        rows = slice(start, start + chunk)
        x, y = to_float(recon_N3HW[rows]), to_float(real_N3HW[rows].to(device))
        person = (masks_N1HW[rows].to(device) > 0).float() if masks_N1HW is not None else torch.ones_like(x[:, :1])
        area = person.sum((1, 2, 3))
        difference = x - y
        maps = (ssim_map(x, y), difference.square().mean(1, keepdim=True), difference.abs().mean(1, keepdim=True))
        parts.append(torch.stack([(m * person).sum((1, 2, 3)) / area for m in maps]))
    ssim, mse, l1 = torch.cat(parts, 1).double().cpu().numpy() if parts else np.empty((3, 0))
    return {"ssim": ssim, "psnr": -10 * np.log10(np.maximum(mse, CLEANEST)), "l1": l1}
