"""The configuration's sections of the commands beside `pretrain`: probe, finetune, speedrun."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fast_essl.limits import (
    MAX_BATCH_SIZE,
    MAX_DECAY,
    MAX_EPOCHS,
    MAX_MINUTES,
    MAX_RATE,
    MAX_RUNS,
    MIN_RATE,
    require,
    require_range,
)
from loaders.recipe import MAX_SIDE, Interpolation


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """The linear probe on augmented images: SGD on a linear classifier over the frozen backbone (paper, section 4)."""

    size: int = 32
    """Side of the images, pixels."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the training crop's area; the crop is then flipped with probability 0.5."""
    center_fraction: float = 32 / 36
    """Side of the centred square of the test images, share of the shorter side (Resize 36, CenterCrop 32)."""
    interpolation: Interpolation = "bicubic"
    """Filter of the resize."""
    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 256
    """Samples a step."""
    optimizer: Literal["sgd", "lars"] = "sgd"
    """SGD, or LARS on weight and bias alike (the SimSiam paper's ImageNet probe)."""
    base_learning_rate: float = 30.0
    """Peak for 256 samples a batch; a cosine takes it to 0 without warm-up."""
    schedule: Literal["step", "epoch"] = "step"
    """Whether the learning rate moves each step, or once an epoch."""
    momentum: float = 0.9
    """Momentum."""
    weight_decay: float = 0.0
    """L2 penalty."""
    num_fits: int = 5
    """Independent fits, by their own seeds; their mean and spread are told."""

    def __post_init__(self) -> None:
        require(self, "size", 1 <= self.size <= MAX_SIDE, f"from 1 to {MAX_SIDE} pixels")
        require_range(self, "epochs", 1, MAX_EPOCHS)
        require_range(self, "batch_size", 1, MAX_BATCH_SIZE)
        require_range(self, "num_fits", 1, MAX_RUNS)
        require(self, "scale", 0 < self.scale[0] <= self.scale[1] <= 1, "0 < low <= high <= 1")
        require(self, "center_fraction", 0 < self.center_fraction <= 1, "above 0 and at most 1")
        require_range(self, "base_learning_rate", MIN_RATE, MAX_RATE)
        require(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")
        require_range(self, "weight_decay", 0, MAX_DECAY)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Semi-supervised fine-tuning: backbone and classifier trained on a share of the labels (paper, section 4).

    Images and crops are those of the probe.
    """

    label_share: float = 0.01
    """Share of each class's training images whose labels are used, at least one image a class (paper: 1% and 10%)."""
    epochs: int = 20
    """Passes over those images."""
    batch_size: int = 256
    """Samples a step."""
    base_learning_rate_backbone: float = 0.005
    """Peak for 256 samples a batch; a cosine takes it to 0, once an epoch."""
    base_learning_rate_classifier: float = 0.5
    """The same of the classifier."""
    momentum: float = 0.9
    """Momentum."""
    weight_decay: float = 0.0
    """L2 penalty."""
    num_fits: int = 1
    """Independent fits, each on its own draw of labelled images."""

    def __post_init__(self) -> None:
        require(self, "label_share", 0 < self.label_share <= 1, "above 0 and at most 1")
        require_range(self, "epochs", 1, MAX_EPOCHS)
        require_range(self, "batch_size", 1, MAX_BATCH_SIZE)
        require_range(self, "num_fits", 1, MAX_RUNS)
        require_range(self, "base_learning_rate_backbone base_learning_rate_classifier", MIN_RATE, MAX_RATE)
        require(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")
        require_range(self, "weight_decay", 0, MAX_DECAY)


@dataclass(frozen=True, kw_only=True)
class SpeedrunConfig:
    """What `fast-essl speedrun` measures: the time to an accuracy, or the accuracy after a time."""

    target: float = 0.0
    """kNN top-1 (k = 10, cosine, test split) that ends a run, share of 1; 0 for none: the budget ends it."""
    budget_minutes: float = 0.0
    """Training ends with the first step after so many minutes; 0 for no limit but train.epochs."""
    runs: int = 3
    """Runs, of the seeds train.seed, train.seed + 1, …"""
    source: str = ""
    """What data.train and data.test are converted from where they are missing, as by `fast-essl convert`."""

    def __post_init__(self) -> None:
        require(self, "target", 0 <= self.target <= 1, "a share from 0 to 1, as 0.9 for 90%")
        require_range(self, "budget_minutes", 0, MAX_MINUTES)
        require_range(self, "runs", 1, MAX_RUNS)
