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

It also takes long where most pairs say next to nothing. Cosines of features averaged with their nearest have much less
noise: by them a layout of 16,384 entries kept as cells was further in 1,600 steps than without in 6,400; then it goes
on by the features as they are (``smoothed``; docs/LOG.md).

Shapes: N its own pictures, M features to reverse, L features of the pool, D feature dim, K dimensions of a position.
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
from ppreid_dist.attacks.averaged import ALPHA, Average
from ppreid_dist.attacks.base import register
from ppreid_dist.attacks.expected import Expected
from ppreid_dist.attacks.isomap import IsomapConfig, Manifold, drawn, some_of
from ppreid_dist.attacks.layout import Flipped, Layout, Sharpened
from ppreid_dist.attacks.plateau import Split
from ppreid_dist.attacks.propagation import propagated
from ppreid_dist.attacks.recogniser import Recogniser
from ppreid_dist.attacks.regression import Decoder, Regression, as_stored, decoders
from ppreid_dist.attacks.waves import ENOUGH, SOME, WavesConfig, are_bits
from ppreid_dist.errors import ConfigError
from ppreid_dist.settings import option

# Features of its own, and entries of the database, that are laid out at most: of more, the others are placed by those
# that lie nearest, which keeps less of them (docs/LOG.md).
LAID_OUT = 50_000
STARTS = ("isomap", "anchors", "flips")


@dataclass(kw_only=True)
class UnfoldedConfig(WeighedConfig, IsomapConfig):
    starts: list[str] = option(
        ["isomap", "anchors", "flips"],
        "where layouts start, to try; flips are for bits and need no layout; these and anchors need what "
        "attack.recogniser sees, and are left out where it is not asked",
        choices=STARTS,
    )
    neighbours: list[int] = option([20], "neighbours of a feature in the graph that the layout starts from", at_least=2)
    coordinates: list[int] = option([16, 32], "numbers of dimensions of a position, to try", at_least=1)
    averaged: list[int] = option(
        [3], "nearest positions that each is averaged with, to try; 0 leaves them as they are", at_least=0
    )
    smoothed: list[int] = option(
        [0, 24],
        "nearest features that each is averaged with while a layout begins, to try; 0: it goes by the features as they "
        "are from its first step",
        at_least=0,
    )
    layout_steps: int = option(
        800, "steps of the layout, of 512 features each, for every 4,000 of them; smoothed, a quarter more", at_least=1
    )
    layout_lr: float = option(0.05, "its learning rate, which falls to nothing", more_than=0)
    waves: WavesConfig = option(WavesConfig(), "")

    def __post_init__(self) -> None:
        super().__post_init__()
        if "isomap" not in self.starts and not self.likeness:
            raise ConfigError("starts: without isomap they need likeness more than 0")

    @property
    def asks_pictures(self) -> bool:
        """Whether a start needs what the recogniser sees in the attackers' own pictures."""
        return not {"anchors", "flips"}.isdisjoint(self.starts)


@register
class UnfoldedRegression(Regression):
    """The regression decoder on averaged positions; their dimensions and neighbours are raced like its other
    choices."""

    name = "unfolded"
    asks_positions = False
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
        leaked_LD = None if self.leaked_LD is None else weigh(self.leaked_LD)
        graph, pool_LD, own_A = _pool(weigh(features_ND), leaked_LD, config, self.asked, seed)
        bits = bool(config.waves.candidates) and are_bits(features_ND)
        own = None if self.recogniser is None else Own(self.recogniser, pictures_N3hw, split)
        layouts: dict[str, Layout] = {}
        for start, neighbours in product(config.starts, config.neighbours):
            if start == "flips" or (start == "anchors" and own is None):
                continue
            start_LK = _start(start, graph, pool_LD, own_A, own, neighbours, max(config.coordinates))
            for count, smoothed in product(_counts(start_LK, config), config.smoothed):
                layout = laid_out(pool_LD, start_LK[:, :count], smoothed, config, seed)
                where = f"from {start}, {count} dimensions, smoothed by {smoothed}"
                layouts[f"{where} (residual {layout.residual:.3f})"] = layout
                if bits:
                    sharp = Sharpened(layout, config.waves, seed)
                    layouts[f"{where} (waves that agree by {sharp.waves.agreement:.3f})"] = sharp
        for flipped in _flipped(pool_LD, own_A, own, config, seed) if bits else []:
            count, agree = flipped.places_LK.shape[1], flipped.waves.agreement
            layouts[f"by flips, {count} dimensions (waves that agree by {agree:.3f})"] = flipped
        for (how, placed), near in product(layouts.items(), config.averaged):
            average = Average(F.normalize(placed.places_LK, dim=1), near, ALPHA) if near else as_stored
            prepare = partial(_prepared, weigh, placed, average)
            found += decoders(
                prepare(features_ND), pictures_N3hw, split,
                noise_dim=0, config=config, recogniser=self.recogniser, seed=seed, prepare=prepare,
                label=f"{label}{how}, {near} neighbours, ", for_people=True,
            )  # fmt: skip
        return found


@dataclass(frozen=True)
class Own:
    """What attackers know of the pictures behind their own features."""

    recogniser: Recogniser
    pictures_N3hw: Tensor
    split: Split


