"""The moving average of a module's weights."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """``module`` is a frozen copy in eval mode; :meth:`update` moves it a share ``1 - decay`` towards the original.

    Give the bare module, not the wrapper it trains in. Buffers (BatchNorm's statistics) are copied, not averaged.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        self._trained = {name for name, _ in self.module.named_parameters()}

    @torch.no_grad()
    def update(self, state: Mapping[str, Tensor]) -> None:
        """``state`` is the original's ``state_dict()``."""
        averages = self.module.state_dict()
        followed = [name for name in averages if name in self._trained]
        now = [state[name].to(averages[name]) for name in followed]
        torch._foreach_lerp_([averages[name] for name in followed], now, 1 - self.decay)
        for name in averages.keys() - self._trained:
            averages[name].copy_(state[name])
