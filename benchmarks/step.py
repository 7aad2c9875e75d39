"""How fast is the training step? Forms of it side by side, on data that lies on the device: the loader-free ceiling.

    python benchmarks/step.py [e_simclr_imagenet] [--batch-size 256] [--steps 20] [--rows official best ...] [--record]

Each row is a whole step, forward, losses, backward and optimizer, in another form:

    official        contiguous NCHW, fp16 with a GradScaler, eager: as the official release runs it
    channels-last   channels-last, bf16, eager
    compiled        the same with the backbone through torch.compile
    graphs          the same, replayed as CUDA graphs (mode reduce-overhead)
    whole           the last one fed by the view stage from uint8 crops on the device

On a CPU everything is fp32, and rows that need CUDA are left out. Warm: five steps are not counted, and neither is
compilation, which is told apart. Medians of steps, timed with device events; TFLOP/s from the counted operations of
convolutions and matrix products.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import machine_facts, write_record
from torch.utils.flop_counter import FlopCounterMode

from fast_essl.config import Config, ConfigError
from fast_essl.config_io import find_config, load_config
from fast_essl.methods import build_method
from fast_essl.optim import build_optimizer, set_learning_rates
from fast_essl.transformations import config_transformations
from loaders.batch import Crops, Views
from loaders.parameters import draw_parameters
from loaders.views import resolve_view_stage

NUM_CLASSES = 1000
NUM_WARMUP = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One form of the step."""

    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = True
    compile: str = "none"
    view_stage: bool = False


ROWS = {
    "official": Row(dtype=torch.float16, channels_last=False),
    "channels-last": Row(),
    "compiled": Row(compile="default"),
    "graphs": Row(compile="reduce-overhead"),
    "whole": Row(compile="reduce-overhead", view_stage=True),
}
CPU_ROWS = {
    "official": Row(dtype=torch.float32, channels_last=False),
    "channels-last": Row(dtype=torch.float32),
    "compiled": Row(dtype=torch.float32, compile="default"),
    "whole": Row(dtype=torch.float32, view_stage=True),
}


def main() -> int:
    """Measure the rows, print the table, write the record if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", type=Path, default=Path("e_simclr_imagenet"))
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", nargs="+")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = ROWS if device.type == "cuda" else CPU_ROWS
    chosen = arguments.rows or list(rows)
    if unknown := [name for name in chosen if name not in rows]:
        print(f"step: error: rows {unknown} are not of {', '.join(rows)} on {device.type}", file=sys.stderr)
        return 2
    try:
        config = load_config(find_config(arguments.config), ["--train.batch-size", str(arguments.batch_size)])
    except (ConfigError, OSError) as error:
        print(f"step: error: {error}", file=sys.stderr)
        return 2
    facts = machine_facts()
    print(f"{arguments.config}, batch {arguments.batch_size}, {facts['gpus'] or facts['cpu']}")
    print(f"{'':16}{'ms a step':>12}{'range':>20}{'samples/s':>12}{'TFLOP/s':>10}{'GiB':>8}{'compile s':>11}")
    results: dict[str, Any] = {}
    for name in chosen:
        result = results[name] = measure(config, rows[name], device, arguments.steps)
        span = f"{result['step_ms_min']:.1f} – {result['step_ms_max']:.1f}"
        print(
            f"{name:16}{result['step_ms']:12.1f}{span:>20}{result['samples_per_s']:12.0f}{result['tflop_per_s']:10.1f}"
            f"{result['peak_gib']:8.1f}{result['first_step_s']:11.1f}",
            flush=True,
        )
    if "official" in results:
        for name, result in results.items():
            print(f"{name}: {results['official']['step_ms'] / result['step_ms']:.2f} × the official form")
    if arguments.record:
        content = {"config": str(arguments.config), "batch_size": arguments.batch_size, "rows": results}
        print(write_record(f"step-{arguments.config.stem.replace('_', '-')}", content, facts=facts))
    return 0


def measure(config: Config, row: Row, device: torch.device, num_steps: int) -> dict[str, Any]:
    """Median, least and most milliseconds of a step, and what follows from them."""
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    method = build_method(config, num_classes=NUM_CLASSES).to(device).train()
    memory_format = torch.channels_last if row.channels_last else torch.contiguous_format
    method = method.to(memory_format=memory_format)
    optimizer = build_optimizer(method.parameters(), config.optimizer, batch_size=config.train.batch_size)
    set_learning_rates(optimizer, 0.01)
    scaler = torch.amp.GradScaler(device.type, enabled=row.dtype is torch.float16)
    views_of = _views(config, row, device, memory_format)

    def step() -> None:
        if row.compile != "none":
            torch.compiler.cudagraph_mark_step_begin()
        views = views_of()
        with torch.autocast(device.type, dtype=row.dtype, enabled=row.dtype is not torch.float32):
            loss = method(views).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    with FlopCounterMode(display=False) as flops:
        step()
    if row.compile != "none":
        method.backbone.compile(mode=row.compile, dynamic=False)
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    first_step_s = time.perf_counter() - started
    for _ in range(NUM_WARMUP):
        step()
    times_ms = _timed(step, num_steps, device)
    median = statistics.median(times_ms)
    return {
        "step_ms": median,
        "step_ms_min": min(times_ms),
        "step_ms_max": max(times_ms),
        "n": num_steps,
        "samples_per_s": 1000 * config.train.batch_size / median,
        "tflop_per_s": flops.get_total_flops() / median / 1e9,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0,
        "first_step_s": first_step_s,
        "form": {**dataclasses.asdict(row), "dtype": str(row.dtype)},
    }


def _timed(step: Callable[[], None], num_steps: int, device: torch.device) -> list[float]:
    """Milliseconds of each step: between device events, or by the clock on a CPU."""
    if device.type == "cpu":
        times = []
        for _ in range(num_steps):
            started = time.perf_counter()
            step()
            times.append(1000 * (time.perf_counter() - started))
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def _views(
    config: Config, row: Row, device: torch.device, memory_format: torch.memory_format
) -> Callable[[], Views]:
    """What gives a step its views: the same ones each time, or the view stage on the same crops."""
    recipes, (equivariance, _) = config.crop_recipes(), config_transformations(config)
    count = config.train.batch_size
    random = np.random.default_rng(0)
    crops = Crops(
        images=tuple(
            torch.from_numpy(random.integers(0, 256, (count, r.size, r.size, 3), dtype=np.uint8)).to(device)
            for r in recipes
        ),
        labels=torch.arange(count, device=device) % NUM_CLASSES,
        indices=torch.arange(count, device=device),
        parameters=draw_parameters(
            recipes,
            seed=0,
            epoch=0,
            indices=np.arange(count),
            heights=np.full(count, 400),
            widths=np.full(count, 500),
        ),
    )
    make_views = partial(
        resolve_view_stage("auto", device), crops, recipes, equivariance=equivariance, dtype=row.dtype
    )
    if row.view_stage:
        return make_views
    views = make_views()
    fixed = dataclasses.replace(
        views,
        views=tuple(view.contiguous(memory_format=memory_format) for view in views.views),
        transformed=views.transformed.contiguous(memory_format=memory_format)
        if views.transformed is not None
        else None,
    )
    return lambda: fixed


if __name__ == "__main__":
    sys.exit(main())
