"""EpochPlan: which samples each step holds and what is drawn for them, the same for every loader."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from loaders.batch import Crops
from loaders.order import epoch_order, rank_batches
from loaders.parameters import ViewParameters, draw_parameters
from loaders.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """The part of loading that touches no pixel.

    Errors: `ValueError` when the batch does not divide among the ranks, no step would be left, or the subset is none.
    """

    recipes: tuple[Recipe, ...]
    """One a crop."""
    heights: np.ndarray
    """(num_samples,) pixels."""
    widths: np.ndarray
    """(num_samples,) pixels."""
    labels: np.ndarray
    """(num_samples,) int64 class numbers."""
    batch_size: int
    """Samples a step over all ranks."""
    seed: int = 0
    """Of the order and of all draws, 64 bits."""
    shuffle: bool = True
    """A new permutation each epoch, or 0, 1, 2, …"""
    drop_last: bool = True
    """Leave out the last, smaller batch of an epoch."""
    rank: int = 0
    num_ranks: int = 1
    subset: np.ndarray | None = None
    """(M,) sample indices that an epoch visits, ascending; None means all. It changes no sample's views."""

    def __post_init__(self) -> None:
        if not self.recipes:
            raise ValueError("recipes: at least one is needed")
        if self.batch_size < 1 or self.batch_size % self.num_ranks:
            raise ValueError(
                f"batch_size = {self.batch_size}: must be a multiple of the {self.num_ranks} ranks"
            )
        chosen = self.subset
        if chosen is not None and (
            len(chosen) == 0
            or chosen[0] < 0
            or chosen[-1] >= len(self.labels)
            or (np.diff(chosen) <= 0).any()
        ):
            raise ValueError(f"subset: must be ascending indices, each once, below {len(self.labels)}")
        if self.num_steps == 0:
            raise ValueError(f"batch_size = {self.batch_size}: there are only {self.num_samples} samples")

    @property
    def num_samples(self) -> int:
        """Samples an epoch chooses from."""
        return len(self.labels if self.subset is None else self.subset)

    @property
    def num_steps(self) -> int:
        """Steps an epoch."""
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def batches(self, epoch: int, start_step: int = 0) -> list[np.ndarray]:
        """This rank's sample indices, one array a step, from `start_step` on."""
        order = epoch_order(self.num_samples, seed=self.seed, epoch=epoch, shuffle=self.shuffle)
        if self.subset is not None:
            order = self.subset[order]
        batches = rank_batches(
            order,
            batch_size=self.batch_size,
            rank=self.rank,
            num_ranks=self.num_ranks,
            drop_last=self.drop_last,
        )
        # A last batch of fewer samples than ranks leaves some ranks without one.
        return [batch for batch in batches[start_step:] if len(batch)]

    def parameters(self, epoch: int, indices: np.ndarray) -> ViewParameters:
        """The random choices for these samples, (N, V) for V recipes."""
        return draw_parameters(
            self.recipes,
            seed=self.seed,
            epoch=epoch,
            indices=indices,
            heights=self.heights[indices],
            widths=self.widths[indices],
        )

    def crops(self, epoch: int, indices: np.ndarray, images: tuple[torch.Tensor, ...]) -> Crops:
        """Put the pixels that a loader cut together with their labels and parameters."""
        return Crops(
            images=images,
            labels=torch.from_numpy(self.labels[indices]),
            indices=torch.from_numpy(indices),
            parameters=self.parameters(epoch, indices),
        )
