"""The paper's table on cells: four rows, over numbers of labels and seeds; what is finished is reused.

<out>/<row>/seed<seed>/     a run: its checkpoint, and finetune-<num_labels>.json
<out>/study.json            the table
<out>/study.html, cells.html   the pages
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import statistics
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, get_args

from fast_essl import records
from fast_essl.evaluate_run import resolve_device
from fast_essl.losses import dos_error
from fast_essl.photonics.config import ROWS, PhotonicsConfig, Row, of_row
from fast_essl.photonics.finetune import (
    empty_lattice,
    finetune,
    labelled,
    result_path,
    starting_backbone,
    target,
    weights_and_cells,
)
from fast_essl.photonics.generate import generate
from fast_essl.photonics.model import build_cell_method
from fast_essl.photonics.pretrain import pretrain_cells
from fast_essl.photonics.store import CellFile, read_cells
from loaders.errors import DataError
from loaders.machine import num_cores
from loaders.signals import terminated_as_exit

RESULTS = "study.json"
METRICS = ("test_error", "validation_error")


def run_study(
    config: PhotonicsConfig,
    out: Path,
    *,
    say: Callable[[str], None] = print,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Make the cells where they are not there, run every row for every seed, print the table, write it to `out`.

    Returns: `seeds`, `num_labels`, `empty_lattice_error` (of predicting no structure at all, on the test cells), and
    `cells`: for each row and number of labels n, mean, sample standard deviation and values of both errors.
    Errors: `ConfigError`, `DataError`, `OSError`, `NonFiniteLossError`.
    """
    device, _ = resolve_device(config)
    rows: tuple[Row, ...] = get_args(Row)
    runs = {(row, seed): of_row(config, row, seed) for row in rows for seed in config.study.seeds}
    for row in rows:
        build_cell_method(runs[row, config.study.seeds[0]])  # what cannot be built is said before any work
    file = generate(
        config.data.file,
        cells=config.cells,
        solver=config.solver,
        counts=config.counts,
        device=device,
        num_threads=num_cores(),
        show_progress=show_progress,
        say=say,
    )
    for name in ("train", "validation", "test"):
        labelled(file, name, config.data.file)
    workers = config.study.workers or (num_cores() if device.type == "cpu" else 1)
    # Seed by seed: what is there when it is stopped compares all rows.
    tasks = [(runs[row, seed], row, out / row / f"seed{seed}") for seed in config.study.seeds for row in rows]
    for number, run_dir in enumerate(_all_run(tasks, workers, show_progress), start=1):
        say(f"{number} of {len(tasks)} runs: {run_dir}")
    result = {
        "data": _about(file),
        "seeds": list(config.study.seeds),
        "num_labels": sorted(config.study.num_labels),
        "empty_lattice_error": empty_lattice_error(file, config.data.file),
        "cells": [
            {"row": row, "num_labels": num_labels, **_spreads(out / row, num_labels, config.study.seeds)}
            for row in rows
            for num_labels in sorted(config.study.num_labels)
        ],
    }
    records.write_json(out / RESULTS, result)
    say(f"\n{table(result)}")
    return result


def run_chain(config: PhotonicsConfig, row: Row, run_dir: Path, show_progress: bool) -> None:
    """Pretrain one row's run, where it has pretraining, and fine-tune it with each number of labels.

    Errors: as `pretrain_cells` and `finetune`; a SIGINT or SIGTERM that stopped the run is raised again.
    """
    if row != "none":
        summary = pretrain_cells(config, run_dir, show_progress=show_progress)
        if summary.signal_number is not None:
            signal.raise_signal(summary.signal_number)
    backbone, step = starting_backbone(config, run_dir, pretrained=row != "none")
    measured = weights_and_cells(backbone, read_cells(config.data.file))
    for num_labels in sorted(config.study.num_labels):
        settings = dataclasses.replace(config.finetune, num_labels=num_labels)
        wanted = {"step": step, "measured": measured, "protocol": dataclasses.asdict(settings)}
        if _is_there(result_path(run_dir, num_labels), wanted):
            continue
        finetune(
            dataclasses.replace(config, finetune=settings),
            run_dir,
            pretrained=row != "none",
            show_progress=show_progress,
        )


