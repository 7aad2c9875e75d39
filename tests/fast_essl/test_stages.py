"""Views that grow over the epochs: each stage is a loader of its own size, and a run resumes in the middle of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fast_essl import run_folder
from fast_essl.checkpoint import load_file
from fast_essl.config import ConfigError
from fast_essl.config_io import load_config
from fast_essl.pretrain import pretrain
from fast_essl.source import image_source
from loaders import open_loader

STAGES = ["--views.sizes", "8", "12", "16", "--views.size-epochs", "1", "2"]


def test_each_stage_is_a_plain_loader_of_its_size(tiny_config: Path) -> None:
    """Pixels, order and random choices; only the size differs from the run without stages."""
    config = load_config(tiny_config, STAGES)
    options = {"batch_size": config.train.batch_size, "num_workers": 1}
    with image_source(config, torch.device("cpu"), torch.float32) as source:
        assert len(source.loader) == 4
        for epoch, size in ((0, 8), (1, 12), (2, 16), (7, 16)):
            recipes = config.crop_recipes()
            recipes = (*(replace(recipe, size=size) for recipe in recipes[:2]), recipes[2])
            expected = list(
                open_loader("torch", config.data.train, recipes, **options).epoch(epoch, start_step=1)
            )
            batches = list(source.loader.epoch(epoch, start_step=1))
            assert len(batches) == len(expected) == 3
            for crops, other in zip(batches, expected, strict=True):
                assert [images.shape[1] for images in crops.images] == [size, size, 8]
                assert all(torch.equal(*pair) for pair in zip(crops.images, other.images, strict=True))
                assert np.array_equal(crops.parameters.box, other.parameters.box)
            views = source.make_views(batches[0])
            assert [view.shape[2] for view in views.views] == [size, size]


def test_a_run_with_stages_resumes_in_the_middle_of_one(tiny_config: Path, tmp_path: Path) -> None:
    weights = []
    for name, stops in (("whole", ("0",)), ("parts", ("6", "0"))):
        for max_steps in stops:
            config = load_config(
                tiny_config, [*STAGES, "--train.knn-every", "0", "--train.max-steps", max_steps]
            )
            pretrain(config, tmp_path / name, show_progress=False)
        weights.append(load_file(tmp_path / name / run_folder.CHECKPOINT)["method"])
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (
            "--views.sizes 8 12 --views.size-epochs 1",
            r"views\.sizes = \(8, 12\): must be from 1 to 4096 pixels, the last one .* 16",
        ),
        ("--views.sizes 8 16", r"views\.size_epochs = \(\): must be ascending epochs above 0, one less"),
        (
            "--views.sizes 8 12 16 --views.size-epochs 2 1",
            r"views\.size_epochs = \(2, 1\): must be ascending",
        ),
        ("--views.size-epochs 2", r"views\.size_epochs = \(2,\): must be ascending"),
        (
            "--views.sizes 8 16 --views.size-epochs 1 --method.passes joint_all --views.transformed.size 16",
            r"'joint_all': needs inputs of one size; leave views\.sizes away",
        ),
    ],
)
def test_stages_that_do_not_fit_are_refused(tiny_config: Path, options: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        load_config(tiny_config, options.split())
