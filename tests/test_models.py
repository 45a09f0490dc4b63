"""Extractor, generator, critic and moving average: shapes, gradients and what each promises."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppreid_dist.errors import ConfigError, RunError
from ppreid_dist.models.critic import Critic
from ppreid_dist.models.ema import Ema
from ppreid_dist.models.extractor import Extractor, ExtractorConfig, GeM
from ppreid_dist.models.folder import load_extractor, save_extractor
from ppreid_dist.models.generator import Generator, doublings
from ppreid_dist.models.seeding import seeded
from ppreid_dist.models.stores.base import StoreConfig

TINY = "configs/backbones/resnet_tiny"


def _extractor(num_classes: int = 5, **options: object) -> Extractor:
    with seeded(2):
        return Extractor(ExtractorConfig(**{"backbone": TINY, **options}), num_classes)


def _pictures(count: int = 4, height: int = 64, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(3))


def _without_gradient(module: nn.Module) -> list[str]:
    return [n for n, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


def test_initial_weights_depend_on_the_key_alone() -> None:
    def weights(*key: int) -> Tensor:
        with seeded(*key):
            modules = [
                Extractor(ExtractorConfig(backbone=TINY), 3),
                Generator(8, (16, 8), 8, 2),
                Critic(8, (16, 8), 8, True),
            ]
        return torch.cat([t.flatten().double() for m in modules for t in m.state_dict().values()])

    before = torch.get_rng_state()
    first = weights(7, 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(weights(7, 1), first)
    assert not torch.equal(weights(7, 2), first)


# --- extractor ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, dict(pooling="gem"), dict(feature_dim=12, store=StoreConfig(quantise="int8")), dict(ibn=True)]
)
def test_extractor_outputs_and_gradients(options: dict) -> None:
    net = _extractor(**options)
    out = net(_pictures())
    dim = options.get("feature_dim", 256)
    assert net.feature_dim == dim
    assert [tuple(t.shape) for t in out] == [(4, dim)] * 3 + [(4, 5)]
    torch.testing.assert_close(
        out.stored_BD.norm(dim=1), torch.ones(4), rtol=0, atol=1e-2 if "store" in options else 1e-5
    )
    torch.testing.assert_close(out.embedding_BD.mean(0), torch.zeros(dim), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.logits_BC, out.embedding_BD @ net.classifier.weight.T)
    F.cross_entropy(out.logits_BC, torch.arange(4)).backward()
    assert _without_gradient(net) == []
    assert not net.neck.bias.requires_grad


@pytest.mark.parametrize("name", ["pooled_BD", "embedding_BD", "stored_BD", "logits_BC"])
def test_each_output_reaches_the_backbone(name: str) -> None:
    net = _extractor()
    (getattr(net(_pictures()), name) ** 3).sum().backward()
    assert net.backbone.model.embedder.embedder.convolution.weight.grad.any()


def test_pictures_are_normalised_as_the_backbone_was_trained() -> None:
    plain, shifted = _extractor(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).eval(), _extractor().eval()
    x = _pictures()
    by_hand = torch.stack(
        [(x[:, c] - m) / s for c, (m, s) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True))],
        1,
    )
    torch.testing.assert_close(shifted(x).pooled_BD, plain(by_hand).pooled_BD)
    assert shifted.state_dict().keys() == plain.state_dict().keys()


def test_without_classes_there_is_no_head() -> None:
    net = _extractor(num_classes=0)
    assert net(_pictures()).logits_BC.shape == (4, 0)
    assert not [n for n in net.state_dict() if n.startswith("classifier")]


def test_the_stored_feature_is_fp32_under_autocast() -> None:
    net = _extractor().eval()
    exact = net(_pictures()).stored_BD
    with torch.autocast("cpu", torch.bfloat16):
        out = net(_pictures())
    assert all(t.dtype == torch.float32 for t in out)
    torch.testing.assert_close(out.stored_BD.norm(dim=1), torch.ones(4))
    assert F.cosine_similarity(out.stored_BD, exact).min() > 0.99


def test_gem_against_its_formula() -> None:
    x = torch.rand(2, 3, 4, 2)
    gem = GeM()
    for b in range(2):
        for c in range(3):
            values = [float(v) ** 3 for v in x[b, c].flatten()]
            assert float(gem(x)[b, c].detach()) == pytest.approx((sum(values) / len(values)) ** (1 / 3), rel=1e-5)


# --- generator and critic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 8), (64, 32), (128, 64), (256, 128)])
def test_generator_sizes(size: tuple[int, int]) -> None:
    picture = Generator(12, size, 8, 3)(F.normalize(torch.randn(2, 12)), torch.randn(2, 3))
    assert picture.shape == (2, 3, *size)
    assert 0 <= picture.min() < picture.max() <= 1


@pytest.mark.parametrize("size", [(8, 4), (64, 64), (96, 48), (63, 32), (0, 0), (64, 33), (-16, -8)])
@pytest.mark.parametrize("build", [lambda s: Generator(8, s, 8, 0), lambda s: Critic(8, s, 8, False), doublings])
def test_other_sizes_are_refused(build: Callable, size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"^reversal\.size: [^\n]*$"):
        build(size)


def test_generator_rows_are_independent_in_training_too() -> None:
    net = Generator(12, (32, 16), 8, 3).train()
    f, z = F.normalize(torch.randn(5, 12)), torch.randn(5, 3)
    together = net(f, z)
    for row in range(5):
        torch.testing.assert_close(net(f[row : row + 1], z[row : row + 1])[0], together[row], rtol=0, atol=1e-5)


def test_generator_listens_to_feature_and_noise_and_learns_everywhere() -> None:
    net = Generator(12, (32, 16), 8, 3)
    f, z = F.normalize(torch.randn(4, 12)).requires_grad_(), torch.randn(4, 3).requires_grad_()
    (net(f, z) - torch.rand(4, 3, 32, 16)).square().sum().backward()
    assert _without_gradient(net) == []
    assert f.grad.any()
    assert z.grad.any()
    torch.testing.assert_close(net(f), net(f, torch.zeros(4, 3)))
    assert Generator(12, (32, 16), 8, 0)(f).shape == (4, 3, 32, 16)


@pytest.mark.parametrize("spectral", [False, True])
def test_critic_learns_everywhere_and_differentiates_twice(spectral: bool) -> None:
    net = Critic(12, (32, 16), 8, spectral)
    x, f = torch.rand(4, 3, 32, 16).requires_grad_(), F.normalize(torch.randn(4, 12)).requires_grad_()
    score = net(x, f)
    assert score.shape == (4,)
    (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    slope.square().sum().backward()
    # The penalty on the picture's slope bends every weight that the picture passes through.
    assert all(n.endswith("bias") for n in _without_gradient(net))
    net.zero_grad()
    net(x, f).square().sum().backward()
    assert _without_gradient(net) == []
    assert f.grad.any()


def test_critic_compares_picture_with_feature() -> None:
    """A short training on "the feature tells how bright the picture is": right pairs end above wrong ones."""
    with seeded(5):
        net = Critic(4, (16, 8), 8, False)
    draw = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        bright = torch.rand(32, 1, generator=draw).round()
        x = (bright * 0.5).view(-1, 1, 1, 1) + 0.5 * torch.rand(32, 3, 16, 8, generator=draw)
        right = F.normalize(torch.cat([2 * bright - 1, torch.ones(32, 3)], 1))
        wrong = F.normalize(torch.cat([1 - 2 * bright, torch.ones(32, 3)], 1))
        margin = net(x, right) - net(x, wrong)
        optimiser.zero_grad()
        F.softplus(-margin).mean().backward()
        optimiser.step()
    assert (margin > 0).float().mean() > 0.95


def test_spectral_norm_bounds_every_layer() -> None:
    net = Critic(12, (32, 16), 8, True)
    for _ in range(30):
        net(torch.rand(2, 3, 32, 16), torch.randn(2, 12))
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1, rel=0.05)


# --- moving average -----------------------------------------------------------------------------------------


def test_ema_against_the_sum() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema, expected = Ema(net, 0.9), net[0].weight.detach().clone()
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())
    for step in range(3):
        with torch.no_grad():
            net[0].weight += step + 1
        net(torch.randn(8, 3))
        ema.update(net.state_dict())
        expected = 0.9 * expected + 0.1 * net[0].weight.detach()
    torch.testing.assert_close(ema.module[0].weight, expected)
    torch.testing.assert_close(ema.module[1].running_mean, net[1].running_mean)
    assert ema.module[1].num_batches_tracked == 3
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(KeyError):
        ema.update(nn.Linear(3, 4).state_dict())


@pytest.mark.parametrize("p", [1.0, 3.0, 8.0, 12.0])
def test_gem_has_a_slope_where_nothing_is_seen(p: float) -> None:
    gem = GeM()
    gem.p.data.fill_(p)
    map_BChw = torch.rand(2, 3, 4, 2)
    map_BChw[:, 1] = 0  # a dead channel
    map_BChw.requires_grad_()
    gem(map_BChw).sum().backward()
    assert map_BChw.grad is not None and gem.p.grad is not None
    assert map_BChw.grad.isfinite().all() and gem.p.grad.isfinite()


@pytest.mark.parametrize("name", ["plain", "a #2", "a: b", "a${x}", "[a]"])
def test_an_extractor_is_read_from_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    config = ExtractorConfig(backbone=TINY)
    save_extractor(tmp_path / name, Extractor(config, num_classes=2), config, (32, 16), {"steps": 1})
    assert load_extractor(tmp_path / name, "cpu").size == (32, 16)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        '{"settings": {}, "size": [1, 2]}',
        '{"settings": {"colour": 1}, "size": [1, 2], "about": {}}',
    ],
)
def test_a_damaged_extractor_json_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "extractor.json").write_text(content)
    with pytest.raises(RunError, match=rf"^{tmp_path}/extractor\.json: not what an extractor is kept with: [^\n]*$"):
        load_extractor(tmp_path, "cpu")
