"""Pictures on their way to the device: every decoder and placement of this machine, beside Pillow."""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from bench_process import device, measured

from ppreid_dist.data.dataset import DataConfig, open_training, prepare_shards
from ppreid_dist.data.decode import Decoder
from ppreid_dist.data.plan import PKPlan
from ppreid_dist.data.stream import StreamConfig, open_source, open_stream
from ppreid_dist.data.synthetic import SyntheticConfig

BATCHES = 20


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--stored", type=int, nargs=2, default=(128, 64), metavar=("H", "W"), help="size in the shards")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    backends = [
        "pillow",
        *(["dali-cpu"] if dali else []),
        *(["dali-mixed"] if dali and device().type == "cuda" else []),
    ]
    ways = [(placement, backend) for placement in ("indexed", "resident", "webdataset") for backend in backends]
    with tempfile.TemporaryDirectory() as folder:
        height, width = options.stored
        people = SyntheticConfig(train=64, unlabelled=0, aux=8, test=8, cameras=4, shots=2, height=height, width=width)
        data = DataConfig(
            root=f"{folder}/people", shards=f"{folder}/shards", synthetic=people, height=options.height,
            width=options.width, images_per_shard=128,
        )  # fmt: skip
        prepare_shards(data, progress=False)
        how = {"repeats": options.repeats, "threads": options.threads}
        rows: list[dict[str, Any]] = []
        for placement, backend in ways:
            found = measured(stream, data, placement, backend, **how)
            pictures = BATCHES * data.identities_per_batch * data.pictures_per_identity
            apart = measured_difference(data, backend) if placement == "indexed" else None
            rows.append({"placement": placement, "backend": backend, **found, "levels_apart": apart})
            rows[-1] |= {
                "images_per_second": pictures / found["seconds"],
                "ratio": rows[0]["seconds"] / found["seconds"],
            }
    return rows


def stream(data: DataConfig, placement: str, backend: str) -> Callable[[], Any]:
    """So many batches of a training's stream, each met on the device."""
    split, config = open_training(data), StreamConfig(placement=placement, backend=backend)
    plan = PKPlan(split.pids, data.identities_per_batch, data.pictures_per_identity, 0)
    source = open_source(split, config=config, size=data.size, device=device())

    def work() -> None:
        rows = slice(0, plan.total)
        opened = open_stream(
            split, plan, source=source, prefetch=config.prefetch, device=device(), start_step=0, rank_rows=rows
        )
        with opened as batches:
            for _ in range(BATCHES):
                next(batches)

    return work


def measured_difference(data: DataConfig, backend: str) -> float:
    """Mean difference from Pillow's pixels, in levels."""
    split = open_training(data)
    pictures, keys = [split.image_bytes(i) for i in range(64)], list(split.keys[:64])
    one, other = (
        Decoder(name, data.size, device()).decode(pictures, keys).cpu().numpy().astype(np.int16)
        for name in ("pillow", backend)
    )
    return float(np.abs(one - other).mean())
