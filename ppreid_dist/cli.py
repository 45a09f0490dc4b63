"""The ``ppreid`` command and the entry behind ``accelerate launch train.py``: arguments in, one line of error out."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ppreid_dist import __version__
from ppreid_dist.errors import ConfigError, DataError, LostError, PPReIDError, Stopped

FAILED, BAD_INPUT, STOPPED, INTERRUPTED = 1, 2, 75, 130
_SETTINGS = "key=value"
_PATIENCE = 5.0  # seconds
_log = logging.getLogger(__name__)


class _Once(argparse.Action):
    """An option that may be given once: the last would win, and the first be forgotten."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            raise ConfigError(f"{option_string}: given twice; give one file, and settings as key=value")
        setattr(namespace, self.dest, values)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _parser(
    prog: str, description: str, schema_help: bool = False, over: str = "the defaults below"
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if schema_help:
        parser.add_argument("--config", action=_Once, type=Path, metavar="FILE", help=f"YAML settings over {over}")
        parser.add_argument("settings", nargs="*", metavar=_SETTINGS, help="dotted settings over those of the file")
    return parser


def _explain_settings(arguments: Sequence[str], parser: argparse.ArgumentParser, sweep: bool = False) -> None:
    """The list of all settings needs heavy imports: it is made only when help is asked for."""
    if "-h" in arguments or "--help" in arguments:
        from ppreid_dist.experiment import Config
        from ppreid_dist.settings import help_text
        from ppreid_dist.sweep.config import SweepConfig

        parser.epilog = "settings and their defaults:\n" + help_text(SweepConfig if sweep else Config)


def _train(arguments: Sequence[str], prog: str = "ppreid train") -> int:
    parser = _parser(prog, "Train one extractor. Under `accelerate launch` or torchrun, on many processes.", True)
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint, if there is one")
    _explain_settings(arguments, parser)
    options = parser.parse_intermixed_args(arguments)
    from ppreid_dist.experiment import Config, train
    from ppreid_dist.settings import load_settings
    from ppreid_dist.training.stopping import restarted

    config = load_settings(Config, options.config, options.settings)
    # A launcher that starts its processes again (--max_restarts) means them to go on.
    result = train(config, resume=options.resume or restarted())
    if os.environ.get("RANK", "0") == "0":
        _say(f"{config.output}: {result['steps']} steps, {result['images_per_second']} images/s, {result['seconds']} s")
    return 0


def _shards(arguments: Sequence[str]) -> int:
    parser = _parser("ppreid shards", "Write the shards that a configuration trains on, or check them.", True)
    parser.add_argument("--check", action="store_true", help="read every sample of the shards and name what is damaged")
    _explain_settings(arguments, parser)
    options = parser.parse_intermixed_args(arguments)
    from ppreid_dist.data.dataset import prepare_shards
    from ppreid_dist.data.shard_check import check_shards
    from ppreid_dist.experiment import Config
    from ppreid_dist.settings import load_settings

    config = load_settings(Config, options.config, options.settings)
    if options.check:
        if not Path(config.data.shards).is_dir():
            raise DataError(f"{config.data.shards}: no such folder (data.shards); write it by `ppreid shards`")
        problems = check_shards(Path(config.data.shards))
        _say("\n".join(problems) or f"{config.data.shards}: every sample is whole")
        return FAILED if problems else 0
    _say(prepare_shards(config.data))
    return 0


def _store(arguments: Sequence[str]) -> int:
    parser = _parser("ppreid store", "Put a protection that needs no training on a finished run's stored features.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run with plain features")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of the new run")
    parser.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help="holds model.store.key, a whole number, which on the command line others could see (/dev/stdin reads it)",
    )
    parser.add_argument(
        "settings", nargs="+", metavar=_SETTINGS, help="model.store.kind=… and the others of model.store"
    )
    options = parser.parse_intermixed_args(arguments)
    from ppreid_dist.models.store import KINDS
    from ppreid_dist.models.stores.base import PUBLIC_KEY
    from ppreid_dist.storing import STORED, read_key, store

    settings, key = options.settings, f"{STORED}key="
    if options.key_file is not None:
        if any(setting.startswith(key) for setting in settings):
            raise ConfigError(f"--key-file: {STORED}key is given too")
        settings = [*settings, f"{key}{read_key(options.key_file)}"]
    chosen = store(options.run, options.out, settings)
    told = [f"{key}…" if setting.startswith(key) else setting for setting in settings]  # outputs are kept
    _say(f"{options.out}: {options.run}, stored by {' '.join(told)}")
    if KINDS[chosen.kind].keyed and chosen.key == PUBLIC_KEY:
        _say(
            f"note: {key}{PUBLIC_KEY} is the public example key, right for measurements and wrong for a gallery: make "
            f"your own by python -c 'import secrets; print(secrets.randbits(128))' > FILE and give it by --key-file. "
            f"It will lie in config.yaml and model/ of {options.out}: guard them as the gallery's other secrets"
        )
    return 0


