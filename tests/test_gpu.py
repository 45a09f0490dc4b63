"""What only a GPU can show; `pytest -m gpu` runs all of it. Each test has a plain twin that runs everywhere."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ppreid_dist.data.augment import AugmentConfig, augment
from ppreid_dist.data.decode import Decoder
from ppreid_dist.evaluation.ranking import rank_queries
from ppreid_dist.experiment import Config, train
from ppreid_dist.kernels.kernel_ridge import fit
from ppreid_dist.kernels.ssim import ssim_map
from ppreid_dist.settings import load_settings
from ppreid_dist.training.tracking import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]


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
    assert all(np.isfinite(row["loss/identity"]) for row in rows if "loss/identity" in row)


def test_batchnorm_is_torch_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from ppreid_dist.models import batchnorm

    monkeypatch.setattr(batchnorm, "world_size", lambda: 2)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).cuda()
    assert isinstance(batchnorm.convert_batchnorm(net)[1], nn.SyncBatchNorm)
