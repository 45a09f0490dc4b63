"""One configuration for the whole way, and the training that joins its parts."""

import copy
import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppreid_dist import distributed
from ppreid_dist.attacks.adaptive import LEARNED
from ppreid_dist.attacks.base import ATTACKERS, SHOWN, Attacker
from ppreid_dist.attacks.config import AttackConfig
from ppreid_dist.attacks.probe import LEAST, Probe, ProbeConfig
from ppreid_dist.attacks.recogniser import by_pixels
from ppreid_dist.data.dataset import DataConfig, open_split, open_training
from ppreid_dist.data.plan import PKPlan, Plan, StrangersPlan
from ppreid_dist.data.shards import ShardedSplit
from ppreid_dist.data.stream import Batch, Source, WebDatasetSource, load_pictures, open_source, open_stream
from ppreid_dist.errors import ConfigError, LostError, RunError, Stopped, TakenError
from ppreid_dist.files import check_writable, hold
from ppreid_dist.kernels.choice import KernelsConfig, using
from ppreid_dist.losses.identity import IdentityConfig
from ppreid_dist.losses.neighbourhood import NeighbourhoodConfig
from ppreid_dist.losses.triplet import TripletConfig
from ppreid_dist.models.extractor import Extractor, ExtractorConfig
from ppreid_dist.models.folder import save_extractor
from ppreid_dist.models.recompute import recompute_blocks
from ppreid_dist.models.seeding import seeded
from ppreid_dist.models.split_head import SplitHead
from ppreid_dist.settings import Settings, load_settings, option, save_settings, to_dict
from ppreid_dist.training.adversary import Adversary
from ppreid_dist.training.checkpoint import CheckpointFolder
from ppreid_dist.training.closed_form import DistanceCorrelationAdversary, RidgeAdversary
from ppreid_dist.training.engine import Engine, EngineConfig, open_engine
from ppreid_dist.training.feed import Feed
from ppreid_dist.training.optimiser import OptimiserConfig
from ppreid_dist.training.player import Player
from ppreid_dist.training.reversal import ReversalAdversary, ReversalConfig
from ppreid_dist.training.runner import Runner, TrainingConfig
from ppreid_dist.training.step import ExtractorStep, PrivacyConfig
from ppreid_dist.training.stopping import leave_word, stopped_before
from ppreid_dist.training.tracking import open_trackers, tracker_options

_log = logging.getLogger(__name__)
_EXTRACTOR, _LABELLED, _STRANGERS, _REVERSAL = 21, 22, 23, 24  # tags that keep the random streams of a seed apart
ORPHANED = 120.0  # seconds in which a file server forgets the lock of a node that is gone


@dataclass(kw_only=True)
class ReportConfig(Settings):
    pictures: str = option(
        "synthetic",
        "show pictures of people in the report: only synthetic ones, always (real people too), or never",
        choices=("synthetic", "always", "never"),
    )
    people: int = option(8, "people in the panel", at_least=1, at_most=SHOWN)


@dataclass(kw_only=True)
class Config(Settings):
    output: str = option("runs/run", "the run's folder")
    seed: int = option(0, "everything random derives from it", at_least=0, at_most=2**63 - 1)
    data: DataConfig = option(DataConfig(), "")
    model: ExtractorConfig = option(ExtractorConfig(), "")
    identity: IdentityConfig = option(IdentityConfig(), "")
    triplet: TripletConfig = option(TripletConfig(), "")
    neighbourhood: NeighbourhoodConfig = option(NeighbourhoodConfig(), "")
    optimiser: OptimiserConfig = option(OptimiserConfig(warmup=0.08, decay="steps"), "")
    privacy: PrivacyConfig = option(PrivacyConfig(), "")
    reversal: ReversalConfig = option(ReversalConfig(), "")
    training: TrainingConfig = option(TrainingConfig(), "")
    engine: EngineConfig = option(EngineConfig(), "")
    kernels: KernelsConfig = option(KernelsConfig(), "")
    probe: ProbeConfig = option(ProbeConfig(), "")
    attack: AttackConfig = option(AttackConfig(), "")
    report: ReportConfig = option(ReportConfig(), "")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.output = os.path.expanduser(self.output)  # no shell does it behind output=
        if self.reversal.gradient == "full_gan" and "gan" not in [each.kind for each in self.privacy.adversaries]:
            raise ConfigError("reversal.gradient: full_gan is of the adversary gan, which isn't in privacy.adversaries")


