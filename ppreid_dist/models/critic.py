"""The reversal's critic: is this a picture of the kind, and does it go with this feature?

Shapes: B batch, D feature, C channels, h×w the picture's size.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as normalise_spectrum

from ppreid_dist.models.generator import MAX_CHANNELS, doublings
from ppreid_dist.settings import Settings, option


@dataclass(kw_only=True)
class CriticConfig(Settings):
    width: int = option(32, "channels at half the picture's size, twice as many at each further halving", at_least=4)


class Critic(nn.Module):
    """Pictures (B, 3, h, w) in [0, 1] and features (B, D) to scores (B,), higher for real pairs.

    Conditioned by projection (Miyato & Koyama, ICLR 2018). No norm looks at other rows of the batch, and every part
    can be differentiated twice, as the R1 penalty needs. Raises ConfigError for a size that isn't 8×4 doubled.
    """

    def __init__(self, feature_dim: int, size: tuple[int, int], width: int, spectral_norm: bool):
        super().__init__()
        channels = [3] + [min(MAX_CHANNELS, width << level) for level in range(doublings(size))]
        top = channels[-1]
        layers: list[nn.Module] = []
        for inward, outward in pairwise(channels):
            layers += [nn.Conv2d(inward, outward, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(top, top, 3, padding=1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers)
        self.realism = nn.Linear(top, 1)
        self.projection = nn.Linear(feature_dim, top, bias=False)
        if spectral_norm:
            for layer in self.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    normalise_spectrum(layer)

    def forward(self, x_B3hw: Tensor, f_BD: Tensor) -> Tensor:
        h_BC = self.layers(2 * x_B3hw - 1).mean((2, 3))
        match_B = (self.projection(f_BD * math.sqrt(f_BD.shape[1])) * h_BC).sum(1) / math.sqrt(h_BC.shape[1])
        return self.realism(h_BC).squeeze(1) + match_B
