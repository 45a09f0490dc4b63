"""The attribute probe finds what features tell, guesses where they tell nothing, asks for what people share only."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ppreid_dist.attacks.attribute import (
    AttributeConfig,
    AttributeProbe,
    attribute_leak,
    balanced_accuracy,
    common_values,
    encode,
)
from ppreid_dist.attacks.base import permute_people, split_people
from ppreid_dist.data.stream import Pictures
from ppreid_dist.errors import ConfigError
from ppreid_dist.evaluation.bootstrap import Bootstrap

CONFIG = AttributeConfig(widths=[1.0, 0.0], ridges=[1e-3, 1e-1])
HAIR, BAG = ("black", "brown", "red"), ("none", "backpack")
DIM = 12


def make_people(first: int, count: int, shots: int = 3, *, told: float = 1.0) -> tuple[Pictures, Tensor]:
    """People with three colours of hair (one of them rare), a bag or none, and features that tell both, to a degree."""
    rng = np.random.default_rng([5, first])
    hair, bag = rng.choice(3, count, p=[0.6, 0.3, 0.1]), rng.choice(2, count)
    hair[:3], bag[:2] = [0, 1, 2], [0, 1]
    mixing = np.random.default_rng(7).standard_normal((5, DIM))
    codes = np.concatenate([np.eye(3)[hair], np.eye(2)[bag]], 1) @ mixing
    rows = np.repeat(np.arange(count), shots)
    features = told * codes[rows] + 0.5 * rng.standard_normal((count * shots, DIM))
    pictures = Pictures(
        images_N3HW=torch.zeros(len(rows), 3, 2, 2, dtype=torch.uint8),
        masks_N1HW=None,
        pids_N=first + rows,
        camids_N=np.tile(np.arange(shots), count),
        keys=[str(i) for i in range(len(rows))],
        attributes={
            "hair": [HAIR[h] for h in hair[rows]],
            "bag": [BAG[b] if i % 5 else "" for i, b in enumerate(bag[rows])],  # some are not known
            "frame": [str(i) for i in range(len(rows))],
            "place": ["here"] * len(rows),
        },
    )
    return pictures, torch.from_numpy(features).float()


def measure(told: float = 1.0, attributes: tuple[str, ...] = ("hair", "bag", "frame", "place")):
    (aux, known), (query, control) = make_people(1000, 120), make_people(0, 60)
    (_, known_told), (_, protected) = make_people(1000, 120, told=told), make_people(0, 60, told=told)
    for pictures in (aux, query):
        for name in set(pictures.attributes) - set(attributes):
            del pictures.attributes[name]
    said: list[str] = []
    found = attribute_leak(
        aux,
        query,
        {"control": (known, control), "protected": (known_told, protected)},
        CONFIG,
        Bootstrap(query.pids_N, 200, 0, 0.95),
        seed=0,
        progress=said.append,
    )
    return found, said


def test_it_finds_what_is_told_and_its_floor_is_chance() -> None:
    found, _ = measure()
    assert set(found["each"]) == {"hair", "bag"}
    assert [found["each"][name]["classes"] for name in ("hair", "bag")] == [3, 2]
    for name, chance in (("hair", 1 / 3), ("bag", 1 / 2)):
        row = found["each"][name]
        assert row["floor"] == pytest.approx(chance)
        assert row["control"] > chance + 0.25
        assert (row["status"], row["r"]["value"]) == ("ok", pytest.approx(1))
    means = [found["each"][name]["control"] for name in ("hair", "bag")]
    assert found["mean"]["control"] == pytest.approx(np.mean(means))


def test_a_probe_of_other_people_s_labels_is_at_chance() -> None:
    """What the floor stands for: on the average over several draws of who is labelled as whom."""
    (aux, known), (query, asked) = make_people(1000, 120), make_people(0, 60)
    values = common_values({"bag": aux.attributes["bag"]}, aux.pids_N, 8)
    right, wrong = encode(aux.attributes, values)["bag"], []
    for seed in range(10):
        probe = AttributeProbe(CONFIG, values)
        probe.fit(known, {"bag": right[permute_people(aux.pids_N, seed)]}, aux.pids_N, seed=seed)
        wrong.append(balanced_accuracy(probe.predict(asked)["bag"], encode(query.attributes, values)["bag"]))
    assert np.mean(wrong) == pytest.approx(0.5, abs=0.08)


def test_features_that_tell_less_leak_less() -> None:
    half, nothing = measure(told=0.3)[0]["mean"], measure(told=0.0)[0]["mean"]
    assert half["r"]["high"] < 1
    assert abs(nothing["r"]["value"]) < 0.2
    assert nothing["r"]["low"] < 0.1 < half["r"]["value"]


def test_without_labels_one_line_says_so() -> None:
    found, said = measure(attributes=("frame", "place"))
    assert found is None
    assert len(said) == 1 and "no labels" in said[0]


def test_only_what_enough_people_share_is_asked_for() -> None:
    pids = np.array([1, 1, 2, 3, 4, 4])
    columns = {"coat": ["a", "a", "a", "b", "b", "c"], "note": list("uvwxyz"), "gap": ["", "", "", "a", "a", "b"]}
    assert common_values(columns, pids, 2) == {"coat": ["a", "b"]}
    assert encode(columns, {"coat": ["a", "b"]})["coat"].tolist() == [0, 0, 0, 1, 1, -1]


def test_balanced_accuracy_by_hand() -> None:
    assert balanced_accuracy(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])) == pytest.approx((2 / 3 + 1) / 2)
    assert balanced_accuracy(np.array([0, 1]), np.array([0, -1])) == 1.0
    assert np.isnan(balanced_accuracy(np.array([0]), np.array([-1])))


def test_a_rare_value_is_named_as_readily_as_a_common_one() -> None:
    """A probe that maximised plain accuracy would hardly ever name the hair that one in ten has."""
    (aux, known), (query, asked) = make_people(1000, 120, told=0.5), make_people(0, 60, told=0.5)
    values = common_values({"hair": aux.attributes["hair"]}, aux.pids_N, 8)
    probe = AttributeProbe(CONFIG, values)
    probe.fit(known, encode(aux.attributes, values), aux.pids_N, seed=0)
    named, is_rare = probe.predict(asked)["hair"], np.array(query.attributes["hair"]) == "red"
    assert (named[is_rare] == values["hair"].index("red")).mean() > 0.4


def test_what_is_known_of_nobody_held_out_is_predicted_all_the_same() -> None:
    """As a sparse column of a list has it."""
    aux, known = make_people(1000, 40)
    values = common_values({"bag": aux.attributes["bag"]}, aux.pids_N, 8)
    labels = encode(aux.attributes, values)
    labels["bag"][split_people(aux.pids_N, 0)[1]] = -1
    probe = AttributeProbe(CONFIG, values)
    probe.fit(known, labels, aux.pids_N, seed=0)
    named = probe.predict(known)["bag"]
    assert balanced_accuracy(named, encode(aux.attributes, values)["bag"]) > 0.75


def test_too_few_people_are_named() -> None:
    aux, known = make_people(1000, 7)
    values = {"bag": list(BAG)}
    with pytest.raises(ConfigError, match=r"^attack\.people: 7 people"):
        AttributeProbe(CONFIG, values).fit(known, encode(aux.attributes, values), aux.pids_N, seed=0)
