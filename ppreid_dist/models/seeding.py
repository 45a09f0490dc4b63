"""Random numbers that depend on a key of integers alone: initial weights, and what a network drops as it trains."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*key: int) -> int:
    """A seed for torch's generators."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Modules built on the CPU within the block draw their initial weights from ``key``, e.g. ``(seed, tag)``.

    The CPU's global random state is as before afterwards; a GPU's is never touched (``torch.manual_seed`` would).
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed_of(*key))
        yield
