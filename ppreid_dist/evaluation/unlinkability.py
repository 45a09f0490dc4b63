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


def d_sys(mated_S: np.ndarray, others_S: np.ndarray) -> float:
    """From how many pairs lie in each bin: the sum over bins of the share of mated pairs times 2 P(mated | bin) − 1,
    where that is above 0. NaN without pairs of either kind."""
    if not mated_S.any() or not others_S.any():
        return float("nan")
    mated_S, others_S = mated_S / mated_S.sum(), others_S / others_S.sum()
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
    bin_AB = np.full(similarity_AB.shape, -1, np.int8)
    bin_AB[usable_AB] = into_bins(similarity_AB[usable_AB])
    every_S = np.bincount(bin_AB[usable_AB], minlength=BINS)
    people = np.unique(pids_B)
    rows = {pid: np.flatnonzero(pids_A == pid) for pid in people}
    columns = [np.flatnonzero(pids_B == pid) for pid in people]

    def of_labels(pids: np.ndarray) -> float:
        """With these in place of ``people``. It looks at mated pairs alone: of all there are too many to count anew."""
        mated = [bin_AB[rows[pid][:, None], of].ravel() for pid, of in zip(pids, columns, strict=True)]
        mated_S = np.bincount(np.concatenate(mated) + 1, minlength=BINS + 1)[1:]
        return d_sys(mated_S, every_S - mated_S)

    # Whole people, with all their entries: those of one person resemble each other, and single entries that change
    # hands would make chance look smaller than it is.
    rng = np.random.default_rng([seed, 0x11E])
    null = [of_labels(rng.permutation(people)) for _ in range(draws)]
    return Linkage(
        d_sys=of_labels(people),
        null=float(np.quantile(null, 0.95)),
        rank1=float(found_A[asked_A].mean()),
        chance=float((mated_AB.sum(1) / np.maximum(usable_AB.sum(1), 1))[asked_A].mean()),
    )
