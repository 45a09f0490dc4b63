"""A sweep that goes on with other points, methods, attackers or judges: what stays, and what the front says."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_examples import good_report
from sweeps import array, assert_whole, change, trainings

from ppreid_dist.data.dataset import open_training
from ppreid_dist.errors import ConfigError
from ppreid_dist.experiment import Config
from ppreid_dist.files import read_json, write_json, write_text
from ppreid_dist.settings import load_settings, to_dict
from ppreid_dist.sweep import driver
from ppreid_dist.sweep.config import SweepConfig
from ppreid_dist.sweep.driver import write_again
from ppreid_dist.sweep.folder import open_folder
from ppreid_dist.sweep.programs import carry_out
from ppreid_dist.sweep.space import Trial
from ppreid_dist.sweep.trial import Worker


@pytest.mark.usefixtures("undrawn")
def test_trained_runs_are_attacked_again_by_other_attackers(sweep_file: Path, tmp_path: Path) -> None:
    change(sweep_file, grid={"privacy.weight": [1, 3]}, seeds=[0], settings=["attack.people=[0]", "training.ema=0.5"])
    array(sweep_file)
    out = tmp_path / "out"
    steps = {run: (run / "steps.txt").stat().st_mtime_ns for run in trainings(out)}
    rows = {row["name"]: row["attackers_source"] for row in assert_whole(out, controls=1, trials=2)["trials"]}
    assert len(set(rows.values())) == 1

    def attacked() -> int:
        return len((out / "trained" / "attacks.txt").read_text().splitlines())

    assert attacked() == 2
    change(sweep_file, settings=["attack.people=[0]", "attack.seeds=2", "training.ema=0.5"])
    with pytest.raises(ConfigError, match=r"^settings: is .* was begun with .*; --reattack attacks what is trained"):
        array(sweep_file, resume=True)
    array(sweep_file, resume=True, reattack=True)
    front = assert_whole(out, controls=1, trials=2)
    assert all(row["attackers_source"] != rows[row["name"]] for row in front["trials"]) and attacked() == 4
    for trial in (out / "trials").iterdir():  # by the sweep's settings, not by those in the run's own file
        base, *settings = read_json(trial / "attack" / "settings.json")
        assert base == str(out / "base.yaml") and load_settings(Config, base).attack.seeds == 2
        assert f"privacy.weight={read_json(trial / 'settings.json')['settings']['privacy.weight']}" in settings
    array(sweep_file, resume=True, reattack=True)  # nothing is left to do
    assert attacked() == 4
    assert steps == {run: (run / "steps.txt").stat().st_mtime_ns for run in trainings(out)}
    change(sweep_file, settings=["attack.people=[0]", "attack.seeds=2", "training.ema=0.75"])
    with pytest.raises(ConfigError, match=r"^settings: is [^;]*$"):  # another training is another sweep
        array(sweep_file, resume=True, reattack=True)


@pytest.mark.usefixtures("undrawn")
def test_a_base_that_is_edited_meanwhile_changes_no_trial(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(sweep_file, seeds=[0])
    base = Path(load_settings(SweepConfig, sweep_file).base)
    seen: list[str] = []

    def edited(command: list[str], *rest: Any, **how: Any) -> None:
        file = Path(command[command.index("--config", command.index("train.py") if "train.py" in command else 0) + 1])
        seen.append(file.read_text())
        base.write_text("training: {ema: 0.9}\n")
        carry_out(command, *rest, **how)

    monkeypatch.setattr("ppreid_dist.sweep.trial.carry_out", edited)
    array(sweep_file)
    assert len(seen) == 6 and len(set(seen)) == 1  # four trainings, two attacks


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("kept", [1, 3])
def test_an_axis_that_not_all_trials_have_is_left_out_and_said(sweep_file: Path, tmp_path: Path, kept: int) -> None:
    """A judge came while the sweep had fewer points."""
    change(sweep_file, seeds=[0])
    array(sweep_file)
    (tmp_path / "judge.onnx").touch()
    change(sweep_file, grid={"privacy.weight": [kept]}, judges=[str(tmp_path / "judge.onnx")])
    assert list(array(sweep_file, resume=True, reattack=True)["front"]) == ["pixel", "identity", "identity_2"]
    change(sweep_file, grid={"privacy.weight": [1, 3]})
    front = array(sweep_file, resume=True)
    assert list(front["front"]) == ["pixel", "identity"]
    assert any(line.startswith("Left out, since not all trials have it: identity_2.") for line in front["remarks"])


@pytest.mark.usefixtures("undrawn")
def test_methods_are_trained_or_put_on_the_control_and_make_a_table(sweep_file: Path, tmp_path: Path) -> None:
    methods = {
        "best response": {"privacy.weight": 3, "privacy": {"every": 2}},
        "noise": {"model.store.kind": "noise", "model.store.strength": 0.7},
        "best response, int8": {"privacy.weight": 3, "privacy.every": 2, "model.store.quantise": "int8"},
        "trained, int8": {"privacy.weight": 1, "model.store.quantise": "int8"},
        "fails": {"training.ema": 0.25},
        "fails, int8": {"training.ema": 0.25, "model.store.quantise": "int8"},
    }
    change(sweep_file, grid={}, methods=methods, seeds=[0], judges=[str(tmp_path / "other.onnx")])
    (tmp_path / "other.onnx").touch()
    array(sweep_file)
    out = tmp_path / "out"
    front = json.loads((out / "front.json").read_text())
    assert list(front["front"]) == ["pixel", "identity", "identity_2"]
    assert {point["method"]: point["weight"] for point in front["points"]} == {
        "noise": 0, "trained, int8": 1, "best response": 3, "best response, int8": 3,
    }  # fmt: skip
    table = json.loads((out / "table.json").read_text())
    rows = {row["method"]: row for row in table["rows"]}
    assert list(rows) == ["unprotected", *sorted(methods)] and table["complete"]
    for name in ("fails", "fails, int8"):
        assert rows[name]["failed"] == ["the training: step 3: the gradient is not finite"]
    assert rows["best response"]["r_identity"]["value"] == pytest.approx(1 / 4)
    assert rows["trained, int8"]["mAP"]["value"] == pytest.approx(0.59)
    assert rows["unprotected"]["mAP"]["value"] == pytest.approx(0.6)
    known = good_report()["axes"]["pixel"]["attackers"]
    assert {n: r["value"] for n, r in rows["noise"]["attackers"]["pixel"].items()} == {
        name: found["r"]["value"] for name, found in known.items()
    }
    curve = [(point["n"], point["r"]["value"]) for point in good_report()["axes"]["pixel"]["curve"]]
    assert [(point["n"], point["value"]) for point in rows["noise"]["curve"]["pixel"]] == curve
    places = {json.loads((place / "settings.json").read_text())["method"]: place for place in out.glob("trials/*")}
    assert not list(out.glob("trials/*/*/steps.txt"))  # what several store, or one that isn't trained so itself
    trained = [json.loads((run / "settings.json").read_text()) for run in out.glob("shared/training-*/")]
    assert sorted(run["privacy.weight"] for run in trained if "privacy.weight" in run) == ["1", "3"]
    for name in ("best response, int8", "trained, int8"):
        stored = json.loads((places[name] / "run" / "settings.json").read_text())
        assert stored["privacy.weight"] == ("1" if name == "trained, int8" else "3")
        assert stored["model.store.quantise"] == "int8"
    stored = json.loads((places["noise"] / "run" / "settings.json").read_text())
    assert stored["privacy.weight"] == "0" and stored["model.store.strength"] == "0.7"
    lines = (out / "table.md").read_text().splitlines()
    assert f"| r pixel @{curve[0][0]} |" in lines[0]
    assert len({line.count("|") for line in lines[: 2 + len(rows)]}) == 1
    assert [line.split(" | ")[0] for line in lines[2 : 2 + len(rows)]] == [f"| {name}" for name in rows]


@pytest.mark.usefixtures("undrawn")
def test_a_table_gets_another_row_and_loses_one(sweep_file: Path, tmp_path: Path) -> None:
    out, noise = tmp_path / "out", {"model.store.kind": "noise", "model.store.strength": 0.7}
    change(sweep_file, grid={}, methods={"strong": {"privacy.weight": 3}, "noise": noise}, seeds=[0])
    array(sweep_file)
    noisy = next(out.glob("trials/noise-*/trial.json"))
    before = {file: file.stat().st_mtime_ns for file in (noisy, *(run / "steps.txt" for run in trainings(out)))}
    change(sweep_file, methods={"noise": noise, "weak": {"privacy.weight": 1}})
    array(sweep_file, resume=True)
    rows = read_json(out / "table.json")["rows"]
    assert [row["method"] for row in rows] == ["unprotected", "noise", "weak"]
    assert len(trainings(out)) == 4 and before == {file: file.stat().st_mtime_ns for file in before}
    assert list(read_json(out / "sweep.json")["sweep"]["methods"]) == ["noise", "weak"]


@pytest.mark.usefixtures("undrawn")
def test_what_is_trained_stays_where_it_is_when_the_rows_change(sweep_file: Path, tmp_path: Path) -> None:
    """A row that is stored otherwise takes the training of one that isn't; without it that one keeps what there was."""
    out, strong = tmp_path / "out", {"privacy.weight": 3}
    rounded = strong | {"model.store.quantise": "int8"}
    change(sweep_file, grid={}, methods={"strong": strong}, seeds=[0], settings=["attack.people=[0]"])
    array(sweep_file)
    before = trainings(out)
    change(sweep_file, methods={"strong": strong, "rounded": rounded})
    array(sweep_file, resume=True)
    assert trainings(out) == before and len(read_json(out / "table.json")["rows"]) == 3
    stored = next(out.glob("trials/rounded-*/run/settings.json"))
    assert read_json(stored)["privacy.weight"] == "3"
    change(sweep_file, methods={"rounded": rounded}, settings=["attack.people=[0]", "attack.seeds=2"])
    said: list[str] = []
    array(sweep_file, resume=True, reattack=True, say=said.append)
    assert "out: 1 trials are attacked again" in said and trainings(out) == before
    assert next(out.glob("trials/strong-*/trial.json"))  # no longer asked for, and not lost
    # The other way round: begun with both, so the training is both's.
    change(sweep_file, methods={"strong": strong, "rounded": rounded}, output=str(tmp_path / "both"))
    array(sweep_file)
    before = trainings(tmp_path / "both")
    change(sweep_file, methods={"strong": strong}, settings=["attack.people=[0]", "attack.seeds=3"])
    array(sweep_file, resume=True, reattack=True)
    assert trainings(tmp_path / "both") == before


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("finished", [True, False])
def test_what_is_trained_stays_when_the_library_gets_another_setting(
    sweep_file: Path, tmp_path: Path, finished: bool
) -> None:
    """An older version named a control and a judge by fewer settings, and finished them or left them half trained."""
    change(sweep_file, grid={"privacy.weight": [1]}, seeds=[0])
    array(sweep_file)
    worker = Worker(open_folder(load_settings(SweepConfig, sweep_file), resume=True))
    trial = Trial({"privacy.weight": 3}, 0)
    for training in (worker._control(trial), worker._judge()):
        config = worker.folder.run_config(training.overrides)
        pictures, settings = open_training(config.data).fingerprint, to_dict(config)
        del settings["data"]["remote"]
        old = training.run.rename(training.run.with_name(f"{training.name[:-10]}0123456789"))
        write_text(old / "config.yaml", yaml.safe_dump(settings))
        write_json(old / "model" / "extractor.json", {"about": {"training pictures": pictures}})
        if not finished:
            shutil.rmtree(old / "model")
            (old / "steps.txt").write_text("0\n1\n")
            state = {"must match": {"the training pictures": pictures}}
            write_json(old / "checkpoints" / "step_1" / "state.json", state)
            write_text(old / "checkpoints" / "latest", "step_1\n")
    before = trainings(tmp_path / "out")
    assert worker._control(trial).run in before and worker._control(trial).name == "control-0123456789"
    change(sweep_file, grid={"privacy.weight": [1, 3]})
    rows = array(sweep_file, resume=True)["trials"]
    assert [(row["control"], row["judge"]) for row in rows[1:]] == [("control-0123456789", "judge-0123456789")]
    assert len(assert_whole(tmp_path / "out", controls=1, trials=2)["controls"]) == 2


