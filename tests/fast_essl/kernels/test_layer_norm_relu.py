"""The kernel `layer_norm_relu`, on a device or in Triton's interpreter, against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_support import DEVICE, DTYPES, assert_as_good_as_eager, leaf

pytest.importorskip("triton")

from fast_essl.kernels import layer_norm_relu as module
from fast_essl.kernels.layer_norm_relu import layer_norm_relu, layer_norm_relu_reference

pytestmark = pytest.mark.device


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 64), (5, 33), (1, 7), (37, 128), (3, 1)])
def test_it_is_as_good_as_eager(shape, dtype, relu):
    leaves = [leaf(*shape, seed=1, dtype=dtype, shift=2), leaf(shape[1], seed=2), leaf(shape[1], seed=3)]
    assert_as_good_as_eager(
        partial(layer_norm_relu, relu=relu), partial(layer_norm_relu_reference, relu=relu), leaves
    )


def test_rows_may_lie_apart_and_parameters_be_of_another_dtype():
    wide = leaf(6, 50, seed=1)
    apart = wide.detach()[:, 5:38].requires_grad_()
    assert not apart.is_contiguous()
    leaves = [apart, leaf(33, seed=2, dtype=torch.bfloat16), leaf(33, seed=3, dtype=torch.float16)]
    assert_as_good_as_eager(layer_norm_relu, layer_norm_relu_reference, leaves)


def test_more_rows_than_programs_are_all_summed(monkeypatch):
    monkeypatch.setattr(module, "MAX_PROGRAMS", 3)
    monkeypatch.setattr(module, "TILE", 64)  # two rows a tile: eleven rows are six tiles for three programs
    leaves = [leaf(11, 20, seed=1), leaf(20, seed=2), leaf(20, seed=3)]
    assert_as_good_as_eager(layer_norm_relu, layer_norm_relu_reference, leaves)


def test_a_gradient_of_any_strides_is_taken():
    x, weight, bias = leaf(4, 6, seed=1), leaf(6, seed=2), leaf(6, seed=3)
    layer_norm_relu(x, weight, bias, relu=False).T.sum().backward()  # an expanded gradient: strides of 0
    expected = x.detach().clone().requires_grad_()
    layer_norm_relu_reference(expected, weight.detach(), bias.detach(), relu=False).sum().backward()
    assert torch.allclose(x.grad, expected.grad, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x[0], w, b), r"x has shape \(6,\)"),
        (lambda x, w, b: (x[:0], w, b), r"x has shape \(0, 6\)"),
        (lambda x, w, b: (x.double(), w, b), r"x is torch.float64"),
        (lambda x, w, b: (x.T, w[:4], b[:4]), r"x has strides \(1, 6\)"),
        (lambda x, w, b: (x, w[:5], b), r"weight has shape \(5,\): must be \(6,\)"),
        (lambda x, w, b: (x, w, b.long()), r"bias is torch.int64"),
        (lambda x, w, b: (x, w, b.to("meta")), r"bias is on meta, its input on"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_launch(change, message):
    x, weight, bias = (torch.randn(*shape, device=DEVICE) for shape in ((4, 6), (6,), (6,)))
    with pytest.raises(ValueError, match=message):
        layer_norm_relu(*change(x, weight, bias))


def test_a_row_too_long_for_a_program_is_refused():
    with pytest.raises(ValueError, match=r"N at most 16384"):
        layer_norm_relu(
            *(torch.zeros(*shape, device=DEVICE) for shape in ((1, 16_385), (16_385,), (16_385,)))
        )
