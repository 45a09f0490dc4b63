"""What is known of some features, handed on to others along near ones.

Attackers know how their own people look. In a graph of all features that they have, their own and the stolen ones,
each joined with its nearest, everybody else's looks are taken for the mean of their neighbours' (harmonic functions;
Zhu, Ghahramani and Lafferty, ICML 2003). It needs no distance but the nearest, which whoever can match keeps.

Shapes: L features of the pool, A of them known, D feature dim, K numbers known of each.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from scipy import sparse

HELD = 10.0  # times as fast is what is known held as all neighbours together pull
LOOSE = 1e-6  # pull to the mean, relative to the neighbours', of who is joined with nobody known


def propagated(pool_LD: Tensor, known_A: np.ndarray, values_AK: Tensor, neighbours: int) -> Tensor:
    """(L, K) float32 of the whole pool, the mean of ``values_AK``, those of the rows ``known_A``, being 0."""
    from scipy import sparse  # half a second of every command's start
    from scipy.sparse.linalg import cg

    joined_LL = _joined(F.normalize(pool_LD.float(), dim=1), min(neighbours, len(pool_LD) - 1))
    pull_L = np.asarray(joined_LL.sum(1)).ravel().clip(1e-12)
    held_L = np.zeros(len(pull_L))
    held_L[known_A] = HELD * pull_L[known_A]
    diagonal_L = pull_L * (1 + LOOSE) + held_L
    system_LL = (sparse.diags(diagonal_L) - joined_LL).tocsr()
    values_AK = (values_AK - values_AK.mean(0)).double().cpu()
    places_LK = np.zeros((len(pull_L), values_AK.shape[1]))
    for column_L, value_A in zip(places_LK.T, values_AK.numpy().T, strict=True):
        right_L = np.zeros(len(pull_L))
        right_L[known_A] = held_L[known_A] * value_A
        column_L[:] = cg(system_LL, right_L, rtol=1e-5, maxiter=2000, M=sparse.diags(1 / diagonal_L))[0]
    return torch.from_numpy(places_LK).float().to(pool_LD.device)


def _joined(unit_LD: Tensor, neighbours: int) -> "sparse.csr_matrix":
    """(L, L), symmetric: the cosine of two features of which one is among the nearest of the other."""
    from scipy import sparse

    rows, columns, cosines = [], [], []
    for first in range(0, len(unit_LD), 1024):
        cosine_BL = unit_LD[first : first + 1024] @ unit_LD.T
        rows_B = torch.arange(len(cosine_BL), device=unit_LD.device)
        cosine_BL[rows_B, rows_B + first] = -2
        cosine_BK, nearest_BK = cosine_BL.topk(neighbours)
        rows.append((rows_B + first)[:, None].expand_as(nearest_BK).flatten().cpu().numpy())
        columns.append(nearest_BK.flatten().cpu().numpy())
        cosines.append(cosine_BK.clamp_min(1e-6).flatten().double().cpu().numpy())
    parts = np.concatenate(cosines), (np.concatenate(rows), np.concatenate(columns))
    nearest_LL = sparse.csr_matrix(parts, (len(unit_LD), len(unit_LD)))
    return nearest_LL.maximum(nearest_LL.T).tocsr()
