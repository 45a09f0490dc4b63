"""What attackers know before they meet a feature: how to draw what their own ReID model sees.

Their decoders begin as a linear map from features to what that model is likely to see (``attack.recogniser``), then
this: a decoder that was trained once, on their own pictures, and serves every attacker and every victim. Begun so, a
decoder finds in two hundred steps what took 1,600 from drawn weights (docs/LOG.md). It brings no more to the
floor than the prior: there, features and pictures belong to different people, and the map says nothing.

Shapes: N its own pictures, F those fitted, H those held out, D feature dim, E dim of what the recogniser sees.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ppreid_dist.attacks.plateau import Split, race
from ppreid_dist.attacks.recogniser import Recogniser
from ppreid_dist.attacks.regression import Decoder, DecoderConfig
from ppreid_dist.models.generator import Generator


@dataclass(kw_only=True)
class InverseConfig(DecoderConfig):
    """How the decoder of what the attackers' ReID model sees is trained."""


def blank(recogniser: Recogniser, size: tuple[int, int], width: int) -> Generator:
    """One of unit-norm features (B, E) that has learnt nothing, on the CPU."""
    return Generator(recogniser.dim, size, width, 0)


def train_inverse(
    recogniser: Recogniser,
    images_N3hw: Tensor,
    split: Split,
    width: int,
    config: InverseConfig,
    *,
    seed: int,
    progress: Callable[[str], None] | None = None,
) -> Generator:
    """Learn to draw these pictures (uint8) from what the recogniser sees in them. The same seed gives the same decoder
    (on CPU to the bit)."""
    seer = Recogniser(recogniser.network)  # without an inverse of its own, which this is to become
    seen_NE = seer.of_pictures(images_N3hw)

    def enter(lr: float) -> Callable[[], Decoder]:
        return lambda: Decoder(
            seen_NE, images_N3hw, split,
            view="raw", width=width, lr=lr, noise_dim=0, config=config, seed=seed, recogniser=seer,
        )  # fmt: skip

    ended = race([enter(lr) for lr in config.lrs], config, progress or (lambda line: None))
    height, wide = images_N3hw.shape[2:]
    inverse = blank(seer, (height, wide), width).to(images_N3hw.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    view = ended.view
    inverse.draw_as(ended.network, view.matrix_DK, -view.mean_D @ view.matrix_DK)
    return inverse.eval().requires_grad_(False)
