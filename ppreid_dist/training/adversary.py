"""What the extractor plays against: one interface for learned and closed-form adversaries.

Shapes: B this rank's rows, N those of all ranks, D feature, h×w the reversal's picture.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from ppreid_dist.settings import Settings, option
from ppreid_dist.training.player import Player

KINDS = ("gan", "regression", "ridge", "distance_correlation")


Metrics = Mapping[str, Tensor | float]  # to be averaged: tensors are left on the device


@dataclass(kw_only=True)
class AdversaryConfig(Settings):
    kind: str = option("gan", "the adversary", choices=KINDS)
    weight: float = option(1.0, "its share of the privacy loss", more_than=0)


@dataclass(frozen=True)
class Exposure:
    """Pictures and what the extractor stores of them, this rank's rows; their people, all ranks' rows."""

    stored_BD: Tensor  # T(E(x)), with gradient
    clean_B3hw: Tensor  # the pictures behind it, before erasing, at the reversal's size
    labels_B: Tensor  # their identities
    cameras_B: Tensor
    persons_N: np.ndarray  # the identities of all ranks' rows, on the host
    strangers: "Exposure | None" = None  # the same of mutually distinct people, for whom no labels are used


class Adversary(ABC):
    """An adversary of the extractor. Learned ones own players and take their turn in :meth:`respond`."""

    kind: ClassVar[str]

    def prepare(self, extractor: Player) -> Metrics:
        """The extractor's warm-up is over: reach a first plateau against it."""
        return {}

    def respond(self, extractor: Player, step: int) -> Metrics:
        """Step A, before extractor step ``step``."""
        return {}

    @abstractmethod
    def loss(self, shown: Exposure, step: int) -> Tensor:
        """Step B: how much is given away, 0 (no more than to a stranger) to about 1; differentiable.

        Under ``privacy.bounded=false``, of those that draw: minus the error in units of the floor, without an end.
        """

    def follow(self, step: int) -> Metrics:
        """The extractor has taken step ``step``."""
        return {}

    @abstractmethod
    def view(self) -> "View | None":
        """What this adversary, as it stands, can do with features; None where it draws no pictures. Asked of every
        process, used by one."""

    @property
    def players(self) -> list[Player]:
        return []

    @property
    def frozen(self) -> dict[str, nn.Module]:
        """Modules that no optimiser touches but the game depends on (snapshots, lagged copies)."""
        return {}

    def counters(self) -> dict[str, Any]:
        return {}

    def restore(self, counters: dict[str, Any]) -> None:
        return None


class View(ABC):
    """Pictures from stored features, as the training-time adversary would draw them: the probe's apparent attacker."""

    def meet(self, features_ND: Tensor, pictures_N3hw: Tensor, pids_N: np.ndarray) -> None:
        """Be shown the people that the fresh attackers learn from. A network is what training made of it; a closed
        form, which training solves anew for every batch, is solved for these."""
        return None

    @abstractmethod
    def reconstruct(self, features_ND: Tensor) -> Tensor:
        """(N, D) unit-norm features to (N, 3, h, w) pictures in [0, 1]."""
