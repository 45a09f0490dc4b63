"""The commands, as a user types them: from pictures to the report, by the demo's runs."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import ATTACK, Done, demo, ppreid, started_demo

from ppreid_dist import assessment
from ppreid_dist.experiment import Config, load_run
from ppreid_dist.files import read_tensors
from ppreid_dist.reporting.page import load_report
from ppreid_dist.settings import load_settings, save_settings

pytestmark = pytest.mark.timeout(600)  # for the demo, which trains and attacks


@pytest.fixture(scope="module")
def runs(world: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """judge, control, best_response and protected, made by the demo's commands, and attacked."""
    folder = tmp_path_factory.mktemp("demo") / "runs"
    said = demo(world, folder)
    assert re.search(r"^synthetic at .*pictures$", said, re.MULTILINE)
    assert [line.split()[0] for line in said.strip().splitlines()[-5:]] == [
        "utility", "attackers", "pixel:", "probe", "look",
    ]  # fmt: skip
    return folder


@pytest.mark.slow
def test_the_demo_starts_its_commands(world: list[str], tmp_path: Path) -> None:
    assert "mAP" in started_demo(world, tmp_path / "runs")
    assert load_report(tmp_path / "runs/report.json")["training"]["protected"]["steps"] == 10
    assert started_demo(world, tmp_path / "runs").count("used again") == 5


def test_a_second_demo_uses_what_is_there(world: list[str], runs: Path) -> None:
    files = {file: file.stat().st_mtime_ns for file in runs.rglob("*.safetensors")}
    assert demo(world, runs).count("used again") == 5
    assert files == {file: file.stat().st_mtime_ns for file in runs.rglob("*.safetensors")}


def attack(runs: Path, out: Path, *settings: str, expect: int = 0, **other: str) -> Done:
    """Of the demo's runs or ``other`` ones; several judges are separated by blanks."""
    roles = {"control": "control", "protected": "protected", "judge": "judge"} | other
    flags = [word for role, of in roles.items() for run in of.split() for word in (f"--{role}", str(runs / run))]
    return ppreid("attack", *flags, "--out", str(out), *settings, expect=expect)


