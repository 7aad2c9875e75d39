"""`fast-essl speedrun`: how long pretraining takes to an accuracy, or how far it comes in a given time; over seeds.

What the clock covers: every step from the first one's wait for data on, the evaluations that decide when to stop, and
the checkpoints; the evaluations' share is told apart. What it does not, told apart, too: converting the data, and the
preparation of each start: opening the data (`loader = "device"` reads it onto the device), compiling every kernel and
the network on a batch that changes no weight, and evaluating the initial weights, which compiles the rest.

The time is that of `elapsed_s` at the evaluation that reached the target. A run that was stopped goes on, its clock as
well; what a killed process did after its last checkpoint is done again and counted once, and the record says how often
a run was started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fast_essl import records, run_folder
from fast_essl.checkpoint import load_checkpoint, load_file
from fast_essl.config import Config, ConfigError
from fast_essl.config_io import config_to_table, flatten, load_config
from fast_essl.conversion import convert_where_needed
from fast_essl.evaluate_run import count_classes, resolve_device, use_threads
from fast_essl.interchange import load_backbone
from fast_essl.leaderboard import LEADERBOARD, read_records, write_leaderboard
from fast_essl.methods import ESSL, build_method
from fast_essl.pretrain import train
from fast_essl.run import Goal
from fast_essl.source import Source, image_source
from fast_essl.staging import to_device
from loaders.batch import Views
from loaders.errors import DataError
from loaders.manifest import check_opening

STARTS = "speedrun.json"
"""In a run's folder: what each start of it took, and the goal that it has ended for."""
_SHOWN_OF_ENVIRONMENT = ("date", "commit", "cpu", "gpus")
_BEGIN_ANEW = "remove the run's folder to begin anew"
NUM_WARM_UP_STEPS = 3
"""CUDA graphs are recorded by the second or third call."""


