"""The adaptive attacker goes on from the training's generator, counts without a counterpart on the control, and is left
out where there was no generator."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from attack_world import SIZE, colour_judge, judged_ap, make_people, person_l1
from torch import Tensor

from ppreid_dist.attacks.adaptive import Adaptive, AdaptiveConfig, for_stored, hand_on, renewed, trained_generator
from ppreid_dist.attacks.base import permute_people
from ppreid_dist.attacks.bench import Bench, Victim
from ppreid_dist.attacks.config import AttackConfig
from ppreid_dist.attacks.judging import chance_ap
from ppreid_dist.attacks.plateau import PlateauConfig
from ppreid_dist.attacks.ridge import RidgeConfig
from ppreid_dist.attacks.suite import SuiteResult, run_suite
from ppreid_dist.data.stream import Pictures
from ppreid_dist.errors import ConfigError, RunError
from ppreid_dist.models.generator import Generator, GeneratorConfig
from ppreid_dist.models.seeding import seeded
from ppreid_dist.models.store import make_store
from ppreid_dist.models.stores.base import StoreConfig
from ppreid_dist.training.checkpoint import CheckpointFolder, load_tree
from ppreid_dist.training.reversal import ReversalConfig

REVERSAL = ReversalConfig(size=SIZE, generator=GeneratorConfig(width=16, noise_dim=4))
World = tuple[Pictures, Tensor]


def config(steps: int) -> AdaptiveConfig:
    plateau = PlateauConfig(max_steps=steps, evaluate_every=20, patience=2, falls=1)
    return AdaptiveConfig(likeness=0.0, lrs=[1e-2], batch=16, ema=0.9, plateau=plateau)


def fitted(generator: Generator, known: World, steps: int, *, permuted: bool = False) -> Adaptive:
    people, features = known
    attacker = Adaptive(config(steps))
    attacker.start_from(generator)
    rows = permute_people(people.pids_N, 0) if permuted else np.arange(len(people.pids_N))
    attacker.fit(features, people.images_N3HW[rows], people.pids_N, seed=0)
    return attacker


@pytest.fixture(scope="module")
def aux() -> World:
    return make_people(1000, 60)


@pytest.fixture(scope="module")
def met() -> World:
    return make_people(0, 60, shots=2)


@pytest.fixture(scope="module")
def generator() -> Generator:
    """As a training leaves it that never saw the attackers' people."""
    with seeded(0):
        start = Generator(24, SIZE, 16, 4)
    trained = fitted(start, make_people(5000, 60), 100).decoder.average.module
    assert isinstance(trained, Generator)
    return trained.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload, no-any-return]


def test_a_head_start_finds_people_at_once_and_its_floor_nobody(generator: Generator, aux: World, met: World) -> None:
    (people, queries), few = met, 1
    drawn = fitted(generator, aux, few).reconstruct(queries)
    late = fitted(renewed(generator, 0), aux, few).reconstruct(queries)
    prior = fitted(renewed(generator, 0), aux, 60, permuted=True).reconstruct(queries)
    chance = float(chance_ap(np.array([1]), np.array([len(people.pids_N) - 1]))[0])
    assert judged_ap(prior, people) < 2 * chance
    assert judged_ap(drawn, people) > 4 * chance
    assert person_l1(drawn, people) < 0.7 * person_l1(prior, people)
    assert person_l1(drawn, people) < 0.8 * person_l1(late, people)


def test_it_never_ends_worse_on_its_own_people_than_it_began(generator: Generator, aux: World) -> None:
    ruined = Adaptive(replace(config(20), lrs=[10.0]))
    ruined.start_from(generator)
    people, features = aux
    ruined.fit(features, people.images_N3HW, people.pids_N, seed=0)
    untouched = generator(features[:8]).detach()
    torch.testing.assert_close(ruined.reconstruct(features[:8]), untouched)


def write_run(folder: Path, modules: dict[str, dict[str, Tensor]]) -> Path:
    CheckpointFolder(folder, keep=1).save(7, {"modules": modules})
    return folder


def test_the_generator_comes_from_the_newest_checkpoint(tmp_path: Path, generator: Generator) -> None:
    weights = {"extractor": {"w": torch.ones(1)}, "gan.generator": generator.state_dict()}
    found = trained_generator(write_run(tmp_path / "gan", weights), REVERSAL)
    assert found is not None
    features = torch.nn.functional.normalize(torch.randn(3, 24), dim=1)
    assert torch.equal(found(features), generator(features))
    quiet = Generator(24, SIZE, 16, 0)
    found = trained_generator(write_run(tmp_path / "plain", {"regression.generator": quiet.state_dict()}), REVERSAL)
    assert found is not None and found.noise_dim == 0
    assert trained_generator(write_run(tmp_path / "ridge", {"extractor": {"w": torch.ones(1)}}), REVERSAL) is None
    assert trained_generator(tmp_path / "unfinished", REVERSAL) is None
    wider = replace(REVERSAL, generator=GeneratorConfig(width=32, noise_dim=4))
    with pytest.raises(RunError, match=r"gan.*: holds another model"):
        trained_generator(tmp_path / "gan", wider)


