"""The ReID model that attackers train on their own people: what it knows, and what decoders make of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from attack_world import small_config
from backbone_families import write_backbone
from test_suite import suite
from torch import Tensor

from ppreid_dist.attacks.adaptive import Adaptive, AdaptiveConfig, renewed
from ppreid_dist.attacks.base import ATTACKERS, Attacker, to_uint8
from ppreid_dist.attacks.config import AttackConfig
from ppreid_dist.attacks.kept import Kept
from ppreid_dist.attacks.probe import ProbeConfig
from ppreid_dist.attacks.recogniser import (
    Recogniser,
    RecogniserConfig,
    by_pixels,
    likeness_loss,
    recogniser_steps,
    train_recogniser,
    untrained,
)
from ppreid_dist.data.augment import AugmentConfig
from ppreid_dist.data.stream import Pictures
from ppreid_dist.errors import ConfigError
from ppreid_dist.evaluation.ranking import rank_queries
from ppreid_dist.files import read_tensors, write_tensors
from ppreid_dist.models.generator import Generator

DECODERS = ["regression", "averaged", "isomap", "unfolded", "gan", "adaptive"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RecogniserConfig:
    """A network of two blocks for pictures of 16×8."""
    folder = tmp_path_factory.mktemp("backbone")
    backbone = {
        "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
        "layer_type": "basic", "downsample_in_first_stage": False, "architectures": ["ResNetModel"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(backbone))
    return RecogniserConfig(backbone=str(folder), augment=AugmentConfig(pad=1, erase=0.0))


@pytest.fixture(scope="module")
def recogniser(aux: tuple[Pictures, Tensor], config: RecogniserConfig) -> Recogniser:
    return train_recogniser(aux[0].images_N3HW, aux[0].pids_N, config, seed=0)


def mean_ap(recogniser: Recogniser, people: Pictures) -> float:
    seen, pids, camids = recogniser.of_pictures(people.images_N3HW), people.pids_N, people.camids_N
    ranking = rank_queries(seen, seen, query_pids=pids, gallery_pids=pids, query_camids=camids, gallery_camids=camids)
    return float(ranking.summary()["mAP"])


def test_it_knows_people_whom_it_never_saw(
    recogniser: Recogniser, config: RecogniserConfig, strangers: tuple[Pictures, Tensor]
) -> None:
    knew_nothing = Recogniser(untrained(config, 60, 0))
    # seeds 0 and 1: 0.93, 0.89, and before the training 0.39, 0.47
    assert mean_ap(recogniser, strangers[0]) > 1.5 * mean_ap(knew_nothing, strangers[0])
    seen = recogniser.of_pictures(strangers[0].images_N3HW)
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(len(seen)))
    assert recogniser_steps(241, replace(config, epochs=3, people=8, shots=4)) == 23  # 723 pictures, 32 a step


def test_the_same_seed_gives_the_same_network(aux: tuple[Pictures, Tensor], config: RecogniserConfig) -> None:
    weights = []
    for disturb in (1, 2):
        torch.manual_seed(disturb)  # nothing may come from the global state
        before = torch.get_rng_state()
        made = train_recogniser(aux[0].images_N3HW[:40], aux[0].pids_N[:40], config, seed=3, steps=3)
        weights.append(made.network.state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_a_backbone_drops_is_the_seed_s_too(tmp_path: Path, aux: tuple[Pictures, Tensor]) -> None:
    swin, weights = write_backbone(tmp_path, "swin", drop_path_rate=0.5), []
    config = RecogniserConfig(backbone=swin, augment=AugmentConfig(pad=1, erase=0.0))
    for disturb in (1, 2):
        torch.manual_seed(disturb)
        made = train_recogniser(aux[0].images_N3HW[:40], aux[0].pids_N[:40], config, seed=3, steps=2)
        weights.append(made.network.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_likeness_is_one_minus_the_cosine_of_each_pair() -> None:
    one, two = torch.eye(3)[[0, 1, 2]], torch.tensor([[1.0, 0, 0], [0, -1, 0], [0.6, 0, 0.8]])
    assert float(likeness_loss(one, two)) == pytest.approx((0 + 2 + 0.2) / 3)


def decoder(name: str, likeness: float) -> Attacker:
    if name != Adaptive.name:
        return ATTACKERS[name](getattr(small_config(120, likeness), name))
    own = small_config(120).regression
    recipe = {key: getattr(own, key) for key in ("lrs", "batch", "ema", "plateau", "trial_steps")}
    attacker = Adaptive(AdaptiveConfig(likeness=likeness, **recipe))
    attacker.start_from(renewed(Generator(24, (16, 8), 16, 0), 0))
    return attacker


def wanderers(first: int, count: int, shots: int = 4) -> tuple[Tensor, Tensor, np.ndarray]:
    """Pictures of people of one colour anywhere before the same grey, features that are the colour, and who it is.

    Of the pictures that a feature may come from each pixel is grey in most: by pixels alone, nobody is drawn.
    """
    rng = np.random.default_rng(first)
    looks, pictures = rng.random((count, 3)), np.full((count * shots, 3, 16, 8), 0.5)
    mixing = np.random.default_rng(99).standard_normal((3, 24))
    places = zip(rng.integers(0, 11, count * shots), rng.integers(0, 5, count * shots), strict=True)
    for row, (top, left) in enumerate(places):
        pictures[row, :, top : top + 6, left : left + 4] = looks[row // shots][:, None, None]
    features = torch.from_numpy(np.repeat(looks - 0.5, shots, axis=0) @ mixing).float()
    images = torch.from_numpy((pictures * 255).round().astype(np.uint8))
    return images, features, np.repeat(np.arange(first, first + count), shots)


@pytest.fixture(scope="module")
def two_minds(config: RecogniserConfig) -> tuple[Recogniser, Recogniser]:
    """One trained on the attackers' wanderers, and one on others."""
    (own, _, pids), (others, _, other_pids) = wanderers(1000, 60), wanderers(2000, 60)
    return train_recogniser(own, pids, config, seed=0), train_recogniser(others, other_pids, config, seed=9)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "regression")) for name in DECODERS]
)
def test_by_likeness_decoders_draw_people_whom_another_network_finds(
    name: str, two_minds: tuple[Recogniser, Recogniser]
) -> None:
    (images, features, pids), (real, queries, people) = wanderers(1000, 60), wanderers(0, 40)
    own, judge = two_minds
    camids = np.tile(np.arange(4), 40)
    of = {"query_pids": people, "gallery_pids": people, "query_camids": camids, "gallery_camids": camids}

    def found(likeness: float) -> float:
        attacker = decoder(name, likeness)
        assert attacker.asks_recogniser == (likeness > 0)
        attacker.recogniser = own if likeness else None
        attacker.fit(features, images, pids, seed=0)
        drawn = judge.of_pictures(to_uint8(attacker.reconstruct(queries)))
        return float(rank_queries(drawn, judge.of_pictures(real), **of).summary()["mAP"])

    # By seeds 0, 1, 2 of the networks: regression 0.42, 0.37, 0.40 and without 0.07, 0.07, 0.08; isomap 0.36, 0.27,
    # 0.30 and 0.07; gan 0.34, 0.36, 0.33 and 0.07, 0.07, 0.08; adaptive 0.37, 0.39, 0.36 and 0.07.
    assert found(0.1) > 2.5 * found(0.0)