def test_a_repeated_attack_that_ends_half_way_leaves_no_figures_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "attack.json").write_text("{}")
    monkeypatch.setattr(assessment, "write_tensors", None)  # as if it were killed there
    shown = SimpleNamespace(reconstructions={}, shown=np.arange(1), per_query={})
    pictures = SimpleNamespace(images_N3HW=torch.zeros(1, 3, 4, 2))
    with pytest.raises(TypeError):
        assessment._write_found(tmp_path, {}, shown, pictures, {})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_from_pictures_to_the_report(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    report = load_report(tmp_path / "report.json")
    for name in ("control", "protected"):
        evaluated = json.loads((runs / name / "evaluation.json").read_text())
        assert report["utility"][name] == pytest.approx(evaluated)
    assert {row["n"] for row in report["axes"]["identity"]["curve"]} == {12, 24}
    assert set(report["axes"]["pixel"]["attackers"]) == {"ridge", "regression", "adaptive"}
    assert report["whitebox"]["people"] == 6
    assert report["attributes"]["each"]["sleeve"]["classes"] == 2
    stolen = [read_tensors(runs / f"protected/features/{split}.safetensors") for split in ("query", "gallery")]
    strangers = 32  # of the world, a picture each
    assert report["attack"]["leaked"] == sum(len(split["features"]) for split in stolen) + strangers
    assert not any("neighbourhood" in note for note in report["notes"])
    assert report["probe"]["history"] and report["training"]["protected"]["steps"] == 10
    page = (tmp_path / "report.html").read_text()
    assert report["protocol"] in page and "data:image/png" in page
    pictures = list((tmp_path / "figures").glob("panel_*.png"))
    assert len(pictures) == 3
    ppreid("report", str(tmp_path), "--pictures", "never")
    assert not list((tmp_path / "figures").glob("panel_*.png"))


def test_a_finished_run_is_stored_otherwise_and_attacked(runs: Path, tmp_path: Path) -> None:
    kept, words = tmp_path / "kept", ["model.store.kind=pca", "model.store.dim=4", "model.store.quantise=int8"]
    ppreid("store", str(runs / "control"), "--out", str(kept), *words)
    found = ppreid("evaluate", "--rerank", str(kept))
    assert "reranked_mAP" in found.stdout and "reranked_mAP" in json.loads((kept / "evaluation.json").read_text())
    features = read_tensors(kept / "features" / "query.safetensors")["features"]
    assert features.shape[1] == 4
    other = load_settings(Config, kept / "config.yaml", ["neighbourhood.weight=0.25"])
    save_settings(other, kept / "config.yaml")
    attack(runs, tmp_path / "attack", "--config", str(kept / "config.yaml"), "attack.whitebox.people=0",
           "attack.attackers=[ridge]", "attack.people=[0]", protected=str(kept))  # fmt: skip
    found = json.loads((tmp_path / "attack" / "attack.json").read_text())["report"]
    method = "unprotected, neighbourhood × 0.25, stored as pca (dim 4), int8"
    assert found["training"]["protected"]["method"] == method
    assert any("differ in the neighbourhood loss" in note for note in found["notes"])
    for arguments, message in (
        ([str(runs / "control"), "--out", str(kept), *words], "already exists"),
        ([str(kept), "--out", str(tmp_path / "b"), *words], "stored as pca, int8 already"),
        ([str(runs / "control"), "--out", str(tmp_path / "b"), "seed=4"], "seed: can't be changed after training"),
        ([str(runs / "control"), "--out", str(tmp_path / "b"), words[0], "model.store.dim=99"], "model.store.dim: 99"),
        (
            [str(runs / "control"), "--out", str(tmp_path / "b"), "model.store.axes=4"],
            "axes: model.store.kind=plain has none",
        ),
        ([str(runs / "control"), "--out", str(tmp_path / "b"), words[0], "model.store.key=1"], "kind=pca has none"),
        (
            [str(runs / "control"), "--out", str(tmp_path / "b"), "model.store.quantise=none"],
            "stores already; name what",
        ),
    ):
        assert message in ppreid("store", *arguments, expect=2).stderr
    assert not (tmp_path / "b").exists()
    for resume in ([], ["--resume"]):
        said = ppreid(
            "train", *resume, "--config", str(kept / "config.yaml"), "model.store.kind=plain", expect=2
        ).stderr
        assert f"{kept}: holds a finished run without checkpoints" in said
    # A weaker ceiling or a judge who sees less would make any protection look better.
    for role, others in (("control", {"protected": "control"}), ("judge", {})):
        said = attack(runs, tmp_path / "c", expect=2, **{role: str(kept)}, **others).stderr
        assert f"not a {role}: its features are stored as pca" in said
    knowing = tmp_path / "knowing"
    shutil.copytree(runs / "judge", knowing)
    config = load_settings(Config, knowing / "config.yaml")
    for splits, message in (
        (["train", "query"], f"{knowing}: trained on the people who are tested (data.train_splits names query)"),
        (["train"], f"{knowing}: not a judge: {config.data.shards} (data.shards) held other people in train when it"),
    ):
        config.data.train_splits = splits
        save_settings(config, knowing / "config.yaml")
        assert message in attack(runs, tmp_path / "c", expect=2, judge=str(knowing)).stderr


def test_attackers_with_other_pictures(world: list[str], runs: Path, tmp_path: Path) -> None:
    people = {"train": 12, "unlabelled": 0, "aux": 0, "test": 2, "cameras": 2, "shots": 2, "height": 32, "width": 16}
    data = {"root": str(tmp_path / "pictures"), "shards": str(tmp_path / "shards"), "stream": {"backend": "pillow"}}
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps({"data": {**data, "synthetic": {**people, "domain": 1}}}))
    few = ["attack.attackers=[ridge]", "attack.curve_attackers=[]", "attack.people=[0]", "attack.whitebox.people=0"]
    quick = [*few, ATTACK[1], ATTACK[5], "attack.linkage.draws=20"]
    variants = [*quick, "attack.auxiliary.variants=[same_people,other_domain]"]
    for settings, message in (
        ([], "attack.auxiliary.data: other_domain needs"),
        ([f"attack.auxiliary.data={other}"], "no shards there; write them by `ppreid shards"),
        ([f"attack.auxiliary.data={runs / 'control' / 'config.yaml'}"], "names the same shards as the runs' own data"),
    ):
        assert message in attack(runs, tmp_path / "out", *variants, *settings, expect=2).stderr
    ppreid("shards", "--config", str(other))
    them = f"data.synthetic={json.dumps({**people, 'domain': 1})}"
    elsewhere = [*quick, f"data.shards={tmp_path / 'shards'}", them, "attack.leaked=[unlabelled]"]
    said = attack(runs, tmp_path / "out", *elsewhere, expect=2).stderr
    assert f"attack.leaked: {tmp_path / 'shards'} has no split unlabelled, only " in said
    # Other people to train on: among them, the attackers' own might be.
    said = attack(runs, tmp_path / "out", *elsewhere, "attack.leaked=[]", expect=2).stderr
    assert f"control: trained on other pictures than train of {tmp_path / 'shards'} (data.shards)" in said
    attack(runs, tmp_path / "out", *variants, f"attack.auxiliary.data={other}")
    ppreid("report", str(tmp_path / "out"))
    found = load_report(tmp_path / "out" / "report.json")["auxiliary"]
    assert {(row["variant"], row["people"]) for row in found} == {("other_domain", 12), ("same_people", 10)}
    assert "12 people of another domain" in (tmp_path / "out" / "card.md").read_text()


