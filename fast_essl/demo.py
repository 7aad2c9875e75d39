"""`make run`: E-SSL at work on photo-digits, from conversion to report, in a few minutes on two CPU cores.

SimCLR (λ = 0) and E-SimCLR (λ = 0.4) start from the same weights and see the same samples and views; the random
backbone that both start from stands beside them. Called again, the demo goes on where it was stopped and reuses what
is finished.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_essl.config import Config
from fast_essl.config_io import find_config, load_config
from fast_essl.conversion import convert_where_needed
from fast_essl.evaluate_run import run_accuracy
from fast_essl.pretrain import pretrain
from fast_essl.report import read_runs, write_report

DATASET = "photo-digits"
METHODS = ("simclr", "e_simclr")
"""Names of the runs' folders; `<name>_photo_digits` is the recipe of each."""
LABELS = {"random": "random backbone", "simclr": "SimCLR", "e_simclr": "E-SimCLR"}


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What `fast-essl demo` can be told."""

    seed: int = 0
    """Of initialisation, sample order and views, for both methods."""
    out: Path = Path("runs/photo-digits")
    """Folder of the two runs and the report; a seed other than 0 needs its own."""
    overrides: tuple[str, ...] = ()
    """Configuration overrides of both runs, as `--train.epochs 2`."""
    show_progress: bool = True
    """Whether to draw progress bars."""


def run_demo(options: DemoOptions | None = None, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Convert, pretrain both methods, evaluate them and the random backbone, print the table, write the report.

    Returns: `seed`, `report` (path), `elapsed_s` (of this call) and `results`: for random, simclr and e_simclr the
    accuracies as shares of 1, for the two runs also samples_per_s and minutes.
    Errors: `ConfigError`, for one when `out` holds runs of other settings; `DataError`; `OSError`. A SIGINT or SIGTERM
    that stopped a run is raised again after its checkpoint is saved.
    """
    options = options or DemoOptions()
    started = time.perf_counter()
    overrides = ["--train.seed", str(options.seed), *options.overrides]
    configs = {name: load_config(find_config(Path(f"{name}_photo_digits")), overrides) for name in METHODS}
    any_config = configs[METHODS[0]]
    for split, path in (("train", any_config.data.train), ("test", any_config.data.test)):
        convert_where_needed(DATASET, split, path, say)
    options.out.mkdir(parents=True, exist_ok=True)
    run_dirs = [options.out / name for name in METHODS]
    for name, run_dir in zip(METHODS, run_dirs, strict=True):
        _train_and_evaluate(configs[name], run_dir, options.show_progress, say)
    # Both runs start from the same backbone, so the first one's stands for both.
    random = run_accuracy(run_dirs[0], random_init=True)
    report = write_report(run_dirs, options.out / "report.html", random_accuracy=random)
    runs = read_runs(run_dirs)
    results: dict[str, dict[str, float]] = {"random": random}
    for name, run in zip(METHODS, runs, strict=True):
        results[name] = {**run.accuracy, "samples_per_s": run.samples_per_s(), "minutes": run.minutes()}
    say(f"\n{table(results)}")
    elapsed_s = time.perf_counter() - started
    say(f"\nthe report: {report}   ({elapsed_s / 60:.1f} minutes in all)")
    return {"seed": options.seed, "results": results, "report": str(report), "elapsed_s": elapsed_s}


def table(results: dict[str, dict[str, float]]) -> str:
    """What the methods reached, one line each; what was not measured stays empty."""
    columns: tuple[tuple[str, str, str], ...] = (
        ("kNN", "knn_top1", ".1%"),
        ("linear probe", "probe_top1", ".1%"),
        ("samples/s", "samples_per_s", ".0f"),
        ("minutes", "minutes", ".1f"),
    )
    lines = [f"{'':<18}" + "".join(f"{name:>14}" for name, _, _ in columns)]
    for name, values in results.items():
        cells = [format(values[key], form) if key in values else "" for _, key, form in columns]
        lines.append(f"{LABELS[name]:<18}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def _train_and_evaluate(
    config: Config, run_dir: Path, show_progress: bool, say: Callable[[str], None]
) -> None:
    weight = config.method.equivariance_weight
    say(f"{run_dir}: pretraining with λ = {weight:g}, {config.train.epochs} epochs")
    summary = pretrain(config, run_dir, show_progress=show_progress)
    if summary.signal_number is not None:
        say(f"{run_dir}: stopped at step {summary.step} of {summary.num_steps}; the same command continues")
        signal.raise_signal(summary.signal_number)
    accuracy = run_accuracy(run_dir)
    reused = "finished already, reused; " if summary.status == "already finished" else ""
    say(f"{run_dir}: {reused}kNN {accuracy['knn_top1']:.1%}, linear probe {accuracy['probe_top1']:.1%}")
