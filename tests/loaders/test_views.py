"""The view stage: the reference against obvious formulas, numba's and Triton's against those and the reference."""

from __future__ import annotations

import colorsys
import importlib
import sys
from dataclasses import fields, replace
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support import photograph

from fast_essl.staging import to_device
from fast_essl.transformations import TRANSFORMATIONS, build_transformation
from loaders.batch import Crops
from loaders.errors import DataError
from loaders.parameters import ViewParameters, draw_parameters
from loaders.recipe import Recipe
from loaders.transformation import Transformation
from loaders.views import cpu, reference, resolve_view_stage

try:
    cuda = importlib.import_module("loaders.views.cuda")
except ModuleNotFoundError:  # no triton
    cuda = None
COMPILED = [cpu, pytest.param(cuda, marks=pytest.mark.device)] if cuda else [cpu]
STAGES = [reference, *COMPILED]
ROTATION = build_transformation("four_fold_rotation", size=8)
NOTHING = Recipe.evaluation(20)
IDENTITY = {
    "jitter": (1, 1, 1, 0),
    "jitter_order": (0, 1, 2, 3),
    "blur_sigma": 0.0,
    "flip": 0,
    "grey": 0,
    "solarize": 0,
    "element_word": 0,
}


def photographs(count, size):
    return torch.stack([torch.from_numpy(np.array(photograph(seed, size, size))) for seed in range(count)])


def table(count, **columns):
    """A parameter table of one view in which every sample has the same values."""
    values = {"box": (0, 0, 1, 1), **IDENTITY, **columns}
    types = {"box": np.int32, "jitter": np.float32, "blur_sigma": np.float32, "element_word": np.uint32}
    return ViewParameters(
        **{
            field.name: np.array([[values[field.name]]] * count, dtype=types.get(field.name, np.uint8))
            for field in fields(ViewParameters)
        }
    )


def crops(images, parameters):
    count = len(images[0])
    return Crops(
        images=tuple(images), labels=torch.arange(count), indices=torch.arange(count), parameters=parameters
    )


def make_views(module, batch, recipes, **options):
    """The stage's views, in main memory; Triton's are made on a device if there is one, else in its interpreter."""
    if module is not cuda or not torch.cuda.is_available():
        return module.make_views(batch, recipes, **options)
    views = module.make_views(to_device(batch, torch.device("cuda")), recipes, **options)
    tensors = {name: value.cpu() for name, value in vars(views).items() if isinstance(value, torch.Tensor)}
    return replace(views, views=tuple(view.cpu() for view in views.views), **tensors)


def drawn(recipes, count, *, seed=0, epoch=0):
    """The tables of `count` samples of 50² pixels."""
    sides = np.full(count, 50)
    return draw_parameters(
        recipes, seed=seed, epoch=epoch, indices=np.arange(count), heights=sides, widths=sides
    )


def pixels(module, images, **columns):
    """One view, before normalisation, as (N, S, S, 3) in [0, 255]."""
    recipe = replace(NOTHING, size=images.shape[1])
    views = make_views(module, crops([images], table(len(images), **columns)), (recipe,))
    return unnormalise(views.views[0], recipe).permute(0, 2, 3, 1) * 255


def unnormalise(view, recipe):
    return view * torch.tensor(recipe.std).view(3, 1, 1) + torch.tensor(recipe.mean).view(3, 1, 1)


@pytest.mark.parametrize("module", STAGES)
def test_identity_parameters_leave_the_pixels(module):
    images = photographs(3, 20)
    assert (pixels(module, images) - images).abs().max() < 1e-3


@pytest.mark.parametrize("module", STAGES)
def test_flip_grey_and_solarize_equal_pillow(module):
    images = photographs(4, 21)
    pillow = [Image.fromarray(image.numpy()) for image in images]

    def stacked(function):
        return torch.stack([torch.from_numpy(np.array(function(image).convert("RGB"))) for image in pillow])

    assert (pixels(module, images, flip=1) - stacked(ImageOps.mirror)).abs().max() < 1e-3
    assert (pixels(module, images, solarize=1) - stacked(ImageOps.solarize)).abs().max() < 1e-3
    # Pillow rounds grey to whole levels.
    assert (pixels(module, images, grey=1) - stacked(lambda image: image.convert("L"))).abs().max() <= 0.6


