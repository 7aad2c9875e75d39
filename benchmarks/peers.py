"""How fast are the loaders, beside their bound and their peers? In turn, in one run, with the same number of workers.

    python benchmarks/peers.py [IMAGE_FOLDER] [--rounds 5] [--passes 4] [--record]

All rows decode the same photographs with one worker a core, for the ImageNet recipe of E-SimCLR (2 × 224² bicubic,
1 × 96² bilinear). The bound:

    decode            libjpeg-turbo alone, accurate DCT, from memory
    decode, fast      the same with the fast, inexact DCT, as stock FFCV decodes

Crops, uint8 and not augmented:

    ffcv              FFCVLoader: one decode, Pillow's filters
    dali              DALILoader, decoding on the CPU: one decode, crops from the same boxes
    torch             TorchLoader: DataLoader workers and Pillow, one decode
    stock ffcv        FFCV's own loader and random crop: a decode a crop

Views, augmented and normalised, with four rotated copies:

    ffcv + views      FFCVLoader, then the numba view stage
    dali operators    DALI's own random operators from one decode
    official style    what the official release does with torchvision, written out with Pillow: DataLoader workers open
                      an image file, decode it once, and crop and augment it three times; the batch is rotated when it
                      is there

Every row runs in each round, the rounds are repeated, and the medians over rounds are told with their range and with
what sets the row's pixels apart. What is not installed is listed as such. Without IMAGE_FOLDER, photographs are made.
"""

from __future__ import annotations

import argparse
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
from official_style import official_epoch
from record import machine_facts, write_record
from tqdm import tqdm

from fast_essl.bench.loading import Stored, decode_all, load_stored
from fast_essl.bench.synthetic import repeat_files, write_jpegs
from fast_essl.transformations import build_transformation
from loaders import open_loader
from loaders.convert import convert
from loaders.errors import DataError
from loaders.images import BetonImages, open_beton, open_folder
from loaders.machine import num_cores
from loaders.recipe import Recipe
from loaders.views.cpu import make_views

VIEW = {"size": 224, "scale": (0.08, 1.0), "saturation": 0.2}
RECIPES = (
    Recipe(**VIEW, blur_p=1.0),
    Recipe(**VIEW, blur_p=0.1, solarize_p=0.2),
    Recipe(size=96, scale=(0.05, 0.14), interpolation="bilinear", saturation=0.2, blur_p=0.1),
)
BATCH_SIZE = 64
NUM_WORKERS = num_cores()
NUM_PHOTOGRAPHS = 256
PIXELS = {
    "decode": "accurate DCT, as Pillow",
    "decode, fast": "fast DCT: off by 1.2 levels a pixel",
    "ffcv": "as Pillow, within a level but on hard edges",
    "dali": "as Pillow, but at some borders",
    "torch": "Pillow's",
    "stock ffcv": "fast DCT; area filter, which does not smooth what it enlarges",
    "ffcv + views": "as Pillow, within a level but on hard edges",
    "dali operators": "no solarize, grey by saturation 0, one order of the jitter for all",
    "official style": "Pillow's, jitter and blur rounded to levels after each step",
}
"""How the rows' pixels differ."""
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
    torch.set_num_threads(NUM_WORKERS)
    facts = machine_facts()
    with tempfile.TemporaryDirectory() as scratch:
        source = arguments.folder or write_jpegs(Path(scratch) / "made", NUM_PHOTOGRAPHS)
        folder = repeat_files(source, Path(scratch) / "repeated", arguments.passes)
        images = _converted(folder)
        rows, missing = _rows(images, folder)
        results = _measure(rows, arguments.rounds)
    _print(results, missing)
    if arguments.record:
        content = {
            "num_samples": images.tables.num_samples,
            "source": source.name,
            "num_workers": NUM_WORKERS,
            "samples_per_s": results,
            "pixels": PIXELS,
            "not_installed": missing,
        }
        print(write_record("peers", content, facts=facts))


def _converted(folder: Path) -> BetonImages:
    beton = folder.with_suffix(".beton")
    convert(str(folder), beton, progress=False)
    return open_beton(beton)


