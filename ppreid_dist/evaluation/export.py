"""Stored features of pictures: what a gallery keeps, and all that attackers get."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ppreid_dist.data.stream import Pictures
from ppreid_dist.evaluation.ranking import Entries, Ranking, rank_queries
from ppreid_dist.files import sha256_of, write_tensors, write_text
from ppreid_dist.models.store import KINDS
from ppreid_dist.models.stores.base import PUBLIC_KEY, StoreConfig
from ppreid_dist.pixels import to_float
from ppreid_dist.settings import Settings

if TYPE_CHECKING:
    from ppreid_dist.evaluation.reranking import Reranking

_MODEL = ("extractor.safetensors", "extractor.json", "backbone/config.json")  # as models.folder writes them


@torch.no_grad()
def stored_features(extractor: nn.Module, images_N3HW: Tensor, *, batch: int = 256) -> Tensor:
    """T(E(x)) of uint8 or float [0,1] pictures, (N, D) float32 on their device; the extractor must be in eval mode."""
    device = next(extractor.parameters()).device
    parts = []
    for x in images_N3HW.split(batch):
        x = x.to(device)
        parts.append(extractor(to_float(x)).stored_BD.float())
    return torch.cat(parts)


def rank_split(query_QD: Tensor, gallery_GD: Tensor, query: Pictures, gallery: Pictures) -> Ranking:
    """Ranking of the gallery for every query; same person and same camera left out."""
    return rank_queries(
        query_QD,
        gallery_GD,
        query_pids=query.pids_N,
        gallery_pids=gallery.pids_N,
        query_camids=query.camids_N,
        gallery_camids=gallery.camids_N,
    )


def rerank_split(
    query_QD: Tensor, gallery_GD: Tensor, query: Pictures, gallery: Pictures, config: "Reranking | None" = None
) -> Ranking:
    """The same after k-reciprocal re-ranking, by its authors' values if no others are given."""
    from ppreid_dist.evaluation.reranking import Reranking, rerank  # SciPy is half a second of every command's start

    return rerank(
        Entries(features_ND=query_QD, pids_N=query.pids_N, camids_N=query.camids_N),
        Entries(features_ND=gallery_GD, pids_N=gallery.pids_N, camids_N=gallery.camids_N),
        config or Reranking(),
    )


def stored_in_words(config: StoreConfig) -> str:
    """As ``codes (dim 4096, axes 32, width 0.6, spectrum gaussian, public key), int8``: the settings that the kind has,
    but for a 0 that means all, and of a key only whether it is the public one."""
    chosen = _in_words(config, KINDS[config.kind].uses)
    return config.in_words.replace(config.kind, f"{config.kind} ({chosen})", 1) if chosen else config.in_words


def _in_words(settings: Settings, names: Iterable[str]) -> str:
    parts = []
    for name in names:
        value = getattr(settings, name)
        if name == "key":
            parts.append("public key" if value == PUBLIC_KEY else "key of its own")
        elif isinstance(value, Settings):
            parts.append(f"{name} ({_in_words(value, [field.name for field in fields(value)])})")
        elif isinstance(value, tuple):
            parts.append(f"{name} {'×'.join(map(str, value))}")
        elif value:
            parts.append(f"{name} {value}")
    return ", ".join(parts)


def provenance(model: Path, config: StoreConfig) -> dict[str, str]:
    """Where stored features come from: ``model``, a SHA-256 of all of the folder ``model``, and how they are
    ``stored``, in words.

    The digest differs between keys, too. Whoever could guess a key by it has the weights, and could by what is stored.
    """
    sums = "".join(f"{sha256_of(model / name)}  {name}\n" for name in _MODEL)
    return {"model": hashlib.sha256(sums.encode()).hexdigest(), "stored": stored_in_words(config)}


def save_features(file: Path, tensors: Mapping[str, Tensor], keys: Sequence[object], about: Mapping[str, str]) -> None:
    """Write FILE.safetensors (``features``, what belongs to them, and :func:`provenance` as its metadata's ``about``)
    and beside it FILE.keys.txt (a key a line)."""
    write_text(file.with_suffix(".keys.txt"), "".join(f"{key}\n" for key in keys))
    write_tensors(file, tensors, about=about)


def save_split(folder: Path, split: str, features_ND: Tensor, pictures: Pictures, about: Mapping[str, str]) -> None:
    """The same of a split, SPLIT.safetensors in ``folder``, with its pids and camids."""
    labels = {"pids": torch.from_numpy(pictures.pids_N), "camids": torch.from_numpy(pictures.camids_N)}
    save_features(folder / f"{split}.safetensors", {"features": features_ND, **labels}, pictures.keys, about)
