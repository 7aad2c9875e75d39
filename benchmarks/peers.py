"""How fast are the loaders, beside their bound and their peers? In turn, in one run.

    python benchmarks/peers.py [IMAGE_FOLDER] [--rounds 5] [--passes 4] [--record]

All rows decode the same photographs with all cores, for the ImageNet recipe of E-SimCLR (2 × 224² bicubic, 1 × 96²
bilinear). The bound:

    decode            libjpeg-turbo alone, accurate DCT, from memory
    decode, fast      the same with the fast, inexact DCT, as stock FFCV decodes

Crops, uint8 and not augmented:

    ffcv              FFCVLoader: one decode, Pillow's filters
    dali              DALILoader, decoding on the CPU: one decode, crops from the same boxes
    torch             TorchLoader: DataLoader workers and Pillow, one decode
    stock ffcv        FFCV's own loader and random crop: a decode a crop, fast DCT, OpenCV's area filter, which does not
                      smooth when it enlarges

Views, augmented and normalised, with four rotated copies:

    ffcv + views      FFCVLoader, then the numba view stage
    dali operators    DALI's own random operators from one decode; no solarize, grey by saturation 0, one order of
                      the jitter for all samples
    torch + Pillow    DataLoader workers that decode, crop and augment with Pillow, as the official release does

Every row runs in each round, the rounds are repeated, and the medians over rounds are told with their range. What is
not installed is said and left out. Without IMAGE_FOLDER, patches of scikit-learn's two photographs serve.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/DATE-peers.json")
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
        print(write_record("peers", results, facts=facts))


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
        "stock ffcv": _stock_ffcv(images.path),
        "ffcv + views": ffcv_views,
        "dali operators": _dali_operators(stored) if dali is not None else None,
        "torch + Pillow": pillow,
    }
    return {name: load for name, load in rows.items() if dali is not None or "dali" not in name}


def _stock_ffcv(path: Path) -> Callable[[int], int]:
    """FFCV as it comes: each of the three crops is a pipeline of its own on the same field."""
    import ffcv.fields.decoders as decoders
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec

    pipelines = {
        name: PipelineSpec(
            "image",
            decoder=decoders.RandomResizedCropRGBImageDecoder(
                (recipe.size, recipe.size), scale=recipe.scale, ratio=recipe.ratio
            ),
            transforms=[],
        )
        for name, recipe in zip(("view1", "view2", "transformed"), RECIPES, strict=True)
    }
    pipelines |= {"image": None, "label": None}
    loader = Loader(
        str(path),
        batch_size=BATCH_SIZE,
        num_workers=len(os.sched_getaffinity(0)),
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=False,
        pipelines=pipelines,
    )
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    return lambda epoch: sum(len(batch[0]) for batch in loader)


def _dali_operators(stored: list[np.ndarray]) -> Callable[[int], int]:
    """DALI as it comes: its random operators, on the CPU; each epoch is the photographs in order."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    filters = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
    position = iter(range(len(stored)))

    def next_batch() -> list[np.ndarray]:
        nonlocal position
        numbers = [number for _, number in zip(range(BATCH_SIZE), position, strict=False)]
        if not numbers:
            position = iter(range(len(stored)))
            raise StopIteration
        return [stored[number] for number in numbers]

    @pipeline_def(
        batch_size=BATCH_SIZE,
        num_threads=len(os.sched_getaffinity(0)),
        device_id=None,
        prefetch_queue_depth=2,
        seed=0,
    )
    def graph() -> tuple[Any, ...]:
        image = fn.decoders.image(fn.external_source(next_batch, no_copy=True), device="cpu")
        views = []
        for recipe in RECIPES:
            view = fn.random_resized_crop(
                image,
                size=recipe.size,
                random_area=recipe.scale,
                random_aspect_ratio=recipe.ratio,
                interp_type=filters[recipe.interpolation],
                antialias=True,
            )
            jittered = fn.random.coin_flip(probability=recipe.jitter_p)

            def factor(strength: float, on: Any = jittered) -> Any:
                return 1 + on * fn.random.uniform(range=(-strength, strength))

            grey = fn.random.coin_flip(probability=recipe.grey_p)
            view = fn.color_twist(
                view,
                brightness=factor(recipe.brightness),
                contrast=factor(recipe.contrast),
                saturation=factor(recipe.saturation) * (1 - grey),
                hue=jittered * fn.random.uniform(range=(-360 * recipe.hue, 360 * recipe.hue)),
            )
            blurred = fn.random.coin_flip(probability=recipe.blur_p)
            # A sigma of 0.1 leaves the pixels as they are.
            sigma = 0.1 + blurred * fn.random.uniform(range=(0, recipe.blur_sigma[1] - 0.1))
            view = fn.gaussian_blur(view, sigma=sigma)
            views.append(
                fn.crop_mirror_normalize(
                    view,
                    dtype=types.FLOAT,
                    output_layout="HWC",
                    mirror=fn.random.coin_flip(probability=recipe.flip_p),
                    mean=[255 * value for value in recipe.mean],
                    std=[255 * value for value in recipe.std],
                )
            )
        third = views.pop()
        turned = fn.flip(
            fn.transpose(third, perm=(1, 0, 2), transpose_layout=False), vertical=1, horizontal=0
        )
        return (*views, third, turned, fn.flip(third, vertical=1), fn.flip(turned, vertical=1))

    names = ["view1", "view2", "copy0", "copy1", "copy2", "copy3"]
    pipeline = graph()
    pipeline.build()
    batches = DALIGenericIterator(pipeline, names, auto_reset=True, last_batch_policy=LastBatchPolicy.PARTIAL)
    return lambda epoch: sum(len(batch[0]["view1"]) for batch in batches)


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
    rates = {name: row["median"] for name, row in results.items()}
    print(f"ffcv is {results['ffcv']['median_ratio_to_decode']} × decode", end="")
    for one, other in (
        ("ffcv", "stock ffcv"),
        ("ffcv", "torch + Pillow"),
        ("ffcv + views", "torch + Pillow"),
        ("ffcv + views", "dali operators"),
    ):
        if other in rates:
            print(f"; {one} is {rates[one] / rates[other]:.2f} × {other}", end="")
    print()


if __name__ == "__main__":
    main()
