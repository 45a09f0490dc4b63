"""What is in a dataset's folder: layouts of the field read into records, checked, and counted.

Pids are the dataset's own numbers, unique over all splits (relabelling for a classifier comes later). Pid -1 is
junk and dropped; pid 0 in the gallery is a distractor, not a person. Camera ``c12`` is camera 12. Records are
sorted by split and path, so a catalogue doesn't depend on the order in which a file system lists a folder.
"""

import csv
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path, PurePosixPath

import numpy as np

from ppreid_dist.errors import ConfigError, DataError

SPLITS = ("train", "unlabelled", "aux", "query", "gallery")  # aux: the attackers' own people
_TEST = "test"  # a CSV's short word: divided into query and gallery by camera
_GROUPS = {"train": ("train",), "unlabelled": ("unlabelled",), "aux": ("aux",), "query/gallery": ("query", "gallery")}
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp")
_MSMT17_TEST = 10_000  # MSMT17 numbers its test people from 0 again
_VIPER_SEED = 0
_HOLD_OUT = 1  # the tag of this draw among all that derive from a seed

# The three layouts of basenames, and an example of each for messages.
_NAMES = {
    "market": r"(-1|[0-9]{1,9})_c([0-9]{1,6})(?:s[0-9]+)?_.+\.(?:jpe?g|png)",
    "msmt17": r"([0-9]{1,9})_[^_]+_([0-9]{1,6})_.+\.(?:jpe?g|png)",
    "viper": r"([0-9]{1,9})_([0-9]{1,3})\.bmp",
}
_EXAMPLES = {
    "market": "0002_c1s1_000451_03.jpg",
    "msmt17": "0000_000_01_0303morning_0015_0.jpg",
    "viper": "001_45.bmp",
}

