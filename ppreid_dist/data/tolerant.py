"""Training goes on past a few damaged pictures, if its user wants that; each is named and counted.

B pictures, H height, W width.
"""

import logging
import threading
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ppreid_dist.data.decode import Decoder
from ppreid_dist.data.shards import ShardedSplit
from ppreid_dist.errors import DataError

_log = logging.getLogger(__name__)


class Tolerant:
    """Decodes rows of a split; a damaged picture is named, counted and replaced by the next of the same person.

    DataError where more than ``limit`` are damaged, or all of a person's.
    """

    def __init__(self, split: ShardedSplit, decoder: Decoder, limit: int):
        self._split, self._decoder, self._limit = split, decoder, limit
        self._damaged: set[int] = set()
        self._one_at_a_time = threading.Lock()

    def decode(self, rows: Sequence[int]) -> Tensor:
        """uint8 (B,3,H,W) of these rows."""
        rows = [self._stand_in(row) for row in rows]
        while True:
            try:
                return self._decode(rows)
            except DataError as error:
                if self._limit == 0:
                    raise
                with self._one_at_a_time:  # several feeds share a source, each with a thread of its own
                    for row in set(rows) - self._damaged:
                        self._examine(row)
                if not self._damaged.intersection(rows):  # it isn't any one of them
                    raise error
                rows = [self._stand_in(row) for row in rows]

    def _decode(self, rows: Sequence[int]) -> Tensor:
        keys = [self._split.index.key(row) for row in rows]
        return self._decoder.decode([self._split.image_bytes(row) for row in rows], keys)

    def _examine(self, row: int) -> None:
        try:
            self._decode([row])
        except DataError as error:
            self._damaged.add(row)
            if len(self._damaged) > self._limit:
                raise DataError(
                    f"{error} (damaged pictures: {len(self._damaged)}; data.stream.damaged allows {self._limit})"
                ) from None
            _log.warning(
                "%s; replaced by another of this person (%d of at most %d)", error, len(self._damaged), self._limit
            )

    def _stand_in(self, row: int) -> int:
        if row not in self._damaged:
            return row
        own = np.flatnonzero(self._split.pids == self._split.pids[row]).tolist()
        after = own[own.index(row) + 1 :] + own[: own.index(row)]
        found = next((other for other in after if other not in self._damaged), None)
        if found is None:
            raise DataError(f"{self._split.index.key(row)}: damaged, as are all pictures of this person")
        return int(found)
