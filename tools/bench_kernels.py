"""Kernels beside their plain twins, each forward and backward where it is differentiated, in this process's device."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from bench_process import device, measured
from torch import Tensor, nn
from torch.nn import functional as F

from ppreid_dist.evaluation import ranking
from ppreid_dist.evaluation.ranking import Entries
from ppreid_dist.kernels import nearer
from ppreid_dist.kernels.ssim import C1, C2, ssim_map

Kernel = Callable[[], Callable[[], Any]]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=[*TWINS], default=[*TWINS])


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in options.only:
        first = None
        for way, prepare in TWINS[name].items():
            found = measured(prepare, repeats=5 * options.repeats, threads=options.threads)
            first = first or found["seconds"]
            rows.append({"kernel": name, "way": way, **found, "ratio": first / found["seconds"]})
    return rows


# --- SSIM of 64 pictures of 128×64, forward and backward ----------------------------------------------------------


def ssim_by_convolution() -> Callable[[], Any]:
    """As it is mostly written: a Gaussian window, five convolutions of one channel each."""
    line = torch.exp(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(line / line.sum(), line / line.sum()).expand(3, 1, 11, 11).contiguous().to(device())

    def blur(x_BCHW: Tensor) -> Tensor:
        return F.conv2d(F.pad(x_BCHW, (5, 5, 5, 5), mode="reflect"), window, groups=3)

    def ssim(x: Tensor, y: Tensor) -> Tensor:
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y, both = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
        return ((2 * mean_x * mean_y + C1) * (2 * both + C2)) / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))

    return _differentiated(ssim)


def ssim_by_products() -> Callable[[], Any]:
    return _differentiated(ssim_map)


def _differentiated(ssim: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
    x_B3hw, y_B3hw = torch.rand(2, 64, 3, 128, 64, generator=torch.Generator().manual_seed(0)).to(device())
    x_B3hw.requires_grad_()
    return lambda: ssim(x_B3hw, y_B3hw).mean().backward()


# --- Adam's step on 25 million weights in 160 tensors ---------------------------------------------------------------


def adam(**how: bool) -> Callable[[], Any]:
    weights = [nn.Parameter(torch.zeros(160_000, device=device())) for _ in range(160)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    return torch.optim.Adam(weights, **how).step  # type: ignore[arg-type]


def adam_plain() -> Callable[[], Any]:
    return adam(foreach=False)


def adam_foreach() -> Callable[[], Any]:
    return adam(foreach=True)


def adam_fused() -> Callable[[], Any]:
    return adam(fused=True)


# --- Items nearer than each positive: 256 queries, 4096 items, 2048 dimensions, 16 positives, at random -------------


def _tile() -> tuple[Entries, Entries, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    queries, items = (
        Entries(features_ND=torch.randn(n, 2048, generator=draw).to(device()), pids_N=torch.zeros(n).numpy(),
                camids_N=torch.zeros(n).numpy()) for n in (256, 4096)
    )  # fmt: skip
    whole_QG = (queries.whole(slice(None)) @ items.whole(slice(None)).T).long()
    place_QM = torch.arange(0, 4096, 256, device=device()).expand(256, -1)
    bar_QM, order_QM = whole_QG.gather(1, place_QM).sort(1)
    junk_QG = torch.zeros(256, 4096, dtype=torch.bool, device=device())
    return queries, items, junk_QG, bar_QM, place_QM.gather(1, order_QM)


def nearer_exact() -> Callable[[], Any]:
    queries, items, *labels = _tile()
    whole = [of.whole(slice(None)) for of in (queries, items)]
    return lambda: nearer.exact(whole[0], whole[1], *labels)


def nearer_screened() -> Callable[[], Any]:
    queries, items, *labels = _tile()
    unit = [of.unit(slice(None)) for of in (queries, items)]

    def exactly(query_P: Tensor, item_P: Tensor) -> Tensor:
        return torch.einsum("pd,pd->p", queries.whole(query_P), items.whole(item_P)).long()

    whole = (queries.whole(slice(None)), items.whole(slice(None)))
    once = 1 / ranking.ONE**2
    return lambda: nearer.screened(unit[0], unit[1], *labels, unit=once, whole=lambda: whole, exactly=exactly)


TWINS: dict[str, dict[str, Kernel]] = {
    "ssim": {"convolutions": ssim_by_convolution, "matrix products": ssim_by_products},
    "adam": {"plain": adam_plain, "foreach": adam_foreach, "fused": adam_fused},
    "nearer": {"whole numbers": nearer_exact, "screened in float32": nearer_screened},
}
