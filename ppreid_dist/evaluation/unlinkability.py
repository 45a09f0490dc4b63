"""Linkability of two databases: D_sys, and how often the nearest neighbour is the same person.

D_sys (Gomez-Barrero et al., IEEE TIFS 2018, as ISO/IEC 30136 has it, at equal priors) compares how similar entries of
the same person are across the databases (mated) with entries of different people: 0 where nothing tells them apart, 1
where everything does. Estimated from a finite sample it is above 0 even then, so the same estimate with people permuted
stands beside it.

Shapes: A entries of one database, B of the other, P pairs, S bins.
"""

from dataclasses import dataclass

import numpy as np

BINS = 50


@dataclass(frozen=True, kw_only=True)
class Linkage:
    """``rank1``: of the entries with a mate, the share whose nearest entry is one; ``chance`` is a random choice's.
    ``null``: what D_sys stays below in 95 % of the permutations."""

    d_sys: float
    null: float
    rank1: float
    chance: float


def into_bins(similarity_P: np.ndarray) -> np.ndarray:
    """The bin of each, so that all bins hold equally many."""
    return np.searchsorted(np.quantile(similarity_P, np.arange(1, BINS) / BINS), similarity_P)


def d_sys(mated: np.ndarray, others: np.ndarray) -> float:
    """From the bins that pairs lie in: the sum over bins of the share of mated pairs times 2 P(mated | bin) − 1, where
    that is above 0. NaN without pairs of either kind."""
    if not len(mated) or not len(others):
        return float("nan")
    mated_S, others_S = (np.bincount(of, minlength=BINS) / len(of) for of in (mated, others))
    total_S = mated_S + others_S
    known_S = np.divide(mated_S - others_S, total_S, out=np.zeros_like(total_S), where=total_S > 0)
    return float((mated_S * known_S.clip(0)).sum())


def linkage(
    similarity_AB: np.ndarray, pids_A: np.ndarray, pids_B: np.ndarray, usable_AB: np.ndarray, *, draws: int, seed: int
) -> Linkage | None:
    """What similarities tell of who is who; pairs that aren't ``usable_AB`` don't count. None without mated pairs."""
    same_AB = pids_A[:, None] == pids_B[None, :]
    mated_AB = same_AB & usable_AB
    asked_A = mated_AB.any(1)
    if not asked_A.any() or not (~same_AB & usable_AB).any():
        return None
    open_AB = np.where(usable_AB, similarity_AB, -np.inf)
    found_A = mated_AB[np.arange(len(pids_A)), open_AB.argmax(1)]
    bin_P = into_bins(similarity_AB[usable_AB])

    def of_labels(pids_B: np.ndarray) -> float:
        same_P = (pids_A[:, None] == pids_B[None, :])[usable_AB]
        return d_sys(bin_P[same_P], bin_P[~same_P])

    # Whole people, with all their entries: those of one person resemble each other, and single entries that change
    # hands would make chance look smaller than it is.
    rng, (people, person_B) = np.random.default_rng([seed, 0x11E]), np.unique(pids_B, return_inverse=True)
    null = [of_labels(rng.permutation(people)[person_B]) for _ in range(draws)]
    return Linkage(
        d_sys=of_labels(pids_B),
        null=float(np.quantile(null, 0.95)),
        rank1=float(found_A[asked_A].mean()),
        chance=float((mated_AB.sum(1) / np.maximum(usable_AB.sum(1), 1))[asked_A].mean()),
    )
