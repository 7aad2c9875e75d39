"""photo-digits: handwritten digits blended over patches of two photographs; needs no download.

The construction of MNIST-M (Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 2016,
section 5.2.3): `|patch - digit|` in each colour channel. The digits are scikit-learn's `load_digits` (1,797
real ones of 8x8 pixels, UCI "Optical Recognition of Handwritten Digits"), scaled up to 28 to 32 pixels; the
patches are 32x32 cut-outs of its two real photographs (`load_sample_images`, 427x640), textured ones: on flat sky
even an untrained network reads the digit. Labels 0 to 9.

Train and test share nothing: four fifths of each class's digits and the left three quarters of each
photograph make train, the rest test. Image i is of class i mod 10 and takes that class's digits in turn, so
that classes are balanced. All chance comes from Philox with the seed as key and (split, image) in the
counter: image i is the same whatever the number of images.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from loaders.convert.encode import to_jpeg
from loaders.convert.source import Sample, Source
from loaders.errors import DataError

SIDE: Final = 32
NUM_CLASSES: Final = 10
NUM_SAMPLES: Final = {"train": 4000, "test": 1000}
_MIN_DIGIT_SIDE: Final = 28
_TRAIN_SHARE_OF_DIGITS: Final = 0.8
_TRAIN_SHARE_OF_PHOTO: Final = 0.75
_DIGIT_RANGE: Final = 16.0
# Least standard deviation of a patch within its channels, levels.
_MIN_TEXTURE: Final = 7.0
_STREAMS: Final = {"train": 0, "test": 1, "order": 2}


def open_photo_digits(
    split: str, *, quality: int = 90, num_samples: int | None = None, seed: int = 0
) -> Source:
    """The images of photo-digits, as JPEG streams of 32x32.

    Args:
        split: "train" or "test".
        quality: of the JPEG streams.
        num_samples: None = 4,000 for train, 1,000 for test.
        seed: another gives other pairings and another division of the digits.

    Errors: DataError if the split is another, or scikit-learn is not installed.
    """
    if split not in NUM_SAMPLES:
        raise DataError(
            f"photo-digits: has no split {split!r}; give one of {', '.join(NUM_SAMPLES)} with --split"
        )
    num = NUM_SAMPLES[split] if num_samples is None else num_samples
    digits = split_digits(split, seed)
    photos = split_photos(split)

    def samples() -> Iterator[Sample]:
        for index in range(num):
            chance = _generator(seed, _STREAMS[split], index)
            label = index % len(digits)
            digit = digits[label][index // len(digits) % len(digits[label])]
            jpeg = to_jpeg(_blend(digit, _textured_patch(photos, chance), chance), quality)
            yield Sample(f"photo-digits {split}: image {index}", label, jpeg)

    return Source(
        description=f"photo-digits {split}, seed {seed}",
        class_names=tuple(map(str, range(NUM_CLASSES))),
        num_samples=num,
        samples=samples,
    )


def split_digits(split: str, seed: int) -> list[npt.NDArray[np.float64]]:
    """The digits of a split: for each class, (N, 8, 8) from 0 to 16."""
    digits = _sklearn_datasets().load_digits()
    chosen = []
    for label in range(NUM_CLASSES):
        ours = _generator(seed, _STREAMS["order"], label).permutation(np.flatnonzero(digits.target == label))
        border = round(len(ours) * _TRAIN_SHARE_OF_DIGITS)
        chosen.append(digits.images[ours[:border] if split == "train" else ours[border:]])
    return chosen


def split_photos(split: str) -> list[npt.NDArray[np.uint8]]:
    """The two photographs' regions of a split, each (427, W, 3) uint8."""
    photos = _sklearn_datasets().load_sample_images().images
    borders = [round(photo.shape[1] * _TRAIN_SHARE_OF_PHOTO) for photo in photos]
    return [
        photo[:, :border] if split == "train" else photo[:, border:]
        for photo, border in zip(photos, borders, strict=True)
    ]


def _blend(
    digit: npt.NDArray[np.float64], patch: npt.NDArray[np.uint8], chance: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """One image (32, 32, 3) uint8: the patch, and on it the digit (8, 8) at a random size and place."""
    side = int(chance.integers(_MIN_DIGIT_SIDE, SIDE + 1))
    digit_top, digit_left = (int(offset) for offset in chance.integers(SIDE - side + 1, size=2))
    grey = Image.fromarray(np.round(digit * (255 / _DIGIT_RANGE)).astype(np.uint8))
    stroke = np.zeros((SIDE, SIDE, 1), np.int16)
    scaled = np.asarray(grey.resize((side, side), Image.Resampling.BICUBIC))
    stroke[digit_top : digit_top + side, digit_left : digit_left + side, 0] = scaled
    blended: npt.NDArray[np.uint8] = np.abs(patch.astype(np.int16) - stroke).astype(np.uint8)
    return blended


def _textured_patch(
    photos: list[npt.NDArray[np.uint8]], chance: np.random.Generator
) -> npt.NDArray[np.uint8]:
    while True:
        photo = photos[chance.integers(len(photos))]
        top, left = (int(chance.integers(length - SIDE + 1)) for length in photo.shape[:2])
        patch = photo[top : top + SIDE, left : left + SIDE]
        if patch.std(axis=(0, 1)).mean() >= _MIN_TEXTURE:
            return patch


def _generator(seed: int, stream: int, index: int) -> np.random.Generator:
    # The lowest word of the counter runs while numbers are drawn; the two highest name the stream and the
    # image.
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, stream, index]))


def _sklearn_datasets() -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError(
            "photo-digits: needs scikit-learn; install it with `pip install scikit-learn`"
        ) from error
    return datasets
