"""PCA, rotation and signs: the embedding along other directions.

Shapes: B batch, N fitted rows, D the embedding's dim, A main directions, S the stored dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ppreid_dist.models.stores.base import Store, StoreConfig, check_directions, signs
from ppreid_dist.models.stores.secret import Secret


class Pca(Store):
    """ConfigError naming ``model.store.dim`` where more directions are asked for than there are."""

    uses = ("dim",)
    needs_features = True
    main_DA: Tensor

    def __init__(self, config: StoreConfig, dim: int):
        super().__init__(config, dim)
        check_directions("dim", self.dim, dim)
        self.register_buffer("main_DA", torch.zeros(dim, self.dim))

    @property
    def reach(self) -> float:
        return 1.0  # the first component is a third of a feature and more, however many there are

    def fit(self, plain_ND: Tensor, pictures_N3hw: Tensor | None = None) -> None:
        self.main_DA.copy_(main_directions(plain_ND)[:, : self.dim])

    def _kept(self, unit_BD: Tensor) -> Tensor:
        return F.normalize(unit_BD @ self.main_DA, dim=1)


class Rotation(Secret):
    uses = ("key",)
    keyed = True

    def _draw(self) -> Tensor:
        # Evenly spread over all rotations and reflections, as Gaussian directions are.
        directions_DD, triangle_DD = torch.linalg.qr(super()._draw())
        return directions_DD * triangle_DD.diagonal().sign()  # which sign a library gives a column is its own affair

    def _kept(self, unit_BD: Tensor) -> Tensor:
        return F.normalize(unit_BD @ self.secret_AS, dim=1)


class Signs(Secret):
    uses = ("dim", "key")
    keyed = True
    one_bit = True

    def _kept(self, unit_BD: Tensor) -> Tensor:
        return signs(unit_BD @ self.secret_AS)


def main_directions(plain_ND: Tensor) -> Tensor:
    """(D, D) float64, a column each, the main one first: of the second moment, since a gallery compares features
    without centring. Each one's largest component is positive: which sign a library gives it is its own affair."""
    moment_DD = plain_ND.double().mT @ plain_ND.double()
    directions_DD = torch.linalg.eigh(moment_DD)[1].flip(1)
    largest_1D = directions_DD.abs().argmax(0, keepdim=True)
    return directions_DD * directions_DD.gather(0, largest_1D).sign()
