"""Gradient accumulation: a step over K micro-batches, with the SSL loss over the whole batch.

The gradients of micro-batches add up to the batch's where the loss is a mean over samples: the equivariance loss, the
online classifier's, SimSiam's. The contrastive losses and Barlow Twins' compare samples of the whole batch. For them
every micro-batch passes the network twice (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup", 2021, section 3.2): first without a graph, for its embeddings, from which the loss of the batch and
its gradient on each embedding are computed; then with a graph, into which these gradients are fed.

Memory is that of one micro-batch's graph, and of the whole batch's crops (uint8, in main memory) and embeddings.
BatchNorm sees a micro-batch, of all ranks where it is synchronised; its running statistics move in the second pass
alone, once a micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fast_essl.methods import ESSL, MethodOutput
from loaders.batch import Crops, Views


def in_passes(steps: Iterable[tuple[Crops, ...]], method: ESSL) -> Iterator[Crops]:
    """The micro-batches of each step in the order in which `accumulate_gradients` takes their views."""
    for micro_batches in steps:
        if len(micro_batches) > 1 and not method.ssl.by_sample:
            yield from micro_batches
        yield from micro_batches


def accumulate_gradients(
    model: nn.Module,
    method: ESSL,
    views: Iterator[Views],
    *,
    num_micro_batches: int,
    scaler: torch.amp.GradScaler,
    compute: Callable[..., Any],
) -> MethodOutput:
    """Forward and backward of one step; the gradients of the batch's loss, scaled, are added to the parameters'.

    Args: `model` is the method, or the method in DistributedDataParallel; `views` of the micro-batches, equal in size,
    in the order of `in_passes`; `compute` calls a function with arguments under the run's autocast.
    Returns: the losses of the batch, detached.
    """
    parts: list[Callable[..., Tensor] | None] = [None] * num_micro_batches
    if not method.ssl.by_sample:
        parts = _parts_of_the_loss(method, views, num_micro_batches, scaler, compute)
    outputs = []
    for number, part in enumerate(parts):
        # The ranks' gradients are averaged once, in the last backward pass.
        apart = isinstance(model, DistributedDataParallel) and number < num_micro_batches - 1
        with model.no_sync() if apart else contextlib.nullcontext():  # type: ignore[operator]
            output = compute(model, next(views), part)
            scaler.scale(output.loss / num_micro_batches).backward()
        outputs.append(output)
    return _mean(outputs)


def _parts_of_the_loss(
    method: ESSL,
    views: Iterator[Views],
    num_micro_batches: int,
    scaler: torch.amp.GradScaler,
    compute: Callable[..., Any],
) -> list[Callable[..., Tensor] | None]:
    """For each micro-batch a function of its embeddings; the functions' mean has value and gradients of the loss."""
    with torch.no_grad(), _running_statistics_kept(method):
        embedded = [compute(method.embed, next(views)) for _ in range(num_micro_batches)]
    embeddings = [torch.cat(rows).requires_grad_() for rows in zip(*embedded, strict=True)]
    loss = compute(method.ssl.loss, *embeddings)
    # Scaled on the way: fp16 embeddings have fp16 gradients.
    scale = scaler.scale(torch.ones_like(loss))
    gradients = torch.autograd.grad(loss, embeddings, grad_outputs=scale)
    at_least_fp32 = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    chunks = [(g * (num_micro_batches / scale)).chunk(num_micro_batches) for g in at_least_fp32]
    return [partial(_ScalarWithGradients.apply, loss.detach(), part) for part in zip(*chunks, strict=True)]


class _ScalarWithGradients(torch.autograd.Function):
    """A scalar as it is, and its gradients on some tensors as they are given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        ctx.gradients, ctx.dtypes = gradients, [tensor.dtype for tensor in tensors]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.gradients, ctx.dtypes, strict=True)
        return (None, None, *[(outer[0] * gradient).to(dtype) for gradient, dtype in pairs])


@contextlib.contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch, as in training, and leaves its running statistics as they are."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _mean(outputs: list[MethodOutput]) -> MethodOutput:
    means: dict[str, Any] = {}
    for field in fields(MethodOutput):
        values = [getattr(output, field.name) for output in outputs]
        means[field.name] = None if values[0] is None else torch.stack([v.detach() for v in values]).mean()
    return MethodOutput(**means)
