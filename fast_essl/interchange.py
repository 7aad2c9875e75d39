"""Backbones from elsewhere: the official release's checkpoints, exported files, torchvision's names; and our own.

Everything is in torchvision's key names, which are ours: `conv1.weight`, `bn1.…`, `layer1.0.conv1.weight`, ….
"""

from __future__ import annotations

import io
import json
import pickle
import typing
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fast_essl import records, run_folder
from fast_essl.checkpoint import decode, has_digest, remark_without_digest, weights_digest
from fast_essl.config import ConfigError, ModelConfig
from fast_essl.resnet import ResNet, Stem, build_backbone
from loaders.errors import DataError

HOLDERS = ("backbone", "state_dict", "model", "method")
"""Keys under which a checkpoint keeps its network: the official release's (the first three) and ours."""
PREFIXES = ("", "module.", "backbone.", "module.backbone.", "encoder.", "module.encoder.")
"""What may stand before the backbone's keys, by the module that holds it and DistributedDataParallel."""
FIRST_KEY = "conv1.weight"
DIGEST_KEY = "weights_sha256"
"""Of the metadata of an exported `.safetensors`."""
MAX_INFLATION = 10
"""How many times its size a checkpoint may unpack to. `torch.save` packs nothing; trained weights pack to 0.9."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """Which of our backbones a state dict is of; the fields are those of `ModelConfig`."""

    backbone: str
    """Architecture."""
    width: int
    """Channels of the first stage."""
    stem: Stem
    """`cifar` or `imagenet`."""

    def __str__(self) -> str:
        return f"{self.backbone}, width {self.width}, {self.stem} stem"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """All that a checkpoint file, or that of a run's folder, holds, on the CPU; runs no code from it.

    Errors: `DataError` in one line for a file that is damaged, that would run code when loaded, or that claims more
    than it holds; `OSError`.
    """
    if path.is_dir():
        path = path / run_folder.CHECKPOINT
    # Read first, so that whatever is raised below is about the content, not about the disk.
    content = records.read_bytes(path)
    try:
        state = _load_safetensors(content) if path.suffix == ".safetensors" else _load(content)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):  # what names a class or function to call
            raise DataError(
                f"{path}: refused, since loading it would run code that it carries; save it anew with tensors only"
            ) from None
        raise DataError(f"{path}: damaged, or not a checkpoint") from None
    except _TooLargeError as error:
        raise DataError(f"{path}: refused, since {error}") from None
    except MemoryError:
        raise DataError(f"{path}: claims sizes that do not fit into memory") from None
    except Exception:  # damage takes the decoders to nearly any: IndexError, AssertionError, zlib.error, …
        raise DataError(f"{path}: damaged, or not a checkpoint") from None
    if not isinstance(state, dict):
        raise DataError(f"{path}: holds a {type(state).__name__}, not a dict of tensors")
    if "format_version" in state:  # ours
        remark_without_digest(content, path)
    return state


def read_backbone(path: Path) -> dict[str, Tensor]:
    """The backbone in a checkpoint file or a run's folder, without a classifier `fc`, float32 on the CPU.

    Errors: as `read_checkpoint` and `find_backbone`.
    """
    return find_backbone(read_checkpoint(path), path)


def find_backbone(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The backbone in what was read from `path`, in our key names, float32.

    Errors: `DataError` in one line where there is no ResNet, more than one, or one that is not all dense tensors of
    finite floating-point numbers.
    """
    for holder in HOLDERS:
        if isinstance(state.get(holder), Mapping):
            state = state[holder]
            break
    prefixes = [prefix for prefix in PREFIXES if prefix + FIRST_KEY in state]
    if not prefixes:
        shown = ", ".join(map(repr, list(state)[:4]))
        raise DataError(f"{path}: holds no ResNet that is known here; its keys are {shown}, …")
    if len(prefixes) > 1:
        found = " and ".join(repr(prefix + FIRST_KEY) for prefix in prefixes)
        raise DataError(f"{path}: holds more than one ResNet, {found}; save the wanted one alone")
    backbone: dict[str, Tensor] = {}
    for key, value in state.items():
        name = str(key).removeprefix(prefixes[0])
        if not str(key).startswith(prefixes[0]) or not name.startswith(("conv1.", "bn1.", "layer")):
            continue
        fault = _fault(name, value)
        if fault is not None:
            raise DataError(f"{path}: {key} {fault}")
        backbone[name] = value.float() if value.is_floating_point() else value
    return backbone


