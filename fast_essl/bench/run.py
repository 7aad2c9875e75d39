"""`fast-essl bench`: measure the rooms, tell what limits a run, write bench.json and bench.png."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fast_essl import records
from fast_essl.bench import loading, step
from fast_essl.bench.chart import write_chart
from fast_essl.bench.doubts import MachineUse, Watch, busy, contradictions, varying
from fast_essl.bench.measuring import Row
from fast_essl.bench.plan import NUM_IMAGENET_SAMPLES
from fast_essl.bench.synthetic import make_crops, repeat_files, write_jpegs
from fast_essl.bench.table import describe_kernels, duration, number, table_head, table_line
from fast_essl.bench.verdict import Figures, Verdict, judge, no_verdict
from fast_essl.config import Config, ConfigError
from fast_essl.config_io import config_to_table, find_config, load_config
from fast_essl.evaluate_run import resolve_device, use_threads
from fast_essl.run_folder import describe_environment
from loaders.beton import IMAGE_JPEG
from loaders.convert import convert
from loaders.images import BetonImages, open_beton
from loaders.machine import free_memory_bytes

PARTS = ("loader", "views", "kernels", "step")
"""What can be measured by itself; `all` is all of it and the end-to-end rate, which the verdict needs."""
DEFAULT_CONFIG = Path("e_simclr_imagenet")
RESULTS, CHART = "bench.json", "bench.png"
NO_KERNELS = "on a CPU the kernels run only in Triton's interpreter, whose time says nothing"
_THREE = (loading.LOADER, step.STEP, step.WHOLE)
"""The throughputs that are always told together, so that the bottleneck shows."""

KERNEL_REPEATS = 30
LOADER_BATCH_SIZE = 64
"""Most samples a batch of the loader's row: a training batch may be of 4096, and batches are made ahead in memory."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What `fast-essl bench` can be told."""

    parts: tuple[str, ...] = PARTS
    """Of `PARTS`; with both loader and step, the end-to-end rate is measured as well."""
    config: Path = DEFAULT_CONFIG
    """The configuration whose sizes are measured."""
    data: Path | None = None
    """The `.beton` file to read; None makes photographs."""
    out: Path = Path("runs/bench")
    """Folder of bench.json and bench.png, which replace those that are there."""
    batch_size: int = 0
    """Samples a step; 0 takes the configuration's, or less where that would not fit."""
    quick: bool = False
    """Few photographs, steps and repeats: to see that all works, not for figures."""
    overrides: tuple[str, ...] = ()
    """Configuration overrides, as `--data.loader torch`."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is done for the sake of the figures."""

    most_batch_size: int
    """Samples a step, unless `--batch-size` says otherwise."""
    num_photographs: int = 256
    """Made where no data are given."""
    num_passes: int = 4
    """Times that each of them stands in the file, so that an epoch is long beside its start."""
    num_stored: int = 256
    """Samples of storage, decode and crops."""
    num_loaded: int = 512
    """Samples of a repeat of the loader."""
    num_repeats: int = 5
    num_steps: int
    """Of the step's row."""
    num_whole_steps: int
    """Of a repeat of the end-to-end row."""


