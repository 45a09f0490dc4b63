"""How far a reconstruction is from its picture: the generator's objective and the privacy loss's distance.

Shapes: B batch, h and w the reversal's picture size, pictures with values in [0, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ppreid_dist.errors import ConfigError
from ppreid_dist.kernels.ssim import ssim_map
from ppreid_dist.settings import Settings, option


@dataclass(kw_only=True)
class PixelLossConfig(Settings):
    """The mix of distances between pixels: L1 and L2 keep colours, SSIM structure."""

    l1: float = option(1.0, "weight of the mean absolute difference", at_least=0.0)
    l2: float = option(0.0, "weight of the mean squared difference", at_least=0.0)
    ssim: float = option(0.5, "weight of 1 - SSIM", at_least=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._total() == 0:
            raise ConfigError("l1: one of the weights must be more than 0")

    def _total(self) -> float:
        return self.l1 + self.l2 + self.ssim


@dataclass(kw_only=True)
class ReconstructionConfig(PixelLossConfig):
    """The same and a perceptual term, what a frozen network sees."""

    perceptual: float = option(0.0, "weight of 1 - cosine of a frozen backbone's features", at_least=0.0)
    perceptual_backbone: str = option("", "hub id or folder of that frozen backbone; needed where perceptual > 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perceptual > 0 and not self.perceptual_backbone:
            raise ConfigError("perceptual_backbone: must be named where perceptual is more than 0")

    def _total(self) -> float:
        return super()._total() + self.perceptual


def pixel_distance(recon_B3hw: Tensor, target_B3hw: Tensor, config: PixelLossConfig) -> Tensor:
    """The configured mix of distances for each picture, float32 (B,) and >= 0; equal pictures give 0."""
    recon_B3hw, target_B3hw = recon_B3hw.float(), target_B3hw.float()
    distance_B = recon_B3hw.new_zeros(len(recon_B3hw))
    if config.l1:
        distance_B = distance_B + config.l1 * (recon_B3hw - target_B3hw).abs().mean((1, 2, 3))
    if config.l2:
        distance_B = distance_B + config.l2 * (recon_B3hw - target_B3hw).square().mean((1, 2, 3))
    if config.ssim:
        distance_B = distance_B + config.ssim * (1 - ssim_map(recon_B3hw, target_B3hw).mean((1, 2, 3)))
    return distance_B


def reconstruction_distance(
    recon_B3hw: Tensor,
    target_B3hw: Tensor,
    config: ReconstructionConfig,
    perceive: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """:func:`pixel_distance` and the perceptual term, float32 (B,).

    ``perceive`` maps pictures to features (B, channels, ...) of a frozen module and is needed where
    ``config.perceptual`` > 0, ConfigError without it; features are compared by the cosine over channels, so that no
    layer's scale matters.
    """
    distance_B = pixel_distance(recon_B3hw, target_B3hw, config)
    if config.perceptual:
        if perceive is None:
            raise ConfigError("perceptual: is more than 0 but no frozen backbone was loaded")
        ours, theirs = (perceive(x_B3hw.float()).float() for x_B3hw in (recon_B3hw, target_B3hw))
        cosine = F.cosine_similarity(ours, theirs, dim=1)
        distance_B = distance_B + config.perceptual * (1 - cosine.reshape(len(distance_B), -1).mean(1))
    return distance_B
