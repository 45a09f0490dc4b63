"""A sweep from its configuration to its front: ``ppreid sweep`` (:mod:`ppreid_dist.cli`)."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ppreid_dist.errors import ConfigError, RunError, Stopped
from ppreid_dist.reporting.front_page import write_front
from ppreid_dist.sweep.array import run_task
from ppreid_dist.sweep.config import ResourcesConfig, SweepConfig
from ppreid_dist.sweep.folder import Folder, open_folder
from ppreid_dist.sweep.front import front_of
from ppreid_dist.sweep.guard import GRACE
from ppreid_dist.sweep.method_table import table_of, write_table
from ppreid_dist.sweep.programs import Programs
from ppreid_dist.sweep.ray_tune import check_installed, run_on_ray
from ppreid_dist.sweep.trial import Worker

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
Say = Callable[[str], None]


class Signals:
    """A wish to stop. Until :meth:`wait_for_it` it ends what runs at once; after it, somebody asks for it."""

    def __init__(self) -> None:
        self.wanted, self._raises = False, True

    def listen(self) -> None:
        """Take the signals, which Python hands to the main thread alone; also from Ray, which takes SIGTERM."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._hear)

    def wait_for_it(self) -> None:
        self._raises = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        again, self.wanted = self.wanted, True
        if self._raises and not again:  # a second one must not disturb what the first one ends
            raise Stopped("asked to stop")


@contextmanager
def _listening() -> Iterator[Signals]:
    """Signals end in Stopped."""
    heard, before = Signals(), {number: signal.getsignal(number) for number in SIGNALS}
    heard.listen()
    try:
        yield heard
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


def sweep_on_ray(
    config: SweepConfig,
    *,
    say: Say,
    resume: bool = False,
    retry: bool = False,
    reattack: bool = False,
    address: str | None = None,
    nodes: int = 1,
    programs: Programs | None = None,
) -> dict[str, Any]:
    """Do the whole sweep under Ray, write its front, and return that."""
    check_installed()
    if address is None:
        check_machine(config.resources)
    with _listening() as heard:
        worker = _open(config, say, resume=resume, retry=retry, reattack=reattack, programs=programs)
        folder = worker.folder
        heard.wait_for_it()
        run_on_ray(worker, address=address, nodes=nodes, say=say, listen=heard.listen, stopped=lambda: heard.wanted)
        if heard.wanted:
            _wait_for_guards(folder)
            raise Stopped(f"{folder.path}: asked to stop; what is done is kept")
    return _write_if_asked(folder, say)


def sweep_in_array(
    config: SweepConfig,
    task: int,
    tasks: int,
    *,
    say: Say,
    resume: bool = False,
    retry: bool = False,
    reattack: bool = False,
    programs: Programs | None = None,
) -> dict[str, Any]:
    """Do one task's part of it; whoever ends last writes the front. Returns the front as far as it is known."""
    if config.search or config.asha:
        asked = "search" if config.search else "asha"
        raise ConfigError(f"{asked}: needs --backend ray; an array can do a grid or methods")
    if not 0 <= task < tasks:
        raise ConfigError(f"--task: {task} is not one of 0 to {tasks - 1}")
    check_machine(config.resources)
    with _listening() as heard:
        worker = _open(config, say, resume=resume, retry=retry, reattack=reattack, programs=programs)
        worker = replace(worker, stopped=lambda: heard.wanted)
        try:
            run_task(worker, task, tasks, say)
        except Stopped as stopped:
            raise Stopped(f"{worker.folder.path}: {stopped}; what is done is kept") from None
    front = front_of(worker.folder)
    return _write_if_asked(worker.folder, say) if front["complete"] else front


def _open(
    config: SweepConfig, say: Say, *, resume: bool, retry: bool, reattack: bool, programs: Programs | None
) -> Worker:
    folder = open_folder(config, resume=resume or reattack, reattack=reattack)
    if retry:
        folder.forget_failures()
    if reattack and (count := folder.forget_other_attackers()):
        say(f"{folder.path.name}: {count} trials are attacked again")
    worker = Worker(folder, programs or Programs())
    worker.see_to_shards(say)
    return worker


def check_machine(resources: ResourcesConfig) -> None:
    """ConfigError where a trial asks for more than this machine has."""
    for key, asked, there in (
        ("gpus", resources.gpus, torch.cuda.device_count()),
        ("cpus", resources.cpus, len(os.sched_getaffinity(0))),
    ):
        if asked > there:
            raise ConfigError(
                f"resources.{key}: a trial asks for {asked} {key[:-1].upper()}s, this machine has {there}"
            )


def _wait_for_guards(folder: Folder) -> None:
    """Trainings are told to stop by their guards, and save; those on other nodes, too."""
    deadline = time.monotonic() + GRACE + 10
    while folder.claims.held() and time.monotonic() < deadline:
        time.sleep(0.5)


def _write_if_asked(folder: Folder, say: Say) -> dict[str, Any]:
    if not folder.asked_for_other_points():
        return write(folder)
    say(f"{folder.path}: was asked for other points meanwhile; whoever does these writes the front")
    return front_of(folder)


def write(folder: Folder) -> dict[str, Any]:
    """The front of what is done, written and returned."""
    front = front_of(folder)
    write_front(front, folder.path)
    if folder.config.methods:
        write_table(table_of(front), folder.path)
    return front


def write_again(config: SweepConfig) -> dict[str, Any]:
    """The front of a sweep's folder as it is now. RunError where there is none."""
    if not (Path(config.output) / "sweep.json").is_file():
        raise RunError(f"{config.output}: holds no sweep")
    return write(open_folder(config, resume=True, only_look=True))
