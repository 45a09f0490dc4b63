"""Which kernel is chosen, and that each gives what its plain twin gives; on GPUs tests/test_gpu.py compares them."""

import logging
import math
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ppreid_dist.errors import ConfigError
from ppreid_dist.experiment import FREE, Config, train
from ppreid_dist.kernels import choice, nearer
from ppreid_dist.kernels.batch_hard import hardest, hardest_at_once, hardest_by_tiles
from ppreid_dist.kernels.choice import Choice, KernelsConfig, using
from ppreid_dist.kernels.clip import clip_, total_norm
from ppreid_dist.losses.identity import IdentityConfig, identity_loss
from ppreid_dist.settings import load_settings, to_dict
from ppreid_dist.training.optimiser import OptimiserConfig, load_moments, make_optimiser, moments

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton isn't installed")


# --- the choice


@pytest.fixture
def fresh() -> Iterator[None]:
    """No choice is remembered, before or after."""
    choice._choose.cache_clear()
    yield
    choice._choose.cache_clear()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, fresh: None) -> set[str]:
    """The libraries that are importable as far as the choice sees; put some in."""
    names: set[str] = set()
    monkeypatch.setattr(choice, "find_spec", lambda name: name in names or None)
    monkeypatch.setattr(choice, "_triton_fails", lambda device: "")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return names


def chosen(device: torch.device, **sizes: int) -> dict[str, str]:
    return {operation: choice.of(operation, device, **sizes).implementation for operation in choice.OPERATIONS}


def test_auto_takes_the_first_that_can_run_and_nothing_that_nobody_measured(installed: set[str]) -> None:
    cpu = {"adam": "fused", "clip": "foreach", "cross_entropy": "plain", "ssim": "plain", "batch_hard": "plain"}
    assert chosen(CPU) == cpu | {"nearer": "screened"} and chosen(CUDA) == cpu | {"nearer": "plain"}
    installed |= {"triton", "apex", "amp_C"}
    choice._choose.cache_clear()
    assert chosen(CPU) == cpu | {"nearer": "screened"} and chosen(CUDA) == cpu | {"nearer": "plain"}
    assert "Triton only where asked for" in choice.of("ssim", CUDA).why
    assert "Apex only where asked for" in choice.of("adam", CUDA).why
    assert choice.of("batch_hard", CPU, distances=choice.TILED_FROM + 1).implementation == "tiled"


def test_what_is_asked_for_is_taken_where_it_can_run(installed: set[str]) -> None:
    installed |= {"triton", "apex", "amp_C"}
    config = KernelsConfig(
        adam="apex", clip="apex", cross_entropy="apex", ssim="plain", batch_hard="tiled", strict=True
    )
    with using(config, CUDA):
        asked = {"adam": "apex", "clip": "apex", "cross_entropy": "apex", "ssim": "plain", "batch_hard": "tiled"}
        assert chosen(CUDA) == asked | {"nearer": "plain"}
        assert choice.of("clip", CUDA) == Choice("clip", "apex", "asked for by kernels.clip")
    assert chosen(CUDA)["adam"] == "fused"


