"""Who judges on the identity axes, and whether they can: what a judge reaches on real pictures, beside chance.

Shapes: Q query pictures, G gallery pictures, D feature dim, h w pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppreid_dist.data.stream import Pictures
from ppreid_dist.evaluation.ranking import Ranking, rank_queries
from ppreid_dist.pixels import to_float

WEAK_JUDGE = 3.0  # times chance
Look = Callable[[Tensor], Tensor]  # float pictures (N,3,h,w) in [0,1], of any size → features (N,D)
Labels = tuple[np.ndarray, np.ndarray]  # pids and camids


@dataclass(frozen=True, kw_only=True)
class Judge:
    """An independent ReID model, how it sees the real gallery, and a ``note`` on what it is.

    ``name`` tells it from other judges. Features are compared by their cosine.
    """

    name: str
    look: Look
    gallery_GD: Tensor
    note: str

    def rank(self, images_Q3hw: Tensor, query: Labels, gallery: Labels) -> Ranking:
        """How it finds the people of ``query``, from these pictures (uint8) of them, in the gallery of real ones."""
        with torch.no_grad():
            judged_QD = torch.cat([self.look(to_float(part)) for part in images_Q3hw.split(256)])
        return rank_queries(
            judged_QD,
            self.gallery_GD.to(judged_QD.device),
            query_pids=query[0],
            gallery_pids=gallery[0],
            query_camids=query[1],
            gallery_camids=gallery[1],
        )


def identity_axes(judges: Sequence[Judge]) -> dict[str, Judge]:
    """The axis that each judge has: ``identity``, ``identity_2``, ``identity_3``, …"""
    return {f"identity_{i}" if i > 1 else "identity": judge for i, judge in enumerate(judges, 1)}


def chance_ap(positives: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The mean average precision of a random ranking with so many positives (at least 1) among so many candidates.

    Exact: an item at rank k is a positive with chance R/N, and then each of the k − 1 before it with (R − 1)/(N − 1).
    """
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, candidates.max() + 1))])[candidates]
    others = (positives - 1) / np.maximum(candidates - 1, 1)
    return (harmonic + others * (candidates - harmonic)) / candidates


def chance_of(query: Pictures, pids: np.ndarray, camids: np.ndarray) -> np.ndarray:
    """The average precision of a random ranking of the gallery's ``pids`` and ``camids`` at each query picture, NaN
    where its person isn't there."""
    chance_Q = np.full(len(query.pids_N), np.nan)
    for q, (pid, camid) in enumerate(zip(query.pids_N, query.camids_N, strict=True)):
        person, camera = pids == pid, camids == camid
        if positives := np.sum(person & ~camera):
            chance_Q[q] = chance_ap(np.array([positives]), np.array([np.sum(~(person & camera))]))[0]
    return chance_Q


def judge_quality(judge: Judge, query: Pictures, gallery: Labels, chance_Q: np.ndarray) -> dict[str, float]:
    """The judge's mAP and rank-1 on the real query pictures, and the mAP of chance (``chance_of``)."""
    summary = judge.rank(query.images_N3HW, (query.pids_N, query.camids_N), gallery).summary()
    return {"mAP": summary["mAP"], "rank1": summary["rank1"], "chance": float(np.nanmean(chance_Q))}


def weak_judges(
    judges: Mapping[str, Judge], quality: Mapping[str, Mapping[str, float]], control_mAP: float
) -> list[str]:
    """A line for every judge that hardly does better on real pictures than chance, and for one that does worse than the
    control: it overlooks people whom the extractor itself still knows. ``judges`` and ``quality`` by axis."""
    lines = []
    for axis, found in quality.items():
        reached = f"mAP {found['mAP']:.3f} on real pictures"
        if found["mAP"] < WEAK_JUDGE * found["chance"]:
            lines.append(
                f"the judge {judges[axis].name} is weak: {reached}, chance is {found['chance']:.3f}; the axis {axis} "
                "says little"
            )
        elif found["mAP"] < control_mAP:
            lines.append(
                f"the judge {judges[axis].name} is weaker than the control: {reached}, {control_mAP:.3f} the control; "
                "a better one may find more"
            )
    return lines
