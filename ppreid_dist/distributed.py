"""The few collectives the losses and layers need; each is the plain one-process thing when no group is up."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed them and warns of the older names.
_gather_rows = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_sums = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank_rows(total: int) -> slice:
    """The rows of a global batch of ``total`` that are this process's (``total`` divides by the world size)."""
    share = total // world_size()
    return slice(rank() * share, (rank() + 1) * share)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        whole = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
        _gather_rows(whole, x.contiguous())
        ctx.shape = x.shape
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        own = gradients[0].new_empty(ctx.shape)  # a process needs the sum of its own rows only
        _scatter_sums(own, gradients[0].contiguous())
        return own


def gather(x: Tensor) -> Tensor:
    """Concatenate ``x`` (the same shape on every process) along its first axis, in the order of ranks.

    Differentiable: the gradient of a process's rows is the sum of what all processes' losses ask of them. With
    DDP's mean over ranks that makes a mean of per-rank losses, or one loss computed alike on every rank, exact.
    """
    return x if world_size() == 1 else _Gather.apply(x)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of ``x`` over all processes; differentiable, its gradient is summed over them as well."""
    return x if world_size() == 1 else _SumOverRanks.apply(x)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def own(x: Tensor) -> Tensor:
    """A parameter that only this process has. Its gradient is asked for once by every process's loss, and no mean over
    processes follows: it is divided by their number."""
    return x if world_size() == 1 else _ScaleGradient.apply(x, 1 / world_size())


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a detached ``x`` over all processes, for logging."""
    return sum_over_ranks(x.detach()) / world_size()


def share(rows: int, process: int | None = None, processes: int | None = None) -> slice:
    """What a process (this one, of those that train) holds of ``rows``: as even as can be, the first ones more."""
    small, more = divmod(rows, processes or world_size())
    process = rank() if process is None else process
    start = process * small + min(process, more)
    return slice(start, start + small + (process < more))


def rows_on_main(x: Tensor, rows: int) -> Tensor:
    """All ``rows`` of a tensor of which each process holds its :func:`share`, on the first process and its CPU; this
    process's own on the others."""
    if world_size() == 1:
        return x
    sizes = [len(range(rows)[share(rows, process)]) for process in range(world_size())]
    padded = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes] if rank() == 0 else None
    dist.gather(padded, parts)
    return x if parts is None else torch.cat([part[:size].cpu() for part, size in zip(parts, sizes, strict=True)])


def any_rank(flag: Tensor) -> Tensor:
    """The largest ``flag`` of all processes."""
    if world_size() > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return flag


def chosen_by_main(value: Any) -> Any:
    """``value`` as the first process has it (anything that pickles, sent between processes of one run)."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def lost_contact(error: BaseException) -> bool:
    """Whether a collective failed: torch's own errors, or gloo's plain ones."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def reason(error: BaseException) -> str:
    """In a line, why a collective failed. NCCL says last what matters, behind its versions and codes; a mistake of this
    process's own is told from another's end."""
    said = " ".join(str(error).split())
    what = said.rpartition("Last error:")[2].strip() or said
    own = ("ncclInvalidUsage", "ncclSystemError", "ncclInvalidArgument", "out of memory")
    whose = "NCCL failed" if any(word in said for word in own) else "another process died, hangs or can't be reached"
    return f"{whose}: {what[:200]}"
