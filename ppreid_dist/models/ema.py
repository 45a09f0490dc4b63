"""The moving average of a module's weights."""

import copy

import torch
from torch import nn


class Ema:
    """``module`` is a frozen copy in eval mode; :meth:`update` moves it a share ``1 - decay`` towards the original.

    Give the bare module, not the wrapper it trains in. Buffers (BatchNorm's statistics) are copied, not averaged.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        for average, now in zip(self.module.parameters(), module.parameters(), strict=True):
            average.lerp_(now.to(average), 1 - self.decay)
        for copied, latest in zip(self.module.buffers(), module.buffers(), strict=True):
            copied.copy_(latest)
