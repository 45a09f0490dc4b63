"""Which pictures make up the batch of a step: pure functions of the seed and the step.

The plan knows nothing of processes: it names the rows of the global batch, and each process takes its slice. So the
batch of a step is the same on one GPU and on sixty-four, resuming needs only the step, and nothing is replayed.

P identities a batch, K pictures of each, N pictures, I identities.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar, Protocol

import numpy as np

from ppreid_dist.errors import ConfigError

_ORDER, _PICTURES, _STRANGERS = 1, 2, 3  # tags that keep the random streams of one seed apart


class Plan(Protocol):
    """What a stream needs of a plan."""

    @property
    def key(self) -> str: ...  # the setting that an error is about

    @property
    def seed(self) -> int: ...

    @property
    def K(self) -> int: ...  # noqa: N802  # pictures of one identity, in consecutive rows

    @property
    def total(self) -> int: ...  # rows of a global batch

    def batch(self, step: int) -> np.ndarray: ...  # (total,) rows of the split


@dataclass(frozen=True, eq=False)
class _People:
    """The rows of each identity: those of identity i are ``order_N[start_I[i] : start_I[i] + count_I[i]]``."""

    order_N: np.ndarray
    start_I: np.ndarray
    count_I: np.ndarray

    @classmethod
    def of(cls, pids: np.ndarray) -> "_People":
        _, start, count = np.unique(np.sort(pids), return_index=True, return_counts=True)
        return cls(np.argsort(pids, kind="stable"), start, count)

    def __len__(self) -> int:
        return len(self.count_I)


@lru_cache(maxsize=8)
def _permutation(identities: int, seed: int, tag: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, tag, epoch]).permutation(identities)


def _chunk(identities: int, size: int, seed: int, tag: int, step: int) -> np.ndarray:
    """The ``size`` distinct identities of a step: epochs are permutations, cut into chunks; the remainder of a
    permutation is dropped, since a chunk over the seam could hold an identity twice."""
    epoch, place = divmod(step, identities // size)
    return _permutation(identities, seed, tag, epoch)[place * size : (place + 1) * size]


@dataclass(frozen=True, eq=False)
class PKPlan:
    """P distinct identities with K pictures each, as the triplet loss asks for.

    The pictures of an identity are drawn without replacement; one with fewer than K gives all, then repeats.
    Raises ConfigError when there are fewer than P identities.
    """

    pids: np.ndarray
    P: int
    K: int
    seed: int
    key: ClassVar[str] = "data.identities_per_batch"

    def __post_init__(self) -> None:
        if len(self._people) < self.P:
            raise ConfigError(f"{self.key}: {self.P} asked for, but the split has {len(self._people)} identities")

    @cached_property
    def _people(self) -> _People:
        return _People.of(self.pids)

    @property
    def total(self) -> int:
        """Rows of a global batch."""
        return self.P * self.K

    def batch(self, step: int) -> np.ndarray:
        """The rows of the global batch of ``step``, shape (P*K,); the K rows of an identity are consecutive."""
        people, rng = self._people, np.random.default_rng([self.seed, _PICTURES, step])
        rows = np.empty((self.P, self.K), dtype=np.int64)
        for place, identity in enumerate(_chunk(len(people), self.P, self.seed, _ORDER, step)):
            count, drawn = int(people.count_I[identity]), 0
            while drawn < self.K:
                take = min(count, self.K - drawn)
                rows[place, drawn : drawn + take] = rng.choice(count, take, replace=False)
                drawn += take
            rows[place] += people.start_I[identity]
        return people.order_N[rows.reshape(-1)]


@dataclass(frozen=True, eq=False)
class StrangersPlan:
    """One picture each of ``count`` mutually distinct identities, for the terms that need people, not labels.

    Raises ConfigError when there are fewer than ``count`` identities.
    """

    pids: np.ndarray
    count: int
    seed: int
    key: str = "privacy.ridge.strangers"  # the setting that asks for ``count``
    K: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if len(self._people) < self.count:
            raise ConfigError(f"{self.key}: {self.count} asked for, but the split has {len(self._people)} people")

    @cached_property
    def _people(self) -> _People:
        return _People.of(self.pids)

    @property
    def total(self) -> int:
        """Rows of a global batch."""
        return self.count

    def batch(self, step: int) -> np.ndarray:
        """The rows of the global batch of ``step``, shape (count,)."""
        people = self._people
        chosen = _chunk(len(people), self.count, self.seed, _STRANGERS, step)
        picture = np.random.default_rng([self.seed, _STRANGERS, step, 1]).integers(0, people.count_I[chosen])
        return people.order_N[people.start_I[chosen] + picture]
