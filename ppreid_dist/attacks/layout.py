"""Positions of features in few dimensions that explain how alike they are, and of bits the waves behind them too.

Shapes: M features to place, L features of the pool, B batch, J Gaussians, D feature dim, K dimensions of a position.
"""

import torch
from torch import Tensor

from ppreid_dist.attacks.averaged import ITSELF, Average
from ppreid_dist.attacks.waves import FlippedWaves, Waves, WavesConfig
from ppreid_dist.transfer import to_device

ALL_PAIRS = 20_000  # features at most of which all cosines are computed beforehand, 800 MB
BATCH = 512
NEAREST = 3  # of the pool, for a feature that isn't in it
SCALES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # root mean squares of the first positions' lengths, tried


class Layout:
    """Positions of a pool of unit features, and of unit features that are in it or near."""

    def __init__(self, pool_LD: Tensor, start_LK: Tensor, *, steps: int, lr: float, smoothed: int = 0, seed: int = 0):
        """Where ``smoothed`` isn't 0, first by cosines of features averaged with so many of their nearest, in which far
        distances stand out from much less noise, then, for a quarter of the steps more, by the features' own."""
        self.pool_LD = pool_LD
        self.places_LK, self.residual, self.rate = _laid_out(pool_LD, start_LK.float(), steps, lr, smoothed, seed)

    def __call__(self, features_MD: Tensor) -> Tensor:
        """(M, K) float32: the position of the pool's entry that it is, or else the mean of its nearest ones."""
        return torch.cat([self._place(part) for part in features_MD.split(1024)])

    def _place(self, x_BD: Tensor) -> Tensor:
        cosine_BI, nearest_BI = (x_BD @ self.pool_LD.T).topk(min(NEAREST, len(self.pool_LD)))
        places_BIK = self.places_LK[nearest_BI]
        placed_BK, others_B = places_BIK[:, 0], cosine_BI[:, 0] <= ITSELF
        if others_B.any():  # to seek a place is slow
            placed_BK = placed_BK.clone()
            placed_BK[others_B] = self._among(x_BD[others_B], places_BIK.mean(1)[others_B])
        return placed_BK

    def _among(self, x_BD: Tensor, near_BK: Tensor) -> Tensor:
        """Where features lie that aren't in the pool."""
        return near_BK


class Sharpened(Layout):
    """A layout of bits, sharpened by the waves behind them."""

    waves: Waves

    def __init__(self, layout: Layout, config: WavesConfig, seed: int):
        self.waves = Waves(layout.pool_LD.sign(), layout.places_LK, rate=layout.rate, config=config, seed=seed)
        self.pool_LD, self.places_LK, self.residual = layout.pool_LD, self.waves.places_LK, layout.residual

    def _among(self, x_BD: Tensor, near_BK: Tensor) -> Tensor:
        return self.waves(x_BD.sign(), near_BK)


class Flipped(Sharpened):
    """Bits laid out by waves alone, which follow from roughly known positions of the pool's ``rows_A``."""

    def __init__(self, pool_LD: Tensor, rows_A: Tensor, places_AK: Tensor, config: WavesConfig, seed: int):
        self.waves = FlippedWaves(pool_LD.sign(), rows_A, places_AK, config=config, seed=seed)
        self.pool_LD, self.places_LK = pool_LD, self.waves.places_LK


