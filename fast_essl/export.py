"""Backbones to elsewhere: a bare state dict in torchvision's key names, as `.pth` or `.safetensors`."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

from fast_essl import __version__
from fast_essl.checkpoint import encode
from fast_essl.config import ConfigError
from fast_essl.interchange import Network, describe_network, find_backbone, read_checkpoint
from fast_essl.records import write_bytes
from loaders.errors import DataError

SUFFIXES = (".pth", ".safetensors")


def export_backbone(source: Path, out: Path, *, overwrite: bool = False) -> str:
    """Write the backbone of a run's folder or a checkpoint, and say in one line what was written and how to load it.

    The file is a bare state dict in torchvision's key names, contiguous, float32: with the ImageNet stem and width 64,
    torchvision's ResNet of the same depth loads it, apart from `fc`. A `.safetensors` tells in its metadata what it
    is: `architecture`, `width`, `stem`, `version`, and `step` where the source is a checkpoint of fast_essl.

    Errors: `ConfigError` for another suffix, a missing folder or a file that is there already; as `read_backbone`;
    `DataError` for a ResNet that is not whole or none of ours; `OSError`.
    """
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"{out}: must end in {' or '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: its folder is not there; create it first")
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder; name a file")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out}: is there already; --overwrite replaces it")
    content = read_checkpoint(source)
    # A clone has strides of its own (`contiguous` leaves those of a 1×1 kernel) and drags no larger storage along.
    state = {
        key: value.clone(memory_format=torch.contiguous_format)
        for key, value in find_backbone(content, source).items()
    }
    network = describe_network(state)
    if network is None:
        raise DataError(f"{source}: its ResNet is not whole, or none of those that fast_essl knows")
    if out.suffix == ".pth":
        write_bytes(out, *encode(state))
    else:
        metadata = {
            "format": "pt",  # what others look for
            "architecture": network.backbone,
            "width": str(network.width),
            "stem": network.stem,
            "version": __version__,
        }
        if (
            "format_version" in content and "step" in content
        ):  # ours: elsewhere, a step may count something else
            metadata["step"] = str(content["step"])
        write_bytes(out, safetensors.torch.save(state, metadata))
    num_parameters = sum(value.numel() for key, value in state.items() if key.endswith(("weight", "bias")))
    return (
        f"{out}: a backbone of {len(state)} tensors, {num_parameters:,} parameters, without `fc` ({network}); "
        f"{_how_to_load(out, network)}"
    )


def _how_to_load(out: Path, network: Network) -> str:
    if network.width != 64 or network.backbone not in ("resnet18", "resnet50"):
        return "torchvision has no such network; fast_essl reads it (`evaluate`, `train.init_from`)"
    read = "torch.load" if out.suffix == ".pth" else "safetensors.torch.load_file"
    load = f"torchvision.models.{network.backbone}().load_state_dict({read}({out.name!r}), strict=False)"
    if network.stem == "imagenet":
        return f"load it by {load}"
    return (
        f"conv1 is 3×3 of stride 1 and no max-pool follows: set conv1 and maxpool of torchvision's "
        f"{network.backbone} so before .load_state_dict({read}({out.name!r}), strict=False)"
    )
