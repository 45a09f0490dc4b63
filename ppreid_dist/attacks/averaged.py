"""The attacker who averages each feature with those that lie nearest to it, then a regression decoder.

What lies near a stored feature in the stolen database is, more often than not, the same person in another picture. What
sets these apart (place, light, or noise that the gallery adds) averages away, and who it is stays. In retrieval this is
database-side feature augmentation (Arandjelović and Zisserman, CVPR 2012), with the weights of α query expansion
(Radenović, Tolias and Chum, TPAMI 2019). It needs features alone: no key, and no picture.

Shapes: N its own pictures, M features to reverse, L features of the pool, B batch, K neighbours, D feature dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ppreid_dist.attacks.agreement import WeighedConfig, agreement, weighed
from ppreid_dist.attacks.base import VIEWS, register
from ppreid_dist.attacks.plateau import Split
from ppreid_dist.attacks.regression import Decoder, Regression, RegressionConfig, decoders
from ppreid_dist.settings import option

ITSELF = 1 - 1e-5  # the cosine from which on an entry of the pool is the feature itself, or another's copy of it


ALPHA = 3.0  # of α query expansion, as its authors chose it


@dataclass(kw_only=True)
class AveragedConfig(WeighedConfig, RegressionConfig):
    views: list[str] = option(["raw"], "forms of the averaged features to try", choices=VIEWS)
    widths: list[int] = option([32], "network widths to try", at_least=1)
    lrs: list[float] = option([3e-3], "learning rates to try", more_than=0)
    neighbours: list[int] = option([3, 8], "nearest features that each is averaged with, to try", at_least=1)
    alpha: float = option(ALPHA, "a neighbour weighs its cosine to this power, the feature itself 1", at_least=0)


class Average:
    """Unit features averaged with their nearest ``neighbours`` of a pool of unit ones (fewer where it has no more)."""

    def __init__(self, pool_LD: Tensor, neighbours: int, alpha: float):
        self.pool_LD = pool_LD
        self.neighbours, self.alpha = min(neighbours, len(pool_LD) - 1), alpha

    def __call__(self, features_MD: Tensor) -> Tensor:
        """(M, D) float32, of length 1."""
        return torch.cat([self._mean(F.normalize(part.float(), dim=1)) for part in features_MD.split(1024)])

    def _mean(self, x_BD: Tensor) -> Tensor:
        cosine_BL = x_BD @ self.pool_LD.T
        cosine_BK, nearest_BK = cosine_BL.masked_fill_(cosine_BL > ITSELF, -1).topk(self.neighbours)
        weights_BK = cosine_BK.clamp_min(0) ** self.alpha
        return F.normalize(x_BD + torch.einsum("bk,bkd->bd", weights_BK, self.pool_LD[nearest_BK]), dim=1)


@register
class AveragedRegression(Regression):
    """The regression decoder on averaged features; the number of neighbours is raced like its other choices."""

    name = "averaged"
    asks_positions = False
    config: AveragedConfig

    def entrants(
        self, features_ND: Tensor, pictures_N3hw: Tensor, split: Split, seed: int
    ) -> list[Callable[[], Decoder]]:
        config, found = self.config, []
        pool_LD = features_ND if self.leaked_LD is None else torch.cat([features_ND, self.leaked_LD])
        agree_D = agreement(features_ND[torch.from_numpy(split.fit_F)], split.pids_N[split.fit_F])
        for power in config.agreement:
            weigh = partial(weighed, weight_D=agree_D**power)
            unit_LD = weigh(pool_LD)
            for neighbours in config.neighbours:
                prepare = partial(_prepared, weigh, Average(unit_LD, neighbours, config.alpha))
                found += decoders(
                    prepare(features_ND), pictures_N3hw, split,
                    noise_dim=0, config=config, recogniser=self.recogniser, seed=seed,
                    prepare=prepare, label=f"agreement {power:g}, {neighbours} neighbours, ", for_people=True,
                )  # fmt: skip
        return found


def _prepared(weigh: Callable[[Tensor], Tensor], average: Average, features_MD: Tensor) -> Tensor:
    return average(weigh(features_MD))
