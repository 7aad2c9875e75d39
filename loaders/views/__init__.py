"""The view stage: `Crops` → `Views`, in one implementation a device, all of one specification (`reference`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from loaders.batch import Views
from loaders.errors import DataError

VIEW_STAGES = ("auto", "reference", "cpu", "cuda")


def resolve_view_stage(name: str, device: torch.device) -> Callable[..., Views]:
    """The `make_views` of an implementation: `auto` is numba's on a CPU and Triton's on a CUDA device.

    Errors: `DataError` for an unknown name, for one that does not run on the device, or where Triton is missing.
    """
    if name not in VIEW_STAGES:
        raise DataError(f"view stage {name!r} is unknown; choose one of {', '.join(VIEW_STAGES)}")
    if name in ("cpu", "cuda") and device.type != name:
        raise DataError(f"view stage {name!r} does not run on {device.type}; choose 'auto' or 'reference'")
    stage = device.type if name == "auto" else name
    try:
        module = importlib.import_module(f"loaders.views.{stage}")
    except ModuleNotFoundError as error:
        raise DataError(
            f"view stage {stage!r} needs {error.name}, which torch's CUDA build brings; "
            "install it, or choose 'reference'"
        ) from None
    make_views: Callable[..., Views] = module.make_views
    return make_views
