"""The device loader: the reference's crops, from images that stay where the training is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from support import photograph

from loaders import device_loader, open_loader
from loaders.beton import read_tables
from loaders.cut import resize_crop
from loaders.device_loader import resize_weights, resized_crops
from loaders.errors import DataError
from loaders.parameters import draw_parameters
from loaders.recipe import Recipe

RECIPES = (
    Recipe(size=32, scale=(0.08, 1.0)),
    Recipe(size=48, scale=(0.2, 1.0), interpolation="bilinear"),
    Recipe(size=16, scale=(0.05, 0.14), interpolation="bilinear"),
    Recipe.evaluation(20, 0.8),
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_crops_are_the_reference_loaders(photo_beton, device):
    """A whole epoch, its last batch short: order, boxes and labels; pixels up to Pillow's second rounding."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    options = {"batch_size": 32, "seed": 5, "drop_last": False, "num_workers": 1}
    ours = list(open_loader("device", photo_beton, RECIPES, device=device, **options).epoch(1))
    expected = list(open_loader("torch", photo_beton, RECIPES, **options).epoch(1))
    assert [len(crops.labels) for crops in ours] == [32, 32, 6]
    for crops, other in zip(ours, expected, strict=True):
        assert torch.equal(crops.indices, other.indices) and torch.equal(crops.labels, other.labels)
        assert np.array_equal(crops.parameters.jitter, other.parameters.jitter)
        for images, wanted in zip(crops.images, other.images, strict=True):
            assert images.device.type == device and images.dtype == torch.uint8 and images.is_contiguous()
            difference = (images.cpu().int() - wanted.int()).abs()
            assert difference.max() <= 2 and difference.float().mean() < 0.3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [1, 7, 32, 50])
def test_a_crop_is_the_compiled_ones(interpolation, size):
    """The cut of the FFCV loader rounds once, as here: no level apart but where a sum ends on a half."""
    count, height, width = 40, 45, 37
    images = torch.stack([torch.from_numpy(np.array(photograph(n, height, width))) for n in range(count)])
    recipe = Recipe(size=size, scale=(0.01, 1.0), interpolation=interpolation)
    sides = np.full(count, height), np.full(count, width)
    parameters = draw_parameters(
        (recipe,), seed=3, epoch=0, indices=np.arange(count), heights=sides[0], widths=sides[1]
    )
    boxes = parameters.box[:, 0]
    ours = resized_crops(images, torch.from_numpy(boxes), size, interpolation)
    expected = np.empty((count, size, size, 3), np.uint8)
    for n in range(count):
        resize_crop(images[n].numpy(), boxes[n].astype(np.int64), interpolation == "bicubic", expected[n])
    difference = np.abs(ours.numpy().astype(int) - expected)
    assert difference.max() <= 1 and difference.mean() < 0.01


def test_weights_stay_in_the_interval_and_add_up_to_one():
    start, length = torch.tensor([0.0, 5.0, 11.0]), torch.tensor([12.0, 3.0, 1.0])
    weights = resize_weights(start, length, 12, 4, "bicubic")
    assert weights.shape == (3, 4, 12)
    assert torch.allclose(weights.sum(dim=2), torch.ones(3, 4))
    for n in range(3):
        outside = [x for x in range(12) if not start[n] <= x < start[n] + length[n]]
        assert (weights[n][:, outside] == 0).all()
    assert (weights[2][:, 11] == 1).all()


def test_an_epoch_goes_on_from_a_step(photo_beton):
    loader = open_loader("device", photo_beton, RECIPES[:1], batch_size=16, seed=2)
    whole, rest = list(loader.epoch(3)), list(loader.epoch(3, start_step=2))
    assert len(whole) == len(loader) == 4 and len(rest) == 2
    assert all(torch.equal(a.images[0], b.images[0]) for a, b in zip(whole[2:], rest, strict=True))
    loader.close()
    with pytest.raises(ValueError, match="is closed"):
        next(loader.epoch(0))


def test_what_does_not_fit_into_memory_is_refused(photo_beton, monkeypatch):
    monkeypatch.setattr(device_loader, "_free_bytes", lambda device: 2**20)
    with pytest.raises(
        DataError, match=r"photos.*\.beton: 70 images of .* GiB, and cpu has 0\.0 GiB left; choose .*'ffcv'"
    ):
        open_loader("device", photo_beton, RECIPES, batch_size=16)


def test_a_damaged_image_is_named(photo_beton, tmp_path):
    path = tmp_path / "copy.beton"
    path.write_bytes(photo_beton.read_bytes())
    path.with_name("copy.beton.json").write_bytes(
        photo_beton.with_name(f"{photo_beton.name}.json").read_bytes()
    )
    tables = read_tables(path)
    with open(path, "r+b") as file:
        file.seek(int(tables.data_ptrs[3]))
        file.write(bytes(int(tables.data_sizes[3])))
    with pytest.raises(DataError, match=r"copy\.beton: sample 3 does not match its checksum"):
        open_loader("device", path, RECIPES, batch_size=16)


def test_pillow_agrees_on_one_obvious_crop(tmp_path):
    """A quarter of a picture at its own size is that quarter."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    box = torch.tensor([[8, 0, 8, 8]])
    crop = resized_crops(torch.from_numpy(pixels), box, 8, "bilinear")
    assert np.array_equal(crop[0].numpy(), np.asarray(Image.fromarray(pixels[0]).crop((0, 8, 8, 16))))
