"""What attackers know before they meet a feature: how to draw what their own ReID model sees.

Their decoders begin as a linear map from features to what that model is likely to see (``attack.recogniser``), then
this: a decoder that was trained once, on their own pictures, and serves every attacker and every victim. Begun so, a
decoder finds in two hundred steps what took 1,600 from drawn weights (docs/LOG.md). It brings no more to the
floor than the prior: there, features and pictures belong to different people, and the map says nothing.

Its learning rate falls along a cosine, over passes of the pictures: trained on at a constant rate until held-out people
gained no more, it came to please the attackers' ReID model where another one recognised fewer people (docs/LOG.md).

Shapes: N its own pictures, F those fitted, H those held out, D feature dim, E dim of what the recogniser sees.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ppreid_dist.attacks.plateau import Split
from ppreid_dist.attacks.recogniser import Recogniser
from ppreid_dist.attacks.regression import Decoder, DrawingConfig
from ppreid_dist.models.generator import Generator
from ppreid_dist.settings import option
from ppreid_dist.training.optimiser import OptimiserConfig, learning_rate


@dataclass(kw_only=True)
class InverseConfig(DrawingConfig):
    """How the decoder of what the attackers' ReID model sees is trained."""

    epochs: int = option(20, "passes over the pictures to fit", at_least=1)
    lr: float = option(3e-3, "learning rate, which rises for a fortieth of the training and falls to 0", more_than=0)


def blank(recogniser: Recogniser, size: tuple[int, int], width: int) -> Generator:
    """One of unit-norm features (B, E) that has learnt nothing, on the CPU."""
    return Generator(recogniser.dim, size, width, 0)


def inverse_steps(split: Split, config: InverseConfig) -> int:
    """Of a training on so many pictures."""
    return -(-len(split.fit_F) * config.epochs // config.batch)


def train_inverse(
    recogniser: Recogniser,
    images_N3hw: Tensor,
    split: Split,
    width: int,
    config: InverseConfig,
    *,
    seed: int,
    steps: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Generator:
    """Learn to draw these pictures (uint8) from what the recogniser sees in them, for ``steps`` or as many as the
    configuration says. The same seed gives the same decoder (on CPU to the bit)."""
    seer = Recogniser(recogniser.network)  # without an inverse of its own, which this is to become
    decoder = Decoder(
        seer.of_pictures(images_N3hw), images_N3hw, split,
        view="raw", width=width, lr=config.lr, noise_dim=0, config=config, seed=seed, recogniser=seer,
    )  # fmt: skip
    schedule = OptimiserConfig(lr=config.lr, warmup=0.025, decay="cosine")
    steps = steps or inverse_steps(split, config)
    for step in range(steps):
        decoder.set_lr(learning_rate(schedule, step / steps))
        decoder.train(1)
        if progress is not None and step % 20 == 0:
            progress(f"step {step} of {steps}")
    height, wide = images_N3hw.shape[2:]
    inverse = blank(seer, (height, wide), width).to(images_N3hw.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean_D, matrix_DK = decoder.view.mean_D, decoder.view.matrix_DK
    assert matrix_DK is not None
    inverse.draw_as(decoder.average.module, matrix_DK, -mean_D @ matrix_DK)
    return inverse.eval().requires_grad_(False)
