"""What ASHA compares while trainings run: their own objective, at the same number of pictures."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppreid_dist.losses.neighbourhood import NeighbourhoodConfig
from ppreid_dist.training.step import PrivacyConfig
from ppreid_dist.training.tracking import read_metrics

EVERY = 2.0  # seconds between looks at a training's log
UNTIL = 0.75  # of a training: what is nearly done is worth its attack


class Losses:
    """Of one training, which all trials share the objective of (see ``SweepConfig.asha``)."""

    def __init__(self, privacy: PrivacyConfig, neighbourhood: NeighbourhoodConfig, images: int):
        self._weights = {adversary.kind: adversary.weight for adversary in privacy.adversaries}
        self._neighbourhood, self._until = neighbourhood.weight, UNTIL * images
        self._step, self._looked = -1, 0.0

    def new(self, run: Path) -> list[dict[str, float]]:
        """``images`` and ``loss`` of every row of the log since the last look; of none near the training's end."""
        if time.monotonic() - self._looked < EVERY:
            return []
        self._looked = time.monotonic()
        rows = [
            row
            for row in read_metrics(run / "metrics.jsonl")
            if "loss/identity" in row and row["images"] <= self._until
        ]
        found = [{"images": row["images"], "loss": self.loss(row)} for row in rows if row["step"] > self._step]
        self._step = max([self._step, *(row["step"] for row in rows)])
        return found

    def loss(self, row: Mapping[str, Any]) -> float:
        """Identity, triplet, neighbourhood, and λ as it is at this step times the adversaries'."""
        private = sum(weight * row.get(f"loss/{kind}", 0.0) for kind, weight in self._weights.items())
        matching = row["loss/identity"] + row["loss/triplet"]
        matching += self._neighbourhood * row.get("loss/neighbourhood", 0.0)
        return float(matching + row["privacy/strength"] * private)
