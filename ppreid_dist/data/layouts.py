"""The field's layouts of folders: names of pictures and lists, read into records."""

import re
from pathlib import Path

import numpy as np

from ppreid_dist.data.records import Read, Record, inside
from ppreid_dist.errors import DataError

_PICTURES = (".jpg", ".jpeg", ".png", ".bmp")
_MSMT17_TEST = 10_000  # MSMT17 numbers its test people from 0 again
_VIPER_SEED = 0

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


def _pictures(folder: Path, kind: str) -> list[Path]:
    """The picture files of a folder (Market-1501 has a Thumbs.db in each, macOS leaves ._ files)."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, so {folder.parent} isn't in the layout of {kind}")
    found = [p for p in folder.iterdir() if p.suffix.lower() in _PICTURES and not p.name.startswith(".")]
    if not found:
        raise DataError(f"{folder}: no pictures in it")
    return found


def read_market(root: Path, kind: str) -> Read:
    records = []
    for folder, split in (("bounding_box_train", "train"), ("query", "query"), ("bounding_box_test", "gallery")):
        for path in _pictures(root / folder, kind):
            pid, camid = _parse("market", path)
            records.append(Record(path=path, pid=pid, camid=camid, split=split))
    return records, []


def read_cuhk03(root: Path) -> Read:
    versions = [n for n in ("detected", "labeled", "labelled") if (root / n).is_dir()]
    if versions and not (root / "bounding_box_train").is_dir():
        raise DataError(
            f"{root}: holds {' and '.join(versions)}; name one of them as the folder, e.g. {root / versions[0]}"
        )
    return read_market(root, "cuhk03-np")


def read_msmt17(root: Path) -> Read:
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
            path = inside(folder, name, f"{file} line {number}")
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


def read_viper(root: Path) -> Read:
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
