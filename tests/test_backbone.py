"""Backbones of every family, on tiny configurations made here, and what pooling they allow."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from backbone_families import write_backbone
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ppreid_dist.errors import ConfigError
from ppreid_dist.models.backbone import Backbone, build_backbone
from ppreid_dist.models.extractor import Extractor, ExtractorConfig
from ppreid_dist.models.seeding import seeded

Folder = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return partial(write_backbone, tmp_path)


def _backbone(name: str, *, pretrained: bool = False, last_stride: int = 1, ibn: bool = False) -> Backbone:
    with seeded(1):
        return build_backbone(name, pretrained=pretrained, last_stride=last_stride, ibn=ibn)


def _pictures(count: int = 4, height: int = 64, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("family", "grid"),
    [("resnet", (4, 2)), ("mobilenet_v2", (4, 2)), ("vit", (8, 4)), ("dinov2", (4, 2)), ("swin", (8, 4))],
)
def test_every_family_maps_tall_pictures_and_learns_everywhere(
    folder: Folder, family: str, grid: tuple[int, int]
) -> None:
    net = _backbone(folder(family))
    map_BChw, class_BC = net(_pictures())
    assert map_BChw.shape == (4, net.channels, *grid)
    assert (class_BC is not None) == net.has_class_token == (family in ("vit", "dinov2"))
    assert bool((map_BChw < 0).any()) == net.signed
    draw = torch.Generator().manual_seed(0)
    loss = (map_BChw * torch.randn(map_BChw.shape, generator=draw)).sum()
    loss = loss if class_BC is None else loss + (class_BC * torch.randn(class_BC.shape, generator=draw)).sum()
    loss.backward()
    # Without use they would stall DistributedDataParallel. A dead ReLU of a net this narrow may well be exactly 0.
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("family", ["vit", "dinov2", "swin"])
def test_a_token_map_keeps_the_places(folder: Folder, family: str) -> None:
    """Changing the picture's bottom right corner moves the map most there."""
    net = _backbone(folder(family, depths=[1, 1])).eval()
    x = _pictures(1)
    y = x.clone()
    y[:, :, -16:, -16:] += 5 * torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    moved = (net(y).map_BChw - net(x).map_BChw).square().sum(1)[0]
    rows, columns = moved.shape
    assert divmod(int(moved.argmax()), columns) >= (rows // 2, columns // 2)
    assert moved[rows // 2 :, columns // 2 :].mean() > 2 * moved[: rows // 2, : columns // 2].mean()


@pytest.mark.parametrize("family", ["resnet", "mobilenet_v2"])
def test_last_stride_changes_the_map_and_not_the_weights(folder: Folder, family: str) -> None:
    name = folder(family)
    wide, narrow = _backbone(name, last_stride=1), _backbone(name, last_stride=2)
    assert wide(_pictures()).map_BChw.shape[2:] == (4, 2)
    assert narrow(_pictures()).map_BChw.shape[2:] == (2, 1)
    assert {n: t.shape for n, t in wide.state_dict().items()} == {n: t.shape for n, t in narrow.state_dict().items()}


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_ibn_normalises_each_picture_in_the_first_three_stages(folder: Folder, layer_type: str) -> None:
    name = folder("resnet", layer_type=layer_type, hidden_sizes=[16, 16, 32, 32])
    net = _backbone(name, ibn=True)
    found = [n for n, m in net.named_modules() if isinstance(m, nn.InstanceNorm2d)]
    assert found == [f"model.encoder.stages.{s}.layers.0.layer.0.normalization.instance" for s in range(3)]
    norm = net.get_submodule(found[0].removesuffix(".instance"))
    channels = norm.instance.num_features
    x = torch.randn(4, channels + norm.batch.num_features, 8, 4) * torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1, 1)
    y = norm(x)
    torch.testing.assert_close(y[:, :channels], F.instance_norm(x[:, :channels]))
    torch.testing.assert_close(y[:, channels:], F.batch_norm(x[:, channels:], None, None, training=True))


def test_pretrained_weights_come_back(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    name = folder("resnet")
    saved = _backbone(name)
    save_file({n: t + 0.25 for n, t in saved.model.state_dict().items()}, f"{name}/model.safetensors", {"format": "pt"})
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a local folder touched the network"))
    again = _backbone(name, pretrained=True)
    assert again.training
    for key, value in again.model.state_dict().items():
        torch.testing.assert_close(value, (saved.model.state_dict()[key] + 0.25).to(value.dtype))
    # IBN takes the pretrained norms over, half each.
    norm = _backbone(name, pretrained=True, ibn=True).model.encoder.stages[0].layers[0].layer[0].normalization
    joined = torch.cat([norm.instance.weight, norm.batch.weight])
    torch.testing.assert_close(joined, again.model.encoder.stages[0].layers[0].layer[0].normalization.weight)


def test_relative_folders_are_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, channels in (("resnet_tiny", 256), ("resnet_tiny_b", 384)):
        net = _backbone(f"configs/backbones/{name}")
        assert net.channels == channels
        assert net(_pictures(2)).map_BChw.shape == (2, channels, 4, 2)
        assert 0.5e6 < sum(p.numel() for p in net.parameters()) < 1.5e6


def test_resnet50_is_the_standard_one() -> None:
    with torch.device("meta"):
        net = build_backbone("configs/backbones/resnet50", pretrained=False, last_stride=1, ibn=False)
    # torchvision's 25,557,032 less its classifier of 2,049,000.
    assert sum(p.numel() for p in net.parameters()) == 23_508_032


@pytest.mark.skipif("PPREID_WEIGHTS" not in os.environ, reason="PPREID_WEIGHTS names no folder of weights")
def test_real_weights_load() -> None:
    place = Path(os.environ["PPREID_WEIGHTS"])
    net = _backbone(str(place), pretrained=True)
    stored = load_file(place / "model.safetensors")
    matched = [
        n
        for n, t in net.model.state_dict().items()
        if any(k.endswith(n) and torch.equal(t, v) for k, v in stored.items())
    ]
    assert len(matched) == len(net.model.state_dict())
    assert net.eval()(_pictures(2, 256, 128)).map_BChw.isfinite().all()


def _damage(place: str) -> str:
    Path(place, "model.safetensors").write_bytes(b"no tensors at all, whatever the name says")
    return place


def _lacking(place: str) -> str:
    weights = dict(_backbone(place).model.state_dict())
    weights.pop("embedder.embedder.convolution.weight")
    save_file(weights, f"{place}/model.safetensors", {"format": "pt"})
    return place


def _other_shapes(place: str) -> str:
    weights = {n: torch.zeros(3) for n in _backbone(place).model.state_dict()}
    save_file(weights, f"{place}/model.safetensors", {"format": "pt"})
    return place


def _not_json(place: str) -> str:
    Path(place, "config.json").write_text("{")
    return place


@pytest.mark.parametrize(
    ("prepare", "options", "words"),
    [
        (lambda f: f("resnet"), dict(pretrained=True), "model.safetensors"),
        (lambda f: _damage(f("resnet")), dict(pretrained=True), "deserializing"),
        (lambda f: _lacking(f("resnet")), dict(pretrained=True), "lack 1 of the model's parameters, such as embedder"),
        (lambda f: _other_shapes(f("resnet")), dict(pretrained=True), ""),
        (lambda f: _not_json(f("resnet")), {}, "not a valid JSON"),
        (lambda f: f("nonesuch"), {}, "nonesuch"),
        (lambda f: f("bert"), {}, "bert is not one of resnet, mobilenet_v2, vit, dinov2, swin"),
        (lambda f: f("resnet", num_channels=1), {}, "1 channels, not 3"),
        (lambda f: f("resnet", depths="x"), {}, "depths"),
        (lambda f: str(Path(f("resnet")).parent), {}, "has no config.json"),
        (lambda f: f("resnet") + "/missing", {}, "no such folder, and not a hub id"),
    ],
)
def test_a_bad_backbone_is_one_line(
    folder: Folder, prepare: Callable[[Folder], str], options: dict, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        _backbone(prepare(folder), **options)
    assert str(caught.value).startswith("model.backbone: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_id_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"^model\.backbone: nobody/nothing: [^\n]*$"):
        _backbone("nobody/nothing")


def test_a_hub_id_is_sought_in_the_cache_before_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def out_of_reach(source: str, *, local_files_only: bool) -> None:
        tried.append((source, local_files_only))
        raise OSError("can't be had\neither way")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", out_of_reach)
    with pytest.raises(
        ConfigError, match=r"^model\.backbone: some/net: no such folder here, nor .*: can't be had either way$"
    ):
        _backbone("some/net", pretrained=True)
    assert tried == [("some/net", True), ("some/net", False)]


def test_ibn_is_for_resnets(folder: Folder) -> None:
    with pytest.raises(ConfigError, match=r"^model\.ibn: only for ResNet"):
        _backbone(folder("vit"), ibn=True)


@pytest.mark.parametrize("pooling", ["avg", "cls"])
def test_transformer_pooling(folder: Folder, pooling: str) -> None:
    net = Extractor(ExtractorConfig(backbone=folder("vit"), pooling=pooling)).eval()
    map_BChw, class_BC = net.backbone((_pictures() - net.mean) / net.std)
    expected = class_BC if pooling == "cls" else map_BChw.flatten(2).mean(2)
    torch.testing.assert_close(net(_pictures()).pooled_BD, expected)


@pytest.mark.parametrize(
    ("family", "pooling", "words"),
    [("resnet", "cls", "no class token"), ("vit", "gem", "negative half"), ("swin", "cls", "no class")],
)
def test_pooling_must_suit_the_backbone(folder: Folder, family: str, pooling: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.pooling: .*{words}"):
        Extractor(ExtractorConfig(backbone=folder(family), pooling=pooling))
