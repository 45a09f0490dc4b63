"""T: the kinds of stored features, and a finished run that is stored otherwise."""

import math
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from ppreid_dist.errors import ConfigError
from ppreid_dist.files import read_json, write_json
from ppreid_dist.models.store import KINDS, make_store
from ppreid_dist.models.stores.base import DecoderConfig, StoreConfig, int8_reach, quantise_int8
from ppreid_dist.models.stores.coded import NARROWEST
from ppreid_dist.models.stores.secret import siphash
from ppreid_dist.settings import load_settings, save_settings, to_dict
from ppreid_dist.storing import STORED
from ppreid_dist.sweep.config import SweepConfig


def features(rows: int = 40, dim: int = 16, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=draw) * torch.linspace(0.2, 2, dim) + 0.3


def test_every_kind_that_can_be_asked_for_is_there_and_uses_settings_that_exist() -> None:
    (kind,) = (field for field in fields(StoreConfig) if field.name == "kind")
    assert set(KINDS) == set(kind.metadata["choices"])
    names = {field.name for field in fields(StoreConfig)}
    assert all(names.issuperset(of.uses) for of in KINDS.values())
    assert {kind for kind, of in KINDS.items() if of.keyed} == set(KEYED)


def test_plain_is_the_embedding_at_unit_norm() -> None:
    x = features()
    assert torch.equal(make_store(StoreConfig(), 16)(x), F.normalize(x, dim=1))


def test_noise_is_of_its_norm_and_the_same_for_the_same_picture() -> None:
    store, x = make_store(StoreConfig(kind="noise", strength=0.5), 512), features(200, 512)
    noise = store(x) - F.normalize(x, dim=1)
    assert noise.norm(dim=1).mean() == pytest.approx(0.5, rel=0.02)
    apart = F.normalize(noise, dim=1) @ F.normalize(noise, dim=1).T
    assert (apart - torch.eye(200)).abs().max() < 0.3  # other features get other noise
    assert torch.equal(store(x[7:9]), store(x)[7:9])
    # Gaussian: as many components beyond one, two and three standard deviations as there should be.
    height = (noise / 0.5 * 512**0.5).abs()
    shares = [float((height > deviations).float().mean()) for deviations in (1, 2, 3)]
    assert shares == pytest.approx([0.3173, 0.0455, 0.0027], abs=0.004)
    # What another batch's rounding moves by 1e-6 keeps its noise: who enrols a picture twice gets no second draw.
    again = store(x * (1 + 3e-7 * torch.randn(x.shape)))
    assert (again - store(x)).norm(dim=1).max() < 0.03
    other = make_store(StoreConfig(kind="noise", strength=0.5, key=1), 512)
    assert not torch.allclose(other(x), store(x), atol=1e-3)


def test_rotation_keeps_every_cosine_and_hides_every_component() -> None:
    store, x = make_store(StoreConfig(kind="rotation", key=3), 16), features()
    kept, plain = store(x), F.normalize(x, dim=1)
    torch.testing.assert_close(kept @ kept.T, plain @ plain.T, rtol=0, atol=1e-5)
    assert (kept - plain).norm(dim=1).min() > 0.5
    again = make_store(StoreConfig(kind="rotation", key=3), 16)
    assert torch.equal(again(x), kept) and not again.state_dict()


KEYED = ("noise", "rotation", "signs", "codes", "cells")
KEYS = (7, 7 + 2**32, 7 + 2**64, 7 + 2**127)


@pytest.mark.parametrize("kind", KEYED)
def test_every_bit_of_a_key_counts(kind: str) -> None:
    """torch's generator on the CPU would keep 32 of them."""
    x = features()
    kept = [make_store(StoreConfig(kind=kind, key=key), 16)(x) for key in KEYS]
    for one, other in combinations(kept, 2):
        assert ((one - other).norm(dim=1) > 0.05).all()
    wide = make_store(StoreConfig(kind=kind, key=KEYS[-1]), 16)
    assert torch.equal(wide(x), kept[-1]) and wide.rekeyed().config.key == KEYS[-1] + 1
    assert not torch.equal(wide.rekeyed()(x), kept[-1])


