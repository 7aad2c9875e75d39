"""The training loop: views, forward, loss, backward, step, log.

A run is a folder that holds its configuration, its metrics and one checkpoint; calling `pretrain` again on the folder
continues from there. Randomness comes from `(seed, epoch, sample index)` alone, so on the CPU the continued run ends
in the same weights, bit for bit, as one that was never stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from fast_essl import records, run_folder
from fast_essl.accumulation import accumulate_gradients, in_passes
from fast_essl.batch_norm import synchronise_batch_norm
from fast_essl.config import Config, ConfigError, RunConfig
from fast_essl.config_io import config_to_toml
from fast_essl.distributed import max_over_ranks, num_ranks, rank
from fast_essl.evaluate_run import resolve_device, use_threads
from fast_essl.interchange import load_backbone
from fast_essl.methods import ESSL, build_method
from fast_essl.optim import build_optimizer, set_learning_rates
from fast_essl.ranks import all_or_none, data_parallel, share_buffers, together
from fast_essl.run import Goal, Run, StopSignals, Summary
from fast_essl.schedule import learning_rate_share
from fast_essl.source import Source, image_source
from fast_essl.staging import staged


def pretrain(config: Config, run_dir: Path, *, show_progress: bool = True) -> Summary:
    """Train the configured method on images, or go on training the run in `run_dir`: as `train` does.

    Errors: `ConfigError` and `DataError` before any step for what does not fit together; as `train`.
    """
    with contextlib.ExitStack() as stack:
        with all_or_none():
            device, dtype = resolve_device(config)
            _refuse_ranks(config)
            use_threads(config)
            source = stack.enter_context(image_source(config, device, dtype))
            method = build_method(config, num_classes=source.num_classes)
            if config.train.init_from and not (run_dir / run_folder.CHECKPOINT).exists():
                load_backbone(method.backbone, Path(config.train.init_from))
        return train(
            config,
            run_dir,
            source=source,
            method=method,
            device=device,
            dtype=dtype,
            show_progress=show_progress,
        )


def train(
    config: RunConfig,
    run_dir: Path,
    *,
    source: Source,
    method: ESSL,
    device: torch.device,
    dtype: torch.dtype,
    goal: Goal | None = None,
    before_clock: Callable[[ESSL], None] | None = None,
    show_progress: bool = True,
) -> Summary:
    """Train, or go on training, the run in `run_dir` until it is finished or a signal stops it.

    Leaves in the folder: config.toml, environment.json, metrics.jsonl, last.pt and, when finished, backbone.pt.
    SIGINT and SIGTERM end the step at hand, save a checkpoint and return; a second one acts as without fast_essl.
    Inside a process group all ranks call it alike: each trains on its part of every batch, and rank 0 writes.

    Args: `source` of the batches; `method` on the CPU, as initialised; `device` and autocast `dtype` to train with;
    `goal` that may end the run early; `before_clock` is called with the method on the device before time is counted.
    Errors: `ConfigError` and `DataError` before any step for a checkpoint of another configuration or dataset,
    `NonFiniteLossError`, `DataError` for a sample that does not decode; as `all_or_none`.
    """
    settings = config.train
    steps_per_epoch = len(source.loader) // settings.accumulate
    if steps_per_epoch == 0:
        raise ConfigError(f"train.batch_size = {settings.batch_size}: an epoch has fewer samples")
    schedule_steps = settings.epochs * steps_per_epoch
    last_step = min(schedule_steps, settings.max_steps or schedule_steps)
    with contextlib.ExitStack() as stack:
        with all_or_none():
            method.check(device)
            if rank() == 0:
                stack.enter_context(run_folder.held(run_dir))
        if num_ranks() > 1 and settings.sync_batch_norm:
            synchronise_batch_norm(method, device)
        method = method.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if settings.compile != "none":
            # In place, so that the checkpoint's names stay; the loss and the heads are a few kernels.
            method.backbone.compile(mode=settings.compile, dynamic=False)
        if before_clock is not None:
            before_clock(method)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        with all_or_none():
            optimizer = build_optimizer(
                method.parameters(),
                config.optimizer,
                batch_size=settings.batch_size,
                constant_rate_parameters=method.constant_rate_parameters(),
            )
            run = Run(
                config,
                run_dir,
                method=method,
                backbone=method.backbone,
                optimizer=optimizer,
                scaler=scaler,
                dataset_digest=source.digest,
            )
            stack.callback(run.close)
        with all_or_none():
            _require_one_run(config, run.step, source.digest)
        if run.step >= last_step:
            run.write_missing_backbone()
            return _summary(run, "already finished", last_step)
        with all_or_none():
            if rank() == 0:
                records.write_text(run_dir / run_folder.CONFIG, config_to_toml(config))
                environment = run_folder.describe_environment(shlex.join(sys.argv))
                environment["num_ranks"] = num_ranks()
                records.write_json(run_dir / run_folder.ENVIRONMENT, environment)
        model = data_parallel(method, device)

        def compute(function: Callable[..., Any], *arguments: Any) -> Any:
            if settings.compile != "none":
                torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
                return function(*arguments)

        def evaluate_if_due(finished: bool = False) -> bool:
            """Whether the goal's accuracy is reached."""
            num_epochs, rest = divmod(run.step, steps_per_epoch)
            due = bool(
                settings.knn_every and num_epochs and not rest and num_epochs % settings.knn_every == 0
            )
            if not (due or (finished and goal is not None)) or run.evaluated_step == run.step:
                return False
            share_buffers(method)
            values = run.evaluate((run.step - 1) // steps_per_epoch, lambda: source.evaluate(method.backbone))
            return goal is not None and values["knn_top1"] >= goal.accuracy

        bar = stack.enter_context(
            tqdm(
                total=last_step,
                initial=run.step,
                unit="step",
                disable=not show_progress or rank() > 0,
                mininterval=0.5 if sys.stderr.isatty() else 20,
            )
        )
        signals = stack.enter_context(StopSignals())
        steps = stack.enter_context(
            contextlib.closing(_steps(source.loader, run.step, last_step, settings.accumulate))
        )
        micro_batches = in_passes(together(run.meter.waiting_for(steps)), method)
        views = staged(micro_batches, source.make_views, device)
        method.train()
        if evaluate_if_due():  # where a signal came between an epoch's last step and its evaluation
            run.save(finished=True)
            return _summary(run, "finished", last_step)
        while run.step < last_step:
            per_epoch = config.optimizer.schedule == "epoch"
            share = learning_rate_share(
                run.step - run.step % steps_per_epoch if per_epoch else run.step,
                num_steps=schedule_steps,
                warmup_steps=config.optimizer.warmup_epochs * steps_per_epoch,
                final=config.optimizer.final_learning_rate,
            )
            set_learning_rates(optimizer, share)
            optimizer.zero_grad()
            if settings.accumulate == 1:
                output = compute(model, next(views))
                scaler.scale(output.loss).backward()
            else:
                output = accumulate_gradients(
                    model,
                    method,
                    views,
                    num_micro_batches=settings.accumulate,
                    scaler=scaler,
                    compute=compute,
                )
            scaler.step(optimizer)
            scaler.update()
            run.end_step(output.loss, settings.batch_size)
            bar.update()

            in_time = goal is None or not max_over_ranks(int(run.elapsed_s() >= goal.budget_s))
            finished = run.step == last_step or not in_time
            signal_number = max_over_ranks(signals.number or 0)
            stopped = signal_number > 0 and not finished
            if run.step % settings.log_every == 0 or finished:
                line = run.log(
                    epoch=(run.step - 1) // steps_per_epoch,
                    learning_rate=optimizer.param_groups[0]["lr"],
                    loss=output.loss,
                    ssl_loss=output.ssl_loss,
                    equivariance_loss=output.equivariance_loss,
                    equivariance_accuracy=output.equivariance_accuracy,
                    online_accuracy=output.online_accuracy,
                )
                bar.set_postfix(_shown(line), refresh=False)
            if not stopped and evaluate_if_due(finished):
                finished = True
            if run.step % settings.checkpoint_every == 0 or finished or stopped:
                share_buffers(method)
                run.save(finished=finished)
            if stopped:
                return _summary(run, "stopped", last_step, signal_number)
            if finished:
                break
        return _summary(run, "finished", last_step)


def _refuse_ranks(config: Config) -> None:
    """Errors: `ConfigError` for a batch that cannot be dealt to ranks and micro-batches."""
    settings = config.train
    parts = num_ranks() * settings.accumulate
    if settings.batch_size % parts:
        raise ConfigError(
            f"train.batch_size = {settings.batch_size}: must be a multiple of {parts}, the {num_ranks()} ranks times "
            f"train.accumulate = {settings.accumulate}"
        )
    if not settings.sync_batch_norm and num_ranks() > 1 and settings.batch_size // parts < 2:
        raise ConfigError(
            f"train.batch_size = {settings.batch_size}: leaves each of {num_ranks()} ranks one sample at a time, and "
            "BatchNorm needs two; set train.sync_batch_norm, or more samples"
        )


def _require_one_run(config: RunConfig, step: int, digest: str) -> None:
    """Errors: `ConfigError` where another rank has another configuration, other images or another checkpoint."""
    text = f"{config_to_toml(config)}{digest}{step}"
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
    if max_over_ranks(number) != -max_over_ranks(-number):
        raise ConfigError(
            f"rank 0 to {num_ranks() - 1} do not see one run: configuration, images and run folder have to be the "
            "same for all, and the folder on storage that all machines share"
        )


def _summary(
    run: Run,
    status: Literal["finished", "stopped", "already finished"],
    num_steps: int,
    signal_number: int | None = None,
) -> Summary:
    return Summary(
        status=status,
        step=run.step,
        num_steps=num_steps,
        elapsed_s=run.elapsed_s(),
        samples_per_s=run.samples_per_s(),
        signal_number=signal_number,
    )


def _steps(loader: Any, step: int, last_step: int, num_micro_batches: int) -> Generator[tuple[Any, ...]]:
    """The micro-batches of steps `step`, …, `last_step - 1`, from as many epochs as it takes."""
    while step < last_step:
        epoch, start_step = divmod(step, len(loader) // num_micro_batches)
        start = start_step * num_micro_batches
        with contextlib.closing(loader.epoch(epoch, start_step=start)) as batches:
            # As many times the same iterator: groups of so many batches; what is left at the end makes no step.
            for micro_batches in zip(*[batches] * num_micro_batches, strict=False):
                yield micro_batches
                step += 1
                if step == last_step:
                    return


def _shown(line: dict[str, Any]) -> dict[str, str]:
    shown = {"loss": f"{line['loss']:.3f}", "samples/s": f"{line['samples_per_s']:.0f}"}
    if line["equivariance_accuracy"] is not None:
        shown["equivariance"] = f"{line['equivariance_accuracy']:.1%}"
    return {**shown, "data wait": f"{line['data_wait_share']:.0%}"}
