"""How fast are the fused kernels, beside eager torch, torch.compile and apex? Forward and backward, in one run.

    python benchmarks/kernels.py [--repeats 30] [--record]

    layer norm + relu     of the prediction head's hidden layers, bf16
    head tail             LayerNorm, ReLU, Linear to four logits, cross-entropy and accuracy, bf16
    head                  the whole ImageNet head from features to loss, matrix products included, under bf16 autocast
    info_nce              from embeddings to loss, fp32 and bf16

Each repeat runs all implementations of a workload in turn, timed with device events; told are medians with their range
and the ratio to eager. Compilation is not counted. Device memory is the most that a forward and backward pass takes
beyond its inputs. On a CPU, where the kernels run in Triton's interpreter alone, there is nothing to time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from record import machine_facts, write_record
from torch import Tensor
from tqdm import tqdm

from fast_essl.config import ConfigError
from fast_essl.heads import prediction_head
from fast_essl.kernels.head_tail import head_tail, head_tail_reference
from fast_essl.kernels.info_nce import info_nce_fused
from fast_essl.kernels.layer_norm_relu import layer_norm_relu, layer_norm_relu_reference
from fast_essl.losses import info_nce

NUM_WARMUP = 5
HIDDEN, BOTTLENECK, NUM_CLASSES = 2048, 128, 4

Step = Callable[[], Tensor]
"""A forward pass to a scalar; its backward pass fills the gradients of the workload's leaves."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One question, with the implementations that answer it."""

    leaves: tuple[Tensor, ...]
    """Whose gradients each step fills."""
    steps: dict[str, Step]
    """{implementation: step}; `eager` is what the ratios are to."""


def main() -> int:
    """Measure, print the table, write the record if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/DATE-kernels.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels: error: there is no CUDA device here", file=sys.stderr)
        return 2
    device, facts = torch.device("cuda"), machine_facts()
    print(f"{'':32}{'ms':>9}{'range':>20}{'× eager':>9}{'MiB':>8}")
    results: dict[str, Any] = {}
    for name, build in tqdm(workloads().items(), desc="workloads", disable=None):
        torch.manual_seed(0)
        rows = results[name] = measure(build(device), arguments.repeats)
        for implementation, row in rows.items():
            span = f"{row['min']:.3f} – {row['max']:.3f}"
            ratio = rows["eager"]["median"] / row["median"]
            label = f"{name}, {implementation}"
            print(f"{label:32}{row['median']:9.3f}{span:>20}{ratio:9.2f}{row['peak_mib']:8.0f}", flush=True)
    if arguments.record:
        print(write_record("kernels", results, facts=facts))
    return 0


def workloads() -> dict[str, Callable[[torch.device], Workload]]:
    """{name: what makes it on a device}."""
    made: dict[str, Callable[[torch.device], Workload]] = {}
    for num_rows in (2048, 16384):  # four copies of a batch of 512 and of 4096
        made[f"layer norm + relu {num_rows}"] = lambda device, n=num_rows: _layer_norm(device, n)
        made[f"head tail {num_rows}"] = lambda device, n=num_rows: _head_tail(device, n)
        made[f"head {num_rows}"] = lambda device, n=num_rows: _head(device, n)
    for num_rows, size in ((512, 2048), (4096, 128)):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"info_nce {num_rows}×{size} {str(dtype).removeprefix('torch.')}"
            made[name] = lambda device, n=num_rows, e=size, d=dtype: _info_nce(device, n, e, d)
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
    parameters = (
        _leaf(HIDDEN, device=device),
        _leaf(HIDDEN, device=device),
        _leaf(NUM_CLASSES, HIDDEN, device=device),
        _leaf(NUM_CLASSES, device=device),
    )

    def step_of(function: Callable[..., tuple[Tensor, Tensor]]) -> Step:
        return lambda: function(x, *parameters, relu=True)[0]

    return Workload(leaves=(x, *parameters), steps=_implementations(step_of, head_tail_reference, head_tail))


def _head(device: torch.device, num_rows: int) -> Workload:
    features = _leaf(num_rows, HIDDEN, dtype=torch.bfloat16, device=device)
    leaves, steps = [features], {}
    for name in ("eager", "compiled", "triton", "apex"):
        try:
            head = prediction_head(
                HIDDEN,
                hidden=HIDDEN,
                form="imagenet",
                bottleneck=BOTTLENECK,
                num_classes=NUM_CLASSES,
                backend="torch" if name in ("eager", "compiled") else name,
            ).to(device)
        except ConfigError as error:
            print(f"head: without the row {name}: {error}")
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
        return lambda: function(z1, z2, 0.2)

    return Workload(leaves=(z1, z2), steps=_implementations(step_of, info_nce, info_nce_fused))


def _implementations(
    step_of: Callable[[Callable[..., Any]], Step],
    reference: Callable[..., Any],
    fused: Callable[..., Any],
) -> dict[str, Step]:
    compiled = torch.compile(reference, dynamic=False)
    return {"eager": step_of(reference), "compiled": step_of(compiled), "triton": step_of(fused)}


def _leaf(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*shape, **options).requires_grad_()


def measure(workload: Workload, num_repeats: int) -> dict[str, dict[str, float]]:
    """{implementation: median, min, max of its milliseconds, n, and its peak memory in MiB}."""

    def run(step: Step) -> None:
        for leaf in workload.leaves:
            leaf.grad = None
        step().backward()

    peaks = {}
    for name, step in workload.steps.items():
        for _ in range(NUM_WARMUP):
            run(step)
        for leaf in workload.leaves:
            leaf.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(step)
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    times: dict[str, list[float]] = {name: [] for name in workload.steps}
    for _ in range(num_repeats):
        for name, step in workload.steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(2_000_000)  # the host launches meanwhile: the device is timed, not the host
            start.record()
            run(step)
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {
        name: {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "n": len(values),
            "peak_mib": peaks[name],
        }
        for name, values in times.items()
    }


if __name__ == "__main__":
    sys.exit(main())
