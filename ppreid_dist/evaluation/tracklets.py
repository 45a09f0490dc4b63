"""Entries of a gallery that hold several pictures: a tracklet's mean embedding, stored as one feature.

A tracklet is up to ``data.tracklet`` pictures of a person by one camera. What differs between them is averaged out, so
that a person's entries lie nearer to each other and people farther apart (multi-shot re-identification). T is applied
to the mean. An entry is shown, labelled and tested as its first picture, its head.

Shapes: N pictures, E entries, T pictures of the longest tracklet, D the embedding's dim, S the stored dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ppreid_dist.data.records import DISTRACTOR
from ppreid_dist.data.stream import Pictures
from ppreid_dist.evaluation.export import stored_features
from ppreid_dist.models.extractor import Extractor
from ppreid_dist.pixels import to_float


def tracklets(pids_N: np.ndarray, camids_N: np.ndarray, most: int, *, each: bool = False) -> np.ndarray:
    """(E, T): the rows of each entry's pictures, the head's first, -1 where a tracklet is shorter; by their heads.

    Each person's pictures by each camera, in their order, are parted into tracklets of ``most``, the last of what is
    left; distractors, who are no one person's, are entries of their own. With ``each`` every picture heads one, of
    itself and those after it, round and round: as many entries as pictures, for whoever may enrol what he has as he
    likes.
    """
    found: list[list[int]] = []
    groups: dict[tuple[int, int], list[int]] = {}
    for row, (pid, camid) in enumerate(zip(pids_N.tolist(), camids_N.tolist(), strict=True)):
        nobody = pid == DISTRACTOR and not each
        groups.setdefault((pid, ~row if nobody else camid), []).append(row)
    for rows in groups.values():
        if each:
            found += [[rows[(i + k) % len(rows)] for k in range(min(most, len(rows)))] for i in range(len(rows))]
        else:
            found += [rows[i : i + most] for i in range(0, len(rows), most)]
    return padded(sorted(found))


def padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """(E, T) of rows of different lengths, -1 behind the shorter ones."""
    longest = max(map(len, rows), default=1)
    return np.array([[*row, *[-1] * (longest - len(row))] for row in rows], np.int64).reshape(-1, longest)


@dataclass(frozen=True)
class Enrolment:
    """How pictures become entries: up to ``most`` of a person by a camera together."""

    most: int = 1

    def rows(self, pictures: Pictures, *, each: bool = False) -> np.ndarray:
        """(E, T), as :func:`tracklets` says."""
        return tracklets(pictures.pids_N, pictures.camids_N, self.most, each=each)

    def heads(self, pictures: Pictures) -> Pictures:
        """An entry each."""
        return pictures if self.most == 1 else pictures.only(self.rows(pictures)[:, 0])

    def stored(self, extractor: Extractor, pictures: Pictures, *, each: bool = False) -> Tensor:
        """(E, S) float32 on the extractor's device, which must be in eval mode: what it stores of each entry. ``each``:
        of each picture's, so that E is N."""
        if self.most == 1:
            return stored_features(extractor, pictures.images_N3HW)
        return stored_means(extractor, unit_embeddings(extractor, pictures.images_N3HW), self.rows(pictures, each=each))


@torch.no_grad()
def unit_embeddings(extractor: Extractor, images_N3HW: Tensor, *, batch: int = 256) -> Tensor:
    """(N, D) float32 on the extractor's device, of uint8 or float [0,1] pictures."""
    device = next(extractor.parameters()).device
    seen = [extractor(to_float(images.to(device))).embedding_BD.float() for images in images_N3HW.split(batch)]
    return F.normalize(torch.cat(seen), dim=1)


@torch.no_grad()
def stored_means(extractor: Extractor, unit_ND: Tensor, rows_ET: np.ndarray, *, batch: int = 256) -> Tensor:
    """(E, S): T of the mean of each entry's embeddings; -1 among the rows is none."""
    rows = torch.from_numpy(rows_ET).to(unit_ND.device)
    known_ET1 = (rows >= 0)[:, :, None]
    mean_ED = (unit_ND[rows.clamp_min(0)] * known_ET1).sum(1) / known_ET1.sum(1)
    return torch.cat([extractor.store(some).float() for some in mean_ED.split(batch)])
