"""Trials under Ray Tune, the only file that knows Ray: it places trials, and ends those that ASHA gives up.

What is done and what was found is in the sweep's folder, not in Ray: a sweep goes on under another Ray, on other nodes,
or without it. A trial of Ray is a trial of a grid, or a point of a search with all its seeds.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ppreid_dist.errors import ConfigError, MissingExtra, RunError, Stopped
from ppreid_dist.sweep.asha import Losses
from ppreid_dist.sweep.config import ResourcesConfig
from ppreid_dist.sweep.folder import Folder
from ppreid_dist.sweep.progress import Progress
from ppreid_dist.sweep.space import Trial
from ppreid_dist.sweep.study import aims_of, open_study
from ppreid_dist.sweep.trial import Look, Worker

PATIENCE = 180.0  # seconds that the head of a cluster has to come up, and then its nodes
_LOST = 3  # times that a trial's Ray worker may die
_PLAIN = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # ASHA sees losses first, and the aims at the end
    "TUNE_FORCE_TRIAL_CLEANUP_S": "2",  # seconds until the actor of a trial that ASHA ends is killed; its guard saves
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def check_installed() -> None:
    """MissingExtra where Ray isn't installed."""
    os.environ.update({key: os.environ.get(key, value) for key, value in _PLAIN.items()})
    for package in ("ray", "optuna"):
        if find_spec(package) is None:
            raise MissingExtra("a sweep under Ray", "sweep")


def run_on_ray(
    worker: Worker,
    *,
    address: str | None,
    nodes: int,
    say: Callable[[str], None],
    listen: Callable[[], None],
    stopped: Callable[[], bool],
) -> None:
    """Do all trials that have no row yet, on a Ray of this machine or on the cluster at ``address``.

    ``listen`` is called when Ray has taken the signals; when ``stopped`` turns true, no trial goes on.
    """
    import ray

    resources = worker.folder.config.resources
    if address is None:
        ray.init(
            address="local", num_cpus=len(os.sched_getaffinity(0)), include_dashboard=False, log_to_driver=False,
            logging_level=logging.ERROR, object_store_memory=100 * 2**20,
        )  # fmt: skip
    else:
        say(f"{worker.folder.path.name}: waits for Ray at {address}, {nodes} nodes")
        _connect(address, stopped)
    try:
        listen()
        if address is not None:
            _wait_for_nodes(address, nodes, stopped)
        if not stopped():
            _check_room(resources)
            _tune(worker, say, stopped)
    finally:
        ray.shutdown()


def _connect(address: str, stopped: Callable[[], bool]) -> None:
    """Wait for the cluster. RunError if it doesn't come."""
    import ray

    host, _, port = address.rpartition(":")
    deadline, reached = time.monotonic() + PATIENCE, False
    while not reached and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            reached = True
        except OSError as error:
            if stopped():
                raise Stopped(f"--address {address}: asked to stop") from None
            if time.monotonic() > deadline:
                raise RunError(f"--address {address}: {error}") from None
            time.sleep(1)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise RunError(f"--address {address}: {' '.join(str(error).split())[:200]}") from None


def _wait_for_nodes(address: str, nodes: int, stopped: Callable[[], bool]) -> None:
    """RunError if they don't come; a wish to stop ends the wait."""
    import ray

    deadline = time.monotonic() + PATIENCE
    while (alive := sum(node["Alive"] for node in ray.nodes())) < nodes and not stopped():
        if time.monotonic() > deadline:
            raise RunError(f"--address {address}: only {alive} of {nodes} nodes came within {PATIENCE:.0f} s")
        time.sleep(1)


