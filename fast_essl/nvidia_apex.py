"""NVIDIA's apex, where it is asked for by name: its optimizer and its LayerNorm, or one line on why not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import nn

from fast_essl.config import ConfigError

_BUILD = "build it with its CUDA extensions as https://github.com/NVIDIA/apex says, or use 'torch'"
_OTHER = "the package called apex on PyPI is another project"


def is_nvidias() -> bool:
    """Whether the `apex` that is installed, if one is, is NVIDIA's and not PyPI's project of that name."""
    try:
        return importlib.util.find_spec("apex.normalization") is not None
    except ImportError:
        return False


def fused_sgd_class(on_cuda: bool) -> Callable[..., torch.optim.Optimizer]:
    """apex's FusedSGD. Errors: `ConfigError` where it cannot be used.

    Its `zero_grad` takes no argument and, as torch's does by itself, sets gradients to None.
    """
    setting = "optimizer.backend = 'apex'"
    if not on_cuda:
        raise ConfigError(f"{setting}: needs a CUDA device; use 'torch'")
    try:
        from apex.multi_tensor_apply import multi_tensor_applier  # type: ignore[import-not-found]
        from apex.optimizers import FusedSGD  # type: ignore[import-not-found]
    except ImportError as error:
        raise _missing(setting, error) from None
    if not multi_tensor_applier.available:
        raise ConfigError(f"{setting}: apex was built without its CUDA extensions; {_BUILD}")
    return FusedSGD


def fused_layer_norm_class() -> type[nn.Module]:
    """apex's FusedLayerNorm, whose parameters are named as torch's. Errors: `ConfigError` where it cannot be used."""
    setting = "head.layer_norm = 'apex'"
    try:
        from apex.normalization import FusedLayerNorm  # type: ignore[import-not-found]
    except ImportError as error:
        raise _missing(setting, error) from None
    if importlib.util.find_spec("fused_layer_norm_cuda") is None:
        raise ConfigError(f"{setting}: apex was built without its CUDA extensions; {_BUILD}")
    return FusedLayerNorm


def _missing(setting: str, error: ImportError) -> ConfigError:
    return ConfigError(f"{setting}: NVIDIA's apex cannot be imported ({error}; {_OTHER}); {_BUILD}")
