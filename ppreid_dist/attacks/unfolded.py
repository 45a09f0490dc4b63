"""The attacker who lays the features out anew: positions that explain how alike they are, averaged, then a decoder.

Codes keep near distances and lose far ones, but how alike two of them are still tells a little of how far they are
apart, and N features have N² pairs. Positions in few dimensions that explain all of these together are found by descent
(metric multidimensional scaling). Neither key nor scheme has to be known: by which law likeness falls with distance, a
mixture of Gaussians, is learnt along with the positions. Then each position is averaged with its nearest, as
``averaged`` does.

Descent stays near where it starts. One start is Isomap's coordinates, by the features alone. The other are anchors:
what the attackers' own ReID model sees of their own people, handed on along near features (``attacks.propagation``). It
matters where codes are narrow: of 16,384 bits of width 0.27 a layout from Isomap explained 0.65 of the numbers behind
them, one from anchors 0.87, one from the truth all (docs/LOG.md).

Shapes: N its own pictures, M features to reverse, L features of the pool, B batch, J Gaussians, D feature dim, K
dimensions of a position.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ppreid_dist.attacks.agreement import WeighedConfig, agreement, weighed
from ppreid_dist.attacks.averaged import ALPHA, ITSELF, Average
from ppreid_dist.attacks.base import register
from ppreid_dist.attacks.isomap import IsomapConfig, Manifold, drawn, some_of
from ppreid_dist.attacks.plateau import Split
from ppreid_dist.attacks.propagation import propagated
from ppreid_dist.attacks.regression import Decoder, Regression, as_stored, decoders
from ppreid_dist.attacks.waves import Waves, WavesConfig, are_bits
from ppreid_dist.errors import ConfigError
from ppreid_dist.settings import option
from ppreid_dist.transfer import to_device

# Features of its own, and entries of the database, that are laid out at most: of more, the others are placed by those
# that lie nearest, which keeps less of them (docs/LOG.md).
LAID_OUT = 50_000
ALL_PAIRS = 10_000  # features at most of which all cosines are computed beforehand, 400 MB
STARTS = ("isomap", "anchors")
NEAREST = 3  # of the pool, for a feature that isn't in it
SCALES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # root mean squares of the first positions' lengths, tried


@dataclass(kw_only=True)
class UnfoldedConfig(WeighedConfig, IsomapConfig):
    starts: list[str] = option(
        ["isomap", "anchors"],
        "where layouts start, to try; anchors need what attack.recogniser sees, and are left out where it is not asked",
        choices=STARTS,
    )
    neighbours: list[int] = option([20], "neighbours of a feature in the graph that the layout starts from", at_least=2)
    coordinates: list[int] = option([16, 32], "numbers of dimensions of a position, to try", at_least=1)
    averaged: list[int] = option(
        [3], "nearest positions that each is averaged with, to try; 0 leaves them as they are", at_least=0
    )
    layout_steps: int = option(800, "steps of the layout, of 512 features each, for every 4,000 of them", at_least=1)
    layout_lr: float = option(0.05, "its learning rate, which falls to nothing", more_than=0)
    waves: WavesConfig = option(WavesConfig(), "")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.starts == ["anchors"] and not self.likeness:
            raise ConfigError("starts: anchors alone need likeness more than 0")


class Layout:
    """Positions of a pool of unit features, and of unit features that are in it or near."""

    def __init__(self, pool_LD: Tensor, start_LK: Tensor, *, steps: int, lr: float, batch: int = 512, seed: int = 0):
        self.pool_LD = pool_LD
        self.places_LK, self.residual, self.rate = _laid_out(pool_LD, start_LK.float(), steps, lr, batch, seed)

    def __call__(self, features_MD: Tensor) -> Tensor:
        """(M, K) float32: the position of the pool's entry that it is, or else the mean of its nearest ones."""
        return torch.cat([self._place(part) for part in features_MD.split(1024)])

    def _place(self, x_BD: Tensor) -> Tensor:
        cosine_BI, nearest_BI = (x_BD @ self.pool_LD.T).topk(min(NEAREST, len(self.pool_LD)))
        places_BIK = self.places_LK[nearest_BI]
        known_B1 = cosine_BI[:, :1] > ITSELF
        return torch.where(known_B1, places_BIK[:, 0], self._among(x_BD, places_BIK.mean(1)))

    def _among(self, x_BD: Tensor, near_BK: Tensor) -> Tensor:
        """Where features lie that aren't in the pool."""
        return near_BK


class Sharpened(Layout):
    """A layout of bits, sharpened by the waves behind them."""

    def __init__(self, layout: Layout, config: WavesConfig, seed: int):
        self.waves = Waves(layout.pool_LD.sign(), layout.places_LK, rate=layout.rate, config=config, seed=seed)
        self.pool_LD, self.places_LK, self.residual = layout.pool_LD, self.waves.places_LK, layout.residual

    def _among(self, x_BD: Tensor, near_BK: Tensor) -> Tensor:
        return self.waves(x_BD.sign(), near_BK)