def _fault(name: str, value: Any) -> str | None:
    """Why a value cannot be the entry `name` of a backbone, if it cannot."""
    if not isinstance(value, Tensor):
        return "is not a tensor"
    # First what has no numbers to look at.
    if value.is_nested or value.layout is not torch.strided:
        return "is not a dense tensor"
    if value.is_quantized:
        return "is quantised; save the network as it was before"
    if value.is_meta:
        return "has a shape, but no values"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"claims {_shape(value)} numbers and holds fewer; save it contiguous"
    is_count = name.endswith("num_batches_tracked")
    if value.is_complex() or value.dtype is torch.bool or not (value.is_floating_point() or is_count):
        return f"is of {value.dtype}, not of floating-point numbers"
    numbers = value.float()
    if not bool(numbers.isfinite().all()):
        return "holds NaN or infinity"
    if (is_count or name.endswith("running_var")) and bool((numbers < 0).any()):
        return "is negative"
    return None


def describe_network(state: Mapping[str, Tensor]) -> Network | None:
    """Which of our backbones a state dict is of, by its key names and shapes; None for another or a part of one."""
    stems: dict[tuple[int, ...], Stem] = {(3, 3, 3): "cifar", (3, 7, 7): "imagenet"}
    width, *kernel = state[FIRST_KEY].shape or (0,)
    stem = stems.get(tuple(kernel))
    if not width or stem is None:
        return None
    for name in typing.get_args(typing.get_type_hints(ModelConfig)["backbone"]):
        with torch.device("meta"):  # shapes alone, no weights
            ours = build_backbone(name, width=width, stem=stem).state_dict()
        if {key: value.shape for key, value in ours.items()} == {k: v.shape for k, v in state.items()}:
            return Network(backbone=name, width=width, stem=stem)
    return None


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
        network = describe_network(state)
        reason = "backbone, width and stem" if network is None else f"the file holds a {network}"
        more = f" and {len(differing) - 2} tensors more" if len(differing) > 2 else ""
        raise ConfigError(
            f"{path}: another network than [model] describes ({reason}): {'; '.join(differing[:2])}{more}"
        )
    backbone.load_state_dict(state)


class _TooLargeError(Exception):
    """A file that unpacks to much more than it is; the message says to what."""


def _load(content: bytes) -> Any:
    """What `torch.save` wrote."""
    if content.startswith(b"PK") and not has_digest(content):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            num_bytes = sum(part.file_size for part in archive.infolist())
        if num_bytes > MAX_INFLATION * len(content):
            raise _TooLargeError(f"its {len(content):,} bytes unpack to {num_bytes:,}")
    named = torch.serialization.safe_globals([exclude_bias_and_norm])
    with named, warnings.catch_warnings():  # about pickle protocols; what matters is an error
        warnings.simplefilter("ignore")
        return decode(content)


def _load_safetensors(content: bytes) -> dict[str, Tensor]:
    """Tensors by name; those that fast_essl exported are compared with their digest, the format having none."""
    state = safetensors.torch.load(content)
    num_bytes = int.from_bytes(content[:8], "little")
    wanted = json.loads(content[8 : 8 + num_bytes]).get("__metadata__", {}).get(DIGEST_KEY)
    if wanted not in (None, weights_digest(state)):
        raise ValueError("other weights than were exported")
    return state


def exclude_bias_and_norm(*_: object) -> None:
    """Stands for the function of that name in the official SimCLR training checkpoints, and does nothing.

    Their optimizer names it; `torch.load` puts this one there and refuses any other name.
    """


# `torch.load` looks it up by the module it was saved from, which was the script.
exclude_bias_and_norm.__module__ = "__main__"


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else "×".join(map(str, tensor.shape)) or "a number"
