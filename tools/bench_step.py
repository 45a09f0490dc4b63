"""A training's steps: plain ReID, and with each adversary beside it, on synthetic people, in new processes."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench_process import alone
from tqdm import tqdm

from ppreid_dist.data.dataset import prepare_shards
from ppreid_dist.experiment import Config, train
from ppreid_dist.settings import load_settings
from ppreid_dist.training.tracking import read_metrics

KINDS = ("ridge", "regression", "gan", "distance_correlation")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="configs/demo.yaml", metavar="FILE")
    parser.add_argument(
        "--steps",
        type=int,
        default=96,
        help="of the extractor at least: a third, then whole periods of the game, which count",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="plain, configured, or kinds of adversaries")
    parser.add_argument("settings", nargs="*", metavar="key=value")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    ways = {"plain": ["privacy.weight=0"], "configured": []}
    ways |= {kind: [f"privacy.adversaries=[{{kind: {kind}}}]"] for kind in KINDS}
    ways = {name: way for name, way in ways.items() if name in (options.only or ways)}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        common = [*options.settings, *_world(options, Path(folder))]
        warm = options.steps // 3
        prepare_shards(load_settings(Config, options.config, common).data, progress=False)
        for name, way in tqdm(ways.items(), unit="training"):
            settings = [*common, *way, f"output={folder}/{name}"]
            config = load_settings(Config, options.config, settings)
            period = _period(config)
            counted = -(-(options.steps - warm) // period) * period
            rows_a_step = config.data.identities_per_batch * config.data.pictures_per_identity
            settings.append(f"training.images={(warm + counted) * rows_a_step}")
            found = alone(_steps, options.config, settings, counted, threads=options.threads)
            rows.append({"way": name, **found})
            if "plain" in ways:
                rows[-1] |= {"overhead": found["seconds"] / rows[0]["seconds"]}
                rows[-1] |= {"ratio": rows[0]["seconds"] / found["seconds"]}
    return rows


def _world(options: argparse.Namespace, folder: Path) -> list[str]:
    """People enough for the configuration's batches, of its pictures' size, and a training without stops."""
    config = load_settings(Config, options.config, options.settings)
    data, strangers = config.data, config.privacy.ridge.strangers
    people = max(2 * data.identities_per_batch, config.reversal.batch)
    if data.strangers_split == "train":
        people = max(people, strangers)
    synthetic = f"train: {people}, unlabelled: {max(2, strangers)}, aux: 8, test: 8, cameras: 2, shots: 2"
    return [
        "data.kind=synthetic", "data.aux_identities=0", "data.train_splits=[train]",
        f"data.root={folder / 'people'}", f"data.shards={folder / 'shards'}",
        f"data.synthetic={{{synthetic}, height: {data.height}, width: {data.width}}}",
        "training.warm=0", "training.log_every=1", "training.checkpoint_every=1000000", "training.keep=1",
        "probe.every=0",
    ]  # fmt: skip


def _period(config: Config) -> int:
    """Steps after which all that the game does has been done: a generator catches up once in so many rounds."""
    if not config.privacy.weight:
        return 1
    learns = any(adversary.kind in ("gan", "regression") for adversary in config.privacy.adversaries)
    return config.privacy.every * (config.reversal.lazy.period if learns else 1)


def _steps(file: str, settings: list[str], counted: int) -> dict[str, float]:
    """What each of the last ``counted`` steps took on average, and the share of the time spent on waiting for data."""
    config = load_settings(Config, file, settings)
    train(config, progress=False)
    rows = [row for row in read_metrics(Path(config.output) / "metrics.jsonl") if "images_per_second" in row]
    ended = {row["step"]: row["images"] / row["images_per_second"] for row in rows}
    last = max(ended)
    seconds = (ended[last] - ended[last - counted]) / counted
    pictures = config.data.identities_per_batch * config.data.pictures_per_identity
    return {"seconds": seconds, "images_per_second": pictures / seconds, "data_wait": rows[-1]["data_wait"]}