def _laid_out(
    x_LD: Tensor, start_LK: Tensor, steps: int, lr: float, batch: int, seed: int
) -> tuple[Tensor, float, float]:
    """Positions, the root mean square of what they leave unexplained of the cosines, over the last tenth, and the rate
    of the highest Gaussian."""
    start_LK = start_LK - start_LK.mean(0)
    start_LK = start_LK / start_LK.square().sum(1).mean().sqrt().clamp_min(1e-12)
    # Heights and rates of the Gaussians, by their logarithms, and what is left at any distance.
    law = [torch.tensor(of, device=x_LD.device).log() for of in ([0.8, 0.1, 0.05], [0.5, 4.0, 12.0])]
    law.append(torch.zeros((), device=x_LD.device))
    alike_LL = x_LD @ x_LD.T if len(x_LD) <= ALL_PAIRS else None
    random = torch.Generator().manual_seed(seed)

    def some() -> tuple[Tensor, Tensor]:
        # In order they are read three times as fast.
        rows = torch.randperm(len(x_LD), generator=random)[:batch].sort().values
        rows_B = to_device(rows, x_LD.device)
        if alike_LL is not None:
            return rows_B, alike_LL[rows_B[:, None], rows_B]
        return rows_B, x_LD[rows_B] @ x_LD[rows_B].T

    rows_B, alike_BB = some()
    scale = min(SCALES, key=lambda scale: float(misfit(scale * start_LK[rows_B], alike_BB, *law)[0]))
    places_LK = scale * start_LK
    groups = [{"params": [places_LK], "lr": lr}, {"params": law, "lr": lr / 5}]
    optimiser = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    last: list[Tensor] = []
    for step in range(steps):
        rows_B, alike_BB = some()
        loss, by_places_BK, *by_law = misfit(places_LK[rows_B], alike_BB, *law)
        places_LK.grad = torch.zeros_like(places_LK).index_copy_(0, rows_B, by_places_BK)
        for of, gradient in zip(law, by_law, strict=True):
            of.grad = gradient
        optimiser.step()
        schedule.step()
        if step >= 0.9 * (steps - 1):
            last.append(loss)
    return places_LK, float(torch.stack(last).mean().sqrt()), float(law[1][law[0].argmax()].exp())


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


@register
class UnfoldedRegression(Regression):
    """The regression decoder on averaged positions; their dimensions and neighbours are raced like its other
    choices."""

    name = "unfolded"
    config: UnfoldedConfig

    def entrants(
        self, features_ND: Tensor, pictures_N3hw: Tensor, split: Split, seed: int
    ) -> list[Callable[[], Decoder]]:
        agree_D = agreement(features_ND[torch.from_numpy(split.fit_F)], split.pids_N[split.fit_F])
        weighing = {power: partial(weighed, weight_D=agree_D**power) for power in self.config.agreement}
        return [
            enter
            for power, weigh in weighing.items()
            for enter in self._entrants(weigh, features_ND, pictures_N3hw, split, seed, f"agreement {power:g}, ")
        ]

    def _entrants(
        self,
        weigh: Callable[[Tensor], Tensor],
        features_ND: Tensor,
        pictures_N3hw: Tensor,
        split: Split,
        seed: int,
        label: str,
    ) -> list[Callable[[], Decoder]]:
        config, found = self.config, []
        draw = np.random.default_rng([split.seed, 0x1A7])
        own_ND, leaked_LD = weigh(features_ND), None if self.leaked_LD is None else weigh(self.leaked_LD)
        graph = some_of(own_ND, leaked_LD, config.pictures, config.entries, draw)
        own_A = np.sort(draw.permutation(len(own_ND))[:LAID_OUT])  # they come first in the pool
        pool_LD = own_ND[torch.from_numpy(own_A)]
        if leaked_LD is not None:
            pool_LD = torch.cat([pool_LD, drawn(leaked_LD, LAID_OUT, draw, self.asked)])
        steps = config.layout_steps * max(1, round(len(pool_LD) / 4000))
        for start, neighbours in product(config.starts, config.neighbours):
            if start == "anchors":
                if self.recogniser is None:
                    continue
                start_LK = self._anchored(pool_LD, own_A, pictures_N3hw, split, neighbours)
            else:
                start_LK = Manifold(graph, neighbours, max(config.coordinates))(pool_LD)
            for asked in config.coordinates:
                count = min(asked, start_LK.shape[1])
                layout = Layout(pool_LD, start_LK[:, :count], steps=steps, lr=config.layout_lr, seed=split.seed)
                layouts = {f"residual {layout.residual:.3f}": layout}
                if config.waves.candidates and are_bits(features_ND):
                    sharp = Sharpened(layout, config.waves, split.seed)
                    layouts[f"waves that agree by {sharp.waves.agreement:.3f}"] = sharp
                for (how, laid_out), near in product(layouts.items(), config.averaged):
                    average = Average(F.normalize(laid_out.places_LK, dim=1), near, ALPHA) if near else as_stored
                    prepare = partial(_prepared, weigh, laid_out, average)
                    found += decoders(
                        prepare(features_ND), pictures_N3hw, split,
                        noise_dim=0, config=config, recogniser=self.recogniser, seed=seed, prepare=prepare,
                        label=f"{label}from {start}, {count} dimensions ({how}), {near} neighbours, ",
                    )  # fmt: skip
        return found

    def _anchored(
        self, pool_LD: Tensor, own_A: np.ndarray, pictures_N3hw: Tensor, split: Split, neighbours: int
    ) -> Tensor:
        """(L, K): the main directions of what the recogniser sees in the pictures that are fitted, handed on. Of the
        people held out nothing is told, so that they can choose between starts."""
        assert self.recogniser is not None
        fitted_A = np.isin(own_A, split.fit_F)
        seen_AE = self.recogniser.of_pictures(pictures_N3hw[torch.from_numpy(own_A[fitted_A])])
        seen_AE = seen_AE - seen_AE.mean(0)
        directions_EK = torch.linalg.svd(seen_AE, full_matrices=False)[2][: max(self.config.coordinates)].T
        return propagated(pool_LD, np.flatnonzero(fitted_A), seen_AE @ directions_EK, neighbours)


def _prepared(
    weigh: Callable[[Tensor], Tensor], layout: Layout, average: Callable[[Tensor], Tensor], features_MD: Tensor
) -> Tensor:
    return average(layout(weigh(features_MD)))