def test_secrets_are_the_same_everywhere() -> None:
    """Galleries are read for years: what a key draws must never change. And it is spread as it should be."""
    store = make_store(StoreConfig(kind="signs", key=KEYS[-1], dim=2048), 256)
    assert store.secret_AS[0, :3].tolist() == pytest.approx([-0.8128685, 0.0704747, -1.2672069], abs=1e-6)
    assert store.secret_AS.mean().abs() < 0.01 and store.secret_AS.std() == pytest.approx(1, abs=0.01)
    assert [float((store.secret_AS.abs() > far).float().mean()) for far in (1, 2, 3)] == pytest.approx(
        [0.3173, 0.0455, 0.0027], abs=2e-3
    )
    codes = make_store(StoreConfig(kind="codes", key=KEYS[-1], dim=2048), 256)
    assert torch.equal(codes.secret_AS, store.secret_AS)
    assert codes.phases_S.min() > 0 and codes.phases_S.mean() == pytest.approx(math.pi, abs=0.2)


def test_a_wide_key_comes_back_from_files(tmp_path: Path) -> None:
    config = load_settings(StoreConfig, None, ["kind=adversarial", "decoder.width=8", f"key={KEYS[-1]}"])
    assert config.key == KEYS[-1]
    save_settings(config, tmp_path / "store.yaml")
    write_json(tmp_path / "store.json", to_dict(config))
    assert load_settings(StoreConfig, tmp_path / "store.yaml") == config
    assert read_json(tmp_path / "store.json")["key"] == KEYS[-1]
    assert torch.isfinite(make_store(config, 16)(features())).all()
    with pytest.raises(ConfigError, match=r"key: -1 must be at least 0"):
        StoreConfig(key=-1)


def test_pca_keeps_the_main_directions() -> None:
    x = features()
    store = make_store(StoreConfig(kind="pca", dim=5), 16)
    plain = F.normalize(x, dim=1)
    store.fit(plain)
    _, _, directions = torch.linalg.svd(plain.double(), full_matrices=False)
    oracle = F.normalize(plain.double() @ directions[:5].T, dim=1)
    kept = store(x).double()
    assert kept.shape == (40, 5)
    torch.testing.assert_close(kept @ kept.T, oracle @ oracle.T, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"model\.store\.dim: 17 is more than the embedding's 16"):
        make_store(StoreConfig(kind="pca", dim=17), 16)


def test_int8_keeps_the_main_direction_whole() -> None:
    """It is a third of a feature, or more, of however many: four root mean squares would cut it."""
    x = F.normalize(features(400, 256) + 1.5, dim=1)
    whole, rounded = (make_store(StoreConfig(kind="pca", quantise=how), 256) for how in ("none", "int8"))
    for store in (whole, rounded):
        store.fit(x)
    assert whole(x)[:, 0].abs().min() > int8_reach(256)
    assert (rounded(x) - whole(x)).abs().max() <= 0.501 / 127


def test_directions_do_not_hang_on_the_library_that_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gallery that is stored again, elsewhere, must match what was stored before."""
    x, honest = F.normalize(features(200), dim=1), torch.linalg.eigh
    kept = []
    for signs in (torch.ones(16), torch.where(torch.arange(16) % 3 == 0, -1.0, 1.0)):
        monkeypatch.setattr(torch.linalg, "eigh", lambda a, signs=signs: (honest(a)[0], honest(a)[1] * signs))
        store = make_store(StoreConfig(kind="codes", dim=256, axes=8, key=7), 16)
        store.fit(x)
        kept.append(store(x))
    assert torch.equal(*kept)


def test_codes_agree_as_near_features_do_and_forget_how_far_apart_others_are() -> None:
    """A square wave's spectrum, term by term: the agreement of two codes is a sum of gaussians of the distance."""
    config = StoreConfig(kind="codes", dim=40_000, width=0.3, key=2)
    angles = torch.linspace(0, math.pi, 40)
    x = torch.stack([angles.cos(), angles.sin(), *torch.zeros(6, 40)], dim=1)
    store = make_store(config, 8)
    kept = store(x)
    assert kept.unique().numel() == 2 and kept.norm(dim=1).sub(1).abs().max() < 1e-4
    distance = (x[0] - x).norm(dim=1).double()
    oracle = sum(8 / math.pi**2 / k**2 * torch.exp(-((k * distance / 0.3) ** 2) / 2) for k in range(1, 4001, 2))
    torch.testing.assert_close((kept @ kept[0]).double(), oracle, rtol=0, atol=0.02)
    assert not torch.allclose(make_store(StoreConfig(kind="codes", dim=40_000, width=0.3, key=3), 8)(x), kept)


