"""How much each number of a feature says of who it is, learnt from the pictures of people of one's own.

Some numbers of a stored feature agree in nearly all pictures of a person, others hardly do: bits of codes whose waves
are short, axes that are mostly noise. All distances that an attacker goes by are surer with the former weighing more.
In codes of 16,384 bits and width 0.23 neighbours found by weighed bits match people as those of width 0.27 do without
(docs/LOG.md). It needs no key: his own people tell.

Shapes: N its own pictures, M features, D feature dim.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ppreid_dist.settings import Settings, option

LEAST = 1e-3  # so that features that agree in nothing still have a length


@dataclass(kw_only=True)
class WeighedConfig(Settings):
    agreement: list[float] = option(
        [0.0, 1.0, 2.0],  # of few pictures, or numbers that are all as good, weights are mostly noise
        "powers, to try, of how much a number agrees in pictures of one person, by which it weighs; 0: all alike",
        at_least=0,
    )


def agreement(features_ND: Tensor, pids_N: np.ndarray) -> Tensor:
    """(D,) float32, more than 0: the correlation of a number with itself in another picture of the same person, as a
    mean over people, however many pictures each has; 1 where nobody has two."""
    mean_D, x_ND = features_ND.double().mean(0), features_ND.double()
    deviation_D = (x_ND - mean_D).square().mean(0).sqrt()
    # Of a number that is always the same, only rounding is left.
    x_ND = (x_ND - mean_D) / deviation_D.where(deviation_D > 1e-6 * mean_D.abs(), torch.inf).clamp_min(1e-12)
    people, places = np.unique(pids_N, return_inverse=True)
    place_N = torch.from_numpy(places).to(x_ND.device)
    sums_PD, squares_PD = (
        x_ND.new_zeros(len(people), x_ND.shape[1]).index_add_(0, place_N, of) for of in (x_ND, x_ND.square())
    )
    counts_P = torch.bincount(place_N, minlength=len(people))
    several = counts_P > 1
    if not several.any():
        return torch.ones_like(mean_D, dtype=torch.float32)
    pairs_P1 = (counts_P * (counts_P - 1))[several, None]
    return ((sums_PD.square() - squares_PD)[several] / pairs_P1).mean(0).clamp_min(LEAST).float()


def weighed(features_MD: Tensor, weight_D: Tensor) -> Tensor:
    """(M, D) float32 at unit norm: the cosine of two is that of the features with their numbers weighing so much."""
    return F.normalize(features_MD.float() * weight_D.sqrt(), dim=1)
