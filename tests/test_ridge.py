"""Kernel ridge regression against numpy, and the closed-form best response as an objective."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ppreid_dist.errors import ConfigError
from ppreid_dist.kernels.kernel_ridge import LINEAR, choose, fit, gaussian_kernels, search, solve
from ppreid_dist.losses.ridge import (
    RidgeConfig,
    centre_by_camera,
    prepare_targets,
    ridge_best_response,
    split_groups,
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kernel_oracle(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    pairs = [((a[i] - a[j]) ** 2).sum() for i in range(len(a)) for j in range(len(a)) if i != j]
    scale, mean = sum(pairs) / len(pairs), a.mean(0)
    kernel = np.empty((len(a), len(b)))
    for i, u in enumerate(a):
        for j, v in enumerate(b):
            if width == LINEAR:
                kernel[i, j] = 2 * (u - mean) @ (v - mean) / scale
            else:
                kernel[i, j] = math.exp(-((u - v) ** 2).sum() / (2 * width**2 * scale))
    return kernel


def predict_oracle(x: np.ndarray, y: np.ndarray, other: np.ndarray, width: float, ridge: float) -> np.ndarray:
    system = kernel_oracle(x, x, width) + ridge * len(x) * np.eye(len(x))
    return y.mean(0) + kernel_oracle(x, other, width).T @ np.linalg.solve(system, y - y.mean(0))


# --- the kernel file


def whitened_oracle(x: np.ndarray) -> np.ndarray:
    """Through the inverse square root of the shrunk covariance."""
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    shrunk = 0.9 * covariance + 0.1 * np.trace(covariance) / min(len(x) - 1, x.shape[1]) * np.eye(x.shape[1])
    values, vectors = np.linalg.eigh(shrunk)
    return centred @ vectors / np.sqrt(values) @ vectors.T


@pytest.mark.parametrize("width", [LINEAR, 0.5, 2.0])
def test_fit_predict_and_search_equal_numpy(width: float) -> None:
    x, y, other, wanted = random(9, 4), random(9, 3, seed=1), random(5, 4, seed=2), random(5, 3, seed=3)
    expected = predict_oracle(x.numpy(), y.numpy(), other.numpy(), width, 0.01)
    predicted = fit(x, y, width=width, ridge=0.01).predict(other, chunk=2)
    np.testing.assert_allclose(predicted.numpy(), expected, rtol=1e-9)
    grid = search(x, y, other, wanted, [1.0, width], [0.1, 0.01])
    assert grid.shape == (2, 2)
    assert grid[1, 1].item() == pytest.approx(((expected - wanted.numpy()) ** 2).mean())


def test_kernels_do_not_change_with_the_scale_or_place_of_the_features() -> None:
    x, other = random(8, 3), random(4, 3, seed=1)
    widths = [LINEAR, 0.5, 1.0]
    torch.testing.assert_close(gaussian_kernels(x, other, widths), gaussian_kernels(7 * x + 5, 7 * other + 5, widths))


def test_constant_features_predict_the_mean_with_finite_gradients() -> None:
    x, y = torch.ones(6, 3, requires_grad=True), random(6, 2)
    for width in (LINEAR, 1.0):
        predicted = fit(x, y, width=width, ridge=0.1).predict(torch.ones(2, 3))
        torch.testing.assert_close(predicted, y.mean(0).expand(2, 2))
        predicted.square().sum().backward()
        assert torch.isfinite(x.grad).all()


def test_solve_takes_a_ridge_a_system_and_ignores_autocast() -> None:
    kernel = gaussian_kernels(random(5, 3), random(5, 3), [0.7, 1.5])
    right, ridges = random(5, 2, seed=1), torch.tensor([0.1, 0.2, 0.3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solved = solve(kernel[:, None], right, ridges)
    for w in range(2):
        for r, ridge in enumerate(ridges.tolist()):
            system = kernel[w] + ridge * 5 * torch.eye(5)
            torch.testing.assert_close(system @ solved[w, r], right, rtol=1e-6, atol=1e-6)


# --- the objective


def test_best_response_equals_numpy_over_all_adversaries() -> None:
    config = RidgeConfig(views=["raw", "whitened"], widths=[0.2, 0.6, LINEAR], ridges=[1e-3, 0.1])
    x = F.normalize(random(14, 5))
    y, groups = x @ random(5, 6, seed=1) + 0.3 * random(14, 6, seed=2), np.repeat(np.arange(7), 2)
    result = ridge_best_response(x, y, groups, config, seed=4, step=9)
    fitted, tested = split_groups(groups, 0.6, 4, 9)
    x_, y_ = x.numpy(), y.numpy()
    floor = ((y_[tested] - y_[fitted].mean(0)) ** 2).mean(1)
    views = [x_, whitened_oracle(x_)]
    errors = {
        (v, w, r): ((predict_oracle(z[fitted], y_[fitted], z[tested], width, ridge) - y_[tested]) ** 2).mean(1)
        for v, z in enumerate(views)
        for w, width in enumerate(config.widths)
        for r, ridge in enumerate(config.ridges)
    }
    best = min(errors, key=lambda key: errors[key].mean())
    assert tuple(result.best.tolist()) == best
    assert best[1] == 2  # else the order of widths and ridges isn't tested
    assert result.error.item() == pytest.approx(errors[best].mean())
    assert result.floor.item() == pytest.approx(floor.mean())
    expected = sum(max(0, f - e) for f, e in zip(floor, errors[best], strict=True)) / sum(floor)
    assert result.loss.item() == pytest.approx(expected)


def test_unbounded_it_pays_for_rows_beyond_the_floor() -> None:
    """Of features that tell nothing the bounded loss wants little more, the unbounded one as much error as there is."""
    config = RidgeConfig(views=["raw"], widths=[0.5], ridges=[1e-3])
    x, y, groups = random(12, 4), random(12, 3, seed=1), np.arange(12)
    bounded, unbounded = (
        ridge_best_response(x, y, groups, config, seed=0, step=0, bounded_loss=flag) for flag in (True, False)
    )
    assert unbounded.error > unbounded.floor and 0 <= bounded.loss < 1
    torch.testing.assert_close(unbounded.loss, -unbounded.error / unbounded.floor)


@pytest.mark.parametrize("widths", [[LINEAR], [0.7], [LINEAR, 0.5, 2.0]])
@pytest.mark.parametrize("view", ["raw", "whitened"])
def test_gradient_through_fit_test_and_scale(view: str, widths: list[float]) -> None:
    config = RidgeConfig(views=[view], widths=widths, ridges=[0.01, 0.1])
    x, groups = random(8, 3).requires_grad_(), np.arange(8)
    y = x.detach() @ random(3, 4, seed=1) + 0.1 * random(8, 4, seed=2)

    def loss(x_ND: Tensor) -> Tensor:
        return ridge_best_response(x_ND, y, groups, config, seed=0, step=0).loss

    assert loss(x).item() > 0.05
    assert torch.autograd.gradcheck(loss, (x,))


def test_splits_are_by_identity_change_with_the_step_and_repeat_with_the_seed() -> None:
    groups = np.array([5, 1, 5, 9, 1, 7, 9, 7, 3, 3])
    splits = [split_groups(groups, 0.6, 0, step) for step in range(20)]
    for fitted, tested in splits:
        assert sorted([*fitted, *tested]) == list(range(10))
        assert len(set(groups[fitted])) == 3
        assert not set(groups[fitted]) & set(groups[tested])
    assert len({tuple(fitted) for fitted, _ in splits}) > 3
    assert all((a == b).all() for a, b in zip(splits[7], split_groups(groups, 0.6, 0, 7), strict=True))
    # The two smallest sides there can be; a single person can't be split.
    assert [len(rows) for rows in split_groups(np.arange(2), 0.9, 0, 0)] == [1, 1]
    with pytest.raises(ConfigError, match="two identities"):
        split_groups(np.zeros(4), 0.6, 0, 0)


def test_targets_are_area_means_of_the_picture() -> None:
    clean = random(2, 3, 8, 6).float()
    targets = prepare_targets(clean, (4, 3)).reshape(2, 3, 4, 3)
    assert targets[1, 2, 3, 1].item() == pytest.approx(clean[1, 2, 6:8, 2:4].mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [("widths", []), ("ridges", [0.0]), ("target_size", (32, 0)), ("strangers", 1), ("centre", "mean")],
)
def test_settings_that_cannot_work_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: "):
        RidgeConfig(**{key: value})


def test_a_loss_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^labelled_weight: "):
        RidgeConfig(labelled_weight=0.0, strangers=0)
    assert RidgeConfig(labelled_weight=0.0, strangers=2).labelled_weight == 0


def pictures_of_a_code(people: int) -> tuple[Tensor, Tensor]:
    code = random(people, 6, dtype=torch.float32)
    return code, code @ random(6, 48, seed=1, dtype=torch.float32)


def test_loss_is_high_for_linear_codes_and_near_zero_for_permuted_pairs() -> None:
    code, pictures = pictures_of_a_code(160)
    features, groups = F.normalize(code @ random(6, 12, seed=2).float()), np.arange(160)
    permuted = features[torch.from_numpy(np.random.default_rng(0).permutation(160))]
    assert ridge_best_response(features, pictures, groups, RidgeConfig(), seed=0, step=0).loss > 0.7
    assert ridge_best_response(permuted, pictures, groups, RidgeConfig(), seed=0, step=0).loss < 0.05


def test_minimising_it_leaves_less_to_a_fresh_attacker() -> None:
    """The fresh attacker has another split, a finer grid and the linear kernel, none of which training saw."""
    code, pictures = pictures_of_a_code(160)
    groups, config = np.arange(160), RidgeConfig()
    free = (code @ random(6, 12, seed=2).float()).requires_grad_()
    fitted, tested = split_groups(groups, 0.7, 1, 0)

    def fresh_leak() -> float:
        features = F.normalize(free.detach())
        grid = search(
            features[fitted], pictures[fitted], features[tested], pictures[tested],
            [LINEAR, 0.3, 0.7, 1.5, 3.0], [1e-4, 1e-3, 1e-2, 1e-1, 1.0],
        )  # fmt: skip
        floor = (pictures[tested] - pictures[fitted].mean(0)).square().mean()
        return 1 - (grid.min() / floor).item()

    before, optimiser = fresh_leak(), torch.optim.Adam([free], lr=0.1)
    for step in range(60):
        optimiser.zero_grad()
        ridge_best_response(F.normalize(free), pictures, groups, config, seed=0, step=step).loss.backward()
        optimiser.step()
    after = fresh_leak()
    assert before > 0.7
    assert after < 0.5 * before


def test_where_nothing_is_to_be_told_nothing_is_lost() -> None:
    """Targets that are the same for all: a floor of 0, which the loss divides by."""
    config = RidgeConfig(widths=[1.0], ridges=[0.1])
    features = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = ridge_best_response(features, torch.zeros(12, 6), np.arange(12), config, seed=0, step=0)
    found.loss.backward()
    assert float(found.loss.detach()) == 0 and torch.isfinite(features.grad).all()


def test_centring_by_camera_takes_off_each_camera_s_mean() -> None:
    rng = np.random.default_rng(0)
    targets_NM, cameras_N = torch.from_numpy(rng.normal(size=(9, 4))), torch.tensor([3, 1, 3, 7, 1, 1, 3, 7, 9])
    got_NM = centre_by_camera(targets_NM, cameras_N)
    for row, camera in enumerate(cameras_N.tolist()):
        mean_M = torch.stack([t for t, c in zip(targets_NM, cameras_N.tolist(), strict=True) if c == camera]).mean(0)
        torch.testing.assert_close(got_NM[row], targets_NM[row] - mean_M)


def test_a_linear_ridge_is_a_matrix_and_an_origin_and_the_best_capacity_is_chosen() -> None:
    rng = torch.Generator().manual_seed(5)
    x, y, held = (torch.randn(*shape, generator=rng) for shape in ((30, 4), (30, 3), (8, 4)))
    model = fit(x, y, width=LINEAR, ridge=0.1)
    matrix, origin = model.affine()
    torch.testing.assert_close(held.double() @ matrix + origin, model.predict(held))
    wanted = model.predict(held) + 0.01
    widths, ridges = [0.0, 0.5, 2.0], [0.01, 0.1, 1.0]
    errors = {
        (w, r): float((fit(x, y, width=w, ridge=r).predict(held) - wanted).square().mean())
        for w in widths
        for r in ridges
    }
    *chosen, error = choose(x, y, held, wanted, widths, ridges)
    assert tuple(chosen) == min(errors, key=errors.__getitem__) and error == pytest.approx(min(errors.values()))
