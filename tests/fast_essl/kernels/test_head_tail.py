"""The kernel `head_tail`, on a device or in Triton's interpreter, against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_support import DEVICE, DTYPES, assert_as_good_as_eager, leaf

pytest.importorskip("triton")

from fast_essl.kernels import head_tail as module
from fast_essl.kernels.head_tail import block_labels, head_tail, head_tail_reference

pytestmark = pytest.mark.device


def parameters(num_rows, size, num_classes, dtype=torch.float32):
    return [
        leaf(num_rows, size, seed=1, dtype=dtype, shift=1),
        leaf(size, seed=2, shift=1),
        leaf(size, seed=3),
        leaf(num_classes, size, seed=4),
        leaf(num_classes, seed=5),
    ]


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "size", "num_classes"), [(8, 64, 4), (12, 33, 4), (9, 7, 3), (2, 128, 2), (24, 16, 24)]
)
def test_it_is_as_good_as_eager(num_rows, size, num_classes, dtype, relu):
    assert_as_good_as_eager(
        partial(head_tail, relu=relu),
        partial(head_tail_reference, relu=relu),
        parameters(num_rows, size, num_classes, dtype),
    )


def test_more_rows_than_programs_are_all_summed(monkeypatch):
    monkeypatch.setattr(module, "MAX_PROGRAMS", 3)
    made = parameters(20, 9, 4)
    assert_as_good_as_eager(partial(head_tail, relu=True), partial(head_tail_reference, relu=True), made)


def test_labels_may_be_given_in_any_order():
    labels = torch.tensor([3, 0, 0, 2, 1, 3, 2], device=DEVICE)
    assert_as_good_as_eager(
        partial(head_tail, relu=True, labels=labels),
        partial(head_tail_reference, relu=True, labels=labels),
        parameters(7, 10, 4),
    )


def test_block_order_is_all_samples_by_each_class_in_turn():
    assert block_labels(6, 3, torch.device("cpu")).tolist() == [0, 0, 1, 1, 2, 2]
    made = parameters(12, 10, 4)
    labels = torch.arange(12, device=DEVICE) // 3
    for given in (None, labels):
        loss, accuracy = head_tail(*made, relu=True, labels=given)
        assert (loss.item(), accuracy.item()) == tuple(
            value.item() for value in head_tail(*made, relu=True, labels=labels)
        )


def test_accuracy_is_the_share_of_right_rows():
    """Rows that are one-hot in their class, two of eight swapped."""
    x = torch.eye(4, device=DEVICE).repeat_interleave(2, dim=0)
    x[[0, 7]] = x[[7, 0]]
    ones, zeros = torch.ones(4, device=DEVICE), torch.zeros(4, device=DEVICE)
    _, accuracy = head_tail(x, ones, zeros, torch.eye(4, device=DEVICE), zeros, relu=True)
    assert accuracy.item() == 6 / 8 and not accuracy.requires_grad


def test_fp16_gradients_survive_a_loss_scale():
    """Divided by 4096 rows, and only then multiplied by the scale, fp16 would round many of these to nothing."""
    made = parameters(64, 8, 4, torch.float16)
    scale = 2.0**16 / 4096
    (head_tail(*made, relu=True)[0] * scale).backward()
    expected = [tensor.detach().double().requires_grad_() for tensor in made]
    (head_tail_reference(*expected, relu=True)[0] * scale).backward()
    assert torch.allclose(made[0].grad.double(), expected[0].grad, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, *rest: (x[:7], *rest), r"x has 7 rows: in block order .* multiple of the 4 classes"),
        (lambda x, *rest: (x.int(), *rest), "x is torch.int32"),
        (
            lambda x, a, b, w, c: (x, a, b, w.T.contiguous(), c),
            r"weight has shape \(6, 4\): must be \(6, 6\)",
        ),
        (
            lambda x, a, b, w, c: (x, a, b, w[:, ::2].repeat(1, 2)[:, :6].T.contiguous().T, c),
            "weight is torch.float32, strides",
        ),
        (lambda x, a, b, w, c: (x, a[:3], b, w, c), r"norm_weight has shape \(3,\)"),
        (lambda x, a, b, w, c: (x, a, b, w, c[:3]), r"bias has shape \(3,\): must be \(4,\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_launch(change, message):
    made = [tensor.detach() for tensor in parameters(8, 6, 4)]
    with pytest.raises(ValueError, match=message):
        head_tail(*change(*made), relu=True)


def test_labels_that_do_not_fit_are_refused():
    made = parameters(8, 6, 4)
    for labels in (torch.zeros(7, dtype=torch.int64, device=DEVICE), torch.zeros(8, device=DEVICE)):
        with pytest.raises(ValueError, match="labels are"):
            head_tail(*made, relu=True, labels=labels)


def test_a_weight_too_large_for_a_program_is_refused():
    with pytest.raises(ValueError, match="more than 16384 elements"):
        head_tail(*parameters(24, 2048, 24), relu=True)
