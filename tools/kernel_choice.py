"""What each implementation of an operation costs on this machine, and whether the chosen one deserves it. Markdown.

    python tools/kernel_choice.py                    all operations, on the GPU where there is one
    python tools/kernel_choice.py adam ssim --runs 20

Times are medians over runs, in ms, of the whole operation (SSIM: forward and backward); memory is what the operation
adds at its peak, in MiB, on a GPU only. An implementation that can't run here is named with the reason. A row marked
"slower" is chosen by `auto` though another one was faster: change the order in ``ppreid_dist/kernels/choice.py``.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from ppreid_dist.errors import ConfigError
from ppreid_dist.kernels import choice
from ppreid_dist.kernels.batch_hard import hardest
from ppreid_dist.kernels.choice import KernelsConfig, using
from ppreid_dist.kernels.clip import clip_, total_norm
from ppreid_dist.kernels.ssim import ssim_map
from ppreid_dist.losses.identity import IdentityConfig, identity_loss
from ppreid_dist.training.optimiser import OptimiserConfig, make_optimiser

Work = Callable[[], object]
LEAD = 1.05  # a lead of less is noise


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


def batch_hard(device: torch.device) -> Work:
    """8,192 rows of 2048 features on a GPU, 1,024 on a CPU, each an anchor."""
    rows = 8192 if device.type == "cuda" else 1024
    all_ND, pids_N = torch.randn(rows, 2048, device=device), torch.arange(rows, device=device) // 4
    itself_N = torch.arange(rows, device=device)
    return lambda: hardest(all_ND, all_ND, pids_N, pids_N, itself_N)


OPERATIONS = {"adam": adam, "clip": clip, "cross_entropy": cross_entropy, "ssim": ssim, "batch_hard": batch_hard}


def measure(work: Work, device: torch.device, runs: int) -> tuple[float, float]:
    """Median ms a run, and MiB that it adds at its peak (0 on a CPU)."""
    on_gpu, times = device.type == "cuda", []
    for _ in range(3 if on_gpu else 1):  # compilation, caches
        work()
    held = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    for _ in range(runs):
        start = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() - held if on_gpu else 0
    return statistics.median(times) * 1e3, peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", choices=[*OPERATIONS, []], help="default: all")
    parser.add_argument("--runs", type=int, default=10)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, torch {torch.__version__}\n")
    print("| operation | implementation | ms | MiB | |\n| --- | --- | --- | --- | --- |")
    for operation in options.operations or OPERATIONS:
        auto, found = choice.of(operation, device).implementation, {}
        for implementation in KernelsConfig.__dataclass_fields__[operation].metadata["choices"][1:]:
            try:
                with using(KernelsConfig(**{operation: implementation}, strict=True), device):
                    found[implementation] = measure(OPERATIONS[operation](device), device, options.runs)
            except ConfigError as error:
                print(f"| {operation} | {implementation} | | | {str(error).split(': ', 2)[2]} |")
        fastest = min(time for time, _ in found.values())
        for implementation, (time_ms, memory) in found.items():
            verdict = "" if implementation != auto else "auto" if time_ms <= LEAD * fastest else "auto, slower"
            print(f"| {operation} | {implementation} | {time_ms:.2f} | {memory:.0f} | {verdict} |", flush=True)


if __name__ == "__main__":
    main()
