"""What only a GPU can show; `pytest -m gpu` runs all of it. Each test has a plain twin that runs everywhere."""

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_devices
import torch
from commands import ATTACK, demo, ppreid
from PIL import Image
from torch import nn
from torch._dynamo.utils import counters

from ppreid_dist.data.augment import AugmentConfig, augment
from ppreid_dist.data.decode import Decoder
from ppreid_dist.errors import ConfigError
from ppreid_dist.evaluation.ranking import Entries, rank_in_parts, rank_queries
from ppreid_dist.experiment import Config, train
from ppreid_dist.kernels import choice
from ppreid_dist.kernels.batch_hard import hardest, hardest_at_once
from ppreid_dist.kernels.choice import KernelsConfig, using
from ppreid_dist.kernels.clip import clip_, total_norm
from ppreid_dist.kernels.kernel_ridge import fit
from ppreid_dist.kernels.ssim import plain_ssim_map, ssim_map
from ppreid_dist.losses.identity import IdentityConfig, identity_loss
from ppreid_dist.reporting.page import load_report
from ppreid_dist.settings import load_settings
from ppreid_dist.training.optimiser import OptimiserConfig, load_moments, make_optimiser, moments
from ppreid_dist.training.reversal import ReversalAdversary
from ppreid_dist.training.runner import Runner
from ppreid_dist.training.tracking import read_metrics
from ppreid_dist.transfer import exact_products

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """Convolutions and products round as the CPU's do: Adam's first steps take the sign of every gradient."""
    exact_products()
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    yield
    convolutions.fp32_precision = before


def test_nvjpeg_decodes_as_pillow_does() -> None:
    pytest.importorskip("nvidia.dali")
    rng, jpegs = np.random.default_rng(0), []
    for _ in range(8):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 4, 3), dtype=np.uint8))
        stream = io.BytesIO()
        coarse.resize((64, 128), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=92)
        jpegs.append(stream.getvalue())
    keys = [str(i) for i in range(8)]
    on_gpu = Decoder("dali-mixed", (64, 32), "cuda").decode(jpegs, keys)
    assert on_gpu.is_cuda
    on_cpu = Decoder("pillow", (64, 32), "cpu").decode(jpegs, keys)
    assert (on_gpu.cpu().float() - on_cpu.float()).abs().mean() < 1.5


def test_what_is_decoded_beside_a_busy_stream_is_right_and_the_same_in_any_batch() -> None:
    """Each batch is decoded while the GPU is still at the one before, whose memory it may get."""
    pytest.importorskip("nvidia.dali")
    rng, decoder = np.random.default_rng(1), Decoder("dali-mixed", (64, 32), "cuda")
    jpegs = []
    for _ in range(32):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (128, 64, 3), dtype=np.uint8)).save(stream, "JPEG", quality=92)
        jpegs.append(stream.getvalue())
    alone = torch.cat([decoder.decode([one], [str(i)]) for i, one in enumerate(jpegs)]).cpu()
    batches = []
    for first in [0, 8, 16, 24] * 4:
        torch.cuda._sleep(50_000_000)  # tens of milliseconds
        batches.append(decoder.decode(jpegs[first : first + 8], [str(i) for i in range(8)]))
    assert torch.equal(torch.cat(batches).cpu(), alone.repeat(4, 1, 1, 1))


def test_augmentation_is_the_cpu_s() -> None:
    images = torch.randint(0, 256, (6, 3, 32, 16), dtype=torch.uint8)
    arguments = {"config": AugmentConfig(), "seed": 3, "step": 5, "first_row": 2, "total_rows": 12}
    for here, there in zip(augment(images, **arguments), augment(images.cuda(), **arguments), strict=True):
        assert torch.equal(here, there.cpu())


def test_ranking_is_the_cpu_s_to_the_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    query, gallery = torch.randn(40, 64, generator=draw), torch.randn(300, 64, generator=draw)
    pids = {"query_pids": np.arange(40) % 10, "gallery_pids": np.arange(300) % 12}
    cameras = {"query_camids": np.arange(40) % 3, "gallery_camids": np.arange(300) % 4}
    here, there = (rank_queries(query.to(d), gallery.to(d), **pids, **cameras) for d in ("cpu", "cuda"))
    np.testing.assert_array_equal(here.ap_Q, there.ap_Q)


