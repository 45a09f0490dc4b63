"""The game between generator and critic: non-saturating or hinge losses, and the critic's lazy R1 penalty.

Shapes: B batch, h and w the reversal's picture size. Scores are the critic's raw outputs, higher for real.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ppreid_dist.settings import Settings, option


@dataclass(kw_only=True)
class AdversarialConfig(Settings):
    """The GAN losses and what keeps the critic smooth."""

    kind: str = option("non_saturating", "the pair of losses", choices=("non_saturating", "hinge"))
    weight: float = option(0.1, "weight of the generator's adversarial loss beside its reconstruction", at_least=0.0)
    regulariser: str = option(
        "r1", "what keeps the critic smooth; spectral_norm is built into it", choices=("r1", "spectral_norm", "none")
    )
    r1_gamma: float = option(1.0, "strength of R1", at_least=0.0)
    r1_interval: int = option(
        16, "critic steps from one R1 penalty to the next; the penalty is scaled by it", at_least=1
    )


def critic_loss(real_B: Tensor, fake_B: Tensor, config: AdversarialConfig) -> Tensor:
    """What the critic minimises, a scalar mean over local rows.

    Non-saturating: softplus(-real) + softplus(fake) (Goodfellow et al., NeurIPS 2014).
    Hinge: relu(1 - real) + relu(1 + fake) (Lim and Ye, arXiv 1705.02894).
    """
    real_B, fake_B = real_B.float(), fake_B.float()
    if config.kind == "hinge":
        return F.relu(1 - real_B).mean() + F.relu(1 + fake_B).mean()
    return F.softplus(-real_B).mean() + F.softplus(fake_B).mean()


def generator_loss(fake_B: Tensor, config: AdversarialConfig) -> Tensor:
    """What the generator minimises, a scalar mean of :func:`found_out`."""
    return found_out(fake_B, config).mean()


def found_out(fake_B: Tensor, config: AdversarialConfig) -> Tensor:
    """How surely the critic takes drawn rows for drawn, (B,): ``config.weight`` times softplus(-fake), or times -fake
    under hinge."""
    fake_B = fake_B.float()
    return config.weight * (-fake_B if config.kind == "hinge" else F.softplus(-fake_B))


def r1_due(critic_step: int, config: AdversarialConfig) -> bool:
    """Whether the critic's step of that number (from 0) carries the R1 penalty."""
    return config.regulariser == "r1" and critic_step % config.r1_interval == 0


def r1_penalty(real_B: Tensor, real_B3hw: Tensor, config: AdversarialConfig) -> Tensor:
    """gamma / 2 * interval * mean over rows of |d score / d picture|^2 (Mescheder et al., ICML 2018); a scalar.

    The interval makes up for the steps without it (lazy regularisation, Karras et al., CVPR 2020): add the result as
    it is to :func:`critic_loss`, so that the player still has one backward. ``real_B3hw`` must require grad
    *before* the critic sees it, and a row's score must not depend on other rows.
    """
    (gradient_B3hw,) = torch.autograd.grad(real_B.sum(), real_B3hw, create_graph=True)
    return config.r1_gamma / 2 * config.r1_interval * gradient_B3hw.float().square().sum((1, 2, 3)).mean()
