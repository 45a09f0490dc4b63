"""Adversaries without a network: they answer every batch at once, so the extractor can't outrun them.

Shapes: B labelled rows of this rank, S strangers of this rank, N rows of all ranks, D feature, M picture values.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ppreid_dist import distributed
from ppreid_dist.kernels import kernel_ridge
from ppreid_dist.losses.distance_correlation import distance_correlation
from ppreid_dist.losses.ridge import RidgeConfig, prepare_targets, ridge_best_response
from ppreid_dist.models.extractor import Extractor
from ppreid_dist.training.adversary import Adversary, Exposure, View


class RidgeAdversary(Adversary):
    """The best response of kernel ridge regression, on the labelled batch and on a batch of strangers.

    Every rank computes it alike on the gathered rows. The strangers count most: repeats of a person in the labelled
    batch make privacy fight utility, mutually distinct people don't.
    """

    kind: ClassVar[str] = "ridge"

    def __init__(self, config: RidgeConfig, *, seed: int):
        self.config, self.seed = config, seed
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def loss(self, shown: Exposure, step: int) -> Tensor:
        loss = shown.stored_BD.new_zeros(())
        if self.config.labelled_weight:
            part = self._play(shown.stored_BD, shown.clean_B3hw, shown.persons_N, step)
            loss = loss + self.config.labelled_weight * part
        if shown.strangers_SD is not None and shown.strangers_S3hw is not None:
            persons = np.arange(len(shown.strangers_SD) * distributed.world_size())
            part = self._play(shown.strangers_SD, shown.strangers_S3hw, persons, step)
            loss = loss + self.config.stranger_weight * part
        return loss

    def _play(self, stored: Tensor, pictures: Tensor, persons_N: np.ndarray, step: int) -> Tensor:
        features_ND = distributed.gather(stored.float())
        targets_NM = distributed.gather(prepare_targets(pictures, self.config))
        result = ridge_best_response(features_ND, targets_NM, persons_N, self.config, seed=self.seed, step=step)
        self._last = (features_ND.detach(), pictures.detach(), result.best)
        return result.loss

    def fit_view(self, extractor: Extractor) -> View | None:
        if self._last is None:
            return None
        features_ND, pictures, best = self._last
        return _RidgeView(features_ND, distributed.gather(pictures), self.config, best)


class _RidgeView(View):
    """The strongest ridge of the last step, fitted on all of that step's rows."""

    def __init__(self, features_ND: Tensor, pictures_N3hw: Tensor, config: RidgeConfig, best: Tensor):
        width, ridge = best.tolist()
        self._size = pictures_N3hw.shape[1:]
        self._model = kernel_ridge.fit(
            features_ND, pictures_N3hw.flatten(1), width=config.widths[width], ridge=config.ridges[ridge]
        )

    @torch.no_grad()
    def reconstruct(self, features_ND: Tensor) -> Tensor:
        return self._model.predict(features_ND).float().reshape(-1, *self._size).clamp(0, 1)


class DistanceCorrelationAdversary(Adversary):
    """NoPeek's objective: no attacker at all, only a dependence that is pressed down. A rival, and a term to add."""

    kind: ClassVar[str] = "distance_correlation"

    def __init__(self, config: RidgeConfig, **_: Any):
        self.config = config

    def loss(self, shown: Exposure, step: int) -> Tensor:
        pictures_NM = distributed.gather(prepare_targets(shown.clean_B3hw, self.config))
        return distance_correlation(distributed.gather(shown.stored_BD.float()), pictures_NM)

    def fit_view(self, extractor: Extractor) -> View | None:
        return None
