"""Transformations: against the official copies, against plain index arithmetic, and as groups."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from support import parity

from fast_essl.cli import main
from fast_essl.config import ConfigError
from fast_essl.config_io import load_config
from fast_essl.transformations import TRANSFORMATIONS, build_transformation, config_transformations
from loaders.errors import DataError
from loaders.transformation import source_pixels

SIZE = 8
MOVES_PIXELS = sorted(set(TRANSFORMATIONS) - {"grayscale", "colour_inversion", "gaussian_blur"})


def build(name, *elements, size=SIZE):
    return build_transformation(name, elements, size=size)


def images(count=3, channels=3, size=SIZE, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((count, channels, size, size)))


def test_the_rotations_are_the_official_ones():
    official = parity("rotate_images")
    rotation = build("four_fold_rotation")
    assert np.array_equal(rotation.copies(torch.from_numpy(official["images"])), official["rotated"])
    assert np.array_equal(rotation.labels(len(official["images"])), official["labels"])


@pytest.mark.parametrize(
    ("name", "key"),
    [("four_fold_rotation", "rot4"), ("cyclic_translations", "trans"), ("four_flips", "flip")],
)
def test_the_photonics_groups_are_the_official_ones(name, key):
    official = parity("photonics_transformations")
    transformation = build(name, size=32)
    assert np.array_equal(transformation.copies(torch.from_numpy(official["images"])), official[key])
    assert np.array_equal(transformation.labels(len(official["images"])), official[f"{key}_labels"])


def moved(image, source):
    """Each pixel of the result from `source(y, x)`, written out."""
    result = torch.empty_like(image)
    for y in range(SIZE):
        for x in range(SIZE):
            result[:, y, x] = image[(slice(None), *source(y, x))]
    return result


LAST, HALF = SIZE - 1, SIZE // 2


def quarter_source(order):
    """Where a pixel of a jigsaw comes from: the quarter that its place shows, at the same spot of it."""

    def source(y, x):
        shown = order[2 * (y // HALF) + x // HALF]
        return shown // 2 * HALF + y % HALF, shown % 2 * HALF + x % HALF

    return source


SOURCES = {
    # A quarter turn counter-clockwise brings the right edge to the top.
    "four_fold_rotation": [
        lambda y, x: (y, x),
        lambda y, x: (x, LAST - y),
        lambda y, x: (LAST - y, LAST - x),
        lambda y, x: (LAST - x, y),
    ],
    "horizontal_flip": [lambda y, x: (y, x), lambda y, x: (y, LAST - x)],
    "vertical_flip": [lambda y, x: (y, x), lambda y, x: (LAST - y, x)],
    "four_flips": [
        lambda y, x: (y, x),
        lambda y, x: (LAST - y, x),
        lambda y, x: (y, LAST - x),
        lambda y, x: (LAST - y, LAST - x),
    ],
    "jigsaw": [quarter_source(order) for order in permutations(range(4))],
    "half_swap": [lambda y, x: (y, x), lambda y, x: ((y + HALF) % SIZE, x)],
    "cyclic_translations": [
        lambda y, x: (y, x),
        lambda y, x: (y, (x - HALF) % SIZE),
        lambda y, x: ((y - HALF) % SIZE, x),
        lambda y, x: ((y - HALF) % SIZE, (x - HALF) % SIZE),
    ],
}


@pytest.mark.parametrize("name", MOVES_PIXELS)
def test_each_copy_is_its_index_arithmetic(name):
    batch, transformation = images(), build(name)
    copies = transformation.copies(batch)
    assert transformation.num_elements == len(SOURCES[name])
    for label, source in enumerate(SOURCES[name]):
        for n, image in enumerate(batch):
            assert torch.equal(copies[label * len(batch) + n], moved(image, source)), (label, n)
    table = source_pixels(transformation, SIZE)
    assert torch.equal(batch.flatten(2)[:, :, table[-1]].view_as(batch), copies[-len(batch) :])


@pytest.mark.parametrize("name", MOVES_PIXELS)
def test_a_group_is_closed_and_tells_its_elements_apart(name):
    """Composed pixel tables are again tables of the group, and all differ."""
    tables = [tuple(row.tolist()) for row in source_pixels(build(name), SIZE)]
    assert len(set(tables)) == len(tables)
    composed = {tuple(one[pixel] for pixel in other) for one in tables for other in tables}
    assert composed == set(tables)


def test_grey_inversion_and_blur_are_their_formulas():
    batch = images()
    weights = torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64)
    as_it_is, grey = build("grayscale").copies(batch).chunk(2)
    assert torch.equal(as_it_is, batch)
    assert torch.allclose(grey, torch.einsum("c,nchw->nhw", weights, batch)[:, None].expand_as(batch))
    as_it_is, inverted = build("colour_inversion").copies(batch).chunk(2)
    assert torch.equal(as_it_is, batch) and torch.equal(inverted, 1 - batch)
    # A dot blurred by a Gaussian of σ = 32 / 16 falls as exp(-d² / 2σ²).
    dot = torch.zeros(1, 3, 32, 32)
    dot[:, :, 16, 16] = 1
    sharp, blurred = build("gaussian_blur", size=32).copies(dot).chunk(2)
    assert torch.equal(sharp, dot) and float(blurred.sum()) == pytest.approx(3, rel=1e-5)
    assert float(blurred[0, 0, 16, 18] / blurred[0, 0, 16, 16]) == pytest.approx(np.exp(-0.5), rel=1e-5)
    for name in ("grayscale", "colour_inversion", "gaussian_blur"):
        assert source_pixels(build(name), SIZE) is None


def test_chosen_elements_are_the_labels_in_their_order():
    batch, jigsaw = images(), build("jigsaw", 23, 0, 7)
    all_copies = build("jigsaw").copies(batch).view(24, *batch.shape)
    assert torch.equal(jigsaw.copies(batch), torch.cat([all_copies[23], all_copies[0], all_copies[7]]))
    assert jigsaw.labels(2).tolist() == [0, 0, 1, 1, 2, 2]
    chosen = torch.tensor([2, 0, 1])
    expected = torch.stack([all_copies[(23, 0, 7)[label], n] for n, label in enumerate(chosen)])
    assert torch.equal(jigsaw.one_each(batch, chosen), expected)


def test_the_images_are_left_as_they_are():
    for name in TRANSFORMATIONS:
        batch = images()
        before = batch.clone()
        build(name).copies(batch).fill_(0.5)
        assert torch.equal(batch, before), name


@pytest.mark.parametrize(
    ("name", "elements", "size", "message"),
    [
        ("four_fold", (), 8, "'four_fold' is unknown; choose one of four_fold_rotation"),
        ("jigsaw", (), 9, "'jigsaw': needs images of an even side, not 9 pixels"),
        ("half_swap", (), 9, "even side"),
        ("cyclic_translations", (), 9, "even side"),
        ("jigsaw", (0, 24), 8, "its elements are 0 to 23"),
        ("jigsaw", (3, 3), 8, "two or more different"),
        ("four_fold_rotation", (1,), 8, "two or more different"),
        ("nowhere.py:turn", (), 8, "there is no file nowhere.py"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(name, elements, size, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(name, *elements, size=size)
    assert "\n" not in str(error.value)


def test_a_transformation_of_one_s_own_is_a_function_in_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def transpose(images):\n    return [images, images.transpose(2, 3)]\n")
    transformation = build(f"{path}:transpose")
    batch = images()
    assert torch.equal(transformation.copies(batch)[3:], batch.transpose(2, 3))
    assert source_pixels(transformation, SIZE) is not None
    for text, message in (
        ("def transpose(images) return", "does not load"),
        ("def other(images): ...", "has no function 'transpose'"),
        ("def transpose(images):\n    return [images, images[:1]]\n", "makes \\(1, 3, 8, 8\\)"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            build(f"{path}:transpose")


def test_a_configuration_names_what_does_not_fit(tiny_config):
    config = load_config(tiny_config)
    equivariance, invariance = config_transformations(config)
    assert equivariance is not None and equivariance.num_elements == 4 and invariance is None
    odd = ["--views.transformed.size", "9", "--transformation.equivariance", "jigsaw"]
    with pytest.raises(
        ConfigError, match=r"transformation\.equivariance: transformation 'jigsaw': needs images of an even"
    ):
        config_transformations(load_config(tiny_config, odd))
    with pytest.raises(ConfigError, match=r"transformation\.invariance"):
        config_transformations(load_config(tiny_config, ["--transformation.invariance", "mirror"]))
    chosen = ["--transformation.equivariance-elements", "0", "2", "--transformation.invariance", "four_flips"]
    equivariance, invariance = config_transformations(load_config(tiny_config, chosen))
    assert equivariance.elements == (0, 2) and invariance.name == "four_flips"
    plain = replace(config.method, equivariance_weight=0.0)
    assert config_transformations(replace(config, method=plain)) == (None, None)


FUNCTION = "import sys, torch\ndef mine(images):\n    {}\n    return [images, images.flip(3)]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FUNCTION.format("1 / 0"), "ZeroDivisionError: division by zero ({}, line 3)"),
        (FUNCTION.format("torch.cat(3)"), "TypeError: cat(): {anything} ({}, line 3)"),
        (
            FUNCTION.format("raise ValueError('only at\\n8 pixels')"),
            "ValueError: only at 8 pixels ({}, line 3)",
        ),
        (FUNCTION.format("sys.exit()"), "SystemExit:  ({}, line 3)"),
        (FUNCTION.format("return None"), "returns a NoneType, not a list of tensors ({}, line 2)"),
        (FUNCTION.format("yield images"), "returns a generator, not a list of tensors ({}, line 2)"),
        (FUNCTION.format("return [images, 1]"), "returns a int among its copies, not a tensor ({}, line 2)"),
        (
            FUNCTION.format("return [images, images[:1]]"),
            "makes (1, 3, 8, 8) of images of shape (2, 3, 8, 8) ({}, line 2)",
        ),
        (
            FUNCTION.format("return [images, images.half()]"),
            "makes torch.float16 on cpu of images of torch.float32 on cpu ({}, line 2)",
        ),
        (FUNCTION.format("images.mul_(2)"), "changes the images that it is given; {anything} ({}, line 2)"),
        (FUNCTION.format("images.numpy()[:] = 0"), "changes the images that it is given; return others"),
        (FUNCTION.format("return [images, images / 0]"), "makes NaN or infinity of levels in [0, 1]"),
        ("def mine(images) return", "{} does not load: SyntaxError: expected ':' ({}, line 1)"),
        ("import os\n\nos.nowhere()", "{} does not load: AttributeError: {anything} ({}, line 3)"),
        ("import sys\nsys.exit(0)\n", "{} does not load: SystemExit: 0 ({}, line 2)"),
    ],
)
def test_what_is_wrong_with_one_s_own_is_one_line_with_file_and_line(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        build(f"{path}:mine")
    wanted = message.replace("{}", str(path)).split("{anything}")
    assert str(error.value).startswith(f"transformation '{path}:mine': {wanted[0]}")
    assert str(error.value).endswith(wanted[-1])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("return [images, images, images]", "makes 3 copies, and made 2 before ({}, line 2)"),
        ("return [images]", "makes 1 copies, and made 2 before ({}, line 2)"),
        ("return [images, images.half()]", "makes torch.float16 on cpu"),
        ("images.zero_()", "changes the images that it is given"),
        ("raise KeyError('a')", "KeyError: 'a' ({}, line 3)"),
    ],
)
def test_what_goes_wrong_later_is_one_line_too(tmp_path, line, message):
    path = tmp_path / "mine.py"
    path.write_text(FUNCTION.format(f"if len(images) == 3: {line}"))
    transformation = build(f"{path}:mine")
    transformation.copies(images(4))
    with pytest.raises(DataError) as error:
        transformation.copies(images(3))
    assert str(error.value).startswith(f"transformation '{path}:mine': {message.replace('{}', str(path))}")


def test_a_function_for_one_type_alone_is_called_each_time(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FUNCTION.format("return [images, images.float().flip(3)]"))
    transformation = build(f"{path}:mine")
    assert source_pixels(transformation, SIZE) is None
    assert len(transformation.copies(images().float())) == 6


def test_a_run_says_which_transformation_failed(tiny_config, tmp_path, capsys):
    path = tmp_path / "mine.py"
    # Two images are the try at the start; the steps have eight.
    path.write_text(FUNCTION.format("if len(images) > 2: sys.exit(0)"))
    words = ["pretrain", str(tiny_config), "--run-dir", str(tmp_path / "run"), "--train.knn-every", "0"]
    # Levels change, so that the function is called in every step.
    path.write_text(path.read_text().replace("images.flip(3)", "1 - images"))
    assert main([*words, "--transformation.equivariance", f"{path}:mine"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"fast-essl: error: transformation '{path}:mine': SystemExit: 0 ({path}, line 3)"
