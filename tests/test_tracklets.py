"""Entries that hold several pictures: which ones, what is stored of them, and that evaluation and attack use them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import ATTACK, ppreid
from hypothesis import given
from hypothesis import strategies as st

from ppreid_dist.data.dataset import load_split, prepare_shards
from ppreid_dist.data.synthetic import SyntheticConfig
from ppreid_dist.errors import ConfigError
from ppreid_dist.evaluation.export import stored_features
from ppreid_dist.evaluation.tracklets import Enrolment, tracklets
from ppreid_dist.experiment import Config, train
from ppreid_dist.files import read_json, read_tensors
from ppreid_dist.models.folder import load_extractor
from ppreid_dist.pixels import to_float
from ppreid_dist.settings import load_settings

PIDS, CAMIDS = np.array([1, 1, 1, 1, 1, 2, 2, 1]), np.array([1, 1, 2, 1, 1, 1, 1, 2])


def test_by_hand() -> None:
    assert tracklets(PIDS, CAMIDS, 3).tolist() == [[0, 1, 3], [2, 7, -1], [4, -1, -1], [5, 6, -1]]
    assert tracklets(PIDS, CAMIDS, 3, each=True).tolist() == [
        [0, 1, 3], [1, 3, 4], [2, 7, -1], [3, 4, 0], [4, 0, 1], [5, 6, -1], [6, 5, -1], [7, 2, -1],
    ]  # fmt: skip
    assert tracklets(PIDS, CAMIDS, 1).tolist() == [[row] for row in range(8)]
    assert tracklets(PIDS[:0], CAMIDS[:0], 3).shape == (0, 1)
    assert tracklets(PIDS - 1, CAMIDS, 3).tolist() == [[row, -1] for row in range(5)] + [[5, 6], [7, -1]]  # distractors


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), max_size=30), st.integers(1, 5))
def test_each_picture_is_of_one_entry_and_heads_one_of_the_attackers(who: list[tuple[int, int]], most: int) -> None:
    pids, camids = np.array(who, int).reshape(-1, 2).T
    parted = tracklets(pids, camids, most)
    assert sorted(parted[parted >= 0].tolist()) == list(range(len(who)))
    own = tracklets(pids, camids, most, each=True)
    assert own[:, 0].tolist() == list(range(len(who)))
    for row in [*parted.tolist(), *own.tolist()]:
        members = [member for member in row if member >= 0]
        assert len(set(members)) == len(members) <= most
        assert len({who[member] for member in members}) == 1


@pytest.fixture(scope="module")
def settings(world: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of the tiny world with four pictures of a person by each camera, two of them queries."""
    folder = tmp_path_factory.mktemp("tracklets")
    people = "{train: 16, unlabelled: 20, aux: 16, test: 8, cameras: 2, shots: 4, queries: 2, height: 32, width: 16}"
    found = [
        *world, f"data.root={folder / 'pictures'}", f"data.shards={folder / 'shards'}", f"data.synthetic={people}",
        "data.tracklet=2", "privacy.weight=0", "training.images=64", "probe.every=0",
    ]  # fmt: skip
    prepare_shards(load_settings(Config, None, found).data, progress=False)
    return found


