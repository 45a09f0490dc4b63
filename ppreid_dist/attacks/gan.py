"""The conditional GAN: the regression decoder with noise, driven on by a critic that sees picture and feature.

Shapes: N its own pictures, M features to reverse, B batch, D feature dim, K view dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ppreid_dist.attacks.base import picture_size, register
from ppreid_dist.attacks.plateau import Learner, PlateauConfig, Split, race
from ppreid_dist.attacks.regression import Decoder, RegressionConfig, decoders
from ppreid_dist.losses.adversarial import AdversarialConfig, critic_loss, generator_loss, r1_due, r1_penalty
from ppreid_dist.models.critic import Critic, CriticConfig
from ppreid_dist.models.seeding import seeded
from ppreid_dist.settings import Settings, option


@dataclass(kw_only=True)
class GanConfig(Settings):
    start: RegressionConfig = option(RegressionConfig(widths=[32], lrs=[3e-3]), "the regression that it starts from")
    noise_dim: int = option(16, "size of the noise beside the feature", at_least=1)
    lr: float = option(1e-3, "the decoder's learning rate against the critic", more_than=0)
    critic_lr: float = option(1e-3, "the critic's learning rate", more_than=0)
    critic: CriticConfig = option(CriticConfig(), "")
    adversarial: AdversarialConfig = option(AdversarialConfig(weight=0.02), "")
    plateau: PlateauConfig = option(PlateauConfig(max_steps=6000), "")


class Judgement:
    """The critic in training: an :class:`~ppreid_dist.attacks.regression.Opponent`."""

    def __init__(self, decoder: Decoder, config: GanConfig, seed: int):
        spectral_norm = config.adversarial.regulariser == "spectral_norm"
        with seeded(seed, 0xC):
            critic = Critic(decoder.view.dim, picture_size(decoder.pictures_F3hw), config.critic.width, spectral_norm)
        device = decoder.x_FK.device
        self.critic = critic.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.options, self.steps = config.adversarial, 0
        self.optimiser = torch.optim.Adam(critic.parameters(), config.critic_lr, betas=(0.0, 0.99), fused=True)

    def loss(self, fake_B3hw: Tensor, features_BK: Tensor) -> Tensor:
        self.critic.requires_grad_(False)
        return generator_loss(self.critic(fake_B3hw, features_BK), self.options)

    def learn(self, real_B3hw: Tensor, fake_B3hw: Tensor, features_BK: Tensor) -> None:
        self.critic.requires_grad_(True)
        penalised = r1_due(self.steps, self.options)
        real_B3hw = real_B3hw.detach().requires_grad_(penalised)
        scores = self.critic(torch.cat([real_B3hw, fake_B3hw]), torch.cat([features_BK, features_BK]))
        real_B, fake_B = scores.chunk(2)
        loss = critic_loss(real_B, fake_B, self.options)
        if penalised:
            loss = loss + r1_penalty(real_B, real_B3hw, self.options)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.steps += 1


@register
class Gan(Learner):
    """Regression to a plateau, then L1, SSIM and the critic to the next; the best look at held-out people stays."""

    name = "gan"
    config: GanConfig

    @property
    def asks_recogniser(self) -> bool:
        return self.config.start.likeness > 0

    def learn(
        self, features_ND: Tensor, pictures_N3hw: Tensor, split: Split, *, seed: int, say: Callable[[str], None]
    ) -> Decoder:
        config = self.config
        starts = decoders(
            features_ND, pictures_N3hw, split,
            noise_dim=config.noise_dim, config=config.start, recogniser=self.recogniser, seed=seed,
        )  # fmt: skip
        self.decoder = race(starts, config.start, say)
        self.decoder.set_lr(config.lr)
        self.decoder.begin_looks()  # the best look at what the critic has shaped, not at the regression
        self.decoder.opponent = Judgement(self.decoder, config, seed)
        self.decoder.train_to_plateau(config.plateau, config.plateau.max_steps, say)
        return self.decoder

    def reconstruct(self, features_MD: Tensor) -> Tensor:
        """With the noise at 0, the mean of its prior."""
        return self.decoder.reconstruct(features_MD)
