"""The closed-form best response as an objective: what the strongest fresh ridge attacker reads from a batch.

Kernel ridge regressions from features to small pictures are fitted on some identities of the batch and tested on the
others; the extractor lowers what the strongest of them gains over knowing nothing. The adversary is solved anew at
every step and the gradient passes through its fit and its test, so there is no stale opponent to mislead: playing
against a lagging generator hid the leak from that generator and not from a fresh one.

Shapes: N rows of all processes, F rows to fit and T rows to test, D feature dim, M picture values, V views, W widths, R
ridges, X adversaries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ppreid_dist.errors import ConfigError
from ppreid_dist.kernels.kernel_ridge import gaussian_kernels, solve, whitening
from ppreid_dist.losses.privacy import bounded, unbounded
from ppreid_dist.settings import Settings, option
from ppreid_dist.transfer import to_device

_SPLIT = 0x51  # the tag of this file's random stream


@dataclass(kw_only=True)
class RidgeConfig(Settings):
    """The family of ridge adversaries and the pictures they aim at."""

    views: list[str] = option(
        ["raw", "whitened"],
        "features as they are, and with all directions made equal: without it what is known hides in the small ones",
        choices=("raw", "whitened"),
    )
    widths: list[float] = option(
        [0.5, 1.0, 2.0],
        "gaussian kernel widths, in root mean squared distances; 0 is the linear kernel",
        at_least=0.0,
    )
    ridges: list[float] = option([1e-3, 1e-2, 1e-1], "ridges, as a share of the kernel's mean diagonal", more_than=0.0)
    fit_fraction: float = option(0.6, "share of the identities to fit on; the others test", at_least=0.1, at_most=0.9)
    target_size: tuple[int, int] = option(
        (32, 16), "height and width of the pictures aimed at, by distance_correlation too", at_least=1
    )
    centre: str = option(
        "camera",
        "what is taken off the targets: the batch's mean picture, or each camera's, so that the adversary is judged by "
        "what it tells of the person and not of the scene",
        choices=("batch", "camera"),
    )
    strangers: int = option(512, "unlabelled pictures, of as many people, that a step adds; 0 is none", at_least=0)
    labelled_weight: float = option(1.0, "weight of the labelled batch's loss", at_least=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strangers == 1:
            raise ConfigError("strangers: one person can't be split into fit and test; take 0 or more than 1")
        if not self.labelled_weight and not self.strangers:
            raise ConfigError("labelled_weight: must be more than 0 where there are no strangers")


class RidgeResult(NamedTuple):
    """The loss to minimise and, detached, what to log."""

    loss: Tensor  # scalar: 0 is no better than the mean picture, 1 is perfect reconstruction of every test row;
    # unbounded, these are -1 and 0
    error: Tensor  # scalar: the strongest adversary's mean squared error on the test rows
    floor: Tensor  # scalar: the mean picture's
    best: Tensor  # int64 (3,): the strongest adversary's places in views, widths and ridges


def prepare_targets(clean_B3HW: Tensor, size: tuple[int, int]) -> Tensor:
    """The pictures the adversaries aim at, reduced by area to ``size`` (height, width), flattened: float32 (B, M)."""
    return F.adaptive_avg_pool2d(clean_B3HW.float(), size).flatten(1)


def centre_by_camera(targets_NM: Tensor, cameras_N: Tensor) -> Tensor:
    """Targets (N, M) less the mean picture of their camera in this batch; cameras are known even of strangers."""
    # The cameras' places in order, as torch.unique would give them, which makes the host wait for their number.
    sorted_N, order_N = cameras_N.sort()
    places_N = torch.empty_like(order_N)
    places_N[order_N] = torch.cat([order_N.new_zeros(1), (sorted_N.diff() != 0).cumsum(0)])
    ones_N = torch.ones_like(places_N, dtype=targets_NM.dtype)
    sums_NM = torch.zeros_like(targets_NM)  # of as many cameras as there are rows, at the most
    counts_N = torch.zeros_like(sums_NM[:, 0]).index_add(0, places_N, ones_N)
    means_NM = sums_NM.index_add(0, places_N, targets_NM) / counts_N.clamp_min(1)[:, None]
    return targets_NM - means_NM[places_N]


def ridge_best_response(
    features_ND: Tensor,
    targets_NM: Tensor,
    groups_N: np.ndarray,
    config: RidgeConfig,
    *,
    seed: int,
    step: int,
    bounded_loss: bool = True,
) -> RidgeResult:
    """What the strongest ridge adversary gains on unseen identities: mean(max(0, floor - error)) / mean(floor).

    Features and targets come gathered over processes, in the plan's order; ``groups_N`` are the plan's pids, on the
    host so that the split (random, from seed and step, alike on every process) never waits for the device.
    The strongest adversary has the least *mean* error, as an attacker would choose; its gain is then clamped *row by
    row* (see :func:`bounded`). Choosing by the clamped gain would favour adversaries that are wild: even on features
    without information their lucky rows count and their bad ones don't.

    The gradient is that of the chosen adversary alone, exact for the minimum. Without ``bounded_loss``, an ablation,
    the loss is :func:`unbounded`.
    ConfigError where there are fewer than two groups.
    """
    split = split_groups(groups_N, config.fit_fraction, seed, step)
    fit_F, test_T = (to_device(torch.from_numpy(rows), features_ND.device) for rows in split)
    widths_W, ridges_R = (
        to_device(torch.tensor(values, dtype=torch.float64), features_ND.device)
        for values in (config.widths, config.ridges)
    )
    dtype, features_ND, targets_NM = features_ND.dtype, features_ND.double(), targets_NM.detach().double()
    # Whitened by all rows: an attacker needs no pictures for that, and has more features than a batch.
    views_VND = torch.stack([seen_as(view, features_ND)(features_ND) for view in config.views])
    mean_M = targets_NM[fit_F].mean(0)
    fit_FM, test_TM = targets_NM[fit_F] - mean_M, targets_NM[test_T] - mean_M
    floor_T = test_TM.square().mean(1)

    def errors(view_ND: Tensor, widths_W: Tensor, ridges_R: Tensor) -> Tensor:
        fit_FD, test_TD = view_ND[fit_F], view_ND[test_T]
        own_WFF = gaussian_kernels(fit_FD, fit_FD, widths_W)
        cross_WFT = gaussian_kernels(fit_FD, test_TD, widths_W)
        # Solved for the test rows, which are fewer than the picture's values.
        smoother_WRFT = solve(own_WFF[:, None], cross_WFT[:, None], ridges_R)
        return (smoother_WRFT.mT @ fit_FM - test_TM).square().mean(-1)

    # The choice alone needs no backward, which is what grows with the number of adversaries.
    with torch.no_grad():
        mean_X = torch.cat([errors(view_ND, widths_W, ridges_R).mean(-1).flatten() for view_ND in views_VND])
    place = mean_X.argmin(keepdim=True)
    count = len(config.ridges)
    best = torch.cat((place // (len(config.widths) * count), place // count % len(config.widths), place % count))
    view_ND = views_VND.index_select(0, best[:1])[0]
    width_W, ridge_R = widths_W.index_select(0, best[1:2]), ridges_R.index_select(0, best[2:])
    error_T = errors(view_ND, width_W, ridge_R).flatten()
    lose = bounded if bounded_loss else unbounded
    return RidgeResult(lose(error_T, floor_T).to(dtype), mean_X.min(), floor_T.mean(), best)


def seen_as(view: str, features_ND: Tensor) -> Callable[[Tensor], Tensor]:
    """How a ridge adversary looks at features, learnt from these rows: ``raw`` or ``whitened``."""
    return whitening(features_ND) if view == "whitened" else Tensor.double


def split_groups(groups_N: np.ndarray, fraction: float, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit and rows to test, each sorted: about ``fraction`` of the groups, at least one group on each side."""
    groups = np.unique(groups_N)
    if len(groups) < 2:
        raise ConfigError("ridge: a batch of fewer than two identities can't be split into fit and test")
    count = min(max(math.floor(fraction * len(groups) + 0.5), 1), len(groups) - 1)
    chosen = np.random.default_rng([seed, _SPLIT, step]).permutation(groups)[:count]
    fitted_N = np.isin(groups_N, chosen)
    return np.flatnonzero(fitted_N), np.flatnonzero(~fitted_N)
