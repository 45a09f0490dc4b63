"""Every form of Adam, of clipping and of the cross-entropy does what the others do; Apex's by stand-ins for it."""

import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppreid_dist.experiment import Config, train
from ppreid_dist.kernels import choice
from ppreid_dist.kernels.choice import KernelsConfig, using
from ppreid_dist.kernels.clip import clip_, total_norm
from ppreid_dist.losses.identity import IdentityConfig, identity_loss
from ppreid_dist.settings import load_settings
from ppreid_dist.training.optimiser import OptimiserConfig, load_moments, make_optimiser, moments

CPU = torch.device("cpu")


class StandIn(torch.optim.Optimizer):
    """Apex's FusedAdam as others see it: steps counted once a group, two moments a parameter, no word on gradients.

    Its arithmetic is Adam's (Kingma and Ba, arXiv 1412.6980), decay decoupled or in the gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        *,
        adam_w_mode: bool,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._decoupled = adam_w_mode

    def zero_grad(self) -> None:  # type: ignore[override]
        raise AssertionError("takes no set_to_none in some versions")

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (b1, b2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for p in group["params"]:
                known = self.state[p]
                if not known:
                    known["exp_avg"], known["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                assert known["exp_avg"].stride() == p.stride() and "step" not in known
                g = p.grad if self._decoupled else p.grad + decay * p
                known["exp_avg"].lerp_(g, 1 - b1)
                known["exp_avg_sq"].lerp_(g * g, 1 - b2)
                mean, square = (
                    known["exp_avg"] / (1 - b1 ** group["step"]),
                    known["exp_avg_sq"] / (1 - b2 ** group["step"]),
                )
                if self._decoupled:
                    p.mul_(1 - lr * decay)
                p.sub_(lr * mean / (square.sqrt() + group["eps"]))


def _norm(chunk: int, overflow: Tensor, lists: list[list[Tensor]], each: bool) -> tuple[Tensor, Tensor | None]:
    assert overflow.dtype == torch.int32 and not each
    return torch.cat([g.flatten() for g in lists[0]]).norm()[None], None


def _scale(chunk: int, overflow: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    for source, into in zip(*lists, strict=True):
        into.copy_(source * factor)


class _Xentropy:
    @staticmethod
    def apply(logits: Tensor, labels: Tensor, smoothing: float, padding_idx: int, half_to_float: bool) -> Tensor:
        loss_B = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        return loss_B.masked_fill(labels == padding_idx, 0)


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch, fresh_kernels: None) -> None:
    """Modules with Apex's names and ways, as if they ran here."""
    chunk = 2048 * 32
    parts = {
        "apex": {},
        "apex.optimizers": {"FusedAdam": StandIn},
        "apex.contrib": {},
        "apex.contrib.xentropy": {"SoftmaxCrossEntropyLoss": _Xentropy},
        "apex.multi_tensor_apply": {"multi_tensor_applier": lambda kernel, *given: kernel(chunk, *given)},
        "amp_C": {"multi_tensor_l2norm": _norm, "multi_tensor_scale": _scale},
    }
    for name, members in parts.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(choice, "_why_not", lambda *about: "")