@pytest.mark.parametrize(
    ("config", "device", "there", "message"),
    [
        ({"nearer": "screened"}, CUDA, set(), "kernels.nearer: screened can't run here: it is for CPUs"),
        ({"ssim": "triton"}, CPU, {"triton"}, "kernels.ssim: triton can't run here: Triton needs a CUDA device"),
        ({"batch_hard": "triton"}, CUDA, set(), "kernels.batch_hard: triton can't run here: Triton isn't installed"),
        ({"adam": "apex"}, CUDA, {"apex"}, "kernels.adam: apex can't run here: NVIDIA Apex isn't installed"),
        (
            {"clip": "apex"},
            CPU,
            {"apex", "amp_C"},
            "kernels.clip: apex can't run here: NVIDIA Apex needs a CUDA device",
        ),
    ],
)
def test_what_cannot_run_falls_back_with_one_line_or_stops(
    config: dict[str, str],
    device: torch.device,
    there: set[str],
    message: str,
    installed: set[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    installed |= there
    usual = chosen(device)
    with caplog.at_level(logging.WARNING), using(KernelsConfig(**config), device):
        assert chosen(device) == usual
        assert message.split(": ")[-1] in choice.of(next(iter(config)), device).why
    (operation,) = config
    assert [r.getMessage() for r in caplog.records] == [f"{message}; {usual[operation]} is taken"]
    with pytest.raises(ConfigError) as error, using(KernelsConfig(**config, strict=True), device):
        pass
    assert str(error.value) == message


def test_zero_counts_steps_itself(installed: set[str]) -> None:
    installed |= {"apex", "amp_C"}
    with (
        pytest.raises(ConfigError, match=r"^kernels\.adam: apex can't run here: ZeRO"),
        using(KernelsConfig(adam="apex", strict=True), CUDA, partitioned=True),
    ):
        pass


def test_a_kernel_that_fails_at_first_use_is_not_taken(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: True)
    monkeypatch.setattr(choice, "_triton_fails", lambda device: "Triton's first kernel failed: no compiler")
    with using(KernelsConfig(ssim="triton"), CUDA):
        chosen = choice.of("ssim", CUDA)
    assert chosen.implementation == "plain"
    assert chosen.why.endswith("can't run here: Triton's first kernel failed: no compiler")


def test_a_training_refuses_what_cannot_run_and_may_go_on_with_other_kernels(world: list[str], tmp_path: Path) -> None:
    settings = [*world, f"output={tmp_path / 'run'}", "kernels.clip=apex", "kernels.strict=true"]
    with pytest.raises(ConfigError, match=r"^kernels\.clip: apex can't run here: [^\n]*$"):
        train(load_settings(Config, None, settings), progress=False)
    assert all(f"kernels.{key}".startswith(FREE) for key in to_dict(KernelsConfig()))


# --- mining


def mining_oracle(rows: Tensor, pids: list[int], own: int) -> tuple[int, int, bool]:
    """Of the row of that number, by plain loops."""
    far, near, positive, negative = -math.inf, math.inf, [0], [0]
    for j, row in enumerate(rows.tolist()):
        distance = math.dist(rows[own].tolist(), row)
        if pids[j] != pids[own] and distance < near:
            near, negative = distance, [0, j]
        elif pids[j] == pids[own] and j != own and distance > far:
            far, positive = distance, [0, j]
    return positive[-1], negative[-1], len(positive) == len(negative) == 2


def people(rows: int, dim: int) -> tuple[Tensor, Tensor]:
    """Features with equal rows near and far, and pids: a person of one row, and one of many."""
    draw = torch.Generator().manual_seed(rows)
    all_ND = torch.randn(rows, dim, generator=draw)
    pids_N = torch.randint(0, max(2, rows // 4), (rows,), generator=draw)
    if rows > 30:
        all_ND[[3, 20, 25]], pids_N[[3, 20, 25]] = all_ND[30].clone(), pids_N[30].clone()
        all_ND[[5, 6, 29]], pids_N[[5, 6, 29]] = all_ND[-1].clone(), pids_N[-1].clone()
        pids_N[8] = 1000
    return all_ND, pids_N


@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (2, 3), (40, 1), (37, 130)])
@pytest.mark.parametrize("alone", [False, True], ids=["many", "one person"])
def test_mining_equals_plain_loops_and_tiles_equal_it(rows: int, dim: int, alone: bool) -> None:
    all_ND, pids_N = people(rows, dim)
    pids_N = torch.zeros_like(pids_N) if alone else pids_N
    itself_B = torch.arange(rows)[rows // 3 :]  # as of a process that isn't the first
    given = all_ND[itself_B], all_ND, pids_N[itself_B], pids_N, itself_B
    mined = hardest_at_once(*given)
    oracle = [mining_oracle(all_ND.double(), pids_N.tolist(), int(own)) for own in itself_B]
    assert list(zip(*(t.tolist() for t in mined), strict=True)) == oracle
    for tile in (1, 7, 16, rows, rows + 3):
        assert all(map(torch.equal, hardest_by_tiles(*given, tile=tile), mined))


def test_tiles_equal_the_whole_to_the_bit_where_distances_nearly_tie_or_are_no_numbers() -> None:
    draw = torch.Generator().manual_seed(0)
    all_ND = 100 + torch.randn(300, 50, generator=draw).round(decimals=0) * 1e-3
    all_ND[17], all_ND[200] = math.nan, math.inf
    pids_N, itself_B = torch.arange(300) % 9, torch.arange(300)
    given = all_ND, all_ND, pids_N, pids_N, itself_B
    for tile in (11, 64, 299):
        assert all(map(torch.equal, hardest_by_tiles(*given, tile=tile), hardest_at_once(*given)))


def test_many_distances_are_never_held_at_once(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else [result]:
                self.seen = max(self.seen, t.numel() if isinstance(t, Tensor) else 0)
            return result

    all_ND, pids_N = torch.randn(2000, 2), torch.arange(2000) % 50
    given = all_ND[:40], all_ND, pids_N[:40], pids_N, torch.arange(40)
    with Largest() as whole:
        mined = hardest(*given)
    assert whole.seen >= 40 * 2000
    monkeypatch.setattr(choice, "TILED_FROM", 5000)
    with Largest() as tiled:
        assert all(map(torch.equal, hardest(*given), mined))
    assert tiled.seen <= 5000


# --- the optimiser's step


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
def apex(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
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
    from ppreid_dist.storage import read_tensors
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


# --- Triton


@needs_triton
def test_tritons_kernels_are_their_twins_in_its_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--noconftest", "tests/interpreted_kernels.py"],
        cwd=ROOT, capture_output=True, text=True, timeout=240, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_tritons_kernels_compile_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interpreter takes what its compiler refuses; the compiler needs no GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ppreid_dist.kernels import batch_hard_triton, nearer_triton, ssim_triton

    tile = {"TH": 16, "TW": 32, "K": 11}
    for kernel, constants in (
        (ssim_triton._forward, {**tile, "C1": 1e-4, "C2": 9e-4, "SLOPES": True}),
        (ssim_triton._backward, {**tile, "X": True, "Y": False}),
        (batch_hard_triton._mine, {"TB": 16, "TN": 32}),
        (nearer_triton._count, {"NONE": nearer.NONE, "TQ": 32, "TG": 64}),
    ):
        integers = {"pids_ptr": "*i64", "all_pids_ptr": "*i64", "itself_ptr": "*i64", "found_ptr": "*i32"}
        if kernel is nearer_triton._count:
            integers = {"bar_ptr": "*i64", "place_ptr": "*i64", "counts_ptr": "*i64", "junk_ptr": "*i8"}
            integers |= {"query_ptr": "*fp64", "gallery_ptr": "*fp64"}
        kinds = {
            name: "constexpr" if name in constants else integers.get(name, "*fp32" if name.endswith("_ptr") else "i32")
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, kinds, {(kernel.arg_names.index(k),): v for k, v in constants.items()})
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
