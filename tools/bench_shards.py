"""Shards written and checked, beside plain copies of the same files; an index of very many pictures planned with."""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_process import measured

from ppreid_dist.data.catalog import read_catalog
from ppreid_dist.data.index import ROW, Index, read_index, write_index
from ppreid_dist.data.plan import PKPlan, StrangersPlan
from ppreid_dist.data.shard_check import check_shards
from ppreid_dist.data.shard_writer import write_shards
from ppreid_dist.data.synthetic import SyntheticConfig, render

OF_EACH = 20  # pictures of one identity in the planned index
STRANGERS = 1024


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--people", type=int, default=2000, help="eight pictures of each are written")
    parser.add_argument("--stored", type=int, nargs=2, default=(128, 64), metavar=("H", "W"), help="their size")
    parser.add_argument("--planned", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], metavar="PICTURES")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder, how = Path(name), {"repeats": options.repeats, "threads": options.threads}
        height, width = options.stored
        people = SyntheticConfig(
            train=options.people, unlabelled=0, aux=8, test=8, cameras=4, shots=2, height=height, width=width
        )
        render(folder / "people", people, progress=False)
        files = [file for file in (folder / "people").rglob("*") if file.is_file()]
        pictures, megabytes = 8 * (options.people + 16), sum(file.stat().st_size for file in files) / 1e6
        copied = measured(copying, folder, **how)
        rows = [
            {"way": "copying the files", "pictures": pictures, **copied},
            {"way": "writing shards", "pictures": pictures, **measured(writing, folder, **how)},
            {"way": "checking shards", "pictures": pictures, **measured(checking, folder, **how)},
        ]
        for row in rows:
            row["pictures_per_second"] = pictures / row["seconds"]
            row["mb_per_second"] = megabytes / row["seconds"]
            row["ratio"] = copied["seconds"] / row["seconds"]
        for count in options.planned:
            found = measured(planning, folder, count, **how)
            rows.append({"way": "index read, both plans, ten batches", "pictures": count, **found})
        return rows


def copying(folder: Path) -> Callable[[], Any]:
    def work() -> None:
        shutil.rmtree(folder / "copy", ignore_errors=True)
        shutil.copytree(folder / "people", folder / "copy")

    return work


def writing(folder: Path) -> Callable[[], Any]:
    catalog = read_catalog("csv", folder / "people")

    def work() -> None:
        shutil.rmtree(folder / "shards", ignore_errors=True)
        write_shards(catalog, folder / "shards", images_per_shard=1024, progress=False)

    return work


def checking(folder: Path) -> Callable[[], Any]:
    return partial(_check, folder / "shards")


def _check(folder: Path) -> None:
    if problems := check_shards(folder, progress=False):
        raise RuntimeError(problems[0])


def planning(folder: Path, count: int) -> Callable[[], Any]:
    """From the index on the disk to the tenth batch of both plans: what a training does before its first step."""
    file, shards = folder / f"{count}.csv", tuple(f"train-{number:06d}.tar" for number in range(-(-count // 4096)))
    table = np.zeros(count, ROW)
    places = np.arange(count)
    table["shard"], table["offset"], table["size"] = places // 4096, places % 4096 * 10_000, 9_000
    table["pid"] = np.random.default_rng(0).permutation(places // OF_EACH)
    write_index(file, Index(shards, np.array([b"%07d_x" % place for place in places]), table, {}))
    del table, places

    def work() -> None:
        index = read_index(file, shards)
        pids = index.table_N["pid"]
        people = len(np.unique(pids))
        for plan in (PKPlan(pids, 16, 4, 0), StrangersPlan(pids, min(STRANGERS, people), 0)):
            for step in range(10):
                plan.batch(step)

    return work
