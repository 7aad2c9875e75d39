"""Checkpoints appear whole or not at all, and refuse what they do not belong to, by name."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fast_essl.checkpoint import load_checkpoint, load_file, save_checkpoint, save_file
from fast_essl.config import Config, ConfigError, DataConfig, ViewsConfig
from loaders.errors import DataError
from loaders.recipe import Recipe

VIEWS = ViewsConfig(view1=Recipe(size=32), view2=Recipe(size=32), transformed=Recipe(size=16))
CONFIG = Config(data=DataConfig(train=Path("a.beton"), test=Path("b.beton")), views=VIEWS)


def _changed(section: str, **values: Any) -> Config:
    return dataclasses.replace(CONFIG, **{section: dataclasses.replace(getattr(CONFIG, section), **values)})


def _save(path: Path) -> None:
    counts = {"step": 7, "evaluated_step": 0, "elapsed_s": 1.5, "metrics_num_bytes": 0}
    state = {"method": {"w": torch.arange(1000.0)}, "optimizer": {}, "scaler": {}}
    save_checkpoint(path, config=CONFIG, dataset_digest="d" * 64, **counts, **state)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    _save(path)
    state = load_checkpoint(path, config=CONFIG, dataset_digest="d" * 64)
    assert state["step"] == 7
    assert torch.equal(state["method"]["w"], torch.arange(1000.0))
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_failed_write_leaves_the_checkpoint_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    _save(path)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_file(path, {"step": 8})
    assert os.listdir(tmp_path) == ["last.pt"]
    assert load_file(path)["step"] == 7


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped", "other"])
def test_a_damaged_file_is_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "last.pt"
    _save(path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 0xFF
    cases = {"cut": content[:middle], "empty": b"", "text": b"not a checkpoint", "flipped": content}
    if damage == "other":
        torch.save([1, 2], path)
    else:
        path.write_bytes(cases[damage])
    with pytest.raises(DataError) as error:
        load_file(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"format_version": 1, "trap": Path("x")}, path)  # Path is not on torch's list of safe types
    with pytest.raises(DataError, match="damaged, or not a checkpoint"):
        load_file(path)


def test_another_configuration_is_refused_by_field(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    _save(path)
    other = _changed("method", equivariance_weight=0.0)
    with pytest.raises(ConfigError, match=r"method\.equivariance_weight = 0\.4 there and 0\.0 now"):
        load_checkpoint(path, config=other, dataset_digest="d" * 64)


def test_another_dataset_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    _save(path)
    with pytest.raises(DataError, match=r"other images than a\.beton"):
        load_checkpoint(path, config=CONFIG, dataset_digest="e" * 64)


@pytest.mark.parametrize(
    "config", [_changed("data", train=Path("moved.beton")), _changed("train", log_every=1, max_steps=9)]
)
def test_what_does_not_define_the_run_may_change(tmp_path: Path, config: Config) -> None:
    path = tmp_path / "last.pt"
    _save(path)
    assert load_checkpoint(path, config=config, dataset_digest="d" * 64)["step"] == 7
