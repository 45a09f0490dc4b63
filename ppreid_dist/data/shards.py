"""Shards: a dataset as WebDataset tars with an index, written once (``shard_writer.py``) and read at random.

folder/
    meta.json             format, kind, notes, counts, the catalogue's fingerprint, what the writer said of the
                          settings; per split: rows, fingerprint, and the shards with their sizes in bytes
    train.csv             the index (see ``index.py``)
    train-000000.tar      a sample: KEY.jpg (or .png, .bmp: the file's bytes as they are), KEY.mask.png where there
    train-000001.tar      is a mask, KEY.json (pid, camid, split, attributes); KEY is 000123_stem
    ...
"""

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import numpy as np

from ppreid_dist.data.index import Index, join, load_index, read_meta
from ppreid_dist.errors import DataError

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "BMP": "bmp"}  # by the format that Pillow names
T = TypeVar("T")


class _Tars:
    """Reads spans of files at random. Descriptors open when first needed; ``pread`` has no position to share, so
    threads and forked processes may use one instance, and a pickled one opens its own."""

    def __init__(self, paths: Sequence[str]):
        self.paths = list(paths)
        self._descriptors: dict[int, int] = {}

    def read(self, number: int, offset: int, size: int) -> bytes:
        try:
            descriptor = self._descriptors.get(number)
            if descriptor is None:
                opened = os.open(self.paths[number], os.O_RDONLY | os.O_CLOEXEC)
                descriptor = self._descriptors.setdefault(number, opened)
                if descriptor != opened:  # another thread was first
                    os.close(opened)
            return os.pread(descriptor, size, offset)
        except OSError as error:
            raise DataError(f"{self.paths[number]}: can't be read: {error.strerror}") from None

    def __getstate__(self) -> dict[str, Any]:
        return dict(paths=self.paths, _descriptors={})

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


@dataclass(frozen=True, eq=False)
class ShardedSplit:
    """One split of a folder of shards, or several joined; samples are addressed by row. N samples.

    ``remote`` splits know their index only: their shards are URLs that ``stream.WebDatasetSource`` reads in order.
    """

    name: str
    index: Index
    tars: _Tars

    @classmethod
    def open(cls, folder: Path, split: str, *, remote: str = "") -> "ShardedSplit":
        """Open ``folder``'s ``split``, reading its index. ``remote``: where the tars are when ``folder`` holds only
        meta.json and the index, as a prefix that ends before the tar's name (``https://…/``, ``pipe:cat /far/``).

        Raises DataError when something is missing or the index doesn't match meta.json and the tars' sizes.
        Damage within a tar is found when the sample is read, or by :func:`~ppreid_dist.data.shard_check.check_shards`.
        """
        folder = Path(folder)
        splits = read_meta(folder)["splits"]
        if split not in splits:
            raise DataError(f"{folder}: has no split {split!r}, only {', '.join(splits)}")
        index, problems = load_index(folder, split, splits[split], local=not remote)
        if problems:
            raise DataError(problems[0])
        return cls(split, index, _Tars([remote + s if remote else str(folder / s) for s in index.shards]))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def keys(self) -> list[str]:
        """All keys (made anew at each call; use ``index.key(i)`` for one)."""
        return [key.decode() for key in self.index.keys_N.tolist()]

    @cached_property
    def pids(self) -> np.ndarray:
        return np.ascontiguousarray(self.index.table_N["pid"])

    @cached_property
    def camids(self) -> np.ndarray:
        return np.ascontiguousarray(self.index.table_N["camid"])

    @property
    def attributes(self) -> dict[str, list[str]]:
        return self.index.attributes

    @cached_property
    def has_masks(self) -> bool:
        """Whether every sample has a mask."""
        return len(self) > 0 and bool((self.index.table_N["mask_size"] > 0).all())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the keys, pids, camids and CRCs of these samples in this order."""
        return self.index.fingerprint()

    @property
    def urls(self) -> list[str]:
        """The shards in which these samples lie."""
        return [self.tars.paths[number] for number in np.unique(self.index.table_N["shard"])]

    def image_bytes(self, i: int) -> bytes:
        """The file of picture ``i``; DataError naming shard and key when its CRC isn't the index's."""
        return self._read(i, "")

    def mask_bytes(self, i: int) -> bytes | None:
        """The PNG of the mask of picture ``i``, None when it has none; DataError as for the picture."""
        return self._read(i, "mask_") if self.index.table_N["mask_size"][i] else None

    def _read(self, i: int, what: str) -> bytes:
        row = self.index.table_N[i]
        data = self.tars.read(int(row["shard"]), int(row[f"{what}offset"]), int(row[f"{what}size"]))
        if zlib.crc32(data) != row[f"{what}crc"]:
            shard = self.tars.paths[row["shard"]]
            raise DataError(f"{shard}: {self.index.key(i)}: damaged (its {what or 'image_'}crc isn't the index's)")
        return data


def join_splits(splits: Sequence[ShardedSplit]) -> ShardedSplit:
    """The samples of several splits as one. DataError when splits of different folders share a pid: the same number
    would then mean two people."""
    for i, a in enumerate(splits):
        for b in splits[:i]:
            apart = Path(a.tars.paths[0]).parent != Path(b.tars.paths[0]).parent
            if apart and (shared := np.intersect1d(a.pids, b.pids)).size:
                raise DataError(f"{a.tars.paths[0]} and {b.tars.paths[0]}: both have a person {shared[0]}")
    paths = [path for split in splits for path in split.tars.paths]
    return ShardedSplit("+".join(split.name for split in splits), join([split.index for split in splits]), _Tars(paths))


def side_by_side(work: Callable[[int], T], count: int, stop: Event | None = None) -> Iterator[T]:
    """``work(0)`` to ``work(count - 1)``, in that order, on as many threads as there are cores.

    Pillow, zlib and files work beside Python. After an error, or Ctrl-C, nothing more is begun; ``stop`` is set for
    what runs, and that is waited for.
    """
    with ThreadPoolExecutor(max(1, min(count, len(os.sched_getaffinity(0))))) as pool:
        try:
            yield from pool.map(work, range(count))
        except BaseException:
            if stop is not None:
                stop.set()
            pool.shutdown(cancel_futures=True)
            raise
