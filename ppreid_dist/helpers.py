"""Further processes of this machine that help with a piece of work, each on a GPU of its own if there are several."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_log = logging.getLogger(__name__)
_GRACE = 5.0  # seconds


@contextmanager
def helping(count: int, work: Callable[[], None]) -> Iterator[None]:
    """``work``, which must pickle, is done by ``count`` further processes too, for as long as this lasts.

    They end with this process, however that ends. One that fails says why; what it would have done is then left to the
    others. All share the cores, unless ``OMP_NUM_THREADS`` says how.
    """
    before, threads = torch.get_num_threads(), _threads(1 + count)
    torch.set_num_threads(threads)
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_help, args=(i, threads, work), daemon=True) for i in range(1, count + 1)]
    try:
        for process in processes:
            process.start()
        yield
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join(_GRACE)
                process.kill()
        torch.set_num_threads(before)


def _threads(processes: int) -> int:
    if processes == 1 or "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return max(1, len(os.sched_getaffinity(0)) // processes)


def _help(number: int, threads: int, work: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process then ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    try:
        work()
    except Exception as error:
        _log.warning("helper %d ended: %s: %s", number, type(error).__name__, error)


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
