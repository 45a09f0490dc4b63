"""From shards to batches on the device: whole splits for evaluation, planned batches for training.

    plan(step) → rows → Source (resident: already on the device; indexed: read and decoded ahead) → Batch

B local batch, N samples of the split, H height, W width.
"""

import itertools
import json
import logging
import tarfile
import zlib
from collections.abc import Container, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ppreid_dist import distributed
from ppreid_dist.data.decode import BACKENDS, Decoder, decode_masks
from ppreid_dist.data.plan import Plan
from ppreid_dist.data.prefetch import Prefetcher
from ppreid_dist.data.shards import EXTENSIONS, ShardedSplit
from ppreid_dist.data.tolerant import Tolerant
from ppreid_dist.errors import ConfigError, DataError
from ppreid_dist.progress import progress_bar
from ppreid_dist.settings import Settings, option
from ppreid_dist.transfer import to_device

_LOAD = 256  # pictures decoded at a time when a whole split is
_log = logging.getLogger(__name__)
_POOL = 21  # tag of the pool's random stream


@dataclass(kw_only=True)
class StreamConfig(Settings):
    """Where training pictures are read and decoded."""

    backend: str = option("auto", "who decodes; auto: DALI where installed, on the GPU where one is", choices=BACKENDS)
    placement: str = option(
        "auto",
        "resident: decoded once, kept on the device; indexed: read as planned; webdataset: streamed, weaker promises",
        choices=("auto", "resident", "indexed", "webdataset"),
    )
    resident_limit_gb: float = option(4.0, "auto keeps a split resident up to this size (10^9 bytes)", at_least=0)
    prefetch: int = option(4, "batches read ahead when indexed or streamed", at_least=1)
    damaged: int = option(
        0,
        "damaged training pictures that each process names and replaces by the next of the same person; one more ends "
        "the run (not for webdataset, where the first does)",
        at_least=0,
    )
    pool: int = option(8192, "pictures in the pool from which webdataset batches are drawn", at_least=1)

    @property
    def planned(self) -> bool:
        """Whether batches are the plan's, the same wherever they are read from; webdataset's are its own."""
        return self.placement != "webdataset"


