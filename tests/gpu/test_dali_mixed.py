"""DALI's `mixed` decoder, nvJPEG, and crops cut on the GPU: near the reference loader's, and the consumer's own."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from support import photograph

from fast_essl.staging import staged
from loaders import open_loader
from loaders.beton import IMAGE_RAW, read_tables
from loaders.convert import convert
from loaders.errors import DataError
from loaders.recipe import Recipe
from loaders.views.reference import make_views

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RECIPES = (
    Recipe(size=48, scale=(0.08, 1.0)),
    Recipe(size=48, scale=(0.08, 1.0), interpolation="bilinear"),
    Recipe(size=24, scale=(0.05, 0.14), interpolation="bilinear"),
)
MEAN_LEVELS = 2.0
"""nvJPEG's inverse DCT and chroma are its own: a mean of one level a crop is usual, the resize adds 0.4 at most."""


@pytest.fixture(scope="module")
def open_dali():
    pytest.importorskip("nvidia.dali", reason="DALI is not installed", exc_type=ImportError)
    return partial(open_loader, "dali", num_workers=2)


def largest_means(batches, expected_batches):
    """The largest mean difference of a crop, levels, a batch."""
    for crops, expected in zip(batches, expected_batches, strict=True):
        assert torch.equal(crops.indices, expected.indices) and torch.equal(crops.labels, expected.labels)
        assert np.array_equal(crops.parameters.box, expected.parameters.box)
        for images, others in zip(crops.images, expected.images, strict=True):
            assert images.is_cuda and images.dtype == torch.uint8 and images.is_contiguous()
            assert images.shape == others.shape
            yield float((images.cpu().int() - others.int()).abs().flatten(1).float().mean(1).max())


@pytest.mark.parametrize("source", ["beton", "folder"])
def test_the_reference_loader_agrees(open_dali, photo_beton, photo_folder, source):
    path = photo_beton if source == "beton" else photo_folder
    options = {"batch_size": 32, "seed": 5, "drop_last": False}
    loader = open_dali(path, RECIPES, **options)
    assert loader.decoder == "mixed"  # what `auto` takes here
    reference = open_loader("torch", path, RECIPES, num_workers=1, **options)
    for epoch in range(2):
        assert max(largest_means(loader.epoch(epoch), reference.epoch(epoch))) <= MEAN_LEVELS
    whole, rest = list(loader.epoch(1)), list(loader.epoch(1, start_step=1))
    assert [len(crops.labels) for crops in whole] == [32, 32, 6]
    for crops, expected in zip(rest, whole[1:], strict=True):
        assert all(map(torch.equal, crops.images, expected.images))


def test_raw_pixels(open_dali, tmp_path):
    """No decoder, so that only the resize may differ."""
    for number in range(12):
        (tmp_path / "raw" / "all").mkdir(parents=True, exist_ok=True)
        photograph(number, 32, 32).save(tmp_path / "raw" / "all" / f"{number:02}.png")
    beton = tmp_path / "raw.beton"
    convert(str(tmp_path / "raw"), beton, workers=1, progress=False)
    assert (read_tables(beton).modes == IMAGE_RAW).all()
    options = {"batch_size": 5, "drop_last": False}
    loader = open_dali(beton, RECIPES, decoder="mixed", **options)
    reference = open_loader("torch", beton, RECIPES, num_workers=1, **options)
    assert max(largest_means(loader.epoch(0), reference.epoch(0))) <= 0.5


def test_raw_pixels_among_jpegs(open_dali, tmp_path):
    for number in range(12):
        (tmp_path / "mixed" / "all").mkdir(parents=True, exist_ok=True)
        kind = "jpeg" if number % 2 else "png"
        photograph(number, 32, 32).save(tmp_path / "mixed" / "all" / f"{number:02}.{kind}")
    beton = tmp_path / "mixed.beton"
    convert(str(tmp_path / "mixed"), beton, workers=1, progress=False)
    assert (read_tables(beton).modes == IMAGE_RAW).sum() == 6
    options = {"batch_size": 5, "drop_last": False}
    loader = open_dali(beton, RECIPES, decoder="mixed", **options)
    reference = open_loader("torch", beton, RECIPES, num_workers=1, **options)
    assert max(largest_means(loader.epoch(0), reference.epoch(0))) <= MEAN_LEVELS


def test_crops_stay_while_a_busy_stream_still_reads_them(open_dali, photo_beton):
    """Views are made on a stream of their own, after the loader has gone on: memory reused too early would show."""
    device = torch.device("cuda", torch.cuda.current_device())
    loader = open_dali(photo_beton, RECIPES, batch_size=6, decoder="mixed")
    calm = []
    for crops in loader.epoch(0):
        calm.append([view.cpu() for view in make_views(crops, RECIPES).views])
        torch.cuda.synchronize()

    def late_views(crops):
        torch.cuda._sleep(50_000_000)  # the view stage waits, the host does not
        return make_views(crops, RECIPES)

    kept = [views.views for views in staged(loader.epoch(0), late_views, device)]
    torch.cuda.synchronize()
    assert len(kept) == len(calm) == 11
    for views, expected in zip(kept, calm, strict=True):
        for view, other in zip(views, expected, strict=True):
            assert torch.equal(view.cpu(), other)


def test_leaving_early_and_both_decoders_at_the_same_time(open_dali, photo_beton):
    mixed, cpu = (
        open_dali(photo_beton, RECIPES, batch_size=16, decoder=decoder) for decoder in ("mixed", "cpu")
    )
    for _ in range(3):
        epoch = mixed.epoch(0)
        next(epoch)
        epoch.close()
    for _ in range(2):
        pairs = list(zip(mixed.epoch(1), cpu.epoch(1), strict=True))
        assert all(not other.images[0].is_cuda for _, other in pairs)
        assert max(largest_means(*zip(*pairs, strict=True))) <= MEAN_LEVELS
    mixed.close()


def test_a_file_that_is_no_image_is_named(open_dali, tmp_path):
    folder = tmp_path / "folder"
    (folder / "only").mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (40, 40), (40 * number, 90, 10)).save(folder / "only" / f"{number}.jpg")
    loader = open_dali(folder, RECIPES, batch_size=3, shuffle=False, decoder="mixed")
    (folder / "only" / "4.jpg").write_bytes(bytes(500))
    with pytest.raises(DataError, match=r"only/4\.jpg: does not decode"):
        list(loader.epoch(0))
