"""`fast-essl study`: a table of runs, rows against columns, over several seeds, from one TOML file.

    title = "..."
    rows = ["horizontal_flip", ...]
    seeds = [0, 1, 2]

    [columns.sensitive]                      # any number of columns; {row} stands for the row's name
    config = "e_simclr_cifar10"              # a recipe or a file, as `fast-essl pretrain` takes it
    transformation = { equivariance = "{row}" }

    [baseline]                               # optional: a row of its own, in the first column
    config = "simclr_cifar10"

    [common]                                 # optional: laid over every configuration
    train = { epochs = 100 }

A study that was stopped goes on where it was; what is finished is reused.
"""

from __future__ import annotations

import re
import signal
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_essl import records
from fast_essl.config import Config, ConfigError
from fast_essl.config_io import (
    apply_overrides,
    config_from_table,
    find_config,
    lay_over,
    read_table,
    read_toml,
)
from fast_essl.evaluate_run import run_accuracy
from fast_essl.pretrain import pretrain
from fast_essl.transformations import config_transformations

METRICS = {"knn_top1": "kNN", "probe_top1": "linear probe"}
"""What the table shows of evaluation.json's `accuracy`."""
RESULTS = "study.json"
RANDOM = "random backbone"


@dataclass(frozen=True, kw_only=True)
class Study:
    """What to run."""

    title: str
    rows: tuple[str, ...]
    columns: dict[str, dict[str, Any]]
    """Tables of `config` and the values laid over it, by column name."""
    seeds: tuple[int, ...]
    baseline: dict[str, Any] | None
    """As a column's table; a row of its own."""
    common: dict[str, Any]
    """Values laid over every configuration."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row in one column: a run a seed."""

    row: str
    column: str
    configs: tuple[Config, ...]


def load_study(path: Path) -> Study:
    """Read a study. Errors: `ConfigError` of one line; `OSError`."""
    table = read_toml(path)
    forms: dict[str, Callable[[Any], bool]] = {
        "title": lambda value: isinstance(value, str),
        "rows": lambda value: (
            bool(value) and isinstance(value, list) and all(isinstance(row, str) for row in value)
        ),
        "seeds": lambda value: (
            bool(value) and isinstance(value, list) and all(type(seed) is int for seed in value)
        ),
        "columns": lambda value: (
            bool(value) and isinstance(value, dict) and all(map(_has_config, value.values()))
        ),
        "baseline": _has_config,
        "common": lambda value: isinstance(value, dict),
    }
    unknown = sorted(table.keys() - forms.keys())
    missing = sorted({"title", "rows", "columns"} - table.keys())
    wrong = [name for name, value in table.items() if name in forms and not forms[name](value)]
    if unknown or missing:
        raise ConfigError(f"{path}: a study has {', '.join(forms)}; unknown: {unknown}, missing: {missing}")
    if wrong:
        raise ConfigError(
            f"{path}: {wrong[0]} = {table[wrong[0]]!r} is not of its form; see study_methods_photo_digits.toml"
        )
    return Study(
        title=table["title"],
        rows=tuple(table["rows"]),
        columns=table["columns"],
        seeds=tuple(table.get("seeds", [0])),
        baseline=table.get("baseline"),
        common=table.get("common", {}),
    )


def study_cells(study: Study, *, source: str, overrides: list[str] | None = None) -> list[Cell]:
    """Every cell with its resolved configurations, the baseline first.

    Errors: `ConfigError` for a configuration that is wrong; nothing has run then.
    """
    chosen: list[tuple[str, str, dict[str, Any]]] = []
    if study.baseline is not None:
        chosen.append(("baseline", next(iter(study.columns)), study.baseline))
    chosen += [
        (row, column, _filled(table, row)) for row in study.rows for column, table in study.columns.items()
    ]
    if len({_folder(row, column) for row, column, _ in chosen}) < len(chosen):
        raise ConfigError(
            f"{source}: two cells would share a folder; give rows and columns names of other letters"
        )
    cells = []
    for row, column, table in chosen:
        values = {key: value for key, value in table.items() if key != "config"}
        values = lay_over(lay_over(read_table(find_config(Path(table["config"]))), study.common), values)
        written = apply_overrides(values, overrides or [])
        configs = []
        for seed in study.seeds:
            values = lay_over(values, {"train": {"seed": seed}})
            origin = f"{source}: {row}, {column}"
            configs.append(
                config_from_table(values, source=origin, sources=dict.fromkeys(written, "command line"))
            )
        try:
            config_transformations(configs[0])
        except ConfigError as error:
            raise ConfigError(f"{source}: {row}, {column}: {error}") from None
        cells.append(Cell(row=row, column=column, configs=tuple(configs)))
    return cells


