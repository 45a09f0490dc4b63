"""Trials without Ray: tasks of a job array, or a single process, that share a folder and nothing else."""

import time
from collections.abc import Callable

from ppreid_dist.sweep.claims import Claim
from ppreid_dist.sweep.folder import Folder
from ppreid_dist.sweep.progress import Progress
from ppreid_dist.sweep.space import Trial
from ppreid_dist.sweep.trial import Worker


def run_task(worker: Worker, task: int, tasks: int, say: Callable[[str], None]) -> None:
    """Do trials until none is left that nobody does. A task begins with its own share and then takes what is free.

    A trial that another holds is waited for until that other has been seen to live: one that died gives its trials up.
    """
    folder, progress = worker.folder, Progress(worker.folder, say)
    trials = folder.known()
    order = sorted(range(len(trials)), key=lambda i: (i % tasks != task, i))
    first_seen: dict[str, float] = {}
    while missing := [trial for i in order if folder.row(trial := trials[i]) is None]:
        worker.check_wish()
        if (found := _take(folder, missing)) is not None:
            with progress.kept_up():
                worker.do(*found)
            continue
        progress.look()
        if _others_live(folder, missing, first_seen):
            say(f"{folder.path.name}: other tasks do the rest, {len(missing)} trials")
            return
        time.sleep(worker.wait)
    progress.look()


def _others_live(folder: Folder, trials: list[Trial], first_seen: dict[str, float]) -> bool:
    """Whether each of these is held by a process whose heart was seen to beat."""
    held = folder.claims.held()
    return all(
        trial.name in held and held[trial.name] > first_seen.setdefault(trial.name, held[trial.name])
        for trial in trials
    )


def _take(folder: Folder, trials: list[Trial]) -> tuple[Trial, Claim] | None:
    for trial in trials:
        claim = folder.claims.take(trial.name)
        if claim is not None and folder.row(trial) is None:
            return trial, claim
        if claim is not None:
            claim.give_back()  # done just now
    return None
