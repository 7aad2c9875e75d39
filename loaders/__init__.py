"""Bytes on disk → Views: conversion, decode-once loaders, the view stage. Imports nothing of fast_essl."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loaders.errors import DataError

if TYPE_CHECKING:
    from loaders.dali_loader import DALILoader
    from loaders.device_loader import DeviceLoader
    from loaders.ffcv_loader import FFCVLoader
    from loaders.recipe import Recipe
    from loaders.torch_loader import TorchLoader

# The loader's thread and the trainer's both run parallel numba code; of numba's layers, `workqueue` aborts on that.
# By the environment, which numba reads when it is imported: an import here is half the time of `fast-essl --help`.
os.environ["NUMBA_THREADING_LAYER"] = "omp"
if "numba" in sys.modules:
    sys.modules["numba"].config.THREADING_LAYER = "omp"

LOADERS = ("ffcv", "dali", "device", "torch")
"""Names for `open_loader`, the default first."""


def open_loader(
    name: str, path: Path | str, recipes: tuple[Recipe, ...], **options: Any
) -> FFCVLoader | DALILoader | DeviceLoader | TorchLoader:
    """Open a loader by name; `options` are those that all loaders share, for `dali` its `decoder`, for `device` its
    `device`.

    Errors: `DataError` when the name is unknown, when FFCV or DALI is asked for and not installed, or as the loader
    has it.
    """
    if name not in LOADERS:
        raise DataError(f"loader {name!r} is unknown; choose one of {', '.join(LOADERS)}")
    try:
        loader = _loader_class(name)
    except ImportError as error:
        raise DataError(
            f"loader {name!r} cannot be imported ({error}); run 'fast-essl doctor' for how to install"
        ) from error
    return loader(path, recipes, **options)


def _loader_class(name: str) -> type[FFCVLoader | DALILoader | DeviceLoader | TorchLoader]:
    if name == "ffcv":
        from loaders.ffcv_loader import FFCVLoader

        return FFCVLoader
    if name == "dali":
        from loaders.dali_loader import DALILoader

        return DALILoader
    if name == "device":
        from loaders.device_loader import DeviceLoader

        return DeviceLoader
    from loaders.torch_loader import TorchLoader

    return TorchLoader
