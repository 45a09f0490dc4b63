"""SSIM in Triton: one pass over the pictures forward, and one back.

Twin and oracle: ``kernels.ssim.plain_ssim_map``. The forward pass holds the five blurred values of a pixel in registers
and leaves the map and, where a gradient is wanted, what the map's value changes by per blurred value; the backward pass
blurs these by the transposed window. Mirrored borders are in the weights: row i of a band holds what pixel i takes of
its neighbours, 0 beyond the border, so that both passes read a window and no kernel knows of mirrors.

Shapes: B pictures, C channels, H height, W width, K window.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ppreid_dist.kernels.ssim import C1, C2, blur_matrix, shrunk


@triton.jit
def _forward(
    x_ptr,
    y_ptr,
    down_ptr,
    across_ptr,
    map_ptr,
    slopes_ptr,
    channels,
    height,
    width,
    C1: tl.constexpr,
    C2: tl.constexpr,
    K: tl.constexpr,
    SLOPES: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
):
    """A tile of one picture's map; slopes are (4, B, C, H, W): by blurred x, y, x² (or y²) and xy."""
    picture = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TH + tl.arange(0, TH)[:, None]
    j = tl.program_id(2) * TW + tl.arange(0, TW)[None, :]
    inside = (i < height) & (j < width)
    zero = tl.zeros((TH, TW), map_ptr.dtype.element_ty)
    total = zero
    for channel in range(channels):
        plane = (picture * channels + channel) * height * width
        x_mean, y_mean, xx, yy, xy = zero, zero, zero, zero, zero
        for a in range(K):
            row = i + (a - K // 2)
            row_weight = tl.load(down_ptr + i * K + a, mask=i < height, other=0.0)
            for b in range(K):
                column = j + (b - K // 2)
                seen = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                weight = row_weight * tl.load(across_ptr + j * K + b, mask=j < width, other=0.0)
                at = plane + row * width + column
                x = tl.load(x_ptr + at, mask=seen, other=0.0) - 0.5
                y = tl.load(y_ptr + at, mask=seen, other=0.0) - 0.5
                x_mean += weight * x
                y_mean += weight * y
                xx += weight * x * x
                yy += weight * y * y
                xy += weight * x * y
        x_light, y_light = x_mean + 0.5, y_mean + 0.5
        light = x_light * x_light + y_light * y_light + C1
        spread = (xx - x_mean * x_mean) + (yy - y_mean * y_mean) + C2
        light_like = 2 * x_light * y_light + C1
        spread_like = 2 * (xy - x_mean * y_mean) + C2
        value = light_like * spread_like / (light * spread)
        total += value
        if SLOPES:
            by_square = -value / spread
            by_product = 2 * light_like / (light * spread)
            by_light = 2 * spread_like / (light * spread)
            by_x = by_light * y_light - 2 * x_light * value / light - 2 * x_mean * by_square - y_mean * by_product
            by_y = by_light * x_light - 2 * y_light * value / light - 2 * y_mean * by_square - x_mean * by_product
            at = plane + i * width + j
            beyond = tl.num_programs(0).to(tl.int64) * channels * height * width
            tl.store(slopes_ptr + at, by_x, mask=inside)
            tl.store(slopes_ptr + beyond + at, by_y, mask=inside)
            tl.store(slopes_ptr + 2 * beyond + at, by_square, mask=inside)
            tl.store(slopes_ptr + 3 * beyond + at, by_product, mask=inside)
    tl.store(map_ptr + picture * height * width + i * width + j, total / channels, mask=inside)


@triton.jit
def _backward(
    x_ptr,
    y_ptr,
    down_ptr,
    across_ptr,
    slopes_ptr,
    gradient_ptr,
    x_gradient_ptr,
    y_gradient_ptr,
    channels,
    height,
    width,
    K: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
):
    """A tile of one channel's gradients: of x where ``X``, of y where ``Y``; the bands are the transposed window's."""
    number = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TH + tl.arange(0, TH)[:, None]
    j = tl.program_id(2) * TW + tl.arange(0, TW)[None, :]
    inside = (i < height) & (j < width)
    zero = tl.zeros((TH, TW), gradient_ptr.dtype.element_ty)
    by_x, by_y, by_square, by_product = zero, zero, zero, zero
    plane = number * height * width
    beyond = tl.num_programs(0).to(tl.int64) * height * width
    for a in range(K):
        row = i + (a - K // 2)
        row_weight = tl.load(down_ptr + i * K + a, mask=i < height, other=0.0)
        for b in range(K):
            column = j + (b - K // 2)
            seen = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = row_weight * tl.load(across_ptr + j * K + b, mask=j < width, other=0.0)
            near = row * width + column
            weight *= tl.load(gradient_ptr + (number // channels) * height * width + near, mask=seen, other=0.0)
            if X:
                by_x += weight * tl.load(slopes_ptr + plane + near, mask=seen, other=0.0)
            if Y:
                by_y += weight * tl.load(slopes_ptr + beyond + plane + near, mask=seen, other=0.0)
            by_square += weight * tl.load(slopes_ptr + 2 * beyond + plane + near, mask=seen, other=0.0)
            by_product += weight * tl.load(slopes_ptr + 3 * beyond + plane + near, mask=seen, other=0.0)
    at = plane + i * width + j
    x = tl.load(x_ptr + at, mask=inside, other=0.0) - 0.5
    y = tl.load(y_ptr + at, mask=inside, other=0.0) - 0.5
    if X:
        tl.store(x_gradient_ptr + at, (by_x + 2 * x * by_square + y * by_product) / channels, mask=inside)
    if Y:
        tl.store(y_gradient_ptr + at, (by_y + 2 * y * by_square + x * by_product) / channels, mask=inside)


class _SSIM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, y_BCHW: Tensor, window: int, sigma: float, tile: tuple[int, int], slopes: bool
    ) -> Tensor:
        batch, channels, height, width = x_BCHW.shape
        map_B1HW = x_BCHW.new_empty(batch, 1, height, width)
        slopes_4BCHW = x_BCHW.new_empty(4, *x_BCHW.shape) if slopes else map_B1HW
        ctx.bands = [_bands(size, window, sigma, x_BCHW.dtype, x_BCHW.device) for size in (height, width)]
        (down_HK, _), (across_WK, _) = ctx.bands
        if x_BCHW.numel():
            _forward[(batch, triton.cdiv(height, tile[0]), triton.cdiv(width, tile[1]))](
                x_BCHW, y_BCHW, down_HK, across_WK, map_B1HW, slopes_4BCHW, channels, height, width,
                C1=C1, C2=C2, K=window, SLOPES=slopes, TH=tile[0], TW=tile[1],
            )  # fmt: skip
        if slopes:
            ctx.save_for_backward(x_BCHW, y_BCHW, slopes_4BCHW)
        ctx.window, ctx.tile = window, tile
        return map_B1HW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        x_BCHW, y_BCHW, slopes_4BCHW = ctx.saved_tensors
        batch, channels, height, width = x_BCHW.shape
        of_x, of_y = ctx.needs_input_grad[:2]
        x_gradient = torch.empty_like(x_BCHW) if of_x else None
        y_gradient = torch.empty_like(y_BCHW) if of_y else None
        (_, down_HK), (_, across_WK) = ctx.bands
        tile_h, tile_w = ctx.tile
        if x_BCHW.numel():
            _backward[(batch * channels, triton.cdiv(height, tile_h), triton.cdiv(width, tile_w))](
                x_BCHW, y_BCHW, down_HK, across_WK, slopes_4BCHW, gradients[0].contiguous(),
                x_BCHW if x_gradient is None else x_gradient, y_BCHW if y_gradient is None else y_gradient,
                channels, height, width, K=ctx.window, X=of_x, Y=of_y, TH=tile_h, TW=tile_w,
            )  # fmt: skip
        return x_gradient, y_gradient, None, None, None, None


def ssim_map(
    x_BCHW: Tensor, y_BCHW: Tensor, *, window: int = 11, sigma: float = 1.5, tile: tuple[int, int] = (16, 32)
) -> Tensor:
    """``kernels.ssim.ssim_map``, differentiable once; computed in float32, or in float64 where the pictures are.

    ``tile`` is what one program computes, rows and columns, powers of two.
    """
    dtype = torch.float64 if x_BCHW.dtype == torch.float64 else torch.float32
    window = shrunk(window, x_BCHW)
    slopes = torch.is_grad_enabled() and (x_BCHW.requires_grad or y_BCHW.requires_grad)
    return _SSIM.apply(x_BCHW.to(dtype).contiguous(), y_BCHW.to(dtype).contiguous(), window, sigma, tile, slopes)


@lru_cache(maxsize=64)
def _bands(size: int, window: int, sigma: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What pixel i of a line takes of pixel i + k - window // 2, (size, K), in the blur and in its transpose."""
    blur = blur_matrix(size, window, sigma)
    source_LK = torch.arange(size)[:, None] + torch.arange(window) - window // 2
    inside_LK = (source_LK >= 0) & (source_LK < size)
    one, other = (
        (m.gather(1, source_LK.clamp(0, size - 1)) * inside_LK).to(device, dtype).contiguous() for m in (blur, blur.T)
    )
    return one, other