def _check_room(resources: ResourcesConfig) -> None:
    """ConfigError where no node has what a trial asks for: Ray would wait for one for ever."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for key, ray_key, asked in (("gpus", "GPU", resources.gpus), ("cpus", "CPU", resources.cpus)):
        most = int(max((node.get(ray_key, 0) for node in alive), default=0))
        if asked > most:
            raise ConfigError(f"resources.{key}: a trial asks for {asked} {ray_key}s, the largest node has {most}")


def _tune(worker: Worker, say: Callable[[str], None], stopped: Callable[[], bool]) -> None:
    from ray import tune

    folder, config = worker.folder, worker.folder.config
    if not config.search:
        waiting = [i for i, trial in enumerate(folder.known()) if folder.row(trial) is None]
        space: dict[str, Any] | None = {"trial": tune.grid_search(waiting)}
        search, samples = None, 1
    else:
        waiting, space = [], None
        search, samples = _search(folder)
    if not waiting and (search is None or samples < 1):
        return
    resources = {"cpu": float(config.resources.cpus), "gpu": float(config.resources.gpus)}
    trainable = tune.with_parameters(_do, worker=worker, cwd=str(Path.cwd()))
    tuner = tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=search,
            num_samples=samples,
            scheduler=_scheduler(folder) if config.asha else None,
            max_concurrent_trials=config.concurrent or None,
            reuse_actors=False,  # a trial that is ended takes its process with it, and the guard sees that
        ),
        run_config=tune.RunConfig(
            name=f"session_{len(list((folder.path / 'ray').glob('session_*'))) + 1}",
            storage_path=str(folder.path / "ray"),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=_LOST),
            callbacks=[_watcher(worker, Progress(folder, say), stopped)],
        ),
    )
    with suppress(_Asked):
        tuner.fit()


# --- in Ray's workers -------------------------------------------------------------------------------------------


def _do(config: Mapping[str, Any], worker: Worker, cwd: str) -> None:
    """One trial of Ray. What is done already, or by another process meanwhile, isn't done again."""
    from ray import tune

    os.chdir(cwd)
    done = [_row(worker, trial) for trial in _trials(worker.folder, config)]
    rows = [row for row, _ in done]
    if worker.folder.config.search and not any(here for _, here in done):
        worker.folder.repeat(tune.get_context().get_trial_id())
    if (aims := aims_of(rows, worker.folder.config.axis)) is not None:  # else the search learns nothing from it
        tune.report(dict(zip(("mAP", "leak"), aims, strict=True)))


def _trials(folder: Folder, config: Mapping[str, Any]) -> list[Trial]:
    if not folder.config.search:
        return [folder.known()[config["trial"]]]
    return [Trial(dict(config), seed) for seed in folder.config.seeds]


def _row(worker: Worker, trial: Trial) -> tuple[dict[str, Any], bool]:
    """The trial's row, and whether it was done here."""
    while (row := worker.folder.row(trial)) is None:
        if (claim := worker.folder.claims.take(trial.name)) is None:
            time.sleep(worker.wait)
        elif worker.folder.row(trial) is None:
            look = _reporter(worker.folder) if worker.folder.config.asha else lambda run: None
            return worker.do(trial, claim, look), True
        else:
            claim.give_back()
    return row, False


def _reporter(folder: Folder) -> Look:
    """Tells Ray the training loss as it comes, for its scheduler."""
    from ray import tune

    run = folder.run_config([])
    losses = Losses(run.privacy, run.neighbourhood, run.training.images)

    def look(run: Path) -> None:
        for known in losses.new(run):
            tune.report(known)

    return look


# --- in the driver ----------------------------------------------------------------------------------------------


def _search(folder: Folder) -> tuple[Any, int]:
    """Optuna's search, and how many points it has still to propose."""
    from ray.tune.search.optuna import OptunaSearch

    study = open_study(folder)
    search = OptunaSearch(
        study.space, metric=["mAP", "leak"], mode=["max", "min"], sampler=study.sampler, storage=study.storage,
        study_name=study.name,
    )  # fmt: skip
    return search, study.missing


def _scheduler(folder: Folder) -> Any:
    from ray.tune.schedulers import ASHAScheduler

    images = folder.run_config([]).training.images
    # Rungs at a quarter and a half; of the training's end nothing is reported, nor does max_t come.
    return ASHAScheduler(
        time_attr="images", metric="loss", mode="min", max_t=2 * images, grace_period=max(1, images // 4),
        reduction_factor=2,
    )  # fmt: skip


class _Asked(BaseException):
    """Out of Tune, at once: for an Exception it would first wait for its trials to end by themselves."""


def _watcher(worker: Worker, progress: Progress, stopped: Callable[[], bool]) -> Any:
    from ray import tune

    class Watcher(tune.Callback):
        """Says how it goes, and writes the rows of trials that could not write theirs."""

        def __init__(self) -> None:
            self._looked = 0.0

        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if time.monotonic() - self._looked > 2:
                self._looked = time.monotonic()
                progress.look()
            if stopped():
                raise _Asked

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            if worker.folder.config.asha:  # else it wrote its row, which NFS may show to other nodes late
                self._note(trial, {"status": "stopped", "reason": "asha: its training loss was in the worse half"})

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            lines = (str(trial.get_error() or "") or "its Ray worker died").strip().splitlines()
            self._note(trial, {"status": "failed", "reason": lines[-1][:300]})

        def _note(self, ended: Any, found: dict[str, Any]) -> None:
            for trial in _trials(worker.folder, ended.config):
                if worker.folder.row(trial) is None:
                    worker.folder.begin(trial)
                    worker.note(trial, found, time.time())

    return Watcher()
