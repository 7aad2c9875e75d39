"""The whole prediction head through the fused kernels, against torch's and against the official release."""

from __future__ import annotations

import pytest
import torch
from kernel_support import DEVICE, results
from support import parity

from fast_essl.config import ConfigError
from fast_essl.config_io import load_config
from fast_essl.heads import prediction_head
from fast_essl.methods import build_method
from fast_essl.pretrain import pretrain
from loaders.batch import Views

pytest.importorskip("triton")

pytestmark = pytest.mark.device
FORMS = ("cifar_simclr", "cifar_simsiam", "imagenet")


def heads(form, **sizes):
    """The same head with torch's LayerNorm and with the kernels."""
    made = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        head = prediction_head(form=form, backend=backend, **sizes)
        for parameter in head.parameters():  # norms start at 1 and 0, which would hide them
            torch.nn.init.normal_(parameter, std=0.3)
        made.append(head.to(DEVICE))
    return made


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("labels", [None, "shuffled"])
def test_kernels_give_the_loss_and_gradients_of_torch(form, labels):
    plain, fused = heads(form, num_features=20, hidden=33, bottleneck=12, num_classes=4)
    if labels is not None:
        labels = torch.tensor([2, 0, 3, 3, 1, 0, 1, 2], device=DEVICE)
    features = torch.randn(8, 20, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    answers = []
    for head in (plain, fused):
        answers.append(results(lambda x, head=head: head.loss(x, labels), [features.requires_grad_()]))
    for expected, got in zip(*answers, strict=True):
        assert torch.allclose(expected, got, atol=2e-6)
    for (name, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert one.grad.abs().max() > 1e-5 and torch.allclose(one.grad, other.grad, atol=2e-6), name


@pytest.mark.parametrize("form", FORMS)
def test_kernels_equal_the_official_release(form):
    official = parity(f"rotation_head_{form.replace('cifar', 'cifar10')}")
    state = {
        key[6:]: torch.tensor(official[key]).float() for key in official.files if key.startswith("param.")
    }
    weights = [tensor.shape for tensor in state.values() if tensor.ndim == 2]
    head = prediction_head(
        weights[0][1], hidden=weights[0][0], form=form, bottleneck=weights[-1][1], backend="triton"
    ).to(DEVICE)
    head.load_state_dict(state)
    features = torch.tensor(official["features"]).float().to(DEVICE).requires_grad_()
    loss, _ = head.loss(features, torch.tensor(official["labels"]).to(DEVICE))
    loss.backward()
    assert loss.item() == pytest.approx(float(official["loss"]), rel=1e-5)
    gradients = {"features": features.grad, **{key: p.grad for key, p in head.named_parameters()}}
    for key, gradient in gradients.items():
        expected = torch.tensor(official["grad_features" if key == "features" else f"grad.{key}"])
        assert (gradient.cpu() - expected).abs().max() <= 1e-4 * expected.abs().max(), key


def test_a_run_with_the_kernels_goes_as_one_without(tiny_config, tmp_path, monkeypatch):
    """Checkpoints are exchanged: the kernels are no part of what defines a run."""
    losses = {}
    for backend in ("torch", "triton"):
        overrides = ["--head.layer-norm", backend, "--method.contrastive-backend", backend]
        config = load_config(tiny_config, [*overrides, "--train.max-steps", "2", "--train.knn-every", "0"])
        seen = losses[backend] = []
        method = build_method(config, num_classes=2)
        forward = type(method).forward

        def watched(self, views, seen=seen, forward=forward):
            output = forward(self, views)
            seen.append((float(output.loss), float(output.equivariance_accuracy)))
            return output

        with monkeypatch.context() as patched:
            patched.setattr(type(method), "forward", watched)
            pretrain(config, tmp_path / backend, show_progress=False)
    assert [loss for loss, _ in losses["triton"]] == pytest.approx(
        [loss for loss, _ in losses["torch"]], rel=1e-4
    )
    assert [told for _, told in losses["triton"]] == [told for _, told in losses["torch"]]
    continued = load_config(tiny_config, ["--train.max-steps", "3", "--train.knn-every", "0"])
    assert pretrain(continued, tmp_path / "triton", show_progress=False).step == 3


def test_labels_are_read_where_not_all_copies_are_there(tiny_config):
    """Half of the copies: block order would give them other labels."""
    losses = []
    for backend in ("torch", "triton"):
        config = load_config(tiny_config, ["--head.layer-norm", backend])
        method = build_method(config, num_classes=2).to(DEVICE)
        images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        views = Views(
            views=(images[:4], images[4:]),
            transformed=images,
            transformed_labels=torch.tensor([3, 1, 2, 0, 1, 1, 2, 3], device=DEVICE),
            labels=torch.arange(4, device=DEVICE),
            indices=torch.arange(4, device=DEVICE),
        )
        losses.append(method(views).equivariance_loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_head_too_large_for_the_kernel_is_one_line():
    head = prediction_head(16, hidden=2048, num_classes=24, backend="triton")
    with pytest.raises(ConfigError, match=r"head.layer_norm = 'triton': .*\(24, 2048\).*; use 'torch'"):
        head.check(DEVICE)
