"""BatchNorm over the samples of all ranks, as in the paper's ImageNet runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fast_essl.distributed import gather_rows, num_ranks


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> None:
    """Replace every BatchNorm in a module by one over all ranks, of the same parameters, buffers and names.

    For a CUDA device it is torch's `SyncBatchNorm`, which runs nowhere else; for the CPU the one below.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            on_cuda = device.type == "cuda"
            setattr(
                module,
                name,
                nn.SyncBatchNorm.convert_sync_batchnorm(child) if on_cuda else SyncBatchNorm(child),
            )
        else:
            synchronise_batch_norm(child, device)


class SyncBatchNorm(_BatchNorm):
    """BatchNorm by the mean and variance of all ranks' samples, each rank having as many; gradients pass the ranks."""

    def __init__(self, norm: _BatchNorm) -> None:
        """Take over the parameters and buffers of a BatchNorm."""
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, …) → the same shape and dtype; statistics are at least of float32."""
        if not self.training:
            mean, variance = self.running_mean, self.running_var
            return F.batch_norm(x, mean, variance, self.weight, self.bias, eps=self.eps)
        others = [dim for dim in range(x.ndim) if dim != 1]
        a_channel = [-1 if dim == 1 else 1 for dim in range(x.ndim)]
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        # Of means and variances over as many values each, not of sums of squares, in which small variances would drown.
        local = torch.stack(torch.var_mean(values, others, correction=0))
        variances, means = gather_rows(local[None]).unbind(dim=1)
        mean = means.mean(dim=0)
        variance = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        if self.track_running_stats:
            num = x.numel() // x.shape[1] * num_ranks()
            self._move_running_statistics(mean.detach(), variance.detach() * (num / (num - 1)))
        normed = (values - mean.view(a_channel)) * (variance + self.eps).rsqrt().view(a_channel)
        if self.affine:
            normed = normed * self.weight.view(a_channel) + self.bias.view(a_channel)
        return normed.to(x.dtype)

    def _move_running_statistics(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked += 1
