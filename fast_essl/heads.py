"""Projector, predictor and prediction head: what stands on the features during pretraining."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fast_essl.config import ConfigError
from fast_essl.kernels import require_kernels
from fast_essl.losses import block_labels, classification
from fast_essl.nvidia_apex import fused_layer_norm_class

HeadForm = Literal["cifar_simclr", "cifar_simsiam", "imagenet"]
LayerNormBackend = Literal["torch", "triton", "apex"]
ProjectorNorm = Literal["plain", "affine", "none"]


def projector(
    num_features: int, *, hidden: int, out: int, num_layers: int = 2, norm: ProjectorNorm = "plain"
) -> nn.Sequential:
    """Features → embedding: linear layers without bias, BatchNorm and ReLU between them.

    Args: `norm` after the last layer: `plain` is BatchNorm without affine parameters (CIFAR-10 with two layers, SimSiam
    on ImageNet with three), `affine` with them (SimCLR on ImageNet), `none` leaves it to the loss (Barlow Twins).
    Source: the official release; the positions in the sequence are its, too.
    """
    sizes = [num_features] + [hidden] * (num_layers - 1) + [out]
    layers: list[nn.Module] = []
    for size, next_size in pairwise(sizes[:-1]):
        layers += [nn.Linear(size, next_size, bias=False), nn.BatchNorm1d(next_size), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(sizes[-2], out, bias=False))
    if norm != "none":
        layers.append(nn.BatchNorm1d(out, affine=norm == "affine"))
    return nn.Sequential(*layers)


def predictor(size: int, *, hidden: int = 512) -> nn.Sequential:
    """SimSiam's predictor: embedding → embedding through a narrow hidden layer (Chen and He, CVPR 2021)."""
    return nn.Sequential(
        nn.Linear(size, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, size),
    )


class PredictionHead(nn.Sequential):
    """Features → logits over the elements of the transformation, and the loss of them."""

    def __init__(self, *layers: nn.Module, backend: LayerNormBackend) -> None:
        """Put the layers together; `backend` computes the LayerNorms, and with `triton` the loss."""
        super().__init__(*layers)
        self.backend = backend
        last: Any = layers[-1]
        self.num_classes: int = last.out_features

    def check(self, device: torch.device) -> None:
        """Errors: `ConfigError` where the backend does not run on the device, or for a head of this size."""
        if self.backend == "apex" and device.type != "cuda":
            raise ConfigError("head.layer_norm = 'apex': needs a CUDA device; use 'torch'")
        if self.backend == "triton":
            require_kernels("head.layer_norm", device)
            from fast_essl.kernels.head_tail import check_size

            last: Any = self[-1]
            try:
                check_size(last.weight)
            except ValueError as error:
                raise ConfigError(f"head.layer_norm = 'triton': {error}; use 'torch'") from None

    def loss(self, features: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over the rows, and the share of them that is told right.

        Args: `features` (M, D); `labels` (M,) int64, or None for block order: the first M / C rows have label 0, ….
        Returns: (loss, accuracy), scalars, at least fp32; no gradient passes the accuracy.
        """
        if self.backend != "triton":
            logits = self(features)
            if labels is None:
                labels = block_labels(len(logits), logits.shape[1], logits.device)
            return classification(logits, labels)
        from fast_essl.kernels.head_tail import head_tail
        from fast_essl.kernels.layer_norm_relu import layer_norm_relu

        layers: list[Any] = list(self)
        last_norm = max(number for number, layer in enumerate(layers) if isinstance(layer, nn.LayerNorm))
        x = features
        for layer in layers[:last_norm]:
            if isinstance(layer, nn.LayerNorm):  # with the ReLU that stands behind all but the last
                x = layer_norm_relu(x, layer.weight, layer.bias, epsilon=layer.eps)
            elif isinstance(layer, nn.Linear):
                x = layer(x)
        norm, linear = layers[last_norm], layers[-1]
        relu = isinstance(layers[last_norm + 1], nn.ReLU)
        return head_tail(
            x, norm.weight, norm.bias, linear.weight, linear.bias, relu=relu, labels=labels, epsilon=norm.eps
        )


def prediction_head(
    num_features: int,
    *,
    hidden: int = 2048,
    form: HeadForm = "cifar_simclr",
    num_classes: int = 4,
    bottleneck: int = 128,
    backend: LayerNormBackend = "torch",
) -> PredictionHead:
    """Features → logits over the elements of the transformation.

    Args: `num_classes` elements; `form`: `cifar_simclr` is two hidden layers with LayerNorm and ReLU, then the logits;
    `cifar_simsiam` lacks the second ReLU; `imagenet` has a linear `bottleneck` with LayerNorm before the logits;
    `backend` computes the LayerNorms.
    Errors: `ConfigError` for a backend that is not installed.
    Source: the official release; the positions in the sequence are its, too.
    """
    layer_norm = fused_layer_norm_class() if backend == "apex" else nn.LayerNorm
    first = [nn.Linear(num_features, hidden), layer_norm(hidden), nn.ReLU(inplace=True)]
    second: list[nn.Module] = [nn.Linear(hidden, hidden), layer_norm(hidden)]
    if form != "cifar_simsiam":
        second.append(nn.ReLU(inplace=True))
    if form == "imagenet":
        second += [nn.Linear(hidden, bottleneck), layer_norm(bottleneck)]
        hidden = bottleneck
    return PredictionHead(*first, *second, nn.Linear(hidden, num_classes), backend=backend)