def _is_there(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether a result was measured of this; a damaged one is measured again."""
    result = records.read_earlier(path)
    return (
        result is not None
        and records.is_sealed(result)
        and wanted == {name: result.get(name) for name in wanted}
    )


def empty_lattice_error(file: CellFile, path: Path) -> float:
    """The test error of predicting every crystal as one without structure."""
    truth = target(labelled(file, "test", path))
    return float(dos_error(empty_lattice().expand_as(truth), truth))


def table(result: dict[str, Any]) -> str:
    """The result as text: relative errors in percent, mean ± sample standard deviation."""
    numbers = result["num_labels"]
    cells = {(cell["row"], cell["num_labels"]): cell["test_error"] for cell in result["cells"]}
    width = max(map(len, ROWS.values())) + 2
    num_seeds = len(result["seeds"])
    lines = [
        f"relative error of the density of states on {result['data']['test']} test cells, %; n = {num_seeds} seeds",
        "",
        f"{'labelled cells':<{width}}" + "".join(f"{number:>16}" for number in numbers),
    ]
    for row, name in ROWS.items():
        shown = [f"{100 * s['mean']:.2f} ± {100 * s['stdev']:.2f}" for s in (cells[row, n] for n in numbers)]
        lines.append(f"{name:<{width}}" + "".join(f"{text:>16}" for text in shown))
    lines += ["", f"predicting no structure: {100 * result['empty_lattice_error']:.2f}"]
    return "\n".join(lines)


def _all_run(
    tasks: list[tuple[PhotonicsConfig, Row, Path]], workers: int, show_progress: bool
) -> Iterator[Path]:
    """Run all, several at a time; yields the folder of each when it is done."""
    if workers == 1:
        for config, row, run_dir in tasks:
            run_chain(config, row, run_dir, show_progress)
            yield run_dir
        return
    # Two progress bars would write over each other: the study tells of finished runs instead.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    forkserver.ensure_running()  # before SIGTERM is blocked below, which it would pass on to all runs
    waiting, running = tasks[::-1], dict[Connection, tuple[BaseProcess, Path]]()
    with terminated_as_exit():
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    task = waiting.pop()
                    ours, theirs = context.Pipe(duplex=False)
                    process = context.Process(target=_run_and_tell, args=(theirs, *task), daemon=True)
                    # A SIGTERM in between would leave a process that nobody stops.
                    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
                    try:
                        process.start()
                        running[ours] = process, task[2]
                    finally:
                        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
                    theirs.close()
                for connection in wait(list(running)):
                    assert isinstance(connection, Connection)
                    _raise_what_it_tells(connection, running[connection][1])
                    yield running.pop(connection)[1]
        finally:
            for unfinished, _ in running.values():
                unfinished.terminate()  # a run that pretrains saves a checkpoint first
            for unfinished, _ in running.values():
                unfinished.join()


def _run_and_tell(connection: Connection, config: PhotonicsConfig, row: Row, run_dir: Path) -> None:
    """Run a chain in a process of its own, and send its error or None."""
    # Ctrl-C goes to all processes of the terminal; the first process alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    error: Exception | None = None
    try:
        run_chain(config, row, run_dir, show_progress=False)
    except Exception as raised:
        error = raised
    connection.send(error)


def _raise_what_it_tells(connection: Connection, run_dir: Path) -> None:
    try:
        error = connection.recv()
    except EOFError:
        raise DataError(
            f"{run_dir}: its process died (killed, or out of memory): --study.workers 1 shows where; the same "
            "command continues"
        ) from None
    if error is not None:
        raise error


def _spreads(row_dir: Path, num_labels: int, seeds: tuple[int, ...]) -> dict[str, Any]:
    paths = [result_path(row_dir / f"seed{seed}", num_labels) for seed in seeds]
    results = [records.read_json(path, remedy="the same command makes it again") for path in paths]
    spreads: dict[str, Any] = {}
    for metric in METRICS:
        values = [result[metric] for result in results]
        spreads[metric] = {
            "n": len(values),
            "mean": statistics.fmean(values),
            "stdev": statistics.stdev(values) if len(values) > 1 else 0.0,
            "values": values,
        }
    return spreads


def _about(file: CellFile) -> dict[str, Any]:
    return {**{name: len(split) for name, split in file.splits.items()}, "digest": file.digest}
