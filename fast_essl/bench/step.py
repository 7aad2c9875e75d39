"""The training step in one form or another, and the rooms on the training device: upload, view stage, step."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fast_essl.bench.loading import endless
from fast_essl.bench.measuring import Marks, Row, cpu_s, measure, summary, timed
from fast_essl.bench.synthetic import make_crops
from fast_essl.config import Config
from fast_essl.methods import build_method
from fast_essl.optim import build_optimizer, set_learning_rates
from fast_essl.source import image_source
from fast_essl.staging import staged, to_device
from fast_essl.transformations import config_transformations
from loaders.batch import Crops, Views
from loaders.views import resolve_view_stage

UPLOAD = "upload"
VIEW_STAGE = "view stage"
FORWARD_BACKWARD = "forward + backward"
OPTIMIZER = "optimizer"
STEP = "step"
WHOLE = "end to end"
"""Names of the rows."""

NUM_CLASSES = 1000
NUM_WARMUP = 5
"""Steps that are not counted, on a GPU; on a CPU, where a step takes seconds, one."""
LEARNING_RATE_SHARE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """One form of the step."""

    dtype: torch.dtype = torch.bfloat16
    """Of autocast and of the views; float32 is no autocast."""
    channels_last: bool = True
    compile: str = "none"
    """Mode of torch.compile for the backbone."""
    view_stage: bool = False
    """Whether each step makes its views from crops on the device, or all take the same ones."""
    backend: Literal["torch", "triton", "apex"] | None = None
    """Whose prediction head, InfoNCE (torch, triton) and SGD (torch, apex); None is as the configuration has it."""

    def applied_to(self, config: Config) -> Config:
        """The configuration with the form's backend. Errors: `ValueError` for what does not go together."""
        if self.backend is None:
            return config
        fused = self.backend == "triton" and config.method.contrastive_loss == "info_nce"
        apex = self.backend == "apex" and config.optimizer.name == "sgd"
        return dataclasses.replace(
            config,
            head=dataclasses.replace(config.head, layer_norm=self.backend),
            method=dataclasses.replace(config.method, contrastive_backend="triton" if fused else "torch"),
            optimizer=dataclasses.replace(config.optimizer, backend="apex" if apex else "torch"),
        )

    def to_table(self) -> dict[str, Any]:
        """The form as plain values."""
        return {**dataclasses.asdict(self), "dtype": str(self.dtype)}


