"""One side of the game: a module, its engine's hold on it, its learning rate. Frozen unless a phase makes it active."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppreid_dist.training.engine import Engine
from ppreid_dist.training.optimiser import OptimiserConfig, learning_rate


class Player:
    """``module`` is the bare network: what to call while the player is frozen. ``held`` is its engine's hold on it.

    Every process must make the same calls: under ZeRO-3 each has a part of the weights only, and the parts meet
    whenever they are used or read. What one process does alone, it does with ``held.alone()``.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        config: OptimiserConfig,
        engine: Engine,
        *,
        twice: bool = False,
        split_rows: int = 0,
    ):
        """``split_rows``: the module has this process's share of so many rows (see ``Engine.hold_split``)."""
        self.name, self.config = name, config
        if split_rows:
            self.held = engine.hold_split(name, module, config, rows=split_rows)
        else:
            self.held = engine.hold(name, module, config, twice=twice)
        self.module: Any = self.held.module
        self._set(False)

    def _set(self, active: bool) -> None:
        for parameter in self.held.parameters:
            parameter.requires_grad_(active)
        self.module.train(active)

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Within the block this player's parameters take gradients; yields what to call, once for each step."""
        self._set(True)
        try:
            yield self.held.forward
        finally:
            self._set(False)

    def renew(self, module: nn.Module) -> None:
        """Take the weights of ``module``, one of the same shape, and forget all that was learnt before."""
        self.held.load_weights(module.state_dict())
        known = self.held.moments()
        zeros = {number: {key: torch.zeros_like(t) for key, t in each.items()} for number, each in known.items()}
        if zeros:
            self.held.load_moments(zeros)

    def step(self, loss: Tensor, progress: float, *, beside: "Sequence[Player]" = ()) -> Tensor:
        """One optimiser step on ``loss``, of the split players ``beside``, too; returns the gradient's norm before
        clipping. Raises NotFinite."""
        others = [player.held for player in beside]
        return self.held.step(loss, learning_rate(self.config, progress), others)
