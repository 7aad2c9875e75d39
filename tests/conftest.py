"""What several tests share: small photographs made here, one `.beton` file of them, and the optional shared data."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Before numba is imported anywhere: more threads than this machine has cores, so that a test can ask for four.
os.environ.setdefault("NUMBA_NUM_THREADS", "4")

import numpy as np
import pytest
from support import SHARED, photograph

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
    from loaders.convert import convert

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