@pytest.mark.parametrize(
    ("axes", "dim", "width", "spectrum"),
    [(16, 2048, 0.5, "gaussian"), (8, 1024, 0.35, "gaussian"), (16, 2048, 0.5, "shell")],
)
def test_whoever_has_the_key_opens_codes(axes: int, dim: int, width: float, spectrum: str) -> None:
    config = StoreConfig(kind="codes", dim=dim, axes=axes, width=width, spectrum=spectrum, key=1)
    known, asked = features(400, 2 * axes, seed=1), features(50, 2 * axes, seed=2)
    store, thief = make_store(config, 2 * axes), make_store(replace(config, key=2), 2 * axes)
    store.fit(known)
    thief.fit(known)
    kept, truth = store(asked), store.coded(asked)
    opened = store.opened(kept, store.coded(known))
    assert (opened * truth).sum(1).min() > 0.98
    assert (thief.opened(kept, store.coded(known)) * truth).sum(1).mean() < 0.5
    # Nearer than the nearest whom the thief knows.
    assert (store.coded(known) @ truth.T).max(0).values.median() < 0.97


def test_bits_of_cells_agree_where_features_share_a_cell_and_nowhere_else() -> None:
    """Of one pair of walls with a random place, the share that parts two points is their distance across it over the
    walls'; of a cell all 8 pairs. What is in another cell agrees as coins do, near or far."""
    store = make_store(StoreConfig(kind="cells", dim=20_000, width=0.6, key=2), 8)
    angles = torch.linspace(0, math.pi, 25)
    x = torch.stack([angles.cos(), angles.sin(), *torch.zeros(6, 25)], dim=1)
    kept = store(x)
    assert kept.unique().numel() == 2 and kept.norm(dim=1).sub(1).abs().max() < 1e-4
    assert abs(kept.sign().mean()) < 0.02
    walls = F.normalize(torch.randn(5000, 8, 8, generator=torch.Generator().manual_seed(0)), dim=2)
    across = ((x[0] - x) @ walls.mT).abs() / 0.6
    oracle = (1 - across).clamp_min(0).prod(2).mean(0)
    torch.testing.assert_close(kept @ kept[0], oracle, rtol=0, atol=0.025)
    assert oracle[1] > 0.5 and oracle[12:].max() < 0.002
    assert not torch.allclose(make_store(StoreConfig(kind="cells", dim=20_000, width=0.6, key=3), 8)(x), kept)


@pytest.mark.parametrize(
    ("words", "published"), [(1, 0x93F5F5799A932462), (2, 0x3F2ACC7F57C29BDB), (3, 0xB8AD50C6F649AF94)]
)
def test_cells_are_hashed_as_siphash_is_published(words: int, published: int) -> None:
    """The vectors of Aumasson & Bernstein: the bytes 0, 1, 2, … under the key 0, 1, …, 15."""
    counted = torch.arange(8 * words).to(torch.int8).view(torch.int64)
    assert int(siphash(torch.arange(16).to(torch.int8).view(torch.int64), list(counted))) % 2**64 == published


def test_cells_too_narrow_to_be_counted_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.store\.width: of cells 0\.01 or more, not 0\.009"):
        make_store(StoreConfig(kind="cells", dim=64, width=0.009), 16)
    narrow = make_store(StoreConfig(kind="cells", dim=4096, width=0.01, key=1), 16)
    x = features(2)
    assert abs(float(narrow(x)[0] @ narrow(x)[1])) < 0.08
    assert 1 / NARROWEST + 1 < 127  # how far a unit vector reaches, and a shift


