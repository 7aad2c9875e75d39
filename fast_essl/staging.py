"""Crops → Views on the training device, made there while the step before still trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch

from loaders.batch import Crops, Views, uploaded


def to_device(crops: Crops, device: torch.device) -> Crops:
    """Copy a batch without waiting for the device: only from pinned memory is the copy asynchronous."""
    if device.type == "cpu":
        return crops
    return dataclasses.replace(
        crops,
        images=tuple(uploaded(image, device) for image in crops.images),
        labels=uploaded(crops.labels, device),
        indices=uploaded(crops.indices, device),
    )


def staged(
    batches: Iterable[Crops], make_views: Callable[[Crops], Views], device: torch.device
) -> Iterator[Views]:
    """The views of each batch; on a CUDA device uploaded and made on a stream of their own.

    A step is launched long before it has run, so the next batch's upload and view stage run beside it; only the step
    that uses the views waits for them.
    """
    if device.type != "cuda":
        for crops in batches:
            yield make_views(crops)
        return
    stream = torch.cuda.Stream(device)
    arriving = iter(batches)
    while True:
        with torch.cuda.stream(stream):  # also of a loader that cuts the crops on the device
            arrived = next(arriving, None)
            if arrived is None:
                return
            views = make_views(to_device(arrived, device))
        training = torch.cuda.current_stream(device)
        training.wait_stream(stream)
        for tensor in (
            *views.views,
            views.transformed,
            views.transformed_labels,
            views.labels,
            views.indices,
        ):
            if tensor is not None:
                tensor.record_stream(
                    training
                )  # its memory is not to be given out anew before the step has read it
        yield views
