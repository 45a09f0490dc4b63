"""The attacker who unrolls the features first: coordinates along their manifold, then a regression decoder.

Stored features that keep near distances and scramble far ones (``model.store.kind: codes``, or an extractor that has
learned to fold) leave a decoder to learn every neighbourhood by itself: with few people it finds little. But matching
lives by near distances, and summed along shortest paths they give the far ones back (Isomap; Tenenbaum, de Silva and
Langford, Science 2000), by the features alone: no key is needed and no picture. So a stolen database's own entries make
the paths denser, and the more there are, the further narrow codes are unrolled. docs/LOG.md has what that uncovers.

Shapes: N its own pictures, M features to reverse, L leaked entries, D feature dim, K coordinates.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.attacks.base import register
from ppreid_dist.attacks.plateau import Split
from ppreid_dist.attacks.regression import Decoder, Regression, RegressionConfig, decoders
from ppreid_dist.settings import option

if TYPE_CHECKING:
    from sklearn.manifold import Isomap


@dataclass(kw_only=True)
class IsomapConfig(RegressionConfig):
    views: list[str] = option(["raw"], "forms of the coordinates to try", choices=("raw", "whitened"))
    widths: list[int] = option([32], "network widths to try", at_least=1)
    lrs: list[float] = option([3e-3], "learning rates to try", more_than=0)
    neighbours: list[int] = option([15, 60], "neighbours of a feature in the graph, to try", at_least=2)
    coordinates: list[int] = option([16, 64], "numbers of coordinates to try", at_least=1)
    pictures: int = option(
        4000, "at most this many of its own features make the graph, the others are put into it", at_least=16
    )
    entries: int = option(4000, "and at most this many entries of the stolen database", at_least=0)


@contextmanager
def _numpy_seeded() -> Iterator[None]:
    """ARPACK's first vector is drawn from NumPy's own generator, and Isomap lets nobody seed it."""
    before = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(before)


def _fitted(features_ND: np.ndarray, neighbours: int, coordinates: int, solver: str = "arpack") -> "Isomap":
    """By ARPACK: for 16 coordinates of 4,000 features LAPACK takes eight times as long."""
    from sklearn.manifold import Isomap

    try:
        return Isomap(n_neighbors=neighbours, n_components=coordinates, eigen_solver=solver).fit(features_ND)
    except RuntimeError:  # ARPACK's, where features are all one
        if solver == "dense":
            raise
        return _fitted(features_ND, neighbours, coordinates, "dense")
    except ValueError:  # paths of few features are no distances in so many dimensions
        if coordinates == 1:
            raise
        return _fitted(features_ND, neighbours, coordinates // 2, solver)


def some_of(
    features_ND: Tensor, leaked_LD: Tensor | None, pictures: int, entries: int, draw: np.random.Generator
) -> Tensor:
    """Its own features, those of the people held out too, since they are no secret to whoever has them, and the stolen
    database's: at most ``pictures`` and ``entries`` of them."""
    own_ND = drawn(features_ND, pictures, draw)
    return own_ND if leaked_LD is None else torch.cat([own_ND, drawn(leaked_LD, entries, draw)])


def drawn(features_MD: Tensor, most: int, draw: np.random.Generator, first: int = 0) -> Tensor:
    """At most so many of them, in a drawn order; where not all have a place, the ``first`` go before the others."""
    order_M = draw.permutation(len(features_MD))
    if len(order_M) > most:
        order_M = order_M[np.argsort(order_M >= first, kind="stable")][:most]
    return features_MD[torch.from_numpy(order_M)]


class Manifold:
    """Isomap coordinates of features, by the graph of those that it was made of.

    Where these are few there are fewer coordinates than are asked for: as many, halved again and again, as have
    positive eigenvalues.
    """

    def __init__(self, features_ND: Tensor, neighbours: int, coordinates: int):
        rows = len(features_ND)
        with warnings.catch_warnings(), _numpy_seeded():
            warnings.simplefilter("ignore")  # a graph in several pieces: it joins them where they are nearest
            self._map = _fitted(features_ND.double().cpu().numpy(), min(neighbours, rows - 1), min(coordinates, rows))

    def __call__(self, features_MD: Tensor) -> Tensor:
        """(M, K) float32, on the features' device."""
        parts = features_MD.split(2048)  # from each there are paths to all of the graph
        places = [self._map.transform(part.double().cpu().numpy()) for part in parts]
        places_MK = np.concatenate(places).astype(np.float32)
        return torch.from_numpy(places_MK).to(features_MD.device)


@register
class UnrolledRegression(Regression):
    """The regression decoder on Isomap coordinates; the graph and their number are raced like its other choices."""

    name = "isomap"
    asks_positions = False
    config: IsomapConfig

    def entrants(
        self, features_ND: Tensor, pictures_N3hw: Tensor, split: Split, seed: int
    ) -> list[Callable[[], Decoder]]:
        config, found = self.config, []
        draw = np.random.default_rng([split.seed, 0x150])
        graph = some_of(features_ND, self.leaked_LD, config.pictures, config.entries, draw)
        for neighbours in config.neighbours:
            manifold = Manifold(graph, neighbours, max(config.coordinates))
            places_NK = manifold(features_ND)
            for asked in config.coordinates:
                count = min(asked, places_NK.shape[1])
                found += decoders(
                    places_NK[:, :count], pictures_N3hw, split,
                    noise_dim=0, config=config, recogniser=self.recogniser, seed=seed,
                    prepare=partial(_first, manifold, count), label=f"{count} coordinates, ",
                )  # fmt: skip
        return found


def _first(manifold: Manifold, count: int, features_MD: Tensor) -> Tensor:
    return manifold(features_MD)[:, :count]
