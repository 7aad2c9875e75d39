"""Where a run's batches come from, and what its backbone is worth on the way: images, or any other kind of data."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from fast_essl.config import Config
from fast_essl.evaluate_run import EvaluationSplits, count_classes, open_split
from fast_essl.transformations import config_transformations
from loaders.batch import Views
from loaders.views import resolve_view_stage


class Loader(Protocol):
    """What the training loop asks of a loader: this rank's part of micro-batches of batch_size / accumulate samples."""

    def __len__(self) -> int:
        """Micro-batches an epoch: steps, without accumulation."""

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Any]:
        """The batches of an epoch from number `start_step` on, as `make_views` takes them.

        What it holds is freed with the generator.
        """


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the training loop is fed with."""

    loader: Loader
    make_views: Callable[[Any], Views]
    """A batch of the loader, on the training device, to what the method takes."""
    evaluate: Callable[[nn.Module], dict[str, float]]
    """The online evaluation of a backbone, {metric: value}, written to metrics.jsonl; all ranks call it."""
    digest: str
    """Names the data's content; a run is only continued on the same."""
    num_classes: int


class Stages:
    """Loaders of the same images as one: each serves the epochs from its first on, up to the next one's."""

    def __init__(self, loaders: Sequence[Any], first_epochs: Sequence[int]) -> None:
        """Take them in the order of their epochs; the first one's is 0."""
        self._loaders, self._first_epochs = loaders, first_epochs
        self.manifest, self.num_classes = loaders[0].manifest, loaders[0].num_classes

    def __len__(self) -> int:
        return len(self._loaders[0])

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Any]:
        """The batches of an epoch, from its stage's loader."""
        stage = bisect.bisect_right(self._first_epochs, epoch) - 1
        batches: Generator[Any] = self._loaders[stage].epoch(epoch, start_step=start_step)
        return batches


@contextlib.contextmanager
def image_source(config: Config, device: torch.device, dtype: torch.dtype) -> Iterator[Source]:
    """The configured images, open as long as the context is; evaluated by kNN on the test split.

    Errors: `ConfigError` and `DataError` for what cannot be opened or does not fit together.
    """
    recipes = config.crop_recipes()
    equivariance, invariance = config_transformations(config)
    if config.train.knn_every:
        count_classes(config)  # the online evaluation would find out only after an epoch
    with contextlib.ExitStack() as stack:
        # A loader's recipes are fixed when it compiles, hence one for each size.
        loaders = [
            stack.enter_context(contextlib.closing(open_split(config, "train", stage, shuffle=True)))
            for stage in config.stage_recipes()
        ]
        loader = Stages(loaders, (0, *config.views.size_epochs))
        splits = stack.enter_context(contextlib.closing(EvaluationSplits(config, device)))
        yield Source(
            loader=loader,
            make_views=partial(
                resolve_view_stage(config.data.view_stage, device),
                recipes=recipes,
                equivariance=equivariance,
                invariance=invariance,
                dtype=dtype,
            ),
            evaluate=lambda backbone: {"knn_top1": splits.knn_top1(backbone)},
            digest=loader.manifest.digest,
            num_classes=loader.num_classes,
        )
