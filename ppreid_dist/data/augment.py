"""The field's augmentation (Luo et al., "Bag of Tricks", CVPRW 2019): flip, pad and crop, random erasing (Zhong et
al., AAAI 2020), on the device, a whole batch at once.

Random numbers are drawn for the global batch from (seed, step), and a process takes its rows of them: the result
doesn't depend on the number of processes, nor on the device.

B local batch, G global batch, H height, W width.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.errors import ConfigError
from ppreid_dist.pixels import to_float
from ppreid_dist.settings import Settings, option
from ppreid_dist.transfer import to_device

_TAG = 11
_TRIES = 16  # rectangles drawn a picture; one in four doesn't fit, so that none of 16 fits happens never
_FILL = (0.485, 0.456, 0.406)  # ImageNet's mean, which the extractor's normalisation turns into 0


@dataclass(kw_only=True)
class AugmentConfig(Settings):
    """What is done to training pictures."""

    flip: float = option(0.5, "probability of a horizontal flip", at_least=0, at_most=1)
    pad: int = option(10, "pixels of black padding on each side before the crop back to size", at_least=0)
    erase: float = option(0.5, "probability of erasing a rectangle", at_least=0, at_most=1)
    erase_area_min: float = option(0.02, "least area of the rectangle, of the picture's", more_than=0, at_most=1)
    erase_area_max: float = option(0.4, "largest area of the rectangle, of the picture's", more_than=0, at_most=1)
    erase_aspect: float = option(0.3, "least height/width; its inverse is the largest", more_than=0, at_most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.erase_area_min > self.erase_area_max:
            raise ConfigError(f"erase_area_min: {self.erase_area_min} is above erase_area_max {self.erase_area_max}")


def augment(
    images_B3HW: Tensor, *, config: AugmentConfig, seed: int, step: int, first_row: int, total_rows: int
) -> tuple[Tensor, Tensor]:
    """Augment uint8 pictures, which are the rows ``first_row…`` of a global batch of ``total_rows``.

    Returns ``(x, clean)``, both float32 (B,3,H,W) in [0,1]: ``clean`` is flipped, padded and cropped, ``x`` is that
    with the rectangles erased. ``clean`` is what a reversal of ``x``'s feature is compared with.
    """
    B, _, H, W = images_B3HW.shape
    rng = np.random.default_rng([seed, _TAG, step])
    flip_G = rng.random(total_rows) < config.flip
    shift_G2 = rng.integers(-config.pad, config.pad + 1, (total_rows, 2))
    box_G4 = _boxes(rng, total_rows, H, W, config)
    rows = slice(first_row, first_row + B)
    parameters_B7 = np.concatenate([flip_G[rows, None], shift_G2[rows], box_G4[rows]], axis=1).astype(np.int64)
    parameters_7B1 = to_device(torch.from_numpy(parameters_B7), images_B3HW.device).T[:, :, None]
    flip, dy, dx, top, bottom, left, right = parameters_7B1

    y_1H = torch.arange(H, device=images_B3HW.device)[None]
    x_1W = torch.arange(W, device=images_B3HW.device)[None]
    from_y_BH, from_x_BW = y_1H + dy, x_1W + dx
    inside_BHW = _cross((from_y_BH >= 0) & (from_y_BH < H), (from_x_BW >= 0) & (from_x_BW < W))
    from_x_BW = torch.where(flip.bool(), W - 1 - from_x_BW, from_x_BW)
    source_BHW = from_y_BH.clamp(0, H - 1)[:, :, None] * W + from_x_BW.clamp(0, W - 1)[:, None, :]
    moved = images_B3HW.flatten(2).gather(2, source_BHW.view(B, 1, H * W).expand(B, 3, H * W)).view(B, 3, H, W)
    clean_B3HW = to_float(torch.where(inside_BHW[:, None], moved, 0))

    erased_BHW = _cross((y_1H >= top) & (y_1H < bottom), (x_1W >= left) & (x_1W < right))
    return torch.where(erased_BHW[:, None], _fill(images_B3HW.device), clean_B3HW), clean_B3HW


@cache
def _fill(device: torch.device) -> Tensor:
    """``_FILL`` as (3, 1, 1), sent once."""
    return to_device(torch.tensor(_FILL), device).view(3, 1, 1)


def _cross(rows_BH: Tensor, columns_BW: Tensor) -> Tensor:
    return rows_BH[:, :, None] & columns_BW[:, None, :]


def _boxes(rng: np.random.Generator, total: int, H: int, W: int, config: AugmentConfig) -> np.ndarray:
    """(total, 4) top, bottom, left, right of the rectangles; empty where nothing is erased. As in Zhong et al., area
    and aspect are uniform and drawn again until the rectangle fits."""
    wanted = rng.random(total) < config.erase
    area = rng.uniform(config.erase_area_min, config.erase_area_max, (total, _TRIES)) * H * W
    aspect = rng.uniform(config.erase_aspect, 1 / config.erase_aspect, (total, _TRIES))
    height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (height < H) & (width < W)
    chosen = (np.arange(total), fits.argmax(axis=1))
    exists = wanted & fits[chosen]
    h, w = height[chosen] * exists, width[chosen] * exists
    top = np.floor(rng.random(total) * (H - h + 1))
    left = np.floor(rng.random(total) * (W - w + 1))
    return np.stack([top, top + h, left, left + w], axis=1)
