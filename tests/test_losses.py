"""The objectives against slow, obvious oracles; gathered objectives over two processes against one."""

import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ppreid_dist.distributed import gather, rank_rows
from ppreid_dist.errors import ConfigError
from ppreid_dist.kernels.ssim import ssim_map
from ppreid_dist.losses.adversarial import AdversarialConfig, critic_loss, generator_loss, r1_due, r1_penalty
from ppreid_dist.losses.distance_correlation import distance_correlation
from ppreid_dist.losses.identity import IdentityConfig, identity_loss
from ppreid_dist.losses.neighbourhood import NeighbourhoodConfig, neighbourhood_loss
from ppreid_dist.losses.privacy import bounded, unbounded, wrong_person_floor
from ppreid_dist.losses.reconstruction import (
    PixelLossConfig,
    ReconstructionConfig,
    pixel_distance,
    reconstruction_distance,
)
from ppreid_dist.losses.ridge import RidgeConfig, ridge_best_response
from ppreid_dist.losses.triplet import TripletConfig, triplet_loss


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- identity


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_identity_is_the_cross_entropy_to_smoothed_targets(smoothing: float) -> None:
    logits, labels = random(5, 4), torch.tensor([0, 3, 1, 1, 2])
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total = sum(math.exp(value) for value in row)
        for c, value in enumerate(row):
            target = smoothing / 4 + (1 - smoothing) * (c == label)
            expected -= target * math.log(math.exp(value) / total) / 5
    assert identity_loss(logits, labels, IdentityConfig(smoothing=smoothing)).item() == pytest.approx(
        expected, rel=1e-5
    )


# --- triplet


def triplet_oracle(features: Tensor, pids: list[int], margin: float | None) -> float:
    losses = []
    for i, pid in enumerate(pids):
        distances = [math.dist(features[i].tolist(), row.tolist()) for row in features]
        positives = [d for j, d in enumerate(distances) if pids[j] == pid and j != i]
        negatives = [d for j, d in enumerate(distances) if pids[j] != pid]
        if positives and negatives:
            gap = max(positives) - min(negatives)
            losses.append(math.log1p(math.exp(gap)) if margin is None else max(0.0, gap + margin))
    return sum(losses) / max(len(losses), 1)


