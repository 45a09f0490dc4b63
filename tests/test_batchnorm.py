"""BatchNorm over several processes against the plain layer on the whole batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ppreid_dist.models.batchnorm import SummedBatchNorm, convert_batchnorm

ROWS = (slice(0, 4), slice(4, 10))  # unequal shares on purpose
STEPS = 3


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    # No bias before BatchNorm: its gradient is 0 but for rounding, which can't be compared.
    conv = nn.Conv2d(3, 6, 3, bias=False)
    net = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(48))
    net[4].bias.requires_grad_(False)
    # Without a bias of its own the first layer's weight would cancel in the second: again a gradient of rounding.
    nn.init.normal_(net[1].bias)
    return net


def _batch(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return torch.randn(10, 3, 6, 4, generator=draw) + 3, torch.randn(10, 48, generator=draw)


def _train(net: nn.Sequential, rows: slice) -> dict[str, Tensor]:
    """A few batches' ``rows`` under a loss whose gradient BatchNorm doesn't cancel; everything that came of it."""
    found = {}
    for step in range(STEPS):
        x, target = (whole[rows].to(net[0].weight.dtype, copy=True) for whole in _batch(step))
        y = net(x.requires_grad_())
        (y - target).pow(3).sum().backward()
        found |= {f"output {step}": y.detach(), f"gradient {step}": x.grad}
    found |= {f"parameter {name}": p.grad for name, p in net.named_parameters() if p.requires_grad}
    found |= {f"state {name}": value.clone() for name, value in net.state_dict().items()}
    return found | {"in eval mode": net.eval()(_batch(99)[0][rows].to(net[0].weight.dtype)).detach()}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(ROWS))
    net = _net()
    parameters = list(net.parameters())
    assert convert_batchnorm(net) is net
    assert all(now is before for now, before in zip(net.parameters(), parameters, strict=True))
    assert [type(layer) for layer in net].count(SummedBatchNorm) == 2
    alone = convert_batchnorm(nn.BatchNorm1d(5))
    assert isinstance(alone, SummedBatchNorm)
    assert alone(torch.randn(4, 5).bfloat16()).dtype == torch.bfloat16
    found = _train(net, ROWS[rank])
    for name, value in found.items():
        if name.startswith("parameter"):
            dist.all_reduce(value)
    # Far from zero, a one-pass variance in fp32 would be wrong altogether.
    found["far"] = convert_batchnorm(nn.BatchNorm1d(48))(_batch(0)[1][ROWS[rank]] + 4096).detach()
    save_file(found, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank, (str(folder),), nprocs=len(ROWS))
    return [load_file(folder / f"{rank}.safetensors") for rank in range(len(ROWS))]


def test_two_processes_equal_one_with_the_whole_batch(two_ranks: list[dict[str, Tensor]]) -> None:
    # In fp64; where torch's own layer in fp32 is further from that than 1e-5 (a gradient of small differences), ours
    # may be as far.
    whole, torchs = _train(_net().double(), slice(None)), _train(_net(), slice(None))
    assert [set(found) - {"far"} for found in two_ranks] == [set(whole)] * 2  # the state's keys among them
    for name, expected in whole.items():
        for rank, found in enumerate(two_ranks):
            wanted = expected if name.startswith(("parameter", "state")) else expected[ROWS[rank]]
            # Relative to the largest entry: a gradient's small entries are differences of large ones.
            torch_off = float((torchs[name].double() - expected).abs().max())
            tolerance = max(1e-5 * max(1.0, float(wanted.abs().max())), 1.25 * torch_off)
            off = float((found[name].double() - wanted).abs().max())
            assert off <= tolerance, f"rank {rank}: {name} is {off} off"


def test_statistics_far_from_zero(two_ranks: list[dict[str, Tensor]]) -> None:
    x = (_batch(0)[1] + 4096).double()
    expected = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    found = torch.cat([found["far"] for found in two_ranks]).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_one_process_keeps_its_layers() -> None:
    net = _net()
    assert convert_batchnorm(net) is net
    assert [type(net[1]), type(net[4])] == [nn.BatchNorm2d, nn.BatchNorm1d]
