"""Triton's kernels in its interpreter against their plain twins in float64; tests/test_kernels.py runs this file in a
process of its own, where TRITON_INTERPRET=1 is set before Triton is imported."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ppreid_dist.evaluation.ranking import Entries, rank_in_parts
from ppreid_dist.kernels import batch_hard_triton, choice, nearer, nearer_triton, ssim_triton
from ppreid_dist.kernels.batch_hard import hardest_at_once
from ppreid_dist.kernels.ssim import plain_ssim_map, ssim_map
from ppreid_dist.losses.triplet import TripletConfig, triplet_loss

torch.set_num_threads(1)


def pictures(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, noisy copies, and a gradient of their map."""
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=draw, dtype=dtype)
    y = (x + 0.2 * torch.randn(shape, generator=draw, dtype=dtype)).clamp(0, 1)
    return x, y, torch.randn(shape[0], 1, *shape[2:], generator=draw, dtype=dtype)


@pytest.mark.parametrize(
    ("shape", "window", "tile", "dtype"),
    [
        ((1, 1, 7, 5), 11, (16, 32), torch.float32),
        ((2, 3, 33, 17), 3, (32, 32), torch.float32),
        ((1, 1, 64, 32), 11, (64, 32), torch.float32),
        ((1, 3, 1, 1), 11, (16, 16), torch.float32),
        ((1, 2, 9, 6), 5, (8, 4), torch.float64),
    ],
    ids=str,
)
def test_ssim_is_its_twin_s(shape: tuple[int, ...], window: int, tile: tuple[int, int], dtype: torch.dtype) -> None:
    x, y, gradient = pictures(shape, dtype)
    x.requires_grad_(), y.requires_grad_()
    result = ssim_triton.ssim_map(x, y, window=window, tile=tile)
    ours = result, *torch.autograd.grad(result, (x, y), gradient)
    exact_x, exact_y = (t.detach().double().requires_grad_() for t in (x, y))
    exact = plain_ssim_map(exact_x, exact_y, window=window)
    twins = exact, *torch.autograd.grad(exact, (exact_x, exact_y), gradient.double())
    rtol = 1e-4 if dtype == torch.float32 else 1e-11
    for our, twin in zip(ours, twins, strict=True):
        assert our.dtype == dtype
        torch.testing.assert_close(our.double(), twin, rtol=rtol, atol=rtol * float(twin.detach().abs().max()))


def test_ssim_has_no_gradient_that_nobody_asked_for() -> None:
    x, y, gradient = pictures((1, 2, 6, 4), torch.float32)
    both = ssim_triton.ssim_map(x.requires_grad_(), y.requires_grad_())
    of_x, of_y = torch.autograd.grad(both, (x, y), gradient)
    for a, b, expected in ((x, y.detach(), of_x), (y, x.detach(), of_y)):
        left = ssim_triton.ssim_map(a, b)  # SSIM is symmetric
        torch.testing.assert_close(torch.autograd.grad(left, a, gradient)[0], expected)
        right = ssim_triton.ssim_map(b, a)
        torch.testing.assert_close(torch.autograd.grad(right, a, gradient)[0], expected)
    with torch.no_grad():
        assert torch.equal(ssim_triton.ssim_map(x, y), both)
    half = ssim_triton.ssim_map(x.detach().bfloat16().to(memory_format=torch.channels_last), y.detach().bfloat16())
    assert half.dtype == torch.float32 and torch.allclose(half, both, atol=0.05)
    assert ssim_triton.ssim_map(x[:0], y[:0]).shape == (0, 1, 6, 4)


