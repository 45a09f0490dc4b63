"""The denoiser: a small UNet of the library diffusers that draws the person behind a feature out of noise.

It predicts the velocity (Salimans and Ho, ICLR 2022) on a cosine schedule that ends in noise alone (Lin et al., WACV
2024): a schedule that doesn't would leave the picture's mean brightness to the noise. Sampling is DDIM (Song et al.,
ICLR 2021), so a picture is a function of feature and noise.

Shapes: B batch, K features' dim, h w pixels.
"""

import importlib.util
import math

import torch
from torch import Tensor, nn

from ppreid_dist.errors import MissingExtra
from ppreid_dist.models.generator import doublings

TIMES = 1000  # of the noising
MAX_LEVELS = 4


def need_diffusers() -> None:
    """MissingExtra where the library isn't installed."""
    if importlib.util.find_spec("diffusers") is None:
        raise MissingExtra("the attacker diffusion", "diffusion")


class Denoiser(nn.Module):
    """Noisy pictures (B, 3, h, w), times (B) and features (B, K) of a mean square norm of 1 to velocities.

    The feature's embedding is added to the time's, so that every block sees it. Norms are per picture. Raises
    ConfigError for a size that isn't 8×4 doubled, MissingExtra without diffusers.
    """

    def __init__(self, feature_dim: int, size: tuple[int, int], width: int):
        super().__init__()
        need_diffusers()
        from diffusers import DDIMScheduler, UNet2DModel

        levels = min(doublings(size) + 1, MAX_LEVELS)
        self.scale = math.sqrt(feature_dim)  # the layers expect a mean square of 1
        self.embed = nn.Sequential(nn.Linear(feature_dim, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.unet = UNet2DModel(
            sample_size=size,
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
            block_out_channels=tuple(min(width << level, 4 * width) for level in range(levels)),
            layers_per_block=1,
            norm_num_groups=math.gcd(8, width),
            class_embed_type="identity",  # what is added to the time's embedding is ours
        )
        self.schedule = DDIMScheduler(
            num_train_timesteps=TIMES,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        )

    def forward(self, noisy_B3hw: Tensor, times_B: Tensor, f_BK: Tensor) -> Tensor:
        velocity_B3hw: Tensor = self.unet(noisy_B3hw, times_B, class_labels=self.embed(f_BK * self.scale)).sample
        return velocity_B3hw

    def error(self, real_B3hw: Tensor, f_BK: Tensor, noise_B3hw: Tensor, times_B: Tensor) -> Tensor:
        """The squared error of the velocity, (B,), for pictures in [0, 1], standard normal noise and times < TIMES."""
        x_B3hw = 2 * real_B3hw - 1
        noisy_B3hw = self.schedule.add_noise(x_B3hw, noise_B3hw, times_B)
        velocity_B3hw = self.schedule.get_velocity(x_B3hw, noise_B3hw, times_B)
        return (self(noisy_B3hw, times_B, f_BK) - velocity_B3hw).square().mean((1, 2, 3))

    @torch.no_grad()
    def draw(self, f_BK: Tensor, noise_B3hw: Tensor, steps: int) -> Tensor:
        """Pictures in [0, 1] by so many steps of DDIM from standard normal noise."""
        self.schedule.set_timesteps(steps)
        x_B3hw = noise_B3hw
        for time in self.schedule.timesteps.tolist():
            times_B = torch.full((len(x_B3hw),), time, device=x_B3hw.device)
            x_B3hw = self.schedule.step(self(x_B3hw, times_B, f_BK), time, x_B3hw).prev_sample
        return ((x_B3hw + 1) / 2).clamp(0, 1)