@dataclass(frozen=True, eq=False)
class Pictures:
    """A decoded split: uint8 pictures on the device, masks of the person (1 is person) where every sample has one."""

    images_N3HW: Tensor
    masks_N1HW: Tensor | None
    pids_N: np.ndarray
    camids_N: np.ndarray
    keys: list[str]
    attributes: dict[str, list[str]]

    def only(self, rows: np.ndarray) -> "Pictures":
        """Those of ``rows``: their numbers, or a flag for each."""
        rows = np.arange(len(self.pids_N))[rows]
        return Pictures(
            images_N3HW=self.images_N3HW[rows],
            masks_N1HW=None if self.masks_N1HW is None else self.masks_N1HW[rows],
            pids_N=self.pids_N[rows],
            camids_N=self.camids_N[rows],
            keys=[self.keys[row] for row in rows],
            attributes={name: [of[row] for row in rows] for name, of in self.attributes.items()},
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """This process's rows of a step's batch: uint8 (B,3,H,W), labels 0…C-1 and camids as int64, on the device."""

    step: int
    images: Tensor
    labels: Tensor
    camids: Tensor


def load_pictures(
    split: ShardedSplit, size: tuple[int, int], *, backend: str, device: torch.device | str, progress: bool = True
) -> Pictures:
    """Decode a whole split to ``size`` (height, width), in its order. DataError naming a damaged sample."""
    decoder, keys = Decoder(backend, size, device), split.keys
    images = torch.empty((len(split), 3, *size), dtype=torch.uint8, device=device)
    masks = torch.empty((len(split), 1, *size), dtype=torch.uint8, device=device) if split.has_masks else None
    for start in progress_bar(range(0, len(split), _LOAD), desc=f"decode {split.name}", shown=progress):
        rows = range(start, min(start + _LOAD, len(split)))
        names, span = keys[rows.start : rows.stop], slice(rows.start, rows.stop)
        images[span] = decoder.decode([split.image_bytes(i) for i in rows], names)
        if masks is not None:
            found = [split.mask_bytes(i) or b"" for i in rows]
            masks[span] = decode_masks(found, names, size).to(device)
    return Pictures(images, masks, split.pids, split.camids, keys, split.attributes)


class Source(Protocol):
    """Pictures of a split by row."""

    def batch(self, rows: np.ndarray) -> Tensor: ...  # uint8 (B,3,H,W) on the device


class ResidentSource:
    """A split decoded once and kept as uint8 on the device (Market-1501's training set at 256x128: 1.3 GB)."""

    def __init__(
        self, split: ShardedSplit, size: tuple[int, int], *, backend: str, device: torch.device | str, damaged: int
    ):
        self._images = torch.empty((len(split), 3, *size), dtype=torch.uint8, device=device)
        tolerant = Tolerant(split, Decoder(backend, size, device), damaged)
        for start in range(0, len(split), _LOAD):
            rows = range(start, min(start + _LOAD, len(split)))
            self._images[rows.start : rows.stop] = tolerant.decode(rows)

    def batch(self, rows: np.ndarray) -> Tensor:
        return self._images[to_device(torch.from_numpy(rows), self._images.device)]


class IndexedSource:
    """Reads the rows asked for at their offsets and decodes them."""

    def __init__(
        self, split: ShardedSplit, size: tuple[int, int], *, backend: str, device: torch.device | str, damaged: int
    ):
        self._tolerant = Tolerant(split, Decoder(backend, size, device), damaged)

    def batch(self, rows: np.ndarray) -> Tensor:
        return self._tolerant.decode(rows.tolist())


class WebDatasetSource:
    """PK batches from shards that can only be read in order (remote, huge), through a pool filled by webdataset.

    Its promises are weaker than the plan's: a resumed run doesn't see the batches that the unbroken one would have
    (the order is seeded, a stream's position is not kept); batches differ with the number of processes, since each
    reads shards of its own; identities are unique within a process's rows only, not over the global batch; CRCs are
    not checked. ``only`` names the keys to use, where the shards hold more.
    """

    def __init__(self, urls: Sequence[str], decoder: Decoder, *, only: Container[str] | None = None, pool: int = 8192):
        if len(urls) < distributed.world_size():  # a process without shards would hang the others
            raise ConfigError(
                f"data.placement: webdataset needs a shard for each of {distributed.world_size()} processes, "
                f"but there are {len(urls)}"
            )
        self._urls, self._decoder, self._only, self._pool = list(urls), decoder, only, pool

    def batches(self, P: int, K: int, *, seed: int) -> Iterator[tuple[Tensor, np.ndarray, np.ndarray]]:
        """Endless ``(images (P*K,3,H,W), pids, camids)`` of P distinct identities, K consecutive rows each.

        A picture leaves the pool with its batch. Identities with K pictures in the pool come first; where there are
        fewer than P of those, others repeat their pictures. DataError when a shard can't be read, or the pool can't
        hold P identities.
        """
        rng = np.random.default_rng([seed, _POOL, distributed.rank()])
        samples, size, most = self._samples(int(rng.integers(2**31))), 0, self._pool
        pool: dict[int, dict[str, tuple[bytes, int, str]]] = {}  # pid -> key -> (picture, camid, shard)
        while True:
            known = 0  # met again: as many as the pool holds mean that the shards hold no more
            while size < most and known <= size:
                key, pid, camid, picture, url = next(samples)
                before = len(pool.setdefault(pid, {}))
                pool[pid].setdefault(key, (picture, camid, url))
                size += len(pool[pid]) - before
                known += len(pool[pid]) == before
            if known > size:
                # All that there is. A pool of half of it is filled again in a few steps, a full one by a whole pass.
                most = max(size // 2, P * K)
            if len(pool) < P:
                raise DataError(f"{self._urls[0]}: a pool of {size} pictures holds {len(pool)} people, {P} are needed")
            shuffled = rng.permutation(sorted(pool)).tolist()
            chosen = sorted(shuffled, key=lambda pid: len(pool[pid]) < K)[:P]
            taken: list[tuple[int, str, bytes, int, str]] = []
            for pid in chosen:
                keys = rng.permutation(sorted(pool[pid])).tolist()[:K]
                found = [(pid, key, *pool[pid].pop(key)) for key in keys]
                size -= len(found)
                taken += [found[i % len(found)] for i in range(K)]
                if not pool[pid]:
                    del pool[pid]
            pids, names, pictures, camids, urls = zip(*taken, strict=True)
            where = [f"{url}: {name}" for url, name in zip(urls, names, strict=True)]
            yield self._decoder.decode(pictures, where), np.array(pids), np.array(camids)

    def _samples(self, seed: int) -> Iterator[tuple[str, int, int, bytes, str]]:
        """Endlessly (key, pid, camid, picture, shard). DataError naming a damaged shard, or the one before it."""
        import webdataset as wds

        # detshuffle gives each pass its own order; resampled=True neither repeats with a seed nor covers the shards
        dataset = wds.WebDataset(
            self._urls, shardshuffle=len(self._urls), detshuffle=True, seed=seed, nodesplitter=wds.split_by_node
        )
        where = f"{self._urls[0]} …"
        try:
            for sample in dataset.repeat():
                url, key = sample["__url__"], sample["__key__"].rpartition("/")[2]
                where = f"{url}: {key}"
                if self._only is None or key in self._only:
                    about = json.loads(sample["json"])
                    picture = next(sample[extension] for extension in EXTENSIONS.values() if extension in sample)
                    yield key, about["pid"], about["camid"], picture, url
                where = f"in or after {url}"
        except (OSError, ValueError, LookupError, TypeError, StopIteration, tarfile.TarError) as error:
            # To what an error says webdataset appends what it was reading from.
            named = (*error.args, getattr(error, "filename", None))
            where = next((shard for shard in self._urls if shard in named), where)
            raise DataError(f"{where}: streaming failed: {_first_words(error)}") from error


def _first_words(error: Exception) -> str:
    """What an error itself says, without the objects that webdataset appends."""
    if isinstance(error, (KeyError, StopIteration)):
        return f"a sample lacks its {error.args[0] if error.args else 'picture'}"
    said = error if isinstance(error, UnicodeError) else next(iter(error.args), type(error).__name__)
    return " ".join(str(getattr(error, "strerror", None) or said).partition(" @ <")[0].split())


def _check_dealing(split: ShardedSplit, people: int) -> None:
    """ConfigError, on all processes, where one of them would be dealt shards with fewer people: it would end alone."""
    shard_N, ranks = split.index.table_N["shard"], distributed.world_size()
    shards = np.unique(shard_N)
    for rank in range(ranks):
        there = len(np.unique(split.pids[np.isin(shard_N, shards[rank::ranks])]))
        if there < people:
            raise ConfigError(
                f"data.images_per_shard: process {rank} of {ranks} would read shards with {there} people, and a batch "
                f"has {people} of each process; write smaller shards"
            )


class BatchStream:
    """An endless iterator over :class:`Batch`, from ``open_stream``; ``close()`` (or ``with``) ends its thread."""

    def __init__(self, batches: "Generator[Batch, None, None] | Prefetcher[int, Batch] | Prefetcher[Batch, Batch]"):
        self._batches = batches

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End reading ahead; safe to call twice."""
        self._batches.close()


def choose_placement(config: StreamConfig, samples: int, size: tuple[int, int]) -> str:
    """``config.placement``, with ``auto`` resolved by the size of the decoded split and said in one logged line."""
    if config.placement != "auto":
        return config.placement
    gigabytes = samples * 3 * size[0] * size[1] / 1e9
    placement = "resident" if gigabytes <= config.resident_limit_gb else "indexed"
    _log.info("placement %s: %.3f GB decoded, limit %g GB", placement, gigabytes, config.resident_limit_gb)
    return placement


def open_source(
    split: ShardedSplit, *, config: StreamConfig, size: tuple[int, int], device: torch.device | str
) -> Source | WebDatasetSource:
    """Where the pictures of ``split`` come from, by ``config``; several streams may share one source.

    Raises DataError for more damage than ``config.damaged`` allows, which a resident source meets as it decodes.
    """
    placement = choose_placement(config, len(split), size)
    if placement == "resident":
        return ResidentSource(split, size, backend=config.backend, device=device, damaged=config.damaged)
    if placement == "indexed":
        return IndexedSource(split, size, backend=config.backend, device=device, damaged=config.damaged)
    decoder = Decoder(config.backend, size, device)
    return WebDatasetSource(split.urls, decoder, only=frozenset(split.keys), pool=config.pool)


def open_stream(
    split: ShardedSplit,
    plan: Plan,
    *,
    source: Source | WebDatasetSource,
    prefetch: int,
    device: torch.device | str,
    start_step: int,
    rank_rows: slice,
) -> BatchStream:
    """The batches of ``plan`` over ``split`` from ``start_step`` on; of each, the rows ``rank_rows``.

    Resident and indexed sources give exactly the plan's pictures in its order, whatever the number of processes.
    A streamed one gives batches of the plan's shape only: see :class:`WebDatasetSource`.
    Raises ConfigError when the processes can't share the batch by whole identities.
    """
    local = rank_rows.stop - rank_rows.start
    if local <= 0 or local % plan.K or plan.total % local:
        raise ConfigError(f"{plan.key}: {plan.total // plan.K} don't divide by the number of processes")
    classes, steps = np.unique(split.pids), itertools.count(start_step)

    def batch(step: int, images: Tensor, pids: np.ndarray, camids: np.ndarray) -> Batch:
        labels = torch.from_numpy(np.searchsorted(classes, pids))
        return Batch(step, images, to_device(labels, device), to_device(torch.from_numpy(camids), device))

    if isinstance(source, WebDatasetSource):
        _check_dealing(split, local // plan.K)
        # Labelled pictures and strangers may come from the same shards by the same seed, in an order each of its own.
        which = zlib.crc32(f"{plan.key} {split.name}".encode())
        seed = int(np.random.default_rng([plan.seed, _POOL, which, start_step]).integers(2**31))
        found = source.batches(local // plan.K, plan.K, seed=seed)
        streamed = (batch(step, *next(found)) for step in steps)
        return BatchStream(Prefetcher(lambda made: made, streamed, prefetch, device=device))

    def read(step: int) -> Batch:
        rows = plan.batch(step)[rank_rows]
        return batch(step, source.batch(rows), split.pids[rows], split.camids[rows])

    if isinstance(source, ResidentSource):  # no thread: an index into memory is done before one would wake
        return BatchStream(read(step) for step in steps)
    return BatchStream(Prefetcher(read, steps, prefetch, device=device))
