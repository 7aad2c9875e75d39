"""What several tests share: small photographs made here, one `.beton` file of them, and the optional shared data."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Before numba is imported anywhere: more threads than this machine has cores, so that a test can ask for four.
os.environ.setdefault("NUMBA_NUM_THREADS", "4")

import numpy as np
import pytest
import torch
from PIL import Image
from support import SHARED, photograph

from loaders.convert import convert

# Before triton is imported anywhere: without a device its interpreter runs the kernels, on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell ignores SIGINT in what it starts in the background, and so would all that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder: 3 classes, 70 images of all shapes, one of them greyscale, one a palette PNG."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(70):
        directory = folder / f"class{number % 3}"
        directory.mkdir(exist_ok=True)
        height, width = (int(side) for side in random.integers(40, 300, 2))
        image = photograph(number, height, width)
        if number == 5:
            image.convert("L").save(directory / f"{number:03}.jpg", quality=92)
        elif number == 7:
            image.convert("P").save(directory / f"{number:03}.png")
        else:
            image.save(directory / f"{number:03}.jpg", quality=92)
    return folder


@pytest.fixture(scope="session")
def photo_beton(photo_folder: Path) -> Path:
    """The image folder as a `.beton` file with its manifest."""
    destination = photo_folder.parent / f"{photo_folder.name}.beton"
    convert(str(photo_folder), destination, workers=1, progress=False)
    return destination


@pytest.fixture(scope="session")
def shared_photos() -> Path:
    """The ImageNet photographs of the developers' shared data."""
    folder = SHARED / "data" / "imagenet-sample"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/imagenet-sample")
    return folder


@pytest.fixture(scope="session")
def photo_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photo-digits as the demo has them, `photo-digits-train.beton` and `photo-digits-test.beton`."""
    folder = tmp_path_factory.mktemp("photo-digits")
    for split in ("train", "test"):
        convert("photo-digits", folder / f"photo-digits-{split}.beton", split=split, progress=False)
    return folder


TINY = """
[data]
loader = "torch"
num_workers = 1
[views]
eval_size = 16
view1 = { size = 16 }
view2 = { size = 16 }
transformed = { size = 8 }
[model]
backbone = "resnet10"
width = 8
projector_hidden = 16
projector_out = 16
[head]
hidden = 16
[optimizer]
warmup_epochs = 1
[train]
epochs = 3
batch_size = 8
log_every = 1
knn_every = 2
checkpoint_every = 3
num_threads = 1
"""


def _beton(folder: Path, name: str, *, num_images: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for index in range(num_images):
        path = folder / name / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(path)
    convert(str(folder / name), folder / f"{name}.beton", workers=1, progress=False)
    return folder / f"{name}.beton"


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of 3 epochs of 4 steps on 34 images of noise, beside train, test and other.beton."""
    folder = tmp_path_factory.mktemp("tiny")
    train = _beton(folder, "train", num_images=34, seed=1)
    test = _beton(folder, "test", num_images=10, seed=2)
    _beton(folder, "other", num_images=34, seed=3)
    path = folder / "tiny.toml"
    path.write_text(TINY.replace("[data]", f'[data]\ntrain = "{train}"\ntest = "{test}"'))
    return path
