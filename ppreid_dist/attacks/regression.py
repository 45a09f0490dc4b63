"""The regression decoder: a convolutional generator without noise, trained until held-out people gain no more.

Shapes: N its own pictures, F those fitted, M features to reverse, B batch, D feature dim, K view dim, Z noise.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.attacks.base import (
    VIEWS,
    Attacker,
    Progress,
    View,
    fit_view,
    held_out_error,
    picture_size,
    register,
    split_people,
    to_float,
)
from ppreid_dist.losses.reconstruction import ReconstructionConfig, reconstruction_loss
from ppreid_dist.models.ema import Ema
from ppreid_dist.models.generator import Generator
from ppreid_dist.models.seeding import seeded
from ppreid_dist.settings import Settings, option


@dataclass(kw_only=True)
class PlateauConfig(Settings):
    """When a training is over: an upper bound, and patience."""

    max_steps: int = option(20_000, "most steps", at_least=1)
    evaluate_every: int = option(200, "steps between looks at the held-out people", at_least=1)
    patience: int = option(4, "looks without a better one before the learning rate falls", at_least=1)
    falls: int = option(2, "how often the learning rate falls, to a quarter, before the training ends", at_least=0)


@dataclass(kw_only=True)
class RegressionConfig(Settings):
    # In trials whitening was better with 160 people, and threw most of the leak away with 40: it has to be tried.
    views: list[str] = option(list(VIEWS), "forms of the features to try", choices=VIEWS)
    widths: list[int] = option([32, 64], "decoder widths to try", at_least=1)
    lrs: list[float] = option([1e-3, 3e-3], "learning rates to try", more_than=0)
    trial_steps: int = option(600, "steps of each combination before the best goes on alone", at_least=1)
    batch: int = option(64, "pictures a step", at_least=2)
    weight_decay: float = option(0.01, "decoupled weight decay", at_least=0)
    feature_noise: float = option(0.3, "noise added to the features, relative to their norm", at_least=0)
    ema: float = option(0.99, "decay of the averaged weights, which are the ones that count", at_least=0, at_most=1)
    loss: ReconstructionConfig = option(ReconstructionConfig(), "")
    plateau: PlateauConfig = option(PlateauConfig(), "")


class Opponent(Protocol):
    """Whoever makes the decoder's task more than regression: a critic."""

    def loss(self, fake_B3hw: Tensor, features_BK: Tensor) -> Tensor:
        """What is added to the decoder's loss."""

    def learn(self, real_B3hw: Tensor, fake_B3hw: Tensor, features_BK: Tensor) -> None:
        """The opponent's own step."""


