"""SSIM, PSNR and L1 against torchmetrics and plain loops."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from ppreid_dist.errors import DataError
from ppreid_dist.evaluation.images import scores
from ppreid_dist.kernels.ssim import ssim_map


def pictures(n=3, height=40, width=24, seed=0, dtype=torch.float32):
    """Smooth-ish pictures and noisy copies, so that SSIM takes values from near 0 to near 1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 4, generator=generator, dtype=dtype)
    x = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    noise = torch.randn(x.shape, generator=generator, dtype=dtype) * torch.linspace(0, 0.3, width, dtype=dtype)
    return x, (x + noise).clamp(0, 1)


def ssim_at(x_CHW, y_CHW, row, column, window=11, sigma=1.5):
    """SSIM at a pixel by the formula's letter: weighted means, variances and covariance over the mirrored window."""
    values = []
    height, width = x_CHW.shape[1:]
    for x, y in zip(x_CHW.astype(np.float64), y_CHW.astype(np.float64), strict=True):
        samples = []
        for i in range(-(window // 2), window // 2 + 1):
            for j in range(-(window // 2), window // 2 + 1):
                r, c = abs(row + i), abs(column + j)
                r, c = (2 * (height - 1) - r if r >= height else r), (2 * (width - 1) - c if c >= width else c)
                samples.append((math.exp(-(i * i + j * j) / (2 * sigma**2)), x[r, c], y[r, c]))
        w, a, b = np.array(samples).T
        w /= w.sum()
        ma, mb = (w * a).sum(), (w * b).sum()
        va, vb, cov = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
        values.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return np.mean(values)


def test_ssim_equals_the_formula_at_corners_borders_and_inside():
    x, y = pictures()
    result = ssim_map(x, y)
    assert result.shape == (3, 1, 40, 24)
    for row, column in [(0, 0), (39, 23), (0, 12), (17, 2), (20, 12), (30, 23)]:
        for n in range(3):
            expected = ssim_at(x[n].numpy(), y[n].numpy(), row, column)
            assert float(result[n, 0, row, column]) == pytest.approx(expected, abs=5e-5)


def test_ssim_equals_torchmetrics_inside():
    x, y = pictures(dtype=torch.float64)
    _, full = structural_similarity_index_measure(x, y, data_range=1.0, return_full_image=True)
    inside = (..., slice(5, -5), slice(5, -5))
    torch.testing.assert_close(ssim_map(x, y)[inside], full.mean(1, keepdim=True)[inside], atol=1e-10, rtol=0)


def test_ssim_is_one_for_itself_and_shrinks_its_window():
    x, y = pictures(height=4, width=8)
    torch.testing.assert_close(ssim_map(x, x), torch.ones(3, 1, 4, 8))
    expected = ssim_at(x[0].numpy(), y[0].numpy(), 0, 1, window=3)
    assert float(ssim_map(x, y)[0, 0, 0, 1]) == pytest.approx(expected, abs=5e-5)
    assert torch.isfinite(ssim_map(x[..., :1, :1], y[..., :1, :1])).all()


def test_ssim_gradient():
    x, y = (t.requires_grad_() for t in pictures(n=1, height=7, width=5, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda a, b: ssim_map(a, b, window=5), (x, y))


def test_ssim_is_not_spoiled_by_low_precision_settings():
    x, y = pictures(n=1)
    exact = ssim_map(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ssim_map(x, y), exact)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        torch.testing.assert_close(ssim_map(x, y), exact, atol=5e-5, rtol=0)
    finally:
        torch.set_float32_matmul_precision(before)
    assert ssim_map(x.bfloat16(), y.bfloat16()).dtype == torch.float32


def test_scores_equal_plain_loops_over_the_mask():
    x, y = pictures(n=5)
    masks = torch.zeros(5, 1, 40, 24, dtype=torch.uint8)
    for n in range(4):
        masks[n, 0, 5 : 30 - n, 3 + n : 20] = 1  # the fifth has no person
    result = scores(x, y, masks, chunk=2)
    similarity = ssim_map(x, y).numpy()
    for n in range(4):
        squares, absolutes, similarities = [], [], []
        for r, c in zip(*np.nonzero(masks[n, 0].numpy()), strict=True):
            similarities.append(similarity[n, 0, r, c])
            for channel in range(3):
                difference = float(x[n, channel, r, c]) - float(y[n, channel, r, c])
                squares.append(difference**2)
                absolutes.append(abs(difference))
        assert result["ssim"][n] == pytest.approx(np.mean(similarities), abs=1e-5)
        assert result["psnr"][n] == pytest.approx(10 * math.log10(1 / np.mean(squares)), abs=1e-3)
        assert result["l1"][n] == pytest.approx(np.mean(absolutes), abs=1e-6)
    assert all(np.isnan(result[name][4]) for name in ("ssim", "psnr", "l1"))


def test_scores_of_whole_pictures_bytes_and_perfect_ones():
    x, y = pictures()
    real = (y * 255).round().to(torch.uint8)
    whole = scores(x, real)
    everything = scores(x, real.float() / 255, torch.ones(3, 1, 40, 24))
    for name in ("ssim", "psnr", "l1"):
        assert whole[name].dtype == np.float64
        np.testing.assert_allclose(whole[name], everything[name], rtol=1e-6)
    perfect = scores(x, x)
    for name, best in {"ssim": 1, "psnr": 100, "l1": 0}.items():
        np.testing.assert_allclose(perfect[name], best, rtol=1e-5)
    assert scores(x[:0], y[:0])["ssim"].shape == (0,)


def test_scores_refuse_what_does_not_fit():
    x, y = pictures()
    with pytest.raises(DataError, match="differ"):
        scores(x, y[:2])
    with pytest.raises(DataError, match="masks"):
        scores(x, y, torch.ones(3, 40, 24))
