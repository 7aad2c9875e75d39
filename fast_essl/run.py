"""The state of a run between steps: what is counted, watched, logged, saved and resumed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from fast_essl import run_folder
from fast_essl.checkpoint import FORMAT_VERSION, load_checkpoint, save_checkpoint, save_file
from fast_essl.config import RunConfig
from fast_essl.config_io import config_to_table
from fast_essl.distributed import max_over_ranks, mean_over_ranks, rank
from fast_essl.errors import NonFiniteLossError
from fast_essl.ranks import all_or_none
from loaders.errors import DataError

T = TypeVar("T")

NO_STEP = 2**62
"""A number above that of any step."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a call of `pretrain` ended."""

    status: Literal["finished", "stopped", "already finished"]
    step: int
    """Steps done in all."""
    num_steps: int
    """Steps the run has when finished."""
    elapsed_s: float
    """Seconds of training over all calls, evaluations included."""
    samples_per_s: float
    """Of this call, start-up and evaluations excluded; 0 when it did no step."""
    signal_number: int | None = None
    """The signal that stopped the run."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What ends a run before its last step; the step it ends with is evaluated in any case."""

    accuracy: float
    """`knn_top1` of an online evaluation, share of 1; above 1 is never reached."""
    budget_s: float
    """Seconds of training, evaluations included, over all calls; the step at hand is finished."""


