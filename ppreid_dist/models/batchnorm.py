"""BatchNorm over the batches of all processes, so that training doesn't depend on how many there are."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ppreid_dist.distributed import sum_over_ranks, world_size


class SummedBatchNorm(_BatchNorm):
    """BatchNorm of the global batch by one differentiable all-reduce; any device, any number of rows a rank.

    ``nn.SyncBatchNorm`` does this on GPUs alone. The sums are fp64: in fp32 a small variance about a large mean
    would drown. Running variances are unbiased over the global batch, as torch's are.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        axes, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
        x32 = x.float()
        own_var, own_mean = (value.double() for value in torch.var_mean(x32, axes, correction=0))
        rows = own_mean.new_full((1,), x.numel() / x.shape[1])
        sums = sum_over_ranks(torch.cat([rows, rows * own_mean, rows * (own_var + own_mean.square())]))
        count, (total, squares) = sums[0], sums[1:].chunk(2)
        mean = total / count
        var = squares / count - mean.square()
        self._remember(mean.detach(), (var * count / (count - 1)).detach())
        scale = (var + self.eps).rsqrt().float() * self.weight
        return ((x32 - mean.float().view(shape)) * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    def _remember(self, mean: Tensor, unbiased_var: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(unbiased_var.to(self.running_var), share)


def convert_batchnorm(module: nn.Module) -> nn.Module:
    """``module`` with every BatchNorm layer in it synchronised, in place, if there is more than one process.

    Parameters, buffers and the keys of the state stay the same. A module already on a GPU gets torch's fused
    ``SyncBatchNorm``, any other one ours, so move it to its device first.
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
