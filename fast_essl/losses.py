"""The self-supervised losses, over the samples of all ranks; see `distributed` for why the gradients are right.

All take embeddings of this rank's samples and return a scalar: the contrastive losses the mean over these samples, so
that the mean over ranks is that of the batch; Barlow Twins' the loss of the whole batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fast_essl.distributed import gather_rows, num_ranks, rank, sum_over_ranks

NORM_EPSILON = 1e-5
"""Added to the variance, as BatchNorm does."""


def info_nce(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """InfoNCE with cross-view negatives only, the mean of both directions.

    Each embedding of one view is to be told, among all of the other view, as that of its own image. Embeddings are
    normalised here. A rank compares its own samples with those of all ranks.

    Args: `z1`, `z2` (N, E) embeddings of the two views; `temperature` divides the cosine similarities.
    Returns: scalar, nats.
    Source: van den Oord et al. 2018, as in the official release of E-SSL (CIFAR-10 T 0.5, ImageNet T 0.2).
    """
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    labels = torch.arange(len(z1), device=z1.device) + rank() * len(z1)
    forwards = F.cross_entropy(z1 @ gather_rows(z2).T / temperature, labels)
    backwards = F.cross_entropy(z2 @ gather_rows(z1).T / temperature, labels)
    return (forwards + backwards) / 2


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent: each view is to be told as its image's other one among all other views of the batch, of both kinds.

    Args, returns: as `info_nce`.
    Source: Chen et al., "A Simple Framework for Contrastive Learning", ICML 2020, equation 1.
    """
    num = len(z1)
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    all1, all2 = gather_rows(z1), gather_rows(z2)
    logits = torch.cat([z1, z2]) @ torch.cat([all1, all2]).T / temperature
    own = torch.arange(num, device=z1.device) + rank() * num
    rows = torch.arange(2 * num, device=z1.device)
    # No view is its own negative.
    itself = torch.zeros_like(logits, dtype=torch.bool)
    itself[rows, torch.cat([own, own + len(all1)])] = True
    return F.cross_entropy(logits.masked_fill(itself, float("-inf")), torch.cat([own + len(all1), own]))


def classification(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy, nats, and accuracy of (M, C) logits against (M,) int64 labels; at least in fp32.

    Returns: (loss, accuracy), scalars; no gradient passes the accuracy.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    accuracy = (logits.detach().argmax(dim=1) == labels).float().mean()
    return F.cross_entropy(logits, labels), accuracy


def block_labels(num_rows: int, num_classes: int, device: torch.device) -> Tensor:
    """(num_rows,) int64 labels of block order: 0, …, 0, 1, …, 1, …"""
    return torch.arange(num_classes, device=device).repeat_interleave(num_rows // num_classes)


def negative_cosine(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """SimSiam's loss: each view's prediction against the other's embedding, which no gradient reaches.

    Args: `p1`, `p2` (N, E) predictor outputs; `z1`, `z2` (N, E) projector outputs.
    Returns: scalar in [-1, 1].
    Source: Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021, equation 4.
    """
    one = F.cosine_similarity(p1, z2.detach(), dim=1).mean()
    other = F.cosine_similarity(p2, z1.detach(), dim=1).mean()
    return -(one + other) / 2


def barlow_twins(z1: Tensor, z2: Tensor, off_diagonal_weight: float) -> Tensor:
    """Barlow Twins: the cross-correlation of the views' embeddings is to be the identity.

    Embeddings are normalised here over the batch of all ranks.

    Args: `z1`, `z2` (N, E) embeddings of the two views; `off_diagonal_weight` λ_off.
    Returns: scalar: Σ (c_ii - 1)² + λ_off · Σ_{i≠j} c_ij².
    Source: Zbontar et al., ICML 2021, equation 1. Where the official release sums the correlation over ranks outside of
    the graph, which makes its gradients 1/R of the batch's, here they are the batch's.
    """
    num = len(z1) * num_ranks()
    correlation = sum_over_ranks(_standardised(z1, num).T @ _standardised(z2, num)) / num
    squares = (correlation - torch.eye(len(correlation), dtype=z1.dtype, device=z1.device)).square()
    on_diagonal = squares.diagonal().sum()
    # Summed by themselves: as a difference of sums they would drown in the rounding.
    off_diagonal = _without_diagonal(squares).sum()
    return on_diagonal + off_diagonal_weight * off_diagonal


def _without_diagonal(square: Tensor) -> Tensor:
    """(E, E) → (E - 1, E), a view of all but the diagonal."""
    size = len(square)
    return square.flatten()[1:].view(size - 1, size + 1)[:, :-1]


def _standardised(z: Tensor, num: int) -> Tensor:
    """(N, E) to mean 0 and variance 1 over the `num` samples of all ranks."""
    centred = z - sum_over_ranks(z.sum(dim=0)) / num
    variance = sum_over_ranks(centred.square().sum(dim=0)) / num
    return centred * (variance + NORM_EPSILON).rsqrt()


def dos_error(predicted: Tensor, target: Tensor, *, start: int = 100) -> Tensor:
    """Relative error of densities of states: Σ|predicted - target| / Σ|target| over the frequencies, mean of samples.

    Args: `predicted`, `target` (N, F); the frequencies before `start`, where all samples are alike, do not count.
    Returns: scalar.
    Source: paper, section 6, as in its official release.
    """
    predicted, target = predicted[:, start:], target[:, start:]
    return ((predicted - target).abs().sum(dim=1) / target.abs().sum(dim=1)).mean()
