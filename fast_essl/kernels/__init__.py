"""Fused kernels in Triton, one file each: the kernel, its autograd function, and the plain torch under it."""

from __future__ import annotations

import torch

from fast_essl.config import ConfigError


def require_kernels(setting: str, device: torch.device) -> None:
    """Errors: `ConfigError` that names the setting, where the kernels that it asks for do not run on the device."""
    try:
        import triton
    except ImportError:
        raise ConfigError(
            f"{setting} = 'triton': Triton is not installed; it comes with torch's CUDA build; or use 'torch'"
        ) from None
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ConfigError(f"{setting} = 'triton': needs a CUDA device; use 'torch'")
