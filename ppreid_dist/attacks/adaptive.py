"""The adaptive attacker: it goes on from the generator that the extractor was trained against, and knows its settings.

Whoever publishes a training run publishes that too. The control was trained against nobody, so there is no such
attacker on it: what this one finds in protected features counts in the leak, and it has no ratio of its own. Its floor
is the same generator, new, on pairs of strangers: the trained one would bring to them what it knows.

A run that was stored otherwise (``ppreid store``) has the generator of the run that it was made from. Where the stored
features are not those that it was trained on, it is first taught to read them: see :func:`for_stored`.

Shapes: N its own pictures, M features to reverse, D feature dim, S stored dim, Z noise.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from ppreid_dist.attacks.base import register
from ppreid_dist.attacks.linkage import LinkageConfig, learnt_map
from ppreid_dist.attacks.plateau import Learner, Split, Trainee, race
from ppreid_dist.attacks.recogniser import Recogniser
from ppreid_dist.attacks.regression import Decoder, DecoderConfig, as_stored
from ppreid_dist.kernels import kernel_ridge
from ppreid_dist.models.generator import Generator
from ppreid_dist.models.seeding import seeded
from ppreid_dist.settings import option
from ppreid_dist.training.checkpoint import CheckpointFolder, load_tree, load_weights
from ppreid_dist.training.reversal import ReversalConfig

LEARNED = ("gan", "regression")  # adversaries with a generator, the first that a run has
# Stored features whose components are not those of the embedding.
TURNED = ("pca", "rotation", "signs", "codes", "cells")


@dataclass(kw_only=True)
class AdaptiveConfig(DecoderConfig):
    lrs: list[float] = option([1e-4, 1e-3], "learning rates to try", more_than=0)


def trained_generator(run: Path, config: ReversalConfig) -> Generator | None:
    """The generator in the newest checkpoint of a run that was trained by ``config``; None where it has none.

    RunError naming the file that is damaged or holds another generator.
    """
    if (found := _learned(run)) is None:
        return None
    newest, kind, weights = found
    noise_dim = config.generator.noise_dim if kind == "gan" else 0
    dim = weights["seed.weight"].shape[1] - noise_dim
    generator = Generator(dim, config.size, config.generator.width, noise_dim)
    load_weights(generator.load_state_dict, weights, newest)
    return generator


def _learned(run: Path) -> tuple[Path, str, dict[str, Tensor]] | None:
    """The newest checkpoint of a run, the adversary in it that has a generator, and that one's weights."""
    newest = CheckpointFolder(run, keep=1).latest()
    modules = load_tree(newest)["modules"] if newest else {}
    for kind in LEARNED:
        if newest and (weights := modules.get(f"{kind}.generator")) is not None:
            return newest, kind, weights
    return None


def hand_on(run: Path, out: Path) -> None:
    """Leave in ``out`` the newest checkpoint of ``run`` with nothing but its generator, if it has one."""
    if (found := _learned(run)) is not None:
        newest, kind, weights = found
        only = {"identity": {}, "modules": {f"{kind}.generator": weights}}
        CheckpointFolder(out, keep=1).save(int(newest.name.removeprefix("step_")), only)


def for_stored(
    generator: Generator, stored_NS: Tensor, plain_ND: Tensor, pids_N: np.ndarray, *, seed: int
) -> Generator:
    """The generator for features that are stored otherwise than those that it was trained on.

    Before it comes a linear map back, learnt from the attacker's own people: it has the extractor, which gives their
    plain features, and never the key.
    """
    linear = LinkageConfig(widths=[kernel_ridge.LINEAR])
    back = learnt_map(stored_NS, plain_ND, pids_N, linear, seed=seed)
    made = Generator(stored_NS.shape[1], generator.size, generator.width, generator.noise_dim).to(stored_NS.device)
    made.draw_as(generator, *back.affine())
    return made


def renewed(generator: Generator, seed: int, dim: int | None = None) -> Generator:
    """One of the same shape, but for features of ``dim`` if that is given, that has learnt nothing."""
    with seeded(seed, 0xADA):
        return Generator(dim or generator.feature_dim, generator.size, generator.width, generator.noise_dim)


def _begin(generator: Generator, dim: int, seed: int) -> Generator:
    """A copy to train. The floor's, which has learnt nothing, meets the control's features, whose dim may be another;
    the trained one is made for its features by :func:`for_stored`."""
    return copy.deepcopy(generator) if generator.feature_dim == dim else renewed(generator, seed, dim)


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
        recogniser: Recogniser | None = None,
    ):
        self.about, self.noise_dim, self.loss = f"lr {lr:g}", generator.noise_dim, config.loss
        self.prepare = as_stored
        Trainee.__init__(
            self,
            features_ND,
            pictures_N3hw,
            split,
            view="stored",
            lr=lr,
            build=lambda dim: _begin(generator, dim, seed).requires_grad_(True),
            config=config,
            seed=seed,
        )
        self.ask(recogniser, config.likeness)
        self.look()  # if all that it learns is for the worse, it stays as it was


@register
class Adaptive(Learner):
    """Fine-tunes the training's generator to a plateau, by the learning rate that held-out people choose."""

    name = "adaptive"
    config: AdaptiveConfig

    @property
    def asks_recogniser(self) -> bool:
        return self.config.likeness > 0

    def start_from(self, generator: Generator) -> None:
        """Be given the generator, before :meth:`fit`."""
        self.generator = generator

    def learn(
        self, features_ND: Tensor, pictures_N3hw: Tensor, split: Split, *, seed: int, say: Callable[[str], None]
    ) -> Continued:
        own = (features_ND, pictures_N3hw, split)
        enter = partial(
            Continued, *own, generator=self.generator, config=self.config, recogniser=self.recogniser, seed=seed
        )
        entrants = [partial(enter, lr=lr) for lr in self.config.lrs]
        self.decoder = race(entrants, self.config, say)
        return self.decoder

    def reconstruct(self, features_MD: Tensor) -> Tensor:
        return self.decoder.reconstruct(features_MD)
