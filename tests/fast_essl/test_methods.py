"""The methods: losses put together from their parts, and what depends on what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fast_essl.config import ConfigError
from fast_essl.config_io import load_config
from fast_essl.losses import barlow_twins, info_nce, negative_cosine, nt_xent
from fast_essl.methods import build_method
from fast_essl.transformations import build_transformation
from loaders.batch import Views

METHODS = ("simclr", "simsiam", "barlow_twins")
NUM_CLASSES = 3


def build(tiny_config, name="simclr", *overrides):
    config = load_config(tiny_config, ["--method.name", name, *overrides])
    return build_method(config, num_classes=NUM_CLASSES).train()


def batch(transformation="four_fold_rotation", count=6, size=8):
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(count, 3, size, size, generator=generator) for _ in range(3)]
    group = build_transformation(transformation, size=size)
    return Views(
        views=tuple(images[:2]),
        transformed=group.copies(images[2]),
        transformed_labels=group.labels(count),
        labels=torch.arange(count) % NUM_CLASSES,
        indices=torch.arange(count),
    )


def ssl_loss(method, name, views):
    """The SSL loss, spelled out from the method's parts."""
    ssl = method.ssl
    z1, z2 = (ssl.projector(method.backbone(view)) for view in views.views)
    if name == "simsiam":
        return negative_cosine(ssl.predictor(z1), ssl.predictor(z2), z1, z2)
    return barlow_twins(z1, z2, 0.0051) if name == "barlow_twins" else info_nce(z1, z2, 0.5)


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_ssl_plus_lambda_times_equivariance(tiny_config, name):
    method, views = build(tiny_config, name, "--method.equivariance-weight", "0.7"), batch()
    output = method(views)
    logits = method.head(method.backbone(views.transformed))
    ssl, equivariance = ssl_loss(method, name, views), F.cross_entropy(logits, views.transformed_labels)
    assert torch.allclose(output.loss, ssl + 0.7 * equivariance, rtol=1e-5)
    assert torch.allclose(output.ssl_loss, ssl, rtol=1e-5)
    assert torch.allclose(output.equivariance_loss, equivariance, rtol=1e-5)
    told = (logits.argmax(1) == views.transformed_labels).float().mean()
    assert float(output.equivariance_accuracy) == pytest.approx(float(told))
    assert output.online_accuracy is None
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in method.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_without_lambda_there_is_no_head_and_the_start_is_the_same(tiny_config, name):
    plain = build(tiny_config, name, "--method.equivariance-weight", "0")
    equivariant = build(tiny_config, name).state_dict()
    assert plain.head is None
    output = plain(replace(batch(), transformed=None, transformed_labels=None))
    assert output.equivariance_loss is None and torch.equal(output.loss.detach(), output.ssl_loss)
    fresh = build(tiny_config, name, "--method.equivariance-weight", "0").state_dict()
    assert fresh and all(torch.equal(value, equivariant[key]) for key, value in fresh.items())


@pytest.mark.parametrize(("passes", "groups"), [("joint_views", [[0, 1], [2]]), ("joint_all", [[0, 1, 2]])])
def test_joint_passes_are_passes_of_the_concatenated_inputs(tiny_config, passes, groups):
    """Same weights; each group of inputs goes through the backbone as one batch, and shares its statistics."""
    sizes = [f"--views.{name}.size=8" for name in ("view1", "view2", "transformed")]
    method, views = build(tiny_config, "simclr", f"--method.passes={passes}", *sizes), batch()
    separate = build(tiny_config, "simclr", *sizes)
    output = method(views)
    inputs = [*views.views, views.transformed]
    features = {}
    for group in groups:
        together = separate.backbone(torch.cat([inputs[number] for number in group]))
        features.update(zip(group, together.split([len(inputs[number]) for number in group]), strict=True))
    ssl = separate.ssl.loss(*separate.ssl.embed(features[0], features[1]))
    equivariance = F.cross_entropy(separate.head(features[2]), views.transformed_labels)
    assert torch.allclose(output.ssl_loss, ssl, rtol=1e-5)
    assert torch.allclose(output.equivariance_loss, equivariance, rtol=1e-5)
    for (
        name,
        value,
    ) in separate.state_dict().items():  # BatchNorm's running statistics have seen the same batches
        assert torch.allclose(method.state_dict()[name], value, rtol=1e-4, atol=1e-6), name
    assert not torch.allclose(
        output.ssl_loss, build(tiny_config, "simclr", *sizes)(views).ssl_loss, rtol=1e-4
    )


