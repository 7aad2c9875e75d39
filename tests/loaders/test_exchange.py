"""Any loader with any view stage gives the same views of real photographs; each is exchanged for each."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from support import SHARED

from fast_essl.staging import to_device
from fast_essl.transformations import build_transformation
from loaders import LOADERS, open_loader
from loaders.convert import convert
from loaders.recipe import Recipe
from loaders.views import VIEW_STAGES, resolve_view_stage

VIEW = Recipe(size=64, scale=(0.08, 1.0), blur_p=0.5, solarize_p=0.2)
RECIPES = (VIEW, VIEW, Recipe(size=24, scale=(0.05, 0.14), interpolation="bilinear"))
STAGES = VIEW_STAGES[1:]
NUM_SHARED = 8
MEAN_LEVELS = 0.75
"""Of a view between loaders; 0.17 measured for FFCV, whose crops round otherwise, 0.38 for DALI, by its borders."""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """scikit-learn's two photographs, whole and in parts, and some of ImageNet where they are at hand."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "only").mkdir()
    for number, photo in enumerate(load_sample_images().images):
        for part, pixels in enumerate((photo, photo[:200, :300], photo[150:, 250:])):
            Image.fromarray(pixels).save(folder / "only" / f"{number}{part}.jpg", quality=93)
    shared = sorted((SHARED / "data" / "imagenet-sample").rglob("*.*"))
    for path in [path for path in shared if path.suffix.lower() in (".jpg", ".jpeg")][:NUM_SHARED]:
        (folder / "only" / path.name).write_bytes(path.read_bytes())
    convert(str(folder), folder / "real.beton", workers=1, progress=False)
    return folder / "real.beton"


def levels(views):
    """Both views and the copies in the order of the samples, before normalisation, in [0, 255]."""
    order = views.indices.argsort().cpu()
    copies = views.transformed.view(4, len(order), *views.transformed.shape[1:]).transpose(0, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (VIEW.mean, VIEW.std))
    return [(view.cpu().float() * std + mean)[order] * 255 for view in (*views.views, copies)]


@pytest.mark.device
def test_every_loader_with_every_view_stage(photographs):
    is_there = {
        "ffcv": importlib.util.find_spec("ffcv"),
        "dali": importlib.util.find_spec("nvidia.dali") if importlib.util.find_spec("nvidia") else None,
        "cuda": importlib.util.find_spec("triton"),
    }
    rotation = build_transformation("four_fold_rotation", size=24)
    made = {}
    for loader in (name for name in LOADERS if is_there.get(name, True)):
        options = {"decoder": "cpu"} if loader == "dali" else {}
        opened = open_loader(
            loader, photographs, RECIPES, batch_size=64, seed=3, drop_last=False, num_workers=1, **options
        )
        (crops,) = opened.epoch(2)
        for stage in (name for name in STAGES if is_there.get(name, True)):
            if stage == "cuda" and torch.cuda.is_available():
                batch = to_device(crops, torch.device("cuda"))
            else:
                batch = crops
            make_views = resolve_view_stage(stage, torch.device("cuda" if stage == "cuda" else "cpu"))
            made[loader, stage] = levels(make_views(batch, RECIPES, equivariance=rotation))
    assert len(made) >= 2
    for (loader, stage), views in made.items():
        for view, same_crops, same_stage in zip(
            views, made[loader, "reference"], made["torch", stage], strict=True
        ):
            assert (view - same_crops).abs().max() <= 1, (loader, stage)
            difference = (view - same_stage).abs().flatten(1).mean(dim=1)
            assert difference.max() <= MEAN_LEVELS, (loader, stage)
