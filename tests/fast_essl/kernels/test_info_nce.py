"""The kernel `info_nce`, on a device or in Triton's interpreter, against float64; over ranks, see test_distributed."""

from __future__ import annotations

import pytest
import torch
from kernel_support import DEVICE, DTYPES, assert_as_good_as_eager, leaf

pytest.importorskip("triton")

from fast_essl.kernels.info_nce import info_nce_fused
from fast_essl.losses import info_nce

pytestmark = pytest.mark.device


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "temperature"),
    [((64, 32), 0.2), ((70, 50), 0.5), ((1, 5), 0.2), ((130, 17), 0.2), ((33, 200), 0.5)],
)
def test_it_is_as_good_as_eager(shape, temperature, dtype):
    leaves = [leaf(*shape, seed=1, dtype=dtype), leaf(*shape, seed=2, dtype=dtype)]
    assert_as_good_as_eager(
        lambda z1, z2: info_nce_fused(z1, z2, temperature),
        lambda z1, z2: (
            info_nce(z1, z2, temperature).float()
            if z1.dtype != torch.float64
            else info_nce(z1, z2, temperature)
        ),
        leaves,
    )


def test_views_that_agree_cost_little_and_rows_may_lie_apart():
    wide = leaf(40, 64, seed=3).detach()
    z1, z2 = wide[:, 3:51], (wide + 0.05 * leaf(40, 64, seed=4).detach())[:, 3:51]
    loss = info_nce_fused(z1, z2, 0.1)
    assert loss.item() == pytest.approx(info_nce(z1.double(), z2.double(), 0.1).item(), rel=1e-5)
    assert loss.item() < 0.1


def test_large_similarities_do_not_overflow():
    """At temperature 0.005 the similarities reach 200, and e^200 is beyond fp32."""
    leaves = [leaf(20, 16, seed=1), leaf(20, 16, seed=1)]
    assert_as_good_as_eager(
        lambda z1, z2: info_nce_fused(z1, z2, 0.005),
        lambda z1, z2: info_nce(z1, z2, 0.005),
        leaves,
        absolute=1e-4,
    )


def test_a_row_of_zeros_has_the_gradient_of_normalize():
    rows = leaf(6, 8, seed=1).detach()
    rows[2] = 0
    leaves = [(rows * 1e-6).requires_grad_(), leaf(6, 8, seed=2)]
    assert_as_good_as_eager(
        lambda z1, z2: info_nce_fused(z1, z2, 0.5), lambda z1, z2: info_nce(z1, z2, 0.5), leaves
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z1, z2: (z1[0], z2), r"z1 has shape \(8,\)"),
        (lambda z1, z2: (z1, z2.double()), "z2 is torch.float64"),
        (lambda z1, z2: (z1, z2.half()), r"z1 is torch.float32, \(4, 8\), on .*; z2 torch.float16"),
        (lambda z1, z2: (z1, z2[:3]), r"z1 is torch.float32, \(4, 8\), on .*; z2 torch.float32, \(3, 8\)"),
        (lambda z1, z2: (z1.T.contiguous().T, z2), r"z1 has strides \(1, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_launch(change, message):
    z1, z2 = torch.randn(4, 8, device=DEVICE), torch.randn(4, 8, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        info_nce_fused(*change(z1, z2), 0.2)
