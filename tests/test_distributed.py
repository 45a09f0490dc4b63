"""The collectives on two real processes."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ppreid_dist.distributed import gather, mean_over_ranks, rank_rows, sum_over_ranks


def work(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        b = torch.ones(1, requires_grad=True)
        z = b * 1
        ((gather(z) + z) ** 2).sum().backward()  # the gathered and the own branch share a gradient
        # f(b0, b1) on rank r is (b0 + br)^2 + (b1 + br)^2; both ranks ask: rows' gradients 4 + 4, own branch 8.
        assert b.grad is not None and b.grad.item() == 16, b.grad
        x = torch.full((2,), float(rank + 1), requires_grad=True)
        (sum_over_ranks(x) * (rank + 1)).sum().backward()
        assert torch.equal(x.grad, torch.full((2,), 3.0)), x.grad
        assert mean_over_ranks(torch.tensor(float(rank))) == 0.5
        assert rank_rows(6) == slice(rank * 3, rank * 3 + 3)
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path / "store"),), nprocs=2)


def test_one_process_is_the_plain_thing() -> None:
    x = torch.arange(3.0)
    assert gather(x) is x and sum_over_ranks(x) is x and rank_rows(4) == slice(0, 4)
