"""A sweep's folder, which is all that its processes share: whoever can read it can go on with it.

OUT/
    sweep.json              what it was last asked: the sweep's settings and the whole configuration of its base
    base.yaml               that configuration, for the programs that trials start: the user's may change meanwhile
    shared/NAME/            runs that several trials want: the judge, each control, what is stored in several ways;
                            NAME.json beside it: why it failed
    trained/                trainings of attackers, kept for all trials, each made by whoever comes first
    trials/NAME/
        settings.json       the point and the seed
        run/                the training's folder, or that of a shared one stored in the trial's way; run.json beside
                            it: why it failed where another trial saw to it
        attack/             what `ppreid attack` wrote; `ppreid report` makes its page
        log.txt             all that they said
        trial.json          the trial's row; when it is there, the trial is finished
    repeats/                of a search: an empty file for each time that it proposed a point again
    claims/                 who does what, see ``claims``
    ray/                    Ray Tune's own files
    front.json  front.csv  front.html  front/*.png
    table.json  table.md    of a sweep of methods
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ppreid_dist.attacks.kept import digest, source_digest
from ppreid_dist.errors import ConfigError, DataError, RunError
from ppreid_dist.experiment import Config, flat
from ppreid_dist.files import read_json, sha256_of, write_json
from ppreid_dist.settings import defaults, load_settings, save_settings, to_dict
from ppreid_dist.sweep.claims import Claims
from ppreid_dist.sweep.config import SweepConfig
from ppreid_dist.sweep.space import Trial, as_overrides, corners, listed_trials

# What may differ when a sweep goes on: nothing of it is in the figures of a trial, whose name says its own point.
_POINTS = ("grid", "methods")
_FREE = ("output", "concurrent", "resources.", "min_utility", "axis", "trials", *_POINTS)
_ATTACKERS = ("attack.", "judges")  # may differ where trials are attacked again
_PARTS = ("shared", "trained", "trials", "repeats", "claims")


@dataclass(frozen=True)
class Folder:
    """``path`` is absolute. The configuration's paths may be relative to the working directory, where train.py is."""

    path: Path
    config: SweepConfig

    @property
    def claims(self) -> Claims:
        return Claims(self.path / "claims")

    @property
    def base(self) -> Path:
        """The file that every trial's configuration begins with."""
        return self.path / "base.yaml"

    def of(self, trial: Trial) -> Path:
        return self.path / "trials" / trial.name

    def row(self, trial: Trial) -> dict[str, Any] | None:
        """The row of a finished trial."""
        return _row(self.of(trial) / "trial.json")

    def known(self) -> list[Trial]:
        """All trials of a grid or of methods; of a search, those that were begun, in the order of their beginning."""
        if not self.config.search:
            return listed_trials(self.config)
        return self._all_begun()

    def begun(self, settings: Mapping[str, Any], seed: int) -> list[Trial]:
        """The trials of exactly these, asked for still or not."""
        return [trial for trial in self._all_begun() if (trial.settings, trial.seed) == (dict(settings), seed)]

    def _all_begun(self) -> list[Trial]:
        files = sorted((self.path / "trials").glob("*/settings.json"), key=lambda file: file.stat().st_mtime_ns)
        return [Trial(**read_json(file)) for file in files]

    def expected(self) -> int:
        """How many trials there will be; a search's are fewer by the points that it proposed again."""
        known = len(self.known())
        if not self.config.search:
            return known
        return max(known, (self.config.trials - self.repeats()) * len(self.config.seeds))

    def repeats(self) -> int:
        return len(list((self.path / "repeats").glob("*")))

    def repeat(self, proposal: str) -> None:
        """Note that this proposal of the search, by its name, was of a point that another one had made."""
        (self.path / "repeats" / proposal).touch()

    def begin(self, trial: Trial) -> Path:
        """The trial's folder, with its settings in it."""
        file = self.of(trial) / "settings.json"
        if not file.is_file():
            write_json(file, {"settings": dict(trial.settings), "seed": trial.seed, "method": trial.method})
        return file.parent

    def run_config(self, overrides: list[str]) -> Config:
        """A run's configuration: the base, with the settings of all, and these. Not to be changed."""
        return _load(self.base, self.base.stat().st_mtime_ns, tuple(overrides))

    @property
    def attackers(self) -> str:
        """A digest of who attacks now: their source, their settings, and the judges beside the sweep's own."""
        return self.attackers_of(source_digest())

    def attackers_of(self, source: str) -> str:
        """The same for a source of another time."""
        judges = [[judge, _digest_of(Path(judge))] for judge in self.config.judges]
        return digest(source, to_dict(self.run_config([]).attack), judges)[:16]

    def forget_other_attackers(self) -> int:
        """Let what others than the present :attr:`attackers` attacked be attacked again; how many trials these are."""
        now, count = self.attackers, 0
        for trial in self.known():
            row = self.row(trial)
            if row is not None and row["status"] == "done" and row.get("attackers_source") != now:
                (self.of(trial) / "trial.json").unlink(missing_ok=True)
                count += 1
        return count

    def forget_failures(self) -> None:
        """Let what failed be tried again."""
        for pattern in ("shared/*.json", "trials/*/run.json"):
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)
        for trial in self.known():
            row = self.row(trial)
            if row is not None and row["status"] == "failed":
                (self.of(trial) / "trial.json").unlink(missing_ok=True)

    def asked_for_other_points(self) -> bool:
        """Whether somebody has since gone on with the sweep with another grid or other methods."""
        now = read_json(self.path / "sweep.json")["sweep"]
        return any(now[key] != to_dict(self.config)[key] for key in _POINTS)


