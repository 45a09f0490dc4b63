"""`make demo`: the whole way on synthetic people, by the commands that a user would type, in runs/demo.

    runs/demo/judge/  control/  protected/      three runs of `accelerate launch train.py`
    runs/demo/attack.json, report.html, …       `ppreid attack`, `ppreid report`

What is there already and was made by the same settings is used again.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from ppreid_dist.errors import PPReIDError
from ppreid_dist.experiment import Config, load_run
from ppreid_dist.reporting.page import load_report
from ppreid_dist.settings import load_settings

CONFIG = "configs/demo.yaml"
OUT = Path("runs/demo")
CONTROL = ["privacy.weight=0"]
JUDGE = [*CONTROL, "seed=1", "model.backbone=configs/backbones/resnet_tiny_b", "data.train_splits=[train,aux]"]
RUNS = {"judge": JUDGE, "control": CONTROL, "protected": []}


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


def train(name: str, settings: list[str]) -> None:
    """One run, unless it is finished; a run that was stopped goes on."""
    run = OUT / name
    arguments = [*settings, f"output={run}"]
    if (run / "model" / "extractor.json").is_file():
        if load_run(run) != load_settings(Config, CONFIG, arguments):
            sys.exit(f"error: {run}: was made by other settings; remove {OUT} to begin anew")
        print(f"\n=== {run} is finished, used again", flush=True)
        return
    several = ["--multi_gpu"] if processes() > 1 else []
    call(
        f"train {name}",
        *["accelerate", "launch", *several, "--num_processes", str(processes()), "--num_machines", "1"],
        *["--mixed_precision", "no", "--dynamo_backend", "no"],
        *["train.py", "--config", CONFIG, "--resume", *arguments],
    )


def main() -> None:
    started = time.perf_counter()
    call("synthetic pedestrians and their shards", "ppreid", "shards", "--config", CONFIG)
    for name, settings in RUNS.items():
        train(name, settings)
    runs = {name: str(OUT / name) for name in RUNS}
    if (OUT / "attack.json").is_file():
        print(f"\n=== {OUT / 'attack.json'} is there, used again", flush=True)
    else:
        call("utility of all three", "ppreid", "evaluate", *runs.values())
        call(
            "fresh attackers",
            *["ppreid", "attack", "--config", CONFIG, "--control", runs["control"]],
            *["--protected", runs["protected"], "--judge", runs["judge"], "--out", str(OUT)],
        )
    call("the report", "ppreid", "report", str(OUT))
    print("\n" + summary(time.perf_counter() - started), flush=True)


def summary(seconds: float) -> str:
    """What was found, in five lines."""
    report = load_report(OUT / "report.json")
    control, protected = (report["utility"][name]["mAP"] for name in ("control", "protected"))
    axes, probe = report["axes"], report["probe"]

    def axis(name: str) -> str:
        leak, urr = axes[name]["leak"], axes[name]["urr"]
        value = "none measurable" if leak["value"] is None else f"{leak['value']:.2f}"
        interval = "" if leak["low"] is None or leak["high"] is None else f" [{leak['low']:.2f}, {leak['high']:.2f}]"
        return f"{name}: leak r {value}{interval} of the unprotected, URR {urr['display']}"

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
            f"look at   {OUT / 'report.html'} (numbers: {OUT / 'report.json'}); this took {seconds:.0f} s",
        ]
    )


if __name__ == "__main__":
    try:
        main()
    except PPReIDError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; `make demo` goes on where this ended")
