"""Faults injected into files, runs, conversions and studies: which are noticed, which are harmless, which are neither.

    python tools/faults [PART ...] [--count-share 1.0] [--seed N] [--out FILE.json]

Everything it needs is made in a temporary folder. Exit code 0 only when every fault was noticed or harmless.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

# Before torch and numba are imported: threads that wait leave the core to others.
os.environ["OMP_WAIT_POLICY"] = "passive"

import children
from tally import BAD, VERDICTS, Injection, table

PARTS = {
    "flips": "flips_beton",
    "checkpoint": "flips_checkpoint",
    "kills": "kills_runs",
    "conversion": "kills_conversion",
    "study": "kills_study",
    "disk": "full_disk",
}
"""Each a module with a function `inject`."""
IMPORTED = (
    "fast_essl.cli",
    "fast_essl.config_io",
    "fast_essl.evaluate_run",
    "fast_essl.export",
    "fast_essl.pretrain",
    "fast_essl.study",
    "loaders.convert",
    "loaders.device_loader",
    "loaders.torch_loader",
    "loaders.views",
    "PIL.BmpImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "torch._dynamo",
    "tyro",
)
"""What the children use, imported once; torch._dynamo alone takes a second and comes with the first optimizer."""
NUM_SHOWN = 4
"""Injections of a kind and a verdict that are printed; the file of `--out` has them all."""


def main() -> int:
    """Run the parts that are asked for, print the table; returns the exit code."""
    arguments = _arguments()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    injections: list[Injection] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        for part in arguments.parts or PARTS:
            folder = Path(name) / part
            folder.mkdir()
            part_started = time.monotonic()
            in_parallel = partial(_in_parallel, part=part, folder=folder, num_processes=arguments.jobs)
            found = importlib.import_module(PARTS[part]).inject(
                folder, share=arguments.count_share, seed=arguments.seed, in_parallel=in_parallel
            )
            injections += found
            print(f"{part}: {_counts(found)}; {time.monotonic() - part_started:.0f} s", flush=True)
    bad = [injection for injection in injections if injection.verdict in BAD]
    shown: Counter[tuple[str, str]] = Counter()
    for injection in bad:
        shown[injection.kind, injection.verdict] += 1
        if shown[injection.kind, injection.verdict] > NUM_SHOWN:
            continue
        print(f"{injection.verdict}: {injection.kind}: {injection.fault}: {injection.detail[:300]}")
    print(f"\n{table(injections)}\n\n{time.monotonic() - started:.0f} s, seed {arguments.seed}")
    if arguments.out is not None:
        _write(arguments.out, arguments, injections)
    return 1 if bad else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tools/faults", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--count-share", type=float, default=1.0, help="of the faults (default: 1.0, all)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of faults (default: 0)")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one a core)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="all injections with their reasons")
    return parser.parse_args()


def _in_parallel(items: Any, work: Any, *, part: str, folder: Path, num_processes: int) -> list[Any]:
    last = time.monotonic()

    def done(number: int) -> None:
        nonlocal last
        if time.monotonic() - last > 30:
            last = time.monotonic()
            print(f"{part}: {number} of {len(items)} done", flush=True)

    return children.in_parallel(items, work, folder=folder, num_processes=num_processes, done=done)


def _counts(injections: list[Injection]) -> str:
    counts = Counter(injection.verdict for injection in injections)
    return f"{len(injections)} injected, " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)


def _write(path: Path, arguments: argparse.Namespace, injections: list[Injection]) -> None:
    record = {
        "command": " ".join(sys.argv),
        "seed": arguments.seed,
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "injections": [asdict(injection) for injection in injections],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