# What may differ between a run and its resumption: where it lies, what is seen of it, what comes after it. Of
# data.stream the batches may not (compared).
FREE = ("output", "data.root", "data.shards", "data.remote", "data.stream.", "engine.kind", "engine.trackers",
        "engine.timeout", "engine.accumulate", "engine.gradient_checkpointing", "kernels.",
        "training.log_every", "training.checkpoint_every", "training.keep", "training.trace.",
        "probe.", "attack.", "report.")  # fmt: skip


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``(full key, value)`` of every setting in a nested dictionary."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def compared(config: Config, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings, by full key, that a run and its resumption, or two runs that are compared, must share; ``but``
    leaves out those that begin so. Batches are the plan's wherever they are read from, or webdataset's own."""
    settings = {key: value for key, value in flat(to_dict(config)) if not key.startswith((*FREE, *but))}
    return settings | {"data.stream.placement": "planned" if config.data.stream.planned else "webdataset"}


def load_run(folder: Path) -> Config:
    """The configuration that a run was trained with."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise RunError(f"{folder}: not a run: it has no config.yaml")
    return copy.deepcopy(_read_run(file, file.stat().st_mtime_ns))


@lru_cache(maxsize=16)
def _read_run(file: Path, modified: int) -> Config:
    """An attack asks twenty times, and each reading takes a sixth of a second."""
    return load_settings(Config, file)


# --- training ---------------------------------------------------------------------------------------------------


