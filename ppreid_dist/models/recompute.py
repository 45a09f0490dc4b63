"""Gradient checkpointing: a backbone's blocks forget what is within them, and make it again in the backward.

Less memory for a forward more of time, the same gradient (Chen et al., "Training Deep Nets with Sublinear Memory
Cost", 2016). Unlike ``Extractor.accumulate`` every layer sees the whole batch, so batch norm is no obstacle.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ppreid_dist.errors import ConfigError

# What a backbone of `transformers` repeats, by the name of its class.
_BLOCKS = (
    "ResNetBasicLayer", "ResNetBottleNeckLayer", "MobileNetV2InvertedResidual", "ViTLayer", "Dinov2Layer", "SwinLayer",
)  # fmt: skip


class _Recomputed(nn.Module):
    """Laid over a block's class: parameters, buffers and their names stay."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        work = super().forward
        if not (self.training and torch.is_grad_enabled()):
            return work(*args, **kwargs)
        return checkpoint(work, *args, use_reentrant=False, context_fn=partial(_contexts, self), **kwargs)


def recompute_blocks(backbone: nn.Module) -> int:
    """Let every block of a backbone be made again; how many there are. ConfigError if none is known."""
    blocks = [module for module in backbone.modules() if type(module).__name__ in _BLOCKS]
    if not blocks:
        raise ConfigError("engine.gradient_checkpointing: the backbone has no blocks that are known")
    for block in blocks:
        kind = type(block)
        block.__class__ = type(kind.__name__, (_Recomputed, kind), {})
    return len(blocks)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_kept(block)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Running statistics count a batch once, not again when it is passed a second time."""
    kept = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        yield
    finally:  # torch leaves by an exception, as soon as it has what it wants
        for buffer, before in kept:
            buffer.copy_(before)
