"""The probe: during training, is what the extractor shows its own adversary what a fresh attacker sees?

An extractor that outruns its reversal module drives that module's error up while a fresh attacker reconstructs as
well as before: it only looks private (masking). The probe measures both errors on the same held-out people, none of
whom the extractor or its adversary trained on, and warns when they part. It never changes the game.

Shapes: N the probe's pictures, D feature, H×W extractor input, h×w the reversal's picture.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from ppreid_dist.attacks.base import HELD_OUT_PEOPLE, Attacker, split_people
from ppreid_dist.attacks.config import ALONE
from ppreid_dist.data.stream import Pictures
from ppreid_dist.evaluation.export import stored_features
from ppreid_dist.evaluation.images import scores
from ppreid_dist.settings import Settings, option
from ppreid_dist.training.adversary import View

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ProbeConfig(Settings):
    every: int = option(1000, "extractor steps between probes during the game; 0 = never", at_least=0)
    attackers: list[str] = option(
        ["ridge"], "the fresh attackers; the one with the smallest error counts", choices=ALONE
    )
    margin: float = option(
        0.1, "warn when the apparent error exceeds the fresh one by more than this share", at_least=0
    )
    people: int = option(200, "auxiliary people at the most", at_least=16)


LEAST = 3 * HELD_OUT_PEOPLE  # people: some are held out, and of the others a fresh attacker holds some out


class Probe:
    """Called with the extractor, its adversaries' views and the step; gives the errors and whether they part.

    An error is the mean L1 of the held-out people's pictures, on the person where masks are known.
    """

    def __init__(
        self,
        config: ProbeConfig,
        pictures: Pictures,
        targets_N3hw: Tensor,
        masks_N1hw: Tensor | None,
        *,
        fresh: Callable[[str], Attacker],
        seed: int,
    ):
        self.config, self.fresh, self.seed = config, fresh, seed
        self.unit = "L1 on the person" if masks_N1hw is not None else "L1"
        people = np.unique(pictures.pids_N)  # at least LEAST
        chosen = np.random.default_rng([seed, 41]).permutation(people)[: config.people]
        rows = np.flatnonzero(np.isin(pictures.pids_N, chosen))
        self.images, self.pids = pictures.images_N3HW[rows], pictures.pids_N[rows]
        self.targets, self.masks = targets_N3hw[rows], None if masks_N1hw is None else masks_N1hw[rows]
        self.fit_rows, self.test_rows = split_people(self.pids, seed)

    def __call__(self, extractor: nn.Module, views: list[View], step: int) -> dict[str, float]:
        features_ND = stored_features(extractor, self.images)
        known_ND, unknown_ND = features_ND[self.fit_rows], features_ND[self.test_rows]
        known = self.targets[self.fit_rows], self.pids[self.fit_rows]
        fresh = []
        for name in self.config.attackers:
            attacker = self.fresh(name)
            attacker.fit(known_ND, *known, seed=self.seed)
            fresh.append(self._error(attacker.reconstruct(unknown_ND)))
        for view in views:
            view.meet(known_ND, *known)
        result = {"fresh": min(fresh)}
        if views:
            result["apparent"] = min(self._error(view.reconstruct(unknown_ND)) for view in views)
            result["gap"] = result["apparent"] / result["fresh"] - 1
            result["warned"] = float(result["gap"] > self.config.margin)
            if result["warned"]:
                _log.warning(
                    "step %d: masking: the training's own adversary errs by %.4f, a fresh attacker by %.4f (%s)",
                    step, result["apparent"], result["fresh"], self.unit,
                )  # fmt: skip
        return result

    def _error(self, drawn_N3hw: Tensor) -> float:
        masks = None if self.masks is None else self.masks[self.test_rows]
        return float(np.nanmean(scores(drawn_N3hw, self.targets[self.test_rows], masks)["l1"]))