@pytest.mark.parametrize("other", ["a setting", "a setting that is gone", "pictures"])
def test_what_is_trained_otherwise_is_another_control(sweep_file: Path, other: str) -> None:
    worker = Worker(open_folder(load_settings(SweepConfig, sweep_file), resume=False))
    trial = Trial({"privacy.weight": 3}, 0)
    wanted = worker._control(trial)
    config = worker.folder.run_config(wanted.overrides)
    old = wanted.run.with_name("control-0123456789")

    def keep(settings: dict[str, Any], pictures: str) -> None:
        write_text(old / "config.yaml", yaml.safe_dump(settings))
        write_json(old / "model" / "extractor.json", {"about": {"training pictures": pictures}})

    pictures = open_training(config.data).fingerprint
    keep(to_dict(config), pictures)
    assert worker._control(trial).run == old
    changed = {"a setting": {"optimiser": {"lr": 0.5}}, "a setting that is gone": {"colour": "red"}}
    keep(to_dict(config) | changed.get(other, {}), "others" if other == "pictures" else pictures)
    assert worker._control(trial).run == wanted.run


@pytest.mark.parametrize("space", ["grid", "search"])
def test_what_is_stored_otherwise_is_never_trained_so(sweep_file: Path, tmp_path: Path, space: str) -> None:
    """A training takes plain features only, whatever the sweep's space."""
    settings = {"privacy.weight": 1, "model.store.quantise": "int8"}
    spaces: dict[str, Any] = {
        "grid": {key: [value] for key, value in settings.items()},
        "search": {"privacy.weight": {"low": 1, "high": 2}, "model.store.quantise": {"choices": ["int8"]}},
    }
    change(sweep_file, **{"grid": {}, space: spaces[space]})
    worker = Worker(open_folder(load_settings(SweepConfig, sweep_file), resume=False))
    worker.see_to_shards()
    source = worker._source(Trial(settings, 0), {"privacy.weight": 1})
    assert source.run.parent.name == "shared" and not any("store" in word for word in source.overrides)
    assert worker._source(Trial({"privacy.weight": 1}, 0), {"privacy.weight": 1}).run.parent.parent.name == "trials"


