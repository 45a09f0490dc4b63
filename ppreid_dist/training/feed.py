"""Augmented batches by number: the plan says which pictures, the stream reads ahead, the augmentation is seeded.

Shapes: B this rank's rows, H×W the extractor's input.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ppreid_dist import distributed
from ppreid_dist.data.augment import AugmentConfig, augment
from ppreid_dist.data.plan import Plan
from ppreid_dist.data.stream import Batch


@dataclass(frozen=True)
class FeedBatch:
    x_B3HW: Tensor  # what the extractor sees, in [0, 1]
    clean_B3HW: Tensor  # the same before erasing: what a reversal aims at
    labels_B: Tensor  # identities, 0 to C-1
    cameras_B: Tensor
    persons_N: np.ndarray  # the identities of the global batch, on the host


class Feed:
    """``feed[step]`` is the batch of that number; asking for consecutive numbers is fast, any other reopens."""

    def __init__(
        self,
        open_at: Callable[[int], Iterator[Batch]],
        *,
        plan: Plan,
        labels_N: np.ndarray | None,
        augmentation: AugmentConfig,
        seed: int,
    ):
        self._open_at, self._plan, self._labels = open_at, plan, labels_N
        self._augmentation, self._seed = augmentation, seed
        self._stream: Iterator[Batch] | None = None
        self._next = -1
        self.waited = 0.0  # seconds this process stood waiting for pictures

    def __getitem__(self, step: int) -> FeedBatch:
        start = time.perf_counter()
        if self._stream is None or step != self._next:
            self.close()
            self._stream = self._open_at(step)
        batch = next(self._stream)
        self._next = step + 1
        self.waited += time.perf_counter() - start
        x, clean = augment(
            batch.images,
            config=self._augmentation,
            seed=self._seed,
            step=step,
            first_row=distributed.rank_rows(self._plan.total).start,
            total_rows=self._plan.total,
        )
        if self._labels is None:
            persons_N = distributed.gather(batch.labels).cpu().numpy()
        else:  # known beforehand, which spares the device a stop
            persons_N = self._labels[self._plan.batch(step)]
        return FeedBatch(x, clean, batch.labels, batch.camids, persons_N)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._stream is not None and hasattr(self._stream, "close"):
            self._stream.close()
        self._stream = None
