"""Records: results as dated JSON files in benchmarks/records, each with what it takes to judge and repeat them."""

from __future__ import annotations

import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fast_essl.records import write_json
from fast_essl.run_folder import describe_environment

RECORDS = Path(__file__).resolve().parent / "records"


def machine_facts() -> dict[str, Any]:
    """Date, command, commit, versions, CPU model, cores, GPUs and memory of this process and machine."""
    facts = describe_environment(shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]))
    num_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {**facts, "memory_gib": round(num_bytes / 2**30, 1)}


def spread(values: Sequence[float]) -> dict[str, float | int | list[float]]:
    """A list of measurements as n, mean, sample standard deviation (0 for one), and the values themselves."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"n": len(values), "mean": statistics.fmean(values), "stdev": deviation, "values": list(values)}


def write_record(subject: str, results: dict[str, Any], *, facts: dict[str, Any] | None = None) -> Path:
    """Write benchmarks/records/YYYY-MM-DD-<subject>.json and return its path; a second one of a day replaces it.

    Args: `facts` are `machine_facts()` as of before the measurement, by default as of now.
    """
    facts = facts or machine_facts()
    path = RECORDS / f"{facts['date'][:10]}-{subject}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**facts, "results": results})
    return path