@pytest.mark.usefixtures("undrawn")
def test_the_front_is_of_what_was_asked_last(sweep_file: Path, tmp_path: Path) -> None:
    """A task that was started before with fewer points leaves it alone, and to look at it changes nothing."""
    change(sweep_file, grid={"privacy.weight": [1, 3]}, seeds=[0])
    array(sweep_file)
    asked = read_json(tmp_path / "out" / "sweep.json")
    fewer = load_settings(SweepConfig, sweep_file, ["grid.privacy.weight=[1]"])
    with pytest.raises(ConfigError, match=r"^grid\.privacy\.weight: is \[1\] but .* with \[1, 3\]; --resume goes on"):
        write_again(fewer)
    said: list[str] = []
    took = driver._open

    def before_the_others(*arguments: Any, **how: Any) -> Any:
        worker = took(*arguments, **how)
        write_json(tmp_path / "out" / "sweep.json", asked)
        return worker

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_open", before_the_others)
        array(sweep_file, "grid.privacy.weight=[1]", resume=True, say=said.append)
    assert f"{tmp_path / 'out'}: was asked for other points meanwhile; whoever does these writes the front" in said
    assert len(read_json(tmp_path / "out" / "front.json")["trials"]) == 2
    assert len(write_again(load_settings(SweepConfig, sweep_file))["trials"]) == 2
