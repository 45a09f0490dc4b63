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

    @torch.no_grad()
    def update(self, state: Mapping[str, Tensor]) -> None:
        """``state`` is the original's ``state_dict()``."""
        trained = {name for name, _ in self.module.named_parameters()}
        for name, average in self.module.state_dict().items():
            if name in trained:
                average.lerp_(state[name].to(average), 1 - self.decay)
            else:
                average.copy_(state[name])
