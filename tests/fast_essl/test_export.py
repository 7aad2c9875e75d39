"""Exported backbones: torchvision's names and shapes, round trips, metadata, what is refused."""

from __future__ import annotations

import json
import os

import pytest
import safetensors
import safetensors.torch
import torch

from fast_essl import __version__
from fast_essl.checkpoint import weights_digest
from fast_essl.cli import main
from fast_essl.config import ConfigError
from fast_essl.config_io import load_config
from fast_essl.evaluate_run import load_run
from fast_essl.export import export_backbone
from fast_essl.interchange import read_backbone
from fast_essl.pretrain import pretrain
from fast_essl.resnet import build_backbone
from loaders.errors import DataError


@pytest.fixture(scope="module")
def run_dir(tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    pretrain(
        load_config(tiny_config, ["--train.max-steps", "3", "--train.knn-every", "0"]),
        folder,
        show_progress=False,
    )
    return folder


def torchvision_shapes(name):
    """Names and shapes of torchvision's resnet18 and resnet50 without fc, from the published architecture."""
    depths, convolutions = {
        "resnet18": ((2, 2, 2, 2), lambda inside, width: [(width, inside, 3), (width, width, 3)]),
        "resnet50": (
            (3, 4, 6, 3),
            lambda inside, width: [(width, inside, 1), (width, width, 3), (4 * width, width, 1)],
        ),
    }[name]
    shapes = {}

    def convolution(key, norm, out, inside, side):
        shapes[f"{key}.weight"] = (out, inside, side, side)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{part}"] = (out,)
        shapes[f"{norm}.num_batches_tracked"] = ()

    convolution("conv1", "bn1", 64, 3, 7)
    inside = 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        for block in range(depth):
            key = f"layer{stage + 1}.{block}"
            layers = convolutions(inside, width)
            for number, (out, channels, side) in enumerate(layers, start=1):
                convolution(f"{key}.conv{number}", f"{key}.bn{number}", out, channels, side)
            if block == 0 and (stage > 0 or layers[-1][0] != inside):
                convolution(f"{key}.downsample.0", f"{key}.downsample.1", layers[-1][0], inside, 1)
            inside = layers[-1][0]
    return shapes


@pytest.mark.parametrize(("name", "num_with_fc"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_exported_file_is_torchvision_s_state_dict(tmp_path, name, num_with_fc, suffix):
    torch.manual_seed(0)
    backbone = build_backbone(name, stem="imagenet").to(memory_format=torch.channels_last)
    torch.save({"backbone": backbone.state_dict()}, tmp_path / "official.pth")
    out = tmp_path / f"out{suffix}"
    export_backbone(tmp_path / "official.pth", out)
    load = safetensors.torch.load_file if suffix == ".safetensors" else torch.load
    state = load(out)
    assert {key: tuple(value.shape) for key, value in state.items()} == torchvision_shapes(name)
    assert all(torch.equal(value, backbone.state_dict()[key]) for key, value in state.items())
    assert all(value.dtype == (torch.int64 if value.ndim == 0 else torch.float32) for value in state.values())
    assert all(value.stride() == torch.empty(value.shape).stride() for value in state.values())
    num_parameters = sum(v.numel() for k, v in state.items() if k.endswith(("weight", "bias")))
    assert num_parameters + 1000 * backbone.num_features + 1000 == num_with_fc


def test_a_run_its_files_and_its_exports_evaluate_alike(run_dir, tmp_path, capsys, tiny_config):
    own = load_run(run_dir)[1].state_dict()
    assert all(torch.equal(value, own[key]) for key, value in read_backbone(run_dir).items())
    assert main(["evaluate", str(run_dir)]) == 0
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])
    before = sorted(path.name for path in tmp_path.iterdir())
    for name in ("out.pth", "out.safetensors"):
        assert main(["export", str(run_dir), str(tmp_path / name)]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{tmp_path / name}: a backbone of {len(own)} tensors, ")
        assert main(["evaluate", str(tmp_path / name), "--config", str(tiny_config)]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["accuracy"] == expected["accuracy"] and "step" not in result
    assert before == [] and sorted(path.name for path in tmp_path.iterdir()) == ["out.pth", "out.safetensors"]


def test_usage_of_export_and_evaluate(tmp_path, run_dir, capsys, tiny_config):
    out = tmp_path / "out.pth"
    out.write_text("kept")
    for words, message in (
        (["export", str(run_dir), str(out)], "is there already; --overwrite replaces it"),
        (["export", str(run_dir), str(tmp_path / "out.bin")], "must end in .pth or .safetensors"),
        (["export", str(run_dir), str(tmp_path / "none" / "out.pth")], "its folder is not there"),
        (["export", str(tmp_path), str(tmp_path / "new.pth")], "No such file"),
        (["evaluate", str(out)], "needs --config CONFIG"),
        (["evaluate", str(run_dir), "--config", str(tiny_config)], "--config is for a checkpoint file"),
        (["evaluate", str(tmp_path / "no.pth"), "--config", str(tiny_config)], "no.pth: no such file"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert out.read_text() == "kept"
    assert main(["export", str(run_dir), str(out), "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.pth"]


def test_the_metadata_tells_what_the_file_is(run_dir, tmp_path):
    export_backbone(run_dir, tmp_path / "run.safetensors")
    torch.save(
        {"step": 7, "backbone": build_backbone("resnet18", width=8, stem="imagenet").state_dict()},
        tmp_path / "theirs.pth",
    )
    export_backbone(tmp_path / "theirs.pth", tmp_path / "theirs.safetensors")
    common = {"format": "pt", "version": __version__}
    for name, expected in (
        ("run", {"architecture": "resnet10", "width": "8", "stem": "cifar", "step": "3"}),
        ("theirs", {"architecture": "resnet18", "width": "8", "stem": "imagenet"}),
    ):
        with safetensors.safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            digest = {"weights_sha256": weights_digest(read_backbone(tmp_path / f"{name}.safetensors"))}
            assert file.metadata() == common | expected | digest


@pytest.mark.parametrize(
    ("network", "suffix", "hint"),
    [
        (
            {"name": "resnet50", "stem": "imagenet"},
            ".pth",
            "torchvision.models.resnet50().load_state_dict(torch.load('out.pth'), strict=False)",
        ),
        (
            {"name": "resnet18", "stem": "imagenet"},
            ".safetensors",
            "resnet18().load_state_dict(safetensors.torch.load_file('out.safetensors'), strict=False)",
        ),
        ({"name": "resnet18", "stem": "cifar"}, ".pth", "conv1 is 3×3 of stride 1 and no max-pool follows"),
        ({"name": "resnet10", "stem": "imagenet"}, ".pth", "torchvision has no such network"),
        ({"name": "resnet18", "stem": "imagenet", "width": 8}, ".pth", "torchvision has no such network"),
    ],
)
def test_the_line_says_how_to_load_the_file(tmp_path, capsys, network, suffix, hint):
    torch.save(build_backbone(**network).state_dict(), tmp_path / "in.pth")
    assert main(["export", str(tmp_path / "in.pth"), str(tmp_path / f"out{suffix}")]) == 0
    said = capsys.readouterr().out
    assert hint in said and said.count("\n") == 1


def test_a_slice_of_a_large_storage_is_exported_alone(tmp_path):
    state = build_backbone("resnet10", width=4).state_dict()
    large = torch.zeros(2**20 + state["conv1.weight"].numel())
    large[2**20 :] = state["conv1.weight"].flatten()
    state["conv1.weight"] = large[2**20 :].view(state["conv1.weight"].shape)
    torch.save(state, tmp_path / "in.pth")
    export_backbone(tmp_path / "in.pth", tmp_path / "out.pth")
    assert (tmp_path / "in.pth").stat().st_size - (tmp_path / "out.pth").stat().st_size > 4 * 2**20 - 10_000
    exported = torch.load(tmp_path / "out.pth", weights_only=True)
    assert all(torch.equal(exported[key], value) for key, value in state.items())


def test_a_part_of_a_network_is_not_exported(tmp_path):
    state = build_backbone("resnet10", width=4).state_dict()
    del state["layer4.0.bn2.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(DataError, match=r"part\.pth: its ResNet is not whole"):
        export_backbone(tmp_path / "part.pth", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_interrupted_export_leaves_the_file_of_before(run_dir, tmp_path, monkeypatch, suffix):
    out = tmp_path / f"out{suffix}"
    out.write_text("before")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export_backbone(run_dir, out, overwrite=True)
    assert out.read_text() == "before" and os.listdir(tmp_path) == [out.name]


def test_a_folder_is_not_replaced(run_dir, tmp_path):
    (tmp_path / "out.pth").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        export_backbone(run_dir, tmp_path / "out.pth", overwrite=True)