@pytest.mark.parametrize("module", STAGES)
def test_solarize_inverts_from_level_128(module):
    """Each of the 256 levels in each channel; the neighbours of the threshold included."""
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    expected = np.where(levels < 128, levels, 255 - levels.astype(np.int64))
    assert np.abs(pixels(module, torch.from_numpy(levels), solarize=1).numpy() - expected).max() < 1e-3


@pytest.mark.parametrize("module", STAGES)
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.4])
def test_brightness_contrast_and_saturation_are_their_formulas(module, factor):
    images = photographs(2, 16)
    x = images.numpy().astype(np.float64) / 255
    grey = x @ np.array([0.2989, 0.587, 0.114])
    expected = {
        0: x * factor,
        1: x * factor + grey.mean(axis=(1, 2))[:, None, None, None] * (1 - factor),
        2: x * factor + grey[..., None] * (1 - factor),
    }
    for op, values in expected.items():
        jitter = [1.0, 1.0, 1.0, 0.0]
        jitter[op] = factor
        difference = pixels(module, images, jitter=jitter).numpy() - values.clip(0, 1) * 255
        assert np.abs(difference).max() < 2e-3, op


@pytest.mark.parametrize("module", STAGES)
@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.03, 0.5])
def test_hue_turns_each_pixel_as_colorsys(module, shift):
    random = np.random.default_rng(1)
    images = torch.from_numpy(random.integers(0, 256, (2, 12, 12, 3), dtype=np.uint8))
    images[0, 0, :6] = torch.tensor(
        [[0, 0, 0], [255, 255, 255], [9, 9, 9], [255, 0, 0], [0, 255, 255], [7, 7, 200]]
    )
    result = pixels(module, images, jitter=(1, 1, 1, shift)).reshape(-1, 3).tolist()
    for before, after in zip(images.reshape(-1, 3).tolist(), result, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(level / 255 for level in before))
        expected = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
        assert after == pytest.approx([255 * level for level in expected], abs=0.01)


@pytest.mark.parametrize("module", STAGES)
@pytest.mark.parametrize(("size", "sigma"), [(16, 0.1), (16, 0.7), (33, 2.0), (5, 2.0), (2, 1.0)])
def test_blur_is_a_gaussian_sum(module, size, sigma):
    """Pixel by pixel, with the weights of the definition and borders that reflect."""
    image = photographs(1, size)
    radius = min(int(np.ceil(3 * sigma)), size - 1)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    weights /= weights.sum()
    source = image[0].numpy().astype(np.float64)

    def reflected(position):
        position = abs(position)
        return position if position < size else 2 * (size - 1) - position

    expected = np.zeros_like(source)
    for y in range(size):
        for x in range(size):
            for dy, wy in zip(offsets, weights, strict=True):
                for dx, wx in zip(offsets, weights, strict=True):
                    expected[y, x] += wy * wx * source[reflected(y + dy), reflected(x + dx)]
    assert np.abs(pixels(module, image, blur_sigma=sigma)[0].numpy() - expected).max() < 0.01


@pytest.mark.parametrize("module", STAGES)
def test_the_order_of_the_jitter_is_each_sample_s_own(module):
    """All 24 orders in one batch; each equals the four operations applied one after the other in that order."""
    orders = list(permutations(range(4)))
    images = photographs(1, 14).expand(24, -1, -1, -1).contiguous()
    jitter = (1.4, 0.6, 1.4, 0.1)
    parameters = replace(table(24, jitter=jitter), jitter_order=np.array(orders, np.uint8)[:, None])
    recipe = replace(NOTHING, size=14)
    view = make_views(module, crops([images], parameters), (recipe,)).views[0]
    result = unnormalise(view, recipe)
    operations = [
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    ]
    for n, order in enumerate(orders):
        x = images[:1].permute(0, 3, 1, 2) / 255
        for op in order:
            x = operations[op](x, torch.tensor(jitter[op]).view(1, 1, 1, 1))
        assert (result[n] - x[0]).abs().max() < 1e-4, order
    assert len({tuple(result[n].flatten()[:50].tolist()) for n in range(24)}) > 6


