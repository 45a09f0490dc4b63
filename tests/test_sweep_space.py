"""A sweep's space and its front: which trials there are, and what is made of their rows."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppreid_dist.errors import ConfigError, DataError
from ppreid_dist.experiment import Config
from ppreid_dist.files import read_json, write_json
from ppreid_dist.reporting.front_figures import draw_front
from ppreid_dist.settings import load_settings, save_settings
from ppreid_dist.sweep.config import SweepConfig
from ppreid_dist.sweep.driver import check_machine
from ppreid_dist.sweep.folder import Folder
from ppreid_dist.sweep.front import (
    hypervolume,
    make_points,
    of_reranking,
    of_several_controls,
    of_several_sources,
    pairs_of,
    pareto,
    recommend,
    trials_per_hour,
)
from ppreid_dist.sweep.space import Trial, as_overrides, listed_trials
from ppreid_dist.sweep.study import aims_of

# --- the space --------------------------------------------------------------------------------------------------


def config(*settings: str, **given: Any) -> SweepConfig:
    chosen = {"base": "configs/demo.yaml", "grid": {"privacy.weight": [1, 2]}} | given
    return load_settings(
        SweepConfig, None, [*(f"{key}={json.dumps(value)}" for key, value in chosen.items()), *settings]
    )


def test_every_combination_with_every_seed_is_a_trial_of_its_own_name() -> None:
    grid = {"privacy.weight": [0.5, 2], "optimiser.lr": [1e-5, 2e-3], "privacy.adversaries": [[{"kind": "ridge"}]]}
    trials = listed_trials(config(grid=grid, seeds=[3, 5]))
    expected = set(itertools.product([0.5, 2], [1e-5, 2e-3], [3, 5]))
    assert {(t.settings["privacy.weight"], t.settings["optimiser.lr"], t.seed) for t in trials} == expected
    assert len({trial.name for trial in trials}) == len(trials) == 8
    assert len({trial.point for trial in trials}) == 4
    assert listed_trials(config(grid=grid, seeds=[5])) == [trial for trial in trials if trial.seed == 5]


@settings(max_examples=5)
@given(st.floats(1e-9, 1e9), st.floats(1e-9, 1), st.sampled_from(["snapshot", "rare"]))
def test_what_a_trial_says_a_run_understands(weight: float, lr: float, mode: str) -> None:
    settings = {
        "privacy.weight": weight, "optimiser.lr": lr, "reversal.lazy.mode": mode,
        "privacy.adversaries": [{"kind": "ridge", "weight": 0.25}],
    }  # fmt: skip
    run = load_settings(Config, None, as_overrides(settings))
    assert (run.privacy.weight, run.optimiser.lr, run.reversal.lazy.mode) == (weight, lr, mode)
    assert [(adversary.kind, adversary.weight) for adversary in run.privacy.adversaries] == [("ridge", 0.25)]


def test_a_method_without_a_game_is_one_where_something_else_is_trained() -> None:
    method = {"privacy.weight": 0, "neighbourhood.weight": 2.0}
    assert config(grid={}, methods={"near": method}).methods["near"] == method
    for refused in ({"privacy.weight": 0}, {"privacy.weight": -1, "neighbourhood.weight": 2.0}):
        with pytest.raises(ConfigError, match=r"^methods.near.privacy.weight: λ"):
            config(grid={}, methods={"near": refused})


def test_keys_of_the_command_line_are_those_of_the_file() -> None:
    assert config("grid.privacy.weight=[3]").grid == {"privacy.weight": [3]}
    found = config("search.privacy.weight={low: 1, high: 2}", grid={})
    assert found.search == {"privacy.weight": {"low": 1, "high": 2}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grid": {}}, "grid: the search space is empty"),
        ({"grid": {"privacy.weight": []}}, "grid.privacy.weight: [] is not a list of values"),
        ({"grid": {"privacy.weight": [1, -1]}}, "grid.privacy.weight: λ -1 is negative"),
        ({"grid": {"privacy.weight": [0]}}, "grid.privacy.weight: λ 0 is the control"),
        ({"grid": {"privacy.weight": [1, 1]}}, "grid.privacy.weight: 1 is listed twice"),
        ({"grid": {"seed": [1]}}, "grid.seed: can't be varied"),
        ({"grid": {"attack.seed": [1]}}, "grid.attack.seed: can't be varied"),
        ({"search": {"optimiser.lr": {"low": 1, "high": 2}}}, "grid, search: give one of them"),
        ({"grid": {}, "search": {"privacy.weight": {"low": -1, "high": 2}}}, "search.privacy.weight: λ -1 is negative"),
        ({"grid": {}, "search": {"optimiser.lr": {"low": 2, "high": 1}}}, "search.optimiser.lr: empty"),
        ({"grid": {}, "search": {"optimiser.lr": {"low": 0, "high": 1, "log": True}}}, "search.optimiser.lr: low 0"),
        ({"grid": {}, "search": {"optimiser.lr": {"low": "a", "high": 1}}}, "search.optimiser.lr: a range has"),
        ({"grid": {}, "search": {"optimiser.lr": {"choices": [1], "low": 1}}}, "search.optimiser.lr: choices and low"),
        ({"settings": ["privacy.weight=3"]}, "grid.privacy.weight: contradicts settings"),
        ({"asha": True}, "asha: privacy.weight is varied"),
        ({"seeds": []}, "seeds: at least one"),
        ({"seeds": [1, 1]}, "seeds: 1 is listed twice"),
        ({"base": ""}, "base: name the configuration"),
        ({"resources": {"processes": 4, "gpus": 1}}, "resources.gpus: 4 processes take 4 GPUs or none, not 1"),
        ({"axes": "pixel"}, "axes:"),
    ],
)
def test_a_space_that_makes_no_sense_is_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(**given)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_more_than_the_machine_has_is_refused() -> None:
    asked = config(resources={"processes": 64, "gpus": 64}).resources
    with pytest.raises(ConfigError, match=r"^resources.gpus: a trial asks for 64 GPUs, this machine has \d+$"):
        check_machine(asked)
    with pytest.raises(ConfigError, match=r"^resources.cpus: a trial asks for 4096 CPUs"):
        check_machine(config(resources={"cpus": 4096}).resources)


# --- the front --------------------------------------------------------------------------------------------------

PAIRS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3),
    st.tuples(st.integers(0, 8).map(lambda i: i / 8), st.integers(-2, 12).map(lambda i: i / 8)),
    max_size=7,
)


@given(PAIRS)
def test_the_front_is_what_nothing_dominates(pairs: dict[str, tuple[float, float]]) -> None:
    def better(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] >= b[0] and a[1] <= b[1] and (a[0] > b[0] or a[1] < b[1])

    front = pareto(pairs)
    for name, pair in pairs.items():
        assert (name in front) == (not any(better(other, pair) for other in pairs.values()))
    assert [pairs[name][1] for name in front] == sorted(pairs[name][1] for name in front)


@given(PAIRS)
def test_the_hypervolume_is_that_of_inclusion_and_exclusion(pairs: dict[str, tuple[float, float]]) -> None:
    """The union of the rectangles 0…mAP × leak…1."""
    boxes = [(mAP, 1 - max(leak, 0)) for mAP, leak in pairs.values() if leak < 1]
    whole = 0.0
    for count in range(1, len(boxes) + 1):
        for chosen in itertools.combinations(boxes, count):
            widths, heights = zip(*chosen, strict=True)
            whole -= (-1) ** count * min(widths) * min(heights)
    assert hypervolume(list(pairs.values())) == pytest.approx(whole)
    assert hypervolume([pairs[name] for name in pareto(pairs)]) == pytest.approx(whole)


def row(weight: float, seed: int = 0, *, mAP: float = 0.5, leak: float | None = 0.5, **other: Any) -> dict[str, Any]:
    trial = Trial({"privacy.weight": weight}, seed)
    interval = {
        "value": leak,
        "low": None if leak is None else leak - 0.1,
        "high": None if leak is None else leak + 0.1,
    }
    ratio = {"value": 2.0, "low": 1.5, "high": None}
    urr = {**ratio, "status": "ok", "display": "2.00 [1.50, ∞)", "reason": None, "broken": False}
    attackers = {"ridge": interval, "regression": interval}
    axes = {
        axis: {"leak": {**interval, "attacker": "ridge"}, "urr": urr, "attackers": attackers, "curve": []}
        for axis in ("pixel", "identity")
    }
    return {
        "name": trial.name, "point": trial.point, "method": None, "settings": dict(trial.settings), "weight": weight,
        "seed": seed,
        "status": "done", "reason": None, "control": f"control-{seed}", "judge": "judge-0", "mAP": mAP,
        "attackers_source": "a",
        "control_mAP": 0.5, "utility": {"value": mAP / 0.5, "low": mAP / 0.5 - 0.1, "high": mAP / 0.5 + 0.1},
        "axes": axes, "people": 20, "masking": False, "seconds": {"training": 1.0, "attack": 1.0},
        "began": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T00:10:00+00:00", **other,
    }  # fmt: skip


def test_a_point_is_the_mean_of_its_seeds() -> None:
    rows = [row(1, 0, mAP=0.4, leak=0.8), row(1, 1, mAP=0.5, leak=0.6), row(2, mAP=0.3, leak=None)]
    rows.append({**row(2, 1), "status": "failed", "reason": "a reason"})
    first, second = make_points(rows)
    assert first["seeds"] == [0, 1] and second["seeds"] == [0]
    assert first["mAP"] == pytest.approx({"value": 0.45, "low": 0.4, "high": 0.5, "least": 0.4, "most": 0.5})
    assert first["axes"]["identity"]["leak"] == pytest.approx(
        {"value": 0.7, "low": 0.6, "high": 0.8, "least": 0.6, "most": 0.8}
    )
    assert first["axes"]["pixel"]["urr"]["display"] == "2.00 [1.50, ∞)"
    assert second["axes"]["identity"]["leak"] == dict.fromkeys(("value", "low", "high", "least", "most"))


def test_a_ratio_that_one_seed_lacks_is_not_averaged() -> None:
    rows = [row(1, 0), row(1, 1)]
    none = dict.fromkeys(("value", "low", "high")) | {"status": "n/a", "display": "n/a", "reason": "utility is 0.8"}
    none |= {"broken": False}
    rows[1]["axes"]["pixel"] = {**rows[1]["axes"]["pixel"], "urr": none}
    urr = make_points(rows)[0]["axes"]["pixel"]["urr"]
    assert (urr["value"], urr["status"], urr["display"]) == (None, "n/a", "2.00 [1.50, ∞), n/a")
    assert urr["reason"] == "utility is 0.8"


def test_the_least_leak_that_keeps_enough_utility_is_recommended() -> None:
    points = make_points([row(1, mAP=0.50, leak=0.9), row(2, mAP=0.48, leak=0.7), row(3, mAP=0.40, leak=0.2)])
    assert recommend(points, "identity", 0.95) == points[1]["name"]
    assert recommend(points, "identity", 0.5) == points[2]["name"]
    assert recommend(points, "identity", 1.01) is None
    points[1]["axes"]["identity"]["urr"] |= {"status": "n/a", "broken": True}
    assert recommend(points, "identity", 0.95) == points[0]["name"]
    assert list(pairs_of(points, "identity")) == [points[0]["name"], points[2]["name"]]


def test_what_a_broken_attack_measured_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    points = make_points([row(1, leak=0.9), row(2, mAP=0.6, leak=0.1)])
    points[1]["axes"]["identity"]["urr"] |= {"value": None, "status": "n/a", "broken": True}
    front = {
        "name": "a", "rule": "b", "points": points, "controls": {"control-0": 0.5}, "recommended": None,
        "front": {axis: pareto(pairs_of(points, axis)) for axis in ("pixel", "identity")},
    }  # fmt: skip
    crosses: list[float] = []
    cross = "ppreid_dist.reporting.front_figures._cross"
    monkeypatch.setattr(cross, lambda axes, x, y, *rest: crosses.append(x["value"]))
    draw_front(front)
    assert set(crosses) == {0.9, 0.1} and crosses.count(0.9) == 2 * crosses.count(0.1)
    points[0]["axes"]["identity"]["urr"] |= {"broken": True}
    assert "cost_identity" not in draw_front(front)


@pytest.mark.parametrize("value", ["0.5", True])
def test_a_weight_that_is_no_number_is_refused(value: Any) -> None:
    asked = ["base=configs/demo.yaml", f"grid={{privacy.weight: [{json.dumps(value)}]}}"]
    with pytest.raises(ConfigError, match=r"^grid\.privacy\.weight: .* is not a number$"):
        load_settings(SweepConfig, None, asked)


def folder_of(path: Path, *settings: str) -> Folder:
    config = load_settings(SweepConfig, None, settings)
    save_settings(load_settings(Config, config.base, config.settings), path / "base.yaml")
    return Folder(path, config)


def test_a_row_that_the_network_s_file_system_hides_for_a_while_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS remembers that a file wasn't there; a look into its folder asks again."""
    asked = ["base=configs/demo.yaml", "grid={privacy.weight: [1]}", "seeds=[0]"]
    folder = folder_of(tmp_path, *asked)
    (trial,) = folder.known()
    write_json(folder.of(trial) / "trial.json", {"status": "done"})
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert folder.row(trial) == {"status": "done"}


