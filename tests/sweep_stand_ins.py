"""A sweep whose trainings and attacks are stand-ins: nothing is learnt, a trial takes a second, and it can be killed.

python tests/sweep_stand_ins.py ray|array CONFIG [--resume] [key=value …]      a sweep, with stand-ins
python tests/sweep_stand_ins.py launch … train.py …                            a training: a line a step in steps.txt
python tests/sweep_stand_ins.py ppreid SOURCE attack …                         an attack: figures made up from λ
python tests/sweep_stand_ins.py ppreid SOURCE store …                          a run whose settings have some more
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

STEPS = 12
SECONDS = float(os.environ.get("STEP_SECONDS", "0.05"))
HERE = str(Path(__file__).resolve())


def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for it; an assertion fails where it doesn't come."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def train(arguments: list[str]) -> int:
    """As far as a sweep sees it: it resumes, saves on SIGTERM and ends by 75, fails where it is told to."""
    settings = dict(word.split("=", 1) for word in arguments if "=" in word)
    run = Path(json.loads(settings["output"]))
    run.mkdir(parents=True, exist_ok=True)
    (run / "settings.json").write_text(json.dumps(settings))
    (run / "environment.json").write_text(json.dumps(dict(os.environ)))
    told: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    if settings.get("training.ema") == "0.25":
        print("noise\nerror: step 3: the gradient is not finite", flush=True)
        return 2
    lines = run / "steps.txt"
    for step in range(len(lines.read_text().splitlines()) if lines.exists() else 0, STEPS):
        time.sleep(SECONDS)
        with lines.open("a") as out:
            out.write(f"{step}\n")
        row = {"step": step, "images": step, "loss/identity": 1.0, "privacy/strength": 0.0,
               "loss/triplet": float(settings.get("training.ema", "0"))}  # fmt: skip
        with (run / "metrics.jsonl").open("a") as out:
            out.write(json.dumps(row) + "\n")
        if told:
            return 75
    (run / "model").mkdir(exist_ok=True)
    (run / "model" / "extractor.json").write_text("{}")
    return 0


def attack(source: str, arguments: list[str]) -> int:
    from report_examples import good_report

    settings = [word for word in arguments if "=" in word]
    arguments = [word for word in arguments if word != "--no-estimate" and word not in settings]
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    protected = json.loads((Path(given["--protected"]) / "settings.json").read_text())
    weight, report = float(protected.get("privacy.weight", "1")), good_report()
    leak = 1 / (1 + weight)
    report["utility"]["control"]["mAP"] = 0.6
    report["utility"]["protected"]["mAP"] = 0.6 - 0.01 * weight
    report["utility"]["ratio"] = {"value": 1 - weight / 60, "low": 0.9, "high": 1.0}
    for axis in report["axes"].values():
        axis["leak"] |= {"value": leak, "low": leak - 0.05, "high": leak + 0.05}
    judges = [value for flag, value in zip(arguments[::2], arguments[1::2], strict=True) if flag == "--judge"]
    for i, judge in enumerate(judges[1:], 2):
        report["axes"][f"identity_{i}"] = {**report["axes"]["identity"], "metric": judge}
    out = Path(given["--out"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(json.dumps([given["--config"], *settings]))
    (out / "attack.json").write_text(json.dumps({"report": report, "source": source}))
    with (Path(given["--trained"]) / "attacks.txt").open("a") as log:
        log.write(f"{given['--protected']}\n")
    return 0


def store(_: str, arguments: list[str]) -> int:
    source, _, out, *settings = arguments
    before = json.loads((Path(source) / "settings.json").read_text())
    (Path(out) / "model").mkdir(parents=True)
    (Path(out) / "settings.json").write_text(json.dumps({**before, **dict(s.split("=", 1) for s in settings)}))
    (Path(out) / "model" / "extractor.json").write_text("{}")
    return 0


def sweep(backend: str, config: str, arguments: list[str]) -> int:
    from ppreid_dist.settings import load_settings
    from ppreid_dist.sweep import driver
    from ppreid_dist.sweep.config import SweepConfig

    settings = [word for word in arguments if not word.startswith("--")]
    found = load_settings(SweepConfig, config, settings)
    how = {"say": lambda text: print(text, flush=True), "resume": "--resume" in arguments, "programs": stand_ins()}
    how["reattack"] = "--reattack" in arguments
    try:
        if backend == "ray":
            driver.sweep_on_ray(found, **how)
        else:
            driver.sweep_in_array(found, 0, 1, **how)
    except driver.Stopped as stopped:
        print(stopped, flush=True)
        return 75
    return 0


def stand_ins():  # type: ignore[no-untyped-def]
    from ppreid_dist.attacks.kept import source_digest
    from ppreid_dist.sweep.programs import Programs

    ppreid = (sys.executable, HERE, "ppreid", source_digest())
    return Programs(launch=(sys.executable, HERE, "launch"), ppreid=ppreid)


if __name__ == "__main__":
    role, rest = sys.argv[1], sys.argv[2:]
    if role == "launch":
        sys.exit(train(rest[rest.index("train.py") + 1 :]))
    if role == "ppreid":
        sys.exit({"attack": attack, "store": store}[rest[1]](rest[0], rest[2:]))
    sys.exit(sweep(role, rest[0], rest[1:]))