@pytest.mark.parametrize("module", COMPILED)
@pytest.mark.parametrize("size", [1, 16, 31, 96])
def test_a_compiled_stage_equals_the_reference_within_a_level(module, size):
    recipe = Recipe(size=size, blur_p=0.5, solarize_p=0.3, hue=0.5, brightness=0.8, flip_p=0.5)
    recipes = (recipe, replace(recipe, jitter_p=1.0), recipe)
    count = 40 if size < 96 else 6
    batch = crops([photographs(count, size) for _ in recipes], drawn(recipes, count, seed=3))
    ours = make_views(module, batch, recipes, equivariance=ROTATION)
    expected = reference.make_views(batch, recipes, equivariance=ROTATION)
    for view, other in zip(
        (*ours.views, ours.transformed), (*expected.views, expected.transformed), strict=True
    ):
        assert view.shape == other.shape and view.is_contiguous(memory_format=torch.channels_last)
        assert ((unnormalise(view, recipe) - unnormalise(other, recipe)).abs() * 255).max() <= 1
    assert torch.equal(ours.transformed_labels, expected.transformed_labels)


@pytest.mark.parametrize("module", STAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_views_have_the_promised_form(module, dtype):
    recipes = (NOTHING, NOTHING, replace(NOTHING, size=10))
    batch = crops([photographs(3, r.size) for r in recipes], drawn(recipes, 3))
    views = make_views(module, batch, recipes, equivariance=ROTATION, dtype=dtype)
    assert [tuple(view.shape) for view in views.views] == [(3, 3, 20, 20)] * 2
    assert tuple(views.transformed.shape) == (12, 3, 10, 10)
    for view in (*views.views, views.transformed):
        assert view.dtype == dtype and view.is_contiguous(memory_format=torch.channels_last)
    assert views.transformed_labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert torch.equal(views.labels, batch.labels) and torch.equal(views.indices, batch.indices)
    for k in range(4):
        expected = torch.rot90(views.transformed[:3], k, (2, 3))
        assert torch.equal(views.transformed[3 * k : 3 * k + 3], expected)
    plain = make_views(module, batch, recipes, dtype=dtype)
    assert len(plain.views) == 3 and plain.transformed is None and plain.transformed_labels is None
    assert torch.equal(plain.views[2], views.transformed[:3])


@pytest.mark.parametrize("module", COMPILED)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_compiled_stage_makes_the_same_copies_of_every_transformation(module, name):
    """Equivariant to one and invariant to the same: the last crop in all ways, the others by the drawn element."""
    transformation = build_transformation(name, size=14)
    recipe = Recipe(size=14, jitter_p=0.5)
    count = 30
    parameters = drawn((recipe,) * 3, count, seed=5, epoch=1)
    batch = crops([photographs(count, 14) for _ in range(3)], parameters)
    chosen = {"equivariance": transformation, "invariance": transformation}
    ours, expected = (make_views(stage, batch, (recipe,) * 3, **chosen) for stage in (module, reference))
    assert len(ours.transformed) == transformation.num_elements * count and len(ours.views) == 2
    for view, other in zip(
        (*ours.views, ours.transformed), (*expected.views, expected.transformed), strict=True
    ):
        assert view.shape == other.shape and view.is_contiguous(memory_format=torch.channels_last)
        assert ((unnormalise(view, recipe) - unnormalise(other, recipe)).abs() * 255).max() <= 1
    # Each view is the copy that its word in the table asks for.
    all_copies = transformation.copies(reference.augment(batch.images[0], parameters.view(0)))
    for n in range(count):
        element = int(parameters.element_word[n, 0]) * transformation.num_elements // 2**32
        assert torch.allclose(
            unnormalise(expected.views[0], recipe)[n], all_copies[element * count + n], atol=1e-5
        )


@pytest.mark.parametrize("module", STAGES)
@pytest.mark.parametrize("name", ["four_fold_rotation", "colour_inversion"])  # moves pixels; changes them
def test_one_copy_is_the_one_that_the_table_draws(module, name):
    """Of all copies, and with the label of it; the views are as without."""
    transformation = build_transformation(name, size=8)
    recipe, count = Recipe(size=8), 12
    parameters = drawn((recipe,) * 3, count, seed=3)
    batch = crops([photographs(count, 8) for _ in range(3)], parameters)
    all_copies = make_views(module, batch, (recipe,) * 3, equivariance=transformation)
    one = make_views(module, batch, (recipe,) * 3, equivariance=replace(transformation, one_copy=True))
    words = parameters.element_word[:, 2].astype(np.int64)
    labels = words * transformation.num_elements // 2**32
    assert one.transformed_labels.tolist() == labels.tolist() and len(set(labels)) > 1
    assert one.transformed.shape == (count, 3, 8, 8)
    for n, label in enumerate(labels):
        assert torch.allclose(one.transformed[n], all_copies.transformed[label * count + n], atol=1e-6)
    assert all(torch.equal(*pair) for pair in zip(one.views, all_copies.views, strict=True))


def copied_pixel(images):
    """Not a bijection: every pixel of the second copy is the first pixel."""
    return images, images[:, :, :1, :1].expand_as(images)


@pytest.mark.parametrize("module", COMPILED)
def test_a_transformation_may_use_a_pixel_twice(module):
    transformation = Transformation(name="copied_pixel", function=copied_pixel, elements=(0, 1))
    recipe = Recipe(size=9)
    batch = crops([photographs(3, 9)], drawn((recipe,), 3))
    views, expected = (
        make_views(stage, batch, (recipe,), equivariance=transformation) for stage in (module, reference)
    )
    assert torch.allclose(views.transformed, expected.transformed, atol=1e-4)


@pytest.mark.device
@pytest.mark.skipif(cuda is None, reason="needs triton")
def test_triton_writes_every_value_of_its_result(monkeypatch):
    """With memory that holds NaN before the call; blurred and plain samples, views and copies, an odd size."""
    empty = torch.empty

    def poisoned(*shape, **options):
        return empty(*shape, **options).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", poisoned)
    recipe = Recipe(size=37, blur_p=0.5)
    batch = crops([photographs(5, 37)] * 3, drawn((recipe,) * 3, 5))
    views = make_views(cuda, batch, (recipe,) * 3, equivariance=ROTATION)
    assert all(torch.isfinite(view).all() for view in (*views.views, views.transformed))


@pytest.mark.device
@pytest.mark.skipif(cuda is None, reason="needs triton")
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 8, 8, 3), "are torch.float32"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"shape \(2, 3, 8, 8\): must be \(N, S, S, 3\)"),
        (torch.zeros(2, 8, 9, 3, dtype=torch.uint8), r"shape \(2, 8, 9, 3\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8).permute(0, 2, 3, 1), "must be contiguous"),
        (torch.zeros(3, 8, 8, 3, dtype=torch.uint8), "3 images, but 2 rows"),
        (torch.zeros(0, 8, 8, 3, dtype=torch.uint8), "none of them 0"),
    ],
)
def test_triton_refuses_what_it_cannot_read(images, message):
    batch = Crops(images=(images,), labels=torch.arange(2), indices=torch.arange(2), parameters=table(2))
    with pytest.raises(ValueError, match=message):
        cuda.make_views(batch, (replace(NOTHING, size=8),))
    good = crops([photographs(2, 8)], table(2))
    with pytest.raises(ValueError, match=r"dtype = torch.float64: must be one of torch.float32, "):
        cuda.make_views(good, (replace(NOTHING, size=8),), dtype=torch.float64)