def test_whoever_has_the_key_opens_cells() -> None:
    config = StoreConfig(kind="cells", dim=1024, axes=6, width=0.8, key=1)
    known, asked = features(400, 12, seed=1), features(30, 12, seed=2)
    store, thief = make_store(config, 12), make_store(replace(config, key=2), 12)
    for one in (store, thief):
        one.fit(known)
    kept, truth = store(asked), store.coded(asked)
    assert (store.opened(kept, store.coded(known)) * truth).sum(1).min() > 0.98
    assert (thief.opened(kept, store.coded(known)) * truth).sum(1).mean() < 0.6
    # No slope leads there.
    x = asked.clone().requires_grad_()
    (store(x) * features(30, 1024)).sum().backward()
    assert not x.grad.any()


def test_who_has_the_extractor_compares_without_noise() -> None:
    """The noise of a picture says nothing of that of the next, near as it may be."""
    x = F.normalize(features(40), dim=1)
    store, hair = make_store(StoreConfig(kind="noise", strength=0.5), 16), 0.01 * torch.randn(40, 16)
    assert (store(x + hair) - store(x)).norm(dim=1).mean() > 0.5
    assert (store.expected(x + hair) - store.expected(x)).norm(dim=1).max() < 0.2
    assert F.cosine_similarity(store.expected(x), store(x)).mean() == pytest.approx(1 / 1.25**0.5, abs=0.02)
    for kind in ("plain", "rotation", "signs", "codes"):
        other = make_store(StoreConfig(kind=kind), 16)
        assert torch.equal(other.expected(x), other(x))


def test_codes_of_the_main_directions() -> None:
    x = features(200)
    config = StoreConfig(kind="codes", dim=64, axes=5, key=1)
    store = make_store(config, 16)
    assert store.needs_features and not make_store(StoreConfig(kind="codes", dim=64), 16).needs_features
    store.fit(F.normalize(x, dim=1))
    main = make_store(StoreConfig(kind="pca", dim=5), 16)
    main.fit(F.normalize(x, dim=1))
    assert torch.equal(store(x), make_store(StoreConfig(kind="codes", dim=64, key=1), 5)(main(x)))
    again = make_store(config, 16)
    again.load_state_dict(store.state_dict())
    assert torch.equal(again(x), store(x)) and store.state_dict().keys() == {
        "main_DA"
    }  # the key's secrets are not kept
    with pytest.raises(ConfigError, match=r"model\.store\.axes: 17 is more than the embedding's 16"):
        make_store(StoreConfig(kind="codes", axes=17), 16)


def test_signs_agree_as_often_as_the_angle_says() -> None:
    """P(two signs agree) = 1 - angle / pi."""
    store, x = make_store(StoreConfig(kind="signs", dim=20_000), 16), features(2)
    kept = store(x)
    assert set(kept.flatten().tolist()) == {1 / math.sqrt(20_000), -1 / math.sqrt(20_000)} or kept.abs().std() < 1e-6
    angle = torch.acos(F.cosine_similarity(x[:1], x[1:])).item()
    assert (kept[0] * kept[1] > 0).float().mean().item() == pytest.approx(1 - angle / math.pi, abs=0.02)


def test_adversarial_misleads_the_decoder_it_knows_and_little_the_matching() -> None:
    """Its direction: the known decoder errs more than under noise as strong."""
    draw = torch.Generator().manual_seed(0)
    plain = F.normalize(torch.randn(300, 16, generator=draw), dim=1)
    colours = torch.sigmoid(4 * plain[:, :3])[:, :, None, None]
    pictures = (255 * colours.expand(-1, -1, 16, 8)).to(torch.uint8)
    recipe = DecoderConfig(size=(16, 8), width=8, steps=150, batch=32, lr=1e-2)
    store = make_store(StoreConfig(kind="adversarial", strength=0.5, decoder=recipe), 16)
    store.fit(plain, pictures)

    def error(features: torch.Tensor) -> float:
        return float((store.decoder(features) - pictures / 255).abs().mean())

    moved, noisy = store(plain), F.normalize(make_store(StoreConfig(kind="noise", strength=0.5), 16)(plain), dim=1)
    assert error(plain) < 0.06 and error(moved) > 1.5 * error(noisy)
    assert (moved * plain).sum(1).min() > 0.85  # an angle of 30 degrees
    torch.testing.assert_close(store(plain[5:8]), moved[5:8], rtol=0, atol=1e-4)
    again = make_store(StoreConfig(kind="adversarial", strength=0.5, decoder=recipe), 16)
    again.load_state_dict(store.state_dict())
    assert torch.equal(again(plain), moved)


