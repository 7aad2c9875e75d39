"""Backbones from elsewhere: the official release's checkpoints, exported files, torchvision's names; and to elsewhere.

Everything is in torchvision's key names, which are ours: `conv1.weight`, `bn1.…`, `layer1.0.conv1.weight`, ….
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fast_essl import __version__, run_folder
from fast_essl.config import ConfigError
from fast_essl.resnet import ResNet
from loaders.errors import DataError

SUFFIXES = (".pth", ".safetensors")
HOLDERS = ("backbone", "state_dict", "model", "method")
"""Keys under which a checkpoint keeps its network: the official release's (the first three) and ours."""
PREFIXES = ("", "module.", "backbone.", "module.backbone.", "encoder.", "module.encoder.")
"""What may stand before the backbone's keys, by the module that holds it and DistributedDataParallel."""
FIRST_KEY = "conv1.weight"


def read_backbone(path: Path) -> dict[str, Tensor]:
    """The backbone in a checkpoint file or a run's folder, without a classifier `fc`, float32 on the CPU.

    Errors: `DataError` in one line for a file that is damaged, that would run code when loaded, or that holds no
    ResNet; `OSError`.
    """
    if path.is_dir():
        path = path / run_folder.CHECKPOINT
    state = _read(path)
    for holder in HOLDERS:
        if isinstance(state.get(holder), Mapping):
            state = state[holder]
            break
    prefix = next((prefix for prefix in PREFIXES if prefix + FIRST_KEY in state), None)
    if prefix is None:
        shown = ", ".join(map(repr, list(state)[:4]))
        raise DataError(f"{path}: holds no ResNet that is known here; its keys are {shown}, …")
    backbone: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or not name.startswith(("conv1.", "bn1.", "layer")):
            continue
        if not isinstance(value, Tensor):
            raise DataError(f"{path}: {key} is not a tensor")
        backbone[name] = value.float() if value.is_floating_point() else value
    return backbone


def load_backbone(backbone: ResNet, path: Path) -> None:
    """Take the weights of a backbone from a file; all must be there, and fit.

    Errors: as `read_backbone`; `ConfigError` in one line where the network in the file is another one.
    """
    state, own = read_backbone(path), backbone.state_dict()
    differing = [
        f"{key} is {_shape(state.get(key))} there and {_shape(own.get(key))} here"
        for key in (*own, *(state.keys() - own.keys()))
        if _shape(state.get(key)) != _shape(own.get(key))
    ]
    if differing:
        more = f" and {len(differing) - 2} tensors more" if len(differing) > 2 else ""
        raise ConfigError(
            f"{path}: another network than [model] describes (backbone, width and stem): "
            f"{'; '.join(differing[:2])}{more}"
        )
    backbone.load_state_dict(state)


def export_backbone(source: Path, out: Path, *, overwrite: bool = False) -> dict[str, Tensor]:
    """Write the backbone of a run's folder or a checkpoint as `.pth` or `.safetensors`, and return it.

    The file is a bare state dict in torchvision's key names, contiguous, float32: with the ImageNet stem and width 64,
    torchvision's and timm's ResNet of the same depth load it, apart from `fc`.

    Errors: `ConfigError` for another suffix or a file that is there already, and as `read_backbone`.
    """
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"{out}: must end in {' or '.join(SUFFIXES)}")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out}: is there already; --overwrite replaces it")
    state = {key: value.contiguous() for key, value in read_backbone(source).items()}
    part = out.with_name(out.name + ".part")
    try:
        if out.suffix == ".pth":
            torch.save(state, part)
        else:
            safetensors.torch.save_file(state, part, metadata={"format": "pt", "fast_essl": __version__})
        os.replace(part, out)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return state


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint's content, without running code from it."""
    with open(path, "rb") as file:  # so that a missing file is an OSError that names it, for both formats
        try:
            if path.suffix == ".safetensors":
                return dict(safetensors.torch.load(file.read()))
            with warnings.catch_warnings():  # about pickle protocols; what matters is an error
                warnings.simplefilter("ignore")
                state = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if "GLOBAL" in str(error):  # what names a class or function to call
                raise DataError(
                    f"{path}: refused, since loading it would run code that it carries; save it anew with tensors only"
                ) from None
            raise DataError(f"{path}: damaged, or not a checkpoint") from None
        except (RuntimeError, EOFError, KeyError, ValueError, safetensors.SafetensorError):
            raise DataError(f"{path}: damaged, or not a checkpoint") from None
    if not isinstance(state, dict):
        raise DataError(f"{path}: holds a {type(state).__name__}, not a dict of tensors")
    return state


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else "×".join(map(str, tensor.shape)) or "a number"