def _evaluate(arguments: Sequence[str]) -> int:
    parser = _parser("ppreid evaluate", "mAP, CMC and mINP of finished runs on their own query and gallery.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--rerank", action="store_true", help="after k-reciprocal re-ranking too, a protocol of its own"
    )
    options = parser.parse_args(arguments)
    from ppreid_dist.assessment import evaluate
    from ppreid_dist.evaluation.reranking import Reranking

    for run in options.runs:
        summary = evaluate(run, reranking=Reranking() if options.rerank else None)
        _say(f"{run}: " + "  ".join(f"{name} {value:.4f}" for name, value in summary.items()))
    return 0


def _features(arguments: Sequence[str]) -> int:
    parser = _parser("ppreid features", "What a finished run stores of new pictures, as a gallery keeps it.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "pictures",
        nargs="+",
        type=Path,
        metavar="PICTURE",
        help="a person each, cropped as the training's; or a folder",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE.safetensors",
        help="where features go; files' names go to FILE.keys.txt",
    )
    parser.add_argument(
        "--by-folder",
        action="store_true",
        help="the pictures in one folder, a person's by one camera, are one entry, their mean (see data.tracklet)",
    )
    parser.add_argument(
        "--packed", action="store_true", help="signs, codes and cells as bits, int8 as int8, instead of float32 for all"
    )
    options = parser.parse_args(arguments)
    from ppreid_dist.features import write_features

    count, dim = write_features(
        options.run, options.pictures, options.out, by_folder=options.by_folder, packed=options.packed
    )
    _say(f"{options.out}: {count} features of {dim} numbers, their files in {options.out.with_suffix('.keys.txt')}")
    return 0


def _attack(arguments: Sequence[str]) -> int:
    parser = _parser(
        "ppreid attack",
        "Train fresh attackers on the stored features of two runs and compare: the unprotected control is the ceiling, "
        "the mean picture, and permuted pairs, are the floor, independent extractors judge who is recognised.",
        True,
        over="the defaults below, used instead of the protected run's config.yaml",
    )
    parser.add_argument("--control", type=Path, required=True, metavar="RUN", help="the unprotected run")
    parser.add_argument("--protected", type=Path, required=True, metavar="RUN", help="the run under test")
    parser.add_argument(
        "--judge",
        type=Path,
        required=True,
        action="append",
        metavar="RUN|FILE",
        help="another run, with a seed of its own, or an .onnx file; an axis for each that is given",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--trained", type=Path, metavar="DIR", help="where attackers' trainings are kept (default: trained in --out)"
    )
    parser.add_argument(
        "--processes",
        type=_count,
        default=1,
        metavar="N",
        help="number of processes that train attackers on this machine, each on a GPU of its own if there are several",
    )
    parser.add_argument(
        "--no-estimate",
        dest="estimate",
        action="store_false",
        help="begin at once, without some steps of every attacker to say how long all may take",
    )
    _explain_settings(arguments, parser)
    options = parser.parse_intermixed_args(arguments)
    from ppreid_dist.assessment import attack
    from ppreid_dist.experiment import Config, load_run
    from ppreid_dist.settings import load_settings

    base = options.config or options.protected / "config.yaml"
    if options.config is None:
        load_run(options.protected)
    config, runs = load_settings(Config, base, options.settings), (options.control, options.protected, options.judge)
    how = {"trained": options.trained, "processes": options.processes, "estimate": options.estimate}
    attack(config, *runs, options.out, **how)
    _say(f"{options.out}: attacked; make the page by `ppreid report {options.out}`")
    return 0


