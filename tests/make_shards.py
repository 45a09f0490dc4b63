"""Small data sets made for the tests of the data room."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from ppreid_dist.data.catalog import Catalog
from ppreid_dist.data.records import Record
from ppreid_dist.data.shards import ShardedSplit


def encode(pixels: np.ndarray, form: str = "JPEG", **options: object) -> bytes:
    """Of MPO two pictures, one behind the other."""
    stream = io.BytesIO()
    if form == "MPO":
        first, second = map(Image.fromarray, pixels)
        first.save(stream, form, save_all=True, append_images=[second], **options)
    else:
        Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def smooth(rng: np.random.Generator, height: int = 32, width: int = 16) -> np.ndarray:
    coarse = Image.fromarray(rng.integers(0, 256, (4, 2, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def make_catalog(
    folder: Path, *, people: int = 5, shots: int = 3, splits: tuple[str, ...] = ("train", "query"), masks: bool = True
) -> Catalog:
    """Pictures of all three formats on the disk, people numbered apart over the splits; sorted as a catalogue is."""
    rng, records = np.random.default_rng(0), []
    (folder / "pictures").mkdir(parents=True)
    for split in splits:
        for person in range(people):
            for shot in range(shots):
                name = f"{split} p{person}.{shot}"
                suffix, form = (("jpg", "JPEG"), ("png", "PNG"), ("bmp", "BMP"))[shot % 3]
                path = folder / "pictures" / f"{name}.{suffix}"
                path.write_bytes(encode(smooth(rng), form))
                mask = folder / "pictures" / f"{name}.mask.png" if masks else None
                if mask is not None:
                    person_HW = np.zeros((32, 16), np.uint8)
                    person_HW[:, : 4 + person] = 255
                    mask.write_bytes(encode(person_HW, "PNG"))
                pid = splits.index(split) * 1000 + person * 7 + 3
                attributes = (("coat", ("red", "blue, long")[person % 2]),)
                records.append(
                    Record(path=path, pid=pid, camid=shot + 1, split=split, mask=mask, attributes=attributes)
                )
    return Catalog(kind="csv", root=folder, records=tuple(records), notes=("made for a test",))


def part_of(split: ShardedSplit, rows: np.ndarray) -> ShardedSplit:
    """The samples ``rows`` (integers, or a flag for each) as a split of their own."""
    return ShardedSplit(split.name, split.index.take(np.arange(len(split))[rows]), split.tars)


def forget_settings(shards: Path) -> None:
    """As if the shards had been written before their settings were."""
    meta = json.loads((shards / "meta.json").read_text())
    del meta["settings"]
    (shards / "meta.json").write_text(json.dumps(meta))
