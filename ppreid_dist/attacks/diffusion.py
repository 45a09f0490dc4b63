"""Conditional diffusion: pictures drawn out of noise for a feature, and their mean as the reconstruction.

A sample is a sharp guess at what the feature leaves open, so that several of them say more than their mean; which of
them is best only the picture itself could tell. The mean is the attack; the best of the samples is noted beside it.

Shapes: N its own pictures, M features to reverse, B batch, S samples, D feature dim, K view dim, h w pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import cast

import torch
from torch import Tensor

from ppreid_dist.attacks.base import picture_size, register
from ppreid_dist.attacks.plateau import Learner, PlateauConfig, RecipeConfig, Split, Trainee, race
from ppreid_dist.models.denoiser import TIMES, Denoiser, need_diffusers
from ppreid_dist.models.seeding import seeded
from ppreid_dist.pixels import to_float
from ppreid_dist.settings import option
from ppreid_dist.transfer import to_device


@dataclass(kw_only=True)
class DiffusionConfig(RecipeConfig):
    lrs: list[float] = option([5e-4, 2e-3], "learning rates to try", more_than=0)
    trial_steps: int = option(1500, "steps of each combination before the best goes on alone", at_least=0)
    ema: float = option(0.995, "decay of the averaged weights, which are the ones that count", at_least=0, less_than=1)
    plateau: PlateauConfig = option(PlateauConfig(max_steps=40_000, evaluate_every=500), "")
    looks: int = option(8, "noises and times at which each held-out picture is looked at", at_least=1)
    samples: int = option(8, "pictures drawn for a feature", at_least=1)
    sampling_steps: int = option(25, "DDIM steps of each", at_least=1)


class DenoiserTrainee(Trainee):
    """A denoiser in training; its error is the velocity's on people held out, at noises and times that stay."""

    config: DiffusionConfig
    network: Denoiser

    def __init__(
        self,
        features_ND: Tensor,
        pictures_N3hw: Tensor,
        split: Split,
        *,
        view: str,
        width: int,
        lr: float,
        config: DiffusionConfig,
        seed: int,
    ):
        self.about, self.looks_seed = f"{view} features, width {width}, lr {lr:g}", split.seed

        def build(dim: int) -> Denoiser:
            with seeded(seed, width, 0xD1F):
                return Denoiser(dim, picture_size(pictures_N3hw), width)

        super().__init__(features_ND, pictures_N3hw, split, view=view, lr=lr, build=build, config=config, seed=seed)

    @property
    def name(self) -> str:
        return self.about

    @property
    def denoiser(self) -> Denoiser:
        """With the averaged weights."""
        return cast(Denoiser, self.average.module)

    def step(self, x_BK: Tensor, real_B3hw: Tensor) -> None:
        times_B = to_device(torch.randint(TIMES, (len(x_BK),), generator=self.random), x_BK.device)
        self.descend(self.network.error(real_B3hw, x_BK, self.normal(real_B3hw.shape), times_B).mean())

    @torch.no_grad()
    def error(self) -> float:
        random, errors = torch.Generator().manual_seed(self.looks_seed), []
        for look in range(self.config.looks):
            for x_BK, picture_B3hw in zip(self.view(self.held).split(256), self.held_pictures.split(256), strict=True):
                noise_B3hw = torch.randn(picture_B3hw.shape, generator=random).to(x_BK)
                # Each look has its own part of the times, so that few looks see them all.
                times_B = (torch.rand(len(x_BK), generator=random) + look) * TIMES / self.config.looks
                times_B = times_B.long().clamp_max(TIMES - 1).to(x_BK.device)
                errors.append(self.denoiser.error(to_float(picture_B3hw), x_BK, noise_B3hw, times_B))
        return float(torch.cat(errors).mean())


@register
class Diffusion(Learner):
    """A denoiser of the view, width and learning rate that held-out people choose, at its plateau."""

    name = "diffusion"
    config: DiffusionConfig

    def __init__(self, config: DiffusionConfig):
        need_diffusers()
        super().__init__(config)

    def learn(
        self, features_ND: Tensor, pictures_N3hw: Tensor, split: Split, *, seed: int, say: Callable[[str], None]
    ) -> DenoiserTrainee:
        config, own = self.config, (features_ND, pictures_N3hw, split)
        enter = partial(DenoiserTrainee, *own, config=config, seed=seed)
        choices = product(config.views, config.widths, config.lrs)
        entrants = [partial(enter, view=view, width=width, lr=lr) for view, width, lr in choices]
        self.trained = race(entrants, config, say)
        random = torch.Generator().manual_seed(seed)
        # The same noises for all features: what is drawn of one must not depend on the others of its batch.
        self.noises_S3hw = torch.randn((config.samples, *pictures_N3hw.shape[1:]), generator=random).to(features_ND)
        return self.trained

    def guesses(self, features_MD: Tensor) -> Tensor:
        drawn = []
        for x_BK in self.trained.view(features_MD).split(128):
            noises = [noise_3hw.expand(len(x_BK), *noise_3hw.shape) for noise_3hw in self.noises_S3hw]
            steps, denoiser = self.config.sampling_steps, self.trained.denoiser
            drawn.append(torch.stack([denoiser.draw(x_BK, noise_B3hw, steps) for noise_B3hw in noises]))
        return torch.cat(drawn, dim=1)

    def reconstruct(self, features_MD: Tensor) -> Tensor:
        return self.guesses(features_MD).mean(0)
