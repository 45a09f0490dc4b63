"""Work done ahead, in order, in one thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Prefetcher(Generic[T, R]):
    """``map(work, items)`` in order, up to ``depth`` results ahead in a thread of its own.

    What ``items`` or ``work`` raises is raised by ``next`` in its place. ``close()`` ends the thread, also in the
    middle; an abandoned prefetcher closes itself. On CUDA, which ``device`` says, both threads use torch's default
    stream, so a consumer on another stream must wait for it.
    """

    def __init__(
        self, work: Callable[[T], R], items: Iterator[T], depth: int, *, device: torch.device | str | None = None
    ):
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
        self._stop = threading.Event()
        # The thread holds the queue and the event but not this object, whose __del__ could otherwise never run.
        where = None if device is None else torch.device(device)
        if where is not None and where.type == "cuda" and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())  # of this thread; the other begins with GPU 0
        arguments = (work, items, self._queue, self._stop, where)
        self._thread = threading.Thread(target=_work_ahead, args=arguments, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Prefetcher[T, R]":
        return self

    def __next__(self) -> R:
        if self._stop.is_set():
            raise StopIteration
        kind, value = self._queue.get()
        if kind == "result":
            return value
        self.close()
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """End the thread and drop what it has made."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)  # a read that hangs must not hang the end of the run too

    def __del__(self) -> None:
        self._stop.set()


def _work_ahead(
    work: Callable[[Any], Any],
    items: Iterator[Any],
    results: "queue.Queue[Any]",
    stop: threading.Event,
    device: torch.device | None,
) -> None:
    def put(kind: str, value: Any) -> None:
        while not stop.is_set():
            try:
                return results.put((kind, value), timeout=0.1)
            except queue.Full:
                continue

    try:
        # A thread begins with GPU 0, where all processes of a node would then each have a context.
        if device is not None and device.type == "cuda":
            torch.cuda.set_device(device)
        for item in items:
            if stop.is_set():
                return
            put("result", work(item))
        put("end", None)
    except BaseException as error:  # raised again in the consumer's thread
        put("error", error)
