"""A head split over processes is the plain head, to rounding; each process holds its share only."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from ranks import finish, start_ranks
from training_runs import assert_same, last, run

from ppreid_dist.distributed import gather, rank_rows, share
from ppreid_dist.losses.identity import IdentityConfig, identity_loss, split_identity_loss
from ppreid_dist.models.folder import load_extractor
from ppreid_dist.models.split_head import SplitHead
from ppreid_dist.training.tracking import read_metrics

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
    assert [len(part[3]) for part in parts] == [len(range(CLASSES)[share(CLASSES, r, ranks)]) for r in range(ranks)]


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


@pytest.mark.engines
def test_the_whole_training_with_a_split_head(world: list[str], tmp_path: Path) -> None:
    """24 identities on 2 processes as on one; stopped under 2 processes and ended under 1."""
    settings = [*world, "privacy.weight=0", "data.identities_per_batch=6", "training.images=120", "optimiser.clip=1.0"]
    split = [*settings, "identity.head=split"]
    ended = finish(start_ranks(2, *split, f"output={tmp_path / 'moved'}", "training.checkpoint_every=3"))
    assert [status for status, _ in ended] == [0, 0], ended
    alone = run(split, tmp_path / "alone")
    two = last(tmp_path / "moved")
    assert two["/modules/head/weight"].shape == (24, 16)
    kept = {name: t for name, t in alone.items() if not name.startswith("/optimisers")}
    # Adam divides by moments that begin near 0, and an identity is met once in a few steps: 5e-4 was seen.
    assert_same(kept, {name: two[name] for name in kept}, tolerance=3e-3)
    assert two["/optimisers/head/state/0/exp_avg"].shape == two["/modules/head/weight"].shape

    newest = sorted((tmp_path / "moved" / "checkpoints").glob("step_*"))
    shutil.rmtree(newest[-1])
    (tmp_path / "moved" / "result.json").unlink()
    moved = run(split, tmp_path / "moved", resume=True)
    assert_same(kept, {name: moved[name] for name in kept}, tolerance=3e-3)
    finished = load_extractor(tmp_path / "moved" / "model", "cpu")
    assert finished.extractor.classifier is None


@pytest.mark.engines
def test_a_split_head_of_one_process_trains_as_the_plain_one(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And clipping, which is at work here, sees one gradient."""
    drawn = torch.nn.init.normal_

    def pattern(weight: torch.Tensor, *arguments: float, **options: float) -> torch.Tensor:
        if len(weight) != 24:
            return drawn(weight, *arguments, **options)
        with torch.no_grad():
            return weight.copy_(torch.arange(weight.numel()).cos().view_as(weight) / 100)

    monkeypatch.setattr(torch.nn.init, "normal_", pattern)
    monkeypatch.setattr(SplitHead, "_draw", lambda self, seed: pattern(self.weight))
    # All identities are in every batch: of one that is not almost no gradient is left, by whose rounding Adam divides.
    every = "data.identities_per_batch=24"
    settings = [*world, every, "privacy.weight=0", "training.images=240", "optimiser.clip=1.0"]
    plain = run(settings, tmp_path / "plain")
    split = run([*settings, "identity.head=split"], tmp_path / "split")
    rows = read_metrics(tmp_path / "split" / "metrics.jsonl")
    assert any(row["extractor/gradient"] > 1 for row in rows)
    for name, tensor in plain.items():
        if name.startswith("/modules/extractor"):
            other = name.replace("/modules/extractor/classifier.weight", "/modules/head/weight")
            assert_same({name: tensor}, {name: split[other]}, tolerance=2e-5)
