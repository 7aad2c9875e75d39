"""What faults are injected into, made here: noise and photographs as `.beton`, configurations of tiny runs."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import children
import numpy as np
from PIL import Image

METHODS = ("e_simclr", "e_simsiam", "e_barlow_twins", "simclr")
WIDTHS = (8, 16)
NUM_STEPS = 8
MIXED_SIDE = 160
"""Of the images that conversions are tried with, pixels."""
CONFIG = """
extends = ["{method}_cifar10"]

[data]
train = "{folder}/train.beton"
test = "{folder}/test.beton"
loader = "{loader}"
num_workers = 1
view_stage = "{view_stage}"

[views]
eval_size = 16
view1 = {{ size = 16 }}
view2 = {{ size = 16 }}
transformed = {{ size = 8 }}

[model]
backbone = "resnet10"
width = {width}
projector_hidden = 16
projector_out = 16
predictor_hidden = 16

[head]
hidden = 16

[optimizer]
warmup_epochs = 1

[train]
epochs = 2
batch_size = 8
log_every = 1
knn_every = 1
checkpoint_every = 3
num_threads = {num_threads}
"""
STUDY = """
title = "One method"
rows = ["four_fold_rotation"]

[columns.sensitive]
config = "{config}"
transformation = {{ equivariance = "{{row}}" }}
"""


@dataclass(frozen=True, kw_only=True)
class BetonSize:
    """How many images of which side a file for bit flips has."""

    num_images: int
    side: int


# Opening a file of 0.1.0 checks four blocks of 8 MiB, so the first two have some more.
BETON_FILES = {
    "raw": BetonSize(num_images=5600, side=64),
    "photographs": BetonSize(num_images=560, side=448),
    "one block": BetonSize(num_images=2500, side=32),
}


def make_beton(name: str, folder: Path, share: float) -> Path:
    """One of `BETON_FILES`, smaller where less than a tenth of the faults is asked for.

    Errors: `RuntimeError` when it cannot be converted.
    """
    source = folder / f"{name} source"
    size = BETON_FILES[name]
    num_images = max(40, round(size.num_images * min(1, 10 * share)))
    size = BetonSize(num_images=num_images, side=size.side)
    make_images = _write_photographs if name == "photographs" else _write_noise
    return _converted(
        partial(make_images, source, size), source, folder / f"{name.replace(' ', '-')}.beton", folder
    )


def make_training_data(folder: Path) -> None:
    """train.beton and test.beton, small and not quite learnable, so that accuracies move with every step."""
    for name, num_images, seed in (("train", 34, 1), ("test", 60, 2)):
        source = folder / f"{name} source"
        _converted(partial(_write_tinted, source, num_images, seed), source, folder / f"{name}.beton", folder)


def make_config(
    folder: Path, method: str, width: int, *, num_threads: int = 1, loader: str = "device"
) -> Path:
    """A configuration of `NUM_STEPS` steps on `make_training_data`; a checkpoint every third, two evaluations.

    Args: with the loader `torch`, which has a process of its own, the view stage is the compiled one. Both take longer.
    """
    path = folder / f"{method}-{width}.toml"
    view_stage = "reference" if loader == "device" else "auto"
    path.write_text(
        CONFIG.format(
            method=method,
            folder=folder,
            loader=loader,
            view_stage=view_stage,
            width=width,
            num_threads=num_threads,
        )
    )
    return path


def make_study(folder: Path, config: Path) -> Path:
    """A study of a single run."""
    path = folder / "study.toml"
    path.write_text(STUDY.format(config=config))
    return path


def make_mixed_folders(folder: Path) -> tuple[Path, Path]:
    """Two image folders of other images: photographs, some of them without loss."""
    sources = folder / "source of old", folder / "source of new"
    for number, source in enumerate(sources):
        outcome = children.run(partial(_write_mixed, source, 100 * number), folder=folder)
        if outcome.code:
            raise RuntimeError(f"{source}: {outcome.stderr}")
    return sources


def photograph(seed: int, side: int) -> Image.Image:
    """Smooth colour fields with an edge and a little noise, as the tests make them."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(np.float32)
    pixels[side // 3 :, side // 2 :] *= 0.6
    pixels += random.normal(0, 8, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _converted(write_images: partial[None], source: Path, destination: Path, folder: Path) -> Path:
    for action in (write_images, children.command("convert", source, destination, "--workers", 1)):
        outcome = children.run(action, folder=folder, limit_s=300)
        if outcome.code:
            raise RuntimeError(f"{destination}: {outcome.stderr}")
    return destination


def _class_folder(source: Path, number: int) -> Path:
    folder = source / f"class{number % 3}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_noise(source: Path, size: BetonSize) -> None:
    random = np.random.default_rng(0)
    for number in range(size.num_images):
        pixels = random.integers(0, 256, (size.side, size.side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(_class_folder(source, number) / f"{number:05}.bmp")


def _write_photographs(source: Path, size: BetonSize) -> None:
    photographs = [np.asarray(photograph(seed, size.side)) for seed in range(30)]
    for number in range(size.num_images):
        pixels = np.roll(photographs[number % len(photographs)], 7 * number, axis=1)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        (_class_folder(source, number) / f"{number:05}.jpg").write_bytes(buffer.getvalue())


def _write_mixed(source: Path, seed: int) -> None:
    for number in range(24):
        ending = "png" if number % 4 == 0 else "jpg"
        photograph(seed + number, MIXED_SIDE).save(_class_folder(source, number) / f"{number:05}.{ending}")


def _write_tinted(source: Path, num_images: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    for number in range(num_images):
        pixels = np.asarray(photograph(1000 * seed + number, 20)).astype(np.int16)
        pixels[..., number % 3] += random.integers(10, 90)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(_class_folder(source, number) / f"{number:05}.png")
