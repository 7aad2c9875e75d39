"""What does the view stage cost? Its implementations beside the torch reference, in one run.

    python benchmarks/views.py [--device cpu|cuda] [--rounds 9] [--num-threads 1] [--record]

All get the same crops and the same parameter tables: those of E-SimCLR on ImageNet (2 × 224², 1 × 96² in four rotated
copies) and on CIFAR-10 (2 × 32², 1 × 16²), and on a GPU three of its parts by themselves. In each round every row
runs on the table of that round; told are the medians over rounds with their range. Round 0 compiles and is not counted.

On the CPU numba runs in float32, in milliseconds a sample. On a GPU Triton runs in bfloat16, timed with device events
and the table's upload within; told beside it are the bytes that must be read and written, which are the crops and the
views, and which share of the bandwidth of a device-to-device copy that is.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import numba
import torch
from record import machine_facts, write_record
from tqdm import tqdm

from fast_essl.bench.measuring import summary, timed
from fast_essl.bench.synthetic import make_crops
from fast_essl.staging import to_device
from fast_essl.transformations import build_transformation
from loaders.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One batch."""

    batch_size: int
    recipes: tuple[Recipe, ...]
    rotated: bool = True
    """Whether the last crop is made into four rotated copies."""


IMAGENET_VIEW = {"size": 224, "scale": (0.08, 1.0), "saturation": 0.2}
PLAIN = {"flip_p": 0.0, "jitter_p": 0.0, "grey_p": 0.0}
WORKLOADS = {
    "imagenet": Workload(
        batch_size=64,
        recipes=(
            Recipe(**IMAGENET_VIEW, blur_p=1.0),
            Recipe(**IMAGENET_VIEW, blur_p=0.1, solarize_p=0.2),
            Recipe(size=96, scale=(0.05, 0.14), saturation=0.2, blur_p=0.1),
        ),
    ),
    "cifar10": Workload(batch_size=512, recipes=(Recipe(size=32), Recipe(size=32), Recipe(size=16))),
}
PARTS = {
    "colour, 224²": Workload(batch_size=256, recipes=(Recipe(**IMAGENET_VIEW, jitter_p=1.0),), rotated=False),
    "no colour, 224²": Workload(batch_size=256, recipes=(Recipe(size=224, **PLAIN),), rotated=False),
    "blur, 224²": Workload(batch_size=256, recipes=(Recipe(size=224, **PLAIN, blur_p=1.0),), rotated=False),
    "rotation, 96²": Workload(batch_size=512, recipes=(Recipe(size=96, **PLAIN),)),
}
ROTATION = build_transformation("four_fold_rotation", size=96)
COPIED_BYTES = 2**30


