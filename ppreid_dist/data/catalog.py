"""What is in a dataset's folder: layouts of the field read into records, checked, and counted.

Records are sorted by split and path, so a catalogue doesn't depend on the order in which a file system lists a folder.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from ppreid_dist.data.csv_list import read_csv
from ppreid_dist.data.layouts import read_cuhk03, read_market, read_msmt17, read_viper
from ppreid_dist.data.records import DISTRACTOR, SPLITS, Read, Record
from ppreid_dist.errors import ConfigError, DataError

_GROUPS = {"train": ("train",), "unlabelled": ("unlabelled",), "aux": ("aux",), "query/gallery": ("query", "gallery")}
_HOLD_OUT = 1  # the tag of this draw among all that derive from a seed

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
                len({r.pid for r in splits[split] if split != "gallery" or r.pid != DISTRACTOR}),
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
        raise DataError(f"{root}: no such {'file' if kind == 'csv' else 'folder'} (data.root)")
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
    if nobody := [r for r in splits["query"] if r.pid == DISTRACTOR]:
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
    if distractors := sum(r.pid == DISTRACTOR for r in splits["gallery"]):
        yield f"gallery: {distractors} distractors (pid 0), counted as images and not as an identity"
    seen: dict[int, set[int]] = defaultdict(set)
    for r in splits["gallery"]:
        seen[r.pid].add(r.camid)
    if lost := sum(not seen[r.pid] - {r.camid} for r in splits["query"]):
        yield f"query: {lost} images whose identity isn't in the gallery under another camera"


_READERS: dict[str, Callable[[Path], Read]] = {
    "market1501": lambda root: read_market(root, "market1501"),
    "occluded-duke": lambda root: read_market(root, "occluded-duke"),
    "msmt17": read_msmt17,
    "cuhk03-np": read_cuhk03,
    "viper": read_viper,
    "csv": read_csv,
}
KINDS = tuple(_READERS)
