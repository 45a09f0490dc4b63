"""`make demo`: the whole way on synthetic people, by the commands that a user would type, in runs/demo.

    runs/demo/judge/  control/  best_response/  three runs of `accelerate launch train.py`
    runs/demo/protected/                        what played against the best response, storing codes: `ppreid store`
    runs/demo/attack.json, report.html, …       `ppreid attack`, `ppreid report`

What is there already and was made by the same settings is used again.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from ppreid_dist.errors import PPReIDError
from ppreid_dist.evaluation.bootstrap import in_words
from ppreid_dist.experiment import Config, load_run
from ppreid_dist.reporting.page import load_report
from ppreid_dist.settings import load_settings
from ppreid_dist.sweep.programs import PLAIN, launch_options

CONTROL = ["privacy.weight=0"]
JUDGE = [*CONTROL, "seed=1", "model.backbone=configs/backbones/resnet_tiny_b", "data.train_splits=[train,aux]"]
RUNS = {"judge": JUDGE, "control": CONTROL, "best_response": []}
CODES = [f"model.store.{key}" for key in ("kind=codes", "axes=16", "dim=2048", "width=0.45")]


def processes() -> int:
    """Every GPU, as a power of two; two processes where there is none and two cores are."""
    gpus = torch.cuda.device_count()
    return 1 << (gpus.bit_length() - 1) if gpus else min(2, len(os.sched_getaffinity(0)))


def call(title: str, *command: str) -> None:
    """Run one command of the demo in the foreground; its failure ends the demo with its status."""
    print(f"\n=== {title}\n$ {' '.join(command)}", flush=True)
    started = time.perf_counter()
    threads = max(1, len(os.sched_getaffinity(0)) // processes())
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    binaries = Path(sys.executable).parent
    status = subprocess.run([str(binaries / command[0]), *command[1:]], env=environment).returncode
    if status:
        sys.exit(status)
    print(f"=== {time.perf_counter() - started:.0f} s", flush=True)


def finished(run: Path, config: str, arguments: list[str]) -> bool:
    """Whether it is there already; the demo ends where other settings made it."""
    if not (run / "model" / "extractor.json").is_file():
        return False
    if load_run(run) != load_settings(Config, config, arguments):
        sys.exit(f"error: {run}: was made by other settings; remove {run.parent} to begin anew")
    print(f"\n=== {run} is finished, used again", flush=True)
    return True


def train(name: str, config: str, settings: list[str], out: Path) -> bool:
    """One run, unless it is finished (False); a run that was stopped goes on."""
    run = out / name
    arguments = [*settings, *RUNS[name], f"output={run}"]
    if finished(run, config, arguments):
        return False
    options = launch_options(processes(), os.path.relpath(PLAIN))
    arguments = ["train.py", "--config", config, "--resume", *arguments]
    call(f"train {name}", "accelerate", "launch", *options, *arguments)
    return True


def store(config: str, settings: list[str], out: Path) -> bool:
    """Codes of what was trained, unless they are there (False)."""
    run = out / "protected"
    if finished(run, config, [*settings, *RUNS["best_response"], *CODES, f"output={run}"]):
        return False
    call("what a gallery keeps", "ppreid", "store", str(out / "best_response"), "--out", str(run), *CODES)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, attack and report on synthetic people.")
    parser.add_argument("--config", default="configs/demo.yaml", metavar="FILE")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    config, out, settings = options.config, options.out, options.settings
    started = time.perf_counter()
    call("synthetic pedestrians and their shards", "ppreid", "shards", "--config", config, *settings)
    made = [*(train(name, config, settings, out) for name in RUNS), store(config, settings, out)]
    runs = {name: str(out / name) for name in ("judge", "control", "best_response", "protected")}
    if (out / "attack.json").is_file() and not any(made):
        print(f"\n=== {out / 'attack.json'} is there, used again", flush=True)
    else:
        call("utility", "ppreid", "evaluate", *runs.values())
        call(
            "fresh attackers",
            *["ppreid", "attack", "--config", config, "--control", runs["control"]],
            *["--protected", runs["protected"], "--judge", runs["judge"], "--out", str(out)],
            *["--processes", str(processes()), "--no-estimate", *settings],
        )
    call("the report", "ppreid", "report", str(out))
    print("\n" + summary(out, time.perf_counter() - started), flush=True)


def summary(out: Path, seconds: float) -> str:
    """What was found, in five lines."""
    report = load_report(out / "report.json")
    control, protected = (report["utility"][name]["mAP"] for name in ("control", "protected"))
    axes, probe = report["axes"], report["probe"]

    def axis(name: str) -> str:
        leak, urr = axes[name]["leak"], axes[name]["urr"]
        value = "none measurable" if leak["value"] is None or urr["broken"] else in_words(leak)
        return f"{name}: leak r {value} of the unprotected, URR {urr['display']}"

    masked = "no probe"
    if probe is not None:
        verdict = "MASKING seen" if probe["warned"] else "no masking seen"
        masked = f"apparent error {probe['apparent']:.4f}, fresh {probe['fresh']:.4f}: {verdict}"
    return "\n".join(
        [
            f"utility   mAP {control:.3f} unprotected, {protected:.3f} protected",
            f"attackers {report['attack']['people']} people of their own; {axis('identity')}",
            f"          {axis('pixel')}",
            f"probe     {masked}",
            f"look at   {out / 'report.html'} (numbers: {out / 'report.json'}); this took {seconds:.0f} s",
        ]
    )


if __name__ == "__main__":
    try:
        main()
    except PPReIDError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; `make demo` goes on where this ended")
