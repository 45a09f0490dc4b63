"""One side of the game: a module, its wrapper, its optimiser. Frozen unless a phase makes it active."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppreid_dist.errors import ConfigError
from ppreid_dist.settings import Settings, option
from ppreid_dist.training.engine import Engine


class NotFinite(Exception):
    """A gradient is NaN or infinite; raised on all ranks alike, before the optimiser's step."""


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


class Player:
    """``module`` is the bare network, ``forward`` the wrapper to call while active."""

    def __init__(self, name: str, module: nn.Module, config: OptimiserConfig, engine: Engine):
        self.name, self.config, self.engine = name, config, engine
        self.module: Any = engine.place(module)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.forward = engine.wrap(self.module)
        kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
        self.optimiser = kind(
            self.parameters, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
        )
        self._set(False)

    def _set(self, active: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(active)
        self.module.train(active)

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Within the block this player's parameters take gradients; yields what to call."""
        self._set(True)
        try:
            yield self.forward
        finally:
            self._set(False)

    def step(self, loss: Tensor, progress: float) -> Tensor:
        """One optimiser step on ``loss``; returns the gradient's norm before clipping. Raises NotFinite."""
        self.optimiser.zero_grad(set_to_none=True)
        self.engine.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip or float("inf"))
        # The reduced gradient is the same on every rank, so all of them stop here together.
        if not torch.isfinite(norm):
            raise NotFinite(f"the gradient of the {self.name}")
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.config, progress)
        self.optimiser.step()
        return norm