def _row(file: Path) -> dict[str, Any] | None:
    # The folder is listed, since NFS remembers for a while that a file of another node wasn't there yet.
    if not (file.parent.is_dir() and file.name in os.listdir(file.parent)):
        return None
    try:
        found: dict[str, Any] = read_json(file)
        return found
    except DataError:
        if file.is_file():
            raise
        return None  # another task took it away meanwhile, to attack or try again


def _digest_of(judge: Path) -> str:
    """Of a judge's weights, an .onnx file or a run."""
    file = judge / "model" / "extractor.safetensors" if judge.is_dir() else judge
    return _digest_of_file(file, file.stat().st_mtime_ns) if file.is_file() else ""


@lru_cache(maxsize=16)
def _digest_of_file(file: Path, changed: int) -> str:
    return sha256_of(file)


@lru_cache(maxsize=256)
def _load(base: Path, changed: int, settings: tuple[str, ...]) -> Config:
    return load_settings(Config, base, settings)


def open_folder(config: SweepConfig, *, resume: bool, reattack: bool = False, only_look: bool = False) -> Folder:
    """The sweep's folder, made where there is none, with the space checked. It may have been begun with other points of
    a grid or other methods, which it then has from now on (not with ``only_look``, which refuses them), and with
    ``reattack`` with other attackers and judges.

    ConfigError for a run key that doesn't exist or a value that it can't have; RunError where the folder holds a sweep
    and ``resume`` is false, or another sweep; DataError where it can't be written.
    """
    folder = Folder(Path(config.output).resolve(), config)
    if not Path("train.py").is_file():
        raise RunError(f"{Path('train.py').resolve()}: not there: start a sweep from the repository's root")
    base = load_settings(Config, config.base, config.settings)
    for settings in corners(config):
        load_settings(Config, config.base, [*config.settings, *as_overrides(settings)])
    load_settings(Config, config.base, [*config.settings, *config.judge])
    for seed in config.seeds:
        if judge_seed(config) == seed:
            raise ConfigError(f"judge: its seed {seed} is one of seeds; an independent judge needs another")
    if absent := [judge for judge in config.judges if not Path(judge).exists()]:
        raise ConfigError(f"judges: {absent[0]}: no such file or folder")
    asked = {"sweep": to_dict(config), "base": to_dict(base)}
    file = folder.path / "sweep.json"
    # Before the look for the file: another task of an array may write it in between.
    used = folder.path.is_dir() and any(not item.name.startswith(".") for item in folder.path.iterdir())
    if file.is_file():
        if not resume:
            raise RunError(f"{config.output}: holds a sweep already; continue it by --resume or choose another output")
        before = read_json(file)
        _check_same(before, asked, file, but=_ATTACKERS)
        if not reattack:
            _check_same(before, asked, file, "; --reattack attacks what is trained again")
        if only_look:
            _check_same(before, asked, file, "; --resume goes on with other points", free=_FREE[: -len(_POINTS)])
        elif asked != before:
            write_json(file, asked)
    elif used:
        raise RunError(f"{config.output}: holds something that isn't a sweep; choose another output")
    else:
        write_json(file, asked)  # first of all: another task of an array may look meanwhile
    if not only_look:
        save_settings(base, folder.base)
    try:
        for part in _PARTS:
            (folder.path / part).mkdir(parents=True, exist_ok=True)
        probe = folder.path / "claims" / f".{os.getpid()}.writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(f"{config.output}: could not be written: {error.strerror or error}") from error
    return folder


def _check_same(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    file: Path,
    hint: str = "",
    *,
    but: tuple[str, ...] = (),
    free: tuple[str, ...] = _FREE,
) -> None:
    for part, schema in (("sweep", SweepConfig), ("base", Config)):
        old, new = (dict(flat(asked[part])) for asked in (before, now))
        old = {key: value for key, value in flat(defaults(schema)) if key in new} | old  # keys that are newer than it
        if but and part == "sweep":
            for settings in (old, new):
                settings["settings"] = [setting for setting in settings["settings"] if not setting.startswith(but)]
        for key in sorted(old.keys() | new.keys()):
            if key.startswith(but):
                continue
            if old.get(key) != new.get(key) and not (part == "sweep" and key.startswith(free)):
                where = key if part == "sweep" else f"base, {key}"
                raise ConfigError(f"{where}: is {new.get(key)!r} but {file} was begun with {old.get(key)!r}{hint}")


def judge_seed(config: SweepConfig) -> int:
    """The judge's seed: as configured, or else the first that no trial has."""
    given = [setting for setting in config.judge if setting.startswith("seed=")]
    return load_settings(Config, None, given).seed if given else max(config.seeds) + 1