def default_record_dir() -> Path:
    """benchmarks/records of the checkout. Errors: `ConfigError` where fast_essl is installed without one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        raise ConfigError("command line: outside of a checkout, --record-dir DIR says where the record goes")
    return root / "benchmarks" / "records"


def run_speedrun(
    config: Config,
    out: Path,
    record_dir: Path,
    *,
    command: str | None = None,
    say: Callable[[str], None] = print,
    show_progress: bool = True,
) -> tuple[dict[str, Any], Path]:
    """Make all runs, each in its own folder below `out`, write the record and the leaderboard in `record_dir`.

    Runs that have ended for this goal are reused, others go on. The record's name is the day of its first run and
    `out`'s name; one of the same name is replaced.

    Args: `command` for the record, by default this process's.
    Returns: the record and its path.
    Errors: before any step `ConfigError` and `DataError`, for one where the record cannot be written; `OSError`,
    `NonFiniteLossError`; a SIGINT or SIGTERM that stopped a run is raised again after its checkpoint is saved.
    """
    device, _ = resolve_device(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("WORLD_SIZE: a speed-run is one process; start it without torchrun")
    if config.speedrun.target and not config.train.knn_every:
        raise ConfigError("train.knn_every = 0: a target needs evaluations; choose 1 or more epochs")
    name = out.name.replace("_", "-")
    if config.train.accumulate > 1:
        raise ConfigError(
            f"train.accumulate = {config.train.accumulate}: a speed-run takes 1; choose a batch that fits"
        )
    _check_writable(record_dir, name)
    conversion_s = _convert(config, say)
    count_classes(config)
    runs = []
    for number in range(config.speedrun.runs):
        seed = config.train.seed + number
        seeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        runs.append(_make_run(seeded, out / f"seed{seed}", say, show_progress))
    first = out / f"seed{config.train.seed}"
    record = {
        **_environment(first),
        "command": command or shlex.join(["fast-essl", *sys.argv[1:]]),
        "kind": "speedrun",
        "name": name,
        "data": config.data.train.stem,
        "device": str(device),
        "conversion_s": conversion_s,
        "goal": _goal_table(config),
        "results": summarise(runs, config.speedrun.target),
        "config": config_to_table(load_config(first / run_folder.CONFIG)),
        "runs": runs,
    }
    path = record_dir / f"{record['date'][:10]}-{name}.json"
    records.write_json(path, record, indent=1)
    write_leaderboard(record_dir)
    return record, path


def summarise(runs: Sequence[dict[str, Any]], target: float) -> dict[str, Any]:
    """Mean and spread over the runs: the accuracy at their end, and the times, unless a run missed the target."""
    reached = [run for run in runs if run["reached"]]
    timed = runs if not target or len(reached) == len(runs) else []
    return {
        "num_runs": len(runs),
        "num_reached": len(reached) if target else None,
        "knn_top1": _spread([run["knn_top1"] for run in runs]),
        **{
            name: _spread([run[name] for run in timed])
            for name in ("time_s", "evaluation_s", "preparation_s")
        },
    }


def result_lines(record: dict[str, Any], path: Path) -> list[str]:
    """The record for people: a line a run, and their mean."""
    target = record["goal"]["target"]
    lines = []
    for run in record["runs"]:
        end = "" if run["reached"] is None else (", reached" if run["reached"] else ", not reached")
        lines.append(
            f"seed {run['seed']}: kNN {run['knn_top1']:.2%}{end} after {run['time_s']:.1f} s "
            f"({run['evaluation_s']:.1f} s of it evaluation), epoch {run['epoch']}; "
            f"prepared in {run['preparation_s']:.1f} s"
        )
    results = record["results"]
    if results["time_s"] is not None:
        goal = f"kNN {target:.1%}" if target else "the end of the budget"
        lines.append(
            f"{goal} in {results['time_s']['mean']:.1f} ± {results['time_s']['stdev']:.1f} s, kNN "
            f"{results['knn_top1']['mean']:.2%} ± {100 * results['knn_top1']['stdev']:.2f} "
            f"(mean ± sample standard deviation, n = {results['num_runs']})"
        )
    return [*lines, f"the record: {path}; the leaderboard: {path.parent / LEADERBOARD}"]


def shortfall(record: dict[str, Any]) -> str | None:
    """One line that says how many runs missed the target, and by how much; None when none did."""
    target, results = record["goal"]["target"], record["results"]
    num_missed = results["num_runs"] - results["num_reached"] if target else 0
    if not num_missed:
        return None
    worst = min(run["best_knn_top1"] for run in record["runs"] if not run["reached"])
    best = max(run["best_knn_top1"] for run in record["runs"] if not run["reached"])
    span = f"{best:.2%}" if num_missed == 1 else f"{worst:.2%} to {best:.2%}"
    return f"{num_missed} of {results['num_runs']} runs did not reach kNN {target:.2%}; their best was {span}"


def _make_run(
    config: Config, run_dir: Path, say: Callable[[str], None], show_progress: bool
) -> dict[str, Any]:
    """Begin a run, go on with it, or take it as it is where it has ended for this goal; its part of the record."""
    history = _read_history(run_dir)
    _require_same_settings(config, run_dir)
    if _has_ended(config, run_dir, history):
        load_checkpoint(  # errors: `ConfigError` where it is a run of another configuration
            run_dir / run_folder.CHECKPOINT,
            config=config,
            dataset_digest=check_opening(config.data.train).digest,
        )
        say(f"{run_dir}: has ended, reused")
    else:
        say(f"{run_dir}: seed {config.train.seed}")
        _train(config, run_dir, history, say, show_progress)
        history["ended_for"] = _goal_table(config)
        history["metrics_sha256"] = _metrics_digest(run_dir)
        _write_history(run_dir, history)
    environment = _environment(run_dir)
    told = {name: environment[name] for name in _SHOWN_OF_ENVIRONMENT}
    return {**_outcome(config, run_dir, history), **told, "metrics": _metrics(run_dir)}


def _require_same_settings(config: Config, run_dir: Path) -> None:
    """Errors: `ConfigError` where the run there was made with what may change in a run, but not in its timing."""
    if not (run_dir / run_folder.CONFIG).exists():
        return
    saved = flatten(config_to_table(load_config(run_dir / run_folder.CONFIG)))
    for key, value in flatten(config_to_table(config)).items():
        free = key.startswith("speedrun.") or key in ("data.train", "data.test", "train.max_steps")
        if not free and saved.get(key) != value:
            raise ConfigError(
                f"{run_dir}: {key} = {saved.get(key)!r} there and {value!r} now; choose another --out"
            )


def _train(
    config: Config, run_dir: Path, history: dict[str, Any], say: Callable[[str], None], show_progress: bool
) -> None:
    """One start of a run. What it took to prepare is in its history before the first step."""
    started = time.perf_counter()
    device, dtype = resolve_device(config)
    use_threads(config)
    goal = Goal(
        accuracy=config.speedrun.target or math.inf,
        budget_s=60 * config.speedrun.budget_minutes or math.inf,
    )
    with image_source(config, device, dtype) as source:
        method = build_method(config, num_classes=source.num_classes)
        if config.train.init_from:
            load_backbone(method.backbone, Path(config.train.init_from))

        def before_clock(method: ESSL) -> None:
            accuracy = _warm_up(method, source, config, device, dtype)
            preparation_s = round(time.perf_counter() - started, 3)
            history["starts"].append({"preparation_s": preparation_s, "initial_knn_top1": accuracy})
            _write_history(run_dir, history)

        summary = train(
            config,
            run_dir,
            source=source,
            method=method,
            device=device,
            dtype=dtype,
            goal=goal,
            before_clock=before_clock,
            show_progress=show_progress,
        )
    if summary.signal_number is not None:
        say(f"{run_dir}: stopped at step {summary.step} of {summary.num_steps}; the same command continues")
        signal.raise_signal(summary.signal_number)


def _warm_up(
    method: ESSL, source: Source, config: Config, device: torch.device, dtype: torch.dtype
) -> float | None:
    """Compile all that a run calls, and leave the method as it was.

    Returns: the initial weights' kNN top-1; None where nothing is evaluated on the way, which may take long.
    """
    state = {name: value.clone() for name, value in method.state_dict().items()}
    method.train()
    for epoch in (0, *config.views.size_epochs):  # one of each size
        with contextlib.closing(source.loader.epoch(epoch)) as batches:
            views = source.make_views(to_device(next(batches), device))
        for _ in range(NUM_WARM_UP_STEPS):
            _pass(method, views, config, device, dtype)
    method.zero_grad()
    method.load_state_dict(state)
    accuracy = source.evaluate(method.backbone)["knn_top1"] if config.train.knn_every else None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return accuracy


def _pass(method: ESSL, views: Views, config: Config, device: torch.device, dtype: torch.dtype) -> None:
    """Forward and backward as in a step."""
    method.zero_grad()  # a CUDA graph's next pass takes the memory of the gradients
    if config.train.compile != "none":
        torch.compiler.cudagraph_mark_step_begin()
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
        loss = method(views).loss
    loss.backward()


def _outcome(config: Config, run_dir: Path, history: dict[str, Any]) -> dict[str, Any]:
    """What a run's log says: time and accuracy at the evaluation that reached the target, or at the last one."""
    target = config.speedrun.target
    evaluations = _evaluations(run_dir)
    if not evaluations or not history["starts"]:
        raise DataError(f"{run_dir}: its log or {STARTS} has lost lines; {_BEGIN_ANEW}")
    hit = _first_hit(evaluations, target)
    end = hit or evaluations[-1]
    seen = [line for line in evaluations if line["step"] <= end["step"]]
    evaluation_s = sum(line["evaluation_s"] for line in seen)
    return {
        "seed": config.train.seed,
        "run_dir": str(run_dir),
        "reached": (hit is not None) if target else None,
        "time_s": end["elapsed_s"],
        "evaluation_s": round(evaluation_s, 3),
        "training_s": round(end["elapsed_s"] - evaluation_s, 3),
        "step": end["step"],
        "epoch": end["epoch"] + 1,
        "knn_top1": end["knn_top1"],
        "best_knn_top1": max(line["knn_top1"] for line in seen),
        "initial_knn_top1": history["starts"][0]["initial_knn_top1"],
        "num_starts": len(history["starts"]),
        "preparation_s": round(sum(start["preparation_s"] for start in history["starts"]), 3),
    }