def _seen(own: Own, own_A: np.ndarray, count: int) -> tuple[np.ndarray, Tensor]:
    """Rows of the pool, and (A, K) the ``count`` main directions of what the recogniser sees in their pictures. Of the
    people held out nothing is told, so that they can choose between starts."""
    fitted_A = np.isin(own_A, own.split.fit_F)
    seen_AE = own.recogniser.of_pictures(own.pictures_N3hw[torch.from_numpy(own_A[fitted_A])])
    seen_AE = seen_AE - seen_AE.mean(0)
    directions_EK = torch.linalg.svd(seen_AE, full_matrices=False)[2][:count].T
    return np.flatnonzero(fitted_A), seen_AE @ directions_EK


def _flipped(pool_LD: Tensor, own_A: np.ndarray, own: Own | None, config: UnfoldedConfig, seed: int) -> list[Flipped]:
    """The pool's bits laid out by flips; nothing where ``config`` doesn't say so, or nobody sees the own pictures."""
    if own is None or "flips" not in config.starts:
        return []
    known_A, seen_AK = _seen(own, own_A, max(config.coordinates))
    rows_A = torch.from_numpy(known_A).to(pool_LD.device)
    return [Flipped(pool_LD, rows_A, seen_AK[:, :count], config.waves, seed) for count in _counts(seen_AK, config)]


def _counts(start_LK: Tensor, config: UnfoldedConfig) -> list[int]:
    return sorted({min(asked, start_LK.shape[1]) for asked in config.coordinates})


def _prepared(
    weigh: Callable[[Tensor], Tensor], layout: Layout, average: Callable[[Tensor], Tensor], features_MD: Tensor
) -> Tensor:
    return average(layout(weigh(features_MD)))


def positions(
    features_ND: Tensor,
    leaked_LD: Tensor | None,
    config: UnfoldedConfig,
    asked: int,
    seed: int,
    own: Own | None = None,
) -> Layout | None:
    """Where the numbers behind bits lie, for whoever reads them one by one: by the waves that agree best, sought from
    layouts and by flips until nothing is left to gain. Where none agree, as behind cells, by the layout that tells most
    of what the recogniser sees in people held out. None where features aren't bits. ``own`` is what is known of the
    attackers' pictures; without it layouts start from Isomap's coordinates only, and the one that explains most
    counts."""
    if not (config.waves.candidates and are_bits(features_ND)):
        return None
    unit_ND, unit_LD = F.normalize(features_ND.float(), dim=1), leaked_LD
    if leaked_LD is not None:
        unit_LD = F.normalize(leaked_LD.float(), dim=1)
    graph, pool_LD, own_A = _pool(unit_ND, unit_LD, config, asked, seed)
    neighbours, found, layouts = config.neighbours[0], list[Sharpened](), list[Layout]()
    for start in ["isomap"] if own is None else sorted(config.starts, key=STARTS.index):
        if start == "flips":
            found += _flipped(pool_LD, own_A, own, config, seed)
            continue
        start_LK = _start(start, graph, pool_LD, own_A, own, neighbours, max(config.coordinates))
        for count, smoothed in product(_counts(start_LK, config), config.smoothed):
            layouts.append(laid_out(pool_LD, start_LK[:, :count], smoothed, config, seed))
            found.append(Sharpened(layouts[-1], config.waves, seed))
            if found[-1].waves.agreement > ENOUGH:
                return found[-1]
    best = max(found, key=lambda sharp: sharp.waves.agreement)
    if not layouts or best.waves.agreement > SOME:
        return best
    return layouts[0] if len(layouts) == 1 else min(layouts, key=partial(_untold, unit_ND, own))


def _untold(unit_ND: Tensor, own: Own | None, layout: Layout) -> float:
    """What a layout leaves open of what the recogniser sees, or where nobody sees, of how alike features are."""
    if own is None:
        return layout.residual
    places_NK = F.normalize(layout(unit_ND), dim=1)
    return Expected(places_NK, own.pictures_N3hw, own.split, own.recogniser).error


def _start(
    start: str, graph: Tensor, pool_LD: Tensor, own_A: np.ndarray, own: Own | None, neighbours: int, count: int
) -> Tensor:
    """(L, K): where a layout starts, in so many dimensions or fewer."""
    if start == "anchors" and own is not None:
        return propagated(pool_LD, *_seen(own, own_A, count), neighbours)
    return Manifold(graph, neighbours, count)(pool_LD)


def _pool(
    own_ND: Tensor, leaked_LD: Tensor | None, config: UnfoldedConfig, asked: int, seed: int
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Unit features that make the graph, those that are laid out, and which of its own they are: they come first."""
    draw = np.random.default_rng([seed, 0x1A7])
    graph = some_of(own_ND, leaked_LD, config.pictures, config.entries, draw)
    own_A = np.sort(draw.permutation(len(own_ND))[:LAID_OUT])
    pool_LD = own_ND[torch.from_numpy(own_A)]
    if leaked_LD is not None:
        pool_LD = torch.cat([pool_LD, drawn(leaked_LD, LAID_OUT, draw, asked)])
    return graph, pool_LD, own_A


def laid_out(pool_LD: Tensor, start_LK: Tensor, smoothed: int, config: UnfoldedConfig, seed: int) -> Layout:
    """As ``config`` says, with steps by the size of the pool."""
    steps = config.layout_steps * max(1, round(len(pool_LD) / 4000))
    return Layout(pool_LD, start_LK, steps=steps, lr=config.layout_lr, smoothed=smoothed, seed=seed)
