"""What all kernels ask of their tensors before a launch: a wrong one is a clear error, not wrong numbers."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ROW = 16_384
"""Longest row that a program holds in registers."""


def check_rows(name: str, x: Tensor) -> None:
    """A matrix whose rows a program can hold; rows may lie apart, their elements may not.

    Errors: `ValueError` for another shape, dtype or layout, or where no kernel can run.
    """
    if x.ndim != 2 or 0 in x.shape or x.shape[1] > MAX_ROW:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}: must be (M, N), none of them 0, N at most {MAX_ROW}"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} is {x.dtype}: must be one of {', '.join(map(str, DTYPES))}")
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"{name} has strides {x.stride()}: the elements of a row must lie side by side")
    if not x.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f"{name} is on {x.device}: the kernels need a CUDA device")


def check_parameter(name: str, parameter: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """A contiguous parameter of a shape, beside `x`. Errors: `ValueError`."""
    if tuple(parameter.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(parameter.shape)}: must be {shape}")
    if parameter.dtype not in DTYPES or not parameter.is_contiguous():
        raise ValueError(
            f"{name} is {parameter.dtype}, strides {parameter.stride()}: must be contiguous floats"
        )
    if parameter.device != x.device:
        raise ValueError(f"{name} is on {parameter.device}, its input on {x.device}")
