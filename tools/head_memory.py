"""What a split identity head costs each process: 100,000 identities and more, on 1, 2 and 4 processes.

    python tools/head_memory.py --identities 100000 --dim 2048

Two optimiser steps of the head alone, on random features of 64 rows. The peak is the process's resident memory, less
what it was before the head was made (on a GPU: the allocator's peak). Prints Markdown.
"""

import argparse
import os
import resource
import socket
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import nn

from ppreid_dist import distributed
from ppreid_dist.losses.identity import IdentityConfig, split_identity_loss
from ppreid_dist.models.split_head import SplitHead
from ppreid_dist.training.engine import EngineConfig, open_engine
from ppreid_dist.training.optimiser import OptimiserConfig
from ppreid_dist.training.player import Player

ROWS = 64


def work(rank: int, processes: int, port: int, identities: int, dim: int, folder: str) -> None:
    several = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in several.items()} | {"MASTER_PORT": str(port)})
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    engine = open_engine(EngineConfig(), run_folder=Path(folder))
    before = memory(engine.device)
    head = Player("head", SplitHead(dim, identities), OptimiserConfig(), engine, split_rows=identities)
    features = Player("features", nn.Linear(dim, dim), OptimiserConfig(), engine)
    x = torch.randn(ROWS // processes, dim, device=engine.device)
    labels_N = torch.randint(identities, (ROWS,), generator=torch.Generator().manual_seed(0)).to(engine.device)
    for _ in range(2):
        with features.active() as forward, head.active() as rows:
            logits = rows(distributed.gather(forward(x)))
            loss = split_identity_loss(logits, labels_N, head.module.rows.start, identities, IdentityConfig())
            features.step(loss, 0.0, beside=[head])
    held = sum(p.numel() for p in head.module.parameters())
    Path(folder, str(rank)).write_text(f"{held} {memory(engine.device) - before}")
    engine.close()


def memory(device: torch.device) -> int:
    """The peak so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of a split identity head, by the number of processes.")
    parser.add_argument("--identities", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    print("| processes | weights of each, millions | peak of each, GB |\n| --- | --- | --- |")
    for processes in options.processes:
        with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            mp.spawn(work, (processes, port, options.identities, options.dim, folder), nprocs=processes)
            found = [Path(folder, str(rank)).read_text().split() for rank in range(processes)]
        held, peak = (max(int(one[i]) for one in found) for i in (0, 1))
        print(f"| {processes} | {held / 1e6:.1f} | {peak / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()
