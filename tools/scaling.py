"""The same training on 1, 2 and 4 processes, over several seeds: does the number of processes cost mAP?

    OMP_NUM_THREADS=1 python tools/scaling.py privacy.weight=0 --seeds 0 1 2 3 4

Every run sees the same pictures in the same global batches. Runs are paired by seed; what is finished in ``--out`` is
used again. Prints Markdown: mAP of each, mean and standard deviation over seeds, and the mean difference to one process
with its standard error over seeds.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from bench_process import fitting
from tqdm import tqdm

from ppreid_dist.files import read_json
from ppreid_dist.sweep.programs import launch_options


def mean_ap(run: Path, processes: int, arguments: list[str]) -> float:
    """Train and evaluate, unless that is done. Ends the program with what a failed run said."""
    train = ["accelerate", "launch", *launch_options(processes), "train.py", "--resume", *arguments, f"output={run}"]
    binaries = Path(sys.executable).parent
    for name, *rest in [] if (run / "evaluation.json").is_file() else [train, ["ppreid", "evaluate", str(run)]]:
        done = subprocess.run([str(binaries / name), *rest], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
    return float(read_json(run / "evaluation.json")["mAP"])


def table(found_PS: np.ndarray, processes: list[int], seeds: list[int]) -> list[str]:
    """``found_PS``: mAP by number of processes and seed."""
    lines = [
        "| processes | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + f" | mean ± sd | less than on {processes[0]} |"
    ]
    lines.append("| --- |" + " --- |" * (len(seeds) + 2))
    for number, found_S in zip(processes, found_PS, strict=True):
        apart_S = found_PS[0] - found_S
        error = apart_S.std(ddof=1) / len(seeds) ** 0.5
        less = "" if number == processes[0] else f"{apart_S.mean():+.3f} ± {error:.3f}"
        each = " | ".join(f"{value:.3f}" for value in found_S)
        lines.append(f"| {number} | {each} | {found_S.mean():.3f} ± {found_S.std(ddof=1):.3f} | {less} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml", metavar="FILE")
    parser.add_argument("--processes", type=int, nargs="+", default=fitting(1, 2, 4))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), metavar="DIR")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    if len(options.seeds) < 2:
        parser.error("--seeds: two or more")
    found_PS = np.zeros((len(options.processes), len(options.seeds)))
    with tqdm(total=found_PS.size, unit="run") as bar:
        for column, seed in enumerate(options.seeds):
            for row, number in enumerate(options.processes):
                arguments = ["--config", options.config, *options.settings, f"seed={seed}"]
                found_PS[row, column] = mean_ap(options.out / f"{number}_seed{seed}", number, arguments)
                bar.update()
    print("\n".join(table(found_PS, options.processes, options.seeds)))


if __name__ == "__main__":
    main()