class Run:
    """A run's step, metrics and checkpoint; `pretrain` drives it.

    With several ranks all read the checkpoint, rank 0 alone writes, and all come to every method at the same steps.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        *,
        method: nn.Module,
        backbone: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        dataset_digest: str,
    ) -> None:
        """Take up the run in `run_dir` where its checkpoint left it, or at step 0 where there is none.

        Errors: as `load_checkpoint`.
        """
        self._config, self._run_dir, self._dataset_digest = config, run_dir, dataset_digest
        self._method, self._backbone, self._optimizer, self._scaler = method, backbone, optimizer, scaler
        self.step = 0
        """Steps done."""
        self.evaluated_step = 0
        """The step of the last online evaluation."""
        self._saved_step = 0
        self._elapsed_before_s = 0.0
        num_metrics_bytes = 0
        if self._checkpoint.exists():
            state = load_checkpoint(self._checkpoint, config=config, dataset_digest=dataset_digest)
            try:
                method.load_state_dict(state["method"])
                _load_optimizer(optimizer, state["optimizer"])
                scaler.load_state_dict(state["scaler"])
            except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError):
                raise DataError(
                    f"{self._checkpoint}: its weights or the optimizer's state are not those of this configuration; "
                    "remove it to start the run anew"
                ) from None
            self.step = self._saved_step = state["step"]
            self.evaluated_step = state["evaluated_step"]
            self._elapsed_before_s = state["elapsed_s"]
            num_metrics_bytes = state["metrics_num_bytes"]
        self._metrics = None
        if rank() == 0:
            self._metrics = run_folder.MetricsFile(run_dir / run_folder.METRICS, num_bytes=num_metrics_bytes)
        device = next(method.parameters()).device
        self._first_bad_step = torch.full((), NO_STEP, dtype=torch.int64, device=device)
        self.meter = Meter()
        self._started = time.perf_counter()
        self._first_step_ended: float | None = None
        self._num_samples = 0

    @property
    def _checkpoint(self) -> Path:
        return self._run_dir / run_folder.CHECKPOINT

    def close(self) -> None:
        """Close the metrics file."""
        if self._metrics is not None:
            self._metrics.close()

    def end_step(self, loss: Tensor, num_samples: int) -> None:
        """Count a step and note, on the device, whether its loss is finite; does not wait for the device."""
        self.step += 1
        bad = (self._first_bad_step == NO_STEP) & ~torch.isfinite(loss.detach())
        self._first_bad_step = torch.where(bad, self.step, self._first_bad_step)
        self.meter.num_samples += num_samples
        if (
            self._first_step_ended is None
        ):  # the first step compiles and fills the loader's queue: not counted
            self._first_step_ended = time.perf_counter()
        else:
            self._num_samples += num_samples

    def log(self, *, epoch: int, learning_rate: float, **measured: Tensor | None) -> dict[str, Any]:
        """Write a step's line to metrics.jsonl and return it. Waits for the device.

        Args: `measured` are scalars on the device, None where the method has none; the mean over ranks is written, as
        that of the data-wait share.
        Errors: `NonFiniteLossError`.
        """
        self._check_losses()
        samples_per_s, data_wait_share = self.meter.read()
        there = {name: value.detach().float() for name, value in measured.items() if value is not None}
        there["data_wait_share"] = self._first_bad_step.new_tensor(data_wait_share, dtype=torch.float32)
        means = mean_over_ranks(torch.stack(list(there.values()))).tolist()
        values = dict(zip(there, means, strict=True))
        line = {
            "type": "step",
            "epoch": epoch,
            "step": self.step,
            **{name: values.get(name) for name in measured},
            "learning_rate": learning_rate,
            "samples_per_s": round(samples_per_s, 2),
            "data_wait_share": round(values["data_wait_share"], 4),
            "elapsed_s": round(self.elapsed_s(), 3),
        }
        self._write(**line)
        return line

    def evaluate(self, epoch: int, evaluation: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Run an evaluation, its time kept out of the throughput, and write its line to metrics.jsonl."""
        self._check_losses()
        before = time.perf_counter()
        values = evaluation()
        took_s = time.perf_counter() - before
        self.meter.started += took_s
        if self._first_step_ended is not None:
            self._first_step_ended += took_s
        self.evaluated_step = self.step
        self._write(
            type="eval",
            epoch=epoch,
            step=self.step,
            **values,
            evaluation_s=round(took_s, 3),
            elapsed_s=round(self.elapsed_s(), 3),
        )
        return values

    def save(self, *, finished: bool = False) -> None:
        """Write last.pt, and the backbone alone when the run is finished. Waits for the device, and ranks for rank 0.

        Errors: `NonFiniteLossError`, before anything is written; `OSError`.
        """
        self._check_losses()
        state = self._method.state_dict()
        floats = [value for value in state.values() if value.is_floating_point()]
        if not torch.stack([torch.isfinite(value).all() for value in floats]).all():
            raise NonFiniteLossError(
                f"the weights are not finite after step {self.step}; {self._last_good()}"
            )
        with all_or_none():
            if self._metrics is not None:
                num_metrics_bytes = self._metrics.saved_num_bytes()
                self._write_checkpoint(state, num_metrics_bytes=num_metrics_bytes, finished=finished)
        self._saved_step = self.step

    def _write_checkpoint(self, state: dict[str, Tensor], *, num_metrics_bytes: int, finished: bool) -> None:
        if finished:  # the backbone first, since a run with a last checkpoint has nothing left to do
            self._write_backbone()
        save_checkpoint(
            self._checkpoint,
            config=self._config,
            dataset_digest=self._dataset_digest,
            step=self.step,
            evaluated_step=self.evaluated_step,
            elapsed_s=self.elapsed_s(),
            metrics_num_bytes=num_metrics_bytes,
            method=state,
            optimizer=self._optimizer.state_dict(),
            scaler=self._scaler.state_dict(),
        )
        if not finished:  # one of before the run was extended
            (self._run_dir / run_folder.BACKBONE).unlink(missing_ok=True)

    def write_missing_backbone(self) -> None:
        """Write the backbone of a finished run where someone removed it. Errors: as `save`."""
        with all_or_none():
            if rank() == 0 and not (self._run_dir / run_folder.BACKBONE).exists():
                self._write_backbone()

    def _write_backbone(self) -> None:
        backbone = {
            "format_version": FORMAT_VERSION,
            "model": config_to_table(self._config)["model"],
            "step": self.step,
            "backbone": self._backbone.state_dict(),
        }
        save_file(self._run_dir / run_folder.BACKBONE, backbone)

    def _write(self, **line: Any) -> None:
        with all_or_none():
            if self._metrics is not None:
                self._metrics.write(**line)

    def elapsed_s(self) -> float:
        """Seconds of all calls so far."""
        return self._elapsed_before_s + time.perf_counter() - self._started

    def samples_per_s(self) -> float:
        """Of this call, without its first step and its evaluations; 0 before the second step."""
        if not self._num_samples or self._first_step_ended is None:
            return 0.0
        return self._num_samples / (time.perf_counter() - self._first_step_ended)

    def _check_losses(self) -> None:
        first_bad_step = -max_over_ranks(-int(self._first_bad_step))  # of all ranks, so that all of them stop
        if first_bad_step < NO_STEP:
            raise NonFiniteLossError(f"the loss is not finite at step {first_bad_step}; {self._last_good()}")

    def _last_good(self) -> str:
        if self._saved_step:
            good = f"the last good checkpoint is {self._checkpoint}, of step {self._saved_step}"
        else:
            good = "there is no checkpoint yet"
        return f"{good}; try a smaller optimizer.base_learning_rate in a new --run-dir"


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """As `load_state_dict`, which itself takes groups without a rate and momentum of another shape.

    Errors: `ValueError`, and others of wrong types.
    """
    fields = [group.keys() for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    if any(wanted - group.keys() for wanted, group in zip(fields, optimizer.param_groups, strict=True)):
        raise ValueError
    for parameter, values in optimizer.state.items():
        for value in values.values():
            fits = value is None or isinstance(value, int | float)
            if isinstance(value, Tensor):
                fits = value.ndim == 0 or value.shape == parameter.shape
            if not fits:
                raise ValueError


class StopSignals:
    """Notes SIGINT and SIGTERM, once; after the first, both act as before."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())


class Meter:
    """Throughput and the share of time spent waiting for the loader, since the last reading."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.wait_s = 0.0
        self.num_samples = 0

    def waiting_for(self, batches: Iterator[T]) -> Iterator[T]:
        """Pass batches on, adding up the time until each is there."""
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.wait_s += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def read(self) -> tuple[float, float]:
        """(samples/s, data-wait share) since the last reading."""
        now = time.perf_counter()
        elapsed_s = now - self.started
        reading = self.num_samples / elapsed_s, self.wait_s / elapsed_s
        self.started, self.wait_s, self.num_samples = now, 0.0, 0
        return reading
