"""The closed-form attacker: kernel ridge regression from features to principal components of pictures.

Shapes: N its own pictures, M features to reverse, D feature dim, V view dim, P pixel values, C components.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.attacks.base import VIEWS, Attacker, Progress, fit_view, register, split_people
from ppreid_dist.errors import DataError
from ppreid_dist.kernels import kernel_ridge
from ppreid_dist.pixels import to_float
from ppreid_dist.settings import Settings, option


@dataclass(kw_only=True)
class RidgeConfig(Settings):
    # A grid that ends at too narrow a kernel hid up to 0.1 of leak: it reaches the linear kernel at its other end.
    widths: list[float] = option(
        [0.25, 0.5, 1.0, 2.0, 4.0, kernel_ridge.LINEAR],
        "kernel widths to try, in root mean squared distances; 0 is the linear kernel",
        at_least=0,
    )
    # Up to where only the mean picture is left: that is the best reconstruction, and the floor, where nothing leaks.
    ridges: list[float] = option(
        [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0], "ridges to try, per picture", more_than=0
    )
    components: int = option(256, "principal components of the pictures that are predicted", at_least=1)
    search_pictures: int = option(2000, "at most this many pictures choose the capacity", at_least=16)
    pictures: int = option(
        20000, "at most this many are fitted, by a system of as many equations (about 14 GB for 20,000)", at_least=16
    )


@register
class Ridge(Attacker):
    """Chooses view, width and ridge on held-out people, then fits all of its people with them."""

    name = "ridge"
    config: RidgeConfig

    def effort(self, pictures: int) -> float:
        """An eigendecomposition of some pictures for each view and width, and a solution of all."""
        tried = len(VIEWS) * len(self.config.widths)
        return (
            20.0 * tried * min(pictures, self.config.search_pictures) ** 3
            + min(pictures, self.config.pictures) ** 3 / 3
        )

    def fit(
        self,
        features_ND: Tensor,
        pictures_N3hw: Tensor,
        pids_N: np.ndarray,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> None:
        config = self.config
        order = np.random.default_rng([seed, 0x41D6E]).permutation(len(pids_N))
        some = order[: config.search_pictures]
        fit, held = (torch.from_numpy(some[rows]) for rows in split_people(pids_N[some], seed))
        self._learn_components(pictures_N3hw[fit])
        target_FC, target_HC = self._encode(pictures_N3hw[fit]), self._encode(pictures_N3hw[held])
        best, chosen = float("inf"), None
        for name in VIEWS:
            view = fit_view(name, features_ND[fit])
            width, ridge, error = kernel_ridge.choose(
                view(features_ND[fit]), target_FC, view(features_ND[held]), target_HC, config.widths, config.ridges
            )
            if error < best:
                best, chosen = error, (name, width, ridge)
        if chosen is None:
            raise DataError("ridge: no width and ridge draws the people held out; are all pictures the same?")
        name, width, ridge = chosen
        self.view = fit_view(name, features_ND)
        self._learn_components(pictures_N3hw[torch.from_numpy(some)])
        if len(order) > config.pictures:
            most = torch.from_numpy(np.sort(order[: config.pictures]))
            features_ND, pictures_N3hw = features_ND[most], pictures_N3hw[most]
        targets_NC = torch.cat([self._encode(part) for part in pictures_N3hw.split(1024)])
        self.model = kernel_ridge.fit(self.view(features_ND), targets_NC, width=width, ridge=ridge)
        if progress is not None:
            progress(f"{name} features, width {width:g}, ridge {ridge:g}: held-out squared error {best:.4g}")

    def reconstruct(self, features_MD: Tensor) -> Tensor:
        codes_MC = self.model.predict(self.view(features_MD)).float()
        return (codes_MC @ self.axes_PC.T + self.mean_P).clamp(0, 1).unflatten(1, self.shape)

    def _learn_components(self, pictures_N3hw: Tensor) -> None:
        """The pictures' mean and leading principal axes, from the Gram matrix: there are more pixels than pictures."""
        self.shape = pictures_N3hw.shape[1:]
        x_NP = to_float(pictures_N3hw).flatten(1)
        self.mean_P = x_NP.mean(0)
        x_NP = x_NP - self.mean_P
        variances_N, vectors_NN = torch.linalg.eigh(x_NP @ x_NP.T)
        # Below this share the Gram matrix holds rounding alone, and a division by it would make axes of noise.
        kept = int((variances_N[-self.config.components :] > 1e-6 * variances_N[-1]).sum())
        first = len(variances_N) - kept
        self.axes_PC = x_NP.T @ (vectors_NN[:, first:] / variances_N[first:].sqrt())

    def _encode(self, pictures_N3hw: Tensor) -> Tensor:
        return (to_float(pictures_N3hw).flatten(1) - self.mean_P) @ self.axes_PC
