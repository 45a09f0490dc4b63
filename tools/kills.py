"""Kill training again and again, let it go on, and compare what comes out with a run that nobody touched.

    python tools/kills.py --kills 50 --processes 2 --out runs/kills

Every attempt starts all processes, kills one or all of them at a random moment (SIGKILL)
of the kinds below, and starts them anew with ``--resume``. When the run is finished, every tensor of its last
checkpoint must be the untouched run's, bit for bit; then a new run begins, until all kills are done.

    step        at a random moment between two checkpoints
    writing     while a checkpoint is being written
    pruning     when a new checkpoint lies in its place and the old ones are still to be removed
    full disk   no kill: the first process may write no more than a part of a checkpoint, and must say so
"""

import argparse
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from ranks import Rank, finish, start_ranks
from tqdm import tqdm

from ppreid_dist.data.dataset import prepare_shards
from ppreid_dist.errors import ConfigError, PPReIDError
from ppreid_dist.experiment import Config
from ppreid_dist.files import read_tensors
from ppreid_dist.settings import load_settings, path_override
from ppreid_dist.training.checkpoint import CheckpointFolder

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("step", "writing", "pruning", "full disk")
PATIENCE = 120.0  # seconds until the next moment to kill at must have come
TINY = [
    "data.synthetic={train: 24, unlabelled: 32, aux: 24, test: 10, cameras: 2, shots: 2, height: 32, width: 16}",
    "data.height=32", "data.width=16", "data.identities_per_batch=8", "data.pictures_per_identity=2",
    "data.stream.backend=pillow", "privacy.ridge={strangers: 16, target_size: [8, 4]}",
    "privacy.adversaries=[{kind: gan}, {kind: ridge}]", "privacy.every=2",
    "reversal.size=[16,8]", "reversal.batch=8", "reversal.warm_steps=6", "reversal.generator={width: 8, noise_dim: 4}",
    "reversal.critic.width=8", "reversal.lazy={period: 3, catch_up: 4, window: 2}", "training.images=640",
    "training.warm=0.2", "training.checkpoint_every=1", "training.log_every=1", "probe.every=0",
    "engine.timeout=45",
]  # fmt: skip


def wait(ranks: list[Rank]) -> tuple[list[int], str]:
    """Statuses and what was said, when all have ended. TimeoutExpired if one doesn't; all are killed."""
    ended = finish(ranks, PATIENCE)
    return [status for status, _ in ended], "\n".join(said for _, said in ended)


def moment(kind: str, checkpoints: Path, chance: random.Random) -> Callable[[], bool]:
    """Whether now is the time to kill; asked every millisecond."""
    first, left = sorted(checkpoints.glob("step_*"))[-1:], set(checkpoints.glob(".step_*.tmp/*"))
    if kind == "writing":
        return lambda: bool(set(checkpoints.glob(".step_*.tmp/*")) - left)
    if kind == "pruning":
        return lambda: len(list(checkpoints.glob("step_*"))) > 2
    delay, begun = chance.uniform(0, 0.5), [0.0]

    def now() -> bool:
        if not begun[0] and sorted(checkpoints.glob("step_*"))[-1:] != first:
            begun[0] = time.monotonic()
        return bool(begun[0]) and time.monotonic() > begun[0] + delay

    return now


def attempt(kind: str, processes: int, arguments: list[str], run: Path, chance: random.Random) -> str | None:
    """Start, kill, clean up. None where it went as it must, else what went wrong; "finished" where it was too late."""
    try:
        return _attempt(kind, processes, arguments, run, chance)
    except subprocess.TimeoutExpired:
        return f"{kind}: a process outlived the others by {PATIENCE:.0f} s"