def _rows(images: BetonImages, folder: Path) -> tuple[dict[str, Callable[[int], int]], dict[str, str]]:
    """{name: function of the round that loads one epoch and returns its number of samples}, {what is missing: why}."""
    stored = load_stored(images, np.arange(images.tables.num_samples))
    options = {"batch_size": BATCH_SIZE, "drop_last": False, "num_workers": NUM_WORKERS}
    ffcv = open_loader("ffcv", images.path, RECIPES, **options)
    reference = open_loader("torch", images.path, RECIPES, **options)
    official = open_folder(folder)
    missing = {}
    try:
        dali = open_loader("dali", images.path, RECIPES, decoder="cpu", **options)
    except DataError as error:
        dali = None
        missing = dict.fromkeys(("dali", "dali operators"), str(error))

    def count(batches) -> int:
        return sum(len(batch.labels) for batch in batches)

    def decode(epoch: int) -> int:
        assert decode_all(stored.data, stored.starts, stored.sizes, stored.heights, stored.widths) == 0
        return stored.num_samples

    def decode_fast(epoch: int) -> int:
        assert _decode_all_fast(stored.data, stored.starts, stored.sizes, stored.heights, stored.widths) == 0
        return stored.num_samples

    def ffcv_views(epoch: int) -> int:
        return count(make_views(crops, RECIPES, equivariance=ROTATION) for crops in ffcv.epoch(epoch))

    rows = {
        "decode": decode,
        "decode, fast": decode_fast,
        "ffcv": lambda epoch: count(ffcv.epoch(epoch)),
        "dali": lambda epoch: count(dali.epoch(epoch)),
        "torch": lambda epoch: count(reference.epoch(epoch)),
        "stock ffcv": _stock_ffcv(images.path),
        "ffcv + views": ffcv_views,
        "dali operators": _dali_operators(stored) if dali is not None else None,
        "official style": lambda epoch: official_epoch(
            official, RECIPES, epoch, batch_size=BATCH_SIZE, num_workers=NUM_WORKERS
        ),
    }
    return {name: load for name, load in rows.items() if name not in missing}, missing


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
        num_workers=NUM_WORKERS,
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=False,
        pipelines=pipelines,
    )
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    return lambda epoch: sum(len(batch[0]) for batch in loader)


def _dali_operators(stored: Stored) -> Callable[[int], int]:
    """DALI as it comes: its random operators, on the CPU; each epoch is the photographs in order."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    filters = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
    spans = list(zip(stored.starts, stored.starts + stored.sizes, strict=True))
    position = iter(spans)

    def next_batch() -> list[np.ndarray]:
        nonlocal position
        batch = [span for _, span in zip(range(BATCH_SIZE), position, strict=False)]
        if not batch:
            position = iter(spans)
            raise StopIteration
        return [stored.data[start:stop] for start, stop in batch]

    @pipeline_def(
        batch_size=BATCH_SIZE,
        num_threads=NUM_WORKERS,
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


_imdecode_fast = numba.njit(nogil=True)(imdecode)


@numba.njit(parallel=True, nogil=True)
def _decode_all_fast(data, starts, sizes, heights, widths):
    failed = 0
    for n in numba.prange(len(starts)):
        h, w = heights[n], widths[n]
        image, jpeg = np.empty((h, w, 3), np.uint8), data[starts[n] : starts[n] + sizes[n]]
        failed += _imdecode_fast(jpeg, image, h, w, h, w, 0, 0, 1, 1, False, False) != 0
    return failed


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


def _print(results: dict[str, dict[str, object]], missing: dict[str, str]) -> None:
    print(f"{NUM_WORKERS} workers{'':7}{'samples/s':>11}{'range':>18}{'× decode':>10}  pixels")
    for name, row in results.items():
        spread = f"{row['min']} – {row['max']}"
        print(f"{name:16}{row['median']:>11}{spread:>18}{row['median_ratio_to_decode']:>10}  {PIXELS[name]}")
    for name, why in missing.items():
        print(f"{name:16}not installed: {why}")
    rates = {name: row["median"] for name, row in results.items()}
    for one, other in (
        ("ffcv", "official style"),
        ("ffcv", "stock ffcv"),
        ("ffcv", "dali"),
        ("ffcv + views", "official style"),
        ("ffcv + views", "dali operators"),
    ):
        if other in rates:
            print(f"{one} is {rates[one] / rates[other]:.2f} × {other}")


if __name__ == "__main__":
    main()
