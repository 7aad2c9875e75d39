"""How fast are the loaders, next to what they cannot be faster than? Peers in turn, in one run.

    python benchmarks/loading.py [IMAGE_FOLDER] [--record]

All rows decode the same photographs for the ImageNet recipe of E-SimCLR (2 × 224² bicubic, 1 × 96² bilinear):

    decode           libjpeg-turbo alone, accurate DCT, from memory, all cores: the bound
    decode, fast     the same with the fast, inexact DCT, as stock FFCV decodes
    ffcv             FFCVLoader's Crops
    dali             DALILoader's Crops, decoded on the CPU; left out where DALI is not installed
    torch            TorchLoader's Crops: DataLoader workers and Pillow
    ffcv + views     FFCVLoader's Crops, then the numba view stage: normalised views and four rotated copies
    torch + Pillow   DataLoader workers that decode, crop and augment with Pillow, as the official release does

Every row runs in each round, the rounds are repeated, and the medians over rounds are told with their range.
Without IMAGE_FOLDER, patches of scikit-learn's two photographs serve.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import torch
from ffcv.libffcv import imdecode
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from record import machine_facts, write_record
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fast_essl.transformations import build_transformation
from loaders import open_loader
from loaders.beton import IMAGE_JPEG
from loaders.convert import convert
from loaders.cut import decode_jpeg
from loaders.errors import DataError
from loaders.images import BetonImages, open_beton
from loaders.plan import EpochPlan
from loaders.recipe import Recipe
from loaders.torch_loader import pillow_crop
from loaders.views.cpu import make_views

VIEW = {"size": 224, "scale": (0.08, 1.0), "saturation": 0.2}
RECIPES = (
    Recipe(**VIEW, blur_p=1.0),
    Recipe(**VIEW, blur_p=0.1, solarize_p=0.2),
    Recipe(size=96, scale=(0.05, 0.14), interpolation="bilinear", saturation=0.2, blur_p=0.1),
)
BATCH_SIZE = 64
ROTATION = build_transformation("four_fold_rotation", size=96)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help="an image folder, one directory a class")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=4, help="times each photograph stands in the file")
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/DATE-loading.json")
    arguments = parser.parse_args()
    # Importing FFCV left torch and numba with one thread.
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    facts = machine_facts()
    with tempfile.TemporaryDirectory() as scratch:
        source = arguments.folder or _patches(Path(scratch) / "patches")
        beton = _repeated(source, Path(scratch), arguments.passes)
        rows = _rows(open_beton(beton))
        results = _measure(rows, arguments.rounds)
        num_samples = open_beton(beton).tables.num_samples
    _print(results)
    if arguments.record:
        results = {"num_samples": num_samples, "source": source.name, "samples_per_s": results}
        print(write_record("loading", results, facts=facts))


def _patches(folder: Path) -> Path:
    """200 patches of 500×375 of scikit-learn's two photographs, JPEG quality 92."""
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    for number in range(200):
        photo = load_sample_images().images[number % 2]
        top, left = random.integers(photo.shape[0] - 375 + 1), random.integers(photo.shape[1] - 500 + 1)
        directory = folder / f"photo{number % 2}"
        directory.mkdir(parents=True, exist_ok=True)
        patch = Image.fromarray(photo[top : top + 375, left : left + 500])
        patch.save(directory / f"{number:03}.jpg", quality=92)
    return folder


def _repeated(source: Path, scratch: Path, passes: int) -> Path:
    """A `.beton` file with each photograph several times, so that an epoch is long beside its start."""
    folder = scratch / "repeated"
    for file in sorted(source.rglob("*")):
        if file.is_file():
            for number in range(passes):
                link = folder / file.parent.name / f"{number}-{file.name}"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.resolve())
    beton = scratch / "photographs.beton"
    convert(str(folder), beton, progress=False)
    return beton


def _rows(images: BetonImages) -> dict[str, Callable[[int], int]]:
    """{name: function of the round that loads one epoch and returns its number of samples}."""
    tables = images.tables
    file = np.memmap(images.path, np.uint8, mode="r")
    stored = numba.typed.List()
    for start, size in zip(tables.data_ptrs, tables.data_sizes, strict=True):
        stored.append(np.array(file[int(start) : int(start + size)]))
    assert (tables.modes == IMAGE_JPEG).all()
    heights, widths = tables.heights.astype(np.int64), tables.widths.astype(np.int64)
    options = {"batch_size": BATCH_SIZE, "drop_last": False}
    ffcv = open_loader("ffcv", images.path, RECIPES, **options)
    reference = open_loader("torch", images.path, RECIPES, **options)
    try:
        dali = open_loader("dali", images.path, RECIPES, decoder="cpu", **options)
    except DataError as error:
        print(f"without the row `dali`: {error}")
        dali = None

    def count(batches) -> int:
        return sum(len(batch.labels) for batch in batches)

    def decode(epoch: int) -> int:
        assert _decode_all(stored, heights, widths) == 0
        return len(stored)

    def decode_fast(epoch: int) -> int:
        assert _decode_all_fast(stored, heights, widths) == 0
        return len(stored)

    def ffcv_views(epoch: int) -> int:
        return count(make_views(crops, RECIPES, equivariance=ROTATION) for crops in ffcv.epoch(epoch))

    def pillow(epoch: int) -> int:
        batches = DataLoader(
            _PillowViews(images, reference.plan, epoch),
            batch_size=BATCH_SIZE,
            num_workers=os.cpu_count() or 1,
            multiprocessing_context="fork",
        )
        return sum(len(batch[0]) for batch in batches)

    rows = {
        "decode": decode,
        "decode, fast": decode_fast,
        "ffcv": lambda epoch: count(ffcv.epoch(epoch)),
        "dali": lambda epoch: count(dali.epoch(epoch)),
        "torch": lambda epoch: count(reference.epoch(epoch)),
        "ffcv + views": ffcv_views,
        "torch + Pillow": pillow,
    }
    return {name: load for name, load in rows.items() if name != "dali" or dali is not None}


