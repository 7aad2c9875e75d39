"""Backbones, heads and projector, against the official numbers and obvious forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import assert_close, parity
from torch.utils._python_dispatch import TorchDispatchMode

from fast_essl.heads import prediction_head, projector
from fast_essl.resnet import SubsamplingConv2d, build_backbone


@pytest.mark.parametrize("form", ["cifar_simclr", "cifar_simsiam", "imagenet"])
def test_prediction_heads_equal_the_official_release(form):
    name = {"imagenet": "imagenet"}.get(form, form.replace("cifar", "cifar10"))
    official = parity(f"rotation_head_{name}")
    sizes = {key: official[key].shape for key in official.files if key.startswith("param.")}
    weights = [shape for shape in sizes.values() if len(shape) == 2]
    head = prediction_head(
        weights[0][1], hidden=weights[0][0], form=form, bottleneck=weights[-1][1], num_classes=4
    ).double()
    head.load_state_dict({key[6:]: torch.tensor(official[key]) for key in sizes})
    features = torch.tensor(official["features"], requires_grad=True)
    logits = head(features)
    loss = F.cross_entropy(logits, torch.tensor(official["labels"]))
    loss.backward()
    assert_close(logits, official["logits"])
    assert_close(loss, official["loss"])
    assert_close(features.grad, official["grad_features"])
    for key, parameter in head.named_parameters():
        assert_close(parameter.grad, official[f"grad.{key}"])


@pytest.mark.parametrize("form", ["cifar_simclr", "cifar_simsiam", "imagenet"])
def test_prediction_heads_are_their_equations(form):
    torch.manual_seed(2)
    head = prediction_head(5, hidden=7, form=form, bottleneck=3, num_classes=6).double()
    for parameter in head.parameters():  # norms start at 1 and 0, which would hide them
        torch.nn.init.normal_(parameter)
    weights = iter(head.parameters())
    x = torch.randn(4, 5, dtype=torch.float64)
    result = head(x)

    def linear(x):
        weight, bias = next(weights), next(weights)
        return torch.stack(
            [torch.stack([(row * w).sum() + b for w, b in zip(weight, bias, strict=True)]) for row in x]
        )

    def norm(x):
        weight, bias = next(weights), next(weights)
        centred = x - x.mean(dim=1, keepdim=True)
        return centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * weight + bias

    x = norm(linear(x)).clamp_min(0)
    x = norm(linear(x))
    x = x if form == "cifar_simsiam" else x.clamp_min(0)
    x = norm(linear(x)) if form == "imagenet" else x
    assert torch.allclose(result, linear(x), rtol=1e-10)
    assert next(weights, None) is None


def test_the_projector_ends_in_a_norm_without_affine():
    layers = projector(8, hidden=6, out=4, num_layers=3)
    assert [type(layer).__name__ for layer in layers] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + [
        "Linear",
        "BatchNorm1d",
    ]
    assert all(layer.bias is None for layer in layers if isinstance(layer, torch.nn.Linear))
    assert not layers[-1].affine
    out = layers(torch.randn(32, 8))
    assert out.mean(dim=0).abs().max() < 1e-5 and out.shape == (32, 4)


@pytest.mark.parametrize(
    ("name", "stem", "num_parameters", "num_features"),
    [
        ("resnet18", "imagenet", 11_176_512, 512),
        ("resnet50", "imagenet", 23_508_032, 2048),
        ("resnet18", "cifar", 11_168_832, 512),
    ],
)
def test_backbones_have_the_published_size(name, stem, num_parameters, num_features):
    backbone = build_backbone(name, stem=stem)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == num_parameters
    assert backbone.num_features == num_features
    keys = backbone.state_dict().keys()
    assert {"conv1.weight", "bn1.running_mean", "layer2.0.downsample.0.weight", "layer4.1.bn2.bias"} <= keys


def test_resnet10_is_its_equations():
    """One forward pass in evaluation mode, spelled out with functions alone."""
    torch.manual_seed(0)
    backbone = build_backbone("resnet10", width=4).eval()
    state = backbone.state_dict()
    for key in state:
        if key.endswith(("running_mean", "bn1.bias")):
            state[key].normal_()
    images = torch.randn(2, 3, 17, 17)

    def norm(x, key):
        return F.batch_norm(
            x, *(state[f"{key}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        )

    x = F.relu(norm(F.conv2d(images, state["conv1.weight"], padding=1), "bn1"))
    for stage in range(1, 5):
        key, stride = f"layer{stage}.0", 1 if stage == 1 else 2
        shortcut = x
        if stage > 1:
            shortcut = F.conv2d(x, state[f"{key}.downsample.0.weight"], stride=stride)
            shortcut = norm(shortcut, f"{key}.downsample.1")
        out = F.relu(norm(F.conv2d(x, state[f"{key}.conv1.weight"], stride=stride, padding=1), f"{key}.bn1"))
        x = F.relu(norm(F.conv2d(out, state[f"{key}.conv2.weight"], padding=1), f"{key}.bn2") + shortcut)
    with torch.no_grad():
        assert torch.allclose(backbone(images), x.mean(dim=(2, 3)), atol=1e-5)


@pytest.mark.parametrize("name", ["resnet10", "resnet50"])
def test_zero_init_makes_each_block_its_shortcut(name):
    backbone = build_backbone(name, width=4, zero_init_residual=True)
    last = [getattr(backbone, f"layer{stage}")[-1] for stage in range(1, 5)]
    assert all(((block.bn3 if name == "resnet50" else block.bn2).weight == 0).all() for block in last)


@pytest.mark.parametrize(("name", "stem"), [("resnet10", "cifar"), ("resnet50", "imagenet")])
def test_every_convolution_sees_channels_last(name, stem):
    backbone = build_backbone(name, width=8, stem=stem).to(memory_format=torch.channels_last)
    seen = []
    for module in backbone.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda _, inputs, output: seen.append(
                    all(x.is_contiguous(memory_format=torch.channels_last) for x in (inputs[0], output))
                )
            )
    backbone(torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last))
    assert len(seen) > 10 and all(seen)


@pytest.mark.parametrize(
    ("height", "width", "stride"), [(8, 8, 2), (7, 5, 2), (1, 1, 2), (9, 8, 3), (4, 6, 1)]
)
def test_a_subsampling_convolution_is_the_strided_1x1_convolution(height, width, stride):
    ours = SubsamplingConv2d(3, 5, stride).double()
    x = torch.randn(4, 3, height, width, dtype=torch.float64)
    results = []
    for forward in (ours, lambda x: F.conv2d(x, ours.weight, stride=stride)):
        inputs = x.clone().requires_grad_()
        output = forward(inputs)
        results.append((output, *torch.autograd.grad(output.sin().sum(), (inputs, ours.weight))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class _Convolutions(TorchDispatchMode):
    """Notes (kernel, stride) of each convolution that is computed, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            self.seen.append((args[1].shape[-1], args[3][0]))
        elif function is torch.ops.aten.convolution_backward.default:
            self.seen.append((args[2].shape[-1], args[4][0]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_no_strided_1x1_convolution_is_computed_on_a_cpu(name):
    backbone = build_backbone(name, width=4).to(memory_format=torch.channels_last)
    with _Convolutions() as convolutions:
        backbone(torch.randn(2, 3, 16, 16)).sum().backward()
    assert (1, 1) in convolutions.seen and (3, 2) in convolutions.seen
    assert [shape for shape in convolutions.seen if shape[0] == 1 and shape[1] > 1] == []
