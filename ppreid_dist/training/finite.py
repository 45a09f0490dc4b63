"""Whether gradients are finite, without a wait for the device.

To look at a gradient's norm is to wait until the device has done all that it was asked for, and to let it stand idle
until the host has caught up. So on a GPU an answer is read when the next gradient has been asked for, and has long come
by then. Until it is read the optimisers see to it that nothing is lost: from the first norm on that isn't finite they
leave the weights and moments of every player as they were. (On several GPUs torch's SyncBatchNorm waits all the same.)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class NotFinite(Exception):
    """A gradient of extractor step ``step`` is NaN or infinite; raised on all ranks alike. No weight and no moment of
    any player was changed by it, nor since (BatchNorm's statistics and averages were, where the answer is late).
    ``fed`` is what it came from, this process's rows."""

    def __init__(self, player: str, step: int, fed: Mapping[str, Any]):
        super().__init__(f"the gradient of the {player}")
        self.step, self.fed = step, fed


class FiniteWatch:
    """One for all players of an engine."""

    def __init__(self, device: torch.device, *, late: bool | None = None):
        """``late``: whether answers are read with the next gradient; so they are on a GPU, if nothing is said."""
        self.step = 0  # the extractor's, as the runner says
        self.fed: Mapping[str, Any] = {}  # what the next gradient comes from, as who asks for it says
        self._late = device.type == "cuda" if late is None else late
        self._failed = torch.zeros((), device=device)  # 1 from the first failure on
        self._pending: tuple[NotFinite, Tensor, torch.cuda.Event | None] | None = None

    def see(self, player: str, norm: Tensor, optimisers: Sequence[torch.optim.Optimizer]) -> None:
        """Before these optimisers' step: raise NotFinite, or let them leave all as it is and raise it the next time.

        At once, and waiting for the device, where the answer isn't to be late or one of them can't be left out so.
        """
        self.settle()
        if not self._late or not all(_can_be_told(optimiser) for optimiser in optimisers):
            if not torch.isfinite(norm):
                raise self.failure(player)
            return
        self._failed = torch.maximum(self._failed, (~torch.isfinite(norm)).float())
        for optimiser in optimisers:
            optimiser.found_inf = self._failed  # type: ignore[attr-defined]
        if norm.is_cuda:
            host = torch.empty((), pin_memory=True).copy_(self._failed, non_blocking=True)
            asked = torch.cuda.Event()
            asked.record()
        else:
            host, asked = self._failed.clone(), None
        self._pending = self.failure(player), host, asked

    def settle(self) -> None:
        """Wait for the latest answer; NotFinite. Before anything is kept or told of the players."""
        if self._pending is None:
            return
        failure, host, asked = self._pending
        if asked is not None:
            asked.synchronize()
        if host:
            raise failure
        self._pending = None

    def failure(self, player: str) -> NotFinite:
        """Of the gradient that was asked for last."""
        return NotFinite(player, self.step, self.fed)


def _can_be_told(optimiser: torch.optim.Optimizer) -> bool:
    """Torch's fused forms take a flag ``found_inf`` and, where it is 1, change neither weights nor moments."""
    return isinstance(optimiser, (torch.optim.Adam, torch.optim.AdamW)) and bool(optimiser.defaults["fused"])
