"""BatchNorm over the batches of all processes, so that training doesn't depend on how many there are.

Shapes: B rows of this process, C channels.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ppreid_dist.distributed import world_size


class _NormaliseTogether(torch.autograd.Function):
    """Normalise by the statistics of all processes' rows: one all-reduce forward, one backward, both of 2C numbers.

    The passes over x are torch's fused ones. Written with elementary differentiable operations instead, MobileNetV2
    trained three times slower on two processes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes = [0, *range(2, x.ndim)]
        rows = x.numel() / x.shape[1]
        # Sums over ranks in fp64, and the variance in a second pass: by sums of squares a small variance about a large
        # mean would drown. (torch.var_mean is one pass and on CPUs takes four times as long as both.)
        sums = torch.cat([x.new_full((1,), rows), rows * x.mean(axes)]).double()
        dist.all_reduce(sums)
        count, mean = sums[:1], sums[1:] / sums[:1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        # Centred first: torch computes x * scale + shift, which for a large mean is a difference of large numbers.
        centred = x - mean.float().view(shape)
        var = rows * centred.square().mean(axes).double()
        dist.all_reduce(var)
        var = var / count
        var32 = var.float()
        zero = torch.zeros_like(var32)
        ctx.save_for_backward(centred, weight, zero, var32, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, count)
        return nn.functional.batch_norm(centred, zero, var32, weight, bias, training=False, eps=eps), mean, var, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        centred, weight, zero, var, count = ctx.saved_tensors
        # As if the statistics were constants: sum(g xhat) and sum(g) come with it, as the gradients of weight and bias.
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradients[0], centred, weight, zero, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([of_weight, of_bias]).double()
        dist.all_reduce(sums)
        g_xhat, g = (sums / count).float()
        # What flows through the statistics: - weight / std * (mean of g + xhat * mean of g xhat).
        inverse_std = (var + ctx.eps).rsqrt()
        slope, offset = weight * inverse_std.square() * g_xhat, weight * inverse_std * g
        shape = [1, -1] + [1] * (centred.ndim - 2)
        of_x = of_x.sub_(offset.view(shape)).addcmul_(centred, slope.view(shape), value=-1)
        return of_x, of_weight, of_bias, None


class SummedBatchNorm(_BatchNorm):
    """BatchNorm of the global batch by an all-reduce; any device, any number of rows a rank.

    ``nn.SyncBatchNorm`` does this on GPUs alone. Running variances are unbiased over the global batch, as torch's are.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        y, mean, var, count = _NormaliseTogether.apply(x.float(), self.weight, self.bias, self.eps)
        self._remember(mean, var * count / (count - 1))
        return y.to(x.dtype)

    def _remember(self, mean: Tensor, unbiased_var: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(unbiased_var.to(self.running_var), share)


def convert_batchnorm(module: nn.Module) -> nn.Module:
    """``module`` with every BatchNorm layer in it synchronised, in place, if there is more than one process.

    Parameters, buffers and the keys of the state stay the same. A module already on a GPU gets torch's fused
    ``SyncBatchNorm``, which waits for the device in every forward (docs/gpu.md); any other one ours, so move it to its
    device first.
    """
    if world_size() == 1:
        return module
    if any(parameter.is_cuda for parameter in module.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return _summed(module)
    for name, child in module.named_children():
        setattr(module, name, convert_batchnorm(child))
    return module


def _summed(norm: _BatchNorm) -> SummedBatchNorm:
    twin = SummedBatchNorm(norm.num_features, norm.eps, norm.momentum)
    twin.weight, twin.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers():
        twin.register_buffer(name, buffer)
    return twin.train(norm.training)
