"""The optimizer, in torch's fastest implementation for the device."""

from __future__ import annotations

import torch
from torch import nn


def build_sgd(
    module: nn.Module,
    *,
    learning_rate: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    decay_norms_and_biases: bool = True,
) -> torch.optim.SGD:
    """SGD with momentum over all parameters: fused on CUDA, multi-tensor elsewhere.

    Args: `decay_norms_and_biases` False leaves parameters of fewer than two dimensions without weight decay; the
    official release decays all on CIFAR-10.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": weight_decay if decay_norms_and_biases else 0.0},
    ]
    on_cuda = all(parameter.is_cuda for parameter in parameters)
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, fused=on_cuda, foreach=not on_cuda)
