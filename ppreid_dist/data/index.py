"""The index of a split's shards: where every picture lies, whose it is, and the CRC that its bytes must have.

``<split>.csv`` has a row a sample: ``key, shard, offset, size, crc, pid, camid, mask_offset, mask_size, mask_crc``
(bytes; ``mask_size`` 0 where there is no mask), then a column ``attr:<name>`` for each attribute. In memory it is
numpy, some 100 bytes a sample: a million samples are read in a few seconds and cost no Python object each.

N samples.
"""

import csv
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ppreid_dist.errors import DataError
from ppreid_dist.files import read_json

FORMAT = 1  # of the folder of shards
ROW = np.dtype(
    [("shard", "i4"), ("offset", "i8"), ("size", "i8"), ("crc", "u4"), ("pid", "i8"), ("camid", "i8"),
     ("mask_offset", "i8"), ("mask_size", "i8"), ("mask_crc", "u4")]
)  # fmt: skip
COLUMNS = ("key", *ROW.names)  # type: ignore[misc]  # a structured dtype has names
_ATTRIBUTE = "attr:"  # an attribute may be called "size" without harm
_CHUNK = 65536  # rows held as Python strings at a time


@dataclass(frozen=True, eq=False)
class Index:
    """``table_N`` of dtype ROW whose ``shard`` counts into ``shards``; ``keys_N`` as bytes; attributes as text."""

    shards: tuple[str, ...]
    keys_N: np.ndarray
    table_N: np.ndarray
    attributes: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.table_N)

    def key(self, row: int) -> str:
        return self.keys_N[row].decode()

    def take(self, rows: np.ndarray) -> "Index":
        """The index of ``rows`` only, in that order."""
        attributes = {name: [values[i] for i in rows.tolist()] for name, values in self.attributes.items()}
        return Index(self.shards, self.keys_N[rows], self.table_N[rows], attributes)

    def fingerprint(self) -> str:
        """SHA-256 of keys, pids, camids and CRCs: of the content, not of how it lies in shards."""
        digest = hashlib.sha256(b"\n".join(self.keys_N.tolist()))
        for column in ("pid", "camid", "crc", "mask_crc"):
            digest.update(self.table_N[column].astype("<i8").tobytes())
        return digest.hexdigest()


def join(parts: Sequence[Index]) -> Index:
    """One index after the other; an attribute that a part lacks is empty there."""
    tables, first = [], 0
    for part in parts:
        table = part.table_N.copy()
        table["shard"] += first
        tables.append(table)
        first += len(part.shards)
    names = dict.fromkeys(name for part in parts for name in part.attributes)
    return Index(
        tuple(shard for part in parts for shard in part.shards),
        np.concatenate([part.keys_N for part in parts]),
        np.concatenate(tables),
        {name: [v for part in parts for v in part.attributes.get(name) or [""] * len(part)] for name in names},
    )


def write_index(file: Path, index: Index) -> None:
    """Write ``index`` as CSV; OSError is left to the caller, who writes the folder around it."""
    table = index.table_N
    columns: list[Iterable[object]] = [(key.decode() for key in index.keys_N.tolist())]
    columns.append(index.shards[number] for number in table["shard"].tolist())
    columns += [table[name].tolist() for name in COLUMNS[2:]]
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\r\n")  # else Python 3.11 quotes no \r
        writer.writerow([*COLUMNS, *(_ATTRIBUTE + name for name in index.attributes)])
        writer.writerows(zip(*columns, *index.attributes.values(), strict=True))


def read_index(file: Path, shards: Sequence[str]) -> Index:
    """Read a CSV index whose shards must be among ``shards``; DataError naming the file when it is damaged."""
    numbers = {name: number for number, name in enumerate(shards)}
    keys, tables, values = [np.empty(0, "S1")], [np.empty(0, ROW)], []
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            reader = csv.reader(stream, strict=True)
            header = next(reader, [])
            names = [name.removeprefix(_ATTRIBUTE) for name in header[len(COLUMNS) :]]
            if header != [*COLUMNS, *(_ATTRIBUTE + name for name in names)]:
                raise DataError(f"{file}: not an index of shards: its columns are {','.join(header)[:80]!r}")
            values = [list[str]() for _ in names]
            shared: dict[str, str] = {}  # attributes repeat: one string object a value, not one a sample
            while rows := list(islice(reader, _CHUNK)):
                key, shard, *columns = zip(*rows, strict=True)
                if len(columns) + 2 != len(header):
                    raise ValueError(f"{len(columns) + 2} fields for {len(header)} columns")
                table = np.empty(len(rows), ROW)
                table["shard"] = [numbers[name] for name in shard]
                for name, column in zip(COLUMNS[2:], columns[: len(COLUMNS) - 2], strict=True):
                    table[name] = np.fromiter(map(int, column), np.int64, len(rows))
                keys.append(np.array([k.encode() for k in key]))
                tables.append(table)
                for whole, column in zip(values, columns[len(COLUMNS) - 2 :], strict=True):
                    whole.extend(shared.setdefault(value, value) for value in column)
    except FileNotFoundError:
        raise DataError(f"{file}: no such index") from None
    except KeyError as error:
        raise DataError(f"{file}: names the shard {error.args[0]!r}, which meta.json doesn't have") from None
    except (OSError, ValueError, OverflowError, csv.Error) as error:
        raise DataError(f"{file}: damaged index: {error}") from None
    return Index(tuple(shards), np.concatenate(keys), np.concatenate(tables), dict(zip(names, values, strict=True)))


def read_meta(folder: Path) -> dict[str, Any]:
    """``meta.json`` of a folder of shards; DataError when it is missing, damaged or of another format."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of shards")
    meta = read_json(folder / "meta.json")
    known = isinstance(meta, dict) and meta.get("format") == FORMAT and isinstance(meta.get("settings", {}), dict)
    splits = meta.get("splits") if known else None
    if not isinstance(splits, dict) or not all(
        isinstance(about, dict) and isinstance(about.get("shards"), dict) and {"rows", "fingerprint"} <= about.keys()
        for about in splits.values()
    ):
        raise DataError(f"{folder / 'meta.json'}: not shards of format {FORMAT}")
    return meta


def load_index(folder: Path, split: str, about: dict[str, Any], *, local: bool) -> tuple[Index, list[str]]:
    """The index of ``split``, and what is wrong between it, meta.json and (``local``) the tars' sizes."""
    file, sizes = folder / f"{split}.csv", about["shards"]
    for name in sizes:
        if not re.fullmatch(rf"{split}-\d{{6,}}\.tar", name):
            raise DataError(f"{folder / 'meta.json'}: {name!r} is not the name of a shard")
    index, problems = read_index(file, list(sizes)), []
    if len(index) != about["rows"] or index.fingerprint() != about["fingerprint"]:
        problems.append(f"{file}: doesn't match meta.json ({len(index)} rows, {about['rows']} were written)")
    ends = np.array(list(sizes.values()), dtype=np.int64)
    for what in ("", "mask_"):
        offset_N, size_N = index.table_N[f"{what}offset"], index.table_N[f"{what}size"]
        outside = (offset_N < 0) | (size_N < 0) | (offset_N + size_N > ends[index.table_N["shard"]])
        if outside.any():
            problems.append(f"{file}: {index.key(int(outside.argmax()))} lies outside of its shard")
    for name, size in sizes.items() if local else ():
        shard = folder / name
        if not shard.is_file():
            problems.append(f"{shard}: missing")
        elif shard.stat().st_size != size:
            problems.append(f"{shard}: has {shard.stat().st_size} bytes, {size} were written")
    return index, problems
