"""A wish to stop: SIGTERM, SIGUSR2, Ctrl-C, or a file in the run's folder. All processes agree on it at a step's end.

Nothing is saved inside a signal's handler: it only raises a flag. A cluster may signal one process or all of them, at
different moments, so the flags are reduced over processes, and all of them stop after the same step.

A launcher that starts its processes again (``--max_restarts``) takes status 75 for a crash. So that a stop holds, its
processes leave a file by which the next ones know it.
"""

import os
import signal
import socket
import threading
from pathlib import Path
from types import FrameType

import torch

from ppreid_dist import distributed
from ppreid_dist.files import write_text
from ppreid_dist.transfer import to_device

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)  # not USR1, which NCCL takes
STOP_FILE, STOPPED_FILE = "stop", "stopped"


class StopRequests:
    """Listens between :meth:`listen` and :meth:`close`; :meth:`agreed` is called by every process at every step."""

    def __init__(self, folder: Path, device: torch.device):
        self.file, self._device = folder / STOP_FILE, device
        self._signalled = False
        self._before: dict[signal.Signals, object] = {}
        self._pending: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def listen(self) -> None:
        """Take over the signals. Python hands them to the main thread alone: elsewhere only the file is heard."""
        if threading.current_thread() is threading.main_thread():
            # Who put it into the background has Ctrl-C ignored.
            deaf = {signal.SIGINT} if signal.getsignal(signal.SIGINT) is not signal.default_int_handler else set()
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS if number not in deaf}

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt  # who presses twice doesn't want to wait
        self._signalled = True

    def agreed(self) -> bool:
        """Whether any process was asked to stop; the same answer on all of them.

        On a GPU the answer is that of the step before, whose reduction has ended meanwhile: nobody waits for it.
        """
        wish = self._signalled or (distributed.rank() == 0 and self.file.exists())
        if distributed.world_size() == 1:
            return wish
        if self._device.type != "cuda":
            return bool(distributed.any_rank(torch.tensor(float(wish))))
        last, host = self._pending, torch.empty((), pin_memory=True)
        host.copy_(distributed.any_rank(to_device(torch.tensor(float(wish)), self._device)), non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self._pending = host, done
        if last is None:
            return False
        last[1].synchronize()
        return bool(last[0])

    def honour(self) -> None:
        """The checkpoint is written: take the file away, or the resumed run would stop at once."""
        if distributed.rank() == 0:
            self.file.unlink(missing_ok=True)


def restarted() -> bool:
    """Whether a launcher has started this process again, after another's crash or end."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def leave_word(folder: Path) -> None:
    """For :func:`stopped_before`, after a stop that all processes agreed on; nothing where nobody restarts them."""
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return
    if distributed.rank() == 0:
        write_text(folder / STOPPED_FILE, _launcher())
    distributed.chosen_by_main(None)  # the end of any process would have the launcher kill the first


def stopped_before(folder: Path) -> bool:
    """Whether the launcher that has started these processes again had processes that were asked to stop; the same
    answer on all of them. What an earlier launcher's left is taken away."""
    file, known = folder / STOPPED_FILE, False
    if distributed.rank() == 0 and file.is_file():
        known = restarted() and file.read_text(encoding="utf-8") == _launcher()
        if not known:
            file.unlink()
    return bool(distributed.chosen_by_main(known))


def _launcher() -> str:
    return f"{socket.gethostname()} {os.getppid()}\n"