def test_closed_forms_are_the_cpu_s() -> None:
    draw = torch.Generator().manual_seed(0)
    features, targets = torch.randn(60, 16, generator=draw), torch.rand(60, 12, generator=draw)
    here, there = (
        fit(features.to(d), targets.to(d), width=1.0, ridge=0.01).predict(features.to(d)) for d in ("cpu", "cuda")
    )
    torch.testing.assert_close(here, there.cpu(), rtol=1e-8, atol=1e-8)
    x, y = torch.rand(2, 4, 3, 64, 32, generator=draw)
    torch.testing.assert_close(ssim_map(x, y), ssim_map(x.cuda(), y.cuda()).cpu(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_whole_game_trains(world: list[str], tmp_path: Path, precision: str) -> None:
    settings = [*world, f"output={tmp_path / 'run'}", f"engine.precision={precision}", "data.stream.backend=auto"]
    train(load_settings(Config, None, settings), progress=False)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [row["loss/identity"] for row in rows if "loss/identity" in row]
    assert losses and np.isfinite(losses).all()


@pytest.mark.parametrize("mode", ["snapshot", "one_step"])
def test_the_game_by_cuda_graphs_is_the_plain_one(world: list[str], tmp_path: Path, mode: str) -> None:
    losses = []
    torch._dynamo.reset()
    counters.clear()
    for compile in ("no", "reduce-overhead"):
        game = [f"engine.compile={compile}", "privacy.every=2", f"reversal.lazy.mode={mode}"]
        settings = [*world, f"output={tmp_path / compile}", *game]
        train(load_settings(Config, None, settings), progress=False)
        rows = read_metrics(tmp_path / compile / "metrics.jsonl")
        losses.append([row["loss/identity"] for row in rows if "loss/identity" in row])
    assert len(losses[0]) > 2 and counters["stats"]["unique_graphs"] > 0
    np.testing.assert_allclose(*losses, rtol=2e-2)


@pytest.mark.parametrize("placement", ["resident", "indexed"])
def test_a_round_never_waits_for_the_gpu(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: str
) -> None:
    """Plain rounds and rounds of the game, their pictures included, from the third on: nothing that the host asks for
    makes it wait, but where a reversal module catches up, which looks at errors."""
    play, catch_up, rounds = Runner._round, ReversalAdversary._until_plateau, []

    def watched(self: Runner) -> None:
        rounds.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(rounds) > 2 else "default")
        try:
            play(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def unwatched(self: ReversalAdversary, extractor: nn.Module, most: int) -> Any:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return catch_up(self, extractor, most)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    monkeypatch.setattr(Runner, "_round", watched)
    monkeypatch.setattr(ReversalAdversary, "_until_plateau", unwatched)
    settings = [f"data.stream.placement={placement}", "data.stream.backend=pillow"]
    train(load_settings(Config, None, [*world, f"output={tmp_path / 'run'}", *settings]), progress=False)
    assert len(rounds) > 2


def test_batchnorm_is_torch_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from ppreid_dist.models import batchnorm

    monkeypatch.setattr(batchnorm, "world_size", lambda: 2)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).cuda()
    assert isinstance(batchnorm.convert_batchnorm(net)[1], nn.SyncBatchNorm)


@pytest.mark.parametrize(("shape", "window"), [((2, 3, 33, 17), 11), ((1, 1, 7, 5), 11), ((3, 1, 64, 32), 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tritons_ssim_is_its_twin_s(shape: tuple[int, ...], window: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=draw, dtype=dtype)
    y = (x + 0.2 * torch.randn(shape, generator=draw, dtype=dtype)).clamp(0, 1)
    gradient = torch.randn(shape[0], 1, *shape[2:], generator=draw, dtype=dtype)
    exact_x, exact_y = (t.double().requires_grad_() for t in (x, y))
    exact = plain_ssim_map(exact_x, exact_y, window=window)
    twins = exact, *torch.autograd.grad(exact, (exact_x, exact_y), gradient.double())
    x, y = (t.cuda().requires_grad_() for t in (x, y))
    with using(KernelsConfig(ssim="triton", strict=True), x.device):
        result = ssim_map(x, y, window=window)
    rtol = 1e-4 if dtype == torch.float32 else 1e-10
    for our, twin in zip((result, *torch.autograd.grad(result, (x, y), gradient.cuda())), twins, strict=True):
        torch.testing.assert_close(our.cpu().double(), twin, rtol=rtol, atol=rtol * float(twin.detach().abs().max()))


@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (70, 3), (300, 130), (9000, 16)])
@pytest.mark.parametrize("form", ["triton", "tiled"])
def test_mining_is_the_cpu_s(rows: int, dim: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(choice, "TILED_FROM", 5000)
    draw = torch.Generator().manual_seed(0)
    # Small whole numbers: every distance is exact, and many tie.
    all_ND = torch.randint(-2, 3, (rows, dim), generator=draw).float()
    pids_N = torch.randint(0, max(2, rows // 4), (rows,), generator=draw)
    itself_B = torch.arange(rows)[-100:]
    given = all_ND[itself_B], all_ND, pids_N[itself_B], pids_N, itself_B
    here = hardest_at_once(given[0].double(), given[1].double(), *given[2:])
    with using(KernelsConfig(batch_hard=form, strict=True), torch.device("cuda")):
        there = hardest(*(t.cuda() for t in given))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("form", ["plain", "triton"])
def test_ranking_is_the_cpu_s(form: str) -> None:
    if form == "triton":
        pytest.importorskip("triton")
    draw, found = torch.Generator().manual_seed(0), []
    pids, cameras = np.arange(900) % 40, np.arange(900) % 5
    features = [torch.randint(-2, 3, (900, 70), generator=draw).float() for _ in range(2)]  # many ties
    for device, config in (("cpu", KernelsConfig()), ("cuda", KernelsConfig(nearer=form, strict=True))):
        asked, known = (Entries(features_ND=x.to(device), pids_N=pids, camids_N=cameras) for x in features)
        with using(config, torch.device(device)):
            found.append(rank_in_parts(asked, [lambda known=known: known]))
    np.testing.assert_array_equal(found[0].ap_Q, found[1].ap_Q)


@pytest.mark.parametrize("form", ["fused", "foreach", "apex"])
def test_steps_of_any_form_are_the_cpu_s(form: str) -> None:
    """Channels last, and on from the other device's moments; the identity loss and clipping by Apex, too, there."""
    config, weights = OptimiserConfig(lr=1e-2, weight_decay=0.1), []
    torch.manual_seed(0)
    x, labels = torch.rand(5, 3, 6, 6), torch.tensor([0, 1, 2, 0, 3])
    start = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 4))
    ways = [("cpu", KernelsConfig(adam="plain"))]
    apex = {"clip": "apex", "cross_entropy": "apex"} if form == "apex" else {}
    try:
        with using(KernelsConfig(adam=form, **apex, strict=True), torch.device("cuda")):
            ways.append(("cuda", KernelsConfig(adam=form, **apex)))
    except ConfigError as error:
        if form != "apex":
            raise
        pytest.skip(str(error))
    saved: dict[str, dict[str, torch.Tensor]] = {}
    for device, kernels in ways:
        net = copy.deepcopy(start).to(device, memory_format=torch.channels_last)
        with using(kernels, torch.device(device)):
            for part in range(2):
                optimiser = make_optimiser(list(net.parameters()), config)
                if part:
                    load_moments(optimiser, saved)
                for _ in range(3):
                    net.zero_grad()
                    identity_loss(net(x.to(device)), labels.to(device), IdentityConfig()).backward()
                    clip_(list(net.parameters()), 0.5, total_norm([p.grad for p in net.parameters()]))
                    optimiser.step()
                saved = {
                    n: {k: t.cpu().contiguous() for k, t in known.items()} for n, known in moments(optimiser).items()
                }
        weights.append([p.detach().cpu() for p in net.parameters()])
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_an_attack_by_two_processes_is_that_of_one(
    world: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each on a GPU of its own where there are two, both on one where there is one."""
    one, two = tmp_path / "one", tmp_path / "two"
    demo(world, one)
    runs = [word for role in ("control", "protected", "judge") for word in (f"--{role}", str(one / role))]
    ppreid("attack", *runs, "--out", str(two), "--processes", "2", "--no-estimate", *world, *ATTACK)
    assert "helper 1 ended" not in capfd.readouterr().err
    ppreid("report", str(two))
    found, again = (load_report(folder / "report.json")["axes"] for folder in (one, two))
    for axis, of in found.items():
        assert set(again[axis]["attackers"]) == set(of["attackers"])
        for role in ("protected", "control", "floor"):  # of the attacker that is no training by chance
            value = again[axis]["attackers"]["ridge"][role]
            assert value == pytest.approx(of["attackers"]["ridge"][role], abs=2e-3)


def test_every_attacker_and_re_ranking_run(world: list[str], tmp_path: Path) -> None:
    demo(world, tmp_path)
    runs = [word for role in ("control", "protected", "judge") for word in (f"--{role}", str(tmp_path / role))]
    backbone = next(word for word in world if word.startswith("model.backbone=")).split("=")[1]
    everybody = [*test_devices.ATTACK, f"attack.recogniser={{backbone: {backbone}, epochs: 1}}", "attack.rerank=true"]
    ppreid("attack", *runs, "--out", str(tmp_path / "all"), "--no-estimate", *world, *everybody)
    ppreid("report", str(tmp_path / "all"))
    found = load_report(tmp_path / "all" / "report.json")
    assert found["utility"]["matching"] == "re-ranked"
    assert set(found["axes"]["identity"]["attackers"]) == set(test_devices.ATTACKERS)
