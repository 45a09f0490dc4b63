"""LPIPS is the package's, the kernel distance is the formula, and both go the way of the other scores."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from attack_world import colour_judge, make_people, see_colours
from torch import Tensor

from ppreid_dist.attacks.bench import Bench, Victim
from ppreid_dist.attacks.config import AttackConfig
from ppreid_dist.attacks.kept import Kept
from ppreid_dist.attacks.perceptual import Perception, PerceptualConfig
from ppreid_dist.attacks.ridge import RidgeConfig
from ppreid_dist.attacks.suite import SuiteResult, run_suite
from ppreid_dist.attacks.victims import scores_of
from ppreid_dist.errors import ConfigError
from ppreid_dist.evaluation.kid import kernel_distance
from ppreid_dist.files import write_tensors
from ppreid_dist.models.lpips import Lpips, load_lpips


def wave(shape: tuple[int, ...], step: float) -> Tensor:
    """Numbers in [-1, 1] that are the same on every machine."""
    return torch.arange(int(np.prod(shape)), dtype=torch.float64).mul(step).sin().float().view(shape)


def lpips_weights() -> dict[str, Tensor]:
    """A state dict of the right shapes: layers that keep the scale of what they see, linear weights from 0 up."""
    found = dict(Lpips().state_dict())
    for i, (key, value) in enumerate(found.items()):
        numbers = wave(tuple(value.shape), 0.7 + 0.01 * i)
        if key.startswith("lin"):
            found[key] = numbers.abs()
        elif key.startswith("net."):
            found[key] = numbers * (2 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1 * numbers
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("lpips") / "alex.safetensors"
    found = lpips_weights()
    # As the package's state dict has them.
    write_tensors(file, found | {key.replace("lin", "lins.", 1): v for key, v in found.items() if key[:3] == "lin"})
    return file


def test_lpips_is_that_of_the_package(weights: Path) -> None:
    network = load_lpips(str(weights), "cpu")
    x, y = (0.5 + 0.5 * wave((2, 3, 96, 64), step) for step in (0.37, 0.41))
    # What lpips 0.1.4 gives with these weights: LPIPS(net="alex")(x, y, normalize=True).
    torch.testing.assert_close(network(x, y), torch.tensor([1.139446, 1.180687]), rtol=1e-4, atol=1e-5)
    assert float(network(x, x).abs().max()) == 0
    small = x[:, :, :32, :16], y[:, :, :32, :16]
    large = (F.interpolate(of, scale_factor=4, mode="bilinear") for of in small)
    torch.testing.assert_close(network(*small), network(*large))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lin2.model.1.weight": None}, r"lin2\.model\.1\.weight is missing"),
        ({"net.slice9.0.weight": torch.ones(1)}, r"net\.slice9\.0\.weight is not of LPIPS"),
        ({"net.slice1.0.bias": torch.ones(3)}, r"net\.slice1\.0\.bias has the shape \(3,\), not \(64,\)"),
        ({"net.slice1.0.bias": torch.full((64,), torch.nan)}, r"net\.slice1\.0\.bias holds NaN"),
        ({"lin0.model.1.weight": -torch.ones(1, 64, 1, 1)}, r"lin0\.model\.1\.weight has weights below 0"),
        ({"scaling_layer.scale": torch.ones(1, 3, 1, 1)}, r"scaling_layer\.scale is not that of LPIPS"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_key(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    file = tmp_path / "alex.safetensors"
    write_tensors(file, {key: value for key, value in (lpips_weights() | change).items() if value is not None})
    with pytest.raises(ConfigError, match=rf"^attack\.perceptual\.lpips: {file}: {message}[^\n]*$"):
        load_lpips(str(file), "cpu")


def test_weights_that_are_not_there_are_one_line(tmp_path: Path) -> None:
    for config, message in (
        (PerceptualConfig(lpips=str(tmp_path / "none")), r"attack\.perceptual\.lpips: .*none: no such file"),
        (PerceptualConfig(kid="/no/such/folder"), r"attack\.perceptual\.kid: /no/such/folder: no such folder"),
    ):
        with pytest.raises(ConfigError, match=rf"^{message}[^\n]*$"):
            Perception(config, "cpu")


def test_kernel_distance_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 5)), rng.standard_normal((4, 5)) + 0.5

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 5 + 1) ** 3)

    within = [
        sum(k(of[i], of[j]) for i in range(len(of)) for j in range(len(of)) if i != j) / (len(of) * (len(of) - 1))
        for of in (x, y)
    ]
    expected = sum(within) - 2 * sum(k(a, b) for a in x for b in y) / 28
    assert kernel_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected)
    assert np.isnan(kernel_distance(torch.ones(1, 5), torch.ones(3, 5)))
    same, other = [], []
    for _ in range(200):
        a, b = torch.from_numpy(rng.standard_normal((2, 20, 5)))
        same.append(kernel_distance(a, b))
        other.append(kernel_distance(a, b + 0.5))
    assert abs(np.mean(same)) < 3 * np.std(same) / 200**0.5
    assert np.mean(other) > 10 * np.std(other) / 200**0.5


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    transformers.ResNetModel(config).save_pretrained(folder)
    return folder


def attack(perception: Perception | None, kept: Kept | None = None, *, blind: bool) -> SuiteResult:
    known, met = make_people(1000, 40)[0], make_people(0, 24)[0]
    first = met.camids_N == 0
    query = replace(met.only(first), masks_N1HW=None)
    features = [see_colours(of.images_N3HW.float() / 255) for of in (known, query)]
    control = Victim(
        name="control", aux_ND=features[0], query_QD=features[1], utility_ap_Q=np.full(24, 0.8), see=see_colours
    )
    rng = torch.Generator().manual_seed(0)
    noise = [torch.randn(of.shape, generator=rng) for of in features]
    bench = Bench(
        aux=known,
        query=query,
        gallery_pids=met.pids_N[~first],
        gallery_camids=met.camids_N[~first],
        judges=[colour_judge(met, ~first)],
        config=AttackConfig(
            attackers=["ridge"],
            curve_attackers=["ridge"],
            people=[0],
            resamples=100,
            ridge=RidgeConfig(widths=[0.0], ridges=[1e-2, 1.0]),
        ),
        progress=lambda line: None,
        perception=perception,
        kept=kept,
    )
    return run_suite(
        bench,
        control=control,
        protected=replace(control, name="protected", **({"aux_ND": noise[0], "query_QD": noise[1]} if blind else {})),
    )


def test_with_weights_there_is_an_axis_and_a_kernel_distance(weights: Path, backbone: Path, tmp_path: Path) -> None:
    perception = Perception(PerceptualConfig(lpips=str(weights), kid=str(backbone)), "cpu")
    kept = Kept(tmp_path)
    same, blind = (attack(perception, kept, blind=blind) for blind in (False, True))
    assert list(same.axes) == ["pixel", "identity", "perceptual"]
    row = same.axes["perceptual"]["attackers"]["ridge"]
    assert row["status"] == "ok" and row["floor"] < row["control"] < 0
    assert same.axes["perceptual"]["leak"]["value"] == pytest.approx(1)
    assert same.axes["perceptual"]["urr"]["raw"] is None  # no ratio of a score that is below 0
    assert blind.axes["perceptual"]["leak"]["value"] < 0.3
    assert same.kid["ridge"]["protected"] == same.kid["ridge"]["control"] > 0
    assert set(same.kid["ridge"]) == {"control", "protected", "floor"}
    again, without = attack(perception, kept, blind=True), attack(None, kept, blind=True)
    assert (again.axes, again.kid) == (blind.axes, blind.kid)
    assert list(without.axes) == ["pixel", "identity"]
    assert without.kid == {"ridge": dict.fromkeys(("control", "protected", "floor"))}


def test_reconstructions_are_nearer_the_real_pictures_than_noise_is(weights: Path, backbone: Path) -> None:
    perception = Perception(PerceptualConfig(lpips=str(weights), kid=str(backbone)), "cpu")
    real = make_people(0, 6)[0].images_N3HW
    rng = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, real.shape, generator=rng, dtype=torch.uint8)
    dimmed = (real.float() * 0.9).to(torch.uint8)
    seen = perception.features(real)
    for score in (lambda x: -perception.scores(x, real)["perceptual"].mean(), lambda x: perception.kid(x, seen)):
        assert score(real) <= 0 < score(dimmed) < score(noise)
    # Each row has its own score, whatever stands beside it.
    np.testing.assert_allclose(
        perception.scores(dimmed, real)["perceptual"][5:7],
        perception.scores(dimmed[5:7], real[5:7])["perceptual"],
        rtol=1e-4,
    )


def test_on_a_perceptual_axis_all_attackers_have_the_highest_floor() -> None:
    """Else one whose floor is poor would be said to have found what anybody draws."""
    scores = {"gan": -0.6, "ridge": -0.3}
    trained = {
        (name, 40): SimpleNamespace(scores=dict.fromkeys(("perceptual", "identity"), np.full(3, score)))
        for name, score in scores.items()
    }
    bench = SimpleNamespace(perception=SimpleNamespace(axes={"perceptual": ""}))
    roles = dict.fromkeys(("control", "protected", "floor"), trained)
    floors = {
        axis: [float(scores_of(bench, roles, axis, name, 40).floor_Q[0]) for name in scores]  # type: ignore[arg-type]
        for axis in ("perceptual", "identity")
    }
    assert floors == {"perceptual": [-0.3, -0.3], "identity": [-0.6, -0.3]}
