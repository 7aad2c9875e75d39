"""The forms of the step that are measured beside each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from fast_essl.bench.step import Form
from fast_essl.config_io import find_config, load_config


@pytest.mark.parametrize(
    ("name", "backend", "wanted"),
    [
        ("e_simclr_imagenet", "triton", ("triton", "triton", "torch")),
        ("e_simclr_imagenet", "apex", ("apex", "torch", "torch")),  # LARS has no form of apex's
        ("e_simclr_cifar10", "apex", ("apex", "torch", "apex")),
        ("e_simclr_cifar10", "torch", ("torch", "torch", "torch")),
    ],
)
def test_a_form_chooses_head_loss_and_optimizer(name, backend, wanted):
    config = load_config(find_config(Path(name)))
    formed = Form(backend=backend).applied_to(config)
    assert (formed.head.layer_norm, formed.method.contrastive_backend, formed.optimizer.backend) == wanted


def test_without_a_choice_the_configuration_stays():
    config = load_config(find_config(Path("e_simclr_imagenet")), ["--head.layer-norm", "triton"])
    assert Form().applied_to(config) is config