@pytest.mark.skipif(cuda is None, reason="needs triton")
def test_triton_refuses_the_cpu_without_its_interpreter(monkeypatch):
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(ValueError, match="are on cpu: the view stage 'cuda' needs them on a CUDA device"):
        cuda.make_views(crops([photographs(2, 8)], table(2)), (replace(NOTHING, size=8),))


def test_the_stage_is_chosen_by_device(monkeypatch):
    assert resolve_view_stage("auto", torch.device("cpu")) is cpu.make_views
    assert resolve_view_stage("reference", torch.device("cpu")) is reference.make_views
    assert resolve_view_stage("reference", torch.device("cuda")) is reference.make_views
    for name, device in (("cpu", "cuda"), ("cuda", "cpu")):
        with pytest.raises(DataError, match=f"'{name}' does not run on {device}"):
            resolve_view_stage(name, torch.device(device))
    if cuda is not None:
        for name in ("auto", "cuda"):
            assert resolve_view_stage(name, torch.device("cuda")) is cuda.make_views
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "loaders.views.cuda", raising=False)
    with pytest.raises(DataError, match="'cuda' needs triton, which torch's CUDA build brings"):
        resolve_view_stage("auto", torch.device("cuda"))
    with pytest.raises(DataError, match="'gpu' is unknown"):
        resolve_view_stage("gpu", torch.device("cpu"))
