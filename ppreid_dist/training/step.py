"""Step B of a round: the extractor's turn, the adversaries frozen.

Shapes: B rows of this rank, C identities, D feature.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppreid_dist import distributed
from ppreid_dist.errors import ConfigError
from ppreid_dist.losses.identity import IdentityConfig, identity_loss, split_identity_loss
from ppreid_dist.losses.neighbourhood import NeighbourhoodConfig, neighbourhood_loss
from ppreid_dist.losses.ridge import RidgeConfig
from ppreid_dist.losses.triplet import TripletConfig, triplet_loss
from ppreid_dist.models.extractor import ExtractorOutput
from ppreid_dist.models.split_head import SplitHead
from ppreid_dist.pixels import resize
from ppreid_dist.settings import Settings, option
from ppreid_dist.training.adversary import Adversary, AdversaryConfig, Exposure
from ppreid_dist.training.engine import Engine
from ppreid_dist.training.feed import FeedBatch
from ppreid_dist.training.player import Player
from ppreid_dist.training.trace import part


@dataclass(kw_only=True)
class PrivacyConfig(Settings):
    weight: float = option(1.0, "λ, the weight of the privacy loss; 0 trains the unprotected control", at_least=0)
    ramp: float = option(0.1, "share of the game over which λ rises linearly to its weight", at_least=0, at_most=1)
    every: int = option(
        1, "the game is played in every N-th step, with λ N times as large; the others are plain and cheap", at_least=1
    )
    bounded: bool = option(
        True,
        "count only what is drawn better than from a wrong person's feature; false is an ablation, of adversaries that "
        "draw (not of distance_correlation)",
    )
    adversaries: list[AdversaryConfig] = option(
        [AdversaryConfig()], "whom the extractor plays against, together", may_be_empty=True
    )
    ridge: RidgeConfig = option(RidgeConfig(), "")

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = [adversary.kind for adversary in self.adversaries]
        if len(set(kinds)) < len(kinds):
            raise ConfigError(f"adversaries: each kind once, not {', '.join(kinds)}")
        if self.weight > 0 and not kinds:
            raise ConfigError("adversaries: privacy.weight is more than 0 but there is no adversary")
        if not self.bounded and kinds == ["distance_correlation"]:
            raise ConfigError("bounded: false means nothing to distance_correlation, which draws no pictures")


class ExtractorStep:
    """Identity losses on the labelled rows, plus λ times what the adversaries make of labelled rows and strangers."""

    def __init__(
        self,
        extractor: Player,
        adversaries: Sequence[tuple[Adversary, float]],
        *,
        engine: Engine,
        identity: IdentityConfig,
        triplet: TripletConfig,
        neighbourhood: NeighbourhoodConfig,
        reversal_size: tuple[int, int],
        head: Player | None = None,
    ):
        """``head``: a :class:`SplitHead`, where the extractor has no head of its own."""
        self.extractor, self.adversaries, self.engine = extractor, adversaries, engine
        self.identity, self.triplet, self.neighbourhood = identity, triplet, neighbourhood
        self.reversal_size = reversal_size
        self.beside = [] if head is None else [head]

    def __call__(
        self, labelled: FeedBatch, strangers: FeedBatch | None, *, step: int, strength: float, progress: float
    ) -> dict[str, Tensor]:
        """One optimiser step; ``strength`` is λ now. Returns the loss terms, on the device. Raises NotFinite."""
        rows = len(labelled.x_B3HW)
        # One forward for both: a wrapper may be called once only for each backward.
        x = labelled.x_B3HW if strangers is None else torch.cat([labelled.x_B3HW, strangers.clean_B3HW])
        with self.extractor.active() as forward, self._heads() as heads:
            with self.engine.autocast():
                with part("extractor forward"):
                    out = forward(x)
                terms = {
                    "identity": self._identity(out, rows, labelled.labels_B, heads),
                    "triplet": triplet_loss(out.pooled_BD[:rows], labelled.labels_B, self.triplet),
                }
                loss = terms["identity"] + terms["triplet"]
                if self.neighbourhood.weight:
                    terms["neighbourhood"] = neighbourhood_loss(
                        out.stored_BD[:rows], labelled.labels_B, self.neighbourhood
                    )
                    loss = loss + self.neighbourhood.weight * terms["neighbourhood"]
                if strength > 0:
                    shown = self._expose(out.stored_BD[:rows], labelled)
                    if strangers is not None:
                        shown = replace(shown, strangers=self._expose(out.stored_BD[rows:], strangers))
                    for adversary, weight in self.adversaries:
                        with part(f"{adversary.kind} loss"):
                            terms[adversary.kind] = adversary.loss(shown, step)
                        loss = loss + strength * weight * terms[adversary.kind]
            seen = {name: term.detach() for name, term in terms.items()}
            self.engine.watch.fed = {
                "batch_of": "extractor",
                "terms": seen,
                "batch": labelled.x_B3HW,
                "labels": labelled.labels_B,
                **({} if strangers is None else {"strangers": strangers.clean_B3HW}),
            }
            # Outside of autocast, which would round the gradients of what was kept in fp32, too.
            with part("extractor backward, update"):
                norm = self.extractor.step(loss, progress, beside=self.beside)
        return {f"loss/{name}": term for name, term in seen.items()} | {"extractor/gradient": norm}

    @contextmanager
    def _heads(self) -> Iterator[list[Any]]:
        with ExitStack() as active:
            yield [active.enter_context(player.active()) for player in self.beside]

    def _identity(self, out: ExtractorOutput, rows: int, labels_B: Tensor, heads: Sequence[SplitHead]) -> Tensor:
        if not heads:
            return identity_loss(out.logits_BC[:rows], labels_B, self.identity)
        (head,) = heads
        logits_Nc = head(distributed.gather(out.embedding_BD[:rows]))
        return split_identity_loss(
            logits_Nc, distributed.gather(labels_B), head.rows.start, head.classes, self.identity
        )

    def _expose(self, stored_BD: Tensor, batch: FeedBatch) -> Exposure:
        clean_B3hw = resize(batch.clean_B3HW, self.reversal_size)
        return Exposure(stored_BD, clean_B3hw, batch.labels_B, batch.cameras_B, batch.persons_N)
