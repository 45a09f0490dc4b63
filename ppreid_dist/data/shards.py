"""Shards: a dataset as WebDataset tars with an index, written once and read at random.

    folder/
        meta.json             format, kind, notes, counts, the catalogue's fingerprint, what the writer said of the
                              settings; per split: rows, fingerprint, and the shards with their sizes in bytes
        train.csv             the index (see ``index.py``)
        train-000000.tar      a sample: KEY.jpg (or .png, .bmp: the file's bytes as they are), KEY.mask.png where there
        train-000001.tar      is a mask, KEY.json (pid, camid, split, attributes); KEY is 000123_stem
        ...

The folder appears whole, by one rename, or not at all; an interrupted writing begins again. Reusing the finished
shards of a killed run was the other choice: copying even MSMT17 takes minutes, and the simple way leaves no state
in which a reader meets half a folder. What a killed run leaves is a hidden folder beside the place, never read.

Pictures are shuffled over the shards as they are written: identity blocks would ruin every stream over them.
"""

import hashlib
import io
import json
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from ppreid_dist.data.catalog import Catalog
from ppreid_dist.data.index import FORMAT, ROW, Index, join, load_index, read_meta, write_index
from ppreid_dist.data.records import SPLITS, Record
from ppreid_dist.errors import DataError, TakenError
from ppreid_dist.files import atomic, write_json
from ppreid_dist.progress import progress_bar

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "BMP": "bmp"}
_BLOCK = 512  # a tar header; our names are short enough that it is always one
_log = logging.getLogger(__name__)
T = TypeVar("T")


def _side_by_side(work: Callable[[int], T], count: int, stop: Event | None = None) -> Iterator[T]:
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


# ---- writing