def _report(arguments: Sequence[str]) -> int:
    parser = _parser("ppreid report", "The page and the JSON file of an attack's results.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="what `ppreid attack --out` wrote")
    parser.add_argument(
        "--pictures", choices=("synthetic", "always", "never"), help="show pictures of people (default: as configured)"
    )
    options = parser.parse_args(arguments)
    from ppreid_dist.reporting.report import report

    _say(report(options.folder, pictures=options.pictures))
    return 0


def _bench_privacy(arguments: Sequence[str]) -> int:
    return _sweep(
        arguments,
        "ppreid bench-privacy",
        "Train and attack every method of a list, with one control and one judge between them, and write table.json, "
        "table.md and the utility-leak plane, front.html. A sweep whose space is `methods`.",
        of_methods=True,
    )


def _sweep(
    arguments: Sequence[str],
    prog: str = "ppreid sweep",
    does: str = "Train and attack many protected extractors, with one control and one judge between them, and write "
    "what privacy costs: front.json, front.csv and front.html. Finished trials are never done again.",
    of_methods: bool = False,
) -> int:
    parser = _parser(prog, does, True)
    for flag, what in (
        ("--resume", "go on with the sweep in the folder; every task of an array may say it"),
        ("--retry", "and try what failed again"),
        (
            "--reattack",
            "go on, and attack again every trial whose attackers or judges differ from those configured now",
        ),
        ("--front", "do nothing but write the front of what is done so far"),
    ):
        parser.add_argument(flag, action="store_true", help=what)
    parser.add_argument(
        "--backend",
        choices=("ray", "array"),
        default="ray",
        help="array: no Ray, tasks that share a folder; give those on one node a CUDA_VISIBLE_DEVICES each",
    )
    parser.add_argument("--address", metavar="HOST:PORT", help="a Ray cluster (default: a Ray of this machine)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="wait for so many nodes of it")
    parser.add_argument("--task", type=int, metavar="I", help="of an array, from 0 (default: as Slurm says)")
    parser.add_argument("--tasks", type=int, metavar="N", help="tasks of the array (default: as Slurm says)")
    _explain_settings(arguments, parser, sweep=True)
    options = parser.parse_intermixed_args(arguments)
    from ppreid_dist.settings import load_settings
    from ppreid_dist.sweep.config import SweepConfig
    from ppreid_dist.sweep.driver import sweep_in_array, sweep_on_ray, write_again

    config = load_settings(SweepConfig, options.config, options.settings)
    if of_methods and not config.methods:
        raise ConfigError("methods: name the methods to compare, or use `ppreid sweep` for a grid or a search")
    go_on = {"resume": options.resume, "retry": options.retry, "reattack": options.reattack, "say": _say}
    if options.front:
        front = write_again(config)
    elif options.backend == "array":
        front = sweep_in_array(config, *_task(options.task, options.tasks), **go_on)
    else:
        front = sweep_on_ray(config, address=options.address, nodes=options.nodes, **go_on)
    failed = sum(row["status"] == "failed" for row in front["trials"])
    _say(
        f"{config.output}: {len(front['trials'])} of {front['expected']} trials, {failed} failed; recommended: "
        f"{front['recommended'] or 'none'}" + (f"; {config.output}/front.html" if front["complete"] else "")
    )
    return FAILED if front["complete"] and failed == len(front["trials"]) and failed else 0


def _task(task: int | None, tasks: int | None) -> tuple[int, int]:
    """This task's number from 0 and the number of tasks, as given or as Slurm says; alone where neither does."""
    slurm = {key: int(os.environ.get(f"SLURM_ARRAY_TASK_{key}", default)) for key, default in
             (("ID", "0"), ("MIN", "0"), ("COUNT", "1"), ("STEP", "1"))}  # fmt: skip
    tasks = slurm["COUNT"] if tasks is None else tasks
    if task is None:  # numbers may lie anywhere, as in --array=0,1,5
        task = (slurm["ID"] - slurm["MIN"]) // slurm["STEP"] % max(1, tasks)
    return task, tasks


def _doctor(arguments: Sequence[str]) -> int:
    parser = _parser("ppreid doctor", "What this machine and installation can do.")
    parser.parse_args(arguments)
    from ppreid_dist.doctor import examine

    findings = examine()
    for finding in findings:
        _say(f"{finding.mark:4} {finding.what}: {finding.says}")
    return FAILED if any(finding.mark == "FAIL" for finding in findings) else 0


_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "shards": (_shards, "pictures to shards, or check shards"),
    "train": (_train, "train one extractor (many processes: accelerate launch train.py)"),
    "store": (_store, "put a protection that needs no training on a finished run"),
    "evaluate": (_evaluate, "mAP, CMC, mINP of runs"),
    "features": (_features, "what a run stores of new pictures"),
    "attack": (_attack, "fresh attackers on a control and a protected run"),
    "report": (_report, "the privacy report of an attack"),
    "sweep": (_sweep, "many trials over λ and more, and the front of mAP against leak"),
    "bench-privacy": (_bench_privacy, "methods against each other under the same attackers: a table and a plane"),
    "doctor": (_doctor, "what this installation can do"),
}


def _say(text: str) -> None:
    print(text.encode(errors="backslashreplace").decode(), flush=True)  # a file's name may be any bytes


def _guard(work: Callable[[], int]) -> NoReturn:
    """Run a command; a mistake of the user's or the machine's is one line on stderr and status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    # What is said, the first process says; the others would repeat it.
    logging.getLogger("ppreid_dist").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    try:
        sys.exit(work())
    except PPReIDError as error:
        if isinstance(error, ConfigError) and os.environ.get("LOCAL_RANK", "0") != "0":
            # All processes find it. The first one says it and ends, and the launcher then ends this one; were this one
            # to end first, the launcher might end the first before it has said anything.
            time.sleep(_PATIENCE)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(BAD_INPUT)
    except LostError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(FAILED)
    except Stopped as stopped:
        _log.info("%s; continue it by --resume", stopped)
        sys.exit(STOPPED)
    except BrokenPipeError:
        sys.exit(FAILED)
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


def train_main() -> NoReturn:
    """What ``train.py`` runs."""
    try:
        _guard(lambda: _train(sys.argv[1:], prog="train.py"))
    except SystemExit as ended:
        if ended.code in (0, STOPPED, FAILED, BAD_INPUT) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # All is written and said, and the group is gone or lost. The interpreter would now take torch apart, where
            # one process in some hundreds was seen to hang, for which a launcher and a cluster's job would wait
            # (docs/LOG.md).
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code)
        raise


def sweep_main() -> NoReturn:
    """What ``python -m ppreid_dist.sweep`` runs."""
    _guard(lambda: _sweep(sys.argv[1:], prog="python -m ppreid_dist.sweep"))


def main() -> NoReturn:
    """What ``ppreid`` runs."""
    widest = max(map(len, _COMMANDS))
    lines = "\n".join(f"  {name:{widest}} {what}" for name, (_, what) in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="ppreid",
        description="Person re-identification whose stored features are meant to be harder to turn back into\n"
        "pictures, and a measurement of how far that holds.",
        epilog=f"commands (each has --help):\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=list(_COMMANDS), metavar="COMMAND")
    options = parser.parse_args(sys.argv[1:2])
    _guard(lambda: _COMMANDS[options.command][0](sys.argv[2:]))
