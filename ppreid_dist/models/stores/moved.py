"""Noise and adversarial: the embedding, moved a little.

Shapes: B batch, N fitted rows, D the embedding's dim, S the stored dim (here D).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ppreid_dist.models.generator import Generator
from ppreid_dist.models.seeding import seed_of, seeded
from ppreid_dist.models.stores.base import StoreConfig
from ppreid_dist.models.stores.secret import Secret
from ppreid_dist.pixels import to_float

NOISE_WAVES = 64.0  # of noise, per unit of distance


class _Noisy(Secret):
    def _noise(self, unit_BD: Tensor) -> Tensor:
        """Gaussian, drawn by the key and the embedding itself, so that it does not hang on what else is in the batch.

        Each component is a wave over the embeddings, so short that features a hundredth apart share nothing, and so
        long that another batch's rounding (1e-6) hardly moves it; its height, evenly spread, is made Gaussian.
        """
        phase_BD = unit_BD.detach().double() @ self.secret_AS.double() * NOISE_WAVES
        even_BD = (2 * (phase_BD - phase_BD.floor()) - 1).abs().clamp(1e-6, 1 - 1e-6)
        normal_BD = math.sqrt(2) * torch.erfinv(2 * even_BD - 1)
        return (normal_BD * self.config.strength / unit_BD.shape[1] ** 0.5).to(unit_BD.dtype)


class Noise(_Noisy):
    uses = ("strength", "key")
    keyed = True

    def _kept(self, unit_BD: Tensor) -> Tensor:
        return unit_BD + self._noise(unit_BD)

    def expected(self, embedding_BD: Tensor) -> Tensor:
        return F.normalize(embedding_BD, dim=1)


class Adversarial(_Noisy):
    uses = ("strength", "ascent", "decoder", "key")
    needs_features = True

    def __init__(self, config: StoreConfig, dim: int):
        super().__init__(config, dim)
        with seeded(config.key, 0xADF):
            self.decoder = Generator(dim, config.decoder.size, config.decoder.width, 0).requires_grad_(False)

    def fit(self, plain_ND: Tensor, pictures_N3hw: Tensor | None = None) -> None:
        assert pictures_N3hw is not None
        recipe, decoder = self.config.decoder, self.decoder.requires_grad_(True)
        optimiser = torch.optim.AdamW(decoder.parameters(), recipe.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.steps)
        random = torch.Generator().manual_seed(seed_of(self.config.key))
        with torch.enable_grad():
            for _ in range(recipe.steps):
                rows = torch.randint(len(plain_ND), (recipe.batch,), generator=random)
                drawn_B3hw = decoder(plain_ND[rows])
                optimiser.zero_grad()
                (drawn_B3hw - to_float(pictures_N3hw[rows].to(drawn_B3hw.device))).abs().mean().backward()
                optimiser.step()
                schedule.step()
        decoder.requires_grad_(False)

    def _kept(self, unit_BD: Tensor) -> Tensor:
        return F.normalize(unit_BD + self._away(unit_BD.detach()), dim=1)

    def _away(self, plain_BD: Tensor) -> Tensor:
        """What takes a feature, within the strength, to where the decoder draws something else than from it.

        Ascent by steps of a fixed length along each row's gradient (Madry et al., ICLR 2018).
        """
        drawn_B3hw, strength, steps = self.decoder(plain_BD), self.config.strength, self.config.ascent
        shift_BD = F.normalize(self._noise(plain_BD), dim=1) * strength / steps  # the gradient at the feature is 0
        with torch.enable_grad():
            for _ in range(steps):
                shift_BD = shift_BD.detach().requires_grad_(True)
                error = (self.decoder(plain_BD + shift_BD) - drawn_B3hw).square().flatten(1).mean(1).sum()
                (gradient_BD,) = torch.autograd.grad(error, shift_BD)
                shift_BD = shift_BD.detach() + 2.5 * strength / steps * F.normalize(gradient_BD, dim=1)
                shift_BD = shift_BD * (strength / shift_BD.norm(dim=1, keepdim=True)).clamp_max(1)
        return shift_BD.detach()