def train(config: Config, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Train an extractor by ``config`` and leave the run's folder (see ``training.runner``); returns result.json's
    content. Under a launcher every process calls it alike."""
    folder = Path(config.output)
    check_writable(folder)
    if config.model.store.kind != "plain":
        raise ConfigError(
            f"model.store.kind: {config.model.store.kind} can't be trained with: train with plain, then apply it by "
            "`ppreid store`"
        )
    kept = bool(CheckpointFolder(folder, config.training.keep).steps())
    if kept and not resume:
        raise RunError(f"{folder}: holds a run already; continue it by --resume or choose another output=FOLDER")
    if not kept and (folder / "model").exists():
        raise RunError(f"{folder}: holds a finished run without checkpoints; choose another output=FOLDER")
    random.seed(config.seed)
    torch.manual_seed(config.seed)  # the runner does it anew for every step
    split = open_training(config.data)
    folder.mkdir(parents=True, exist_ok=True)
    engine = open_engine(config.engine, run_folder=folder, loggers=open_trackers(config.engine.trackers, folder))
    try:
        if stopped_before(folder):
            raise Stopped(f"{folder}: was asked to stop, so the launcher's restart doesn't train")
        with (
            _alone(folder, engine, ORPHANED if resume else 0.0),
            using(config.kernels, engine.device, partitioned=engine.kind != "ddp"),
        ):
            result = _play(config, folder, split, engine, progress=progress)
    except Stopped:
        leave_word(folder)
        engine.close()
        raise
    except RuntimeError as error:
        lost = distributed.lost_contact(error)
        engine.forget()
        if not lost:
            raise
        raise LostError(f"{folder}: {distributed.reason(error)}") from error
    except BaseException:
        engine.forget()
        raise
    engine.close()
    return result


@contextmanager
def _alone(folder: Path, engine: Engine, wait: float) -> Iterator[None]:
    """Meanwhile no other training goes into the folder. RunError where one does for ``wait`` seconds."""
    lock, taken = None, None
    if engine.is_main:
        try:
            lock = hold(folder / ".lock", wait)
        except TakenError:
            taken = f"{folder}: another training goes on in it; stop that one, or choose another output=FOLDER"
    if taken := distributed.chosen_by_main(taken):
        raise RunError(taken)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _play(config: Config, folder: Path, split: ShardedSplit, engine: Engine, *, progress: bool) -> dict[str, Any]:
    """Build all players, go on from the newest checkpoint if there is one, train, and save the extractor."""
    _check_world(config)
    classes, labels_N = np.unique(split.pids, return_inverse=True)
    split_head = config.identity.head == "split"
    with seeded(config.seed, _EXTRACTOR):
        network = Extractor(config.model, num_classes=0 if split_head else len(classes))
        head = SplitHead(network.feature_dim, len(classes)) if split_head else None
    network.accumulate(engine.accumulate)
    if config.engine.gradient_checkpointing:
        recompute_blocks(network.backbone)
    extractor = Player("extractor", network, config.optimiser, engine)
    heads = Player("head", head, config.optimiser, engine, split_rows=len(classes)) if head is not None else None

    source = open_source(split, config=config.data.stream, size=config.data.size, device=engine.device)
    plan = PKPlan(split.pids, config.data.identities_per_batch, config.data.pictures_per_identity, config.seed)
    labelled = _feed(config, split, source, plan, labels_N, engine, _LABELLED)
    private = config.privacy.weight > 0
    kinds = [adversary.kind for adversary in config.privacy.adversaries] if private else []
    strangers = None
    strangers_fingerprint = ""
    if "ridge" in kinds and config.privacy.ridge.labelled_weight:
        _check_cameras(config, split, plan.total)
    if "ridge" in kinds and config.privacy.ridge.strangers:
        people, people_source = split, source
        if config.data.strangers_split != "train":
            people = open_split(config.data, config.data.strangers_split, streamed=True)
            people_source = open_source(people, config=config.data.stream, size=config.data.size, device=engine.device)
        _check_cameras(config, people, config.privacy.ridge.strangers)
        strangers_fingerprint = people.fingerprint
        crowd = StrangersPlan(people.pids, config.privacy.ridge.strangers, config.seed)
        strangers = _feed(config, people, people_source, crowd, people.pids, engine, _STRANGERS)

    def reversal_feed() -> Feed:
        crowd = StrangersPlan(split.pids, config.reversal.batch, config.seed + 1, key="reversal.batch")
        return _feed(config, split, source, crowd, labels_N, engine, _REVERSAL)

    # One of its own for each that learns: each goes through the plan by its own turns.
    reversals = {kind: reversal_feed() for kind in kinds if kind in LEARNED}
    adversaries = [_adversary(kind, config, extractor, engine, reversals.get(kind)) for kind in kinds]
    weights = [adversary.weight for adversary in config.privacy.adversaries if private]
    runner = Runner(
        folder=folder,
        seed=config.seed,
        config=config.training,
        privacy=config.privacy,
        batch_rows=plan.total,
        engine=engine,
        extractor=extractor,
        adversaries=adversaries,
        step=ExtractorStep(
            extractor,
            list(zip(adversaries, weights, strict=True)),
            engine=engine,
            identity=config.identity,
            triplet=config.triplet,
            neighbourhood=config.neighbourhood,
            reversal_size=config.reversal.size,
            head=heads,
        ),
        labelled=labelled,
        strangers=strangers,
        reversals=list(reversals.values()),
        probe=_probe(config, engine) if adversaries and config.probe.every else None,
        probe_every=config.probe.every if adversaries else 0,
        must_match={
            **compared(config),
            "engine.precision": engine.precision,
            "the training pictures": split.fingerprint,
            "the strangers' pictures": strangers_fingerprint,
        },
        unsaid=compared(Config()),
        progress=progress,
    )
    # TensorBoard takes plain values only.
    table = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in flat(to_dict(config))}
    told = tracker_options(config.engine.trackers, folder) if engine.is_main else {}
    engine.accelerator.init_trackers("ppreid_dist", config=table, init_kwargs=told)
    if runner.resume() and engine.is_main:
        _log.info("%s: continued at step %d of %d", folder, runner.step, runner.total)
    if engine.is_main:
        save_settings(config, folder / "config.yaml")
    result = runner.run()
    finished = runner.finished()
    if engine.is_main:
        about = {"identities": len(classes), "steps": runner.step, "training pictures": split.fingerprint}
        save_extractor(folder / "model", finished, config.model, config.data.size, about)
    engine.wait()
    return result


def _check_world(config: Config) -> None:
    ranks = distributed.world_size()
    kinds = {adversary.kind for adversary in config.privacy.adversaries} if config.privacy.weight else set()
    for key, rows, used in (
        ("data.identities_per_batch", config.data.identities_per_batch, True),
        ("privacy.ridge.strangers", config.privacy.ridge.strangers, "ridge" in kinds),
        ("reversal.batch", config.reversal.batch, bool(kinds & set(LEARNED))),
    ):
        if used and rows % ranks:
            raise ConfigError(f"{key}: {rows} can't be shared evenly by {ranks} processes")


def _check_cameras(config: Config, people: ShardedSplit, rows: int) -> None:
    """A picture that is its camera's only one in a batch tells the best response nothing: it would be off, unseen."""
    if config.privacy.ridge.centre == "camera" and (cameras := len(np.unique(people.camids))) >= max(rows, 2):
        raise ConfigError(
            f"privacy.ridge.centre: camera takes off each camera's mean picture, but there are {cameras} cameras and "
            f"{rows} pictures a step; take batch, or give pictures of one camera one camid"
        )


def _feed(
    config: Config,
    split: ShardedSplit,
    source: Source | WebDatasetSource,
    plan: Plan,
    labels_N: np.ndarray,
    engine: Engine,
    tag: int,
) -> Feed:
    def open_at(step: int) -> Iterator[Batch]:
        return open_stream(
            split,
            plan,
            source=source,
            prefetch=config.data.stream.prefetch,
            device=engine.device,
            start_step=step,
            rank_rows=distributed.rank_rows(plan.total),
        )

    seed = config.seed * 100 + tag
    planned = None if isinstance(source, WebDatasetSource) else labels_N  # who is in a streamed batch isn't planned
    return Feed(open_at, plan=plan, labels_N=planned, augmentation=config.data.augment, seed=seed)


def _adversary(kind: str, config: Config, extractor: Player, engine: Engine, reversal: Feed | None) -> Adversary:
    if kind == "ridge":
        return RidgeAdversary(config.privacy.ridge, seed=config.seed, bounded_loss=config.privacy.bounded)
    if kind == "distance_correlation":
        return DistanceCorrelationAdversary(config.privacy.ridge.target_size)
    assert reversal is not None
    return ReversalAdversary(
        kind,
        config.reversal,
        extractor=extractor,
        engine=engine,
        feed=reversal,
        seed=config.seed,
        bounded_loss=config.privacy.bounded,
        perceive=_perceiver(config, engine),
    )


def _perceiver(config: Config, engine: Engine) -> Any:
    if not config.reversal.reconstruction.perceptual:
        return None
    backbone = config.reversal.reconstruction.perceptual_backbone
    network = Extractor(ExtractorConfig(backbone=backbone, pretrained=True, last_stride=2))
    network.to(engine.device).eval().requires_grad_(False)
    return lambda x_B3hw: network.backbone((x_B3hw - network.mean) / network.std).map_BChw


def _probe(config: Config, engine: Engine) -> Probe | None:
    """The main process's, who probes alone; all others look for the same mistakes, and decode nothing."""
    people = open_split(config.data, "aux")
    if (there := min(len(np.unique(people.pids)), config.probe.people)) < LEAST:
        raise ConfigError(f"probe.every: {there} auxiliary people are too few for a probe, it needs {LEAST}")

    def fresh(name: str) -> Attacker:
        return ATTACKERS[name](by_pixels(getattr(config.attack, name)))

    for name in config.probe.attackers:
        fresh(name)  # who lacks a library says so now
    if not engine.is_main:
        return None
    backend, device = config.data.stream.backend, engine.device
    pictures = load_pictures(people, config.data.size, backend=backend, device=device, progress=False)
    targets = load_pictures(people, config.reversal.size, backend=backend, device=device, progress=False)
    return Probe(
        config.probe,
        pictures,
        targets.images_N3HW,
        targets.masks_N1HW,
        fresh=fresh,
        seed=config.seed,
    )
