"""Checkpoints appear whole or not at all, and refuse what they do not belong to, by name."""

from __future__ import annotations

import dataclasses
import io
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fast_essl import run_folder
from fast_essl.checkpoint import (
    CHECKPOINT_KINDS,
    FORMAT_VERSION,
    encode,
    load_checkpoint,
    load_file,
    save_checkpoint,
    save_file,
    weights_digest,
)
from fast_essl.config import Config, ConfigError, DataConfig, ViewsConfig
from fast_essl.evaluate_run import load_run
from fast_essl.interchange import read_backbone
from loaders.errors import DataError
from loaders.recipe import Recipe

VIEWS = ViewsConfig(view1=Recipe(size=32), view2=Recipe(size=32), transformed=Recipe(size=16))
OLD_RUN = Path(__file__).resolve().parents[1] / "data" / "v0_1_0_run.tar.xz"
"""A finished run of two steps of the configuration tiny.toml, by commit 9d2411c; each tensor was set to its mean."""
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


def test_any_bit_that_flips_is_noticed(tmp_path: Path) -> None:
    """With the directory of the zip archive: torch takes a part that it marks as a folder for uninitialised memory."""
    path = tmp_path / "small.pt"
    save_file(path, {"format_version": FORMAT_VERSION, "w": torch.arange(20.0)})
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")
    random = np.random.default_rng(0)
    bits = [*random.integers(0, 8 * directory, 100), *random.integers(8 * directory, 8 * len(content), 200)]
    attributes = [
        8 * (start + 38) + 4 for start in range(len(content)) if content[start:].startswith(b"PK\x01\x02")
    ]
    assert len(attributes) >= 5
    for bit in (*bits, *attributes):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged"):
            load_file(path)
        with pytest.raises(DataError, match="damaged"):
            read_backbone(path)
    for length in (len(content) - 1, len(content) - 64, len(content) - 81, directory):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match="damaged"):
            load_file(path)


def test_others_read_a_file_with_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"".join(encode({"w": torch.arange(9.0)})))
    for options in ({}, {"mmap": True}):
        assert torch.equal(torch.load(path, weights_only=True, **options)["w"], torch.arange(9.0))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"fast_essl sha256 ")


def test_a_file_without_a_digest_is_read_and_its_directory_looked_at(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.pt"
    buffer = io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, "w": torch.arange(20.0)}, buffer)
    content = buffer.getvalue()
    path.write_bytes(content)
    assert torch.equal(load_file(path)["w"], torch.arange(20.0))
    load_file(path)
    assert capfd.readouterr().err.count("without a digest") == 1
    for start in range(len(content)):
        if content[start:].startswith(b"PK\x01\x02"):
            damaged = bytearray(content)
            damaged[start + 38] ^= 16
            path.write_bytes(damaged)
            with pytest.raises(DataError, match="damaged"):
                load_file(path)


@pytest.mark.parametrize("name", CHECKPOINT_KINDS)
@pytest.mark.parametrize("change", ["missing", "of type complex", "negative"])
def test_a_checkpoint_that_lacks_something_is_one_line(tmp_path: Path, name: str, change: str) -> None:
    path = tmp_path / "last.pt"
    _save(path)
    state = load_file(path)
    if change == "missing":
        del state[name]
    elif change == "negative" and CHECKPOINT_KINDS[name] in (int, (int, float)):
        state[name] = -1
    else:
        state[name] = 1j
    save_file(path, state)
    with pytest.raises(
        DataError, match=f"^{path}: not a (whole )?checkpoint: .*{name if state.get(name) != -1 else ''}"
    ):
        load_checkpoint(path, config=CONFIG, dataset_digest="d" * 64)


def test_a_digest_of_weights_is_that_of_names_and_values() -> None:
    state = {"b.w": torch.arange(6.0).reshape(2, 3), "b.n": torch.tensor(3), "c": torch.ones(1)}
    digest = weights_digest(state, "b.")
    turned = {"n": torch.tensor(3), "w": torch.arange(6.0).reshape(3, 2).T.contiguous().T.reshape(2, 3)}
    assert weights_digest(turned) == digest
    for other in (
        {**turned, "n": torch.tensor(4)},
        {"w": turned["w"], "m": turned["n"]},
        {**turned, "w": turned["w"].reshape(3, 2)},
        {**turned, "w": turned["w"].double()},
        turned | {"c": torch.ones(1)},
    ):
        assert weights_digest(other) != digest


def test_a_run_of_version_0_1_0_is_read(tiny_config: Path, tmp_path: Path) -> None:
    with tarfile.open(OLD_RUN) as archive:
        archive.extractall(tmp_path, filter="data")
    run_dir = tmp_path / "v0_1_0_run"
    data = ["--data.train", str(tiny_config.parent / "train.beton")]
    data += ["--data.test", str(tiny_config.parent / "test.beton")]
    config, backbone, step = load_run(run_dir, data)
    assert step == 2 and config.model.backbone == "resnet10"
    state = load_checkpoint(
        run_dir / run_folder.CHECKPOINT,
        config=config,
        dataset_digest=load_file(run_dir / run_folder.CHECKPOINT)["dataset_digest"],
    )
    assert backbone.conv1.weight.unique().numel() == 1
    exported = read_backbone(run_dir / run_folder.BACKBONE)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, exported[name]) and torch.equal(value, state["method"][f"backbone.{name}"])
