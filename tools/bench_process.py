"""Work that is measured in a new process: its seconds, and the peak of its memory."""

import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from energy import joules, spent

Prepare = Callable[..., Callable[[], Any]]  # arguments to work that can be repeated


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fitting(*processes: int) -> list[int]:
    """Of these numbers of processes those for which there are GPUs; all of them where there is none."""
    gpus = torch.cuda.device_count()
    return [number for number in processes if not gpus or number <= gpus]


def measured(prepare: Prepare, *arguments: Any, repeats: int, threads: int, warm: int = 1) -> dict[str, float]:
    """``seconds`` (median) of the work that ``prepare(*arguments)`` returns, ``joules`` where they can be read, and
    ``peak_mb``: the process's memory at its highest less what it had at first (on a GPU, what was allocated there).

    ``prepare`` is a module's own function, called in a new process. ``warm`` calls of the work are not counted.
    """
    return alone(_measure, prepare, arguments, repeats, warm, threads=threads)


def alone(work: Callable[..., dict[str, float]], *arguments: Any, threads: int) -> dict[str, float]:
    """What ``work``, a module's own function, finds in a new process, and, unless it finds that itself, that one's
    ``peak_mb``, as above."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_alone, work, arguments, threads).result()


def _alone(work: Callable[..., dict[str, float]], arguments: tuple[Any, ...], threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    before = _peak()
    found = work(*arguments)
    return {"peak_mb": (_peak() - before) / 1e6, **found}


def _measure(prepare: Prepare, arguments: tuple[Any, ...], repeats: int, warm: int) -> dict[str, float]:
    work = prepare(*arguments)
    taken: list[float] = []
    before: float | None = None
    for repeat in range(warm + repeats):
        if repeat == warm:
            before = joules()
        begun = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if repeat >= warm:
            taken.append(time.perf_counter() - begun)
    return {"seconds": statistics.median(taken), **spent(before, repeats)}


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
