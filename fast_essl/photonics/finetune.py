"""Fine-tuning on labelled cells, and the relative error of the density of states on cells that it never saw."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fast_essl import records, run_folder
from fast_essl.checkpoint import FORMAT_VERSION, load_file, save_file, weights_digest
from fast_essl.config import ConfigError
from fast_essl.config_io import load_settings
from fast_essl.errors import NonFiniteLossError
from fast_essl.evaluate_run import resolve_device, use_threads
from fast_essl.losses import dos_error
from fast_essl.photonics.config import PhotonicsConfig
from fast_essl.photonics.dos import EMPTY_LATTICE, NUM_PREDICTED
from fast_essl.photonics.model import CellNet, DosNet, build_cell_net, build_dos_net
from fast_essl.photonics.source import FINETUNE_VIEW, as_images, augmented, draw_words
from fast_essl.photonics.store import CellFile, Split, read_cells
from fast_essl.schedule import learning_rate_share
from loaders.errors import DataError
from loaders.order import epoch_order

_SUBSET_EPOCH = 2**32 - 1
"""Draws the order in which labels are given out; no run has so many epochs."""
_EVALUATION_BATCH = 256


def finetune_run(
    run_dir: Path, *, overrides: list[str] | None = None, show_progress: bool = True
) -> dict[str, Any]:
    """Fine-tune the backbone of a finished run; see `finetune` for the result, which is also written to its folder.

    Errors: `ConfigError`, `DataError` before the first step; `NonFiniteLossError`.
    """
    config = load_settings(PhotonicsConfig, run_dir / run_folder.CONFIG, overrides)
    return finetune(config, run_dir, pretrained=True, show_progress=show_progress)


def finetune(
    config: PhotonicsConfig, run_dir: Path, *, pretrained: bool, show_progress: bool = True
) -> dict[str, Any]:
    """Train a backbone, pretrained or as initialised, and the layers that predict densities of states.

    Args: `run_dir` holds the pretrained backbone and takes the result.
    Returns: `step` of the checkpoint (0 without pretraining), `seed`, `protocol` (the section [finetune]), `num_steps`,
    `num_validation`, `num_test`, `train_loss` of the last epoch, and the relative errors `validation_error` and
    `test_error` after the last epoch; also written to finetune-<num_labels>.json, and the network to
    finetune-<num_labels>.pt.
    Errors: `ConfigError`, `DataError` before the first step; `NonFiniteLossError` for a fit that diverged.
    """
    device, dtype = resolve_device(config)
    use_threads(config)
    settings, seed = config.finetune, config.train.seed
    file = read_cells(config.data.file)
    train, validation, test = (
        labelled(file, name, config.data.file) for name in ("train", "validation", "test")
    )
    if settings.num_labels > len(train):
        raise ConfigError(
            f"finetune.num_labels = {settings.num_labels}: must be at most the {len(train)} labelled cells of train "
            f"in {config.data.file}"
        )
    backbone, step = starting_backbone(config, run_dir, pretrained=pretrained)
    measured = weights_and_cells(backbone, file)
    network = build_dos_net(backbone, config.model, seed).to(device)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    chosen = epoch_order(len(train), seed=seed, epoch=_SUBSET_EPOCH)[: settings.num_labels]
    num_steps, loss = _fit(network, config, train, chosen, device, dtype, show_progress)
    result: dict[str, Any] = {
        "step": step,
        "measured": measured,
        "seed": seed,
        "protocol": asdict(settings),
        "num_steps": num_steps,
        "num_validation": len(validation),
        "num_test": len(test),
        "train_loss": loss,
        "validation_error": _error(network, validation, device),
        "test_error": _error(network, test, device),
    }
    if not np.isfinite([loss, result["validation_error"], result["test_error"]]).all():
        raise NonFiniteLossError(
            "the fit diverged: its predictions are not finite; lower finetune.learning_rate"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    weights = {"format_version": FORMAT_VERSION, "network": network.state_dict()}
    save_file(run_dir / f"finetune-{settings.num_labels}.pt", weights)
    result = records.sealed(result)
    records.write_json(result_path(run_dir, settings.num_labels), result)
    return result


def result_path(run_dir: Path, num_labels: int) -> Path:
    """Where `finetune` writes its result."""
    return run_dir / f"finetune-{num_labels}.json"


def load_network(config: PhotonicsConfig, run_dir: Path, num_labels: int) -> DosNet:
    """The network that `finetune` left, on the CPU. Errors: as `load_file`."""
    network = build_dos_net(build_cell_net(config.model, 0), config.model, 0)
    path = run_dir / f"finetune-{num_labels}.pt"
    try:
        network.load_state_dict(load_file(path, network=dict)["network"])
    except RuntimeError:
        raise ConfigError(f"{path}: not the network of the section [model]") from None
    return network.eval()


def labelled(file: CellFile, name: str, path: Path) -> Split:
    """A split with its labels. Errors: `DataError` where it has no labelled cells."""
    split = file.splits.get(name)
    if split is None or split.dos is None or not len(split):
        raise DataError(
            f"{path}: no labelled cells in {name}; generate the file anew with counts.{name} above 0"
        )
    return split


def target(split: Split) -> Tensor:
    """(N, 400) float32: the densities of states of the frequencies that are predicted."""
    assert split.dos is not None
    return torch.from_numpy(split.dos[:, :NUM_PREDICTED])


def empty_lattice() -> Tensor:
    """(400,) float32: what a prediction is added to."""
    return torch.from_numpy(EMPTY_LATTICE[:NUM_PREDICTED]).float()


@torch.no_grad()
def predict(network: DosNet, permittivity: np.ndarray, device: torch.device) -> Tensor:
    """(N, 32, 32) cells → (N, 400) densities of states, on the CPU."""
    network.eval()
    batches = torch.from_numpy(permittivity).split(_EVALUATION_BATCH)
    predicted = [network(as_images(cells.to(device))).float().cpu() for cells in batches]
    return torch.cat(predicted) + empty_lattice()


def _error(network: DosNet, split: Split, device: torch.device) -> float:
    return float(dos_error(predict(network, split.permittivity, device), target(split)))


def starting_backbone(config: PhotonicsConfig, run_dir: Path, *, pretrained: bool) -> tuple[CellNet, int]:
    """What is fine-tuned, on the CPU: a run's backbone or one as initialised, and the step of it.

    Errors: `ConfigError`; `DataError`, as `load_file`.
    """
    backbone = build_cell_net(config.model, config.train.seed)
    if not pretrained:
        return backbone, 0
    path = run_dir / run_folder.BACKBONE
    if not path.exists():
        raise ConfigError(f"{run_dir}: has no {run_folder.BACKBONE}; finish its pretraining first")
    state = load_file(path, backbone=dict, step=int)
    try:
        backbone.load_state_dict(state["backbone"])
    except RuntimeError:
        raise ConfigError(f"{path}: not the backbone of the section [model]") from None
    return backbone, int(state["step"])


def weights_and_cells(backbone: CellNet, file: CellFile) -> dict[str, str]:
    """The digests of what a result depends on."""
    return {"weights": weights_digest(backbone.state_dict()), "cells": file.digest}


def _fit(
    network: DosNet,
    config: PhotonicsConfig,
    train: Split,
    chosen: np.ndarray,
    device: torch.device,
    dtype: torch.dtype,
    show_progress: bool,
) -> tuple[int, float]:
    """Returns: the number of steps, the mean loss of the last epoch."""
    settings, seed = config.finetune, config.train.seed
    cells = torch.from_numpy(train.permittivity).to(device)
    difference = (target(train) - empty_lattice()).to(device)
    batch_size = min(settings.batch_size, len(chosen))
    steps_per_epoch = -(-len(chosen) // batch_size)
    num_epochs = max(settings.epochs, -(-settings.min_steps // steps_per_epoch))
    optimizer = torch.optim.Adam(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    total = torch.zeros((), device=device)
    network.train()
    num_steps = num_epochs * steps_per_epoch
    bar = tqdm(
        total=num_steps,
        unit="step",
        disable=not show_progress,
        mininterval=0.5 if sys.stderr.isatty() else 20,
    )
    with bar:
        for epoch in range(num_epochs):
            total.zero_()
            order = chosen[epoch_order(len(chosen), seed=seed, epoch=epoch)]
            for number, indices in enumerate(np.array_split(order, steps_per_epoch)):
                if settings.schedule == "cosine":
                    share = learning_rate_share(epoch * steps_per_epoch + number, num_steps=num_steps)
                    optimizer.param_groups[0]["lr"] = settings.learning_rate * share
                words = draw_words(seed, epoch, indices, range(FINETUNE_VIEW, FINETUNE_VIEW + 1))
                index = torch.from_numpy(indices).to(device)
                moved = augmented(cells[index], words[:, 0], config.augmentation)
                with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
                    predicted = network(as_images(moved))
                loss = F.mse_loss(predicted.float(), difference[index])
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                total += loss.detach() / steps_per_epoch
                bar.update()
    return num_steps, float(total)