def _attempt(kind: str, processes: int, arguments: list[str], run: Path, chance: random.Random) -> str | None:
    if kind == "full disk":
        # Enough for what is small, too little for the tensors.
        newest = sorted((run / "checkpoints").glob("step_*/tensors.safetensors"))
        most = newest[-1].stat().st_size // 2 if newest else 100_000
        statuses, said = wait(start_ranks(processes, *arguments, first_writes_at_most=most))
        told = [line for line in said.splitlines() if line.startswith("error: ")]
        if statuses[0] != 2 or not any("could not be written" in line for line in told) or 0 in statuses:
            return f"full disk: statuses {statuses}, said {told}"
        return None
    ranks = start_ranks(processes, *arguments)
    due, deadline = moment(kind, run / "checkpoints", chance), time.monotonic() + PATIENCE
    while all(rank.poll() is None for rank in ranks) and not due():
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
            return f"{kind}: no checkpoint within {PATIENCE:.0f} s"
        time.sleep(0.001)
    for victim in [chance.randrange(processes)] if chance.random() < 0.5 else range(processes):
        ranks[victim].kill()
    statuses, said = wait(ranks)
    if all(status == 0 for status in statuses):
        return "finished"
    if any(status not in (0, 1, -signal.SIGKILL) for status in statuses):
        return f"{kind}: statuses {statuses}: {said[-500:]}"
    return None


def difference(run: Path, reference: Path) -> str | None:
    """The first tensor that isn't equal bit for bit."""
    folders = [CheckpointFolder(folder, 1).latest() for folder in (run, reference)]
    mine, other = (read_tensors(folder / "tensors.safetensors") for folder in folders if folder is not None)
    if mine.keys() != other.keys():
        return f"{run}: other tensors than {reference}"
    return next((f"{run}: {name} differs" for name in mine if not torch.equal(mine[name], other[name])), None)


def prepared(out: Path, config: str, given: list[str]) -> list[str]:
    """The settings of all runs, whose shards are written. ConfigError where ``out`` has something in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: {out} isn't empty; name a new folder, or remove it")
    here = [path_override("data.root", out / "pictures"), path_override("data.shards", out / "shards")]
    settings = [*TINY, *here, *given]
    prepare_shards(load_settings(Config, config, settings).data, progress=False)
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill and resume training; compare with an untouched run.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    parser.add_argument("--out", type=Path, default=Path("runs/kills"), help="folder of the runs, new or empty")
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="over the tiny world that is trained")
    options = parser.parse_intermixed_args()
    chance, out = random.Random(options.seed), options.out.resolve()
    try:
        settings = prepared(out, options.config, options.settings)
    except PPReIDError as error:
        sys.exit(f"error: {error}")
    common = ["--config", options.config, "--resume", *settings]
    statuses, said = wait(start_ranks(options.processes, *common, path_override("output", out / "untouched")))
    if any(statuses):
        sys.exit(f"the untouched run failed: {statuses}\n{said}")

    tried: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    lost: list[str] = []
    pending: list[str] = []  # kills of the run that isn't finished yet
    runs, run = 1, out / "run1"
    with tqdm(total=options.kills, desc="kills", unit="kill") as bar:
        while sum(tried.values()) < options.kills or pending:
            arguments = [*common, path_override("output", run)]
            if sum(tried.values()) < options.kills:
                kind = KINDS[sum(tried.values()) % len(KINDS)]
                problem = attempt(kind, options.processes, arguments, run, chance)
                if problem != "finished":
                    tried[kind] += 1
                    bar.update()
                if problem is None:
                    pending.append(kind)
                    continue
                if problem != "finished":
                    lost.append(problem)
                    tqdm.write(problem)
                    continue
            else:
                statuses, said = wait(start_ranks(options.processes, *arguments))
                if any(statuses):
                    lost += [f"{kind}: could not go on: {said[-300:]}" for kind in pending]
                    break
            if found := difference(run, out / "untouched"):
                lost += [f"{kind}: {found}" for kind in pending]
                tqdm.write(found)
            else:
                survived.update(pending)
            pending, runs = [], runs + 1
            run = out / f"run{runs}"
    print(f"\n{options.processes} processes, {sum(tried.values())} kills over {runs - 1} runs\n")
    print("| kill | tried | survived, bit for bit | lost |\n| --- | --- | --- | --- |")
    for kind in KINDS:
        print(f"| {kind} | {tried[kind]} | {survived[kind]} | {tried[kind] - survived[kind]} |")
    sys.exit(f"{len(lost)} lost, the first: {lost[0]}" if lost else 0)


if __name__ == "__main__":
    main()
