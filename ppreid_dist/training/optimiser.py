"""A player's optimiser: its settings, and the learning rate as a function of progress."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ppreid_dist.errors import ConfigError
from ppreid_dist.settings import Settings, option


@dataclass(kw_only=True)
class OptimiserConfig(Settings):
    name: str = option("adam", "optimiser", choices=("adam", "adamw"))
    lr: float = option(3.5e-4, "learning rate after the warm-up", more_than=0)
    beta1: float = option(0.9, "Adam's first decay", at_least=0, at_most=1)
    beta2: float = option(0.999, "Adam's second decay", at_least=0, at_most=1)
    weight_decay: float = option(5e-4, "weight decay", at_least=0)
    warmup: float = option(
        0.0, "share of the training over which lr rises linearly from a hundredth", at_least=0, at_most=1
    )
    decay: str = option("none", "how lr falls afterwards", choices=("none", "steps", "cosine"))
    decay_at: list[float] = option(
        [0.33, 0.58], "shares of the training at which `steps` divides lr by 10", at_least=0, at_most=1
    )
    clip: float = option(10.0, "largest norm of the gradient; 0 = unlimited", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay_at != sorted(self.decay_at):
            raise ConfigError(f"decay_at: {self.decay_at} must ascend")


def make_optimiser(parameters: Sequence[nn.Parameter], config: OptimiserConfig) -> torch.optim.Optimizer:
    """Torch's own Adam or AdamW."""
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(parameters, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)


def learning_rate(config: OptimiserConfig, progress: float) -> float:
    """The learning rate at ``progress`` (0 to 1) through the training: a pure function, so resume needs no state."""
    lr = config.lr
    if progress < config.warmup:
        return lr * (0.01 + 0.99 * progress / config.warmup)
    if config.decay == "steps":
        return lr * 0.1 ** sum(progress >= at for at in config.decay_at)
    if config.decay == "cosine":
        through = (progress - config.warmup) / max(1e-9, 1 - config.warmup)
        return lr * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * through))))
    return lr
