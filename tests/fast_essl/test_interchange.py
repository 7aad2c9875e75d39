"""Backbones to and from elsewhere: torchvision's names, the official release's checkpoints, files that are refused."""

from __future__ import annotations

import json
import os

import pytest
import safetensors.torch
import torch

from fast_essl.cli import main
from fast_essl.config import ConfigError
from fast_essl.config_io import load_config
from fast_essl.evaluate_run import load_run
from fast_essl.interchange import export_backbone, load_backbone, read_backbone
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
    assert all(value.is_contiguous() for value in state.values())
    num_parameters = sum(v.numel() for k, v in state.items() if k.endswith(("weight", "bias")))
    assert num_parameters + 1000 * backbone.num_features + 1000 == num_with_fc


def with_prefix(state, prefix):
    return {prefix + key: value for key, value in state.items()}


LAYOUTS = {
    "ImageNet, final": lambda s: {"backbone": s, "projector": {"0.weight": torch.ones(1)}, "head": {}},
    "ImageNet, training": lambda s: {
        "epoch": 3,
        "model": {**with_prefix(s, "module.backbone."), "module.projector.0.weight": torch.ones(1)},
        "optimizer": {"state": {}, "param_groups": []},
    },
    "ImageNet, SimSiam": lambda s: {
        "epoch": 9,
        "arch": "resnet50",
        "state_dict": with_prefix(s, "module.backbone."),
    },
    "CIFAR-10": lambda s: {
        "epoch": 800,
        "state_dict": {
            **with_prefix(s, "encoder."),
            "projector.net.0.weight": torch.ones(1),
            **with_prefix(s, "net.0."),
            "predictor2.0.weight": torch.ones(1),
        },
    },
    "torchvision": lambda s: {**s, "fc.weight": torch.ones(5, 8), "fc.bias": torch.ones(5)},
    "DistributedDataParallel": lambda s: {"state_dict": with_prefix(s, "module.")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_its_backbone(tmp_path, layout):
    torch.manual_seed(1)
    source, target = (build_backbone("resnet10", width=4) for _ in range(2))
    torch.save(LAYOUTS[layout](source.state_dict()), tmp_path / "file.pth")
    load_backbone(target, tmp_path / "file.pth")
    for key, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[key]), key


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


def test_a_run_starts_from_a_file_and_is_resumed_without_it(run_dir, tmp_path, tiny_config):
    exported = tmp_path / "start.safetensors"
    export_backbone(run_dir, exported)
    # A learning rate of almost nothing leaves the weights where they started.
    common = [
        "--train.init-from",
        str(exported),
        "--train.knn-every",
        "0",
        "--optimizer.base-learning-rate",
        "1e-20",
    ]
    pretrain(
        load_config(tiny_config, [*common, "--train.max-steps", "2"]), tmp_path / "run", show_progress=False
    )
    start = read_backbone(exported)
    weights = {key: value for key, value in read_backbone(tmp_path / "run").items() if "running" not in key}
    moved = [
        k for k, v in weights.items() if "num_batches" not in k and not torch.allclose(v, start[k], atol=1e-7)
    ]
    assert moved == []
    exported.unlink()
    summary = pretrain(
        load_config(tiny_config, [*common, "--train.max-steps", "4"]), tmp_path / "run", show_progress=False
    )
    assert summary.step == 4
    with pytest.raises(OSError, match=r"start\.safetensors"):
        pretrain(load_config(tiny_config, common), tmp_path / "another", show_progress=False)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"backbone": RunsCode()}, "evil.pth")
    torch.save({"backbone": RunsCode()}, "old.pth", _use_new_zipfile_serialization=False)
    for name in ("evil.pth", "old.pth"):
        with pytest.raises(DataError, match="refused, since loading it would run code"):
            read_backbone(tmp_path / name)
    assert not (tmp_path / "code-was-run").exists()


def test_what_holds_no_backbone_is_said_in_one_line(tmp_path, capsys, tiny_config, run_dir):
    torch.save({"weights": {"a": torch.ones(1)}}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"state_dict": {"conv1.weight": "text"}}, tmp_path / "text.pth")
    whole = (run_dir / "last.pt").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage" * 9)
    for name, message in (
        ("other.pth", "holds no ResNet that is known here; its keys are 'weights'"),
        ("list.pth", "holds a list"),
        ("text.pth", "conv1.weight is not a tensor"),
        ("half.pth", "damaged"),
        ("garbage.safetensors", "damaged"),
        ("missing.pth", "No such file"),
    ):
        assert main(["export", str(tmp_path / name), str(tmp_path / "out.pth")]) == 2
        error = capsys.readouterr().err
        assert message in error and name in error and error.count("\n") == 1, error
    assert not (tmp_path / "out.pth").exists()


def test_another_network_is_named(tmp_path, run_dir):
    torch.save(
        {"backbone": build_backbone("resnet10", width=4, stem="imagenet").state_dict()}, tmp_path / "a.pth"
    )
    with pytest.raises(ConfigError, match=r"conv1.weight is 4×3×7×7 there and 4×3×3×3 here"):
        load_backbone(build_backbone("resnet10", width=4), tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=r"layer1\.1\.conv1\.weight is missing there.* tensors more"):
        load_backbone(build_backbone("resnet18", width=4), run_dir)


def test_usage_of_export_and_evaluate(tmp_path, run_dir, capsys, tiny_config):
    out = tmp_path / "out.pth"
    out.write_text("kept")
    for words, message in (
        (["export", str(run_dir), str(out)], "is there already; --overwrite replaces it"),
        (["export", str(run_dir), str(tmp_path / "out.bin")], "must end in .pth or .safetensors"),
        (["export", str(tmp_path), str(tmp_path / "new.pth")], "No such file"),
        (["evaluate", str(out)], "needs --config CONFIG"),
        (["evaluate", str(run_dir), "--config", str(tiny_config)], "--config is for a checkpoint file"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert out.read_text() == "kept"
    assert main(["export", str(run_dir), str(out), "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.pth"]
