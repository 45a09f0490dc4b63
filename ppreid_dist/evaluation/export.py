"""Stored features of pictures: what a gallery keeps, and all that attackers get."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ppreid_dist.data.stream import Pictures
from ppreid_dist.evaluation.ranking import Entries, Ranking, rank_queries
from ppreid_dist.files import write_tensors, write_text
from ppreid_dist.pixels import to_float

if TYPE_CHECKING:
    from ppreid_dist.evaluation.reranking import Reranking


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


def save_features(file: Path, features_ND: Tensor, keys: Sequence[object], **labels_N: Tensor) -> None:
    """Write FILE.safetensors (``features`` and what labels them) and beside it FILE.keys.txt (a key a line)."""
    write_text(file.with_suffix(".keys.txt"), "".join(f"{key}\n" for key in keys))
    write_tensors(file, {"features": features_ND, **labels_N})


def save_split(folder: Path, split: str, features_ND: Tensor, pictures: Pictures) -> None:
    """The same of a split, SPLIT.safetensors in ``folder``, with its pids and camids."""
    labels = {"pids": torch.from_numpy(pictures.pids_N), "camids": torch.from_numpy(pictures.camids_N)}
    save_features(folder / f"{split}.safetensors", features_ND, pictures.keys, **labels)
