"""The attacker that shows somebody it knows: the pictures, among its own, whose features are nearest.

Shapes: N its own pictures, M features to reverse, B batch, D feature dim, K neighbours.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.attacks.base import VIEWS, Attacker, Progress, fit_view, held_out_error, register, split_people
from ppreid_dist.pixels import to_float
from ppreid_dist.settings import Settings, option


@dataclass(kw_only=True)
class RetrievalConfig(Settings):
    # Many neighbours at a high temperature are about the mean picture, which the floor must not be worse than.
    neighbours: list[int] = option([1, 4, 16, 64, 512], "numbers of neighbours to try", at_least=1)
    temperatures: list[float] = option(
        [0.1, 0.5, 2.0, 100.0],
        "softmax temperatures to try, in units of the mean squared nearest distance",
        more_than=0,
    )


@register
class Retrieval(Attacker):
    """The softmax-weighted mean of the k nearest pictures; k = 1 shows one real person."""

    name = "retrieval"
    config: RetrievalConfig

    def fit(
        self,
        features_ND: Tensor,
        pictures_N3hw: Tensor,
        pids_N: np.ndarray,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> None:
        fit, held = (torch.from_numpy(rows) for rows in split_people(pids_N, seed))
        best = float("inf")
        for name in VIEWS:
            self.view = fit_view(name, features_ND[fit])
            self._remember(features_ND[fit], pictures_N3hw[fit])
            distances_MK, nearest_MK = self._rank(features_ND[held])
            scale = float(distances_MK[:, 0].mean())
            for k in self.config.neighbours:
                # One neighbour has weight 1 whatever the temperature.
                for temperature in self.config.temperatures[: 1 if k == 1 else None]:
                    images = self._mix(distances_MK[:, :k], nearest_MK[:, :k], temperature * scale)
                    error = held_out_error(images, pictures_N3hw[held])
                    if error < best:
                        best, chosen = error, (name, k, temperature * scale)
        name, self.k, self.temperature = chosen
        self.view = fit_view(name, features_ND)
        self._remember(features_ND, pictures_N3hw)
        if progress is not None:
            progress(
                f"{name} features, {self.k} nearest at temperature {self.temperature:.3g}: held-out error {best:.4f}"
            )

    def reconstruct(self, features_MD: Tensor) -> Tensor:
        distances_MK, nearest_MK = self._rank(features_MD)
        return self._mix(distances_MK[:, : self.k], nearest_MK[:, : self.k], self.temperature)

    def _remember(self, features_ND: Tensor, pictures_N3hw: Tensor) -> None:
        self.pool_NK, self.pictures_N3hw = self.view(features_ND), pictures_N3hw

    def _rank(self, features_MD: Tensor) -> tuple[Tensor, Tensor]:
        k = min(max(self.config.neighbours), len(self.pool_NK))
        ranked = [torch.cdist(x_BK, self.pool_NK).topk(k, largest=False) for x_BK in self.view(features_MD).split(1024)]
        return torch.cat([r.values for r in ranked]).square(), torch.cat([r.indices for r in ranked])

    def _mix(self, distances_MK: Tensor, nearest_MK: Tensor, temperature: float) -> Tensor:
        weights_MK = torch.softmax((distances_MK[:, :1] - distances_MK) / max(temperature, 1e-12), dim=1)
        weights_MN = weights_MK.new_zeros(len(weights_MK), len(self.pool_NK)).scatter_(1, nearest_MK, weights_MK)
        images = weights_MN.new_zeros(len(weights_MN), *self.pictures_N3hw.shape[1:])
        # A dense product in parts of the pool is 10 times faster than gathering each feature's neighbours.
        for weights_MB, part_B3hw in zip(weights_MN.split(1024, 1), self.pictures_N3hw.split(1024), strict=True):
            images += torch.einsum("mb,bchw->mchw", weights_MB, to_float(part_B3hw))
        return images.clamp_(0, 1)
