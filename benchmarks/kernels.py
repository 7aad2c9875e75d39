"""How fast are the fused kernels, beside eager torch, torch.compile and apex? Forward and backward, in one run.

    python benchmarks/kernels.py [--repeats 30] [--record]

The workloads, and how they are measured, stand in fast_essl/bench/kernels.py; `fast-essl bench kernels` tells the same.
"""

from __future__ import annotations

import argparse
import sys

import torch
from record import machine_facts, write_record

from fast_essl.bench.table import describe_kernels


def main() -> int:
    """Measure, print the table, write the record if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/DATE-kernels.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels: error: there is no CUDA device here", file=sys.stderr)
        return 2
    from fast_essl.bench.kernels import measure_kernels  # needs triton

    facts = machine_facts()
    results = measure_kernels(torch.device("cuda"), arguments.repeats)
    print(describe_kernels(results))
    if arguments.record:
        print(write_record("kernels", results, facts=facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