def main() -> int:
    """Measure all rows, print the table, write the record if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--num-threads", type=int, default=1, help="of numba and of torch")
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/DATE-views.json")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("views: error: there is no CUDA device here", file=sys.stderr)
        return 2
    numba.set_num_threads(arguments.num_threads)
    torch.set_num_threads(arguments.num_threads)
    facts = machine_facts()
    if arguments.device == "cuda":
        results = on_cuda(arguments.rounds)
    else:
        results = {"num_threads": arguments.num_threads, "ms_per_sample": on_cpu(arguments.rounds)}
        print_cpu(results)
    if arguments.record:
        subject = "views" if arguments.device == "cpu" else "views-cuda"
        print(write_record(subject, results, facts=facts))
    return 0


def on_cpu(num_rounds: int) -> dict[str, dict[str, float]]:
    """{workload, stage: median, min, max and n of its milliseconds a sample}."""
    times = measure(WORKLOADS, ("cpu", "reference"), torch.device("cpu"), torch.float32, num_rounds)
    return {
        name: summary([value / WORKLOADS[name.rpartition(", ")[0]].batch_size for value in values])
        for name, values in times.items()
    }


def print_cpu(results: dict[str, Any]) -> None:
    """The table, and the ratios."""
    rows = results["ms_per_sample"]
    print(f"{'ms a sample, ' + str(results['num_threads']) + ' thread(s)':32}{'median':>9}{'range':>20}")
    for name, row in rows.items():
        low_high = f"{row['min']:.4f} – {row['max']:.4f}"
        print(f"{name:32}{row['median']:9.4f}{low_high:>20}")
    for workload in WORKLOADS:
        ratio = rows[f"{workload}, reference"]["median"] / rows[f"{workload}, cpu"]["median"]
        print(f"{workload}: cpu is {ratio:.1f} × as fast as reference")


def on_cuda(num_rounds: int) -> dict[str, Any]:
    """Measure and print: the bandwidth of a copy, and each row's time, bytes and share of that bandwidth."""
    device, workloads = torch.device("cuda"), {**WORKLOADS, **PARTS}
    copy_bytes_per_s = copy_bandwidth(device, num_rounds)
    times = measure(workloads, ("cuda", "reference"), device, torch.bfloat16, num_rounds)
    results: dict[str, Any] = {"copy_gb_per_s": copy_bytes_per_s / 1e9, "dtype": "bfloat16", "rows": {}}
    print(f"a copy on the device: {copy_bytes_per_s / 1e9:,.0f} GB/s, read and written")
    print(f"{'':28}{'batch':>6}{'ms':>9}{'range':>20}{'MB':>8}{'GB/s':>8}{'of a copy':>11}")
    for name, values in times.items():
        workload = workloads[name.rpartition(", ")[0]]
        row: dict[str, Any] = summary(values)
        row["batch_size"], row["num_bytes"] = workload.batch_size, num_bytes(workload)
        row["share_of_copy"] = row["num_bytes"] / (row["median"] / 1000) / copy_bytes_per_s
        results["rows"][name] = row
        low_high = f"{row['min']:.3f} – {row['max']:.3f}"
        rate = row["num_bytes"] / row["median"] / 1e6
        print(
            f"{name:28}{workload.batch_size:6}{row['median']:9.3f}{low_high:>20}{row['num_bytes'] / 1e6:8.1f}"
            f"{rate:8.0f}{row['share_of_copy']:11.1%}"
        )
    return results


def num_bytes(workload: Workload) -> int:
    """Bytes of the uint8 crops and the bfloat16 views: what must be moved, whatever the implementation."""
    total = 0
    for number, recipe in enumerate(workload.recipes):
        copies = 4 if workload.rotated and number == len(workload.recipes) - 1 else 1
        total += workload.batch_size * recipe.size**2 * 3 * (1 + 2 * copies)
    return total


def copy_bandwidth(device: torch.device, num_rounds: int) -> float:
    """Bytes a second, read and written, of a copy on the device; the best of the rounds."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best_ms = min(timed(lambda: target.copy_(source), device) for _ in range(num_rounds + 1))
    return 2 * COPIED_BYTES / (best_ms / 1000)


def measure(
    workloads: dict[str, Workload],
    stages: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype,
    num_rounds: int,
) -> dict[str, list[float]]:
    """{workload, stage: milliseconds a batch, one a round}."""
    make_views = {stage: importlib.import_module(f"loaders.views.{stage}").make_views for stage in stages}
    times: dict[str, list[float]] = {f"{name}, {stage}": [] for name in workloads for stage in stages}
    for number in tqdm(range(num_rounds + 1), desc="rounds", unit="round"):
        for name, workload in workloads.items():
            crops = to_device(make_crops(workload.recipes, workload.batch_size, epoch=number), device)
            options = {"equivariance": ROTATION if workload.rotated else None, "dtype": dtype}
            for stage in stages:
                took_ms = timed(partial(make_views[stage], crops, workload.recipes, **options), device)
                if number > 0:
                    times[f"{name}, {stage}"].append(took_ms)
    return times


if __name__ == "__main__":
    sys.exit(main())
