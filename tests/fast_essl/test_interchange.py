"""Backbones from elsewhere: torchvision's names, the official release's checkpoints, files that are refused."""

from __future__ import annotations

import os
import random
import re
import sys
import warnings
import zipfile

import pytest
import torch

from fast_essl.cli import main
from fast_essl.config import ConfigError
from fast_essl.config_io import load_config
from fast_essl.export import export_backbone
from fast_essl.interchange import Network, describe_network, load_backbone, read_backbone
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
            "net.1.net.0.weight": torch.ones(1),
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
    assert read_backbone(tmp_path / "file.pth").keys() == source.state_dict().keys()


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


def exclude_bias_and_norm(parameter):
    """Named by the optimizer of the official SimCLR training checkpoints (imagenet/simclr/main.py, class LARS)."""
    raise AssertionError("a file's function was called")


def test_the_official_simclr_training_checkpoint_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(exclude_bias_and_norm, "__module__", "__main__")
    monkeypatch.setattr(
        sys.modules["__main__"], "exclude_bias_and_norm", exclude_bias_and_norm, raising=False
    )
    source = build_backbone("resnet10", width=4).state_dict()
    group = {
        "lr": 4.8,
        "weight_decay_filter": exclude_bias_and_norm,
        "lars_adaptation_filter": exclude_bias_and_norm,
        "params": [0],
    }
    optimizer = {"state": {0: {"mu": torch.ones(2)}}, "param_groups": [group]}
    model = with_prefix(source, "module.backbone.")
    torch.save({"epoch": 1, "model": model, "optimizer": optimizer}, tmp_path / "checkpoint.pth")
    before = set(torch.serialization.get_safe_globals())
    state = read_backbone(tmp_path / "checkpoint.pth")
    assert state.keys() == source.keys() and all(torch.equal(state[key], source[key]) for key in source)
    assert set(torch.serialization.get_safe_globals()) == before

    # No other name of __main__ passes.
    monkeypatch.setattr(exclude_bias_and_norm, "__qualname__", "another")
    monkeypatch.setattr(sys.modules["__main__"], "another", exclude_bias_and_norm, raising=False)
    torch.save({"epoch": 1, "model": model, "optimizer": optimizer}, tmp_path / "another.pth")
    with pytest.raises(DataError, match="refused, since loading it would run code"):
        read_backbone(tmp_path / "another.pth")


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


@pytest.mark.parametrize("seed", range(200))
def test_a_flipped_bit_is_never_read_as_other_weights(tmp_path, seed):
    torch.manual_seed(0)
    source = build_backbone("resnet10", width=1).state_dict()
    torch.save({"backbone": source}, tmp_path / "file.pth")
    content = bytearray((tmp_path / "file.pth").read_bytes())
    generator = random.Random(seed)
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    (tmp_path / "file.pth").write_bytes(content)
    try:
        state = read_backbone(tmp_path / "file.pth")
    except DataError:
        pass
    else:  # the bit was in what nobody reads, as padding
        assert state.keys() == source.keys() and all(torch.equal(state[key], source[key]) for key in source)


@pytest.mark.parametrize("seed", range(100))
def test_a_flipped_bit_of_an_exported_file_is_never_read_as_other_weights(tmp_path, seed):
    torch.manual_seed(0)
    source = build_backbone("resnet10", width=1).state_dict()
    torch.save(source, tmp_path / "source.pth")
    export_backbone(tmp_path / "source.pth", tmp_path / "file.safetensors")
    content = bytearray((tmp_path / "file.safetensors").read_bytes())
    generator = random.Random(seed)
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    (tmp_path / "file.safetensors").write_bytes(content)
    try:
        state = read_backbone(tmp_path / "file.safetensors")
    except DataError:
        pass
    else:  # the bit was in what is told of the file
        assert state.keys() == source.keys() and all(torch.equal(state[key], source[key]) for key in source)