def convolutions() -> nn.Sequential:
    """Weights that lie channels last, as the engine puts them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 1))
    return net.to(memory_format=torch.channels_last)


def trained(first: str, then: str, config: OptimiserConfig) -> tuple[list[Tensor], dict[str, dict[str, Tensor]]]:
    """Weights and moments after three steps by one form of Adam and three by another, by way of a file's tensors."""
    net, x = convolutions(), torch.rand(5, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    saved: dict[str, dict[str, Tensor]] = {}
    for form in (first, then):
        with using(KernelsConfig(adam=form), CPU):
            optimiser = make_optimiser(list(net.parameters()), config)
        if saved:
            load_moments(optimiser, saved)
        else:
            assert moments(optimiser) == {}
        for _ in range(3):
            net.zero_grad()
            net(x).square().mean().backward()
            optimiser.step()
        saved = {
            number: {key: t.clone(memory_format=torch.contiguous_format) for key, t in known.items()}
            for number, known in moments(optimiser).items()
        }
    return [p.detach() for p in net.parameters()], saved


@pytest.mark.parametrize("form", ["fused", "foreach", "plain", "apex"])
@pytest.mark.parametrize(("eps", "moved"), [(1e-8, 0.1 * 1e-6 / (1e-6 + 1e-8)), (1e-2, 0.1 * 1e-6 / (1e-6 + 1e-2))])
def test_eps_is_the_least_denominator(apex: None, form: str, eps: float, moved: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    with using(KernelsConfig(adam=form), CPU):
        optimiser = make_optimiser([weight], OptimiserConfig(lr=0.1, eps=eps, weight_decay=0.0))
    weight.grad = torch.tensor([1e-6])
    optimiser.step()
    assert -weight.item() == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize(
    "forms", [("fused", "fused"), ("fused", "plain"), ("foreach", "fused"), ("apex", "fused"), ("fused", "apex")]
)
def test_every_form_of_adam_goes_on_where_another_stopped(apex: None, name: str, forms: tuple[str, str]) -> None:
    config = OptimiserConfig(name=name, lr=1e-2, weight_decay=0.1)
    weights, known = trained(*forms, config)
    plain_weights, plain_known = trained("plain", "plain", config)
    torch.testing.assert_close(weights, plain_weights, rtol=1e-5, atol=1e-6)
    assert known["0"].keys() == plain_known["0"].keys() == {"step", "exp_avg", "exp_avg_sq"}
    torch.testing.assert_close(known, plain_known, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("form", ["foreach", "plain", "apex"])
@pytest.mark.parametrize("limit", [0.5, 1e3, math.inf])
def test_every_form_of_clipping_is_the_formula(apex: None, form: str, limit: float) -> None:
    parameters = list(convolutions().parameters())
    for number, p in enumerate(parameters):
        p.grad = torch.full_like(p, number - 1.5)
    before = [p.grad.double() for p in parameters]  # type: ignore[union-attr]
    norm = math.sqrt(sum(float(g.square().sum()) for g in before))
    with using(KernelsConfig(clip=form), CPU):
        seen = total_norm([p.grad for p in parameters])  # type: ignore[misc]
        clip_(parameters, limit, seen)
    assert float(seen) == pytest.approx(norm, rel=1e-6)
    for p, g in zip(parameters, before, strict=True):
        torch.testing.assert_close(p.grad.double(), g * min(1, limit / norm), rtol=1e-5, atol=0)  # type: ignore[union-attr]


def test_apex_keeps_the_first_class(apex: None) -> None:
    logits, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 3, 0, 2])
    expected = identity_loss(logits, labels, IdentityConfig())
    with using(KernelsConfig(cross_entropy="apex"), CPU):
        torch.testing.assert_close(identity_loss(logits, labels, IdentityConfig()), expected)


def test_a_training_by_apex_is_a_training_by_torch(apex: None, world: list[str], tmp_path: Path) -> None:
    from ppreid_dist.files import read_tensors
    from ppreid_dist.training.checkpoint import CheckpointFolder

    weights = []
    for name in ("apex", "auto"):
        keys = [f"kernels.{key}={name}" for key in ("adam", "clip", "cross_entropy")]
        settings = [*world, f"output={tmp_path / name}", "privacy.weight=0", "training.images=48", "optimiser.clip=0.5"]
        train(load_settings(Config, None, [*settings, *keys]), progress=False)
        newest = CheckpointFolder(tmp_path / name, 1).latest()
        assert newest is not None
        tensors = read_tensors(newest / "tensors.safetensors")
        weights.append({key: t for key, t in tensors.items() if "/extractor/" in key and t.is_floating_point()})
    assert weights[0]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)
