"""Crops and Views: what travels from the loader to the view stage, and from there to the trainer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loaders.parameters import ViewParameters


@dataclass(frozen=True, kw_only=True)
class Crops:
    """One batch as a loader gives it: everything cut from one decode of each image."""

    images: tuple[torch.Tensor, ...]
    """One (N, S, S, 3) uint8 tensor a recipe, NHWC contiguous, RGB in [0, 255]; S is the recipe's size."""
    labels: torch.Tensor
    """(N,) int64 class numbers."""
    indices: torch.Tensor
    """(N,) int64 sample indices in the `.beton` file."""
    parameters: ViewParameters
    """(N, V) table of the random choices, one column a recipe; the boxes are already applied."""


@dataclass(frozen=True, kw_only=True)
class Views:
    """One batch as the view stage gives it to the trainer, on the training device."""

    views: tuple[torch.Tensor, ...]
    """(N, 3, S, S) each, normalised, channels-last, in the compute dtype."""
    transformed: torch.Tensor | None
    """(|G|·N, 3, s, s) transformed copies, channels-last, block-ordered: all samples by element 0, then 1, …"""
    transformed_labels: torch.Tensor | None
    """(|G|·N,) int64, the element of each copy."""
    labels: torch.Tensor
    """(N,) int64 class numbers."""
    indices: torch.Tensor
    """(N,) int64 sample indices."""


def uploaded(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, if it is a CUDA device; by way of pinned memory, so that nothing waits for the copy."""
    if tensor.is_cuda or device.type != "cuda":
        return tensor
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)
