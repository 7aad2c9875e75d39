"""How fast is the training step? Forms of it side by side, on data that lies on the device: the loader-free ceiling.

    python benchmarks/step.py [e_simclr_imagenet] [--batch-size 256] [--steps 20] [--rows official best ...] [--record]

Each row is a whole step, forward, losses, backward and optimizer, in another form:

    official        contiguous NCHW, fp16 with a GradScaler, eager: as the official release runs it
    channels-last   channels-last, bf16, eager
    compiled        the same with the backbone through torch.compile
    graphs          the same, replayed as CUDA graphs (mode reduce-overhead)
    kernels         the last one with the fused prediction head and InfoNCE
    apex            graphs with apex's LayerNorm and, where the configuration has SGD, its optimizer; if it is installed
    whole           kernels, fed by the view stage from uint8 crops on the device

On a CPU everything is fp32, and rows that need CUDA are left out. Warm: some steps are not counted, and neither is
compilation, which is told apart. Medians of steps, timed with device events; TFLOP/s from the counted operations of
convolutions and matrix products.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from record import machine_facts, write_record

from fast_essl.bench.step import Form, step_rows
from fast_essl.config import Config, ConfigError
from fast_essl.config_io import find_config, load_config

ROWS = {
    "official": Form(dtype=torch.float16, channels_last=False),
    "channels-last": Form(),
    "compiled": Form(compile="default"),
    "graphs": Form(compile="reduce-overhead"),
    "kernels": Form(compile="reduce-overhead", backend="triton"),
    "apex": Form(compile="reduce-overhead", backend="apex"),
    "whole": Form(compile="reduce-overhead", backend="triton", view_stage=True),
}
CPU_ROWS = {
    "official": Form(dtype=torch.float32, channels_last=False),
    "channels-last": Form(dtype=torch.float32),
    "compiled": Form(dtype=torch.float32, compile="default"),
    "whole": Form(dtype=torch.float32, view_stage=True),
}


def main() -> int:
    """Measure the rows, print the table, write the record if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", type=Path, default=Path("e_simclr_imagenet"))
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", nargs="+")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = ROWS if device.type == "cuda" else CPU_ROWS
    chosen = arguments.rows or list(rows)
    if unknown := [name for name in chosen if name not in rows]:
        print(f"step: error: rows {unknown} are not of {', '.join(rows)} on {device.type}", file=sys.stderr)
        return 2
    try:
        config = load_config(find_config(arguments.config), ["--train.batch-size", str(arguments.batch_size)])
    except (ConfigError, OSError) as error:
        print(f"step: error: {error}", file=sys.stderr)
        return 2
    facts = machine_facts()
    print(f"{arguments.config}, batch {arguments.batch_size}, {facts['gpus'] or facts['cpu']}")
    print(f"{'':16}{'ms a step':>12}{'range':>20}{'samples/s':>12}{'TFLOP/s':>10}{'GiB':>8}{'compile s':>11}")
    results: dict[str, Any] = {}
    for name in chosen:
        try:
            result = results[name] = measure(config, rows[name], device, arguments.steps)
        except ConfigError as error:
            print(f"without the row {name}: {error}")
            continue
        span = f"{result['step_ms_min']:.1f} – {result['step_ms_max']:.1f}"
        print(
            f"{name:16}{result['step_ms']:12.1f}{span:>20}{result['samples_per_s']:12.0f}{result['tflop_per_s']:10.1f}"
            f"{result['peak_gib']:8.1f}{result['compile_s']:11.1f}",
            flush=True,
        )
    if not results:
        return 2
    if "official" in results:
        for name, result in results.items():
            print(f"{name}: {results['official']['step_ms'] / result['step_ms']:.2f} × the official form")
    if arguments.record:
        content = {"config": str(arguments.config), "batch_size": arguments.batch_size, "rows": results}
        print(write_record(f"step-{arguments.config.stem.replace('_', '-')}", content, facts=facts))
    return 0


def measure(config: Config, form: Form, device: torch.device, num_steps: int) -> dict[str, Any]:
    """Median, least and most milliseconds of a step, and what follows from them."""
    rows, _ = step_rows(config, form, device, num_steps)
    row = rows[-1]
    return {
        "step_ms": row.batch_ms["median"],
        "step_ms_min": row.batch_ms["min"],
        "step_ms_max": row.batch_ms["max"],
        "n": num_steps,
        "samples_per_s": row.samples_per_s,
        "tflop_per_s": row.tflop_per_s,
        "peak_gib": row.peak_gib or 0.0,
        "compile_s": row.setup_s,
        "form": form.to_table(),
    }


if __name__ == "__main__":
    sys.exit(main())
