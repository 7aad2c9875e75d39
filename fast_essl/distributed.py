"""What a loss over the whole batch needs of the process group: ranks, and collectives that gradients pass through.

With DistributedDataParallel every rank computes its part of the loss, and the ranks' gradients are averaged. A loss L
that each rank computes over the whole batch therefore needs a backward pass in which each rank's embeddings receive
the gradients of all ranks' losses, R times their own; the average takes the R out again, and the gradients are those
of one process that holds the whole batch. Without a process group there is one rank, and nothing is communicated.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def num_ranks() -> int:
    """Processes of the group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in the group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_rows(rows: Tensor) -> Tensor:
    """(N, …) of each rank → (R·N, …) in the order of the ranks, each with N rows.

    Backward: the gradients of all ranks, summed (the paper's gather on ImageNet).
    """
    return rows if num_ranks() == 1 else _GatherRows.apply(rows)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over the ranks. Backward: the gradients of all ranks, summed."""
    return value if num_ranks() == 1 else _SumOverRanks.apply(value)


@torch.no_grad()
def gather_ragged(rows: Tensor) -> Tensor:
    """(N, …) of each rank, N its own → (ΣN, …) in the order of the ranks. Without gradients."""
    if num_ranks() == 1:
        return rows
    counts = gather_rows(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = gather_rows(padded).split(len(padded))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


@torch.no_grad()
def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over the ranks. Without gradients."""
    return sum_over_ranks(value) / num_ranks()


def max_over_ranks(number: int) -> int:
    """The largest of the ranks' numbers, by way of the CPU: it does not wait for a GPU."""
    if num_ranks() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(num_ranks())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        start = rank() * ctx.num_rows
        return gradient[start : start + ctx.num_rows]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient
