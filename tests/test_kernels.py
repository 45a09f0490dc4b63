"""Which kernel is chosen, and that each gives what its plain twin gives; on GPUs tests/test_gpu.py compares them."""

import logging
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppreid_dist.errors import ConfigError
from ppreid_dist.experiment import FREE, Config, train
from ppreid_dist.kernels import choice, nearer
from ppreid_dist.kernels.batch_hard import hardest, hardest_at_once, hardest_by_tiles
from ppreid_dist.kernels.choice import Choice, KernelsConfig, using
from ppreid_dist.settings import load_settings, to_dict

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton isn't installed")


# --- the choice


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, fresh_kernels: None) -> set[str]:
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
    installed |= {"triton", "apex", "amp_C", "xentropy_cuda"}
    choice._choose.cache_clear()
    assert chosen(CPU) == cpu | {"nearer": "screened"} and chosen(CUDA) == cpu | {"nearer": "plain"}
    assert "Triton only where asked for" in choice.of("ssim", CUDA).why
    assert "Apex only where asked for" in choice.of("adam", CUDA).why
    assert choice.of("batch_hard", CPU, distances=choice.TILED_FROM + 1).implementation == "tiled"


def test_what_is_asked_for_is_taken_where_it_can_run(installed: set[str]) -> None:
    installed |= {"triton", "apex", "amp_C", "xentropy_cuda"}
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
        (
            {"cross_entropy": "apex"},
            CUDA,
            {"apex", "amp_C"},
            "kernels.cross_entropy: apex can't run here: NVIDIA Apex was built without its xentropy (APEX_XENTROPY=1)",
        ),
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
    assert [r.getMessage() for r in caplog.records] == [f"{message}; using {usual[operation]} instead"]
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


def test_a_kernel_that_fails_at_first_use_is_not_taken(monkeypatch: pytest.MonkeyPatch, fresh_kernels: None) -> None:
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


def test_many_distances_are_never_held_at_once(monkeypatch: pytest.MonkeyPatch, fresh_kernels: None) -> None:
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
