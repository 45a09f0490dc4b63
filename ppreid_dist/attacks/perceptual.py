"""How a reconstruction looks: LPIPS of each picture and a kernel distance of all of them, where weights are at hand.

Shapes: Q query pictures, D feature dim, h w pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.errors import ConfigError
from ppreid_dist.evaluation.kid import kernel_distance
from ppreid_dist.models.extractor import Extractor, ExtractorConfig
from ppreid_dist.models.lpips import load_lpips
from ppreid_dist.pixels import resize, to_float
from ppreid_dist.settings import Settings, option

AXIS = "perceptual"
KID_SIZE = (256, 128)  # the pictures are brought to it for the backbone
_BATCH = 128


@dataclass(kw_only=True)
class PerceptualConfig(Settings):
    lpips: str = option(
        "", "safetensors of the state dict of the package lpips, net alex; without, the axis perceptual is left out"
    )
    kid: str = option("", "folder or hub id of a backbone with weights; without, the kernel distance is left out")


class Perception:
    """What ``config`` gives weights for. ConfigError naming the file or backbone that can't be had."""

    def __init__(self, config: PerceptualConfig, device: torch.device | str):
        self.lpips = load_lpips(config.lpips, device) if config.lpips else None
        self.backbone = _backbone(config.kid, device) if config.kid else None
        self.axes = {AXIS: "−LPIPS (AlexNet) of the whole picture"} if self.lpips else {}

    @property
    def weights(self) -> list[Tensor]:
        """All that its scores depend on beside the pictures."""
        networks = [network for network in (self.lpips, self.backbone) if network is not None]
        return [value for network in networks for value in network.state_dict().values()]

    @torch.no_grad()
    def scores(self, drawn_Q3hw: Tensor, real_Q3hw: Tensor) -> dict[str, np.ndarray]:
        """By axis the scores of reconstructions of real pictures (both uint8), float64 (Q,), higher leaking more."""
        if self.lpips is None:
            return {}
        pairs = zip(drawn_Q3hw.split(_BATCH), real_Q3hw.split(_BATCH), strict=True)
        parts = [self.lpips(to_float(drawn), to_float(real.to(drawn.device))) for drawn, real in pairs]
        return {AXIS: -torch.cat(parts).double().cpu().numpy()}

    @torch.no_grad()
    def features(self, images_Q3hw: Tensor) -> Tensor:
        """What the backbone sees in uint8 pictures, the mean of its last map, (Q, D); (Q, 0) without a backbone."""
        if self.backbone is None:
            return torch.empty(len(images_Q3hw), 0)
        parts = [resize(to_float(images), KID_SIZE).clamp(0, 1) for images in images_Q3hw.split(_BATCH)]
        return torch.cat([self.backbone(x_B3HW).pooled_BD for x_B3HW in parts])

    def kid(self, drawn_Q3hw: Tensor, real_QD: Tensor) -> float:
        """Kernel distance of reconstructions (uint8) and the real pictures' ``features``, as sets; NaN without a
        backbone."""
        return float("nan") if self.backbone is None else kernel_distance(real_QD, self.features(drawn_Q3hw))


def _backbone(name: str, device: torch.device | str) -> Extractor:
    try:
        network = Extractor(ExtractorConfig(backbone=name, pretrained=True, last_stride=2))
    except ConfigError as error:
        raise ConfigError(f"attack.perceptual.kid: {str(error).removeprefix('model.backbone: ')}") from None
    return network.to(device).eval().requires_grad_(False)
