"""Writing shards: every picture decoded once, each split shuffled, all of the folder or nothing.

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from ppreid_dist.data.catalog import Catalog
from ppreid_dist.data.decode import in_one_line
from ppreid_dist.data.index import FORMAT, ROW, Index, read_meta, write_index
from ppreid_dist.data.records import SPLITS, Record
from ppreid_dist.data.shards import EXTENSIONS, side_by_side
from ppreid_dist.errors import DataError, TakenError
from ppreid_dist.files import atomic, write_json
from ppreid_dist.progress import progress_bar

_BLOCK = 512  # a tar header; our names are short enough that it is always one
_log = logging.getLogger(__name__)


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
    for written in side_by_side(write, len(shards), stop):
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
        raise DataError(f"{file}: not a whole JPEG, PNG or BMP picture: {in_one_line(error)}") from None
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
