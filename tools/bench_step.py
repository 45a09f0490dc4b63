"""A training's steps: plain ReID, and with each adversary beside it, on synthetic people, in new processes."""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_process import alone, device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from ppreid_dist.data.dataset import prepare_shards
from ppreid_dist.experiment import Config, train
from ppreid_dist.settings import load_settings
from ppreid_dist.training.runner import Runner
from ppreid_dist.training.tracking import read_metrics

KINDS = ("ridge", "regression", "gan", "distance_correlation")


def ways(only: list[str] | None) -> dict[str, list[str]]:
    """What a training plays, by name: nothing, what its configuration says, or one kind of adversary."""
    known: dict[str, list[str]] = {"plain": ["privacy.weight=0"], "configured": []}
    known |= {kind: [f"privacy.adversaries=[{{kind: {kind}}}]"] for kind in KINDS}
    return {name: way for name, way in known.items() if name in (only or known)}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="configs/demo.yaml", metavar="FILE")
    parser.add_argument(
        "--steps",
        type=int,
        default=96,
        help="of the extractor at least: a third, then those that count, both in whole periods of the game",
    )
    parser.add_argument("--only", nargs="+", choices=list(ways(None)), metavar="WAY", help=", ".join(ways(None)))
    parser.add_argument(
        "--count", action="store_true", help="the operations of a step too, and the share of what a product reaches"
    )
    parser.add_argument("--count-only", action="store_true", help="no seconds, only the operations")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="before options that take several words")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        common = world(options.config, options.settings, Path(folder))
        for name, way in tqdm(ways(options.only).items(), unit="training"):
            row: dict[str, Any] = {"way": name}
            if not options.count_only:
                settings, counted = timed(options.config, [*common, *way, f"output={folder}/{name}"], options.steps)
                row |= alone(_steps, options.config, settings, counted, threads=options.threads)
            if options.count or options.count_only:
                row |= _counted(options, [*common, *way, f"output={folder}/{name}_counted"], row.get("seconds"))
            rows.append(row)
            if rows[0]["way"] == "plain" and "seconds" in row:
                row |= {"overhead": row["seconds"] / rows[0]["seconds"], "ratio": rows[0]["seconds"] / row["seconds"]}
            if rows[0]["way"] == "plain" and "gflop" in row:
                row |= {"counted_overhead": row["gflop"] / rows[0]["gflop"]}
    return rows


def _counted(options: argparse.Namespace, settings: list[str], seconds: float | None) -> dict[str, float]:
    """A step's operations, ``share`` of those that the machine does in a large matrix product in the same time."""
    found = alone(_operations, options.config, settings, threads=options.threads)
    if seconds is None:
        return {"gflop": found["gflop"]}
    limit = alone(_product, threads=options.threads)["gflop_per_second"]
    return {"gflop": found["gflop"], "share": found["gflop"] / seconds / limit}


def world(file: str, given: list[str], folder: Path) -> list[str]:
    """Settings of a training without stops, on shards that are written into ``folder``: people enough for the
    configuration's batches, of its pictures' size."""
    config = load_settings(Config, file, given)
    data, strangers = config.data, config.privacy.ridge.strangers
    people = max(2 * data.identities_per_batch, config.reversal.batch)
    if data.strangers_split == "train":
        people = max(people, strangers)
    synthetic = f"train: {people}, unlabelled: {max(2, strangers)}, aux: 8, test: 8, cameras: 2, shots: 2"
    settings = [
        *given,
        "data.kind=synthetic", "data.aux_identities=0", "data.train_splits=[train]",
        f"data.root={folder / 'people'}", f"data.shards={folder / 'shards'}",
        f"data.synthetic={{{synthetic}, height: {data.height}, width: {data.width}}}",
        "training.warm=0", "training.checkpoint_every=1000000", "training.keep=1",
        "probe.every=0",
    ]  # fmt: skip
    prepare_shards(load_settings(Config, file, settings).data, progress=False)
    return settings


def timed(file: str, settings: list[str], steps: int) -> tuple[list[str], int]:
    """The settings of a training of ``steps`` or a little more, and how many of its last steps count."""
    config = load_settings(Config, file, settings)
    period = _period(config)
    # A third in whole periods of the game, and figures are written down that seldom: a GPU must be waited for then.
    warm = -(-max(1, steps // 3) // period) * period
    counted = -(-max(1, steps - warm) // warm) * warm
    images = (warm + counted) * pictures_a_step(config)
    return [*settings, f"training.log_every={warm}", f"training.images={images}"], counted


def pictures_a_step(config: Config) -> int:
    """Labelled ones, of all processes."""
    return config.data.identities_per_batch * config.data.pictures_per_identity


def _operations(file: str, settings: list[str]) -> dict[str, float]:
    """The mean over a whole period of the game, beside its first step, which trains the generator to begin with."""
    config = load_settings(Config, file, settings)
    period, rounds, whole = _period(config), [], Runner._round
    settings = [*settings, f"training.images={(period + 1) * pictures_a_step(config)}", "reversal.warm_steps=1"]

    def counted(runner: Runner) -> None:
        with _Operations() as counts:
            whole(runner)
        rounds.append(counts.total)

    Runner._round = counted  # type: ignore[method-assign, assignment]
    train(load_settings(Config, file, settings), progress=False)
    return {"gflop": sum(rounds[1:]) / period / 1e9}


class _Operations(TorchDispatchMode):
    """Those of products and convolutions, two for a multiplication and its sum; by torch's own formulas.

    ``torch.utils.flop_counter.FlopCounterMode`` follows modules too, and fails within ``torch.autograd.grad`` (R1).
    """

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if (formula := flop_registry.get(function._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=found)
        return found


def _product() -> dict[str, float]:
    """Float32; on a GPU bfloat16, as a training's precision should be there."""
    gpu = device().type == "cuda"
    a = torch.randn(8192 if gpu else 2048, 8192 if gpu else 2048, device=device())
    a = a.bfloat16() if gpu else a
    taken = []
    for _ in range(7):
        begun = time.perf_counter()
        a @ a
        if gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return {"gflop_per_second": 2e-9 * len(a) ** 3 / min(taken)}


def _period(config: Config) -> int:
    """Steps after which all that the game does has been done: a generator catches up once in so many rounds."""
    if not config.privacy.weight:
        return 1
    learns = any(adversary.kind in ("gan", "regression") for adversary in config.privacy.adversaries)
    return config.privacy.every * (config.reversal.lazy.period if learns else 1)


def _steps(file: str, settings: list[str], counted: int) -> dict[str, float]:
    config = load_settings(Config, file, settings)
    train(config, progress=False)
    return step_times(config, counted)


def step_times(config: Config, counted: int) -> dict[str, float]:
    """What each of a run's last ``counted`` steps took on average, and the share of the time spent on waiting for
    data."""
    rows = [row for row in read_metrics(Path(config.output) / "metrics.jsonl") if "images_per_second" in row]
    ended = {row["step"]: row["images"] / row["images_per_second"] for row in rows}
    last = max(ended)
    seconds = (ended[last] - ended[last - counted]) / counted
    pictures = pictures_a_step(config)
    return {"seconds": seconds, "images_per_second": pictures / seconds, "data_wait": rows[-1]["data_wait"]}
