"""Pretraining on unlabelled cells: the training loop of `fast_essl.pretrain` with another source and backbone."""

from __future__ import annotations

import os
from pathlib import Path

from fast_essl.config import ConfigError
from fast_essl.evaluate_run import resolve_device, use_threads
from fast_essl.photonics.config import PhotonicsConfig
from fast_essl.photonics.model import build_cell_method
from fast_essl.photonics.source import cell_source
from fast_essl.photonics.store import read_cells
from fast_essl.pretrain import train
from fast_essl.run import Summary


def pretrain_cells(config: PhotonicsConfig, run_dir: Path, *, show_progress: bool = True) -> Summary:
    """Train, or go on training, the run in `run_dir`; leaves there what `fast-essl pretrain` does.

    Errors: `ConfigError` and `DataError` before any step for what does not fit together; `NonFiniteLossError`.
    """
    num_ranks = os.environ.get("WORLD_SIZE", "1")
    if num_ranks != "1":
        raise ConfigError(
            f"WORLD_SIZE = {num_ranks}: cells are trained on by one rank; start it without torchrun"
        )
    device, dtype = resolve_device(config)
    use_threads(config)
    method = build_cell_method(
        config
    )  # first: what is wrong with a transformation is said before the file is read
    return train(
        config,
        run_dir,
        source=cell_source(config, read_cells(config.data.file), dtype),
        method=method,
        device=device,
        dtype=dtype,
        show_progress=show_progress,
    )