def test_whoever_asks_and_gets_none_is_no_attacker(aux: tuple[Pictures, Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"^regression: its likeness [^\n]*recogniser$"):
        decoder("regression", 0.1).fit(aux[1], aux[0].images_N3HW, aux[0].pids_N, seed=0)


def forget_outcomes(kept: Kept) -> list[Path]:
    """What is left: the recognisers and their inverses."""
    for file in kept.folder.glob("*.safetensors"):
        if kept.get(file.stem) is not None:
            file.unlink()
    return sorted(kept.folder.glob("*.safetensors"))


def test_one_is_trained_for_each_number_of_people_and_kept(
    tmp_path: Path, aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor], config: RecogniserConfig
) -> None:
    said: list[str] = []
    took: list[dict[str, float]] = []
    notes: list[str] = []
    asked = {"attackers": ["ridge", "regression", "isomap"], "people": [20, 0], "curve_attackers": ["regression"]}
    files = Kept(tmp_path)
    kept = {"kept": files, "found": said.append}
    few = replace(small_config(4, 0.1), recogniser=replace(config, epochs=1))
    own = {"regression": few.regression, "isomap": few.isomap}

    def trained(**changes: object) -> list[str]:
        said.clear()
        found = suite(
            *aux,
            *strangers,
            **{**asked, **own, "inverse": few.inverse, "recogniser": few.recogniser, **kept, **changes},
        )  # type: ignore[arg-type]
        took.append(found.seconds)
        notes.extend(found.notes)
        return [line.partition(":")[0] for line in said if "kept" not in line]

    first = trained()
    assert [line for line in first if "recogniser" in line] == [
        line
        for people in (20, 60)
        for line in (f"recogniser, {people} people", f"inverse of the recogniser, {people} people, width 16")
    ]
    assert trained() == []
    assert took[0] == took[1] and set(took[0]) == {*asked["attackers"], "recogniser", "inverse"}
    # The outcomes forgotten, not the recognisers: by those from the files the same comes out.
    scores = sorted(line.rpartition(", ")[0] for line in said)
    networks = forget_outcomes(files)
    assert trained() == [line for line in first if "recogniser" not in line]
    assert sorted(line.rpartition(", ")[0] for line in said) == scores
    # Files that are cut short, or of another network, are made anew, to the same.
    forget_outcomes(files)
    for number, network in enumerate(networks):
        if number % 2:
            network.write_bytes(network.read_bytes()[:1000])
        else:
            write_tensors(network, dict(list(read_tensors(network).items())[:1]))
    assert sorted(trained()) == sorted(first)
    assert sorted(line.rpartition(", ")[0] for line in said if "recogniser" not in line) == scores
    # Of those with fewer people no more is asked than to begin: the others are the same.
    assert not any("curve_steps" in note for note in notes)
    assert trained(curve_steps=0) == [line for line in first if line.startswith("regression, 20")]
    assert any(note.startswith("attack.curve_steps: with fewer than 60 people") for note in notes)
    # Another inverse, and the same recognisers; another decoder, and the same of both; other recognisers, and all other
    # decoders, but the same ridge.
    inverse = replace(few.inverse, weight_decay=0.02)
    assert sorted(trained(inverse=inverse)) == sorted(
        line for line in first if not line.startswith(("ridge", "recogniser"))
    )
    again = trained(regression=replace(few.regression, weight_decay=0.02))
    assert again and all(line.startswith("regression") for line in again)
    other = trained(recogniser=replace(few.recogniser, epochs=2))
    assert sorted(other) == sorted(line for line in first if not line.startswith("ridge"))