def _has_ended(config: Config, run_dir: Path, history: dict[str, Any]) -> bool:
    """Whether a run has reached the target on its way, or has ended for the same goal."""
    if history.get("ended_for") == _goal_table(config):
        # Version 0.1.0 noted no digest.
        if history.get("metrics_sha256", _metrics_digest(run_dir)) != _metrics_digest(run_dir):
            raise ConfigError(
                f"{run_dir / run_folder.METRICS}: not that of the run's end any more; it has gone on for another goal, "
                "or was changed; choose another --out"
            )
        return True
    hit = _first_hit(_evaluations(run_dir), config.speedrun.target)
    if hit is None or not (run_dir / run_folder.CHECKPOINT).exists():
        return False
    # The log may be ahead of the checkpoint that a killed run goes on from.
    return bool(load_file(run_dir / run_folder.CHECKPOINT, step=int)["step"] >= hit["step"])


def _goal_table(config: Config) -> dict[str, Any]:
    """What decides when a run ends."""
    return {
        "target": config.speedrun.target,
        "budget_minutes": config.speedrun.budget_minutes,
        "epochs": config.train.epochs,
        "max_steps": config.train.max_steps,
    }


def _first_hit(evaluations: Sequence[dict[str, Any]], target: float) -> dict[str, Any] | None:
    return next((line for line in evaluations if target and line["knn_top1"] >= target), None)