class _Likeness:
    """Cosines of a pool's features, of some of them at a time."""

    def __init__(self, x_LD: Tensor):
        self.x_LD = x_LD
        few = len(x_LD) <= ALL_PAIRS
        self.alike_LL = torch.cat([(x_BD @ x_LD.T).half() for x_BD in x_LD.split(1024)]) if few else None

    def some(self, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows (B,) of the pool, and how alike they are (B, B)."""
        # In order they are read three times as fast.
        rows = torch.randperm(len(self.x_LD), generator=random)[:BATCH].sort().values
        rows_B = to_device(rows, self.x_LD.device)
        if self.alike_LL is not None:
            return rows_B, self.alike_LL[rows_B[:, None], rows_B].float()
        return rows_B, self.x_LD[rows_B] @ self.x_LD[rows_B].T


def _laid_out(
    x_LD: Tensor, start_LK: Tensor, steps: int, lr: float, smoothed: int, seed: int
) -> tuple[Tensor, float, float]:
    """Positions, the root mean square of what they leave unexplained of the cosines, over the last tenth, and the rate
    of the highest Gaussian."""
    random = torch.Generator().manual_seed(seed)
    start_LK = start_LK - start_LK.mean(0)
    start_LK = start_LK / start_LK.square().sum(1).mean().sqrt().clamp_min(1e-12)
    likeness = _Likeness(Average(x_LD, smoothed, 1.0)(x_LD) if smoothed else x_LD)
    rows_B, alike_BB = likeness.some(random)
    law = _first_law(x_LD)
    scale = min(SCALES, key=lambda scale: float(misfit(scale * start_LK[rows_B], alike_BB, *law)[0]))
    places_LK = scale * start_LK
    residual = _descend(places_LK, law, likeness, steps, lr, random)
    if smoothed:
        law = _first_law(x_LD)
        residual = _descend(places_LK, law, _Likeness(x_LD), -(-steps // 4), lr, random)
    return places_LK, residual, float(law[1][law[0].argmax()].exp())


def _first_law(x_LD: Tensor) -> list[Tensor]:
    """Heights and rates of the Gaussians, by their logarithms, and what is left at any distance."""
    law = [torch.tensor(of, device=x_LD.device).log() for of in ([0.8, 0.1, 0.05], [0.5, 4.0, 12.0])]
    return [*law, torch.zeros((), device=x_LD.device)]


def _descend(
    places_LK: Tensor, law: list[Tensor], likeness: _Likeness, steps: int, lr: float, random: torch.Generator
) -> float:
    """Changes positions and law; the root mean square of what the last tenth of the steps left unexplained."""
    optimiser = torch.optim.Adam([{"params": [places_LK], "lr": lr}, {"params": law, "lr": lr / 5}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    last: list[Tensor] = []
    for step in range(steps):
        rows_B, alike_BB = likeness.some(random)
        loss, by_places_BK, *by_law = misfit(places_LK[rows_B], alike_BB, *law)
        places_LK.grad = torch.zeros_like(places_LK).index_copy_(0, rows_B, by_places_BK)
        for of, gradient in zip(law, by_law, strict=True):
            of.grad = gradient
        optimiser.step()
        schedule.step()
        if step >= 0.9 * (steps - 1):
            last.append(loss)
    return float(torch.stack(last).mean().sqrt())


def misfit(
    places_BK: Tensor, alike_BB: Tensor, heights_J: Tensor, rates_J: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean square of what positions and law (logarithms of Gaussians' heights and rates, and a constant) leave
    unexplained of how alike two features are, and its gradients by all four. By autograd a layout takes four times
    as long."""
    length_B1 = places_BK.square().sum(1, keepdim=True)
    apart_BB = (length_B1 + length_B1.T - 2 * places_BK @ places_BK.T).clamp_min(0)
    rates_J = rates_J.exp()
    exponents_JBB = heights_J[:, None, None] - rates_J[:, None, None] * apart_BB
    # Of less, exp gives subnormal numbers, which take ten times as long.
    bells_JBB = exponents_JBB.clamp_min_(-80).exp()
    residual_BB = (rest + bells_JBB.sum(0) - alike_BB).fill_diagonal_(0)
    pairs = len(places_BK) * (len(places_BK) - 1)
    by_law_BB = 2 / pairs * residual_BB
    by_bells_JBB = bells_JBB * by_law_BB
    by_apart_BB = -torch.tensordot(rates_J, by_bells_JBB, 1)
    by_places_BK = 4 * (by_apart_BB.sum(1, keepdim=True) * places_BK - by_apart_BB @ places_BK)
    by_heights_J = by_bells_JBB.sum((1, 2))
    by_rates_J = -rates_J * (by_bells_JBB.flatten(1) @ apart_BB.flatten())
    return residual_BB.square().sum() / pairs, by_places_BK, by_heights_J, by_rates_J, by_law_BB.sum()
