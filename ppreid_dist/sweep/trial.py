"""One trial, from its settings to its row: train, see to the control and the judge, attack.

The trial trains first, and only then needs the control and the judge. Of several trials that come to that point, one
trains the control, the next one the judge, and the others wait. So it is with a training that several trials store in
ways of their own. What is trained stays where it is when the sweep goes on with more or fewer trials.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ppreid_dist.attack_setup import METHOD
from ppreid_dist.data.dataset import open_training, prepare_shards
from ppreid_dist.errors import PPReIDError, Stopped
from ppreid_dist.experiment import compared, load_run
from ppreid_dist.files import read_json, write_json
from ppreid_dist.settings import path_override
from ppreid_dist.storing import STORED
from ppreid_dist.sweep.claims import Claim
from ppreid_dist.sweep.config import WEIGHT
from ppreid_dist.sweep.folder import Folder, judge_seed
from ppreid_dist.sweep.guard import guarded
from ppreid_dist.sweep.programs import Programs, TrialFailed, carry_out
from ppreid_dist.sweep.space import Trial, as_overrides
from ppreid_dist.training.checkpoint import CheckpointFolder

Look = Callable[[Path], None]  # is shown a training's folder while it trains


@dataclass(frozen=True)
class Training:
    """A run of train.py: its folder, its settings beside those of all, and where what it says is kept."""

    role: str
    name: str
    run: Path
    overrides: list[str]
    log: Path

    @property
    def finished(self) -> Path:
        """The last file that a training writes."""
        return self.run / "model" / "extractor.json"

    @property
    def begun(self) -> bool:
        return self.run.is_dir()


@dataclass(frozen=True)
class Worker:
    """Does trials of a sweep, one at a time."""

    folder: Folder
    programs: Programs = field(default_factory=Programs)
    wait: float = 2.0  # seconds between looks at what others do
    stopped: Callable[[], bool] = lambda: False  # whether it was asked to stop: a signal's exception may be lost

    def check_wish(self) -> None:
        """Stopped if it was asked to."""
        if self.stopped():
            raise Stopped("asked to stop")

    def do(self, trial: Trial, claim: Claim, look: Look = lambda run: None) -> dict[str, Any]:
        """The trial's row, also written; a trial that fails has a row with its reason. Stopped passes through."""
        began = time.time()
        with guarded(claim) as environment:
            self.folder.begin(trial)
            try:
                found = self._measure(trial, claim, environment, look)
            except (TrialFailed, PPReIDError) as failure:
                found = {"status": "failed", "reason": str(failure)}
            if claim.outdone():
                raise Stopped(f"{trial.name}: another process took it over")
            return self.note(trial, found, began)

    def note(self, trial: Trial, found: dict[str, Any], began: float) -> dict[str, Any]:
        """Write the trial's row: it is finished."""
        trained, stored = _parts(trial)
        weight = trained.get(WEIGHT, self.folder.run_config([]).privacy.weight) if trained or not stored else 0
        row = {
            "name": trial.name,
            "point": trial.point,
            "method": trial.method or None,
            "settings": dict(trial.settings),
            "weight": weight,
            "seed": trial.seed,
            **found,
            "began": _stamp(began),
            "ended": _stamp(time.time()),
        }
        write_json(self.folder.of(trial) / "trial.json", row)
        return row

    def _measure(self, trial: Trial, claim: Claim, environment: dict[str, str], look: Look) -> dict[str, Any]:
        place = self.folder.of(trial)
        control, judge = self._control(trial), self._judge()
        protected = self._own(trial)
        trained, stored = _parts(trial)
        source = control if stored and not trained else self._source(trial, trained)
        if source == protected:
            self._train(source, claim, environment, look)
        elif source is not control:
            self._see_to([source], look)
        self._see_to([control, judge])
        if not stored:
            protected = source
        elif not protected.finished.is_file():
            command = self.programs.store([str(source.run), "--out", str(protected.run), *as_overrides(stored)])
            self._start(command, protected.finished, "store", claim, environment, protected.log)
        self._attack(trial, protected, control, judge, claim, environment)
        found = read_json(place / "attack" / "attack.json")
        attackers = self.folder.attackers_of(found["source"])
        return {**_row(found["report"], control.name, judge.name), "attackers_source": attackers}

    def _attack(
        self,
        trial: Trial,
        protected: Training,
        control: Training,
        judge: Training,
        claim: Claim,
        environment: dict[str, str],
    ) -> None:
        place, trained = self.folder.of(trial), self.folder.path / "trained"
        out = place / "attack"
        (out / "attack.json").unlink(missing_ok=True)  # of a trial that got no row: others may have attacked it
        judges = [word for other in (judge.run, *self.folder.config.judges) for word in ("--judge", other)]
        runs = ("--control", control.run, "--protected", protected.run, *judges)
        several = ["--processes", self.folder.config.resources.processes]
        # The sweep's attackers: those in the run's own configuration may be older.
        asked = ["--config", self.folder.base, *trial.overrides]
        command = self.programs.attack(
            [str(word) for word in (*runs, "--out", out, "--trained", trained, *several, "--no-estimate", *asked)]
        )
        self._start(command, out / "attack.json", "attack", claim, environment, place / "log.txt")

    # --- what trials share --------------------------------------------------------------------------------------

    def see_to_shards(self, say: Callable[[str], None] = lambda text: None) -> None:
        """The pictures' shards, written by whoever comes first. DataError where those that are there are others."""
        data = self.folder.run_config([]).data
        meta = Path(data.shards) / "meta.json"
        if not meta.is_file():
            say(f"{self.folder.path.name}: first the shards have to be written, {data.shards}")
        while not meta.is_file():
            if (claim := self.folder.claims.take("shards")) is None:
                time.sleep(self.wait)
                continue
            with guarded(claim):
                prepare_shards(data, progress=False)
        open_training(data)

    def _control(self, trial: Trial) -> Training:
        """The same training without protection: what it varies of the method takes no part in it."""
        rest = {key: value for key, value in trial.settings.items() if not key.startswith(METHOD)}
        return self._shared("control", [*as_overrides(rest), f"seed={trial.seed}", f"{WEIGHT}=0"])

    def _judge(self) -> Training:
        return self._shared(
            "judge", [f"seed={judge_seed(self.folder.config)}", f"{WEIGHT}=0", *self.folder.config.judge]
        )

    def _own(self, trial: Trial) -> Training:
        place = self.folder.of(trial)
        return Training("training", trial.name, place / "run", trial.overrides, place / "log.txt")

    def _source(self, trial: Trial, trained: dict[str, Any]) -> Training:
        """Where the trial's training is, or is to be: with others', if another stores it in a way of its own."""
        shared = self._shared("training", [*as_overrides(trained), f"seed={trial.seed}"], but=())
        if shared.begun:
            return shared
        if begun := [own for other in self.folder.begun(trained, trial.seed) if (own := self._own(other)).begun]:
            return begun[0]
        if trained != trial.settings:
            return shared
        wanted = [] if self.folder.config.search else [(_parts(other)[0], other.seed) for other in self.folder.known()]
        return shared if wanted.count((trained, trial.seed)) > 1 else self._own(trial)

    def _shared(self, role: str, overrides: list[str], but: tuple[str, ...] = METHOD) -> Training:
        """Found by all that it is made of, ``but`` these keys: data, backbone, schedule, seed. An older version of this
        library, which had fewer settings, named the same training otherwise."""
        config = self.folder.run_config(overrides)
        made_of, pictures = compared(config, but), open_training(config.data).fingerprint
        whole = json.dumps([*made_of.items(), ("pictures", pictures)], sort_keys=True)
        name = f"{role}-{hashlib.sha256(whole.encode()).hexdigest()[:10]}"
        shared = self.folder.path / "shared"
        if not (shared / name).is_dir():
            begun = [file.parent for file in sorted(shared.glob(f"{role}-*/config.yaml"))]
            name = next((run.name for run in begun if _is_made_of(run, made_of, pictures, but)), name)
        return Training(f"the {role}", name, shared / name, overrides, shared / f"{name}.log")

    def _see_to(self, trainings: list[Training], look: Look = lambda run: None) -> None:
        """Return when all of them are done, by whomever. TrialFailed if one can't be."""
        while wanted := [training for training in trainings if not training.finished.is_file()]:
            self.check_wish()
            for training in wanted:
                failed = training.run.with_suffix(".json")
                if failed.is_file():
                    raise TrialFailed(read_json(failed)["reason"])
                if (claim := self.folder.claims.take(training.name)) is None:
                    continue
                with guarded(claim) as environment:
                    try:
                        self._train(training, claim, environment, look)
                    except TrialFailed as failure:
                        write_json(failed, {"reason": str(failure)})
                        raise
                break
            else:
                time.sleep(self.wait)

    # --- programs -----------------------------------------------------------------------------------------------

    def _train(
        self, training: Training, claim: Claim, environment: dict[str, str], look: Look = lambda run: None
    ) -> None:
        """Train to the end, from wherever it is."""
        if training.finished.is_file():
            return
        run = training.run
        (run / "stop").unlink(missing_ok=True)  # of a wish that came when nothing ran any more
        output = path_override("output", run)
        arguments = ["--config", str(self.folder.base), "--resume", *training.overrides, output]
        command = self.programs.train(self.folder.config.resources.processes, arguments)
        grouped = {**environment, "WANDB_RUN_GROUP": self.folder.path.name, "WANDB_NAME": training.name}
        self._start(command, training.finished, training.role, claim, grouped, training.log, lambda: look(run))

    def _start(
        self,
        command: list[str],
        done: Path,
        what: str,
        claim: Claim,
        environment: dict[str, str],
        log: Path,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        resources = self.folder.config.resources
        threads = max(1, resources.cpus // resources.processes)
        limited = {**environment, "OMP_NUM_THREADS": str(threads)}
        if not resources.gpus:  # Ray would leave it all of them
            limited["CUDA_VISIBLE_DEVICES"] = ""

        def looked() -> None:
            self.check_wish()
            look()

        carry_out(command, done, what=what, claim=claim, environment=limited, log=log, look=looked)


def _parts(trial: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the trial trains with, and what is put on the finished run."""
    stored = {key: value for key, value in trial.settings.items() if key.startswith(STORED)}
    return {key: value for key, value in trial.settings.items() if key not in stored}, stored


def _is_made_of(run: Path, made_of: dict[str, Any], pictures: str, but: tuple[str, ...]) -> bool:
    """Whether a run has just these settings, those that it doesn't know yet by their defaults, and saw no other
    pictures."""
    try:
        return compared(load_run(run), but) == made_of and _pictures(run) in (None, pictures)
    except PPReIDError:  # it has settings that are gone by now, or its checkpoint has just made way for the next
        return False


def _pictures(run: Path) -> str | None:
    """The fingerprint of the pictures that a run is trained on; None before its first checkpoint."""
    if (finished := run / "model" / "extractor.json").is_file():
        return str(read_json(finished).get("about", {}).get("training pictures"))
    if (newest := CheckpointFolder(run, keep=1).latest()) is None:
        return None
    return str(read_json(newest / "state.json")["must match"].get("the training pictures"))


def _row(report: dict[str, Any], control: str, judge: str) -> dict[str, Any]:
    """Of a report's figures those that make a point of the front."""
    utility, probe = report["utility"], report["probe"]
    return {
        "status": "done",
        "reason": None,
        "control": control,
        "judge": judge,
        "mAP": utility["protected"]["mAP"],
        "control_mAP": utility["control"]["mAP"],
        "utility": utility["ratio"],
        "matching": utility["matching"],
        "axes": {
            name: {
                "leak": axis["leak"],
                "urr": axis["urr"],
                "attackers": {attacker: found["r"] for attacker, found in axis["attackers"].items()},
                "curve": [{"n": point["n"], "r": point["r"]} for point in axis["curve"]],
            }
            for name, axis in report["axes"].items()
        },
        "people": report["attack"]["people"],
        "masking": None if probe is None else probe["warned"],
        "seconds": {"training": report["training"]["protected"]["seconds"], "attack": report["attack"]["seconds"]},
    }


def _stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