class Decoder:
    """A generator in training on one view of the features, by one learning rate; its averaged weights count."""

    def __init__(
        self,
        features_ND: Tensor,
        pictures_N3hw: Tensor,
        pids_N: np.ndarray,
        *,
        view: str,
        width: int,
        lr: float,
        noise_dim: int,
        config: RegressionConfig,
        seed: int,
    ):
        fit, held = (torch.from_numpy(rows) for rows in split_people(pids_N, seed))
        self.name, self.config = f"{view} features, width {width}, lr {lr:g}", config
        self.view: View = fit_view(view, features_ND[fit])
        self.x_FK, self.pictures_F3hw = self.view(features_ND[fit]), pictures_N3hw[fit]
        self.held, self.held_pictures = features_ND[held], pictures_N3hw[held]
        with seeded(seed, width):
            generator = Generator(self.view.dim, picture_size(pictures_N3hw), width, noise_dim)
        self.generator = generator.to(features_ND.device)
        self.average = Ema(self.generator, config.ema)
        self.optimiser = torch.optim.AdamW(
            self.generator.parameters(), lr, betas=(0.9, 0.99), weight_decay=config.weight_decay
        )
        self.random = torch.Generator().manual_seed(seed)
        self.best, self.weights = float("inf"), copy.deepcopy(generator.state_dict())

    def train(self, steps: int, opponent: Opponent | None = None) -> None:
        for _ in range(steps):
            x_BK, real_B3hw = self._draw()
            noise_BZ = torch.randn(len(x_BK), self.generator.noise_dim, generator=self.random).to(x_BK)
            fake_B3hw = self.generator(x_BK, noise_BZ)
            loss = reconstruction_loss(fake_B3hw, real_B3hw, self.config.loss)
            if opponent is not None:
                loss = loss + opponent.loss(fake_B3hw, x_BK)
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            self.average.update(self.generator.state_dict())
            if opponent is not None:
                opponent.learn(real_B3hw, fake_B3hw.detach(), x_BK)

    def _draw(self) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.x_FK), (self.config.batch,), generator=self.random)
        x_BK = self.x_FK[rows]
        noise_BK = torch.randn(x_BK.shape, generator=self.random).to(x_BK) / x_BK.shape[1] ** 0.5
        return x_BK + self.config.feature_noise * noise_BK, to_float(self.pictures_F3hw[rows])

    def error(self) -> float:
        """On the held-out people."""
        return held_out_error(self.reconstruct(self.held), self.held_pictures)

    @torch.no_grad()
    def reconstruct(self, features_MD: Tensor) -> Tensor:
        return torch.cat([self.average.module(x_BK) for x_BK in self.view(features_MD).split(256)])

    def set_lr(self, lr: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = lr

    def go_on_from(self, weights: dict[str, Tensor]) -> None:
        """Put these weights in place of the present ones and of their average."""
        self.generator.load_state_dict(weights)
        self.average.module.load_state_dict(weights)

    def look(self) -> bool:
        """Test on the held-out people, and keep the weights if they are the best so far."""
        error = self.error()
        if better := error < self.best:
            self.best, self.weights = error, copy.deepcopy(self.average.module.state_dict())
        return better

    def train_to_plateau(
        self, plateau: PlateauConfig, max_steps: int, say: Callable[[str], None], opponent: Opponent | None = None
    ) -> None:
        """Train until looks find nothing better; end with the best weights, those from before included."""
        lr, falls, since, steps = self.optimiser.param_groups[0]["lr"], 0, 0, 0
        while steps < max_steps and falls <= plateau.falls:
            some = min(plateau.evaluate_every, max_steps - steps)
            self.train(some, opponent)
            steps += some
            since = 0 if self.look() else since + 1
            if since == plateau.patience:
                falls, since = falls + 1, 0
                self.go_on_from(self.weights)
                self.set_lr(lr / 4**falls)
        self.go_on_from(self.weights)
        self.set_lr(lr)
        say(f"{self.name}: {steps} steps, held-out error {self.best:.4f}")


def race(
    features_ND: Tensor,
    pictures_N3hw: Tensor,
    pids_N: np.ndarray,
    *,
    noise_dim: int,
    config: RegressionConfig,
    seed: int,
    say: Callable[[str], None],
) -> Decoder:
    """A short trial of every view, width and learning rate; the best goes on to its plateau."""
    decoders: list[Decoder] = []
    choices = list(product(config.views, config.widths, config.lrs))
    for view, width, lr in choices:
        decoder = Decoder(
            features_ND,
            pictures_N3hw,
            pids_N,
            view=view,
            width=width,
            lr=lr,
            noise_dim=noise_dim,
            config=config,
            seed=seed,
        )
        if len(choices) > 1:
            decoder.train_to_plateau(config.plateau, config.trial_steps, say)
        decoders = [min([decoder, *decoders], key=lambda d: d.best)]  # the others' memory is given back
    decoders[0].train_to_plateau(config.plateau, config.plateau.max_steps, say)
    return decoders[0]


@register
class Regression(Attacker):
    """The decoder alone."""

    name = "regression"
    config: RegressionConfig

    def fit(
        self,
        features_ND: Tensor,
        pictures_N3hw: Tensor,
        pids_N: np.ndarray,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> None:
        say = progress or (lambda line: None)
        self.decoder = race(features_ND, pictures_N3hw, pids_N, noise_dim=0, config=self.config, seed=seed, say=say)

    def reconstruct(self, features_MD: Tensor) -> Tensor:
        return self.decoder.reconstruct(features_MD)
