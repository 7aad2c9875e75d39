"""Does everything that needs a GPU work, and how fast is it? The GPU tests and benchmarks, in one record.

    python benchmarks/gpu_check.py [--quick]

Runs the tests that use a device, then the benchmarks of view stage, kernels and step, each in a process of its own, and
writes one dated record of them all. Ends with 1 if any of them failed; the record then says which.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from record import machine_facts, write_record

HERE = Path(__file__).resolve().parent
BENCHMARKS = {
    "views": ["views.py", "--device", "cuda"],
    "kernels": ["kernels.py"],
    "step": ["step.py", "e_simclr_imagenet", "--batch-size", "256"],
}
QUICK = {"step": ["step.py", "e_simclr_cifar10", "--batch-size", "512", "--steps", "5"]}


def main() -> int:
    """Run all, print as it goes, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the small step benchmark, not ResNet-50's")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: error: there is no CUDA device here", file=sys.stderr)
        return 2
    facts = machine_facts()
    results: dict[str, Any] = {}
    code, output = _run([sys.executable, "-m", "pytest", "-m", "gpu or device", "-q"], HERE.parent)
    results["tests"] = {"exit_code": code, "summary": output[-1] if output else ""}
    failed = ["tests"] if code else []
    for name, words in {**BENCHMARKS, **(QUICK if arguments.quick else {})}.items():
        code, output = _run([sys.executable, *words, "--record"], HERE)
        if code:
            failed.append(name)
            results[name] = {"exit_code": code, "output": output[-20:]}
            continue
        record = Path(output[-1])  # its record, which becomes a part of this one
        results[name] = json.loads(record.read_text("utf-8"))["results"]
        record.unlink()
    path = write_record("gpu-check", {"failed": failed, **results}, facts=facts)
    print(f"gpu-check: {'failed: ' + ', '.join(failed) if failed else 'all passed'}; {path}")
    return 1 if failed else 0


def _run(command: list[str], folder: Path) -> tuple[int, list[str]]:
    """Run a command, its output shown as it comes; returns its exit code and lines."""
    print(f"\n$ {' '.join(Path(word).name for word in command)}", flush=True)
    lines = []
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.strip():
                lines.append(line.rstrip())
    return process.returncode, lines


if __name__ == "__main__":
    sys.exit(main())