@pytest.mark.parametrize("kind", ["noise", "adversarial", "rotation", "signs", "codes"])
def test_gradients_pass(kind: str) -> None:
    """A white-box attacker differentiates through T."""
    x = features().requires_grad_()
    (make_store(StoreConfig(kind=kind, quantise="int8"), 16)(x) * features(seed=1)).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("dim", [16, 13])
@pytest.mark.parametrize(
    ("kind", "quantise"), [("plain", "int8"), ("pca", "int8"), ("signs", "none"), ("codes", "int8"), ("cells", "none")]
)
def test_packed_features_are_the_same_numbers(kind: str, quantise: str, dim: int) -> None:
    """As numpy unpacks them, which is what docs say."""
    store = make_store(StoreConfig(kind=kind, quantise=quantise, dim=0 if kind == "plain" else dim), 16)
    store.fit(features())
    stored = store(features())
    packed = {name: tensor.numpy() for name, tensor in store.packed(stored).items()}
    if store.one_bit:
        assert packed["features"].nbytes == 2 * len(stored)
        bits = np.unpackbits(packed["features"], axis=1, count=packed["dim"])
        unpacked = (2.0 * bits - 1) / dim**0.5
    else:
        assert packed["features"].nbytes == stored.numel()
        unpacked = packed["features"] * packed["step"]
        assert unpacked.std() > 0
    # int8 of codes rounds their one height, which cosines don't see.
    np.testing.assert_allclose(F.normalize(torch.from_numpy(unpacked), dim=1), F.normalize(stored, dim=1), atol=1e-6)
    assert not make_store(StoreConfig(kind="noise"), 16).packs


@settings(max_examples=30, deadline=None)
@given(dim=st.sampled_from([1, 8, 32, 2048]), seed=st.integers(0, 2**31), gain=st.floats(0, 3))
def test_int8_levels(dim: int, seed: int, gain: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    exact = F.normalize(torch.randn(3, dim, generator=draw) * torch.exp(gain * torch.randn(dim, generator=draw)), dim=1)
    exact.requires_grad_()
    reach = int8_reach(dim)
    step, rounded = reach / 127, quantise_int8(exact, reach)
    codes = (rounded / step).detach()
    assert torch.equal(rounded.detach(), codes.round() * step)  # nothing between the levels
    assert codes.abs().max() <= 127.001
    inside = exact.abs() <= 127 * step
    assert ((rounded - exact).abs()[inside] <= 0.501 * step).all()
    weights = torch.randn(3, dim, generator=draw)
    (rounded * weights).sum().backward()
    assert torch.equal(exact.grad, weights)  # straight through


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("privacy_bench*.yaml")), ids=lambda file: file.name)
def test_every_method_that_ships_stores_by_settings_that_its_kind_has(file: Path) -> None:
    for method, keys in load_settings(SweepConfig, file).methods.items():
        stored = {
            key.removeprefix(STORED).partition(".")[0]: value for key, value in keys.items() if key.startswith(STORED)
        }
        assert set(stored) <= {"kind", "quantise", *KINDS[stored.get("kind", "plain")].uses}, method


def test_waves_of_one_length_agree_as_drawn_ones_do_nearby_and_all_alike() -> None:
    drawn, shell = (StoreConfig(kind="codes", dim=40_000, width=0.4, spectrum=of) for of in ("gaussian", "shell"))
    lengths = {of.spectrum: make_store(of, 12).secret_AS.norm(dim=0) for of in (drawn, shell)}
    torch.testing.assert_close(lengths["shell"], torch.full((40_000,), 12**0.5))
    assert lengths["gaussian"].std() > 0.5
    x = torch.eye(12)[:1].expand(30, -1).clone()
    x[:, 1] = torch.linspace(0, 0.3, 30)
    kept = {of.spectrum: make_store(of, 12)(x) for of in (drawn, shell)}
    alike = {spectrum: codes @ codes[0] for spectrum, codes in kept.items()}
    torch.testing.assert_close(alike["shell"], alike["gaussian"], rtol=0, atol=0.03)
