"""The dataset of a configuration: where its pictures are, how they become shards, which splits train."""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ppreid_dist.data.augment import AugmentConfig
from ppreid_dist.data.catalog import KINDS, hold_out, read_catalog
from ppreid_dist.data.index import read_meta
from ppreid_dist.data.records import SPLITS
from ppreid_dist.data.shard_writer import write_shards
from ppreid_dist.data.shards import ShardedSplit, join_splits
from ppreid_dist.data.stream import Pictures, StreamConfig, load_pictures
from ppreid_dist.data.synthetic import SyntheticConfig, render
from ppreid_dist.errors import ConfigError, DataError
from ppreid_dist.settings import Settings, option, to_dict

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DataConfig(Settings):
    kind: str = option(
        "synthetic", "layout of the pictures' folder; synthetic renders them", choices=("synthetic", *KINDS)
    )
    root: str = option("data/synthetic", "the pictures' folder, or a CSV file")
    shards: str = option("data/synthetic-shards", "the folder that `ppreid shards` writes and training reads")
    remote: str = option(
        "",
        "where the shards that training streams lie, if not there: a folder, or what webdataset reads from and the "
        "shard's name is put behind (https://host/folder/, file:/folder/, `pipe:curl -s https://host/folder/`); for "
        "data.stream.placement=webdataset",
    )
    images_per_shard: int = option(4096, "pictures in a shard", at_least=1)
    aux_identities: int = option(
        0, "training people set apart for the attackers; 0 where the data names its own", at_least=0
    )
    split_seed: int = option(0, "which people are set apart", at_least=0)
    train_splits: list[str] = option(["train"], "what the extractor trains on", choices=SPLITS)
    height: int = option(256, "pixels of the extractor's input", at_least=16)
    width: int = option(128, "pixels of the extractor's input", at_least=8)
    identities_per_batch: int = option(16, "P, people in a batch, over all ranks", at_least=2)
    pictures_per_identity: int = option(4, "K, pictures of each", at_least=2)
    tracklet: int = option(
        1,
        "pictures of a person by one camera that query and gallery hold as one entry, their mean embedding, at most; "
        "1: each picture is one",
        at_least=1,
    )
    strangers_split: str = option(
        "train", "where the privacy loss takes its strangers", choices=("train", "unlabelled")
    )
    synthetic: SyntheticConfig = option(SyntheticConfig(), "")
    stream: StreamConfig = option(StreamConfig(), "")
    augment: AugmentConfig = option(AugmentConfig(), "")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.root, self.shards = os.path.expanduser(self.root), os.path.expanduser(self.shards)
        self.remote = os.path.expanduser(self.remote)
        if self.remote and self.stream.placement != "webdataset":
            raise ConfigError(
                f"remote: shards elsewhere are streamed: it needs data.stream.placement=webdataset, not "
                f"{self.stream.placement}"
            )
        if self.kind == "synthetic" and self.aux_identities:
            raise ConfigError("aux_identities: synthetic people are set apart by data.synthetic.aux")

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width


def prepare_shards(config: DataConfig, *, progress: bool = True) -> str:
    """Render or read the pictures and write their shards, unless they are there; returns the table of counts."""
    root = Path(config.root)
    if config.kind == "synthetic":
        render(root, config.synthetic, progress=progress)
    catalog = read_catalog("csv" if config.kind == "synthetic" else config.kind, root)
    if config.aux_identities:
        catalog = hold_out(catalog, config.aux_identities, config.split_seed)
    write_shards(
        catalog,
        Path(config.shards),
        images_per_shard=config.images_per_shard,
        seed=config.split_seed,
        settings=_shaping(config),
        progress=progress,
    )
    _check_settings(config)
    if "aux" not in catalog.counts():
        _log.warning("%s: no split 'aux': %s", config.shards, _how_to_aux(config))
    return replace(catalog, kind=config.kind).table()


def _how_to_aux(config: DataConfig) -> str:
    """It is wanted only when all is trained; then the extractors already know the people."""
    ways = {"synthetic": "data.synthetic.aux=N", "csv": "data.aux_identities=N, or rows of the split aux in the CSV"}
    return (
        f"the attackers of `ppreid attack` need people whom no extractor was trained on: "
        f"{ways.get(config.kind, 'data.aux_identities=N')}, and shards in another folder, before training"
    )


def _shaping(config: DataConfig) -> dict[str, Any]:
    """The settings that decide what the shards hold, by their full keys."""
    shaping = {f"data.{key}": getattr(config, key) for key in ("kind", "aux_identities", "split_seed")}
    if config.kind == "synthetic":
        shaping |= {f"data.synthetic.{key}": value for key, value in to_dict(config.synthetic).items()}
    return shaping


def _check_settings(config: DataConfig) -> None:
    """DataError where the shards were written with other settings; of older ones it isn't known."""
    folder = Path(config.shards)
    meta = read_meta(folder)
    written = meta.get("settings", {})
    if not written and meta.get("kind", "csv") != "csv":  # as older shards of synthetic people say too
        written = {"data.kind": meta["kind"]}
    for key, value in _shaping(config).items():
        if written.get(key, value) != value:
            raise DataError(
                f"{folder}: its shards were written with {key}={written[key]}, not with {value}; set it so, or name "
                f"another folder by data.shards and write it by `ppreid shards`"
            )


def is_synthetic(config: DataConfig) -> bool:
    """Whether the people on the shards' pictures are rendered, as the shards themselves say: a setting may be wrong."""
    return bool(read_meta(Path(config.shards)).get("settings", {}).get("data.kind") == "synthetic")


def open_split(config: DataConfig, split: str, *, streamed: bool = False) -> ShardedSplit:
    """A split of the configuration's shards; if it is to be ``streamed``, those in ``data.remote``, where that is set.

    DataError naming the folder and the command that writes it, if there are none, or if they were written with other
    settings.
    """
    folder = Path(config.shards)
    if not (folder / "meta.json").is_file():
        raise DataError(f"{folder}: no shards there; write them by `ppreid shards --config …`")
    _check_settings(config)
    if split == "aux" and split not in read_meta(folder)["splits"]:
        raise DataError(f"{folder}: has no split 'aux': {_how_to_aux(config)}")
    remote = f"{config.remote.rstrip('/')}/" if streamed and config.remote else ""
    return ShardedSplit.open(folder, split, remote=remote)


def load_split(
    config: DataConfig, split: str, size: tuple[int, int], device: torch.device | str, *, progress: bool
) -> Pictures:
    """All pictures of a split, decoded to ``size`` (height, width) on the device. DataError as :func:`open_split`."""
    backend = config.stream.backend
    return load_pictures(open_split(config, split), size, backend=backend, device=device, progress=progress)


def open_training(config: DataConfig, *, streamed: bool = True) -> ShardedSplit:
    """What the extractor trains on. ``streamed``: as in :func:`open_split`; to be read at random it mustn't be."""
    return join_splits([open_split(config, split, streamed=streamed) for split in config.train_splits])