def test_its_backbone_s_file_is_part_of_what_a_training_is_found_by(
    tmp_path: Path, aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor], config: RecogniserConfig
) -> None:
    said: list[str] = []
    backbone = shutil.copytree(config.backbone, tmp_path / "backbone") / "config.json"
    short = small_config(4, 0.1).regression

    def trained() -> list[str]:
        said.clear()
        suite(*aux, *strangers, attackers=["ridge", "regression"], curve_attackers=[], regression=short,
              recogniser=replace(config, backbone=str(backbone.parent), epochs=1), kept=Kept(tmp_path / "kept"),
              found=said.append)  # fmt: skip
        return [line.partition(",")[0] for line in said if "kept" not in line]

    assert "ridge" in trained() and trained() == []
    backbone.write_text(backbone.read_text().replace("[16, 32]", "[8, 32]"))
    assert trained() == [
        "recogniser",
        "inverse of the recogniser",
        "regression",
        "regression",
    ]  # both victims store the same


@pytest.mark.parametrize("name", ["ridge", "regression", "isomap", "gan"])
def test_the_probe_s_attackers_ask_nobody(name: str) -> None:
    own = getattr(AttackConfig(), name)
    attacker = ATTACKERS[name](by_pixels(own))
    assert not attacker.asks_recogniser and ATTACKERS[name](own).asks_recogniser == (name != "ridge")
    assert (attacker.config == own) == (name == "ridge")


@pytest.mark.parametrize("wrong", ["adaptive", "rigde"])
def test_who_can_t_be_a_probe_s_attacker_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=rf"^attackers: '{wrong}' is not one of "):
        ProbeConfig(attackers=[wrong])


def test_an_attack_counts_it_among_what_takes_time(
    aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor], config: RecogniserConfig
) -> None:
    said: list[str] = []
    short = small_config(4, 0.1).regression
    for own in (short, replace(short, likeness=0.0)):
        suite(*aux, *strangers, attackers=["regression"], curve_attackers=[], regression=own,
              recogniser=replace(config, epochs=1), announce=said.append)  # fmt: skip
    assert ["recogniser 1 ×" in line and "inverse 1 ×" in line for line in said] == [True, False]


def test_a_backbone_that_can_t_be_had_is_one_line_before_anybody_trains(
    aux: tuple[Pictures, Tensor], strangers: tuple[Pictures, Tensor]
) -> None:
    absent = RecogniserConfig(backbone="no/such/folder")
    asks = {"attackers": ["regression"], "curve_attackers": [], "recogniser": absent}
    with pytest.raises(ConfigError, match=r"^attack\.recogniser\.backbone: no/such/folder: no such folder[^\n]*$"):
        suite(*aux, *strangers, **asks, regression=small_config(4, 0.1).regression)  # type: ignore[arg-type]
    suite(*aux, *strangers, **asks, regression=small_config(4).regression)  # type: ignore[arg-type]  # nobody asks for it