def test_joint_passes_need_inputs_of_one_size(tiny_config):
    build(tiny_config, "simclr", "--method.passes", "joint_views")
    with pytest.raises(ConfigError, match=r"'joint_all': the inputs' sizes \[16, 16, 8\] must be equal"):
        build(tiny_config, "simclr", "--method.passes", "joint_all")


def test_nt_xent_is_chosen_by_its_name(tiny_config):
    method, views = build(tiny_config, "simclr", "--method.contrastive-loss", "nt_xent"), batch()
    z1, z2 = (method.ssl.projector(method.backbone(view)) for view in views.views)
    assert torch.allclose(method(views).ssl_loss, nt_xent(z1, z2, 0.5), rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_online_classifier_learns_and_moves_nothing_else(tiny_config, name):
    method, views = build(tiny_config, name, "--method.online-classifier", "true"), batch()
    without = build(tiny_config, name)
    method(views).loss.backward()
    without(views).loss.backward()
    gradients = {key: value.grad for key, value in method.named_parameters()}
    for key, value in without.named_parameters():
        assert torch.allclose(gradients.pop(key), value.grad, atol=1e-7), key
    assert sorted(gradients) == ["online_classifier.bias", "online_classifier.weight"]
    features = method.backbone(views.views[0]).detach()
    logits = method.online_classifier(features)
    residual = logits.softmax(1) - F.one_hot(views.labels, NUM_CLASSES)
    assert torch.allclose(
        gradients["online_classifier.weight"], residual.T @ features / len(features), atol=1e-6
    )
    accuracy = (logits.argmax(1) == views.labels).float().mean()
    assert float(method(views).online_accuracy) == pytest.approx(float(accuracy))


def test_no_gradient_reaches_simsiam_s_targets(tiny_config):
    """With the predictor's output replaced by a constant, nothing is left that could move the projector."""
    method = build(tiny_config, "simsiam", "--method.equivariance-weight", "0")
    for parameter in method.ssl.predictor.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.ones_(method.ssl.predictor[-1].bias)
    method(batch()).loss.backward()
    assert all((parameter.grad == 0).all() for parameter in method.ssl.projector.parameters())
    assert (method.ssl.predictor[-1].bias.grad != 0).any()


@pytest.mark.parametrize(("name", "num"), [("simclr", 0), ("simsiam", 5), ("barlow_twins", 0)])
def test_only_simsiam_s_predictor_keeps_its_rate(tiny_config, name, num):
    method = build(tiny_config, name)
    constant = method.constant_rate_parameters()
    assert len(constant) == num
    if num:
        assert {id(p) for p in constant} == {id(p) for p in method.ssl.predictor.parameters()}


def test_the_head_has_an_output_an_element(tiny_config):
    chosen = [
        "--transformation.equivariance",
        "jigsaw",
        "--transformation.equivariance-elements",
        "1",
        "5",
        "9",
    ]
    assert build(tiny_config, "simclr", *chosen).head[-1].out_features == 3
    assert build(tiny_config, "simclr", *chosen[:2]).head[-1].out_features == 24


def test_copies_are_asked_for_by_name(tiny_config):
    with pytest.raises(ValueError, match="no transformed copies"):
        build(tiny_config)(replace(batch(), transformed=None, transformed_labels=None))


@pytest.mark.parametrize(
    ("norm", "last"), [("plain", "BatchNorm1d"), ("affine", "BatchNorm1d"), ("none", "Linear")]
)
def test_the_projector_ends_as_configured(tiny_config, norm, last):
    layers = build(
        tiny_config, "simclr", "--model.projector-norm", norm, "--model.projector-layers", "3"
    ).ssl.projector
    assert [type(layer).__name__ for layer in layers][:6] == ["Linear", "BatchNorm1d", "ReLU"] * 2
    assert type(layers[-1]).__name__ == last and len(layers) == (7 if norm == "none" else 8)
    if norm != "none":
        assert layers[-1].affine == (norm == "affine")


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_computed_in_fp32_under_autocast(tiny_config, name):
    """Autocast would round their matrix products, the similarities of InfoNCE among them, to bf16."""
    method, views = build(tiny_config, name, "--method.equivariance-weight", "0"), batch()
    embeddings = []
    for module in (method.ssl.projector, *([method.ssl.predictor] if name == "simsiam" else [])):
        module.register_forward_hook(lambda _, inputs, output: embeddings.append(output.detach().float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method(views).ssl_loss
    if name == "simsiam":
        z1, z2, p1, p2 = embeddings
        expected = negative_cosine(p1, p2, z1, z2)
    else:
        expected = barlow_twins(*embeddings, 0.0051) if name == "barlow_twins" else info_nce(*embeddings, 0.5)
    assert loss.dtype is torch.float32 and torch.equal(loss, expected)
