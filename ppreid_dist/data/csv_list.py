"""A CSV of pictures, for any dataset that has no layout of its own.

Columns: path, pid, camid, split (one of ``SPLITS``, or "test"), optionally mask; every other column is an attribute.
Paths are relative to the CSV's folder. A pid is a number, or all of them are names.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ppreid_dist.data.records import SPLITS, Read, Record, inside
from ppreid_dist.errors import DataError

_TEST = "test"  # a short word: divided into query and gallery by camera


def read_csv(root: Path) -> Read:
    file = root / "index.csv" if root.is_dir() else root
    if not file.is_file():
        raise DataError(f"{file}: no such file; the csv kind is a CSV or a folder with an index.csv")
    records: list[Record] = []
    lines: dict[Path, int] = {}
    names: dict[str, int] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = reader.fieldnames = [column.strip() for column in reader.fieldnames or []]
            if missing := [c for c in ("path", "pid", "camid", "split") if c not in columns]:
                raise DataError(f"{file}: no column {', '.join(missing)} in its first line")
            if "" in columns or len(set(columns)) < len(columns):
                raise DataError(f"{file}: its first line names a column twice or leaves one unnamed")
            rows = [(reader.line_num, row) for row in reader if not _blank(row)]
            names = _names(rows)
            for line, row in rows:
                record = _record(file, line, row, names)
                if record.path in lines:
                    raise DataError(f"{file} line {line}: {row['path']!r} is in line {lines[record.path]} too")
                lines[record.path] = line
                records.append(record)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a CSV in UTF-8: {' '.join(str(error).split())}") from None
    if not records:
        raise DataError(f"{file}: lists no picture")
    notes = [f"{len(names)} identities have names: numbered 1 to {len(names)} in their order"] if names else []
    if any(record.split == _TEST for record in records):
        notes.append(f"{_TEST}: an identity's pictures by its first camera are query, the others gallery")
    return _divide_test(records), notes


def _blank(row: dict[str, str]) -> bool:
    """A line of blanks alone."""
    values = [value for value in row.values() if value is not None]
    return len(values) <= 1 and not any(value.strip() for value in values)


def _names(rows: Sequence[tuple[int, dict[str, str]]]) -> dict[str, int]:
    """Numbers for identities that are named by words; empty where any pid is a number, for then all must be."""
    pids = {(row.get("pid") or "").strip() for _, row in rows}
    if "" in pids or any(re.fullmatch("-?[0-9]+", pid) for pid in pids):
        return {}
    return {pid: number for number, pid in enumerate(sorted(pids), start=1)}


def _divide_test(records: Sequence[Record]) -> list[Record]:
    first: dict[int, int] = {}
    for record in records:
        if record.split == _TEST:
            first[record.pid] = min(record.camid, first.get(record.pid, record.camid))
    return [
        replace(record, split="query" if record.camid == first[record.pid] else "gallery")
        if record.split == _TEST
        else record
        for record in records
    ]


def _record(file: Path, line: int, row: dict[str, str], names: dict[str, int]) -> Record:
    where = f"{file} line {line}"
    if None in row or None in row.values():
        raise DataError(f"{where}: another number of fields than the first line")
    numbers = {}
    for column, least in (("pid", -1), ("camid", 0)):
        text = row[column].strip()
        if column == "pid" and names:
            numbers[column] = names[text]
            continue
        if not re.fullmatch("-?[0-9]{1,18}", text) or int(text) < least:
            raise DataError(f"{where}: {column} {text!r} isn't a whole number of at least {least}")
        numbers[column] = int(text)
    if (split := row["split"].strip()) not in (*SPLITS, _TEST):
        raise DataError(f"{where}: split {split!r} is not one of {', '.join(SPLITS)}, {_TEST}")
    return Record(
        path=inside(file.parent, row["path"], where),
        mask=inside(file.parent, row["mask"], where) if row.get("mask") else None,
        split=split,
        attributes=tuple((k, v) for k, v in row.items() if k not in ("path", "pid", "camid", "split", "mask")),
        **numbers,
    )
