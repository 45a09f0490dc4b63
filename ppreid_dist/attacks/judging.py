"""Whether the judge of the identity axis can judge: what it reaches on real pictures, beside chance."""

import numpy as np

from ppreid_dist.attacks.bench import Bench
from ppreid_dist.data.stream import Pictures

WEAK_JUDGE = 3.0  # times chance


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


def judge_quality(bench: Bench) -> tuple[dict[str, float], list[str]]:
    """The judge's mAP and rank-1 on the real query pictures, beside chance, and a note where it is weak."""
    query, (_, pids, camids) = bench.query, bench.gallery
    ranking = bench.rank(query.images_N3HW, np.arange(len(query.pids_N)))
    found = np.flatnonzero(~np.isnan(ranking.ap_Q))
    same = [(pids == query.pids_N[q], camids == query.camids_N[q]) for q in found]
    positives = np.array([np.sum(person & ~camera) for person, camera in same])
    candidates = np.array([np.sum(~(person & camera)) for person, camera in same])
    summary, chance = ranking.summary(), float(chance_ap(positives, candidates).mean())
    notes = []
    if summary["mAP"] < WEAK_JUDGE * chance:
        notes.append(
            f"the judge is weak: mAP {summary['mAP']:.3f} on real pictures, chance is {chance:.3f}; "
            "the identity axis says little"
        )
    return {"mAP": summary["mAP"], "rank1": summary["rank1"], "chance": chance}, notes
