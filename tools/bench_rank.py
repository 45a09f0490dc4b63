"""Ranking a gallery: ours, and the usual way, a matrix of all distances whose rows are sorted; a toolbox's, if named.

Shapes: Q queries, G gallery items, D feature.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_process import device, measured

from ppreid_dist.evaluation.ranking import Entries, rank_in_parts
from ppreid_dist.evaluation.reranking import rerank

# Queries, gallery items, of them distractors, people, cameras: as the data sets of these names have them.
SIZES = {
    "small": (500, 4_000, 0, 200, 6),
    "market": (3_368, 19_732, 3_819, 750, 6),
    "msmt17": (11_659, 82_161, 0, 3_060, 15),
    "million": (1_000, 1_000_000, 900_000, 5_000, 30),
}
PART = 100_000  # gallery items that are made, or lie in memory, at a time


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="market")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--rerank", action="store_true", help="k-reciprocal re-ranking too")
    parser.add_argument("--twin-queries", type=int, default=300, help="queries that are sorted for; 0: no twin")
    parser.add_argument(
        "--peer",
        metavar="FILE",
        help="the compiled ranking of a ReID toolbox too, as torchreid and FastReID have it: their rank_cy*.so",
    )


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    size, how = SIZES[options.size], {"repeats": options.repeats, "threads": options.threads}
    if size[1] > PART:
        how |= {"repeats": 1, "warm": 0}
    queries, gallery = size[:2]
    ours = measured(counting, size, options.dim, queries, **how)
    row = {"size": options.size, "queries": queries, "gallery": gallery, "dim": options.dim, **ours}
    row["gflop_per_second"] = 2e-9 * queries * gallery * options.dim / ours["seconds"]
    if gallery > PART:
        return [{"way": "counting", **row}]
    others: dict[str, dict[str, float]] = {}
    if options.rerank:
        others["re-ranking"] = measured(reranking, size, options.dim, repeats=1, warm=0, threads=options.threads)
    if options.peer:
        others["toolbox, compiled"] = measured(compiled, options.peer, size, options.dim, **how)
    extra = [{**row, "way": way, **found, "gflop_per_second": None} for way, found in others.items()]
    if not options.twin_queries:
        return [{"way": "counting", **row}, *extra]
    some = min(queries, options.twin_queries)
    twin = measured(sorting, size, options.dim, some, **how)
    # What is sorted grows with the queries, and so does the matrix.
    twin = {name: value * queries / some for name, value in twin.items()}
    return [
        {"way": "counting", **row, "ratio": twin["seconds"] / ours["seconds"]},
        *({**more, "ratio": twin["seconds"] / more["seconds"]} for more in extra),
        {**row, "way": f"sorting (scaled from {some} queries)", **twin, "gflop_per_second": None, "ratio": 1.0},
    ]


class Gallery:
    """Features that are drawn when they are asked for, the same each time; people in balls, distractors alone."""

    def __init__(self, size: tuple[int, ...], dim: int):
        self.queries, self.items, distractors, self.people, cameras = size
        rng = np.random.default_rng(0)
        known = rng.integers(0, self.people, self.items - distractors)
        self.pids = rng.permutation(np.concatenate([known, np.full(distractors, -1)]))
        self.camids = rng.integers(0, cameras, self.items)
        self.query_pids, self.query_camids = (
            rng.integers(0, self.people, self.queries),
            rng.integers(0, cameras, self.queries),
        )
        self.centres = torch.randn(self.people + 1, dim, generator=torch.Generator().manual_seed(1))

    def features(self, pids: np.ndarray, seed: int) -> torch.Tensor:
        drawn = torch.randn(len(pids), self.centres.shape[1], generator=torch.Generator().manual_seed(seed))
        # So that pictures of a person are 3.5 standard deviations nearer than others', whatever the dimension.
        drawn *= max(0.1, self.centres.shape[1] ** 0.5 / 3.5 - 1) ** 0.5
        for some, of in zip(drawn.split(4096), np.split(pids, range(4096, len(pids), 4096)), strict=True):
            known = torch.from_numpy(of >= 0)  # its memory is not to be what is measured
            some[known] += self.centres[torch.from_numpy(of)[known]]
        return drawn.to(device())

    def asked(self, queries: int) -> Entries:
        pids = self.query_pids[:queries]
        return Entries(features_ND=self.features(pids, 2), pids_N=pids, camids_N=self.query_camids[:queries])

    def parts(self) -> list[Callable[[], Entries]]:
        def part(first: int) -> Entries:
            some = slice(first, first + PART)
            features = self.features(self.pids[some], 3 + first)
            return Entries(features_ND=features, pids_N=self.pids[some], camids_N=self.camids[some], first=first)

        return [lambda first=first: part(first) for first in range(0, self.items, PART)]  # type: ignore[misc]


def counting(size: tuple[int, ...], dim: int, queries: int) -> Callable[[], Any]:
    """Ours. A gallery that fits in one part lies in memory; of a larger one the parts are drawn within the work."""
    gallery = Gallery(size, dim)
    asked, parts = gallery.asked(queries), gallery.parts()
    if len(parts) == 1:
        whole = parts[0]()
        parts = [lambda: whole]
    return lambda: rank_in_parts(asked, parts)


def reranking(size: tuple[int, ...], dim: int) -> Callable[[], Any]:
    gallery = Gallery(size, dim)
    asked, whole = gallery.asked(gallery.queries), gallery.parts()[0]()
    return lambda: rerank(asked, whole)


def compiled(file: str, size: tuple[int, ...], dim: int) -> Callable[[], Any]:
    """A toolbox's: the matrix of all distances, which its compiled function sorts and reads."""
    spec = importlib.util.spec_from_file_location("rank_cy", Path(file))
    if spec is None or spec.loader is None:
        raise SystemExit(f"error: {file}: not a compiled module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    gallery = Gallery(size, dim)
    asked, whole = gallery.asked(gallery.queries), gallery.parts()[0]()
    ours = rank_in_parts(asked, [lambda: whole]).summary()["mAP"]
    query, known = (torch.nn.functional.normalize(of.features_ND) for of in (asked, whole))

    def work() -> Any:
        distance = (1 - query @ known.T).cpu().numpy()
        found = module.evaluate_cy(distance, asked.pids_N, whole.pids_N, asked.camids_N, whole.camids_N, 50)
        its = float(np.mean(found[1]))  # torchreid's is the mean already, FastReID's is of each query
        if abs(its - ours) > 1e-4:
            raise SystemExit(f"error: {file}: its mAP is {its:.5f}, ours {ours:.5f}")
        return found

    return work


def sorting(size: tuple[int, ...], dim: int, queries: int) -> Callable[[], Any]:
    """What ReID toolboxes do without compiled code: distances of all to all, then a query at a time."""
    gallery = Gallery(size, dim)
    asked, whole = gallery.asked(queries), gallery.parts()[0]()
    query, known = (torch.nn.functional.normalize(of.features_ND) for of in (asked, whole))

    def work() -> list[float]:
        aps = []
        order_QG = np.argsort((1 - query @ known.T).cpu().numpy(), axis=1)
        for q, order in enumerate(order_QG):
            match = whole.pids_N[order] == asked.pids_N[q]
            match = match[~(match & (whole.camids_N[order] == asked.camids_N[q]))]
            found = match.cumsum()
            aps.append((found / np.arange(1, len(found) + 1))[match].mean() if match.any() else np.nan)
        return aps

    return work
