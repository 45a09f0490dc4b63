"""A ReID model that attackers train on their own people, and ask what it sees in a reconstruction.

A decoder trained on pixels draws the mean of all pictures that a feature may come from: a blur, in which place and
light weigh more than the person. Whoever wants to know who it is asks it, beside the pixels, for a picture in which a
ReID model sees what it sees in the real one. It needs no more than attackers have: pictures of their own people, and
which of them show the same one. On synthetic people a decoder so trained finds a third more (docs/privacy.md).

It is no judge: judges are other models, of other seeds, and know other people too.

Shapes: N its own pictures, B batch, D feature dim, h w pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ppreid_dist.data.augment import AugmentConfig, augment
from ppreid_dist.errors import ConfigError
from ppreid_dist.losses.identity import IdentityConfig, identity_loss
from ppreid_dist.losses.neighbourhood import NeighbourhoodConfig, neighbourhood_loss
from ppreid_dist.losses.triplet import TripletConfig, triplet_loss
from ppreid_dist.models.extractor import Extractor, ExtractorConfig
from ppreid_dist.models.generator import Generator
from ppreid_dist.models.seeding import seed_of, seeded
from ppreid_dist.pixels import to_float
from ppreid_dist.settings import Settings, option
from ppreid_dist.training.optimiser import OptimiserConfig, learning_rate, make_optimiser
from ppreid_dist.transfer import to_device

S = TypeVar("S", bound=Settings)


@dataclass(kw_only=True)
class RecogniserConfig(Settings):
    backbone: str = option(
        "configs/backbones/resnet_tiny", "as model.backbone, of the ReID model that attackers train on their own people"
    )
    pretrained: bool = option(False, "load the backbone's weights instead of drawing them")
    epochs: int = option(10, "passes over the pictures", at_least=1)
    people: int = option(16, "people a step", at_least=2)
    shots: int = option(4, "pictures of each", at_least=2)
    augment: AugmentConfig = option(AugmentConfig(pad=3), "")
    optimiser: OptimiserConfig = option(OptimiserConfig(lr=2e-3, warmup=0.08, decay="cosine"), "")
    neighbourhood: NeighbourhoodConfig = option(NeighbourhoodConfig(weight=2.0), "")


class Recogniser:
    """A finished one: float pictures (B,3,h,w) in [0,1] to unit-norm features (B, D), differentiable.

    ``inverse`` gives, for a width, a generator that draws what it sees, where there is one (``attacks.inverse``).
    """

    def __init__(self, network: Extractor):
        # Trained or read from a file, weights lie alike: sums would be rounded otherwise, and an attack that goes on
        # would end elsewhere.
        self.network = network.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
        self.inverse: Callable[[int], Generator] | None = None

    @property
    def dim(self) -> int:
        return self.network.feature_dim

    def __call__(self, images_B3hw: Tensor) -> Tensor:
        return nn.functional.normalize(self.network(images_B3hw).embedding_BD.float(), dim=1)

    @torch.no_grad()
    def of_pictures(self, images_N3hw: Tensor) -> Tensor:
        """The same of pictures in uint8, (N, D), without gradients."""
        return torch.cat([self(to_float(images_B3hw)) for images_B3hw in images_N3hw.split(256)])


def likeness_loss(seen_BD: Tensor, real_BD: Tensor) -> Tensor:
    """Mean of 1 - cosine between what is seen in reconstructions and in their pictures; a scalar from 0 to 2."""
    return 1 - (seen_BD * real_BD).sum(1).mean()


def by_pixels(config: S) -> S:
    """An attacker's settings, but for what it would ask a recogniser."""
    changes: dict[str, Any] = {"likeness": 0.0} if hasattr(config, "likeness") else {}
    if hasattr(config, "starts"):
        changes["starts"] = ["isomap"]  # anchors are what the recogniser sees
    if isinstance(start := getattr(config, "start", None), Settings):
        changes["start"] = by_pixels(start)
    return replace(config, **changes)


def untrained(config: RecogniserConfig, people: int, seed: int) -> Extractor:
    """The network, with so many classes, on the CPU. ConfigError naming ``attack.recogniser.backbone``."""
    try:
        with seeded(seed, 0x2E1D):
            return Extractor(ExtractorConfig(backbone=config.backbone, pretrained=config.pretrained), people)
    except ConfigError as error:
        raise ConfigError(f"attack.recogniser.{str(error).removeprefix('model.')}") from None


def shape_of(network: Extractor) -> dict[str, Any]:
    """What its backbone's config.json says, but for where that lay and what wrote it."""
    told: Any = network.backbone.model.config
    return {key: value for key, value in told.to_dict().items() if key not in ("_name_or_path", "transformers_version")}


def recogniser_steps(pictures: int, config: RecogniserConfig) -> int:
    """Of a training with so many pictures."""
    return max(1, -(-pictures * config.epochs // (config.people * config.shots)))


def train_recogniser(
    images_N3hw: Tensor,
    pids_N: np.ndarray,
    config: RecogniserConfig,
    *,
    seed: int,
    steps: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Recogniser:
    """Learn to tell ``pids_N`` apart by their pictures (uint8), by the losses of our own extractors, for ``steps`` or
    as many as the configuration says. The same seed gives the same network (on CPU to the bit)."""
    people, labels_N = np.unique(pids_N, return_inverse=True)
    network = untrained(config, len(people), seed).to(images_N3hw.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = list(network.parameters())
    optimiser = make_optimiser(parameters, config.optimiser)
    rows_of = [np.flatnonzero(labels_N == label) for label in range(len(people))]
    draw, smoothed, margin = np.random.default_rng([seed, 0x2E1D]), IdentityConfig(), TripletConfig()
    steps = steps or recogniser_steps(len(pids_N), config)
    network.train()
    here = images_N3hw.device
    with torch.random.fork_rng([here] if here.type == "cuda" else []):
        torch.manual_seed(seed_of(seed, 0x2E1D, 1))  # of what a backbone with stochastic depth drops
        for step in range(steps):
            drawn = draw.choice(len(people), min(config.people, len(people)), replace=False)
            rows_B = np.concatenate([np.resize(draw.permutation(rows_of[one]), config.shots) for one in drawn])
            labels_B = to_device(torch.from_numpy(labels_N[rows_B]), images_N3hw.device)
            x_B3hw, _ = augment(
                images_N3hw[to_device(torch.from_numpy(rows_B), images_N3hw.device)],
                config=config.augment, seed=seed, step=step, first_row=0, total_rows=len(rows_B),
            )  # fmt: skip
            out = network(x_B3hw)
            loss = identity_loss(out.logits_BC, labels_B, smoothed) + triplet_loss(out.pooled_BD, labels_B, margin)
            if config.neighbourhood.weight:
                near = neighbourhood_loss(out.stored_BD, labels_B, config.neighbourhood)
                loss = loss + config.neighbourhood.weight * near
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(config.optimiser, step / steps)
            optimiser.zero_grad()
            loss.backward()
            if config.optimiser.clip:
                nn.utils.clip_grad_norm_(parameters, config.optimiser.clip)
            optimiser.step()
            if progress is not None and step % 20 == 0:
                progress(f"step {step} of {steps}")
    return Recogniser(network)
