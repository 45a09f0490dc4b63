"""The adaptive attacker: it goes on from the generator that the extractor was trained against, and knows its settings.

Whoever publishes a training run publishes that too. The control was trained against nobody, so there is no such
attacker on it: what this one finds in protected features counts in the leak, and it has no ratio of its own. Its floor
is the same generator, new, on pairs of strangers: the trained one would bring to them what it knows.

Shapes: N its own pictures, M features to reverse, D feature dim.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from ppreid_dist.attacks.base import register
from ppreid_dist.attacks.plateau import Learner, Split, StepsConfig, Trainee, race
from ppreid_dist.attacks.regression import Decoder
from ppreid_dist.losses.reconstruction import ReconstructionConfig
from ppreid_dist.models.generator import Generator
from ppreid_dist.models.seeding import seeded
from ppreid_dist.settings import option
from ppreid_dist.training.checkpoint import CheckpointFolder, load_tree, load_weights
from ppreid_dist.training.reversal import ReversalConfig

LEARNED = ("gan", "regression")  # adversaries with a generator, the first that a run has


@dataclass(kw_only=True)
class AdaptiveConfig(StepsConfig):
    lrs: list[float] = option([1e-4, 1e-3], "learning rates to try", more_than=0)
    loss: ReconstructionConfig = option(ReconstructionConfig(), "")


def trained_generator(run: Path, config: ReversalConfig) -> Generator | None:
    """The generator in the newest checkpoint of a run that was trained by ``config``; None where it has none.

    RunError naming the file that is damaged or holds another generator.
    """
    newest = CheckpointFolder(run, keep=1).latest()
    if newest is None:
        return None
    modules = load_tree(newest)["modules"]
    for kind in LEARNED:
        if (weights := modules.get(f"{kind}.generator")) is not None:
            noise_dim = config.generator.noise_dim if kind == "gan" else 0
            dim = weights["seed.weight"].shape[1] - noise_dim
            generator = Generator(dim, config.size, config.generator.width, noise_dim)
            load_weights(generator.load_state_dict, weights, newest)
            return generator
    return None


def renewed(generator: Generator, seed: int) -> Generator:
    """One of the same shape that has learnt nothing."""
    with seeded(seed, 0xADA):
        return Generator(generator.feature_dim, generator.size, generator.width, generator.noise_dim)


class Continued(Decoder):
    """A generator that goes on learning from where it was, on features as they are stored."""

    def __init__(
        self,
        features_ND: Tensor,
        pictures_N3hw: Tensor,
        split: Split,
        *,
        generator: Generator,
        lr: float,
        config: AdaptiveConfig,
        seed: int,
    ):
        self.about, self.noise_dim, self.loss = f"lr {lr:g}", generator.noise_dim, config.loss
        Trainee.__init__(
            self,
            features_ND,
            pictures_N3hw,
            split,
            view="stored",
            lr=lr,
            build=lambda dim: copy.deepcopy(generator).requires_grad_(True),
            config=config,
            seed=seed,
        )
        self.look()  # if all that it learns is for the worse, it stays as it was


@register
class Adaptive(Learner):
    """Fine-tunes the training's generator to a plateau, by the learning rate that held-out people choose."""

    name = "adaptive"
    config: AdaptiveConfig

    def start_from(self, generator: Generator) -> None:
        """Be given the generator, before :meth:`fit`."""
        self.generator = generator

    def learn(
        self, features_ND: Tensor, pictures_N3hw: Tensor, split: Split, *, seed: int, say: Callable[[str], None]
    ) -> Continued:
        own = (features_ND, pictures_N3hw, split)
        enter = partial(Continued, *own, generator=self.generator, config=self.config, seed=seed)
        entrants = [partial(enter, lr=lr) for lr in self.config.lrs]
        self.decoder = race(entrants, self.config, say)
        return self.decoder

    def reconstruct(self, features_MD: Tensor) -> Tensor:
        return self.decoder.reconstruct(features_MD)
