"""A head split over processes is the plain head, to rounding; each process holds its share only."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from ppreid_dist.distributed import gather, rank_rows
from ppreid_dist.losses.identity import IdentityConfig, identity_loss, split_identity_loss
from ppreid_dist.models.split_head import SplitHead, share

ROWS, DIM, CLASSES = 12, 5, 7
CONFIG = IdentityConfig(smoothing=0.1)


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 4, generator=generator)
    backbone, head = (torch.randn(*shape, generator=generator) for shape in ((4, DIM), (CLASSES, DIM)))
    return x, torch.arange(ROWS) % CLASSES, 3 * backbone, head


def as_a_rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        x, labels, backbone, weights = problem()
        backbone.requires_grad_()
        head = SplitHead(DIM, CLASSES)
        with torch.no_grad():
            drawn = head.weight.clone()
            head.weight.copy_(weights[head.rows])
        rows = rank_rows(ROWS)
        logits = head(gather(x[rows] @ backbone))
        loss = split_identity_loss(logits, gather(labels[rows]), head.rows.start, CLASSES, CONFIG)
        loss.backward()
        dist.all_reduce(backbone.grad)  # as DDP does
        torch.save((loss.detach(), backbone.grad / ranks, head.weight.grad, drawn), f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()


@pytest.mark.engines
@pytest.mark.parametrize("ranks", [2, 3])
def test_split_is_plain(tmp_path: Path, ranks: int) -> None:
    mp.spawn(as_a_rank, (ranks, str(tmp_path)), nprocs=ranks)
    parts = [torch.load(tmp_path / str(rank)) for rank in range(ranks)]
    x, labels, backbone, weights = problem()
    backbone.requires_grad_(), weights.requires_grad_()
    loss = identity_loss(x @ backbone @ weights.T, labels, CONFIG)
    loss.backward()
    for part in parts:
        torch.testing.assert_close(part[0], loss.detach())
        torch.testing.assert_close(part[1], backbone.grad)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), weights.grad)
    assert [len(part[3]) for part in parts] == [
        share(CLASSES, r, ranks).stop - share(CLASSES, r, ranks).start for r in range(ranks)
    ]


def test_one_process_is_the_plain_head() -> None:
    x, labels, backbone, weights = problem()
    head = SplitHead(DIM, CLASSES)
    with torch.no_grad():
        head.weight.copy_(weights)
    split = split_identity_loss(head(x @ backbone), labels, 0, CLASSES, CONFIG)
    torch.testing.assert_close(split, identity_loss(x @ backbone @ weights.T, labels, CONFIG))


def test_what_an_identity_begins_with_does_not_depend_on_the_number_of_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def drawn(ranks: int) -> torch.Tensor:
        parts = []
        for rank in range(ranks):
            monkeypatch.setattr("ppreid_dist.distributed.rank", lambda rank=rank: rank)
            monkeypatch.setattr("ppreid_dist.distributed.world_size", lambda: ranks)
            torch.manual_seed(4)
            parts.append(SplitHead(3, 2500).weight.detach())
        return torch.cat(parts)

    alone = drawn(1)
    assert alone.std() == pytest.approx(0.001, rel=0.05)
    assert torch.equal(alone, drawn(2)) and torch.equal(alone, drawn(5))


@given(classes=st.integers(1, 10_000), ranks=st.integers(1, 64))
def test_shares_are_even_and_whole(classes: int, ranks: int) -> None:
    shares = [share(classes, rank, ranks) for rank in range(ranks)]
    sizes = [s.stop - s.start for s in shares]
    assert max(sizes) - min(sizes) <= 1
    assert [shares[0].start, *(s.stop for s in shares)] == [0, *(s.start for s in shares[1:]), classes]