def test_a_bit_that_makes_a_tensor_a_folder_is_refused(tmp_path):
    torch.manual_seed(0)
    torch.save({"backbone": build_backbone("resnet10", width=1).state_dict()}, tmp_path / "file.pth")
    content = (tmp_path / "file.pth").read_bytes()
    starts = [match.start() for match in re.finditer(b"PK\x01\x02", content)]
    assert len(starts) > 70
    for start in starts:
        damaged = bytearray(content)
        damaged[start + 38] ^= 0x10
        (tmp_path / "file.pth").write_bytes(damaged)
        with pytest.raises(DataError, match="damaged"):
            read_backbone(tmp_path / "file.pth")


def test_a_flipped_weight_is_refused(tmp_path):
    source = build_backbone("resnet10", width=4).state_dict()
    torch.save(source, tmp_path / "file.pth")
    content = (tmp_path / "file.pth").read_bytes()
    weights = source["layer4.0.conv2.weight"].numpy().tobytes()
    assert content.count(weights) == 1
    damaged = bytearray(content)
    damaged[content.index(weights) + len(weights) // 2] ^= 1
    (tmp_path / "file.pth").write_bytes(damaged)
    with pytest.raises(DataError, match="damaged"):
        read_backbone(tmp_path / "file.pth")


def test_what_holds_no_backbone_is_said_in_one_line(tmp_path, capsys, tiny_config, run_dir):
    torch.save({"weights": {"a": torch.ones(1)}}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"state_dict": {"conv1.weight": "text"}}, tmp_path / "text.pth")
    two = {**with_prefix({"conv1.weight": torch.ones(1)}, "backbone."), "encoder.conv1.weight": torch.ones(1)}
    torch.save({"state_dict": two}, tmp_path / "two.pth")
    torch.save({"state_dict": {0: 1, "conv2.weight": torch.ones(1)}}, tmp_path / "numbers.pth")
    torch.save(
        {0: 1, **build_backbone("resnet10", width=4).state_dict(), "bn1.bias": 2}, tmp_path / "mixed.pth"
    )
    whole = (run_dir / "last.pt").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage" * 9)
    for name, message in (
        ("other.pth", "holds no ResNet that is known here; its keys are 'weights'"),
        ("list.pth", "holds a list"),
        ("two.pth", "more than one ResNet, 'backbone.conv1.weight' and 'encoder.conv1.weight'"),
        ("numbers.pth", "its keys are 0, 'conv2.weight'"),
        ("mixed.pth", "bn1.bias is not a tensor"),
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
    with pytest.raises(
        ConfigError,
        match=r"the file holds a resnet10, width 4, imagenet stem\): conv1.weight is 4×3×7×7 there and 4×3×3×3 here",
    ):
        load_backbone(build_backbone("resnet10", width=4), tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=r"layer1\.1\.conv1\.weight is missing there.* tensors more"):
        load_backbone(build_backbone("resnet18", width=8), run_dir)


@pytest.mark.parametrize("backbone", ["resnet10", "resnet18", "resnet50"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_a_network_is_told_by_its_shapes(backbone, stem):
    state = build_backbone(backbone, width=6, stem=stem).state_dict()
    assert describe_network(state) == Network(backbone=backbone, width=6, stem=stem)
    for key in list(state)[1::50]:
        part = {k: v for k, v in state.items() if k != key}
        assert describe_network(part) is None
    for weight in (torch.ones(6, 3, 5, 5), torch.ones(()), torch.ones(0, 3, 3, 3), torch.ones(7, 3, 3, 3)):
        assert describe_network({**state, "conv1.weight": weight}) is None


def changed(index, number):
    """Weights with one of their numbers replaced."""

    def change(weights):
        weights = weights.clone()
        weights.view(-1)[index] = number
        return weights

    return change


WEIGHT = "layer1.0.conv1.weight"


@pytest.mark.parametrize(
    ("key", "change", "told"),
    [
        (WEIGHT, changed(3, float("nan")), "holds NaN or infinity"),
        (WEIGHT, changed(-1, float("-inf")), "holds NaN or infinity"),
        (WEIGHT, lambda w: w.double() * 1e300, "holds NaN or infinity"),  # in float32
        (WEIGHT, lambda w: w.to_sparse(), "is not a dense tensor"),
        (WEIGHT, lambda w: torch.nested.nested_tensor([w[0, 0, 0], w[0, 0, 0, :2]]), "is not a dense tensor"),
        (WEIGHT, lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "is quantised"),
        (WEIGHT, lambda w: w.long(), "is of torch.int64, not of floating-point numbers"),
        (WEIGHT, lambda w: w > 0, "is of torch.bool"),
        (WEIGHT, lambda w: w + 1j, "is of torch.complex64"),
        (WEIGHT, lambda w: w.to("meta"), "has a shape, but no values"),
        (WEIGHT, lambda w: torch.ones(1).expand(10**6, 10**6, 3, 3), "claims 1000000×1000000×3×3 numbers"),
        (WEIGHT, lambda w: [1.0], "is not a tensor"),
        ("bn1.running_var", changed(0, -1e-9), "is negative"),
        ("bn1.num_batches_tracked", lambda n: n - 5, "is negative"),
        ("bn1.num_batches_tracked", lambda n: n * 1j, "is of torch.complex64"),
    ],
)
def test_a_tensor_that_is_no_weight_is_refused_by_name(tmp_path, key, change, told):
    state = build_backbone("resnet10", width=8).state_dict()
    with warnings.catch_warnings():  # of nested and quantised tensors
        warnings.simplefilter("ignore")
        torch.save({**state, key: change(state[key])}, tmp_path / "file.pth")
        with pytest.raises(DataError) as error:
            load_backbone(build_backbone("resnet10", width=8), tmp_path / "file.pth")
    assert str(error.value).startswith(f"{tmp_path / 'file.pth'}: {key} {told}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_floating_point_types_are_read(tmp_path, dtype):
    state = build_backbone("resnet10", width=8).state_dict()
    torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "a.pth")
    read = read_backbone(tmp_path / "a.pth")
    assert read[WEIGHT].dtype is torch.float32
    assert torch.equal(read[WEIGHT], state[WEIGHT].to(dtype).float())


def test_a_file_that_claims_more_than_it_holds_is_refused(tmp_path):
    torch.save(build_backbone("resnet10", width=8).state_dict(), tmp_path / "good.pth")
    with (
        zipfile.ZipFile(tmp_path / "good.pth") as good,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for part in good.infolist():
            bomb.writestr(part.filename, good.read(part))
            packed.writestr(part.filename, good.read(part))
        bomb.writestr("good/data/999", bytes(2**24))
    with pytest.raises(DataError, match=r"bomb\.pth: refused, since its [\d,]+ bytes unpack to [\d,]+"):
        read_backbone(tmp_path / "bomb.pth")
    assert read_backbone(tmp_path / "packed.pth").keys() == read_backbone(tmp_path / "good.pth").keys()
    # A pickle of one call, bytearray(2**62), which torch lets through.
    (tmp_path / "huge.pth").write_bytes(
        b"\x80\x02c__builtin__\nbytearray\n\x8a\x08" + (2**62).to_bytes(8, "little") + b"\x85R."
    )
    with pytest.raises(DataError, match=r"huge\.pth: claims sizes that do not fit into memory"):
        read_backbone(tmp_path / "huge.pth")


def test_a_fifo_in_place_of_a_checkpoint_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "fifo.pth")
    with pytest.raises(DataError, match=r"fifo\.pth: is a pipe"):
        read_backbone(tmp_path / "fifo.pth")


def test_a_checkpoint_of_ours_without_its_step_is_exported(tmp_path):
    state = build_backbone("resnet10", width=8).state_dict()
    torch.save({"format_version": 2, "backbone": state}, tmp_path / "a.pth")
    export_backbone(tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert read_backbone(tmp_path / "b.safetensors").keys() == state.keys()
