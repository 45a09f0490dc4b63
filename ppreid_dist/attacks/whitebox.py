"""White-box inversion: a picture is changed by gradient descent through the extractor until its feature is the stored.

It has what no other attacker here has, the extractor, and so needs hardly any people of its own: they give it where to
start and how smooth a picture should be. A training that fools learners may do nothing against it.

Shapes: N its own pictures, M features to reverse, B batch, D feature dim, h w pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.attacks.base import Attacker, Progress, held_out_error, split_people
from ppreid_dist.attacks.ridge import Ridge, RidgeConfig
from ppreid_dist.errors import ConfigError
from ppreid_dist.pixels import to_float
from ppreid_dist.settings import Settings, option

See = Callable[[Tensor], Tensor]  # float pictures (B,3,h,w) in [0,1] → their stored features (B,D), differentiable
STARTS = ("mean", "ridge", "noise")


@dataclass(kw_only=True)
class WhiteBoxConfig(Settings):
    people: int = option(
        0, "query people, a picture each, who are attacked through the extractor, which is slow", at_least=0
    )
    starts: list[str] = option(
        list(STARTS),
        "where each picture starts; the start that comes nearest to the feature counts: the mean picture of its own "
        "people, that with noise, the ridge attacker's picture",
        choices=STARTS,
    )
    # What little the feature leaves open, smoothness fills in: too little of it ends in noise with the right feature.
    smoothness: list[float] = option([0.3, 1.0, 3.0, 10.0], "weights of the total variation to try", at_least=0)
    trial_people: int = option(8, "people held out of its own on whom smoothness is chosen", at_least=1)
    steps: int = option(300, "steps for a picture", at_least=1)
    lr: float = option(0.02, "Adam's learning rate, in units of the whole range of a pixel", more_than=0)
    batch: int = option(64, "pictures at a time", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.people == 1:
            raise ConfigError("people: an interval needs at least 2, and 0 leaves the attack out")


class Inversion(Attacker):
    """Adam on pixels: squared distance of the features plus total variation, from several starts. It is given the
    extractor too; its figures never stand for those who are not."""

    name = "inversion"
    config: WhiteBoxConfig

    def __init__(self, config: WhiteBoxConfig, ridge: RidgeConfig):
        super().__init__(config)
        self.ridge_config = ridge

    def see(self, extractor: See) -> None:
        """Be given the extractor, before :meth:`fit`."""
        self.extractor = extractor

    def fit(
        self,
        features_ND: Tensor,
        pictures_N3hw: Tensor,
        pids_N: np.ndarray,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> None:
        """Choose the smoothness on people held out, one picture each, then start from what all its people teach."""
        self.seed = seed
        fit, held = split_people(pids_N, seed)
        tried = torch.from_numpy(held[np.unique(pids_N[held], return_index=True)[1]][: self.config.trial_people])
        known = torch.from_numpy(fit)
        self._learn_starts(features_ND[known], pictures_N3hw[known], pids_N[fit])
        errors = {}
        # With as many steps as later: fewer speak for more smoothness than the descent then needs.
        for smoothness in self.config.smoothness:
            drawn_B3hw = self._invert(features_ND[tried], smoothness, self.config.steps)
            errors[smoothness] = held_out_error(drawn_B3hw, pictures_N3hw[tried])
        self.smoothness = min(errors, key=errors.__getitem__)
        self._learn_starts(features_ND, pictures_N3hw, pids_N)
        if progress is not None:
            progress(f"smoothness {self.smoothness:g}: held-out error {errors[self.smoothness]:.4f}")

    def reconstruct(self, features_MD: Tensor) -> Tensor:
        parts = features_MD.split(self.config.batch)
        return torch.cat([self._invert(features_BD, self.smoothness, self.config.steps) for features_BD in parts])

    def _learn_starts(self, features_ND: Tensor, pictures_N3hw: Tensor, pids_N: np.ndarray) -> None:
        self.mean_3hw = to_float(pictures_N3hw).mean(0)
        if "ridge" in self.config.starts:
            self.ridge = Ridge(self.ridge_config)
            self.ridge.fit(features_ND, pictures_N3hw, pids_N, seed=self.seed)

    def _start(self, name: str, features_BD: Tensor) -> Tensor:
        if name == "ridge":
            return self.ridge.reconstruct(features_BD)
        mean_B3hw = self.mean_3hw.expand(len(features_BD), *self.mean_3hw.shape)
        if name == "mean":
            return mean_B3hw.clone()
        random = torch.Generator().manual_seed(self.seed)
        # One noise for all: what is drawn of one feature must not depend on the others of its batch.
        noise_3hw = torch.randn(self.mean_3hw.shape, generator=random).to(self.mean_3hw)
        return (mean_B3hw + 0.2 * noise_3hw).clamp(0, 1)

    def _invert(self, features_BD: Tensor, smoothness: float, steps: int) -> Tensor:
        """The nearest of what all starts lead to."""
        starts = [self._start(name, features_BD) for name in self.config.starts]
        drawn = [self._descend(start_B3hw, features_BD, smoothness, steps) for start_B3hw in starts]
        with torch.no_grad():
            distance_SB = torch.stack([feature_distance(self.extractor(x_B3hw), features_BD) for x_B3hw in drawn])
        return torch.stack(drawn)[distance_SB.argmin(0), torch.arange(len(features_BD), device=features_BD.device)]

    def _descend(self, x_B3hw: Tensor, features_BD: Tensor, smoothness: float, steps: int) -> Tensor:
        x_B3hw = x_B3hw.detach().requires_grad_()
        optimiser = torch.optim.Adam([x_B3hw], self.config.lr)
        for _ in range(steps):
            loss_B = feature_distance(self.extractor(x_B3hw), features_BD) + smoothness * total_variation(x_B3hw)
            optimiser.zero_grad()
            loss_B.sum().backward()  # a sum: each picture's own gradient, however many others there are
            optimiser.step()
            with torch.no_grad():
                x_B3hw.clamp_(0, 1)
        return x_B3hw.detach()


def feature_distance(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """Squared Euclidean distance, (B,)."""
    return (a_BD - b_BD).square().sum(1)


def total_variation(x_B3hw: Tensor) -> Tensor:
    """The mean absolute difference of neighbouring pixels, (B,)."""
    down_B, right_B = (x_B3hw.diff(dim=axis).abs().mean((1, 2, 3)) for axis in (2, 3))
    return down_B + right_B
