"""The self-supervised losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """InfoNCE with cross-view negatives only, the mean of both directions.

    Each embedding of one view is to be told, among all of the other view, as that of its own image. Embeddings are
    normalised here.

    Args: `z1`, `z2` (N, E) embeddings of the two views; `temperature` divides the cosine similarities.
    Returns: scalar, nats.
    Source: van den Oord et al. 2018, as in the official release of E-SSL (CIFAR-10 T 0.5, ImageNet T 0.2).
    """
    logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / temperature
    labels = torch.arange(len(z1), device=z1.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
