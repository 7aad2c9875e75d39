"""What a run's backbone saw: the views of its first images, for the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from fast_essl.config import Config
from fast_essl.transformations import config_transformations
from loaders import open_loader
from loaders.batch import Views
from loaders.recipe import Recipe
from loaders.transformation import Transformation
from loaders.views.reference import make_views

MAX_COPIES = 8
"""Transformed copies shown of a sample; a jigsaw has 24."""


def sample_views(config: Config, num_samples: int) -> list[tuple[Any, ...]]:
    """The first images of a run's first step, as they were and as its views.

    Returns: for each, the class's name, then (S, S, 3) uint8: the evaluation image, both views and, where the run has
    an equivariance loss, the first of the third crop's transformed copies.
    """
    recipes, evaluation = config.crop_recipes(), config.views.evaluation()
    equivariance, invariance = config_transformations(config)
    if equivariance is not None:  # all copies are shown, also where a step sees one of them
        equivariance = replace(equivariance, one_copy=False)
    views, class_names = _first_batch(
        config, recipes, num_samples, equivariance=equivariance, invariance=invariance
    )
    originals, _ = _first_batch(config, (evaluation,), num_samples)
    columns = [_pixels(originals.views[0], evaluation)]
    columns += [_pixels(view, recipe) for view, recipe in zip(views.views, recipes, strict=False)]
    if views.transformed is not None:
        copies = _pixels(views.transformed, recipes[-1])
        columns += np.split(copies, len(copies) // num_samples)[:MAX_COPIES]
    names = [class_names[label] for label in views.labels.tolist()]
    return list(zip(names, *columns, strict=True))


def element_names(transformation: str, num_copies: int) -> list[str]:
    """What to call the first copies that a transformation makes."""
    if transformation == "four_fold_rotation":
        return [f"{90 * k}°" for k in range(num_copies)]
    return [f"copy {k}" for k in range(num_copies)]


def _first_batch(
    config: Config,
    recipes: tuple[Recipe, ...],
    num_samples: int,
    *,
    equivariance: Transformation | None = None,
    invariance: Transformation | None = None,
) -> tuple[Views, Sequence[str]]:
    # A sample's views do not depend on the loader or the batch it falls in: a small one shows what the run saw.
    loader = open_loader(
        "torch", config.data.train, recipes, batch_size=num_samples, seed=config.train.seed, num_workers=1
    )
    batches = loader.epoch(0)
    try:
        return make_views(
            next(batches), recipes, equivariance=equivariance, invariance=invariance
        ), loader.manifest.class_names
    finally:
        batches.close()
        loader.close()


def _pixels(images: torch.Tensor, recipe: Recipe) -> npt.NDArray[np.uint8]:
    """Normalised (N, 3, S, S) back to (N, S, S, 3) uint8."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.mean, recipe.std))
    levels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().numpy()


def png(image: npt.NDArray[np.uint8]) -> str:
    """(S, S, 3) as a PNG in a data URL."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
