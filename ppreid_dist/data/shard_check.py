"""Checking shards: every byte of a folder against its index."""

import json
import re
import tarfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from ppreid_dist.data.index import Index, load_index, read_meta
from ppreid_dist.data.shards import side_by_side
from ppreid_dist.errors import DataError
from ppreid_dist.progress import progress_bar


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
        checked = side_by_side(check, len(index.shards))
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
