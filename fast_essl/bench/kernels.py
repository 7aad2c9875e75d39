"""The fused kernels beside eager torch, torch.compile and apex: forward and backward, on a GPU.

    layer norm + relu     of the prediction head's hidden layers, bf16
    head tail             LayerNorm, ReLU, Linear to four logits, cross-entropy and accuracy, bf16
    head                  the whole ImageNet head from features to loss, matrix products included, under bf16 autocast
    info_nce              from embeddings to loss, fp32 and bf16

On a CPU, where the kernels run in Triton's interpreter alone, there is nothing to time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fast_essl.bench.measuring import summary, timed
from fast_essl.config import ConfigError
from fast_essl.heads import LayerNormBackend, prediction_head
from fast_essl.kernels.head_tail import head_tail, head_tail_reference
from fast_essl.kernels.info_nce import info_nce_fused
from fast_essl.kernels.layer_norm_relu import layer_norm_relu, layer_norm_relu_reference
from fast_essl.losses import info_nce

NUM_WARMUP = 5
HIDDEN, BOTTLENECK, NUM_CLASSES, TEMPERATURE = 2048, 128, 4, 0.2
EAGER = "eager"
HEADS: dict[str, LayerNormBackend] = {EAGER: "torch", "compiled": "torch", "triton": "triton", "apex": "apex"}

Step = Callable[[], Tensor]
"""A forward pass to a scalar; its backward pass fills the gradients of the workload's leaves."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One question, with the implementations that answer it."""

    leaves: tuple[Tensor, ...]
    """Whose gradients each step fills."""
    steps: dict[str, Step]
    """{implementation: step}; `eager` is what the ratios are to."""


def measure_kernels(device: torch.device, num_repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Time all workloads; each repeat runs all implementations of one in turn, and compilation is not counted.

    Returns: {workload: {implementation: median, min and max of its milliseconds, n, and `peak_mib`, the most device
    memory that a forward and backward pass takes beyond its inputs}}.
    """
    results = {}
    for name, build in workloads().items():
        torch.manual_seed(0)
        results[name] = _measure(build(device), device, num_repeats)
    return results


def workloads() -> dict[str, Callable[[torch.device], Workload]]:
    """{name: what makes it on a device}."""
    made: dict[str, Callable[[torch.device], Workload]] = {}
    for num_rows in (2048, 16384):  # four copies of a batch of 512 and of 4096
        made[f"layer norm + relu {num_rows}"] = partial(_layer_norm, num_rows=num_rows)
        made[f"head tail {num_rows}"] = partial(_head_tail, num_rows=num_rows)
        made[f"head {num_rows}"] = partial(_head, num_rows=num_rows)
    for num_rows, size in ((512, 2048), (4096, 128)):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"info_nce {num_rows}×{size} {str(dtype).removeprefix('torch.')}"
            made[name] = partial(_info_nce, num_rows=num_rows, size=size, dtype=dtype)
    return made


def _layer_norm(device: torch.device, num_rows: int) -> Workload:
    x = _leaf(num_rows, HIDDEN, dtype=torch.bfloat16, device=device)
    weight, bias = _leaf(HIDDEN, device=device), _leaf(HIDDEN, device=device)
    gradient = torch.randn_like(x)

    def step_of(function: Callable[..., Tensor]) -> Step:
        return lambda: function(x, weight, bias, relu=True).flatten().dot(gradient.flatten())

    return Workload(
        leaves=(x, weight, bias),
        steps=_implementations(step_of, layer_norm_relu_reference, layer_norm_relu),
    )


def _head_tail(device: torch.device, num_rows: int) -> Workload:
    x = _leaf(num_rows, HIDDEN, dtype=torch.bfloat16, device=device)
    norm_weight, norm_bias = _leaf(HIDDEN, device=device), _leaf(HIDDEN, device=device)
    weight, bias = _leaf(NUM_CLASSES, HIDDEN, device=device), _leaf(NUM_CLASSES, device=device)
    parameters = (norm_weight, norm_bias, weight, bias)

    def step_of(function: Callable[..., tuple[Tensor, Tensor]]) -> Step:
        return lambda: function(x, *parameters, relu=True)[0]

    return Workload(leaves=(x, *parameters), steps=_implementations(step_of, head_tail_reference, head_tail))


def _head(device: torch.device, num_rows: int) -> Workload:
    """apex stands in it where it is installed."""
    features = _leaf(num_rows, HIDDEN, dtype=torch.bfloat16, device=device)
    steps: dict[str, Step] = {}
    leaves = [features]
    for name, backend in HEADS.items():
        try:
            head = prediction_head(
                HIDDEN,
                hidden=HIDDEN,
                form="imagenet",
                bottleneck=BOTTLENECK,
                num_classes=NUM_CLASSES,
                backend=backend,
            ).to(device)
            head.check(device)
        except ConfigError:
            if backend != "apex":
                raise
            continue
        leaves += head.parameters()
        loss = torch.compile(head.loss, dynamic=False) if name == "compiled" else head.loss

        def step(loss: Callable[..., tuple[Tensor, Tensor]] = loss) -> Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                return loss(features)[0]

        steps[name] = step
    return Workload(leaves=tuple(leaves), steps=steps)


def _info_nce(device: torch.device, num_rows: int, size: int, dtype: torch.dtype) -> Workload:
    z1, z2 = (_leaf(num_rows, size, dtype=dtype, device=device) for _ in range(2))

    def step_of(function: Callable[..., Tensor]) -> Step:
        return lambda: function(z1, z2, TEMPERATURE)

    return Workload(leaves=(z1, z2), steps=_implementations(step_of, info_nce, info_nce_fused))


def _implementations(
    step_of: Callable[[Callable[..., Any]], Step],
    reference: Callable[..., Any],
    fused: Callable[..., Any],
) -> dict[str, Step]:
    compiled = torch.compile(reference, dynamic=False)
    return {EAGER: step_of(reference), "compiled": step_of(compiled), "triton": step_of(fused)}


def _leaf(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*shape, **options).requires_grad_()


def _measure(workload: Workload, device: torch.device, num_repeats: int) -> dict[str, dict[str, float]]:
    def run(step: Step) -> None:
        for leaf in workload.leaves:
            leaf.grad = None
        step().backward()

    peak_mib = {}
    for name, step in workload.steps.items():
        for _ in range(NUM_WARMUP):
            run(step)
        for leaf in workload.leaves:
            leaf.grad = None
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run(step)
        peak_mib[name] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    times: dict[str, list[float]] = {name: [] for name in workload.steps}
    for _ in range(num_repeats):
        for name, step in workload.steps.items():
            times[name].append(timed(partial(run, step), device))
    return {name: {**summary(values), "peak_mib": peak_mib[name]} for name, values in times.items()}
