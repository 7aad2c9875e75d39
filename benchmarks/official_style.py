"""The official release's way from image files to views, written out with Pillow: a peer of `peers.py`.

The release (rdangovs/essl, imagenet/simclr/main.py) reads torchvision's ImageFolder, which decodes a file once with
Pillow; three chains of torchvision transforms on Pillow images follow in the DataLoader's worker: RandomResizedCrop,
flip, ColorJitter, grey, its own blur and solarization (Pillow's), ToTensor, Normalize. The trainer rotates the third
batch on its GPU. Here are the same calls of Pillow that those transforms make, and the rotation takes the trainer's
thread. The random numbers, which torchvision draws in each transform, are drawn once an epoch, in this peer's favour.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.utils.data import DataLoader, Dataset

from loaders.images import FolderImages
from loaders.parameters import draw_parameters
from loaders.recipe import Recipe

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def official_epoch(
    images: FolderImages, recipes: tuple[Recipe, ...], epoch: int, *, batch_size: int, num_workers: int
) -> int:
    """An epoch through the DataLoader, up to the rotated batches; returns its number of samples."""
    num_samples = 0
    order = np.random.default_rng(epoch).permutation(len(images.files))
    batches = DataLoader(
        _OfficialStyle(images, recipes, epoch),
        batch_size=batch_size,
        sampler=order.tolist(),
        num_workers=num_workers,
        multiprocessing_context="fork",
    )
    for _, _, third, labels in batches:
        torch.cat([torch.rot90(third, k, (2, 3)) for k in range(4)])
        num_samples += len(labels)
    return num_samples


class _OfficialStyle(Dataset):
    """ImageFolder and its transforms: a file is decoded by Pillow, then cropped and augmented three times."""

    def __init__(self, images: FolderImages, recipes: tuple[Recipe, ...], epoch: int) -> None:
        self.images, self.recipes = images, recipes
        self.table = draw_parameters(
            recipes,
            seed=0,
            epoch=epoch,
            indices=np.arange(len(images.files)),
            heights=images.heights,
            widths=images.widths,
        )

    def __len__(self) -> int:
        return len(self.images.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | int, ...]:
        image = self.images.image(index)
        views = []
        for view, recipe in enumerate(self.recipes):
            top, left, height, width = self.table.box[index, view].tolist()
            crop = image.crop((left, top, left + width, top + height))
            crop = crop.resize((recipe.size, recipe.size), FILTERS[recipe.interpolation])
            crop = _augment_with_pillow(crop, self.table.view(view).rows(slice(index, index + 1)))
            pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous().float().div(255)
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.mean, recipe.std))
            views.append(pixels.sub_(mean).div_(std))
        return (*views, int(self.images.labels[index]))


def _augment_with_pillow(image: Image.Image, row) -> Image.Image:
    if row.flip[0]:
        image = ImageOps.mirror(image)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for op in row.jitter_order[0]:
        factor = float(row.jitter[0, op])
        if op < 3 and factor != 1:
            image = enhancers[op](image).enhance(factor)
        elif op == 3 and factor != 0:
            hue, saturation, value = image.convert("HSV").split()
            hue = Image.fromarray(np.asarray(hue) + np.uint8(round(factor * 255) % 256))
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if row.grey[0]:
        image = image.convert("L").convert("RGB")
    if row.blur_sigma[0] > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(row.blur_sigma[0])))
    if row.solarize[0]:
        image = ImageOps.solarize(image)
    return image
