"""The images and the device of a run, and the evaluation of its checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fast_essl.config import Config, ConfigError
from fast_essl.evaluate import extract_features, knn_accuracy
from loaders import open_loader
from loaders.batch import Crops, Views
from loaders.recipe import Recipe
from loaders.views import resolve_view_stage


def resolve_device(config: Config) -> tuple[torch.device, torch.dtype]:
    """Where a run computes and in which autocast type. Errors: `ConfigError` for what this machine cannot do."""
    wanted, precision = config.train.device, config.train.precision
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device = 'cuda': there is no CUDA device here; use 'auto' or 'cpu'")
    device = torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if precision not in ("auto", "fp32"):
            raise ConfigError(f"train.precision = {precision!r}: needs a CUDA device; use 'auto' or 'fp32'")
        return device, torch.float32
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return device, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def open_split(
    config: Config, split: Literal["train", "test"], recipes: tuple[Recipe, ...], *, shuffle: bool
) -> Any:
    """Open a split with the configured loader; without `shuffle` every sample once, in order, the last batch short.

    Errors: `DataError`; `ConfigError` for what the loader refuses.
    """
    path = config.data.train if split == "train" else config.data.test
    try:
        return open_loader(
            config.data.loader,
            path,
            recipes,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=config.data.num_workers,
        )
    except ValueError as error:
        raise ConfigError(f"{path}, opened with data.loader = {config.data.loader!r}: {error}") from None


def to_device(crops: Crops, device: torch.device) -> Crops:
    """Copy a batch without waiting for the device: only from pinned memory is the copy asynchronous."""
    if device.type == "cpu":
        return crops
    return dataclasses.replace(
        crops,
        images=tuple(image.pin_memory().to(device, non_blocking=True) for image in crops.images),
        labels=crops.labels.pin_memory().to(device, non_blocking=True),
        indices=crops.indices.pin_memory().to(device, non_blocking=True),
    )


class EvaluationSplits:
    """Both splits under the evaluation recipe; opened at first use and kept, since FFCV compiles for seconds."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config, self._device = config, device
        self._recipes = (config.views.evaluation(),)
        self._loaders: dict[str, Any] = {}

    def batches(self, split: Literal["train", "test"]) -> Iterator[Views]:
        """Every sample of a split once, in order, on the device."""
        if split not in self._loaders:
            self._loaders[split] = open_split(self._config, split, self._recipes, shuffle=False)
        make_views = resolve_view_stage(self._config.data.view_stage, self._device)
        with contextlib.closing(self._loaders[split].epoch(0)) as batches:
            for crops in batches:
                yield make_views(to_device(crops, self._device), self._recipes, rotate_last=False)

    def knn_top1(self, backbone: nn.Module) -> float:
        """The online evaluation."""
        bank, bank_labels = extract_features(backbone, self.batches("train"))
        queries, labels = extract_features(backbone, self.batches("test"))
        return float(knn_accuracy(bank, bank_labels, queries, labels))

    def close(self) -> None:
        """Close the loaders."""
        for loader in self._loaders.values():
            loader.close()