# A ResNet-50 step of the ImageNet recipe takes most of a second a sample on two cores; 256 samples fit in 40 GiB.
CPU = Effort(most_batch_size=8, num_steps=5, num_whole_steps=1)
GPU = Effort(most_batch_size=256, num_passes=32, num_loaded=4096, num_steps=20, num_whole_steps=16)
QUICK = Effort(
    most_batch_size=2,
    num_photographs=16,
    num_passes=1,
    num_stored=8,
    num_loaded=8,
    num_repeats=2,
    num_steps=2,
    num_whole_steps=1,
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came of it; None for what was not measured."""

    rows: list[Row]
    page_cache: str
    data: dict[str, Any] | None
    """Of the images."""
    kernels: dict[str, Any] | None
    method: dict[str, int] | None
    """The method's size, for `plan`."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured, and on what."""

    config: Config
    device: torch.device
    dtype: torch.dtype
    images: BetonImages | None
    """What the loader reads; None without its part."""
    made: bool
    """Whether the images were made for this."""
    effort: Effort
    loader_batch_size: int


def run_bench(options: BenchOptions, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure, print table and verdict, write bench.json and bench.png to `options.out`.

    Returns: what bench.json holds.
    Errors: `ConfigError`, `DataError` and `OSError`, before anything is measured where that can be known.
    """
    config = load_config(find_config(options.config), list(options.overrides))
    device, dtype = resolve_device(config)
    if device.type == "cpu" and options.parts == ("kernels",):
        raise ConfigError(f"bench kernels: there is no CUDA device here, and {NO_KERNELS}")
    if options.data is not None and "loader" not in options.parts:
        raise ConfigError(f"command line: --data {options.data}: only the part loader reads images")
    if config.train.accumulate > 1:
        raise ConfigError(
            f"train.accumulate = {config.train.accumulate}: bench measures one micro-batch; give "
            f"--train.accumulate 1 --batch-size {config.train.batch_size // config.train.accumulate}"
        )
    use_threads(config)
    effort = QUICK if options.quick else GPU if device.type == "cuda" else CPU
    environment = describe_environment(shlex.join(["fast-essl", *sys.argv[1:]]))
    options.out.mkdir(parents=True, exist_ok=True)
    # Photographs are made beside the results: on the user's disk, not in a /tmp that may be memory.
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=options.out) as scratch:
        images = None
        if "loader" in options.parts:
            images = open_beton(options.data or _photographs(Path(scratch), effort, say))
        num_samples = images.tables.num_samples if images else sys.maxsize
        batch_size, note = _batch_size(options, config, num_samples, effort)
        bench = Bench(
            config=_with(config, images, batch_size),
            device=device,
            dtype=dtype,
            images=images,
            made=options.data is None,
            effort=effort,
            loader_batch_size=min(LOADER_BATCH_SIZE, config.train.batch_size, num_samples),
        )
        processor = ", ".join(environment["gpus"]) or environment["cpu"]
        say(f"{options.config}, batch {batch_size}{note}; {processor}, {environment['num_cores']} cores")
        watch = Watch()
        try:
            measured = measure_parts(bench, options.parts, say)
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"a batch of {batch_size} does not fit in this GPU's memory; give a smaller --batch-size"
            ) from None
        use = watch.use()
    verdict, epoch_s = _conclude(bench, measured, use, say)
    results = {
        **environment,
        "quick": options.quick,
        "device": device.type,
        "config_name": str(options.config),
        "config": config_to_table(bench.config),
        "config_batch_size": config.train.batch_size,
        "data": measured.data,
        "page_cache": measured.page_cache,
        "machine_use": use.to_table(),
        "rows": {row.name: row.to_table() for row in measured.rows},
        "kernels": measured.kernels,
        "method": measured.method,
        "verdict": dataclasses.asdict(verdict) if verdict else None,
        "epoch_s": epoch_s,
    }
    records.write_json(options.out / RESULTS, results)
    say(f"{options.out / RESULTS}")
    if measured.rows:
        about = (
            f"{processor}, {environment['num_cores']} cores, batch {batch_size}, {environment['date'][:10]}"
        )
        try:
            write_chart(
                options.out / CHART,
                measured.rows,
                title=f"{options.config.stem}: {verdict.short}" if verdict else options.config.stem,
                subtitle=about,
                marked=_THREE,
            )
            say(f"{options.out / CHART}")
        except ConfigError as error:  # the figures are there without it
            say(str(error))
    return results


def _photographs(folder: Path, effort: Effort, say: Callable[[str], None]) -> Path:
    say(f"making {effort.num_photographs} photographs")
    made = write_jpegs(folder / "made", effort.num_photographs)
    path = folder / "photographs.beton"
    convert(str(repeat_files(made, folder / "repeated", effort.num_passes)), path, progress=False)
    return path


def _batch_size(options: BenchOptions, config: Config, num_samples: int, effort: Effort) -> tuple[int, str]:
    """Samples a step, and what is to be said of it."""
    if options.batch_size > num_samples:
        raise ConfigError(
            f"command line: --batch-size {options.batch_size}: there are only {num_samples} samples"
        )
    if options.batch_size:
        return options.batch_size, ""
    wanted = config.train.batch_size
    chosen = min(wanted, effort.most_batch_size, num_samples)
    note = f" (not the configuration's {wanted}: --batch-size chooses)" if chosen < wanted else ""
    return chosen, note


def _with(config: Config, images: BetonImages | None, batch_size: int) -> Config:
    """The configuration on these images, with this batch, and without evaluations."""
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, batch_size=batch_size, knn_every=0),
        views=dataclasses.replace(config.views, sizes=(), size_epochs=()),  # the last size, in all rows
    )
    if images is None:
        return config
    data = dataclasses.replace(config.data, train=images.path, test=images.path)
    return dataclasses.replace(config, data=data)


def _data_facts(images: BetonImages, *, made: bool) -> dict[str, Any]:
    tables = images.tables
    longer = np.maximum(images.heights, images.widths)
    return {
        "file": "photographs made for this" if made else images.path.name,
        "num_samples": tables.num_samples,
        "num_bytes": images.manifest.num_bytes,
        "bytes_per_sample": float(tables.data_sizes.mean()),
        "longer_side": float(longer.mean()),
        "jpeg_share": float((tables.modes == IMAGE_JPEG).mean()),
    }


def measure_parts(bench: Bench, parts: tuple[str, ...], say: Callable[[str], None]) -> Measured:
    """Measure these parts room by room, each row told when it is there."""
    config, device, effort = bench.config, bench.device, bench.effort
    recipes, num_repeats = config.crop_recipes(), effort.num_repeats
    form = step.Form(dtype=bench.dtype, compile=config.train.compile, view_stage=True)
    on_gpu = device.type == "cuda"
    rows: list[Row] = []
    page_cache, data, kernels, method = "", None, None, None

    def add(*new: Row) -> None:
        for row in new:
            rows.append(row)
            say(table_line(row, on_gpu=on_gpu))

    if bench.images is not None:
        data = _data_facts(bench.images, made=bench.made)
        say(
            f"{data['num_samples']:,} samples ({data['file']}), mean {data['bytes_per_sample'] / 1000:,.1f} kB, "
            f"longer side {data['longer_side']:.0f} pixels"
        )
    say(table_head(on_gpu=on_gpu))
    if bench.images is not None:
        threads = {"num_threads": loading.num_workers(config), "num_repeats": num_repeats}
        storage, page_cache = loading.storage_rows(bench.images, num_samples=effort.num_stored, **threads)
        add(*storage)
        jpegs = loading.choose(bench.images, effort.num_stored, jpeg_only=True)
        if len(jpegs):
            add(loading.decode_row(loading.load_stored(bench.images, jpegs), **threads))
        any_kind = loading.choose(bench.images, effort.num_stored)
        add(loading.crops_row(bench.images, any_kind, recipes, **threads))
        batch_size = bench.loader_batch_size
        loaded = {"batch_size": batch_size, "num_samples": max(effort.num_loaded, batch_size)}
        add(loading.loader_row(config, recipes, **loaded, num_repeats=num_repeats))
    if "views" in parts or "step" in parts:
        if on_gpu and config.data.loader not in (
            "dali",
            "device",
        ):  # whose crops are on the GPU from the start
            add(step.upload_row(make_crops(recipes, config.train.batch_size), device, num_repeats))
        add(step.views_row(config, form, device, num_repeats))
    if "step" in parts:
        new, training = step.step_rows(config, form, device, effort.num_steps)
        add(*new)
        method = training.describe()
        if bench.images is not None:
            whole = {"num_steps": effort.num_whole_steps, "num_repeats": num_repeats}
            add(step.whole_row(config, training, form, device, **whole))
    if "kernels" in parts and on_gpu:
        from fast_essl.bench.kernels import measure_kernels  # needs triton

        kernels = measure_kernels(device, KERNEL_REPEATS)
        say(describe_kernels(kernels))
    elif "kernels" in parts:
        say(f"kernels: not measured, since {NO_KERNELS}")
    if page_cache:
        say(page_cache)
    return Measured(rows=rows, page_cache=page_cache, data=data, kernels=kernels, method=method)


def _conclude(
    bench: Bench, measured: Measured, use: MachineUse, say: Callable[[str], None]
) -> tuple[Verdict | None, dict[str, float] | None]:
    """The three throughputs, the verdict and the predicted epochs, where all was measured; told and returned."""
    rows = {row.name: row for row in measured.rows}
    rates = {name: row.samples_per_s for name, row in rows.items()}
    facts, config = measured.data, bench.config
    if facts is None or not all(name in rates for name in _THREE):
        for doubt in busy(use):
            say(f"{doubt}: the figures may be too low")
        say("what limits a run is told when loader and step are measured together: `fast-essl bench all`")
        return None, None
    loader, ceiling, whole = (rates[name] for name in _THREE)
    say(
        f"\nloader alone {number(loader)}, step on device-made data {number(ceiling)}, "
        f"end to end {number(whole)} samples/s"
    )
    on_gpu = bench.device.type == "cuda"
    same_decoder = config.data.loader == "ffcv" and facts["jpeg_share"] == 1
    doubts = contradictions(rows, on_gpu=on_gpu, same_decoder=same_decoder) + varying(rows) + busy(use)
    figures = Figures(
        loader=loader,
        step=ceiling,
        end_to_end=whole,
        decode=rates.get(loading.DECODE),
        crops=rates.get(loading.CROPS),
        storage_disk=rates.get(loading.STORAGE_DISK),
        upload=rates.get(step.UPLOAD),
        view_stage=rates.get(step.VIEW_STAGE),
        optimizer=rates.get(step.OPTIMIZER),
        on_gpu=on_gpu,
        loader_name=config.data.loader,
        view_stage_name=config.data.view_stage,
        compile=config.train.compile,
        num_workers=loading.num_workers(config),
        fits_in_memory=facts["num_bytes"] <= free_memory_bytes(),
        longer_side=facts["longer_side"],
    )
    verdict = no_verdict(doubts) if doubts else judge(figures)
    say(verdict.sentence)
    epoch_s = {"data": facts["num_samples"] / whole, "imagenet": NUM_IMAGENET_SAMPLES / whole}
    if not doubts:
        say(
            f"an epoch of these {facts['num_samples']:,} samples takes {duration(epoch_s['data'])}, one of ImageNet's "
            f"{NUM_IMAGENET_SAMPLES:,}, were they like these, {duration(epoch_s['imagenet'])}"
        )
    return verdict, epoch_s
