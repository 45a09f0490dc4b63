"""Adversaries without a network: they answer every batch at once, so the extractor can't outrun them.

Shapes: B rows of this rank, N rows of all ranks, D feature, M picture values.
"""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ppreid_dist import distributed
from ppreid_dist.kernels import kernel_ridge
from ppreid_dist.losses.distance_correlation import distance_correlation
from ppreid_dist.losses.ridge import (
    RidgeConfig,
    centre_by_camera,
    prepare_targets,
    ridge_best_response,
    seen_as,
    split_groups,
)
from ppreid_dist.pixels import to_float
from ppreid_dist.training.adversary import Adversary, Exposure, View


class RidgeAdversary(Adversary):
    """The best response of kernel ridge regression, on the labelled batch and on a batch of strangers.

    Every rank computes it alike on the gathered rows. The strangers count most: repeats of a person in the labelled
    batch make privacy fight utility, mutually distinct people don't.
    """

    kind: ClassVar[str] = "ridge"

    def __init__(self, config: RidgeConfig, *, seed: int, bounded_loss: bool):
        self.config, self.seed, self.bounded_loss = config, seed, bounded_loss

    def loss(self, shown: Exposure, step: int) -> Tensor:
        loss = shown.stored_BD.new_zeros(())
        if self.config.labelled_weight:
            loss = loss + self.config.labelled_weight * self._play(shown, step)
        if shown.strangers is not None:
            loss = loss + self._play(shown.strangers, step)
        return loss

    def _play(self, shown: Exposure, step: int) -> Tensor:
        features_ND = distributed.gather(shown.stored_BD.float())
        targets_NM = distributed.gather(prepare_targets(shown.clean_B3hw, self.config.target_size))
        if self.config.centre == "camera":
            targets_NM = centre_by_camera(targets_NM, distributed.gather(shown.cameras_B))
        return ridge_best_response(
            features_ND,
            targets_NM,
            shown.persons_N,
            self.config,
            seed=self.seed,
            step=step,
            bounded_loss=self.bounded_loss,
        ).loss

    def view(self) -> View | None:
        return _RidgeView(self.config, self.seed)


class _RidgeView(View):
    """The strongest of the training's own ridges: a narrow family that the extractor may have learned to evade."""

    def __init__(self, config: RidgeConfig, seed: int):
        self._config, self._seed = config, seed

    @torch.no_grad()
    def meet(self, features_ND: Tensor, pictures_N3hw: Tensor, pids_N: np.ndarray) -> None:
        views, widths, ridges = self._config.views, self._config.widths, self._config.ridges
        targets_NM = to_float(pictures_N3hw.flatten(1))
        fit, held = split_groups(pids_N, self._config.fit_fraction, self._seed, 0)
        looks = [seen_as(view, features_ND) for view in views]
        errors_VWR = torch.stack(
            [
                kernel_ridge.search(
                    look(features_ND[fit]), targets_NM[fit], look(features_ND[held]), targets_NM[held], widths, ridges
                )
                for look in looks
            ]
        )
        view, width, ridge = np.unravel_index(int(errors_VWR.argmin()), errors_VWR.shape)
        self._look = looks[view]
        self._model = kernel_ridge.fit(self._look(features_ND), targets_NM, width=widths[width], ridge=ridges[ridge])
        self._shape = pictures_N3hw.shape[1:]

    @torch.no_grad()
    def reconstruct(self, features_ND: Tensor) -> Tensor:
        return self._model.predict(self._look(features_ND)).float().reshape(-1, *self._shape).clamp(0, 1)


class DistanceCorrelationAdversary(Adversary):
    """NoPeek's objective: no attacker at all, only a dependence that is pressed down. A rival, and a term to add."""

    kind: ClassVar[str] = "distance_correlation"

    def __init__(self, target_size: tuple[int, int]):
        self.target_size = target_size

    def loss(self, shown: Exposure, step: int) -> Tensor:
        pictures_NM = distributed.gather(prepare_targets(shown.clean_B3hw, self.target_size))
        return distance_correlation(distributed.gather(shown.stored_BD.float()), pictures_NM)

    def view(self) -> View | None:
        return None
