"""The reversal's generator: a stored feature (and noise) to a picture.

Shapes: B batch, D feature, E another generator's feature, Z noise, C channels, h×w the picture's size.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppreid_dist.errors import ConfigError
from ppreid_dist.settings import Settings, option

SEED_SIZE = (8, 4)
MAX_CHANNELS = 512


@dataclass(kw_only=True)
class GeneratorConfig(Settings):
    width: int = option(
        32,
        "channels at half the picture's size; twice as many at each further halving, half as many at full size",
        at_least=4,
    )
    noise_dim: int = option(16, "size of the noise beside the feature; 0 = none", at_least=0)


def doublings(size: tuple[int, int]) -> int:
    """How often 8×4 doubles to ``size`` (height, width), at least once. Raises ConfigError for other sizes."""
    height, width = size
    times = (height // SEED_SIZE[0]).bit_length() - 1
    if times < 1 or (height, width) != (SEED_SIZE[0] << times, SEED_SIZE[1] << times):
        raise ConfigError(f"reversal.size: {height}x{width} is not 8x4 doubled, like 64x32, 128x64 or 256x128")
    return times


class UpBlock(nn.Module):
    """(B, C, h, w) → (B, C', 2h, 2w), residual.

    The first convolution comes before the upsampling, where it costs a quarter.
    """

    def __init__(self, channels: int, out: int):
        super().__init__()
        groups = math.gcd(8, out)
        self.before = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.before_norm = nn.GroupNorm(groups, out)
        self.after = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.after_norm = nn.GroupNorm(groups, out)
        self.shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch = F.interpolate(F.silu(self.before_norm(self.before(x))), scale_factor=2.0)
        return F.interpolate(self.shortcut(x), scale_factor=2.0) + F.silu(self.after_norm(self.after(branch)))


class Generator(nn.Module):
    """Unit-norm features (B, D) and noise (B, Z) to pictures (B, 3, h, w) in [0, 1].

    Its norms are per picture, so a row's picture doesn't depend on the rest of the batch, and a frozen generator
    behaves in the extractor's step as it did in its own. Raises ConfigError for a size that isn't 8×4 doubled.
    """

    def __init__(self, feature_dim: int, size: tuple[int, int], width: int, noise_dim: int):
        super().__init__()
        times = doublings(size)
        channels = [min(MAX_CHANNELS, width << level) for level in reversed(range(times))] + [width // 2]
        self.feature_dim, self.size, self.width, self.noise_dim = feature_dim, size, width, noise_dim
        self.seed = nn.Linear(feature_dim + noise_dim, channels[0] * math.prod(SEED_SIZE))
        self.blocks = nn.Sequential(*[UpBlock(a, b) for a, b in pairwise(channels)])
        self.picture = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, f_BD: Tensor, z_BZ: Tensor | None = None) -> Tensor:
        """``z_BZ`` is standard normal; without it the noise is 0."""
        # A unit vector's components shrink with D; the layers expect a mean square of 1.
        parts = [f_BD * math.sqrt(self.feature_dim)]
        if self.noise_dim:
            parts.append(f_BD.new_zeros(len(f_BD), self.noise_dim) if z_BZ is None else z_BZ)
        seed_BC84 = self.seed(torch.cat(parts, dim=1)).unflatten(1, (-1, *SEED_SIZE))
        return torch.sigmoid(self.picture(self.blocks(seed_BC84)))

    @torch.no_grad()
    def draw_as(self, other: "Generator", matrix_DE: Tensor, origin_E: Tensor) -> None:
        """Draw of features f what ``other``, of the same width and size, draws of f @ matrix + origin. Noise is heard
        as it hears it; where it has none, it takes no effect."""
        dim, its = self.feature_dim, other.feature_dim
        weights = dict(other.state_dict())
        read_CE, noise_CZ = weights["seed.weight"].double().split([its, other.noise_dim], dim=1)
        matrix_DE, origin_E = matrix_DE.double(), origin_E.double()
        # Each scales what it is given by the root of its dimension.
        read_CD = read_CE @ matrix_DE.mT * math.sqrt(its / dim)
        if not other.noise_dim:
            noise_CZ = read_CD.new_zeros(len(read_CD), self.noise_dim)
        weights["seed.weight"] = torch.cat([read_CD, noise_CZ], dim=1)
        weights["seed.bias"] = weights["seed.bias"].double() + math.sqrt(its) * (read_CE @ origin_E)
        self.load_state_dict(weights)