def test_judges_of_several_kinds_each_have_their_axis(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    write = pytest.importorskip("onnx_models").write
    model, again = (write(tmp_path / name, ("n", 3, 24, 12)) for name in ("model.onnx", "again.onnx"))
    few = [
        "attack.attackers=[ridge]",
        "attack.people=[0]",
        "attack.whitebox.people=0",
        "attack.onnx.mean=[0.5,0.5,0.5]",
    ]
    assert "trainings, roughly" in attack(runs, tmp_path / "both", *few, judge=f"judge {model}").stdout
    assert "trainings, roughly" not in attack(runs, tmp_path / "other", *few, "--no-estimate", judge=str(model)).stdout
    both, other = (json.loads((tmp_path / n / "attack.json").read_text())["report"] for n in ("both", "other"))
    assert list(both["axes"]) == ["pixel", "identity", "identity_2"]
    assert both["judges"]["identity"]["name"].endswith(", seed 1")
    assert both["judges"]["identity_2"]["name"] == "model.onnx" and "SHA-256" in both["judges"]["identity_2"]["note"]
    assert both["judges"]["identity_2"] == other["judges"]["identity"]
    assert both["axes"]["identity_2"] == other["axes"]["identity"] != both["axes"]["identity"]
    assert "perceptual is left out" in both["notes"][0]
    ppreid("report", str(tmp_path / "both"))
    assert "Judge, identity 2" in (tmp_path / "both" / "report.html").read_text()
    said = attack(runs, tmp_path / "twins", judge=f"{model} {again}", expect=2).stderr
    assert f"{again}: the same model as {model}" in said


def test_utility_may_be_counted_after_re_ranking(runs: Path, tmp_path: Path) -> None:
    """On both sides, and as `evaluate --rerank` does; the leak stays what it is."""
    few = ["attack.attackers=[ridge]", "attack.people=[0]", "attack.whitebox.people=0"]
    found = {}
    for asked in ("false", "true"):
        attack(
            runs, tmp_path / asked, "--no-estimate", "--trained", str(tmp_path / "kept"), *few, f"attack.rerank={asked}"
        )
        found[asked] = json.loads((tmp_path / asked / "attack.json").read_text())["report"]
    shutil.copytree(runs / "control", tmp_path / "control")
    shutil.copytree(runs / "protected", tmp_path / "protected")
    ppreid("evaluate", "--rerank", str(tmp_path / "control"), str(tmp_path / "protected"))
    for role in ("control", "protected"):
        evaluated = json.loads((tmp_path / role / "evaluation.json").read_text())
        assert found["true"]["utility"][role]["mAP"] == pytest.approx(evaluated["reranked_mAP"])
        assert found["false"]["utility"][role]["mAP"] == pytest.approx(evaluated["mAP"])
    assert evaluated["mAP"] != evaluated["reranked_mAP"]
    assert [found[asked]["utility"]["matching"] for asked in ("false", "true")] == ["cosine", "re-ranked"]
    assert found["true"]["axes"]["pixel"]["leak"] == found["false"]["axes"]["pixel"]["leak"]
    ppreid("report", str(tmp_path / "true"))
    assert "after re-ranking, the unprotected one" in (tmp_path / "true" / "report.html").read_text()


def test_a_protected_run_is_stored_otherwise_and_its_generator_attacks_it(runs: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    trained, words = str(runs / "best_response"), ["model.store.kind=signs", "model.store.dim=24"]
    assert "note: model.store.key=0 is the public" in ppreid("store", trained, "--out", str(kept), *words).stdout
    own = ["--key-file", str(tmp_path / "key"), *words, "model.store.quantise=int8"]
    for content, said in (("deadbeef\n", "key: holds no whole number"), (f"{2**128 - 1}\n", "")):
        (tmp_path / "key").write_text(content)
        done = ppreid("store", trained, "--out", str(tmp_path / "own"), *own, expect=2 if said else 0)
        assert said in done.stderr and "note:" not in done.stdout
        assert not any(content.strip() in text for text in (done.stdout, done.stderr))  # a secret is not for logs
    assert f"key: {2**128 - 1}" in (tmp_path / "own" / "config.yaml").read_text()
    holds = [
        file
        for file in (tmp_path / "own").rglob("*")
        if file.is_file() and str(2**128 - 1).encode() in file.read_bytes()
    ]
    assert len(holds) == 2 and all(file.stat().st_mode & 0o077 == 0 for file in holds)
    assert (tmp_path / "own").stat().st_mode & 0o077 == 0  # from its making on
    twice = ppreid("store", trained, "--out", str(tmp_path / "c"), *own, "model.store.key=1", expect=2).stderr
    assert "--key-file: model.store.key is given too" in twice
    ppreid("evaluate", str(tmp_path / "own"))
    asked = [
        "--config", str(kept / "config.yaml"), *ATTACK, "attack.whitebox.people=0", "attack.attackers=[ridge,adaptive]",
        "attack.people=[0]", "attack.auxiliary.variants=[extractor]", "attack.unfolded.layout_steps=20",
    ]  # fmt: skip
    said = attack(runs, tmp_path / "attack", *asked, "attack.auxiliary.enrolled=[2,99]", protected=str(kept), expect=2)
    assert "attack.auxiliary.enrolled: 99, but there are 24 auxiliary people" in said.stderr
    attack(runs, tmp_path / "attack", *asked, protected=str(kept))
    ppreid("report", str(tmp_path / "attack"))
    assert "24 of their own, with the extractor, 2 enrolled" in (tmp_path / "attack" / "card.md").read_text()
    found = json.loads((tmp_path / "attack" / "attack.json").read_text())["report"]
    assert [row["variant"] for row in found["auxiliary"]] == ["extractor, 2 enrolled"]
    assert set(found["axes"]["pixel"]["attackers"]) == {"ridge", "adaptive"}
    assert not any("left out" in note for note in found["attack"]["notes"])


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_processes_are_counted_from_one(runs: Path, tmp_path: Path, count: str) -> None:
    said = attack(runs, tmp_path, f"--processes={count}", expect=2).stderr
    assert f"error: argument --processes: '{count}' is not a whole number of at least 1" in said


@pytest.mark.parametrize(
    ("other", "settings", "message"),
    [
        (
            {"control": "protected"},
            [],
            "protected: named twice: control, protected and the judges must all be different",
        ),
        ({"judge": "judge judge"}, [], "judge: named twice"),
        ({"judge": "judge twin"}, [], "twin has seed and backbone of"),
        ({"judge": "reseeded"}, [], "reseeded has the seed of"),
        ({"judge": "blind"}, [], "blind: not a judge: its privacy.weight is 2"),
        ({"judge": "rounded"}, [], "rounded: not a judge: its features are stored as int8"),
        ({"control": "rounded"}, [], "rounded: not a control: its features are stored as int8"),
        ({"control": "streamed"}, [], "data.stream.placement is 'webdataset' there and 'planned' here"),
        ({"judge": "judge protected"}, [], "protected: named twice"),
        ({"judge": "judge none.onnx"}, [], "none.onnx: can't be read"),
        ({}, ["attack.perceptual.lpips=none"], "attack.perceptual.lpips: none: no such file"),
        ({"control": "judge", "judge": "control"}, [], "not the control"),
        ({"protected": "none"}, [], "none: not a run: it has no config.yaml"),
        ({}, ["attack.people=[3]"], "attack.people: 3"),
        ({}, ["--out", "/proc/none/out"], "error: /proc/none/out/trained: can't be written to: "),
        ({}, ["attack.attackers=[psychic]"], "attack.attackers: 'psychic'"),
    ],
)
def test_runs_that_can_not_be_compared(
    runs: Path, tmp_path: Path, other: dict[str, str], settings: list[str], message: str
) -> None:
    if "twin" in other.get("judge", ""):
        shutil.copytree(runs / "judge", tmp_path / "twin")
        other = {"judge": f"judge {tmp_path / 'twin'}"}
    changed = {
        "rounded": "model.store.quantise=int8",
        "reseeded": f"seed={load_run(runs / 'protected').seed}",
        "blind": "privacy.weight=2",
        "streamed": "data.stream.placement=webdataset",
    }
    if (word := next(iter(other.values()), "")) in changed:
        (role,) = other
        shutil.copytree(runs / role, tmp_path / word)
        config = load_settings(Config, runs / role / "config.yaml", [changed[word]])
        save_settings(config, tmp_path / word / "config.yaml")
        other = {role: str(tmp_path / word)}
    done = attack(runs, tmp_path / "out", *settings, expect=2, **other)
    assert message in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_helps_an_attack_makes_its_trainings(runs: Path, tmp_path: Path) -> None:
    """What `--processes` starts, in this process: the attack itself then finds all of them."""
    config = load_settings(Config, runs / "protected" / "config.yaml", ATTACK)
    kept = tmp_path / "kept"
    kept.mkdir()
    assessment._help(config, runs / "control", runs / "protected", [runs / "judge"], kept)
    made = set(kept.glob("*.safetensors"))
    attack(runs, tmp_path / "out", "--trained", str(kept), "--no-estimate", *ATTACK)
    assert made and set(kept.glob("*.safetensors")) == made