Published = dict[str, tuple[int, int]]
# split -> (identities, images) as each dataset's own page or its usual protocol states them; a kind may have variants.
_PUBLISHED: dict[str, dict[str, Published]] = {
    "market1501": {"Market-1501": dict(train=(751, 12936), query=(750, 3368), gallery=(750, 15913))},
    "occluded-duke": {"Occluded-Duke": dict(train=(702, 15618), query=(519, 2210), gallery=(1110, 17661))},
    "msmt17": {"MSMT17": dict(train=(1041, 32621), query=(3060, 11659), gallery=(3060, 82161))},
    "cuhk03-np": {
        "CUHK03-NP detected": dict(train=(767, 7365), query=(700, 1400), gallery=(700, 5332)),
        "CUHK03-NP labelled": dict(train=(767, 7368), query=(700, 1400), gallery=(700, 5328)),
    },
    "viper": {"VIPeR": dict(train=(316, 632), query=(316, 316), gallery=(316, 316))},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One picture: its file, person, camera and split; optionally a mask of the person and named attributes."""

    path: Path
    pid: int
    camid: int
    split: str
    mask: Path | None = None
    attributes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """The records of a dataset, sorted by split and path, and what a reader of its numbers must know (``notes``)."""

    kind: str
    root: Path
    records: tuple[Record, ...]
    notes: tuple[str, ...]

    def counts(self) -> dict[str, tuple[int, int, int]]:
        """Split -> (identities, images, cameras), for the splits that have pictures.

        The gallery's distractors (pid 0) are counted as images but not as an identity, as Market-1501 does.
        """
        splits = _by_split(self.records)
        return {
            split: (
                len({r.pid for r in splits[split] if split != "gallery" or r.pid != 0}),
                len(splits[split]),
                len({r.camid for r in splits[split]}),
            )
            for split in SPLITS
            if splits[split]
        }

    def table(self) -> str:
        """The counts, each beside the published ones where they are known, then the notes, as lines of text.

        Held-out people (aux) are counted with the train split in the comparison: they were taken from it.
        """
        counts = self.counts()
        whole = {split: (identities, images) for split, (identities, images, _) in counts.items()}
        if "aux" in whole:
            whole["train"] = tuple(a + b for a, b in zip(whole["train"], whole["aux"], strict=True))  # type: ignore[assignment]
        variants = _PUBLISHED.get(self.kind, {})
        # CUHK03-NP's two versions differ by a few boxes: compare with the one that agrees in more splits.
        agreeing = {name: sum(whole.get(s) == known for s, known in v.items()) for name, v in variants.items()}
        name = max(agreeing, key=lambda n: agreeing[n], default=None)
        published = variants[name] if name else {}
        lines = [f"{name or self.kind} at {self.root}", f"{'split':<11}{'identities':>11}{'images':>9}{'cameras':>9}"]
        for split, (identities, images, cameras) in counts.items():
            verdict = ""
            if split in published:
                known = published[split]
                together = " (train and aux together)" if split == "train" and "aux" in counts else ""
                verdict = "as published" if whole[split] == known else f"differs from {known[0]} / {known[1]} published"
                verdict = f"  {verdict}{together}"
            lines.append(f"{split:<11}{identities:>11}{images:>9}{cameras:>9}{verdict}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def read_catalog(kind: str, root: Path) -> Catalog:
    """Read the dataset of ``kind`` (one of :data:`KINDS`) under ``root``, a folder (or, for ``csv``, a CSV file).

    Raises ConfigError for an unknown kind, and a one-line DataError naming the folder, file or line for: a folder that
    is missing, empty or of another layout; a train, query or gallery split without pictures; a picture whose name
    doesn't say who it shows; a bad CSV or list; an identity in two of train, unlabelled, aux and test.
    """
    if kind not in _READERS:
        raise ConfigError(f"data.kind: {kind!r} is not one of {', '.join(KINDS)}")
    root = Path(root)
    if not root.exists():
        raise DataError(f"{root}: no such folder")
    if kind != "csv" and not root.is_dir():
        raise DataError(f"{root}: {kind} is a folder, this is a file")
    try:
        records, notes = _READERS[kind](root)
    except OSError as error:
        raise DataError(f"{error.filename or root}: can't be read: {error.strerror or error}") from None
    junk = sum(r.pid == -1 for r in records)
    if junk:
        notes = [*notes, f"dropped {junk} junk images (pid -1)"]
    kept = sorted((r for r in records if r.pid != -1), key=lambda r: (SPLITS.index(r.split), r.path))
    _check(root, kept)
    return Catalog(kind=kind, root=root, records=tuple(kept), notes=(*notes, *_findings(kept)))


def hold_out(catalog: Catalog, identities: int, seed: int) -> Catalog:
    """Move ``identities`` people of the train split to "aux", chosen by ``seed`` from the sorted train pids only.

    ConfigError naming ``data.aux_identities`` when fewer than two people would remain to train on.
    """
    pids = sorted({r.pid for r in catalog.records if r.split == "train"})
    if not 0 <= identities <= len(pids) - 2:
        raise ConfigError(
            f"data.aux_identities: {identities} of {len(pids)} train identities can't be held out; "
            "at least 2 must remain"
        )
    if identities == 0:
        return catalog
    chosen = set(np.random.default_rng([seed, _HOLD_OUT]).permutation(pids)[:identities].tolist())
    moved = [replace(r, split="aux") if r.split == "train" and r.pid in chosen else r for r in catalog.records]
    moved.sort(key=lambda r: (SPLITS.index(r.split), r.path))
    note = f"{identities} train identities held out for the attackers (aux), seed {seed}"
    return replace(catalog, records=tuple(moved), notes=(*catalog.notes, note))


def parse_name(layout: str, name: str) -> tuple[int, int] | None:
    """The two numbers in a picture's basename, None if it isn't of that layout.

    ``layout`` is "market" (pid, camera; also Occluded-Duke and CUHK03-NP), "msmt17" (pid, camera) or "viper"
    (pid, angle).
    """
    found = re.fullmatch(_NAMES[layout], name, re.IGNORECASE | re.ASCII)
    return (int(found[1]), int(found[2])) if found else None


def _parse(layout: str, path: Path) -> tuple[int, int]:
    numbers = parse_name(layout, path.name)
    if numbers is None:
        raise DataError(f"{str(path)!r}: the name isn't of the form {_EXAMPLES[layout]}")
    return numbers


def _by_split(records: Sequence[Record]) -> dict[str, list[Record]]:
    splits = defaultdict(list)
    for record in records:
        splits[record.split].append(record)
    return splits


def _check(root: Path, records: Sequence[Record]) -> None:
    splits = _by_split(records)
    for split in ("train", "query", "gallery"):
        if not splits[split]:
            raise DataError(f"{root}: the {split} split has no picture")
    if nobody := [r for r in splits["query"] if r.pid == 0]:
        raise DataError(f"{nobody[0].path}: a query with pid 0, which is for the gallery's distractors")
    members = {name: {r.pid: r.path for s in group for r in splits[s]} for name, group in _GROUPS.items()}
    for (one, first), (other, second) in combinations(members.items(), 2):
        if shared := sorted(first.keys() & second.keys()):
            raise DataError(f"{second[shared[0]]}: identity {shared[0]} is in {one} and in {other} as well")


def _findings(records: Sequence[Record]) -> Iterator[str]:
    """Notes on what is kept but is unlike what the field's protocols expect."""
    splits = _by_split(records)
    pictures = Counter(r.pid for r in splits["train"])
    cameras: dict[int, set[int]] = defaultdict(set)
    for r in splits["train"]:
        cameras[r.pid].add(r.camid)
    if single := sum(n == 1 for n in pictures.values()):
        yield f"train: {single} identities with a single image"
    if single := sum(len(c) == 1 for c in cameras.values()):
        yield f"train: {single} identities with a single camera"
    if distractors := sum(r.pid == 0 for r in splits["gallery"]):
        yield f"gallery: {distractors} distractors (pid 0), counted as images and not as an identity"
    seen: dict[int, set[int]] = defaultdict(set)
    for r in splits["gallery"]:
        seen[r.pid].add(r.camid)
    if lost := sum(not seen[r.pid] - {r.camid} for r in splits["query"]):
        yield f"query: {lost} images whose identity isn't in the gallery under another camera"


def _pictures(folder: Path, kind: str) -> list[Path]:
    """The picture files of a folder (Market-1501 has a Thumbs.db in each, macOS leaves ._ files)."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, so {folder.parent} isn't in the layout of {kind}")
    found = [p for p in folder.iterdir() if p.suffix.lower() in _PICTURES and not p.name.startswith(".")]
    if not found:
        raise DataError(f"{folder}: no pictures in it")
    return found


Read = tuple[list[Record], list[str]]


def _read_market(root: Path, kind: str) -> Read:
    records = []
    for folder, split in (("bounding_box_train", "train"), ("query", "query"), ("bounding_box_test", "gallery")):
        for path in _pictures(root / folder, kind):
            pid, camid = _parse("market", path)
            records.append(Record(path=path, pid=pid, camid=camid, split=split))
    return records, []


def _read_cuhk03(root: Path) -> Read:
    versions = [n for n in ("detected", "labeled", "labelled") if (root / n).is_dir()]
    if versions and not (root / "bounding_box_train").is_dir():
        raise DataError(
            f"{root}: holds {' and '.join(versions)}; name one of them as the folder, e.g. {root / versions[0]}"
        )
    return _read_market(root, "cuhk03-np")


def _read_msmt17(root: Path) -> Read:
    versions = {"V1": ("train", "test"), "V2": ("mask_train_v2", "mask_test_v2")}
    version = next((v for v, folders in versions.items() if all((root / f).is_dir() for f in folders)), None)
    if version is None:
        raise DataError(
            f"{root}: neither train and test (V1) nor mask_train_v2 and mask_test_v2 (V2) of msmt17 are in it"
        )
    train, test = (root / f for f in versions[version])
    records, validation = [], 0
    lists = (("train", "train", train), ("val", "train", train), ("query", "query", test), ("gallery", "gallery", test))
    for part, split, folder in lists:
        file = root / f"list_{part}.txt"
        for number, line in enumerate(_lines(file), 1):
            name, _, label = line.rpartition(" ")
            if not re.fullmatch("[0-9]{1,9}", label):
                raise DataError(f"{file} line {number}: {line!r} isn't a picture and its number")
            path = _inside(folder, name, f"{file} line {number}")
            pid = int(label) + (_MSMT17_TEST if folder is test else 0)
            records.append(Record(path=path, pid=pid, camid=_parse("msmt17", path)[1], split=split))
            validation += part == "val"
    shift = f"test identities are numbered from {_MSMT17_TEST}, the lists number them from 0 like those of train"
    return records, [f"MSMT17 {version}; the {validation} images of list_val count into train, as is usual", shift]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except UnicodeDecodeError:
        raise DataError(f"{file}: not UTF-8 text") from None


def _read_viper(root: Path) -> Read:
    found: list[tuple[Path, int, int]] = []
    for camid, folder in enumerate(("cam_a", "cam_b"), 1):
        # VIPeR numbers its people from 0, which is the distractors' number here.
        found += [(path, _parse("viper", path)[0] + 1, camid) for path in _pictures(root / folder, "viper")]
    pids = np.random.default_rng(_VIPER_SEED).permutation(sorted({pid for _, pid, _ in found}))
    train = set(pids[: len(pids) // 2].tolist())
    test = {1: "query", 2: "gallery"}
    records = [Record(path=p, pid=n, camid=c, split="train" if n in train else test[c]) for p, n, c in found]
    halves = (
        f"a random half of the identities is train (seed {_VIPER_SEED}); of the others cam_a is query, cam_b gallery"
    )
    return records, [
        f"{halves}; VIPeR results are usually means over several such halves",
        "identities are VIPeR's numbers plus 1",
    ]


def _inside(folder: Path, name: str, where: str) -> Path:
    """The file ``name`` of ``folder``; DataError starting with ``where`` unless it lies inside and exists.

    A list may come from anyone: it must not be able to pull in files from elsewhere on the machine.
    """
    relative = PurePosixPath(name)
    if not name or relative.is_absolute() or ".." in relative.parts:
        raise DataError(f"{where}: {name!r} must be a path below {folder}")
    try:
        real = Path(os.path.realpath(folder / relative, strict=True))
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {name!r}: {getattr(error, 'strerror', None) or error}") from None
    if not real.is_relative_to(os.path.realpath(folder)):
        raise DataError(f"{where}: {name!r} is a link that leaves {folder}")
    if not real.is_file():
        raise DataError(f"{where}: {name!r} is not a file")
    return folder / relative


def _read_csv(root: Path) -> Read:
    file = root / "index.csv" if root.is_dir() else root
    if not file.is_file():
        raise DataError(f"{file}: no such file; the csv kind is a CSV or a folder with an index.csv")
    records: list[Record] = []
    lines: dict[Path, int] = {}
    names: dict[str, int] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = list(reader.fieldnames or [])
            if missing := [c for c in ("path", "pid", "camid", "split") if c not in columns]:
                raise DataError(f"{file}: no column {', '.join(missing)} in its first line")
            if "" in columns or len(set(columns)) < len(columns):
                raise DataError(f"{file}: its first line names a column twice or leaves one unnamed")
            rows = [(reader.line_num, row) for row in reader]
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
    if row["split"] not in (*SPLITS, _TEST):
        raise DataError(f"{where}: split {row['split']!r} is not one of {', '.join(SPLITS)}, {_TEST}")
    return Record(
        path=_inside(file.parent, row["path"], where),
        mask=_inside(file.parent, row["mask"], where) if row.get("mask") else None,
        split=row["split"],
        attributes=tuple((k, v) for k, v in row.items() if k not in ("path", "pid", "camid", "split", "mask")),
        **numbers,
    )


_READERS: dict[str, Callable[[Path], Read]] = {
    "market1501": lambda root: _read_market(root, "market1501"),
    "occluded-duke": lambda root: _read_market(root, "occluded-duke"),
    "msmt17": _read_msmt17,
    "cuhk03-np": _read_cuhk03,
    "viper": _read_viper,
    "csv": _read_csv,
}
KINDS = tuple(_READERS)
