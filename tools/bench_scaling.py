"""One training on several processes: pictures a second, and the bytes that pass between them in a step.

The bytes are counted where they pass, at the loopback interface, so nothing else may use it; what an all-reduce of the
extractor's gradients alone takes is reckoned beside them.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_process import alone, fitting
from bench_step import step_times, timed, ways, world
from tqdm import tqdm

from ppreid_dist.errors import PPReIDError
from ppreid_dist.experiment import Config
from ppreid_dist.models.extractor import Extractor
from ppreid_dist.settings import load_settings

ROOT = Path(__file__).resolve().parents[1]
SENT = Path("/sys/class/net/lo/statistics/tx_bytes")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="configs/demo.yaml", metavar="FILE")
    parser.add_argument("--processes", type=int, nargs="+", default=fitting(1, 2, 4))
    parser.add_argument("--steps", type=int, default=48, help="as of the part step")
    default = ["plain", "configured", "gan"]
    parser.add_argument("--only", nargs="+", choices=list(ways(None)), default=default, metavar="WAY")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="before options that take several words")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        common = world(options.config, options.settings, Path(folder))
        several = [(name, way, number) for name, way in ways(options.only).items() for number in options.processes]
        for name, way, number in tqdm(several, unit="training"):
            output = f"{folder}/{name}_{number}"
            settings, counted = timed(options.config, [*common, *way, f"output={output}"], options.steps)
            found = alone(_launch, options.config, settings, counted, number, options.threads, threads=1)
            del found["peak_mb"]  # of the process that waited
            row = {"way": name, "processes": number, **found, "ratio": 0.0}
            row["images_per_second_a_rank"] = found["images_per_second"] / number
            first = next((first for first in rows if first["way"] == name), row)
            row["speedup"] = first["seconds"] / found["seconds"]
            rows.append(row)
            row["ratio"] = rows[0]["seconds"] / found["seconds"]
    return rows


def _launch(file: str, settings: list[str], counted: int, processes: int, threads: int) -> dict[str, float]:
    """A training under torchrun; ``host_peak_mb`` is what its largest process took of the host's memory."""
    config = load_settings(Config, file, settings)
    metrics, said = Path(config.output) / "metrics.jsonl", Path(f"{config.output}.log")
    with said.open("w") as log:
        training = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
             "train.py", "--config", file, *settings],
            cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(max(1, threads // processes))},
        )  # fmt: skip
        sent = _watch(training, metrics)
    if training.returncode:
        raise PPReIDError(f"{processes} processes: {said.read_text()[-2000:]}")
    last = max(sent)
    wire = (sent[last] - sent[last - counted]) / counted if last - counted in sent else float("nan")
    extractor = Extractor(config.model, num_classes=config.data.synthetic.train)
    gradients = 4 * sum(parameter.numel() for parameter in extractor.parameters() if parameter.requires_grad)
    return {
        **step_times(config, counted),
        "wire_mb_a_step": wire / 1e6,
        "gradients_mb_a_step": 2 * (processes - 1) * gradients / 1e6,
        "host_peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6,
    }


def _watch(training: subprocess.Popen[bytes], metrics: Path) -> dict[int, int]:
    """The bytes that had been sent when the training had logged so many steps; none on a machine that doesn't count."""
    sent, rows, row = {0: 0}, None, ""
    while training.poll() is None:
        if rows is None and metrics.exists():
            rows = metrics.open()
        row += rows.readline() if rows is not None else ""
        if row.endswith("\n"):
            if SENT.exists():
                sent[json.loads(row)["step"]] = int(SENT.read_text())
            row = ""
        else:
            time.sleep(0.002)
    return sent
