"""What does the view stage cost? The numba implementation beside the torch reference, in one run.

    python benchmarks/views.py [--rounds 9] [--num-threads 1] [--record]

Both get the same crops and the same parameter tables, for the recipes of E-SimCLR on ImageNet (2 × 224², 1 × 96² in
four rotated copies) and on CIFAR-10 (2 × 32², 1 × 16²). In each round every row runs on the table of that round; told
are the medians over rounds with their range, in milliseconds a sample. Round 0 compiles and is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numba
import numpy as np
import torch
from record import machine_facts, write_record
from sklearn.datasets import load_sample_images
from tqdm import tqdm

from fast_essl.transformations import build_transformation
from loaders.batch import Crops
from loaders.parameters import draw_parameters
from loaders.recipe import Recipe
from loaders.views import cpu, reference

IMAGENET_VIEW = {"size": 224, "scale": (0.08, 1.0), "saturation": 0.2}
WORKLOADS = {
    "imagenet": (
        64,
        (
            Recipe(**IMAGENET_VIEW, blur_p=1.0),
            Recipe(**IMAGENET_VIEW, blur_p=0.1, solarize_p=0.2),
            Recipe(size=96, scale=(0.05, 0.14), saturation=0.2, blur_p=0.1),
        ),
    ),
    "cifar10": (512, (Recipe(size=32), Recipe(size=32), Recipe(size=16))),
}
"""{workload: (batch size, recipes)}."""
ROTATION = build_transformation("four_fold_rotation", size=96)
STAGES = {"cpu": cpu.make_views, "reference": reference.make_views}


def main() -> None:
    """Measure all rows, print the table, write the record if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--num-threads", type=int, default=1, help="of numba and of torch")
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/DATE-views.json")
    arguments = parser.parse_args()
    numba.set_num_threads(arguments.num_threads)
    torch.set_num_threads(arguments.num_threads)
    facts = machine_facts()
    results = measure(arguments.rounds)
    print(f"{'ms a sample, ' + str(arguments.num_threads) + ' thread(s)':32}{'median':>9}{'range':>20}")
    for name, row in results.items():
        low_high = f"{row['min']:.4f} – {row['max']:.4f}"
        print(f"{name:32}{row['median']:9.4f}{low_high:>20}")
    for workload in WORKLOADS:
        ratio = results[f"{workload}, reference"]["median"] / results[f"{workload}, cpu"]["median"]
        print(f"{workload}: cpu is {ratio:.1f} × as fast as reference")
    if arguments.record:
        print(
            write_record(
                "views",
                {"num_threads": arguments.num_threads, "ms_per_sample": results},
                facts=facts,
            )
        )


def measure(num_rounds: int) -> dict[str, dict[str, float]]:
    """{row: median, min, max and n of its milliseconds a sample}."""
    images = {workload: _images(*WORKLOADS[workload]) for workload in WORKLOADS}
    times_ms: dict[str, list[float]] = {f"{w}, {stage}": [] for w in WORKLOADS for stage in STAGES}
    for number in tqdm(range(num_rounds + 1), desc="rounds", unit="round"):
        for workload, (batch_size, recipes) in WORKLOADS.items():
            crops = _crops(images[workload], recipes, epoch=number)
            for stage, make_views in STAGES.items():
                start = time.perf_counter()
                make_views(crops, recipes, equivariance=ROTATION)
                if number > 0:
                    times_ms[f"{workload}, {stage}"].append(1000 * (time.perf_counter() - start) / batch_size)
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}
        for name, values in times_ms.items()
    }


def _images(batch_size: int, recipes: tuple[Recipe, ...]) -> tuple[torch.Tensor, ...]:
    """Patches of scikit-learn's two photographs, one batch a recipe."""
    photos = load_sample_images().images
    random = np.random.default_rng(0)

    def patch(number: int, size: int) -> np.ndarray:
        photo = photos[number % 2]
        top, left = (random.integers(side - size + 1) for side in photo.shape[:2])
        return photo[top : top + size, left : left + size]

    return tuple(
        torch.from_numpy(np.stack([patch(number, recipe.size) for number in range(batch_size)]))
        for recipe in recipes
    )


def _crops(images: tuple[torch.Tensor, ...], recipes: tuple[Recipe, ...], *, epoch: int) -> Crops:
    indices = np.arange(len(images[0]))
    sides = np.full(len(indices), 500)
    return Crops(
        images=images,
        labels=torch.from_numpy(indices),
        indices=torch.from_numpy(indices),
        parameters=draw_parameters(
            recipes, seed=0, epoch=epoch, indices=indices, heights=sides, widths=sides
        ),
    )


if __name__ == "__main__":
    main()
