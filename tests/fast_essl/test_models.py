"""Backbones, heads, losses, method, optimizer and schedule, against the official numbers and obvious forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import SHARED

from fast_essl.heads import prediction_head, projector
from fast_essl.losses import info_nce
from fast_essl.methods import ESimCLR
from fast_essl.optim import build_sgd
from fast_essl.resnet import build_backbone
from fast_essl.schedule import warmup_cosine
from loaders.batch import Views
from loaders.views.reference import rotate_four


def parity(name):
    path = SHARED / "parity" / f"{name}.npz"
    if not path.exists():
        pytest.skip("needs ../shared/parity")
    return np.load(path)


def assert_close(tensor, expected, relative=1e-9):
    expected = np.asarray(expected)
    assert np.abs(np.asarray(tensor.detach()) - expected).max() <= relative * np.abs(expected).max()


@pytest.mark.parametrize("dataset", ["cifar10", "imagenet"])
def test_info_nce_equals_the_official_release(dataset):
    official = parity(f"simclr_loss_{dataset}")
    z1, z2 = (torch.tensor(official[name], requires_grad=True) for name in ("z1", "z2"))
    loss = info_nce(z1, z2, float(official["temperature"]))
    loss.backward()
    assert_close(loss, official["loss"])
    assert_close(z1.grad, official["grad_z1"])
    assert_close(z2.grad, official["grad_z2"])


def test_info_nce_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))

    def similarity(a, b):
        return float(a @ b / (a.norm() * b.norm())) / 0.2

    total = 0.0
    for one, other in ((z1, z2), (z2, z1)):
        for i in range(7):
            total -= similarity(one[i], other[i])
            total += math.log(sum(math.exp(similarity(one[i], other[j])) for j in range(7)))
    assert float(info_nce(z1, z2, 0.2)) == pytest.approx(total / 14, rel=1e-12)


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


def batch(count=6, size=8):
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(count, 3, size, size, generator=generator) for _ in range(3)]
    copies, labels = rotate_four(images[2])
    return Views(
        views=tuple(images[:2]),
        transformed=copies,
        transformed_labels=labels,
        labels=torch.zeros(count, dtype=torch.long),
        indices=torch.arange(count),
    )


def method(weight, seed=0):
    torch.manual_seed(seed)
    return ESimCLR(
        build_backbone("resnet10", width=4),
        projector_hidden=8,
        projector_out=8,
        head_hidden=8,
        equivariance_weight=weight,
    )


def test_the_loss_is_ssl_plus_lambda_times_equivariance():
    model, views = method(0.4).train(), batch()
    output = model(views)
    z1, z2 = (model.projector(model.backbone(view)) for view in views.views)
    logits = model.head(model.backbone(views.transformed))
    ssl, equivariance = info_nce(z1, z2, 0.5), F.cross_entropy(logits, views.transformed_labels)
    assert torch.allclose(output.loss, ssl + 0.4 * equivariance, atol=1e-6)
    assert torch.allclose(output.ssl_loss, ssl, atol=1e-6)
    assert torch.allclose(output.equivariance_loss, equivariance, atol=1e-6)
    assert float(output.equivariance_accuracy) == pytest.approx(
        float((logits.argmax(1) == views.transformed_labels).float().mean())
    )
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_lambda_there_is_no_head_and_the_start_is_the_same():
    plain, equivariant = method(0.0), method(0.4)
    assert plain.head is None
    output = plain(batch())
    assert output.equivariance_loss is None and torch.equal(output.loss.detach(), output.ssl_loss)
    start = equivariant.state_dict()
    assert all(torch.equal(value, start[key]) for key, value in method(0.0).state_dict().items())


def test_copies_are_asked_for_by_name():
    views = batch()
    without = Views(
        views=views.views,
        transformed=None,
        transformed_labels=None,
        labels=views.labels,
        indices=views.indices,
    )
    with pytest.raises(ValueError, match="no transformed copies"):
        method(0.4)(without)


@pytest.mark.parametrize(("name", "final"), [("cifar10", 0.0), ("simclr_imagenet", 0.001)])
def test_the_schedule_equals_the_official_release(name, final):
    official = parity("schedules")
    num_epoch_steps, num_epochs = int(official["steps_per_epoch"]), int(official["epochs"])
    expected = official[name]
    for step, rate in enumerate(expected):
        ours = warmup_cosine(
            step,
            peak=expected.max(),
            num_steps=num_epoch_steps * num_epochs,
            warmup_steps=10 * num_epoch_steps,
            final=final * expected.max(),
        )
        assert abs(ours - rate) <= 1e-12


def test_the_schedule_s_landmarks():
    schedule = {"peak": 2.0, "num_steps": 110, "warmup_steps": 10, "final": 0.5}
    assert [warmup_cosine(step, **schedule) for step in (0, 5, 10)] == [0.0, 1.0, 2.0]
    assert warmup_cosine(60, **schedule) == pytest.approx(1.25)
    assert warmup_cosine(110, **schedule) == pytest.approx(0.5)


@pytest.mark.parametrize("decay_all", [True, False])
def test_sgd_is_its_update_rule(decay_all):
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    start = {name: value.detach().clone() for name, value in layer.named_parameters()}
    optimizer = build_sgd(
        layer, learning_rate=0.1, momentum=0.9, weight_decay=0.01, decay_norms_and_biases=decay_all
    )
    velocity = {name: torch.zeros_like(value) for name, value in start.items()}
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.ones(4, 3)).square().sum().backward()
        for name, parameter in layer.named_parameters():
            decay = 0.01 if decay_all or parameter.ndim > 1 else 0.0
            velocity[name] = 0.9 * velocity[name] + parameter.grad + decay * start[name]
            start[name] = start[name] - 0.1 * velocity[name]
        optimizer.step()
        for name, parameter in layer.named_parameters():
            assert torch.allclose(parameter, start[name], atol=1e-6)