class TrainingStep:
    """Method and optimizer of a configuration, and one step of them, as `pretrain` has it."""

    def __init__(self, config: Config, form: Form, device: torch.device) -> None:
        self._form, self._device = form, device
        config = form.applied_to(config)
        method = build_method(config, num_classes=NUM_CLASSES).to(device).train()
        method.check(device)
        memory_format = torch.channels_last if form.channels_last else torch.contiguous_format
        self._method = method.to(memory_format=memory_format)  # type: ignore[call-overload]
        self._optimizer = build_optimizer(
            method.parameters(),
            config.optimizer,
            batch_size=config.train.batch_size,
            constant_rate_parameters=method.constant_rate_parameters(),
        )
        set_learning_rates(self._optimizer, LEARNING_RATE_SHARE)
        self._scaler = torch.amp.GradScaler(device.type, enabled=form.dtype is torch.float16)

    def compile(self) -> None:
        """Let torch.compile have the backbone, if the form says so; the next step compiles."""
        if self._form.compile != "none":
            self._method.backbone.compile(mode=self._form.compile, dynamic=False)

    def forward_backward(self, views: Views) -> None:
        """Loss and gradients."""
        dtype = self._form.dtype
        if self._form.compile != "none":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not torch.float32):
            loss = self._method(views).loss
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()

    def update(self) -> None:
        """The optimizer's part."""
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def train(self, views: Views) -> None:
        """A whole step."""
        self.forward_backward(views)
        self.update()

    def describe(self) -> dict[str, int]:
        """What `plan` asks of the method: the names are those of its `Job`."""
        norms = [part for part in self._method.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        return {
            "num_parameters": sum(parameter.numel() for parameter in self._method.parameters()),
            "num_norms": len(norms),
        }


def step_rows(
    config: Config, form: Form, device: torch.device, num_steps: int
) -> tuple[list[Row], TrainingStep]:
    """Measure the step and its parts, on one batch of crops that lies on the device.

    Returns: the rows forward + backward, optimizer, and step, which has the view stage in it where the form says so;
    and the `TrainingStep`, warm, for more.
    """
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    batch_size = config.train.batch_size
    step = TrainingStep(config, form, device)
    views_of = _views(config, form, device)
    with FlopCounterMode(display=False) as flops:
        step.train(views_of())
    step.compile()
    started = time.perf_counter()
    step.train(views_of())
    _wait(device)
    first_s = time.perf_counter() - started
    for _ in range(NUM_WARMUP if device.type == "cuda" else 0):
        step.train(views_of())
    marks = Marks(device)
    cpu_before_s = cpu_s()
    for _ in range(num_steps):
        marks.mark()
        views = views_of()
        marks.mark()
        step.forward_backward(views)
        marks.mark()
        step.update()
        marks.mark()
    pieces = marks.between_ms()
    cpu_ms = 1000 * (cpu_s() - cpu_before_s) / (num_steps * batch_size)
    # Four marks a step: views, forward and backward, update, and the nothing to the next step.
    views_ms, training_ms, update_ms = (pieces[part::4] for part in range(3))
    whole_ms = [sum(parts) for parts in zip(views_ms, training_ms, update_ms, strict=True)]
    tflop = flops.get_total_flops() / 1e12
    rows = [
        Row(
            name=FORWARD_BACKWARD,
            batch_size=batch_size,
            batch_ms=summary(training_ms),
            tflop_per_s=tflop / statistics.median(training_ms) * 1000,
        ),
        Row(name=OPTIMIZER, batch_size=batch_size, batch_ms=summary(update_ms)),
        Row(
            name=STEP,
            batch_size=batch_size,
            batch_ms=summary(whole_ms),
            cpu_ms_per_sample=cpu_ms,
            setup_s=max(0.0, first_s - statistics.median(whole_ms) / 1000),
            tflop_per_s=tflop / statistics.median(whole_ms) * 1000,
            peak_gib=torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        ),
    ]
    return rows, step


def views_row(config: Config, form: Form, device: torch.device, num_repeats: int) -> Row:
    """The view stage by itself, on one batch of crops that lies on the device."""
    make_views = _views(config, dataclasses.replace(form, view_stage=True), device)
    batch_size = config.train.batch_size
    started = time.perf_counter()
    make_views()
    _wait(device)
    first_s = time.perf_counter() - started
    cpu_before_s = cpu_s()
    times_ms = [timed(make_views, device) for _ in range(num_repeats)]
    return Row(
        name=VIEW_STAGE,
        batch_size=batch_size,
        batch_ms=summary(times_ms),
        bytes_per_sample=float(sum(3 * recipe.size**2 for recipe in config.crop_recipes())),
        cpu_ms_per_sample=1000 * (cpu_s() - cpu_before_s) / (num_repeats * batch_size),
        setup_s=max(0.0, first_s - statistics.median(times_ms) / 1000),
    )


def whole_row(
    config: Config,
    step: TrainingStep,
    form: Form,
    device: torch.device,
    *,
    num_steps: int,
    num_repeats: int,
) -> Row:
    """Loader, view stage and step together, as `pretrain` runs them; a repeat is `num_steps` steps of one stream."""
    started = time.perf_counter()
    with image_source(config, device, form.dtype) as source:
        opening_s = time.perf_counter() - started
        with contextlib.closing(endless(source.loader)) as batches:
            stream = staged(batches, source.make_views, device)

            def work() -> int:
                count = 0
                for views in itertools.islice(stream, num_steps):
                    step.train(views)
                    count += len(views.labels)
                return count

            return measure(
                WHOLE,
                work,
                batch_size=config.train.batch_size,
                num_repeats=num_repeats,
                device=device,
                opening_s=opening_s,
            )


def upload_row(crops: Crops, device: torch.device, num_repeats: int) -> Row:
    """Host to device, as the trainer does it: into pinned memory, then a copy beside other work."""
    num_bytes = sum(image.numel() for image in crops.images) / len(crops.labels)

    def work() -> int:
        to_device(crops, device)
        return len(crops.labels)

    return measure(
        UPLOAD,
        work,
        batch_size=len(crops.labels),
        num_repeats=num_repeats,
        device=device,
        bytes_per_sample=num_bytes,
    )


def _views(config: Config, form: Form, device: torch.device) -> Callable[[], Views]:
    """What gives a step its views: the same ones each time, or the view stage on the same crops."""
    recipes, (equivariance, invariance) = config.crop_recipes(), config_transformations(config)
    crops = to_device(make_crops(recipes, config.train.batch_size), device)
    make_views = partial(
        resolve_view_stage(config.data.view_stage, device),
        crops,
        recipes,
        equivariance=equivariance,
        invariance=invariance,
        dtype=form.dtype,
    )
    if form.view_stage:
        return make_views
    views = make_views()
    memory_format = torch.channels_last if form.channels_last else torch.contiguous_format
    fixed = dataclasses.replace(
        views,
        views=tuple(view.contiguous(memory_format=memory_format) for view in views.views),
        transformed=views.transformed.contiguous(memory_format=memory_format)
        if views.transformed is not None
        else None,
    )
    return lambda: fixed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
