"""Kernels beside their plain twins, on the GPU where there is one: what can be chosen, and what is always used.

SSIM, cross-entropy: forward and backward. What can't run here is named with the reason. ``chosen`` marks what `auto`
takes, and where another was faster says so: then the order in ``ppreid_dist/kernels/choice.py`` should change.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from bench_process import device, measured
from torch import Tensor, nn
from torch.nn import functional as F

from ppreid_dist.errors import ConfigError
from ppreid_dist.evaluation import ranking
from ppreid_dist.evaluation.ranking import Entries
from ppreid_dist.kernels import choice, nearer
from ppreid_dist.kernels.batch_hard import hardest
from ppreid_dist.kernels.choice import KernelsConfig, using
from ppreid_dist.kernels.clip import clip_, total_norm
from ppreid_dist.kernels.ssim import C1, C2, ssim_map
from ppreid_dist.losses.identity import IdentityConfig, identity_loss
from ppreid_dist.training.optimiser import OptimiserConfig, make_optimiser

Work = Callable[[], Any]
LEAD = 1.05  # a lead of less is noise


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=[*CHOSEN, *TWINS], default=[*CHOSEN, *TWINS])


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in options.only:
        ways = _implementations(name) if name in CHOSEN else {way: (twin, ()) for way, twin in TWINS[name].items()}
        found: dict[str, dict[str, Any]] = {}
        for way, (prepare, asked) in ways.items():
            try:
                found[way] = measured(prepare, *asked, repeats=5 * options.repeats, threads=options.threads)
            except ConfigError as error:
                rows.append({"kernel": name, "way": way, "chosen": str(error).split(": ", 2)[2]})
        twin = found.get("plain") or next(iter(found.values()))
        fastest = min(one["seconds"] for one in found.values())
        for way, one in found.items():
            row = {"kernel": name, "way": way, **one, "ratio": twin["seconds"] / one["seconds"]}
            distances = _rows(device()) ** 2 if name == "batch_hard" else 0
            if name in CHOSEN and choice.of(name, device(), distances=distances).implementation == way:
                row["chosen"] = "auto" if one["seconds"] <= LEAD * fastest else "auto, though slower"
            rows.append(row)
    return rows


def _implementations(operation: str) -> dict[str, tuple[Callable[..., Work], tuple[str, str]]]:
    known = KernelsConfig.__dataclass_fields__[operation].metadata["choices"]
    return {way: (choosing, (operation, way)) for way in known if way != "auto"}


def choosing(operation: str, way: str) -> Work:
    """The operation by one of its implementations. ConfigError where that can't run here."""
    config = KernelsConfig(**{operation: way}, strict=True)
    with using(config, device()):
        work = CHOSEN[operation](device())

    def chosen() -> None:
        with using(config, device()):
            work()

    return chosen


# --- what can be chosen: an operation on a device ------------------------------------------------------------------


def weights(device: torch.device) -> list[nn.Parameter]:
    """Of a ResNet-50's number and sizes, about, with gradients."""
    shapes = [(512, 512, 3, 3)] * 6 + [(256, 256, 3, 3)] * 9 + [(1024, 256, 1, 1)] * 12 + [(256,)] * 130
    parameters = [nn.Parameter(torch.randn(shape, device=device) * 0.01) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn_like(p)
    return parameters


def adam(device: torch.device) -> Work:
    """A step of 23 million weights in 157 tensors."""
    return make_optimiser(weights(device), OptimiserConfig(lr=1e-4)).step


def clip(device: torch.device) -> Work:
    """The norm of 23 million gradients in 157 tensors, and their scaling."""
    parameters = weights(device)

    def work() -> None:
        clip_(parameters, 1e-3, total_norm([p.grad for p in parameters if p.grad is not None]))

    return work


def cross_entropy(device: torch.device) -> Work:
    """256 rows of 100,000 identities, forward and backward."""
    logits_BC = torch.randn(256, 100_000, device=device, requires_grad=True)
    labels_B = torch.randint(100_000, (256,), device=device)
    return lambda: torch.autograd.grad(identity_loss(logits_BC, labels_B, IdentityConfig()), logits_BC)


def ssim(device: torch.device) -> Work:
    """256 pictures of 64×32 in three channels, forward and backward."""
    x_B3hw, y_B3hw = torch.rand(2, 256, 3, 64, 32, device=device)
    x_B3hw.requires_grad_()
    return lambda: torch.autograd.grad(ssim_map(x_B3hw, y_B3hw).mean(), x_B3hw)


def _rows(device: torch.device) -> int:
    return 8192 if device.type == "cuda" else 1024


def batch_hard(device: torch.device) -> Work:
    """Rows of 2048 features, each an anchor."""
    rows = _rows(device)
    all_ND, pids_N = torch.randn(rows, 2048, device=device), torch.arange(rows, device=device) // 4
    itself_N = torch.arange(rows, device=device)
    return lambda: hardest(all_ND, all_ND, pids_N, pids_N, itself_N)


# --- SSIM of 64 pictures of 128×64, forward and backward ----------------------------------------------------------


def ssim_by_convolution() -> Work:
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


def ssim_by_products() -> Work:
    return _differentiated(ssim_map)


def _differentiated(ssim: Callable[[Tensor, Tensor], Tensor]) -> Work:
    x_B3hw, y_B3hw = torch.rand(2, 64, 3, 128, 64, generator=torch.Generator().manual_seed(0)).to(device())
    x_B3hw.requires_grad_()
    return lambda: ssim(x_B3hw, y_B3hw).mean().backward()


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


def nearer_exact() -> Work:
    queries, items, *labels = _tile()
    whole = [of.whole(slice(None)) for of in (queries, items)]
    return lambda: nearer.exact(whole[0], whole[1], *labels)


def nearer_screened() -> Work:
    if device().type != "cpu":
        raise ConfigError("kernels.nearer: screened: it is for CPUs")
    queries, items, *labels = _tile()
    unit = [of.unit(slice(None)) for of in (queries, items)]

    def exactly(query_P: Tensor, item_P: Tensor) -> Tensor:
        return torch.einsum("pd,pd->p", queries.whole(query_P), items.whole(item_P)).long()

    whole = (queries.whole(slice(None)), items.whole(slice(None)))
    once = 1 / ranking.ONE**2
    return lambda: nearer.screened(unit[0], unit[1], *labels, unit=once, whole=lambda: whole, exactly=exactly)


def nearer_by_triton() -> Work:
    with using(KernelsConfig(nearer="triton", strict=True), device()):
        queries, items, *labels = _tile()
    whole = [of.whole(slice(None)) for of in (queries, items)]
    return lambda: nearer.by_triton(whole[0], whole[1], *labels)


CHOSEN = {"adam": adam, "clip": clip, "cross_entropy": cross_entropy, "ssim": ssim, "batch_hard": batch_hard}
TWINS: dict[str, dict[str, Callable[[], Work]]] = {
    "ssim by convolutions": {"convolutions": ssim_by_convolution, "matrix products": ssim_by_products},
    "nearer": {"whole numbers": nearer_exact, "screened in float32": nearer_screened, "triton": nearer_by_triton},
}
