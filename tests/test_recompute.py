"""Gradient checkpointing: to the bit the same training, with less kept for the backward."""

import copy
from pathlib import Path

import pytest
import torch
from backbone_families import write_backbone
from ranks import finish, start_ranks
from torch import Tensor, nn
from training_runs import assert_same, last, run

from ppreid_dist.errors import ConfigError
from ppreid_dist.models.extractor import Extractor, ExtractorConfig
from ppreid_dist.models.recompute import recompute_blocks
from ppreid_dist.models.seeding import seeded


def _passed(backbone: str, recomputed: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients and statistics of a step, by name, and the bytes that were kept for the backward."""
    with seeded(1):
        net = Extractor(ExtractorConfig(backbone=backbone), num_classes=5).train()
    if recomputed:
        assert recompute_blocks(net.backbone) > 1
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    # Swin's stochastic depth draws in the forward, and must have the same when it is made again.
    with seeded(4), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = net(torch.rand(8, 3, 64, 32, generator=torch.Generator().manual_seed(2)))
        loss = out.logits_BC.square().mean() + out.stored_BD[0].sum()
    before = sum(kept.values())
    loss.backward()
    state = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert len(state) > 10
    return state | dict(net.named_buffers()), before


@pytest.mark.parametrize("family", ["resnet", "mobilenet_v2", "vit", "dinov2", "swin"])
def test_the_same_gradients_and_statistics_with_less_kept(tmp_path: Path, family: str) -> None:
    backbone = write_backbone(tmp_path, family)
    (whole, large), (again, small) = _passed(backbone, False), _passed(backbone, True)
    assert_same(whole, again)
    assert small < 0.75 * large


def test_copies_are_independent_and_names_stay(tmp_path: Path) -> None:
    with seeded(1):
        net = Extractor(ExtractorConfig(backbone=write_backbone(tmp_path, "resnet"))).train()
    names = list(net.state_dict())
    recompute_blocks(net.backbone)
    assert list(net.state_dict()) == names
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    twin(torch.rand(2, 3, 64, 32)).stored_BD.sum().backward()
    assert all(p.grad is None for p in net.parameters())
    assert any(bool(p.grad.abs().sum() > 0) for p in twin.parameters() if p.grad is not None)


@pytest.mark.slow
@pytest.mark.engines
def test_the_whole_game_is_the_same(world: list[str], tmp_path: Path) -> None:
    """On two processes, whose batch norm meets again in the backward."""
    found = []
    for switch in ("false", "true"):
        place = tmp_path / switch
        ended = finish(start_ranks(2, *world, f"output={place}", f"engine.gradient_checkpointing={switch}"), 200)
        assert [status for status, _ in ended] == [0, 0], ended
        found.append(last(place))
    assert_same(*found)


@pytest.mark.parametrize("switch", [True, False])
def test_it_is_done_where_it_is_asked_for(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switch: bool
) -> None:
    done: list[nn.Module] = []
    monkeypatch.setattr("ppreid_dist.experiment.recompute_blocks", done.append)
    asked = f"engine.gradient_checkpointing={str(switch).lower()}"
    run(world, tmp_path / "run", asked, "privacy.weight=0", "training.images=32")
    assert len(done) == switch


def test_bad_input(world: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.gradient_checkpointing: isn't compiled"):
        run(world, tmp_path / "run", "engine.gradient_checkpointing=true", "engine.compile=inductor")
    with pytest.raises(ConfigError, match=r"engine\.gradient_checkpointing: the backbone has no blocks"):
        recompute_blocks(nn.Sequential(nn.Linear(2, 2)))
