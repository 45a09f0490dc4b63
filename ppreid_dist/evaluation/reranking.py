"""k-reciprocal re-ranking (Zhong et al., CVPR 2017), without a matrix of all distances.

Two pictures that have each other among their nearest belong together more surely than their distance says. Each picture
is encoded by its k-reciprocal neighbours, and the Jaccard distance of two codes is mixed with the distance of the
features. Codes are sparse: memory is that of the features, of some hundred numbers a picture, and of one tile.

It uses all queries at once, as that paper does: a protocol of its own, and never the one of mAP elsewhere here.

Shapes: Q queries, G gallery items, N = Q + G, D feature, K neighbours, P pairs.
"""

from dataclasses import dataclass
from math import floor

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ppreid_dist.errors import ConfigError
from ppreid_dist.evaluation.ranking import Entries, Positives, Ranking, ranking

PAIRS = 2**16  # whose distances are computed at once


@dataclass(frozen=True, kw_only=True)
class Reranking:
    """The paper's names and values: ``k1`` reciprocal neighbours, ``k2`` for the query expansion, ``lambda_value`` the
    weight of the features' own distance (1 leaves the order as it is)."""

    k1: int = 20
    k2: int = 6
    lambda_value: float = 0.3

    def __post_init__(self) -> None:
        if self.k1 < 1 or self.k2 < 1 or not 0 <= self.lambda_value <= 1:
            raise ConfigError("rerank: k1 and k2 must be at least 1, lambda_value between 0 and 1")


@torch.no_grad()
def rerank(queries: Entries, gallery: Entries, config: Reranking = Reranking(), *, chunk: int = 256) -> Ranking:
    """Rank the whole gallery for every query by the mixed distance; junk is removed as in ``evaluation.ranking``.

    Features lie on one device, where ``chunk`` x N similarities are held at a time; the codes are made on the CPU.
    """
    x_ND = torch.cat([queries.unit(slice(None)), gallery.unit(slice(None))])
    near_NK, farthest_N = _neighbours(x_ND, config.k1 + 1, chunk)
    codes_NN = _codes(x_ND, near_NK, farthest_N, config)
    size = len(queries.pids_N)
    of_gallery_NG = codes_NN[size:].T.tocsr()  # by place: who has it in their code
    found, nearer = [], []  # of each query: its positives' places, and how many items are nearer
    for q in range(0, size, chunk):
        rows = slice(q, min(q + chunk, size))
        own_QG = (_distances(x_ND[rows], x_ND[size:]) / farthest_N[rows, None]).cpu().numpy()
        for row, own_G in zip(range(rows.start, rows.stop), own_QG, strict=True):
            shared_G = _shared(codes_NN[row], of_gallery_NG)
            mixed_G = config.lambda_value * own_G + (1 - config.lambda_value) * (1 - shared_G / (2 - shared_G))
            same_G = gallery.pids_N == queries.pids_N[row]
            kept = np.flatnonzero(~(same_G & (gallery.camids_N == queries.camids_N[row])))
            order = kept[np.argsort(mixed_G[kept], kind="stable")]
            nearer.append(np.flatnonzero(same_G[order]))
            found.append(order[nearer[-1]])
    item_P, nearer_P = (np.concatenate([np.empty(0, np.int64), *each]) for each in (found, nearer))
    query_P = np.repeat(np.arange(size), [len(each) for each in found])
    # Their order is that of the mixed distance, which has no whole number to stand here.
    positives = Positives(query_P=query_P, item_P=item_P, similarity_P=-nearer_P)
    return ranking(size, positives, nearer_P)


def _distances(a_ND: Tensor, b_VD: Tensor) -> Tensor:
    """Squared, of vectors of length 1."""
    return (2 - 2 * a_ND @ b_VD.T).clamp_min_(0)


def _neighbours(x_ND: Tensor, count: int, chunk: int) -> tuple[np.ndarray, Tensor]:
    """(N, K) places, nearest first, oneself the first of them; and the distance of each row's farthest."""
    near, farthest = [], []
    for first in range(0, len(x_ND), chunk):
        distance_BN = _distances(x_ND[first : first + chunk], x_ND)
        farthest.append(distance_BN.amax(1).clamp_min(1e-12))
        rows_B = torch.arange(len(distance_BN), device=x_ND.device)
        distance_BN[rows_B, rows_B + first] = -1
        near.append(distance_BN.topk(min(count, len(x_ND)), largest=False).indices.cpu())
    return torch.cat(near).numpy(), torch.cat(farthest)


def _indicator(near_NK: np.ndarray) -> sparse.csr_matrix:
    size, count = near_NK.shape
    ones = np.ones(near_NK.size, np.float32)
    return sparse.csr_matrix((ones, near_NK.ravel(), np.arange(size + 1) * count), (size, size))


def _reciprocal(near_NK: np.ndarray) -> sparse.csr_matrix:
    """Who are among each other's nearest."""
    forward_NN = _indicator(near_NK)
    return forward_NN.multiply(forward_NN.T).tocsr()


def _codes(x_ND: Tensor, near_NK: np.ndarray, farthest_N: Tensor, config: Reranking) -> sparse.csr_matrix:
    """(N, N): how much each picture is one of another's neighbours; a row sums to 1."""
    mutual_NN = _reciprocal(near_NK)
    half = floor(config.k1 / 2 + 0.5) + 1
    tight_NN = _reciprocal(near_NK[:, :half])
    # A neighbour brings its own half as many neighbours where more than two thirds of those are mine already.
    known_NN = (mutual_NN @ tight_NN.T).multiply(mutual_NN).tocoo()
    brings = known_NN.data > 2 / 3 * np.asarray(tight_NN.sum(1)).ravel()[known_NN.col]
    brought_NN = sparse.csr_matrix(
        (known_NN.data[brings], (known_NN.row[brings], known_NN.col[brings])), mutual_NN.shape
    )
    all_NN = (mutual_NN + brought_NN @ tight_NN).tocoo()
    row_P, item_P = (torch.from_numpy(places.astype(np.int64)).to(x_ND.device) for places in (all_NN.row, all_NN.col))
    similar = [
        (x_ND[rows] * x_ND[items]).sum(1) for rows, items in zip(row_P.split(PAIRS), item_P.split(PAIRS), strict=True)
    ]
    distance_P = (2 - 2 * torch.cat(similar)).clamp_min_(0) / farthest_N[row_P]
    codes_NN = sparse.csr_matrix((torch.exp(-distance_P).cpu().numpy(), (all_NN.row, all_NN.col)), mutual_NN.shape)
    codes_NN = sparse.diags(1 / np.asarray(codes_NN.sum(1)).ravel()) @ codes_NN
    if config.k2 > 1:
        some_NK = near_NK[:, : config.k2]
        codes_NN = _indicator(some_NK) @ codes_NN / some_NK.shape[1]
    return codes_NN.tocsr()


def _shared(code_1N: sparse.csr_matrix, of_gallery_NG: sparse.csr_matrix) -> np.ndarray:
    """(G,): the sum of the smaller of both weights over all places of a code."""
    known_KG = of_gallery_NG[code_1N.indices]
    smaller = np.minimum(known_KG.data, np.repeat(code_1N.data, np.diff(known_KG.indptr)))
    return np.bincount(known_KG.indices, smaller, minlength=known_KG.shape[1])