def run_study(
    path: Path,
    out: Path,
    *,
    overrides: list[str] | None = None,
    say: Callable[[str], None] = print,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Pretrain and evaluate every cell, print the table, write study.json to `out`.

    Returns: `title`, `seeds` and `cells`: for each its row, column, runs (folders) and, by metric, n, mean, sample
    standard deviation and values, shares of 1. The first cell is the backbone that the runs of the next started from.
    Errors: `ConfigError`, `DataError`, `OSError`, `NonFiniteLossError`; a SIGINT or SIGTERM that stopped a run is
    raised again after its checkpoint is saved.
    """
    study = load_study(path)
    cells = study_cells(study, source=str(path), overrides=overrides)
    results: list[dict[str, Any]] = []
    for cell in cells:
        accuracies, run_dirs = [], []
        for seed, config in zip(study.seeds, cell.configs, strict=True):
            run_dir = out / _folder(cell.row, cell.column) / f"seed{seed}"
            say(f"{run_dir}: {cell.row}, {cell.column}")
            accuracies.append(_train_and_evaluate(config, run_dir, show_progress))
            run_dirs.append(str(run_dir))
        results.append({"row": cell.row, "column": cell.column, "runs": run_dirs, **_spreads(accuracies)})
        if len(results) == 1:
            random = [run_accuracy(Path(run_dir), random_init=True) for run_dir in run_dirs]
            results.insert(0, {"row": RANDOM, "column": cell.column, "runs": run_dirs, **_spreads(random)})
    result = {"title": study.title, "seeds": list(study.seeds), "cells": results}
    records.write_json(out / RESULTS, result)
    say(f"\n{table(result)}")
    return result


def table(result: dict[str, Any]) -> str:
    """The cells of `run_study` as text: a block a metric, mean ± sample standard deviation in percent."""
    rows = list(dict.fromkeys(cell["row"] for cell in result["cells"]))
    columns = list(dict.fromkeys(cell["column"] for cell in result["cells"]))
    cells = {(cell["row"], cell["column"]): cell for cell in result["cells"]}
    width = max(len(row) for row in rows) + 2
    num_seeds = len(result["seeds"])
    lines = [f"{result['title']}; n = {num_seeds} seed{'s' if num_seeds > 1 else ''}, %"]
    for metric, name in METRICS.items():
        lines += ["", f"{name:<{width}}" + "".join(f"{column:>16}" for column in columns)]
        for row in rows:
            shown = [_shown(cells.get((row, column)), metric) for column in columns]
            lines.append(f"{row:<{width}}" + "".join(f"{text:>16}" for text in shown))
    return "\n".join(lines)


def _shown(cell: dict[str, Any] | None, metric: str) -> str:
    if cell is None:
        return ""
    spread = cell[metric]
    return f"{spread['mean']:.1%}" + (f" ± {100 * spread['stdev']:.1f}" if spread["n"] > 1 else "")


def _train_and_evaluate(config: Config, run_dir: Path, show_progress: bool) -> dict[str, float]:
    summary = pretrain(config, run_dir, show_progress=show_progress)
    if summary.signal_number is not None:
        signal.raise_signal(summary.signal_number)
    return run_accuracy(run_dir)


def _spreads(accuracies: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    spreads = {}
    for metric in METRICS:
        values = [accuracy[metric] for accuracy in accuracies]
        stdev = statistics.stdev(values) if len(values) > 1 else 0.0
        spreads[metric] = {
            "n": len(values),
            "mean": statistics.fmean(values),
            "stdev": stdev,
            "values": values,
        }
    return spreads


def _has_config(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("config"), str)


def _filled(value: Any, row: str) -> Any:
    """A nested value with the row's name in place of {row}."""
    if isinstance(value, dict):
        return {key: _filled(item, row) for key, item in value.items()}
    return value.replace("{row}", row) if isinstance(value, str) else value


def _folder(row: str, column: str) -> str:
    """Of a cell's runs: the names' letters and digits."""
    return "-".join(re.findall(r"\w+", f"{row} {column}")).lower()
