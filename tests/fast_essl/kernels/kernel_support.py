"""How a kernel is held against its reference: in float64, and no further from it than twice what eager torch is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def leaf(*shape: int, seed: int, dtype: torch.dtype = torch.float32, shift: float = 0.0) -> Tensor:
    """A random tensor that takes a gradient."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(*shape, generator=generator) + shift
    return made.to(DEVICE, dtype).requires_grad_()


def results(
    function: Callable[..., Any], leaves: list[Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The function's results and the gradients of all leaves, of a loss that weighs the results' elements unequally."""
    inputs = [leaf.detach().to(dtype or leaf.dtype) for leaf in leaves]
    for number, (given, made) in enumerate(zip(leaves, inputs, strict=True)):
        if given.stride() != made.stride():  # .to() may have packed rows that lay apart
            made = torch.empty_strided(
                given.shape, given.stride(), dtype=made.dtype, device=made.device
            ).copy_(made)
            inputs[number] = made
        inputs[number].requires_grad_()
    outputs = function(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for output in outputs:
        if output.requires_grad:
            weights = torch.linspace(0.5, 1.5, output.numel(), dtype=torch.float64, device=DEVICE)
            loss = loss + (output.double().flatten() * weights).sum()
    loss.backward()
    return [*(output.detach() for output in outputs), *(made.grad for made in inputs)]


def assert_as_good_as_eager(
    fused: Callable[..., Any], reference: Callable[..., Any], leaves: list[Tensor], absolute: float = 2e-6
) -> None:
    """Results and gradients: errors against float64 at most twice the reference's, plus a small absolute term.

    Args: `absolute` is a share of the largest true value.
    """
    if DEVICE.type == "cpu" and any(leaf.dtype is torch.bfloat16 for leaf in leaves):
        absolute = torch.finfo(torch.bfloat16).eps  # Triton 3.7's interpreter cuts off where a GPU rounds
    true = results(reference, leaves, torch.float64)
    eager, kernel = results(reference, leaves), results(fused, leaves)
    assert len(true) == len(kernel)
    for number, (expected, plain, got) in enumerate(zip(true, eager, kernel, strict=True)):
        assert got.shape == expected.shape and got.dtype == plain.dtype
        bound = 2 * (plain.double() - expected).abs().max() + absolute * (1 + expected.abs().max())
        error = (got.double() - expected).abs().max()
        assert error <= bound, f"result {number}: error {error:.2e}, allowed {bound:.2e}"