def write_shards(
    catalog: Catalog,
    folder: Path,
    *,
    images_per_shard: int = 4096,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> None:
    """Write all splits of ``catalog`` into ``folder``, every picture decoded once to know that it is whole.

    ``settings`` are kept in meta.json: those that the catalogue came from, by their full keys.
    Returns at once when ``folder`` holds this catalogue already (same names, sizes, labels and settings).
    Raises DataError, and leaves nothing, for a picture that can't be decoded, a full disk, or another's folder.
    """
    folder = Path(folder)
    if not catalog.records:
        raise DataError(f"{catalog.root}: no pictures to write")
    fingerprint = _catalogue_fingerprint(catalog, images_per_shard, seed)
    if folder.exists():
        if read_meta(folder).get("catalogue") != fingerprint:
            raise DataError(f"{folder}: holds other shards than {catalog.root} would give; choose another folder")
        _log.info("%s: written before, reused", folder)
        return
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
        _log.warning("%s: another writer's, or the remains of a killed one, which may be deleted", leftover)
    try:
        _write(catalog, folder, fingerprint, images_per_shard, seed, settings or {}, progress)
    except TakenError:  # by another writer, who was sooner
        if read_meta(folder).get("catalogue") != fingerprint:
            raise


def _write(
    catalog: Catalog,
    folder: Path,
    fingerprint: str,
    images_per_shard: int,
    seed: int,
    settings: Mapping[str, Any],
    progress: bool,
) -> None:
    splits: dict[str, Any] = {}
    total = len(catalog.records)
    with atomic(folder) as temporary, progress_bar(total=total, desc="shards", unit="img", shown=progress) as bar:
        temporary.mkdir()
        number = 0
        for split in SPLITS:
            records = [record for record in catalog.records if record.split == split]
            if not records:
                continue
            order = np.random.default_rng([seed, SPLITS.index(split)]).permutation(len(records))
            shuffled = [records[i] for i in order]
            index = _write_split(temporary, split, shuffled, number, images_per_shard, bar)
            number += len(records)
            write_index(temporary / f"{split}.csv", index)
            sizes = {name: (temporary / name).stat().st_size for name in index.shards}
            splits[split] = dict(rows=len(index), fingerprint=index.fingerprint(), shards=sizes)
        meta = dict(format=FORMAT, kind=catalog.kind, notes=list(catalog.notes), counts=catalog.counts())
        meta["settings"] = dict(settings)
        write_json(temporary / "meta.json", dict(**meta, catalogue=fingerprint, splits=splits))


def _catalogue_fingerprint(catalog: Catalog, images_per_shard: int, seed: int) -> str:
    """Of names, labels and file sizes, not of times: a data set unpacked again is still the same."""
    digest = hashlib.sha256(json.dumps([FORMAT, catalog.kind, images_per_shard, seed]).encode())
    for record in catalog.records:
        files = [record.path] if record.mask is None else [record.path, record.mask]
        parts = [(os.path.relpath(file, catalog.root), _size(file)) for file in files]
        row = [parts, record.pid, record.camid, record.split, record.attributes]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None


def _write_split(
    folder: Path, split: str, records: Sequence[Record], first: int, images_per_shard: int, bar: "tqdm[Any]"
) -> Index:
    table = np.zeros(len(records), ROW)
    shards = [f"{split}-{number:06d}.tar" for number in range(-(-len(records) // images_per_shard))]
    stop = Event()

    def write(number: int) -> list[bytes]:
        keys: list[bytes] = []
        start = number * images_per_shard
        with tarfile.open(folder / shards[number], "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, record in enumerate(records[start : start + images_per_shard], start):
                if stop.is_set():
                    break
                key = f"{first + row:06d}_{re.sub(r'[^A-Za-z0-9_-]', '_', record.path.stem)[:60]}"
                picture, extension, size, turned = _read_picture(record.path)
                where = _append(tar, f"{key}.{extension}", picture)
                mask_where = (0, 0, 0)
                if record.mask is not None:
                    mask, extension, mask_size, _ = _read_picture(record.mask)
                    if extension != "png" or mask_size != size:
                        raise DataError(f"{record.mask}: a mask must be a PNG of its picture's size {size}")
                    if turned:
                        raise DataError(f"{record.path}: is turned by its EXIF orientation, its mask isn't; turn both")
                    mask_where = _append(tar, f"{key}.mask.png", mask)
                about = dict(pid=record.pid, camid=record.camid, split=split, attributes=dict(record.attributes))
                _append(tar, f"{key}.json", json.dumps(about).encode())
                table[row] = (number, *where, record.pid, record.camid, *mask_where)
                keys.append(key.encode())
        return keys

    keys: list[bytes] = []
    for written in _side_by_side(write, len(shards), stop):
        keys += written
        bar.update(len(written))
    names = dict.fromkeys(name for record in records for name, _ in record.attributes)
    known = [dict(record.attributes) for record in records]
    attributes = {name: [each.get(name, "") for each in known] for name in names}
    return Index(tuple(shards), np.array(keys), table, attributes)


def _read_picture(file: Path) -> tuple[bytes, str, tuple[int, int], bool]:
    """The bytes, the extension they deserve and (width, height) of a picture that decodes to its end, and whether its
    EXIF orientation turns it when it is decoded."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    try:
        with Image.open(io.BytesIO(data), formats=list(EXTENSIONS)) as picture:
            picture.load()
            mode, turned = picture.mode, picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"{file}: not a whole JPEG, PNG or BMP picture: {error}") from None
    if mode[0] in "IF":  # Pillow clips 16 bits where DALI scales them
        raise DataError(f"{file}: has more than 8 bits a channel (mode {mode}); convert it first")
    # MPO: a JPEG with a second picture behind it, as some cameras write; what reads it reads the first.
    return data, EXTENSIONS["JPEG" if picture.format == "MPO" else str(picture.format)], picture.size, turned


def _append(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int, int]:
    """Append a member; its offset, size and CRC-32. Times and owners stay 0, so the bytes depend on the data only."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    offset = tar.offset + _BLOCK  # where the next header goes
    tar.addfile(info, io.BytesIO(data))
    return offset, len(data), zlib.crc32(data)


# ---- reading


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
        Damage within a tar is found when the sample is read, or by :func:`check_shards`.
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


# ---- checking


def check_shards(folder: Path, *, progress: bool = True) -> list[str]:
    """Read every byte of ``folder`` and compare it with the index: one line a problem, naming the file; [] is good."""
    folder = Path(folder)
    try:
        splits = read_meta(folder)["splits"]
    except DataError as error:
        return [str(error)]
    problems, known = [], {"meta.json"}
    for split, about in splits.items():
        known |= {f"{split}.csv", *about["shards"]}
        try:
            index, found = load_index(folder, split, about, local=True)
        except DataError as error:
            problems.append(str(error))
            continue
        problems += found
        check = partial(_check_shard, folder, index)
        checked = _side_by_side(check, len(index.shards))
        for found in progress_bar(checked, total=len(index.shards), unit="shard", desc=split, shown=progress):
            problems += found
    unknown = sorted(file.name for file in folder.iterdir() if file.name not in known)
    return problems + [f"{folder / name}: not in meta.json" for name in unknown]


def _check_shard(folder: Path, index: Index, number: int) -> list[str]:
    file, rows = folder / index.shards[number], np.flatnonzero(index.table_N["shard"] == number)
    return [f"{file}: {problem}" for problem in _check_tar(file, index.take(rows))] if file.is_file() else []


def _check_tar(file: Path, index: Index) -> list[str]:
    labels = {index.key(i): (int(row["pid"]), int(row["camid"])) for i, row in enumerate(index.table_N)}
    missing = {}  # (key, whether it is the mask) -> offset, size, crc; what was found is taken out
    for i, row in enumerate(index.table_N):
        missing[index.key(i), False] = (row["offset"], row["size"], row["crc"])
        if row["mask_size"]:
            missing[index.key(i), True] = (row["mask_offset"], row["mask_size"], row["mask_crc"])
    problems = []
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if not member.isreg() or not re.fullmatch(r"[\w-]+\.(jpg|png|bmp|mask\.png|json)", member.name, re.A):
                    problems.append(f"{member.name!r} is no plain file of a sample")
                    continue
                data = tar.extractfile(member).read()  # type: ignore[union-attr]  # regular: never None
                if extension == "json":
                    if key not in labels or labels.pop(key) != _labels(data):
                        problems.append(f"{member.name}: unknown, doubled, or not the labels of the index")
                    continue
                place = missing.pop((key, extension == "mask.png"), None)
                if place is None:
                    problems.append(f"{member.name}: not in the index, or doubled")
                elif place != (member.offset_data, len(data), zlib.crc32(data)):
                    problems.append(f"{member.name}: damaged (place, size or crc isn't the index's)")
    except (tarfile.TarError, OSError, EOFError) as error:
        problems.append(f"truncated or not a tar: {error}")
    if gone := sorted({key for key, _ in missing} | labels.keys()):
        problems.append(f"{len(gone)} samples of the index are not whole in it, the first is {gone[0]}")
    return problems


def _labels(data: bytes) -> tuple[int, int] | None:
    try:
        about = json.loads(data)
        return about["pid"], about["camid"]
    except (ValueError, KeyError, TypeError):
        return None