def _environment(run_dir: Path) -> dict[str, Any]:
    path = run_dir / run_folder.ENVIRONMENT
    environment = records.read_json(path, remedy=_BEGIN_ANEW)
    missing = [name for name in _SHOWN_OF_ENVIRONMENT if name not in environment]
    if missing:
        raise DataError(f"{path}: {missing[0]} is missing; {_BEGIN_ANEW}")
    return environment


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / run_folder.METRICS
    return records.read_metrics(path) if path.exists() else []


def _evaluations(run_dir: Path) -> list[dict[str, Any]]:
    lines = [line for line in _metrics(run_dir) if line["type"] == "eval"]
    for line in lines:
        for name in ("knn_top1", "evaluation_s"):
            if line.get(name) is None:
                path = run_dir / run_folder.METRICS
                raise DataError(f"{path}: {name} is missing at step {line['step']}; {_BEGIN_ANEW}")
    return lines


def _metrics_digest(run_dir: Path) -> str:
    return hashlib.sha256(records.read_bytes(run_dir / run_folder.METRICS)).hexdigest()


def _read_history(run_dir: Path) -> dict[str, Any]:
    path = run_dir / STARTS
    if path.exists():
        history = records.read_json(path, remedy=_BEGIN_ANEW)
        starts = history.get("starts")
        if not isinstance(starts, list) or not all(map(_is_start, starts)):
            raise DataError(f"{path}: damaged (its starts); {_BEGIN_ANEW}")
        return history
    if (run_dir / run_folder.CHECKPOINT).exists():
        raise ConfigError(f"{run_dir}: a run that was not begun by a speed-run; choose another --out")
    return {"starts": []}


def _is_start(start: Any) -> bool:
    if not isinstance(start, dict):
        return False
    accuracy = start.get("initial_knn_top1", "")
    return records.is_number(start.get("preparation_s")) and (accuracy is None or records.is_number(accuracy))


def _write_history(run_dir: Path, history: dict[str, Any]) -> None:
    records.write_json(run_dir / STARTS, history, indent=1)


def _convert(config: Config, say: Callable[[str], None]) -> float | None:
    """Convert what is missing and can be; seconds, None where nothing was."""
    if not config.speedrun.source:
        return None
    started = time.perf_counter()
    converted = [
        convert_where_needed(config.speedrun.source, split, path, say)
        for split, path in (("train", config.data.train), ("test", config.data.test))
    ]
    return round(time.perf_counter() - started, 3) if any(converted) else None


def _check_writable(record_dir: Path, name: str) -> None:
    """Errors: `ConfigError`, `DataError` where record or leaderboard could not be written after hours of training."""
    try:
        record_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=record_dir):
            pass
        for path in (record_dir / LEADERBOARD, *record_dir.glob(f"*-{name}.json")):
            if path.exists():
                with open(path, "r+b"):
                    pass
        read_records(record_dir)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or record_dir}: the record cannot be written ({error.strerror}); "
            "choose another --record-dir"
        ) from None


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    """n, mean, sample standard deviation (0 for one) and the values; None for none."""
    if not values:
        return None
    stdev = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"n": len(values), "mean": statistics.fmean(values), "stdev": stdev, "values": list(values)}
