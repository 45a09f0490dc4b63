"""What a key is worth: a stolen database read by somebody who has the extractor and has enrolled a few people.

Whoever has the extractor, and not the key, makes the features of all his pictures himself, as they are before the key
hides them. The stolen database is a cloud of the same kind, turned by the secret; of codes positions are found first
(``attacks.unfolded``, ``attacks.waves``), which no key and no pair is needed for. One cloud is laid onto the other by
the rotation or reflection that suits the pictures of the few people whom he has enrolled under the key (Schönemann,
Psychometrika 1966), and then, by optimal transport, all others too (Wasserstein Procrustes; Grave, Joulin and Berthet,
AISTATS 2019). What is stolen then reads like features that he has decoders for.

Shapes: L entries of the stolen database, P of these and of the enrolled, E pictures of enrolled people, N pictures of
his own, D plain dim, S stored dim, K directions, X and Y points of two clouds.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ppreid_dist.attacks.isomap import Manifold
from ppreid_dist.attacks.layout import Flipped, Sharpened
from ppreid_dist.attacks.propagation import propagated
from ppreid_dist.attacks.unfolded import UnfoldedConfig, laid_out
from ppreid_dist.attacks.waves import are_bits
from ppreid_dist.models.stores.projected import main_directions

DIRECTIONS = 16  # main ones that are laid onto each other where the scheme doesn't say how many it keeps
MOST, SOME = 2000, 600  # points of either cloud that are, in the end and in the search for a start
STARTS, LOOSE = 12, 0.1  # what is told, and drawn directions this much of its largest
BLURS = (0.2, 0.1, 0.05, 0.03, 0.02)  # of the transport, one after another, in mean squared distances
TURNS = 4  # with each
SHARE = 0.1  # of those whose place is known, against all others
BALANCINGS = 50
ENOUGH = 8  # enrolled pictures for each direction, from which on positions and waves follow from them
LEFT_OUT = 5  # one of so many is then left out, to choose by


def read(
    stolen_LS: Tensor,
    enrolled_ES: Tensor,
    plain_ND: Tensor,
    rows_E: np.ndarray,
    *,
    directions: int,
    config: UnfoldedConfig,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """(N, K) float32 of his own pictures, and (L, K) of the stolen entries in the same terms.

    ``rows_E`` says which of his own pictures ``enrolled_ES`` are, a person's one behind another. Bits are laid out by
    ``config``, in several ways: which is best the enrolled say, where they are so many that the last can be left out,
    else how well the clouds fit.
    """
    own_NK = _main(plain_ND, min(directions, plain_ND.shape[1]))
    pool_PS, count = torch.cat([stolen_LS, enrolled_ES]).float(), len(stolen_LS)
    told_EK = own_NK[torch.from_numpy(rows_E).to(own_NK.device)]
    if not are_bits(pool_PS):
        place_PK = _main(pool_PS, min(own_NK.shape[1], pool_PS.shape[1]))
        return own_NK.float(), laid_onto(place_PK, own_NK, place_PK[count:], told_EK, seed=seed)[0][:count].float()
    many = len(told_EK) > ENOUGH * own_NK.shape[1]
    known_EK = told_EK[: -(len(told_EK) // LEFT_OUT)] if many else told_EK
    best, least = own_NK.new_zeros(0), float("inf")
    for way_PK in _ways(pool_PS, own_NK.shape[1], count, known_EK, many, config, seed):
        enrolled_EK = way_PK[count : count + len(known_EK)]
        found_PK, cost = laid_onto(way_PK, own_NK, enrolled_EK, known_EK, seed=seed)
        if many:
            cost = float((found_PK[count:] - told_EK)[len(known_EK) :].square().sum(1).mean())
        if cost < least:
            best, least = found_PK[:count], cost
    return own_NK.float(), best.float()


def _main(features_MD: Tensor, directions: int) -> Tensor:
    """(M, K) float64: their main directions at unit norm, as galleries that keep few have them."""
    x_MD = F.normalize(features_MD.double(), dim=1)
    return F.normalize(x_MD @ main_directions(x_MD)[:, :directions], dim=1)


def _ways(
    pool_PS: Tensor,
    directions: int,
    first: int,
    known_EK: Tensor,
    many: bool,
    config: UnfoldedConfig,
    seed: int,
) -> Iterator[Tensor]:
    """Positions of bits, (P, K) float64, and those sharpened by the waves behind them. Where the places of ``many`` are
    known, those of the pool from the ``first`` on, layouts also start from these, and waves follow from them."""
    pool_PS, neighbours = F.normalize(pool_PS, dim=1), config.neighbours[0]
    draw = np.random.default_rng([seed, 0xE2])
    graph = pool_PS[torch.from_numpy(draw.permutation(len(pool_PS))[: config.entries])]
    rows_E = np.arange(first, first + len(known_EK))
    starts = [Manifold(graph, neighbours, directions)(pool_PS)]
    if many:
        starts.append(propagated(pool_PS, rows_E, known_EK, neighbours))
    for start_PK, smoothed in product(starts, config.smoothed):
        layout = laid_out(pool_PS, start_PK, smoothed, config, seed)
        yield layout.places_LK.double()
        if config.waves.candidates:
            yield Sharpened(layout, config.waves, seed).places_LK.double()
    if many and config.waves.candidates:
        rows = torch.from_numpy(rows_E).to(pool_PS.device)
        yield Flipped(pool_PS, rows, known_EK.float(), config.waves, seed).places_LK.double()


def laid_onto(
    places_LK: Tensor, own_NK: Tensor, enrolled_EK: Tensor, theirs_EK: Tensor, *, seed: int
) -> tuple[Tensor, float]:
    """(L, K): one cloud laid onto another, and the mean squared distance of the transport between them.

    All float64. ``enrolled_EK`` are places whose terms in the other cloud, ``theirs_EK``, are known. Where the places
    have fewer directions than the cloud, what is missing is 0.
    """
    missing = own_NK.shape[1] - places_LK.shape[1]
    places_LK, enrolled_EK = F.pad(places_LK, (0, missing)), F.pad(enrolled_EK, (0, missing))
    middle_K, own_K = places_LK.mean(0), own_NK.mean(0)
    x_LK, y_NK = places_LK - middle_K, own_NK - own_K
    scale = y_NK.square().sum(1).mean().sqrt() / x_LK.square().sum(1).mean().sqrt().clamp_min(1e-12)
    x_LK, known_EK, theirs_EK = x_LK * scale, (enrolled_EK - middle_K) * scale, theirs_EK - own_K
    draw = np.random.default_rng([seed, 0xE3])
    x_LK, y_NK = (of[torch.from_numpy(draw.permutation(len(of)))] for of in (x_LK, y_NK))
    told_KK = known_EK.mT @ theirs_EK
    # Few people say little of most directions: those are drawn, several times.
    loose = LOOSE * float(torch.linalg.matrix_norm(told_KK, 2))
    starts = [told_KK]
    for _ in range(STARTS - 1):
        starts.append(told_KK + loose * torch.from_numpy(draw.standard_normal(told_KK.shape)).to(told_KK))
    few = [(_improved(_turn(start_KK), x_LK[:SOME], y_NK[:SOME], told_KK, BLURS[:3])) for start_KK in starts]
    best_KK = min(few, key=lambda one: one[1])[0]
    turn_KK, cost = _improved(best_KK, x_LK[:MOST], y_NK[:MOST], told_KK, BLURS[1:])
    return (places_LK - middle_K) * scale @ turn_KK + own_K, cost


def _improved(
    turn_KK: Tensor, x_XK: Tensor, y_YK: Tensor, told_KK: Tensor, blurs: Sequence[float]
) -> tuple[Tensor, float]:
    """A turn of one cloud that brings it nearer to where transport takes its points, and the cost of the last."""
    cost, told_KK = float("inf"), SHARE * told_KK / told_KK.square().sum().sqrt().clamp_min(1e-300)
    for blur in np.repeat(blurs, TURNS):
        apart_XY = torch.cdist(x_XK @ turn_KK, y_YK).square()
        plan_XY = transport(apart_XY, float(blur))
        cost = float((plan_XY * apart_XY).sum())
        meant_KK = x_XK.mT @ (plan_XY @ y_YK)
        turn_KK = _turn(meant_KK + told_KK * meant_KK.square().sum().sqrt())
    return turn_KK, cost


def _turn(products_KK: Tensor) -> Tensor:
    """The rotation or reflection that brings points nearest to others, from the sum of their outer products."""
    left_KK, _, right_KK = torch.linalg.svd(products_KK)
    return left_KK @ right_KK


def transport(cost_XY: Tensor, blur: float) -> Tensor:
    """(X, Y) float64: how much of each point goes where, all 1 together, blurred by entropy (Cuturi, NIPS 2013)."""
    size_X, size_Y = cost_XY.shape
    exponent_XY = cost_XY / (blur * cost_XY.mean().clamp_min(1e-300))
    kernel_XY = (exponent_XY.amin(1, keepdim=True) - exponent_XY).exp()
    weight_Y = torch.ones_like(kernel_XY[0])
    weight_X = torch.ones_like(kernel_XY[:, 0])
    for _ in range(BALANCINGS):
        weight_X = 1 / size_X / (kernel_XY @ weight_Y).clamp_min(1e-300)
        weight_Y = 1 / size_Y / (kernel_XY.mT @ weight_X).clamp_min(1e-300)
    plan_XY = weight_X[:, None] * kernel_XY * weight_Y
    return plan_XY / plan_XY.sum()