@pytest.mark.parametrize(
    ("anchors", "rows", "dim", "programs"),
    [(1, 1, 1, 512), (20, 70, 3, 512), (20, 70, 3, 1), (17, 40, 130, 512), (9, 50, 1, 1)],
)
def test_mining_is_its_twin_s(
    anchors: int, rows: int, dim: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_hard_triton, "_PROGRAMS", programs)
    draw = torch.Generator().manual_seed(dim)
    all_ND = torch.randn(rows, dim, generator=draw)
    pids_N = torch.randint(0, max(2, rows // 4), (rows,), generator=draw)
    if rows > 30:  # equal rows, in one tile and in two; a person without others, one whose row is alone
        all_ND[[3, 20, 25]], pids_N[[3, 20, 25]] = all_ND[rows - 1].clone(), pids_N[rows - 1].clone()
        all_ND[[5, 6, 33]], pids_N[[5, 6, 33]] = all_ND[rows - 2].clone(), pids_N[rows - 2].clone()
        pids_N[rows - 5] = 1000
    itself_B = torch.arange(anchors) + rows - anchors
    for pids in (pids_N, torch.zeros_like(pids_N)):
        given = all_ND[itself_B], all_ND, pids[itself_B], pids, itself_B
        ours = batch_hard_triton.hardest(*given, tile=(16, 16))
        twins = hardest_at_once(given[0].double(), given[1].double(), *given[2:])
        for our, twin in zip(ours, twins, strict=True):
            assert our.dtype == twin.dtype and torch.equal(our, twin)


@pytest.mark.parametrize(("queries", "items", "dim", "most"), [(1, 1, 1, 1), (20, 70, 5, 3), (33, 130, 40, 7)])
def test_counts_are_their_twin_s(queries: int, items: int, dim: int, most: int) -> None:
    """Few distinct whole numbers, so that ties abound; positives before, within and behind the tile; some lack."""
    draw = torch.Generator().manual_seed(items)
    query_QD, gallery_GD = (torch.randint(-2, 3, (n, dim), generator=draw).double() for n in (queries, items))
    junk_QG = torch.rand(queries, items, generator=draw) < 0.2
    bar_QM = torch.randint(-6, 7, (queries, most), generator=draw)
    place_QM = torch.randint(-9, items + 9, (queries, most), generator=draw)
    for _ in range(2):  # in ascending order, equal bars by falling place
        order_QM = (bar_QM * 1000 - place_QM).argsort(1)
        bar_QM, place_QM = bar_QM.gather(1, order_QM), place_QM.gather(1, order_QM)
    bar_QM[:, most // 2 + 1 :][torch.rand(queries, most - most // 2 - 1, generator=draw) < 0.5] = nearer.NONE
    bar_QM, order_QM = bar_QM.sort(1)
    given = query_QD, gallery_GD, junk_QG, bar_QM, place_QM.gather(1, order_QM)
    ours = nearer_triton.count(*given, none=nearer.NONE, tile=(16, 16))
    assert torch.equal(ours, nearer.exact(*given)) and (items == 1 or ours.sum() > 0)


def test_a_ranking_takes_it_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, taken, honest = torch.Generator().manual_seed(0), [], nearer_triton.count
    monkeypatch.setattr(nearer_triton, "count", lambda *a, **k: (taken.append(1), honest(*a, **k))[1])
    pids, cameras = np.arange(60) % 7, np.arange(60) % 3
    asked = [Entries(features_ND=torch.randn(60, 9, generator=draw), pids_N=pids, camids_N=cameras) for _ in range(2)]
    plain = rank_in_parts(asked[0], [lambda: asked[1]])
    with choice.using(choice.KernelsConfig(nearer="triton", strict=True), torch.device("cpu")):
        ours = rank_in_parts(asked[0], [lambda: asked[1]])
    assert taken == [1]
    np.testing.assert_array_equal(ours.ap_Q, plain.ap_Q)


def test_losses_take_them_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for module, name in ((ssim_triton, "ssim_map"), (batch_hard_triton, "hardest")):
        honest = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=honest, n=name, **k: (taken.append(n), f(*a, **k))[1])
    x, y, _ = pictures((1, 1, 5, 5), torch.float32)
    features, pids = torch.randn(8, 4), torch.arange(8) // 2
    assert choice.of("ssim", x.device).implementation == "plain"  # the interpreter is never the choice of its own
    plain = ssim_map(x, y), triplet_loss(features, pids, TripletConfig())
    config = choice.KernelsConfig(ssim="triton", batch_hard="triton", strict=True)
    with choice.using(config, x.device):
        taken.clear()  # that it can run at all has been tried
        ours = ssim_map(x, y), triplet_loss(features, pids, TripletConfig())
    assert taken == ["ssim_map", "hardest"]
    torch.testing.assert_close(ours, plain)