@numba.njit(parallel=True, nogil=True)
def _decode_all(stored, heights, widths):
    failed = 0
    for n in numba.prange(len(stored)):
        image = np.empty((heights[n], widths[n], 3), np.uint8)
        failed += decode_jpeg(stored[n], image) != 0
    return failed


_imdecode_fast = numba.njit(nogil=True)(imdecode)


@numba.njit(parallel=True, nogil=True)
def _decode_all_fast(stored, heights, widths):
    failed = 0
    for n in numba.prange(len(stored)):
        h, w = heights[n], widths[n]
        image = np.empty((h, w, 3), np.uint8)
        failed += _imdecode_fast(stored[n], image, h, w, h, w, 0, 0, 1, 1, False, False) != 0
    return failed


class _PillowViews(Dataset):
    """The official release's way: every step of the recipe with Pillow and torch, in the worker, from one decode."""

    def __init__(self, images: BetonImages, plan: EpochPlan, epoch: int) -> None:
        self.images, self.plan, self.epoch = images, plan, epoch

    def __len__(self) -> int:
        return self.plan.num_samples

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        table = self.plan.parameters(self.epoch, np.array([index]))
        image = self.images.image(index)
        views = []
        for view, recipe in enumerate(RECIPES):
            crop = Image.fromarray(pillow_crop(image, table.box[0, view], recipe))
            crop = _augment_with_pillow(crop, table.view(view).rows(slice(0, 1)))
            pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).float().div(255)
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.mean, recipe.std))
            views.append((pixels - mean) / std)
        third = views.pop()
        return [*views, *(torch.rot90(third, k, (1, 2)) for k in range(4))]


def _augment_with_pillow(image: Image.Image, row) -> Image.Image:
    if row.flip[0]:
        image = ImageOps.mirror(image)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for op in row.jitter_order[0]:
        factor = float(row.jitter[0, op])
        if op < 3 and factor != 1:
            image = enhancers[op](image).enhance(factor)
        elif op == 3 and factor != 0:
            hue, saturation, value = image.convert("HSV").split()
            hue = Image.fromarray(np.asarray(hue) + np.uint8(round(factor * 255) % 256))
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if row.grey[0]:
        image = image.convert("L").convert("RGB")
    if row.blur_sigma[0] > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(row.blur_sigma[0])))
    if row.solarize[0]:
        image = ImageOps.solarize(image)
    return image


def _measure(rows: dict[str, Callable[[int], int]], num_rounds: int) -> dict[str, dict[str, object]]:
    rates: dict[str, list[float]] = {name: [] for name in rows}
    # Round 0 compiles, fills the page cache and is not counted.
    for number in tqdm(range(num_rounds + 1), desc="rounds", unit="round"):
        for name, load in rows.items():
            start = time.perf_counter()
            num_samples = load(number)
            if number > 0:
                rates[name].append(num_samples / (time.perf_counter() - start))
    bound = rates["decode"]
    return {
        name: {
            "median": round(statistics.median(values), 1),
            "min": round(min(values), 1),
            "max": round(max(values), 1),
            "n": len(values),
            "median_ratio_to_decode": round(
                statistics.median(value / limit for value, limit in zip(values, bound, strict=True)), 3
            ),
        }
        for name, values in rates.items()
    }


def _print(results: dict[str, dict[str, object]]) -> None:
    print(f"{'':16}{'samples/s':>11}{'range':>18}{'× decode':>10}")
    for name, row in results.items():
        spread = f"{row['min']} – {row['max']}"
        print(f"{name:16}{row['median']:>11}{spread:>18}{row['median_ratio_to_decode']:>10}")
    ratio = results["ffcv + views"]["median"] / results["torch + Pillow"]["median"]
    print(
        f"ffcv + views is {ratio:.2f} × torch + Pillow; ffcv is {results['ffcv']['median_ratio_to_decode']} × decode"
    )


if __name__ == "__main__":
    main()
