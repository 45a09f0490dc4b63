"""What a process's memory is spent on, where a switch says it should be less. Prints Markdown.

    python tools/memory.py head --identities 100000 --dim 2048     identity.head=split, on 1, 2 and 4 processes
    python tools/memory.py pieces --batch 64                       engine.accumulate, on one process
    python tools/memory.py blocks --batch 32                       engine.gradient_checkpointing, on one process

Two optimiser steps of the part alone, on random numbers, each in new processes. The peak is a process's resident
memory, less what it was before the part was made (on a GPU: the allocator's peak).
"""

import argparse
import json
import os
import resource
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from bench_process import fitting
from torch import nn

from ppreid_dist import distributed
from ppreid_dist.losses.identity import IdentityConfig, split_identity_loss
from ppreid_dist.models.extractor import Extractor, ExtractorConfig
from ppreid_dist.models.recompute import recompute_blocks
from ppreid_dist.models.split_head import SplitHead
from ppreid_dist.training.engine import Engine, EngineConfig, open_engine
from ppreid_dist.training.optimiser import OptimiserConfig
from ppreid_dist.training.player import Player

ROWS = 64
Work = Callable[[Engine, Any], dict[str, float]]


def split_head(engine: Engine, options: argparse.Namespace) -> dict[str, float]:
    """Two steps of a split identity head: millions of weights held here."""
    identities, dim = options.identities, options.dim
    head = Player("head", SplitHead(dim, identities), OptimiserConfig(), engine, split_rows=identities)
    features = Player("features", nn.Linear(dim, dim), OptimiserConfig(), engine)
    x = torch.randn(ROWS // distributed.world_size(), dim, device=engine.device)
    labels_N = torch.randint(identities, (ROWS,), generator=torch.Generator().manual_seed(0)).to(engine.device)
    for _ in range(2):
        with features.active() as forward, head.active() as rows:
            logits = rows(distributed.gather(forward(x)))
            loss = split_identity_loss(logits, labels_N, head.module.rows.start, identities, IdentityConfig())
            features.step(loss, 0.0, beside=[head])
    return {"weights": sum(p.numel() for p in head.module.parameters()) / 1e6}


def in_pieces(engine: Engine, options: argparse.Namespace) -> dict[str, float]:
    """Two steps of a small vision transformer, its batch in pieces: seconds of the second."""
    with tempfile.TemporaryDirectory() as folder:
        vit = {"model_type": "vit", "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
        Path(folder, "config.json").write_text(json.dumps(vit))
        network = Extractor(ExtractorConfig(backbone=folder))
    network.accumulate(options.pieces)
    return _two_steps(engine, network, options)


def in_blocks(engine: Engine, options: argparse.Namespace) -> dict[str, float]:
    """Two steps of a ResNet-50, its blocks made again if ``options.recomputed``."""
    network = Extractor(ExtractorConfig())
    if options.recomputed:
        recompute_blocks(network.backbone)
    return _two_steps(engine, network, options)


def _two_steps(engine: Engine, network: Extractor, options: argparse.Namespace) -> dict[str, float]:
    extractor = Player("extractor", network, OptimiserConfig(), engine)
    x_B3HW = torch.rand(options.batch, 3, 256, 128, device=engine.device)
    for _ in range(2):
        settle(engine.device)
        begun = time.perf_counter()
        with extractor.active() as forward:
            with engine.autocast():
                loss = forward(x_B3HW).embedding_BD.square().mean()
            extractor.step(loss, 0.0)
    settle(engine.device)
    return {"seconds": time.perf_counter() - begun}


def measure(work: Work, processes: int, options: argparse.Namespace) -> dict[str, float]:
    """The largest figures of so many new processes: ``work``'s, and the peak in bytes."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        mp.spawn(_process, (work, processes, port, options, folder), nprocs=processes)
        found = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(processes)]
    return {name: max(one[name] for one in found) for name in found[0]}


def _process(rank: int, work: Work, processes: int, port: int, options: argparse.Namespace, folder: str) -> None:
    several = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in several.items()} | {"MASTER_PORT": str(port)})
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    engine = open_engine(EngineConfig(), run_folder=Path(folder))
    before = peak(engine.device)
    found = work(engine, options)
    Path(folder, str(rank)).write_text(json.dumps(found | {"peak": peak(engine.device) - before}))
    engine.close()


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(device: torch.device) -> int:
    """The largest memory so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    head = parts.add_parser("head")
    head.add_argument("--identities", type=int, default=100_000)
    head.add_argument("--dim", type=int, default=2048)
    head.add_argument("--processes", type=int, nargs="+", default=fitting(1, 2, 4))
    pieces = parts.add_parser("pieces")
    pieces.add_argument("--batch", type=int, default=64)
    pieces.add_argument("--each", type=int, nargs="+", default=[1, 2, 4, 8])
    blocks = parts.add_parser("blocks")
    blocks.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    if options.part == "head":
        print("| processes | weights of each, millions | peak of each, GB |\n| --- | --- | --- |")
        for processes in options.processes:
            found = measure(split_head, processes, options)
            print(f"| {processes} | {found['weights']:.1f} | {found['peak'] / 1e9:.2f} |", flush=True)
        return
    key, work, each = (
        ("pieces", in_pieces, options.each) if options.part == "pieces" else ("recomputed", in_blocks, [False, True])
    )
    print(f"| {key} | peak, GB | time of a step |\n| --- | --- | --- |")
    whole = 0.0
    for value in each:
        setattr(options, key, value)
        found = measure(work, 1, options)
        whole = whole or found["seconds"]
        print(f"| {value} | {found['peak'] / 1e9:.2f} | {found['seconds'] / whole:.2f} |", flush=True)


if __name__ == "__main__":
    main()
