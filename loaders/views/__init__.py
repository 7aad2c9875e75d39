"""The view stage: `Crops` → `Views`, in one implementation a device, all of one specification (`reference`)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loaders.batch import Views
from loaders.errors import DataError

VIEW_STAGES = ("auto", "reference", "cpu")


def resolve_view_stage(name: str, device: torch.device) -> Callable[..., Views]:
    """The `make_views` of an implementation: `auto` is numba's on a CPU, torch's reference on any other device.

    Errors: `DataError` for an unknown name, or for numba's on a device that is not the CPU.
    """
    if name not in VIEW_STAGES:
        raise DataError(f"view stage {name!r} is unknown; choose one of {', '.join(VIEW_STAGES)}")
    if name == "cpu" and device.type != "cpu":
        raise DataError(f"view stage 'cpu' does not run on {device.type}; choose 'auto' or 'reference'")
    if name == "reference" or device.type != "cpu":
        from loaders.views.reference import make_views
    else:
        from loaders.views.cpu import make_views
    return make_views