def test_masking_is_unknown_where_no_probe_ran() -> None:
    for seen, told in (([None, None], None), ([None, True], True), ([None, False], False)):
        [point] = make_points([row(1, seed, masking=masking) for seed, masking in enumerate(seen)])
        assert point["masking"] is told


def test_rows_that_another_task_takes_away_are_nobody_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the tasks of an array may be told to forget what failed, or what others attacked."""
    folder = folder_of(tmp_path, "base=configs/demo.yaml", "grid={privacy.weight: [1, 2]}", "seeds=[0]")
    files = [folder.of(trial) / "trial.json" for trial in folder.known()]
    for file in files:
        write_json(file, {"status": "failed"})

    def read_late(file: Path) -> Any:
        """The other task was sooner with the first that is read."""
        if all(other.is_file() for other in files):
            file.unlink()
        return read_json(file)

    monkeypatch.setattr("ppreid_dist.sweep.folder.read_json", read_late)
    folder.forget_failures()
    assert not any(file.is_file() for file in files)
    files[0].write_text("{")
    with pytest.raises(DataError, match=r"trial\.json"):
        folder.forget_failures()


def test_a_judge_s_content_is_part_of_who_attacks(tmp_path: Path) -> None:
    judge = tmp_path / "judge.onnx"
    asked = ["base=configs/demo.yaml", "grid={privacy.weight: [1]}", f"judges=[{judge}]"]
    folder = folder_of(tmp_path, *asked)
    judge.write_bytes(b"one")
    before = folder.attackers
    assert folder.attackers == before != folder.attackers_of("another source")
    judge.write_bytes(b"two")
    os.utime(judge, ns=(1, 1))  # files of one moment
    assert folder.attackers != before


def test_rows_of_another_version_of_the_attackers_are_told_of() -> None:
    rows = [row(1), row(2), row(3, status="failed")]
    assert of_several_sources(rows) == []
    (line,) = of_several_sources([*rows, row(4, attackers_source="b")])
    assert line.startswith("Trials were attacked by 2 versions of the attackers")


def test_points_of_different_controls_are_told_of() -> None:
    """As where the backbone varies: 0.85 of a reach of 0.6 is more than 0.90 of one of 0.5."""
    rows = [row(1), row(1, 1, control="control-1"), row(2), row(2, 1, control="control-1")]
    assert of_several_controls(rows) == []
    (line,) = of_several_controls([*rows, row(3, control="control of another backbone")])
    assert line.startswith("Points were measured against different controls")


def test_a_search_asks_nothing_of_what_a_broken_attack_measured() -> None:
    assert aims_of([row(1, seed) for seed in (0, 1)], "identity") == pytest.approx((0.5, 0.5))
    broken = row(1, 1, leak=0.02)
    broken["axes"]["identity"]["urr"] = {**broken["axes"]["identity"]["urr"], "status": "n/a", "broken": ["gate"]}
    assert aims_of([row(1), broken], "identity") is None
    assert aims_of([row(1), row(1, 1, status="failed")], "identity") is None


def test_rows_whose_utility_is_after_reranking_are_told_of() -> None:
    by_cosine, reranked = row(1, matching="cosine"), row(2, matching="re-ranked")
    assert of_reranking([by_cosine]) == []
    (line,) = of_reranking([reranked, row(3, status="failed")])
    assert line.startswith("mAP and u are after k-reciprocal re-ranking") and reranked["name"] not in line
    (line,) = of_reranking([by_cosine, reranked])
    assert "in some trials only" in line and reranked["name"] in line and by_cosine["name"] not in line


def test_pauses_do_not_count_as_time() -> None:
    later = row(2, began="2026-01-02T00:00:00+00:00", ended="2026-01-02T00:20:00+00:00")
    beside = row(3, began="2026-01-01T00:05:00+00:00", ended="2026-01-01T00:10:00+00:00")
    assert trials_per_hour([row(1), later, beside]) == pytest.approx(6.0)
    assert trials_per_hour([]) is None