@given(
    pids=st.lists(st.integers(0, 3), min_size=1, max_size=10),
    margin=st.sampled_from([None, 0.0, 0.3]),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_triplet_equals_plain_loops(pids: list[int], margin: float | None, seed: int) -> None:
    features = random(len(pids), 3, seed=seed)
    loss = triplet_loss(features, torch.tensor(pids), TripletConfig(margin=margin))
    assert loss.item() == pytest.approx(triplet_oracle(features, pids, margin), abs=1e-5)


def test_triplet_gradient_is_finite_for_equal_rows_and_zero_without_valid_anchors() -> None:
    features = torch.ones(4, 3, requires_grad=True)
    triplet_loss(features, torch.tensor([0, 0, 1, 1]), TripletConfig()).backward()
    assert torch.isfinite(features.grad).all()
    features.grad = None
    triplet_loss(features, torch.tensor([0, 0, 0, 0]), TripletConfig()).backward()
    assert not features.grad.any()


# --- neighbourhood


def neighbourhood_oracle(features: Tensor, pids: list[int], config: NeighbourhoodConfig) -> float:
    losses = []
    for i, pid in enumerate(pids):
        near, far = [], 0.0
        for j, row in enumerate(features):
            similarity = math.exp(-(math.dist(features[i].tolist(), row.tolist()) ** 2) / (2 * config.width**2))
            if pids[j] != pid:
                far += similarity
            elif j != i:
                near.append(similarity)
        if near:
            p = sum(near) / len(near)
            losses.append(-math.log(p / (p + far + config.chance)))
    return sum(losses) / max(len(losses), 1)


@given(
    pids=st.lists(st.integers(0, 3), min_size=1, max_size=10),
    width=st.floats(0.2, 2),
    chance=st.floats(1e-3, 1),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_neighbourhood_equals_plain_loops(pids: list[int], width: float, chance: float, seed: int) -> None:
    stored, config = F.normalize(random(len(pids), 3, seed=seed)), NeighbourhoodConfig(width=width, chance=chance)
    expected = neighbourhood_oracle(stored.double(), pids, config)
    assert neighbourhood_loss(stored, torch.tensor(pids), config).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = neighbourhood_loss(stored, torch.tensor(pids), config).item()
    assert inside == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_neighbourhood_gradient_is_finite_for_equal_rows_far_rows_and_nobody() -> None:
    config, pids = NeighbourhoodConfig(width=0.01), torch.tensor([0, 0, 1, 2])
    for rows in (torch.ones(4, 3), 1e3 * random(4, 3)):
        rows.requires_grad_()
        loss = neighbourhood_loss(rows, pids, config)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(rows.grad).all()
    alone = random(3, 3).requires_grad_()
    neighbourhood_loss(alone, torch.arange(3), config).backward()
    assert not alone.grad.any()


# --- reconstruction


def test_reconstruction_is_the_configured_mix_per_picture() -> None:
    recon, target = random(3, 3, 16, 8).sigmoid(), random(3, 3, 16, 8, seed=1).sigmoid()
    config = ReconstructionConfig(l1=2.0, l2=3.0, ssim=0.5, perceptual=0.25, perceptual_backbone="some/backbone")

    def perceive(x_B3hw: Tensor) -> Tensor:
        return F.avg_pool2d(x_B3hw, 4) - 0.5

    distance = reconstruction_distance(recon, target, config, perceive)
    for b in range(3):
        l1, l2 = (recon[b] - target[b]).abs().mean(), (recon[b] - target[b]).pow(2).mean()
        ssim = ssim_map(recon[b : b + 1], target[b : b + 1]).mean()
        ours, theirs = perceive(recon[b : b + 1])[0].flatten(1), perceive(target[b : b + 1])[0].flatten(1)
        cosine = sum(torch.dot(x / x.norm(), y / y.norm()) for x, y in zip(ours.T, theirs.T, strict=True)) / 8
        assert distance[b].item() == pytest.approx(
            (2 * l1 + 3 * l2 + 0.5 * (1 - ssim) + 0.25 * (1 - cosine)).item(), rel=1e-4
        )
    pixels = PixelLossConfig(l1=2.0, l2=3.0, ssim=0.5)
    assert torch.all(pixel_distance(recon, target, pixels) < distance)
    assert reconstruction_distance(target, target, config, perceive).abs().max() < 1e-5


def test_reconstruction_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^perceptual_backbone: "):
        ReconstructionConfig(perceptual=1.0)
    with pytest.raises(ConfigError, match=r"^l1: "):
        PixelLossConfig(l1=0.0, ssim=0.0)
    assert ReconstructionConfig(l1=0.0, ssim=0.0, perceptual=1.0, perceptual_backbone="some/backbone")
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ConfigError, match=r"^perceptual: "):
        reconstruction_distance(x, x, ReconstructionConfig(perceptual=1.0, perceptual_backbone="some/backbone"))


# --- adversarial


def test_adversarial_losses_equal_their_formulas() -> None:
    real, fake = [0.3, -2.0, 1.5], [-0.4, 0.7, -3.0]

    def soft(x: float) -> float:
        return math.log1p(math.exp(x))

    expected = {
        "non_saturating": (sum(map(soft, [-r for r in real] + fake)) / 3, sum(soft(-f) for f in fake) / 3),
        "hinge": (sum(max(0, 1 - r) for r in real) / 3 + sum(max(0, 1 + f) for f in fake) / 3, -sum(fake) / 3),
    }
    for kind, (critic, generator) in expected.items():
        config = AdversarialConfig(kind=kind, weight=0.5)
        assert critic_loss(torch.tensor(real), torch.tensor(fake), config).item() == pytest.approx(critic, rel=1e-5)
        assert generator_loss(torch.tensor(fake), config).item() == pytest.approx(0.5 * generator, rel=1e-5)


def test_r1_of_a_quadratic_critic_and_its_gradient() -> None:
    # score = w * sum(x^2): |d score / dx|^2 = 4 w^2 sum(x^2), whose derivative by w is 8 w sum(x^2).
    w = torch.tensor(0.7, requires_grad=True)
    images = random(2, 3, 4, 4).requires_grad_()
    config = AdversarialConfig(r1_gamma=2.0, r1_interval=3)
    penalty = r1_penalty(w * images.square().sum((1, 2, 3)), images, config)
    squares = images.detach().square().sum().item() / 2
    assert penalty.item() == pytest.approx(3 * 4 * 0.49 * squares, rel=1e-4)
    penalty.backward()
    assert w.grad.item() == pytest.approx(3 * 8 * 0.7 * squares, rel=1e-4)


def test_r1_is_due_at_its_interval_only_and_never_for_other_regularisers() -> None:
    config = AdversarialConfig(r1_interval=4)
    assert [step for step in range(9) if r1_due(step, config)] == [0, 4, 8]
    assert not any(r1_due(step, AdversarialConfig(regulariser="spectral_norm")) for step in range(9))


# --- privacy


def test_bounded_runs_from_nothing_hidden_to_fully_protected() -> None:
    assert bounded(torch.zeros(4), 0.3).item() == pytest.approx(1)
    assert bounded(torch.full((4,), 0.3), 0.3).item() == 0
    assert bounded(torch.tensor([0.1, 9.0]), torch.tensor([0.2, 0.4])).item() == pytest.approx(0.05 / 0.3)
    assert bounded(torch.zeros(4), 0.0).item() == 0
    assert unbounded(torch.tensor([0.1, 0.5]), 0.6).item() == pytest.approx(-0.5)


def test_bounded_pays_nothing_for_rows_beyond_the_floor_and_keeps_the_floor_fixed() -> None:
    distance, floor = torch.tensor([0.1, 9.0], requires_grad=True), torch.tensor(0.5, requires_grad=True)
    bounded(distance, floor).backward()
    assert distance.grad.tolist() == pytest.approx([-1.0, 0.0])
    assert floor.grad is None


def absolute(a_B3hw: Tensor, b_B3hw: Tensor) -> Tensor:
    return (a_B3hw - b_B3hw).abs().mean((1, 2, 3))


def floor_oracle(recon: Tensor, target: Tensor, pids: list[int]) -> float:
    found = []
    for i, pid in enumerate(pids):
        for ahead in range(len(pids)):
            j = (i + len(pids) // 2 + ahead) % len(pids)
            if pids[j] != pid:
                found.append((recon[i] - target[j]).abs().mean().item())
                break
    return sum(found) / max(len(found), 1)


@given(pids=st.lists(st.integers(0, 3), min_size=1, max_size=9))
@settings(max_examples=40, deadline=None)
def test_wrong_person_floor_compares_with_another_person_always(pids: list[int]) -> None:
    recon, target = random(len(pids), 3, 2, 2), random(len(pids), 3, 2, 2, seed=1)
    floor = wrong_person_floor(recon, target, torch.tensor(pids), absolute)
    assert floor.item() == pytest.approx(floor_oracle(recon, target, pids), rel=1e-5)


def test_wrong_person_floor_uses_every_picture_of_a_pk_batch_once() -> None:
    pids = torch.arange(4).repeat_interleave(3)
    used = []
    wrong_person_floor(
        torch.zeros(12, 1, 1, 1),
        torch.arange(12.0).reshape(12, 1, 1, 1),
        pids,
        lambda recon, target: used.extend(target.flatten().tolist()) or torch.zeros(12),
    )
    assert sorted(used) == list(range(12))


# --- distance correlation


def correlation_oracle(x: Tensor, y: Tensor) -> float:
    def centred(rows: list[list[float]]) -> list[list[float]]:
        n = len(rows)
        d = [[math.dist(a, b) for b in rows] for a in rows]
        means = [sum(row) / n for row in d]
        grand = sum(means) / n
        return [[d[i][j] - means[i] - means[j] + grand for j in range(n)] for i in range(n)]

    def covariance(a: list[list[float]], b: list[list[float]]) -> float:
        return sum(p * q for u, v in zip(a, b, strict=True) for p, q in zip(u, v, strict=True)) / len(a) ** 2

    a, b = centred(x.tolist()), centred(y.tolist())
    return covariance(a, b) / math.sqrt(covariance(a, a) * covariance(b, b))


def test_distance_correlation_equals_plain_loops() -> None:
    x, y = random(7, 3), random(7, 5, seed=1)
    assert distance_correlation(x, y).item() == pytest.approx(correlation_oracle(x, y), rel=1e-5)
    assert distance_correlation(x, 3 * x + 1).item() == pytest.approx(1, abs=1e-5)
    assert distance_correlation(random(300, 2), random(300, 2, seed=1)).item() < 0.05


def test_distance_correlation_gradient_is_right_and_finite_where_distances_are_zero() -> None:
    x, y = random(6, 3, dtype=torch.float64).requires_grad_(), random(6, 4, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(distance_correlation, (x, y))
    for rows in (random(3, 2).repeat(2, 1), torch.ones(6, 2)):
        rows.requires_grad_()
        value = distance_correlation(rows, y)
        value.backward()
        assert torch.isfinite(rows.grad).all()
    assert value.item() == pytest.approx(0, abs=1e-6)  # the constant ones
    assert distance_correlation(torch.full((6, 2), 0.1), torch.full((6, 4), 0.2)).item() == pytest.approx(0, abs=1e-6)


# --- two processes equal one


def objectives(weight: Tensor, x: Tensor, pictures: Tensor, pids: Tensor, rows: slice) -> list[Tensor]:
    """Every objective that looks over processes, on features x @ weight of this process's rows."""
    features = x[rows] @ weight
    everyone, targets = gather(F.normalize(features)), gather(pictures[rows].flatten(1))
    recon = (features @ weight.T).mean(1)[:, None, None, None] + 0 * pictures[rows]
    alone = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 4, 5, 5, 5, 5])  # one anchor on each has no positive
    floor = wrong_person_floor(recon, pictures[rows], pids[rows], absolute)
    return [
        triplet_loss(features, pids[rows], TripletConfig(margin=0.3)),
        triplet_loss(features, alone[rows], TripletConfig(margin=None)),
        bounded(absolute(recon, pictures[rows]), 2 * floor),
        ridge_best_response(everyone, targets, pids.numpy(), RidgeConfig(), seed=3, step=1).loss,
        distance_correlation(everyone, targets),
        neighbourhood_loss(F.normalize(features), pids[rows], NeighbourhoodConfig()),
        neighbourhood_loss(F.normalize(features), alone[rows], NeighbourhoodConfig(width=1.0)),
    ]


def losses_and_gradients(rows: slice) -> list[tuple[Tensor, Tensor]]:
    x, pictures = random(16, 6), random(16, 3, 4, 4, seed=1).sigmoid()
    x = x + 3 * pictures.flatten(1)[:, :6]
    pids, results = torch.arange(4).repeat_interleave(4), []
    for number in range(7):
        weight = random(6, 6, seed=2).requires_grad_()
        loss = objectives(weight, x, pictures, pids, rows)[number]
        loss.backward()
        results.append((loss.detach(), weight.grad))
    return results


def as_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results = losses_and_gradients(rank_rows(16))
    for pair in results:
        for value in pair:
            dist.all_reduce(value)
            value /= 2  # what DDP does to gradients
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_losses_and_gradients_of_one(tmp_path: Path) -> None:
    alone = losses_and_gradients(slice(0, 16))
    mp.spawn(as_a_rank, args=(str(tmp_path),), nprocs=2)
    together = torch.load(tmp_path / "results.pt", weights_only=True)
    for (loss, gradient), (shared_loss, shared_gradient) in zip(alone, together, strict=True):
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(shared_loss, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(shared_gradient, gradient, rtol=1e-4, atol=1e-6)
