"""LEADERBOARD.md: the speed-run records of a folder as one table, written anew from them each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fast_essl import records
from loaders.errors import DataError

LEADERBOARD = "LEADERBOARD.md"
HEADER = """# Speed-runs

One row a record of `fast-essl speedrun`; the command writes this file anew from the records beside it. Time: training
and the evaluations that decide when to stop, mean ± sample standard deviation over the runs; conversion of the data and
preparation (opening it, compiling) stand in the records alone. kNN: k = 10, cosine, test split, at the end of a run.

| data | target kNN, % | reached | time, s | of it evaluation, s | kNN, % | device | commit | record |
|---|---|---|---|---|---|---|---|---|
"""


def read_records(record_dir: Path) -> dict[str, dict[str, Any]]:
    """The speed-run records of a folder by their files' names. Errors: `DataError` naming a damaged one; `OSError`."""
    found = {}
    for path in sorted(record_dir.glob("*.json")):
        record = records.read_any_json(path, remedy="repair it or move it away")
        if isinstance(record, dict) and record.get("kind") == "speedrun":
            try:
                _rank(record)
                _row(path.name, record)
            except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
                raise DataError(
                    f"{path}: not a whole record ({error!r}); repair it or move it away"
                ) from None
            found[path.name] = record
    return found


def write_leaderboard(record_dir: Path) -> Path:
    """Write the table: by data, then the higher target, then the shorter time or, without a target, the higher kNN.

    Records whose target not all runs reached stand below the others of it, without a time.

    Errors: as `read_records`.
    """
    rows = sorted(read_records(record_dir).items(), key=lambda item: _rank(item[1]))
    path = record_dir / LEADERBOARD
    records.write_text(path, HEADER + "".join(_row(name, record) for name, record in rows))
    return path


def _rank(record: dict[str, Any]) -> tuple[Any, ...]:
    target, results = record["goal"]["target"], record["results"]
    accuracy = results["knn_top1"]["mean"]
    if not target:
        return record["data"], 0.0, 0, -accuracy
    if results["time_s"] is None:
        return record["data"], -target, 1, -accuracy
    return record["data"], -target, 0, results["time_s"]["mean"]


def _row(name: str, record: dict[str, Any]) -> str:
    target, results = record["goal"]["target"], record["results"]
    on_gpu = record["device"].startswith("cuda") and record["gpus"]
    device = record["gpus"][0] if on_gpu else f"{record['cpu']}, {record['num_cores']} cores"
    cells = [
        record["data"],
        f"{100 * target:.1f}" if target else "none",
        f"{results['num_reached']} of {results['num_runs']}" if target else f"{results['num_runs']} runs",
        _spread(results["time_s"], 1, ".1f"),
        _spread(results["evaluation_s"], 1, ".1f"),
        _spread(results["knn_top1"], 100, ".2f"),
        device,
        _short(record["commit"]),
        f"[{name.removesuffix('.json')}]({name})",
    ]
    return f"| {' | '.join(cells)} |\n"


def _spread(values: dict[str, Any] | None, factor: float, form: str) -> str:
    if values is None:
        return "not by all"
    mean = format(factor * values["mean"], form)
    return f"{mean} ± {format(factor * values['stdev'], form)}" if values["n"] > 1 else mean


def _short(commit: str | None) -> str:
    if commit is None:
        return "none"
    number, dash, dirty = commit.partition("-")
    return number[:10] + dash + dirty