def test_a_stored_run_is_handed_the_generator_and_nothing_else(tmp_path: Path, generator: Generator) -> None:
    weights = {"extractor": {"w": torch.ones(1)}, "gan.generator": generator.state_dict()}
    hand_on(write_run(tmp_path / "run", weights), tmp_path / "stored")
    found = trained_generator(tmp_path / "stored", REVERSAL)
    assert found is not None
    features = torch.nn.functional.normalize(torch.randn(3, 24), dim=1)
    assert torch.equal(found(features), generator(features))
    newest = CheckpointFolder(tmp_path / "stored", keep=1).latest()
    assert newest is not None and load_tree(newest)["modules"].keys() == {"gan.generator"}
    hand_on(write_run(tmp_path / "ridge", {"extractor": {"w": torch.ones(1)}}), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["pca", "rotation", "signs", "codes", "cells"])
def test_the_generator_reads_what_is_stored_otherwise(kind: str, generator: Generator, aux: World, met: World) -> None:
    """Linear kinds, which here lose nothing, to the picture; signs and codes well enough to find people."""
    store = make_store(
        StoreConfig(
            kind=kind,
            dim=256 if kind in ("signs", "codes", "cells") else 12,
            width=2.0 if kind == "cells" else 1.0,
            key=4,
        ),
        24,
    )
    store.fit(aux[1])
    reading = for_stored(generator, store(aux[1]), aux[1], aux[0].pids_N, seed=0)
    (people, plain), stored = met, store(met[1])
    drawn, before = (of(features).detach() for of, features in ((reading, stored), (generator, plain)))
    if kind in ("pca", "rotation"):
        torch.testing.assert_close(drawn, before, rtol=0, atol=0.02)
    assert judged_ap(drawn, people) > 0.5 * judged_ap(before, people)
    if stored.shape == plain.shape:
        assert judged_ap(generator(stored).detach(), people) < 0.3 * judged_ap(before, people)


def suite(aux: World, met: World, reversal: Generator | None) -> SuiteResult:
    """The protected features tell nothing but to the generator that the training made."""
    people, features = met
    first = people.camids_N == 0
    query = replace(people.only(first), masks_N1HW=None)
    control = Victim(
        name="control",
        aux_ND=aux[1],
        query_QD=features[first],
        utility_ap_Q=np.full(len(query.pids_N), 0.8),
        see=lambda images_B3hw: images_B3hw,
    )
    bench = Bench(
        aux=aux[0],
        query=query,
        gallery_pids=people.pids_N[~first],
        gallery_camids=people.camids_N[~first],
        judges=[colour_judge(people, ~first)],
        config=AttackConfig(
            attackers=["ridge", "adaptive"],
            curve_attackers=["ridge"],
            people=[0],
            resamples=100,
            ridge=RidgeConfig(widths=[2.0, 0.0], ridges=[1e-2, 1.0]),
            adaptive=config(20),
        ),
        progress=lambda line: None,
    )
    return run_suite(bench, control=control, protected=replace(control, name="protected", reversal=reversal))


def test_it_counts_by_what_it_finds_though_the_control_has_none(generator: Generator, aux: World, met: World) -> None:
    result = suite(aux, met, generator)
    row = result.axes["identity"]["attackers"]["adaptive"]
    assert (row["status"], row["control"], row["r"]["value"]) == ("protected only", None, None)
    assert row["reason"].startswith("there is no such attacker on the control")
    ridge, leak = result.axes["identity"]["attackers"]["ridge"], result.axes["identity"]["leak"]
    most = max(of["protected"] - of["floor"] for of in (row, ridge))
    assert leak["value"] == pytest.approx(most / (ridge["control"] - ridge["floor"]))
    assert leak["against"] == "ridge"
    assert set(result.strongest.values()) == {"ridge"}
    assert ("protected", "adaptive") in result.reconstructions
    assert all("plateau" in note for note in result.notes)


def test_without_a_generator_one_line_says_that_it_is_left_out(aux: World, met: World) -> None:
    result = suite(aux, met, None)
    assert set(result.axes["pixel"]["attackers"]) == {"ridge"}
    assert len(result.notes) == 1 and result.notes[0].startswith("adaptive: left out")
    with pytest.raises(ConfigError, match=r"^attackers: adaptive has no counterpart"):
        AttackConfig(attackers=["adaptive"], curve_attackers=[])
