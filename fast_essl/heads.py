"""Projector, predictor and prediction head: what stands on the features during pretraining."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from torch import nn

HeadForm = Literal["cifar_simclr", "cifar_simsiam", "imagenet"]
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


def prediction_head(
    num_features: int,
    *,
    hidden: int = 2048,
    form: HeadForm = "cifar_simclr",
    num_classes: int = 4,
    bottleneck: int = 128,
) -> nn.Sequential:
    """Features → logits over the elements of the transformation.

    Args: `num_classes` elements; `form`: `cifar_simclr` is two hidden layers with LayerNorm and ReLU, then the logits;
    `cifar_simsiam` lacks the second ReLU; `imagenet` has a linear `bottleneck` with LayerNorm before the logits.
    Source: the official release; the positions in the sequence are its, too.
    """
    first = [nn.Linear(num_features, hidden), nn.LayerNorm(hidden), nn.ReLU(inplace=True)]
    second: list[nn.Module] = [nn.Linear(hidden, hidden), nn.LayerNorm(hidden)]
    if form != "cifar_simsiam":
        second.append(nn.ReLU(inplace=True))
    if form == "imagenet":
        second += [nn.Linear(hidden, bottleneck), nn.LayerNorm(bottleneck)]
        hidden = bottleneck
    return nn.Sequential(*first, *second, nn.Linear(hidden, num_classes))