@pytest.fixture(scope="module")
def runs(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """control, judge, and codes of the control."""
    folder = tmp_path_factory.mktemp("runs")
    judge = ["seed=1", "data.train_splits=[train,aux]"]
    for name, other in (("control", []), ("judge", judge)):
        train(load_settings(Config, None, [*settings, *other, f"output={folder / name}"]), progress=False)
    ppreid("store", str(folder / "control"), "--out", str(folder / "codes"), "model.store.kind=codes")
    return folder


def test_an_entry_is_the_mean_of_its_pictures_embeddings_and_then_stored(settings: list[str], runs: Path) -> None:
    config = load_settings(Config, None, settings)
    for name in ("control", "codes"):
        saved = load_extractor(runs / name / "model", "cpu")
        query = load_split(config.data, "query", saved.size, "cpu", progress=False)
        found = Enrolment(2).stored(saved.extractor, query)
        heads = Enrolment(2).heads(query)
        assert len(found) == len(heads.keys) == 8 * 2 and len(query.keys) == 8 * 2 * 2
        with torch.no_grad():
            unit = F.normalize(saved.extractor(to_float(query.images_N3HW)).embedding_BD, dim=1)
        for entry, key in zip(found, heads.keys, strict=True):
            head = query.keys.index(key)
            same = [
                row for row in range(len(query.keys))
                if (query.pids_N[row], query.camids_N[row]) == (query.pids_N[head], query.camids_N[head])
            ]  # fmt: skip
            assert len(same) == 2 and head == same[0]
            torch.testing.assert_close(entry, saved.extractor.store(unit[same].mean(0, keepdim=True))[0])
        assert torch.equal(
            Enrolment().stored(saved.extractor, query), stored_features(saved.extractor, query.images_N3HW)
        )
        assert Enrolment().heads(query) is query


def test_evaluation_and_attack_are_of_entries(settings: list[str], runs: Path, tmp_path: Path) -> None:
    ppreid("evaluate", str(runs / "codes"))
    stored = read_tensors(runs / "codes" / "features" / "gallery.safetensors")
    assert len(stored["features"]) == len(stored["pids"]) == 8 * 2
    roles = [word for role in ("control", "judge") for word in (f"--{role}", str(runs / role))]
    asked = [*roles, "--protected", str(runs / "codes"), "--out", str(tmp_path / "attack"), *settings, *ATTACK]
    few = ["attack.attackers=[ridge]", "attack.people=[0]", "attack.leaked=[gallery]"]
    ppreid("attack", *asked, *few)
    report = read_json(tmp_path / "attack" / "attack.json")["report"]
    assert "16 queries of 8 identities, entries of up to 2 pictures" in report["protocol"]
    assert "all 32 entries of the stolen database" in report["protocol"]
    evaluated = read_json(runs / "codes" / "evaluation.json")
    assert report["utility"]["protected"] == pytest.approx(evaluated)
    scores = read_tensors(tmp_path / "attack" / "per_query.safetensors")
    assert {len(of) for of in scores.values()} == {16}
    said = ppreid("attack", *asked, *few, "data.tracklet=1", expect=2).stderr
    assert "error: data.tracklet: 1, but entries of" in said and "hold up to 2 pictures" in said


def test_features_of_folders_are_those_of_evaluate(settings: list[str], runs: Path, tmp_path: Path) -> None:
    """A folder for each person and camera, as the gallery has them."""
    config = load_settings(Config, None, settings)
    gallery = load_split(config.data, "gallery", (32, 16), "cpu", progress=False)
    for pid, camid, key in zip(gallery.pids_N, gallery.camids_N, gallery.keys, strict=True):
        folder = tmp_path / "pictures" / f"{pid:04d}_c{camid}"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{key.partition('_')[2]}.jpg"
        (folder / name).symlink_to(Path(config.data.root) / "images" / name)
    ppreid("evaluate", str(runs / "codes"))
    ppreid(
        "features",
        str(runs / "codes"),
        str(tmp_path / "pictures"),
        "--by-folder",
        "--out",
        str(tmp_path / "f.safetensors"),
    )
    evaluated = read_tensors(runs / "codes" / "features" / "gallery.safetensors")
    order = np.lexsort((evaluated["camids"], evaluated["pids"]))
    found = read_tensors(tmp_path / "f.safetensors")["features"]
    torch.testing.assert_close(found, evaluated["features"][torch.from_numpy(order)])
    keys = (tmp_path / "f.keys.txt").read_text().splitlines()
    assert keys == sorted(map(str, (tmp_path / "pictures").iterdir())) and len(keys) == 16


def test_some_pictures_are_left_for_the_gallery() -> None:
    with pytest.raises(ConfigError, match="queries: 3 of 3 shots leave none for the gallery"):
        SyntheticConfig(shots=3, queries=3)
